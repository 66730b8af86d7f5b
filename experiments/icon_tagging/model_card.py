"""Write the model card of a checkpoint that was trained on icon-tagging.

    python experiments/icon_tagging/model_card.py --checkpoint checkpoints/optsg-icon-small \
        --results results/icon_tagging/optsg-icon-small.json

The numbers come from the training summary and the result file. The model predicts the tags of the example images.
`optsg push` writes the cards of other checkpoints.
"""

import argparse
import shutil
from pathlib import Path

from modeling_optsg.hub import write_model_card

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/images"
USE = """\
The model was trained on icons and simple drawings on a white background, with short English titles. Pass a title if
there is one. A photograph without a title is tagged by its image words: the classes that the vision tower predicts.
These classes are often wrong, and so are the tags.

The tags are predictions with a probability, not facts. The model repeats the habits and the gaps of the people who
tagged the training images. A tag marked as *novel* does not occur in any training example, and may be a word that does
not exist. Do not use the model to identify or judge people."""
LICENSE_DETAILS = """\
The vision tower
is EfficientNet-Lite0 (Apache-2.0), and the text tower is all-MiniLM-L6-v2 (Apache-2.0). The training images and the
example images come from icon sets with their own licences. The file NOTICE names their authors and these licences."""


def main() -> None:
    """Write the card that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="output of examples/score.py; by default validation metrics")
    arguments = parser.parse_args()

    checkpoint, results = arguments.checkpoint, arguments.results
    score_command = f"python examples/score.py --checkpoint {checkpoint.as_posix()} --output {results}"
    write_model_card(
        checkpoint,
        results,
        name=checkpoint.name,
        dataset_name="icon-tagging",
        score_command=score_command if results else None,
        license="apache-2.0",
        language="en",
        examples=sorted(EXAMPLES.glob("*.png")),
        use=USE,
        license_details=LICENSE_DETAILS,
    )
    for source in (ROOT / "LICENSE", ROOT / "dataset_scripts/icon_tagging/NOTICE"):
        shutil.copyfile(source, checkpoint / source.name)
    print(checkpoint / "README.md")


if __name__ == "__main__":
    main()
