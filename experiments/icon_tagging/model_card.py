"""Writes a checkpoint's model card from its training summary and its result file, with the handler and the widget's
example images beside it.

    python examples/model_card.py --checkpoint checkpoints/optsg-icon-small \
        --results results/icon_tagging/optsg-icon-small.json
    python examples/model_card.py --checkpoint runs/mine --name org/mine --examples images
"""

import argparse
import json
from pathlib import Path

from dataset_scripts.tagging_folder import IMAGE_SUFFIXES
from modeling_optsg.hub import write_model_card
from modeling_optsg.hub.push_trained import dataset_name

EXAMPLES = Path(__file__).with_name("images")
USE = """\
Tags for images like those it was trained on: icons and simple drawings on white, with a short English title. It has
seen no photographs, and nothing but English titles. Give the title where there is one: of an image alone it says
little, as the metrics show, and of some nothing. What it writes are guesses with a probability, not facts: it repeats
the habits and the gaps of those who tagged the training images, and a tag marked *novel* is one no training example
has, sometimes a word that does not exist. Not for identifying or judging people."""
LICENCES = """\
The vision tower is EfficientNet-Lite0
(Apache-2.0), the text tower all-MiniLM-L6-v2 (Apache-2.0). The training images come from icon sets with licences of
their own, which the dataset card of icon-tagging names, as do the example images."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, required=True)
parser.add_argument("--results", type=Path, help="what examples/score.py wrote; else validation metrics are shown")
parser.add_argument("--name", help="of the model, or of its repository as org/name; the folder's if not given")
parser.add_argument(
    "--dataset_name", help="what the card calls the data; as the training's summary has it if not given"
)
parser.add_argument("--examples", type=Path, help="folder of images for the widget")
parser.add_argument("--use", type=Path, help="file that says in Markdown what the model is for and what it cannot do")
parser.add_argument("--license", help="of the weights, as the Hub names it")
parser.add_argument("--language", nargs="+", help="of titles and tags, such as en")
arguments = parser.parse_args()

about = {"license": arguments.license, "language": arguments.language, "examples": [], "use": None, "licences": None}
summary = json.loads((arguments.checkpoint / "training_summary.json").read_text(encoding="utf-8"))
dataset = arguments.dataset_name or dataset_name(summary["arguments"]["dataset"])
if dataset == "icon-tagging":
    about = {"license": "apache-2.0", "language": "en", "use": USE, "licences": LICENCES}
    about["examples"] = sorted(EXAMPLES.glob("*.png"))
if arguments.examples:
    about["examples"] = sorted(path for path in arguments.examples.iterdir() if path.suffix in IMAGE_SUFFIXES)
if arguments.use:
    about["use"] = arguments.use.read_text(encoding="utf-8").strip()
score_command = f"python examples/score.py --checkpoint {arguments.checkpoint.as_posix()} --output {arguments.results}"
write_model_card(
    arguments.checkpoint,
    arguments.results,
    name=arguments.name or arguments.checkpoint.name,
    dataset_name=dataset,
    score_command=score_command if arguments.results else None,
    **about,
)
print(arguments.checkpoint / "README.md")
