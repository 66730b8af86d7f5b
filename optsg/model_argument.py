"""The argument `--model` of the commands that use the shipped checkpoint by default."""

import argparse
from pathlib import Path

DEFAULT_MODEL = Path("checkpoints", "optsg-icon-small")


def add_model_argument(parser: argparse._ActionsContainer) -> None:
    """Add `--model`."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"checkpoint folder or name on the Hub (default: {DEFAULT_MODEL}, which was trained on icons and simple "
        "drawings with short English titles, not on photographs)",
    )


def chosen_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Return the given model, or else the folder of the shipped checkpoint, here or in a clone.

    A usage error ends the program if there is neither.
    """
    clone = Path(__file__).parents[1]
    shipped = (str(path) for path in (DEFAULT_MODEL, clone / DEFAULT_MODEL) if path.is_dir())
    if (model := args.model or next(shipped, None)) is None:
        parser.error(f"--model is required: {DEFAULT_MODEL} does not exist here")
    return model
