"""Dataset cards of exported datasets, with their sizes and statistics."""

import re
from collections.abc import Mapping

from datasets import DatasetDict, DatasetInfo, Features, SplitDict, SplitInfo, Video
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

STATISTICS_SECTION = re.compile(r"(<!-- statistics -->\n).*?(<!-- /statistics -->)", re.DOTALL)
# The Hub's size categories lie between these powers of ten, from 10 ** 3 to 10 ** 9.
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
_TEXT = """
# {name}

Examples with free-form tags, exported with `optsg export`. Columns: {columns}.

```python
from datasets import load_dataset

dataset = load_dataset("{name}")
```
{videos}
<!-- statistics -->
<!-- /statistics -->
"""
_VIDEOS = """
[torchcodec](https://github.com/pytorch/torchcodec) decodes `video`. Without it,
`dataset.cast_column("video", datasets.Video(decode=False))` gives the paths of the videos.
"""


def new_card(name: str, dataset: DatasetDict, license: str | None, language: list[str] | None) -> DatasetCard:
    """Make a card for a dataset that has none.

    Args:
        name: Name of the dataset, such as that of its folder or repository.
        dataset: The splits.
        license: The Hub's identifier of a licence, such as `"cc-by-4.0"`; `"unknown"` by default.
        language: The Hub's identifiers of languages, such as `["en"]`.
    """
    features = next(iter(dataset.values())).features
    data = DatasetCardData(
        pretty_name=name,
        license=license or "unknown",
        language=language,
        task_categories=["video-classification" if "video" in features else "image-classification"],
        tags=["tagging"],
    )
    columns = ", ".join(f"`{column}`" for column in features)
    text = _TEXT.format(name=name, columns=columns, videos=_VIDEOS if isinstance(features.get("video"), Video) else "")
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}")


def fill_card(
    card: DatasetCard,
    dataset: DatasetDict,
    num_bytes: Mapping[str, int],
    data_files: Mapping[str, str],
    statistics: Mapping[str, int | float],
) -> None:
    """Add the metadata that `datasets` and the Hub read, and the statistics.

    Args:
        card: The card to change. Statistics replace its `<!-- statistics -->` … `<!-- /statistics -->` section, or are
            appended if it has none.
        dataset: The splits.
        num_bytes: Size of the files of each split.
        data_files: Pattern of the files of each split.
        statistics: Names and values to show.
    """
    DatasetInfosDict(default=_dataset_info(dataset, num_bytes)).to_dataset_card_data(card.data)
    # `datasets` would otherwise find splits by file names, which works for some names of splits only.
    files = [{"split": str(split), "path": pattern} for split, pattern in data_files.items()]
    card.data.configs = [{"config_name": "default", "data_files": files}]
    card.data.size_categories = [_size_category(statistics["examples"])]
    if not STATISTICS_SECTION.search(card.text):
        card.text += "\n<!-- statistics -->\n<!-- /statistics -->\n"
    card.text = STATISTICS_SECTION.sub(lambda match: match[1] + _table(statistics) + match[2], card.text)


def _dataset_info(dataset: DatasetDict, num_bytes: Mapping[str, int]) -> DatasetInfo:
    features = Features(next(iter(dataset.values())).features)
    if isinstance(features.get("video"), Video):
        features["video"] = Video()
    splits = SplitDict(
        {
            split: SplitInfo(split, num_bytes=num_bytes[split], num_examples=len(rows))
            for split, rows in dataset.items()
        }
    )
    total = sum(num_bytes.values())
    return DatasetInfo(features=features, splits=splits, download_size=total, dataset_size=total)


def _size_category(examples: int) -> str:
    """Return the Hub's name for a number of examples, such as `10K<n<100K`."""
    index = sum(examples >= 10 ** (3 + power) for power in range(len(_SIZES)))
    if index == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if index == len(_SIZES) else f"{_SIZES[index - 1]}<n<{_SIZES[index]}"


def _table(statistics: Mapping[str, int | float]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value:,} |" for name, value in statistics.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"
