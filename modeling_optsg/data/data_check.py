"""Looks for problems in the examples of a dataset before training."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dataset_scripts.media_suffixes import media_kind
from dataset_scripts.tag_counts import TagCounts
from dataset_scripts.tagging_columns import TEXT_COLUMNS

from .data_report import DataReport, LongTag, SplitSummary, TitleConflict
from .file_check import check_files
from .tag_variants import find_tag_variants

BATCH_SIZE = 10_000
# A tag of at least this ratio of the training examples says little about each of them.
FREQUENT_RATIO = 0.9
MIN_FREQUENT_EXAMPLES = 10
_NUMBER = re.compile(r"[\W\d_]*\d[\W\d_]*")


def check_data(
    splits: Mapping[str, Dataset],
    tag_tokenizer: PreTrainedTokenizerBase | None,
    max_tag_tokens: int,
    num_prompts: int,
    *,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    read_files: bool = True,
    progress: bool = False,
) -> DataReport:
    """Count examples and tags, and look for problems with them.

    Tags are left out of training as [`without_untrainable_tags`] does it. An id that occurs in several splits counts
    as repeated unless it is the name of a file or the number of a row: these repeat in different folders and splits.

    Args:
        splits: The splits, as [`load_tagging_dataset`] returns them: rows with `id`, `title`, `tags`, and maybe
            `image` or `video`. What is checked for training is checked in `train`.
        tag_tokenizer: Tokenizer of the tag decoder. Without it, the lengths of tags are not checked.
        max_tag_tokens: Maximum number of tokens of a tag.
        num_prompts: Number of order prompts, which is the maximum number of tags of an example.
        text_tokenizer: Tokenizer of the text tower. Without it, unknown tokens are not looked for.
        read_files: Whether to read every image and video. Otherwise unreadable files are not found, and only files of
            the same size are compared.
        progress: Whether to show a progress bar while the files are read.

    Raises:
        ImportError: There are videos to read, and PyAV is not installed.
    """
    texts = {split: _select_texts(rows) for split, rows in splits.items()}
    counts = {split: TagCounts.from_rows(rows) for split, rows in texts.items()}
    all_counts = sum((own.counts for own in counts.values()), Counter())
    train = counts.get("train")
    long_tags = None
    if train is not None and tag_tokenizer is not None:
        long_tags = _find_long_tags(train.counts, tag_tokenizer, max_tag_tokens)
    found = _read_texts(texts, {tag.tag for tag in long_tags or ()}, num_prompts)
    report = DataReport(
        splits={
            split: _summarize(own, found.num_tags[split], None if split == "train" else train)
            for split, own in counts.items()
        },
        max_tag_tokens=max_tag_tokens,
        num_prompts=num_prompts,
        novel_tags={split: _novel_tags(own, train) for split, own in counts.items() if train and split != "train"},
        variants=find_tag_variants(all_counts),
        frequent_tags=_frequent_tags(train or TagCounts()),
        name_tags=_name_tags(all_counts, found.file_names),
        title_conflicts=list(found.title_conflicts.values()),
        repeated_ids=found.repeated_ids(),
        long_tags=long_tags,
    )
    if train is not None:
        report.untrainable_examples, report.oversized_examples = found.num_untrainable, found.num_oversized
    if text_tokenizer is not None and text_tokenizer.unk_token_id is not None:
        report.unknown_tags = _find_unknown_tags(all_counts, text_tokenizer)
    report.files = check_files(splits, read=read_files, progress=progress)
    return report


@dataclass
class _Texts:
    """What one pass over all ids, titles and tags finds.

    Args:
        num_tags: Number of tags of each example, by split.
        ids: Ids of each split; an example without id has `None`.
        file_names: Tags that are the name of their own file, with their numbers of examples.
        title_conflicts: By title.
        num_untrainable: Number of training examples without a tag that can be trained.
        num_oversized: Number of training examples with more of these than there are order prompts.
    """

    num_tags: dict[str, np.ndarray] = field(default_factory=dict)
    ids: dict[str, list[str | None]] = field(default_factory=dict)
    file_names: Counter[str] = field(default_factory=Counter)
    title_conflicts: dict[str, TitleConflict] = field(default_factory=dict)
    num_untrainable: int = 0
    num_oversized: int = 0

    def repeated_ids(self) -> dict[str, list[str]]:
        """Return the ids of several examples, with the splits of these."""
        owners: dict[str, list[str]] = {}
        for split, ids in self.ids.items():
            for example_id in ids:
                if example_id is not None:
                    owners.setdefault(example_id, []).append(split)
        owners = {example_id: own for example_id, own in owners.items() if len(own) > 1}
        repeating = {split for own in owners.values() for split in own}
        numbered = {split for split in repeating if set(self.ids[split]) == set(map(str, range(len(self.ids[split]))))}
        return {
            example_id: own
            for example_id, own in owners.items()
            if len(own) > len(set(own)) or not (media_kind(example_id) or numbered.intersection(own))
        }


def _read_texts(texts: Mapping[str, Dataset], long_tags: set[str], num_prompts: int) -> _Texts:
    found = _Texts()
    tags_of_title: dict[str, list[str]] = {}
    for split, rows in texts.items():
        ids, num_tags = [], []
        for example_id, title, tags in _iterate(rows):
            ids.append(example_id)
            num_tags.append(len(tags))
            if split == "train":
                num_usable = sum(tag not in long_tags for tag in tags)
                found.num_untrainable += num_usable == 0
                found.num_oversized += num_usable > num_prompts
            for tag in tags:
                # Parts of the id are rare, and fast to find.
                if example_id and tag in example_id and _is_file_name(tag, example_id):
                    found.file_names[tag] += 1
            if title and tags:
                # Only with the first example of the title, as a title may have thousands of them.
                first = tags_of_title.setdefault(title, tags)
                if title not in found.title_conflicts and set(first).isdisjoint(tags):
                    found.title_conflicts[title] = TitleConflict(title, [first, tags])
        found.ids[split], found.num_tags[split] = ids, np.array(num_tags, dtype=int)
    return found


def _select_texts(rows: Dataset) -> Dataset:
    """Return the columns `id`, `title` and `tags` in the order of the rows.

    Passes over the result are fast, also if `rows` is shuffled.
    """
    selected = rows.select_columns(list(TEXT_COLUMNS)).with_format("arrow")
    # A batch of shuffled rows has one chunk per row.
    tables = [table.combine_chunks() for table in selected.iter(BATCH_SIZE)]
    # Without a fingerprint, `Dataset` would hash the texts.
    return Dataset(pa.concat_tables([TEXT_COLUMNS.arrow_schema.empty_table(), *tables]), fingerprint="texts")


def _iterate(texts: Dataset) -> Iterator[tuple[str | None, str, list[str]]]:
    for table in texts.with_format("arrow").iter(BATCH_SIZE):
        for example_id, title, tags in zip(*(table[name].to_pylist() for name in TEXT_COLUMNS)):
            yield example_id, (title or "").strip(), list(dict.fromkeys(tags or ()))


def _is_file_name(tag: str, example_id: str) -> bool:
    """Whether a tag is the name of the example's file, such as `IMG_12`; one without digits may well be a tag."""
    has_digit = any(map(str.isdecimal, tag))
    return has_digit and media_kind(example_id) is not None and tag == PurePosixPath(example_id).stem


