r"""Evaluate a checkpoint on a tagging dataset and write the metrics to a JSON file.

    python examples/score.py --checkpoint checkpoints/optsg-icon-small \
        --output results/icon_tagging/optsg-icon-small.json

This is `optsg evaluate` with the argument names of `examples/train.py`. The decoding settings are those of the
checkpoint, which `examples/train.py` fitted on the validation examples. The settings of kNN are fitted on the same
examples. Nothing is fitted on the test split.
"""

import argparse
from pathlib import Path

from dataset_scripts import load_tagging_dataset
from dataset_scripts.column_names import add_column_arguments, column_arguments
from modeling_optsg.evaluation.checkpoint_evaluation import evaluate_checkpoint, result_lines, write_result


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of the model")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dataset", default="icon_tagging", help="benchmark, folder or Hub name of the dataset")
    add_column_arguments(parser)
    parser.add_argument("--dataset_dir", help="cache folder of the datasets library")
    parser.add_argument(
        "--split", help="split to score (default: test, or else validation, or else the examples that are set aside)"
    )
    parser.add_argument(
        "--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser(), help="cache folder for tower features"
    )
    parser.add_argument("--max_unreadable", type=int, default=100, help="maximum number of unreadable examples")
    parser.add_argument("--batch_size", type=int, default=64, help="number of examples per batch")
    return parser.parse_args()


def main() -> None:
    """Run the program."""
    arguments = parse_arguments()
    result = evaluate_checkpoint(
        arguments.checkpoint,
        load_tagging_dataset(arguments.dataset, cache_dir=arguments.dataset_dir, **column_arguments(arguments)),
        arguments.dataset,
        split=arguments.split,
        cache_dir=arguments.cache_dir,
        max_unreadable=arguments.max_unreadable,
        batch_size=arguments.batch_size,
    )
    print("\n".join(result_lines(result)))
    write_result(result, arguments.output)


if __name__ == "__main__":
    main()
