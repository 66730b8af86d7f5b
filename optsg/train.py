"""`optsg train`: train OP-TSG or a baseline, or fine-tune a checkpoint."""

import argparse


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `train` to the sub-commands of `optsg`."""
    parser = commands.add_parser(
        "train",
        help="train a model or fine-tune a checkpoint",
        description="Trains OP-TSG or a baseline on a tagging dataset, or fine-tunes a checkpoint with --checkpoint.\n"
        "For several processes: accelerate launch examples/train.py with the same arguments.",
        add_help=False,
        prefix_chars="\0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # The arguments are those of `OPTSGTrainingArguments`, which has a parser of its own.
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from modeling_optsg.training.trainer import run_command

    words = list(args.arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--dataset")
    return run_command(words, prog="optsg train")
