"""Writes a checkpoint's model card from its training summary and its result file, with the handler and the widget's
example pictures beside it.

    python examples/model_card.py --checkpoint checkpoints/optsg-icon-small \
        --results results/icon_tagging/optsg-icon-small.json
"""

import argparse
from pathlib import Path

from modeling_optsg.hub import write_model_card

EXAMPLES = Path(__file__).with_name("pictures")
USE = """\
Tags for pictures like those it was trained on: icons and simple drawings on white, with a short English title. It has
seen no photographs, and nothing but English titles. Give the title where there is one: of a picture alone it says
little, as the figures show, and of some nothing. What it writes are guesses with a probability, not facts: it repeats
the habits and the gaps of those who tagged the training pictures, and a tag marked *novel* is one no training item
has, sometimes a word that does not exist. Not for identifying or judging people."""
LICENCES = """\
The vision tower is EfficientNet-Lite0
(Apache-2.0), the text tower all-MiniLM-L6-v2 (Apache-2.0). The training pictures come from icon sets with licences of
their own, which the dataset card of icon-tagging names, as do the example pictures."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, required=True)
parser.add_argument("--results", type=Path, required=True)
parser.add_argument("--dataset_name", default="icon-tagging")
arguments = parser.parse_args()

write_model_card(
    arguments.checkpoint,
    arguments.results,
    name=arguments.checkpoint.name,
    dataset_name=arguments.dataset_name,
    train_command=f"accelerate launch examples/train.py --preset examples/presets/{arguments.checkpoint.name}.json "
    f"--output_dir {arguments.checkpoint.as_posix()}",
    score_command=f"python examples/score.py --checkpoint {arguments.checkpoint.as_posix()} "
    f"--output {arguments.results.as_posix()}",
    license="apache-2.0",
    language="en",
    examples=sorted(EXAMPLES.glob("*.png")),
    use=USE,
    licences=LICENCES,
)
print(arguments.checkpoint / "README.md")
