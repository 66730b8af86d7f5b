"""`optsg evaluate`: score a checkpoint on a split of a dataset, next to the nearest neighbours on its towers."""

import argparse
import sys
from functools import partial
from pathlib import Path

from .argument_types import positive
from .dataset_arguments import add_dataset_arguments, load_dataset
from .model_argument import add_model_argument, chosen_model
from .terminal import error_line, print_line, printable

EPILOG = """\
The decoding settings are those of the checkpoint. Nearest neighbours are the
tags of similar training examples, found with the towers of the checkpoint.

exit status: 0 the metrics are printed; 2 the arguments, the dataset or the model
cannot be used; 130 interrupted.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `evaluate` to the sub-commands of `optsg`."""
    parser = commands.add_parser(
        "evaluate",
        help="score a checkpoint on a dataset",
        description="Scores a checkpoint, OP-TSG or a baseline, on a split of a tagging dataset. Without the splits\n"
        "test and validation, the same training examples are set aside as in the training.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dataset_arguments(parser)
    add_model_argument(parser)
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="split to score (default: test, or else validation, or else the training examples that are set aside)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for all metrics and settings")
    parser.add_argument(
        "--max-unreadable",
        type=int,
        default=100,
        metavar="N",
        help="maximum number of unreadable examples per split, which are left out (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path("~/.cache/optsg").expanduser(),
        metavar="DIR",
        help="cache folder for tower features (default: ~/.cache/optsg)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="number of examples per batch (default: 64)"
    )
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    model = chosen_model(parser, args)
    if args.max_unreadable < 0:
        parser.error(f"--max-unreadable {args.max_unreadable} must not be negative")
    if args.output and args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; give the name of a file")

    import transformers

    from modeling_optsg.evaluation.checkpoint_evaluation import evaluate_checkpoint, result_lines, write_result

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if args.output:
            # Fail now, not after the predictions.
            args.output.parent.mkdir(parents=True, exist_ok=True)
        result = evaluate_checkpoint(
            model,
            load_dataset(args),
            args.dataset,
            split=args.split,
            cache_dir=args.cache_dir,
            max_unreadable=args.max_unreadable,
            batch_size=args.batch_size,
        )
        for line in result_lines(result):
            print_line(printable(line))
        if args.output:
            write_result(result, args.output)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"optsg evaluate: {error_line(error)}", file=sys.stderr)
        return 2
    return 0
