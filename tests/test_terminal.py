"""Text for terminals: escaped control characters and aligned columns in every script."""

import pytest

from modeling_optsg.training import trainer
from optsg import stats
from optsg.command_line import main
from optsg.terminal import TagTable, error_line, plural, printable


def test_control_characters_are_escaped_and_languages_kept():
    assert printable("e-mail 创意美食 می‌خواهم é 👩‍🍳") == "e-mail 创意美食 می‌خواهم é 👩‍🍳"
    assert printable("a\tb\n\x1b\x7f\x9b") == r"a\tb\n\x1b\x7f\x9b"
    assert printable("\u202egpj.exe \udcff") == r"\u202egpj.exe \udcff"


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("a\n  b\x1b[2J"), r"a b\x1b[2J"),
        (KeyError("tags"), "missing key 'tags'"),
        (OSError(), "OSError"),
    ],
)
def test_an_error_is_one_line_without_control_characters(error, expected, monkeypatch, capsys):
    def fail(*args):
        raise error

    assert error_line(error) == expected
    monkeypatch.setattr(stats, "_count", fail)
    assert main(["stats", "folder"]) == 2
    assert capsys.readouterr().err == f"optsg stats: {expected}\n"


def test_an_error_of_the_training_is_one_line_without_control_characters(monkeypatch, capsys):
    def fail(*args):
        raise ValueError("a\n  b\x1b[2J 猫")

    monkeypatch.setattr(trainer, "main", fail)
    assert trainer.run_command([], "train.py") == 2
    assert capsys.readouterr().err == "train.py: a b\\x1b[2J 猫\n"


def test_counts_have_a_noun_in_singular_or_plural():
    assert [plural(count, "file") for count in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]


def test_columns_are_aligned_for_wide_characters_and_long_names():
    table = TagTable(["猫.png", "x" * 60])
    rows = table.rows("猫.png", [{"tag": "创意美食", "score": 0.5, "novel": True}]).splitlines()
    rows += table.rows("x" * 60, [{"tag": "cat", "score": 0.25, "novel": False}]).splitlines()
    assert rows[1] == "x" * 60
    cells = [table.header(), rows[0], rows[2]]
    ends = [row.index(cell) + len(cell) for row, cell in zip(cells, ("probability", "0.500", "0.250"), strict=True)]
    # Each of the five Chinese characters in the second line takes two columns.
    assert [ends[0], ends[1] + 5, ends[2]] == [ends[0]] * 3
