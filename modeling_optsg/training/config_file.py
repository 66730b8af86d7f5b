"""The JSON file of training arguments that `--config` names."""

import argparse
import json
from pathlib import Path
from typing import Any

EXPECTED = {int: "a whole number", float: "a number", str: "text"}


def read_config_file(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a file of training arguments.

    Args:
        path: The file, a JSON object of arguments.
        parser: The parser of these arguments.

    Returns:
        The values by argument, as defaults of the parser.

    Raises:
        ValueError: The file cannot be read, is not a JSON object, or has an unknown argument or a value of the wrong
            type. The message names the file and the argument.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"--config {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} is not a JSON object")
    actions = {}
    for action in parser._actions:
        if action.dest != "help":
            # The first action of an argument takes its value; a second one is its negation.
            actions.setdefault(action.dest, action)
    if unknown := sorted(set(values) - set(actions)):
        raise ValueError(f"--config {path} sets unknown arguments: {', '.join(unknown)}")
    try:
        return {name: _as_default(actions[name], value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


def _as_default(action: argparse.Action, value: Any) -> Any:
    name = action.dest
    if name == "config_overrides" and isinstance(value, dict):
        return json.dumps(value, allow_nan=False)
    if value is None and action.default is None:
        return None
    expected = EXPECTED.get(action.type, "true or false")
    if action.nargs == "+":
        if not isinstance(value, list) or not all(_has_type(action, item) for item in value):
            raise ValueError(f"{name} is {_shown(value)}; expected a list, each value {expected}")
    elif not _has_type(action, value):
        raise ValueError(f"{name} is {_shown(value)}; expected {expected}")
    return value


def _has_type(action: argparse.Action, value: Any) -> bool:
    """Return whether the command line would take a value, which may be text there."""
    if isinstance(value, bool):
        return action.nargs == "?"
    if not isinstance(value, str) and (action.type is str or not isinstance(value, (int, float))):
        return False
    try:
        action.type(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return True


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
