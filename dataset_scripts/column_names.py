"""The columns that a user names for images, videos, titles and tags."""

import argparse
from collections.abc import Collection
from dataclasses import dataclass, fields

# The arguments of `load_tagging_dataset` and of the command lines.
COLUMN_ARGUMENTS = {
    "image_column": "column with the images, or with their paths in a metadata file",
    "video_column": "column with the videos or their frames, or with their paths in a metadata file",
    "title_column": "column with the titles",
    "tags_column": "column with the tags; or columns with 0 and 1, separated by commas or as a pattern such as tag_*",
    "tag_separator": "separator of tags that are text (default: the one of | ; , that most texts contain)",
}


def add_column_arguments(parser: argparse.ArgumentParser, hyphens: bool = False) -> None:
    """Add the arguments that name the columns of a dataset.

    Args:
        parser: Parser of a program.
        hyphens: Whether the arguments of the program have hyphens instead of underscores.
    """
    for name, text in COLUMN_ARGUMENTS.items():
        metavar = "TEXT" if name == "tag_separator" else "NAME"
        parser.add_argument(f"--{name.replace('_', '-') if hyphens else name}", metavar=metavar, help=text)


def column_arguments(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Return the parsed arguments of [`add_column_arguments`]."""
    return {name: getattr(arguments, name) for name in COLUMN_ARGUMENTS}


@dataclass(frozen=True)
class ColumnNames:
    """The columns of a dataset that have other names than usual; `None` for those that do not.

    Args:
        image_column: Column with images, or with the paths of files in a metadata file.
        video_column: Column with videos or lists of frames, or with the paths of files in a metadata file.
        title_column: Column with titles.
        tags_column: Column with tags. Several names with commas between them, or names that end with `*`, are one-hot
            columns.
        tag_separator: Separator of tags that are text.

    Raises:
        ValueError: The separator is empty, or two arguments name the same column.
    """

    image_column: str | None = None
    video_column: str | None = None
    title_column: str | None = None
    tags_column: str | None = None
    tag_separator: str | None = None

    def __post_init__(self) -> None:
        if self.tag_separator == "":
            raise ValueError("tag_separator is empty; expected the text between two tags")
        names = [name for name in (*self.renamed().values(), self.tags_column) if name]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the column {repeated[0]!r} is named for two purposes; name a different one for each")

    def given(self) -> list[str]:
        """Return the names of the arguments that have a value."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def renamed(self) -> dict[str, str]:
        """Return the columns for `image`, `video` and `title`, by these names."""
        columns = {"image": self.image_column, "video": self.video_column, "title": self.title_column}
        return {name: column for name, column in columns.items() if column}

    def check(self, columns: Collection[str], origin: str) -> None:
        """Check that the named columns exist.

        Args:
            columns: The columns of the dataset.
            origin: The dataset's name in error messages.

        Raises:
            ValueError: A column does not exist.
        """
        for name, column in self.renamed().items():
            _check_column(column, f"{name}_column", columns, origin)
        if self.tags_column and self.one_hot_columns(columns, origin) is None:
            _check_column(self.tags_column, "tags_column", columns, origin)

    def one_hot_columns(self, columns: Collection[str], origin: str) -> dict[str, str] | None:
        """Return the tag of each one-hot column, or `None` if `tags_column` names a single column.

        `tags_column="red,size_*"` names the column `red`, whose tag is "red", and every column whose name begins with
        `size_`, whose tags are the rest of their names.

        Args:
            columns: The columns of the dataset.
            origin: The dataset's name in error messages.

        Raises:
            ValueError: A column does not exist, or no column matches a pattern.
        """
        name = self.tags_column
        if not name or name in columns or not ("," in name or name.endswith("*")):
            return None
        found = {}
        for part in (part.strip() for part in name.split(",")):
            prefix = part[:-1] if part.endswith("*") and part not in columns else None
            if prefix is None:
                _check_column(part, "tags_column", columns, origin)
                found[part] = part
                continue
            matches = [column for column in columns if column.startswith(prefix) and column != prefix]
            if not matches:
                raise ValueError(f"{origin}: no column matches tags_column={part!r}; {_list_columns(columns)}")
            found |= {column: column.removeprefix(prefix) for column in matches}
        return found


USUAL_NAMES = ColumnNames()


def is_one(value: object, place: str) -> bool:
    """Return whether the value of a one-hot column is 1.

    Args:
        value: The value. Text is accepted from CSV files, such as "1", "0.0" or "True".
        place: Where it is, for the error message.

    Raises:
        ValueError: It is neither 0 nor 1.
    """
    texts = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    if isinstance(value, str) and (text := value.strip().casefold()) in texts:
        return texts[text]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise ValueError(f"{place} is {value!r}; one-hot columns contain only 0 and 1, or false and true")
    return bool(value)


def _check_column(column: str, argument: str, columns: Collection[str], origin: str) -> None:
    if column not in columns:
        raise ValueError(f"{origin} has no column {column!r}, which {argument} names; {_list_columns(columns)}")


def _list_columns(columns: Collection[str]) -> str:
    return f"its columns are {', '.join(columns)}"
