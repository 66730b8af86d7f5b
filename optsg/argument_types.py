"""Command line arguments, and their types, that several commands have."""

import argparse


def probability(text: str) -> float:
    """Return a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def positive(text: str) -> int:
    """Return an integer of at least 1."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def add_skip_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--skip`."""
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="skip files and folders whose name or path matches, such as '*_edited.jpg' or Scans (repeatable)",
    )