def _name_tags(counts: Mapping[str, int], file_names: Mapping[str, int]) -> dict[str, int]:
    """Return the tags that are numbers or have the suffix of an image or video, together with `file_names`."""
    found = {tag: count for tag, count in counts.items() if _NUMBER.fullmatch(tag) or media_kind(tag)}
    return _most_common_first(found | file_names)


def _summarize(counts: TagCounts, num_tags: np.ndarray, train: TagCounts | None) -> SplitSummary:
    return SplitSummary(
        examples=counts.examples,
        untagged=counts.examples - counts.tagged,
        tags=len(counts.counts),
        single_tags=sum(count == 1 for count in counts.counts.values()),
        novel_tags=None if train is None else len(counts.counts.keys() - train.counts.keys()),
        mean_tags=round(float(num_tags.mean()), 2) if counts.examples else None,
        min_tags=int(num_tags.min()) if counts.examples else None,
        max_tags=int(num_tags.max()) if counts.examples else None,
    )


def _novel_tags(counts: TagCounts, train: TagCounts) -> dict[str, int]:
    return _most_common_first({tag: counts.counts[tag] for tag in counts.counts.keys() - train.counts.keys()})


def _frequent_tags(train: TagCounts) -> dict[str, float]:
    if train.tagged < MIN_FREQUENT_EXAMPLES:
        return {}
    ratios = {tag: round(count / train.tagged, 4) for tag, count in train.counts.most_common()}
    return {tag: ratio for tag, ratio in ratios.items() if ratio >= FREQUENT_RATIO}


def _find_long_tags(
    counts: Mapping[str, int], tag_tokenizer: PreTrainedTokenizerBase, max_tag_tokens: int
) -> list[LongTag]:
    tags = list(_most_common_first(counts))
    ids = _token_ids(tags, tag_tokenizer)
    # A byte-level tokenizer has at most one token per known character, and one for the space that it inserts.
    return [
        LongTag(tag, counts[tag], len(tokens), len(tokens) > len(tag) + 1)
        for tag, tokens in zip(tags, ids, strict=True)
        if len(tokens) > max_tag_tokens
    ]


def _find_unknown_tags(counts: Mapping[str, int], text_tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    tags = list(_most_common_first(counts))
    ids = _token_ids(tags, text_tokenizer)
    return {tag: counts[tag] for tag, tokens in zip(tags, ids, strict=True) if text_tokenizer.unk_token_id in tokens}


def _token_ids(tags: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"] if tags else []


def _most_common_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
