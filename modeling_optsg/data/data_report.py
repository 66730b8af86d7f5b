"""The report of [`check_data`], as JSON data and as text."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations, islice

from .file_check import Copies, Example, FileCheck
from .tag_variants import TagVariants

MAX_LINES, MAX_LINES_WITHOUT_FILES = 30, 10
MAX_LINE_LENGTH, MAX_TEXT_LENGTH, MAX_SHOWN = 119, 50, 10


@dataclass(frozen=True)
class SplitSummary:
    """Counts of a split.

    Args:
        examples: Number of examples.
        untagged: Number of examples without tags.
        tags: Number of different tags.
        single_tags: Number of tags of only one example.
        novel_tags: Number of tags that are not in the train split. `None` for this split, and without it.
        mean_tags: Mean number of tags of an example. `None` without examples, as are the next two.
        min_tags: Minimum number of tags of an example.
        max_tags: Maximum number of tags of an example.
    """

    examples: int
    untagged: int
    tags: int
    single_tags: int
    novel_tags: int | None
    mean_tags: float | None
    min_tags: int | None
    max_tags: int | None


@dataclass(frozen=True)
class LongTag:
    """A training tag with too many tokens.

    Args:
        tag: The tag.
        examples: Number of training examples with it.
        tokens: Number of its tokens.
        unknown_script: Whether the tag tokenizer has no tokens for its script, and splits its characters into bytes.
    """

    tag: str
    examples: int
    tokens: int
    unknown_script: bool


@dataclass(frozen=True)
class TitleConflict:
    """A title of two examples without a common tag.

    Args:
        title: The title.
        tags: The tags of each example.
    """

    title: str
    tags: list[list[str]]


@dataclass
class DataReport:
    """Findings of [`check_data`]. `None` stands for what was not checked.

    Args:
        splits: Counts of each split.
        max_tag_tokens: Maximum number of tokens of a tag.
        num_prompts: Maximum number of tags of a training example in one step.
        novel_tags: For each split except train, its tags that are not in train, with their numbers of examples.
        variants: Groups of tags that are spellings of one tag, over all splits.
        frequent_tags: Tags of nearly every training example, with the ratio of these.
        name_tags: Tags that are numbers or names of files, with their numbers of examples over all splits.
        title_conflicts: One for each title that some examples without a common tag share.
        repeated_ids: Ids of several examples, with the split of each of these.
        long_tags: Training tags that the training leaves out.
        untrainable_examples: Number of training examples without tags, or with tags of `long_tags` only.
        oversized_examples: Number of training examples with more than `num_prompts` other tags.
        unknown_tags: Tags with unknown tokens in the text tower's tokenizer, with their numbers of examples.
        files: Copies, and unreadable files if all files were read.
    """

    splits: dict[str, SplitSummary]
    max_tag_tokens: int
    num_prompts: int
    novel_tags: dict[str, dict[str, int]]
    variants: list[TagVariants]
    frequent_tags: dict[str, float]
    name_tags: dict[str, int]
    title_conflicts: list[TitleConflict]
    repeated_ids: dict[str, list[str]]
    long_tags: list[LongTag] | None = None
    untrainable_examples: int | None = None
    oversized_examples: int | None = None
    unknown_tags: dict[str, int] | None = None
    files: FileCheck | None = None

    def to_dict(self) -> dict:
        """Return the report as JSON data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the report as at most 30 lines of text, at most 10 if the files were not read.

        Line breaks and other control characters in titles, tags and names are escaped.
        """
        were_read = self.files is not None and self.files.unreadable is not None
        findings = [finding.line() for finding in _findings(self) if finding.count]
        if were_read and not findings:
            findings = [f"No problems found. Files read: {self.files.num_files:,}."]
        lines = _table(self.splits) + findings
        max_lines = MAX_LINES if were_read else MAX_LINES_WITHOUT_FILES
        if len(lines) > max_lines:
            left_out = len(lines) - max_lines + 1
            command = "`optsg check --json`" if were_read else "`optsg check`"
            lines[max_lines - 1 :] = [f"{left_out:>8,}  more lines, which {command} shows"]
        return lines


@dataclass
class _Finding:
    """One line of the report.

    Args:
        count: Number of things found.
        label: Their name.
        shown: The things as text, of which the first ones are shown.
        detail: Numbers or a consequence.
    """

    count: int
    label: str
    shown: Iterable[str] = ()
    detail: str = ""

    def line(self) -> str:
        """Return the line, with as many things as fit, and at least one."""
        line = f"{self.count:>8,}  {self.label}" + (f" ({self.detail})" if self.detail else "")
        num_shown = 0
        for text in islice(self.shown, MAX_SHOWN):
            longer = f"{line}{'; ' if num_shown else ': '}{text}"
            if num_shown and len(longer) > MAX_LINE_LENGTH - len("; …"):
                break
            line, num_shown = longer, num_shown + 1
        return line + "; …" * (0 < num_shown < self.count)


def _findings(report: DataReport) -> Iterator[_Finding]:
    """Yield all findings that were checked, the worst first."""
    if report.files is not None:
        yield from _file_findings(report.files)
    across = sum(len(set(splits)) > 1 for splits in report.repeated_ids.values())
    yield _Finding(
        len(report.repeated_ids),
        "repeated ids",
        (f"{_text(name)} ({', '.join(dict.fromkeys(splits))})" for name, splits in report.repeated_ids.items()),
        f"{across:,} in several splits" if across else "",
    )
    yield from _trainability_findings(report)
    if report.unknown_tags is not None:
        yield _Finding(
            len(report.unknown_tags),
            "tags with characters that the text tower does not know",
            _counts(report.unknown_tags),
        )
    kinds = Counter(kind for variants in report.variants for kind in variants.kinds)
    yield _Finding(
        len(report.variants),
        "tags in several spellings",
        (" = ".join(_counts(variants.counts)) for variants in report.variants),
        ", ".join(f"{kind} {count:,}" for kind, count in kinds.items()),
    )
    yield _Finding(
        len(report.title_conflicts),
        "titles of examples without a common tag",
        (
            f"{_text(conflict.title)} ({' | '.join(', '.join(map(_text, own[:3])) for own in conflict.tags)})"
            for conflict in report.title_conflicts
        ),
    )
    yield _Finding(
        len(report.frequent_tags),
        "tags of nearly all training examples",
        (f"{_text(tag)} ({ratio:.0%})" for tag, ratio in report.frequent_tags.items()),
    )
    yield _Finding(len(report.name_tags), "tags that are numbers or names of files", _counts(report.name_tags))
    for split, tags in report.novel_tags.items():
        yield _Finding(len(tags), f"tags of {split} that are not in train", _counts(tags))


def _file_findings(files: FileCheck) -> Iterator[_Finding]:
    if files.unreadable is not None:
        yield _Finding(
            len(files.unreadable),
            f"unreadable files of {files.num_files:,}",
            (f"{_escape(own.reason)} ({own.example.split})" for own in files.unreadable),
        )
    across = [copies for copies in files.copies if len(copies.splits) > 1]
    pairs = Counter(pair for copies in across for pair in combinations(copies.splits, 2))
    numbers = ", ".join(f"{first} and {second} {count:,}" for (first, second), count in pairs.items())
    yield _Finding(
        len(across),
        "files in several splits",
        (_equation(*_first_of_each_split(copies)) for copies in across),
        f"metrics are too good; {numbers}",
    )
    conflicts = [copies for copies in files.copies if not copies.same_tags]
    yield _Finding(
        len(conflicts),
        "files with copies that have other tags",
        (_equation(*copies.examples) for copies in conflicts),
    )
    within = [copies for copies in files.copies if len(copies.splits) < len(copies.examples)]
    yield _Finding(
        len(within),
        "files with copies in the same split",
        (_equation(*_same_split(copies)) for copies in within),
    )


def _trainability_findings(report: DataReport) -> Iterator[_Finding]:
    left_out = "left out of training"
    if report.long_tags is not None:
        unknown = sum(tag.unknown_script for tag in report.long_tags)
        scripts = f"; {unknown:,} in a script that the tag tokenizer does not know" if unknown else ""
        yield _Finding(
            len(report.long_tags),
            f"tags of more than {report.max_tag_tokens} tokens",
            (f"{_text(tag.tag)} ({tag.tokens})" for tag in report.long_tags),
            left_out + scripts,
        )
    if report.untrainable_examples is not None:
        yield _Finding(report.untrainable_examples, "training examples without a usable tag", detail=left_out)
    if report.oversized_examples is not None:
        yield _Finding(
            report.oversized_examples,
            f"training examples with more than {report.num_prompts} tags",
            detail="a random selection is used each time",
        )


def _table(splits: Mapping[str, SplitSummary]) -> list[str]:
    """Return one line for each split, below a header."""
    rows = [["", "examples", "untagged", "tags", "tags once", "novel tags", "tags per example"]]
    for name, split in splits.items():
        counts = (split.examples, split.untagged, split.tags, split.single_tags)
        novel = "" if split.novel_tags is None else f"{split.novel_tags:,}"
        per_example = "" if split.examples == 0 else f"{split.mean_tags:.1f} ({split.min_tags} to {split.max_tags})"
        rows.append([name, *(f"{count:,}" for count in counts), novel, per_example])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _counts(counts: Mapping[str, int]) -> Iterator[str]:
    return (f"{_text(tag)} ({count:,})" for tag, count in counts.items())


def _first_of_each_split(copies: Copies) -> list[Example]:
    return [next(own for own in copies.examples if own.split == split) for split in copies.splits]


def _same_split(copies: Copies) -> list[Example]:
    """Return the examples of the first split that has several of them."""
    counts = Counter(own.split for own in copies.examples)
    return [own for own in copies.examples if own.split == next(split for split in counts if counts[split] > 1)]


def _equation(first: Example, second: Example, *others: Example) -> str:
    names = (f"{_text(example.id)} ({example.split})" for example in (first, second))
    return " = ".join([*names, *["…"] * bool(others)])


def _text(text: str) -> str:
    text = _escape(text)
    return text if len(text) <= MAX_TEXT_LENGTH else text[: MAX_TEXT_LENGTH - 1] + "…"


def _escape(text: str) -> str:
    """Escape a text that has control characters, or that looks like another one in Unicode's usual form."""
    return text if text.isprintable() and unicodedata.is_normalized("NFC", text) else ascii(text)[1:-1]
