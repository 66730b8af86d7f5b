"""Train OP-TSG or a baseline on a tagging dataset, or fine-tune a checkpoint. This is `optsg train`.

    accelerate launch examples/train.py --config examples/configs/optsg-icon-small.json --output_dir runs/icon
    accelerate launch examples/train.py --dataset my_images --checkpoint runs/icon --output_dir runs/mine

The best checkpoint, its fitted generation settings, the log and the summary are written to `--output_dir`. To resume a
stopped run, run the same command again. On SIGTERM, the program saves the state of the run and exits.
"""

import sys

from modeling_optsg.training.trainer import TERMINATED, run_command

if __name__ == "__main__":
    status = run_command()
    # `accelerate launch` reports any other status than 0 as a crash, but a stopped run has saved its state.
    sys.exit(0 if status == TERMINATED else status)
