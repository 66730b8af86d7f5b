"""Writes a checkpoint's model card from its training summary and its result file.

    python examples/model_card.py --checkpoint checkpoints/optsg-icon-small \
        --results results/icon_tagging/optsg-icon-small.json
"""

import argparse
from pathlib import Path

from modeling_optsg.hub import write_model_card

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
)
print(arguments.checkpoint / "README.md")
