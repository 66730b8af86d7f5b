"""The argument `--model` of the commands that use the shipped checkpoint by default."""

import argparse
from pathlib import Path

DEFAULT_MODEL = Path("checkpoints", "optsg-icon-small")
# File in a folder from `optsg export-onnx`.
EXPORT_SETTINGS = "settings.json"


def add_model_argument(
    parser: argparse._ActionsContainer, kinds: str = "checkpoint folder or name on the Hub"
) -> None:
    """Add `--model`; `kinds` says what it may name."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{kinds} (default: {DEFAULT_MODEL}, which was trained on icons and simple drawings with short English "
        "titles, not on photographs)",
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


def is_export(model: str) -> bool:
    """Return whether a model is a folder from `optsg export-onnx`."""
    return Path(model, EXPORT_SETTINGS).is_file() and not Path(model, "config.json").is_file()
