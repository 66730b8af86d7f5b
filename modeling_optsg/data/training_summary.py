"""The summary that a training run leaves in its checkpoint, and what it says about where the model comes from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from modeling_optsg.towers import HALVES

SUMMARY = "training_summary.json"
# Packaged towers with the same weights as a model on the Hub.
HUB_TOWERS = {"all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2"}


def read_training_summary(checkpoint: str) -> dict:
    """Return the training summary of a checkpoint, empty if it has none.

    Args:
        checkpoint: Folder or Hub name.

    Raises:
        ValueError: It is not a JSON object.
    """
    path = cached_file(
        checkpoint,
        SUMMARY,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return {}
    try:
        summary = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return summary


def summary_towers(summary: Mapping) -> dict[str, dict[str, Any]]:
    """Return the towers of a trained model.

    Args:
        summary: The training summary. In those of earlier versions, the towers are known from the arguments only.

    Returns:
        By `vision` and `text`: `name`, the packaged tower, folder or Hub name, `None` if it is not known; `model_type`
        of its configuration, if known; and `trained`, whether it was ever trained here, `None` if that is not known.
        A model on frame features has no vision tower.
    """
    if "towers" in summary:
        return summary["towers"]
    arguments = summary.get("arguments", {})
    trained = {
        "vision": arguments.get("train_vision_tower"),
        # The first phase has trained the text tower.
        "text": arguments.get("train_text_layers") or arguments.get("classifier_checkpoint"),
    }
    names = {half: arguments.get(f"{half}_tower") for half in HALVES}
    return {
        half: {"name": name, "trained": bool(trained[half])}
        for half, name in names.items()
        if name not in (None, "none")
    }


def summary_base_models(summary: Mapping) -> list[str]:
    """Return the Hub names of the models that a trained model was made from, as far as they are known."""
    if "base_models" in summary:
        return summary["base_models"]
    names = [tower["name"] for tower in summary_towers(summary).values()]
    return [HUB_TOWERS[name] for name in names if name in HUB_TOWERS]
