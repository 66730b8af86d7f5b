"""A card for what a training has left, and the push at its end."""

import json
import logging
import os
import re
from pathlib import Path

from safetensors import SafetensorError

from .commits import PublishingError
from .model_card import write_model_card
from .push_checkpoint import SUMMARY, push_checkpoint

logger = logging.getLogger(__name__)


def write_card_of_training(
    folder: str | os.PathLike, repo_id: str, results: str | os.PathLike | None = None, **settings
) -> None:
    """Writes the card of a checkpoint whose training's summary is beside it, which also says what it was trained on.

    Args:
        results: of `examples/score.py`, for the metrics of the test split; settings: others of [`write_model_card`].

    Raises:
        ValueError: there is no summary, or a file is not what it should be.
    """
    folder = Path(folder)
    if not (folder / SUMMARY).is_file():
        raise ValueError(f"{folder} has no README.md, and no {SUMMARY} to make one from")
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        dataset = dataset_name(summary["arguments"]["dataset"])
        write_model_card(folder, results, name=repo_id, dataset_name=dataset, **settings)
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        what = SUMMARY if results is None else f"{SUMMARY} or {results}"
        raise ValueError(f"{folder}: no card can be made of {what} ({type(error).__name__}: {error})") from error


def dataset_name(dataset: str) -> str:
    """What a card calls a dataset that `examples/train.py` was given: a name on the Hub as it is, a benchmark by its
    usual name, a folder by its own, since where it lay is nobody else's business."""
    path = Path(dataset)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not dataset.startswith(".") and not path.exists():
        return dataset
    return path.name.replace("_", "-") if path.name.endswith("_tagging") else path.name


def push_trained(
    folder: str | os.PathLike, repo_id: str, *, private: bool = False, revision: str | None = None
) -> str | None:
    """Publishes what a training has left in `folder`, with a first card if it has none.

    Returns:
        the commit's page; or `None` if it could not be published, which is logged with the command that tries again.
        The training is finished either way.
    """
    folder = Path(folder)
    try:
        if not (folder / "README.md").is_file():
            write_card_of_training(folder, repo_id)
        published = push_checkpoint(
            folder, repo_id, private=private, revision=revision, commit_message="Training finished"
        )
    except (PublishingError, ValueError, OSError) as error:
        again = f"optsg push {folder} {repo_id}"
        again += (" --private" if private else "") + (f" --revision {revision}" if revision else "")
        logger.warning(f"The training is finished, but not published: {error}. To try again: {again}")
        return None
    logger.info(f"Published: {published.url}")
    return published.url
