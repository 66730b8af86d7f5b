"""Rows of the examples of a book."""

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

# Columns of the examples. Examples in the same group may show the same thing.
COLUMNS = ("id", "title", "tags", "group")
# Optional column: a text that changes when the image, the video or the frame features of an example change. Vectors of
# unchanged examples are reused.
STATE_COLUMN = "state"


def with_state(examples: Dataset) -> Dataset:
    """Return the columns of a book; a missing state is empty."""
    if STATE_COLUMN not in examples.column_names:
        examples = examples.add_column(STATE_COLUMN, [""] * len(examples))
    return examples.select_columns([*COLUMNS, STATE_COLUMN])


def check_examples(examples: Dataset, num_queries: int) -> None:
    """Check the examples of a book.

    Args:
        examples: The rows.
        num_queries: Number of their vectors.

    Raises:
        ValueError: A column, an id, a group or a tag is missing, there are no examples, the numbers differ, or an id
            occurs twice.
    """
    if missing := set(COLUMNS) - set(examples.column_names):
        raise ValueError(
            f"The examples of a book need the columns {', '.join(COLUMNS)}; missing: {', '.join(sorted(missing))}."
        )
    if not len(examples):
        raise ValueError("There are no examples; a book needs at least one.")
    for name in ("id", "group"):
        if None in examples[name][:]:
            raise ValueError(f"An example has no {name}; every example of a book needs one.")
    check_tags(examples)
    if len(examples) != num_queries:
        raise ValueError(f"Got {len(examples)} examples but vectors for {num_queries}.")
    check_unique(examples["id"])


def check_tags(examples: Dataset) -> None:
    """Check that the tags of every example are a list of texts. An example without tags may have `None` instead.

    Raises:
        ValueError: The tags are not lists of texts, or one of them is `None`.
    """
    column = examples.select_columns("tags").with_format("arrow")[:]["tags"]
    if pa.types.is_null(column.type):
        return
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list or column.type.value_type not in (pa.string(), pa.large_string(), pa.null()):
        raise ValueError(f"The tags of an example must be a list of strings, got {column.type}.")
    if pc.list_flatten(column).null_count:
        row = next(row for row, tags in enumerate(column.to_pylist()) if tags and None in tags)
        raise ValueError(f"The example {examples['id'][row]!r} has the tag None; remove it.")


def check_unique(ids: Iterable[str]) -> None:
    """Check that every id occurs once.

    Raises:
        ValueError: An id occurs twice.
    """
    for id_, count in Counter(ids).most_common(1):
        if count > 1:
            raise ValueError(f"The id {id_!r} occurs {count} times; ids must be unique.")
