"""What training does for the Hub at its end: a first model card, and the push."""

import json
import logging
import math
import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .commits import PublishingError
from .publishing import SUMMARY, push_checkpoint

logger = logging.getLogger(__name__)

FIGURES = {"full_f1": "Full F1", "rare_f1": "Rare F1", "common_f1": "Common F1", "micro_f1": "Micro F1"}
_TEXT = """
# {name}

Tags for a picture or a clip and its title, by order-prompted tag sequence generation (system `{system}`), trained on
{items} items.

```python
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
inputs = processor(images="picture.png", titles="its title")
print(processor.batch_decode(model.generate(**inputs))[0])
```

## Figures

In percent, on the {validation} **validation** items that the checkpoint and its settings were chosen on, so higher
than on items it has never met. It was not scored on a test split.

{table}

The arguments of the training are in `{summary}`.
"""


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
            first_card(folder, repo_id).save(folder / "README.md")
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


def first_card(folder: Path, repo_id: str) -> ModelCard:
    """A card with the validation figures of `training_summary.json`, until the checkpoint is scored on a test split.

    Raises:
        FileNotFoundError: the summary is not there.
    """
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    rows = [f"| | {' | '.join(FIGURES.values())} |", "|---" * (len(FIGURES) + 1) + "|"]
    for decoding, fit in summary["fits"].items():
        # There may be no common or no rare tag.
        found = (fit["validation"][figure] for figure in FIGURES)
        cells = [decoding, *("–" if math.isnan(figure) else str(figure) for figure in found)]
        rows.append(f"| {' | '.join(cells)} |")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["tag-generation", "optsg", "image-tagging", "video-tagging"],
    )
    text = _TEXT.format(
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        system=summary["arguments"]["system"],
        items=summary["items"]["train"],
        validation=summary["items"]["validation"],
        table="\n".join(rows),
        summary=SUMMARY,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
