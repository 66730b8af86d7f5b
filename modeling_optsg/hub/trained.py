"""What training does for the Hub at its end: a first model card, and the push."""

import json
import logging
import os
from pathlib import Path

from .commits import PublishingError
from .model_card import write_model_card
from .publishing import SUMMARY, push_checkpoint

logger = logging.getLogger(__name__)


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
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            dataset = Path(summary["arguments"]["dataset"]).name
            write_model_card(folder, name=repo_id, dataset_name=dataset)
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
