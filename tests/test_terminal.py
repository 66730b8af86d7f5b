"""Text for terminals: escaped control characters and aligned columns in every script."""

from optsg.terminal import TagTable, plural, printable


def test_control_characters_are_escaped_and_languages_kept():
    assert printable("e-mail 创意美食 می‌خواهم é 👩‍🍳") == "e-mail 创意美食 می‌خواهم é 👩‍🍳"
    assert printable("a\tb\n\x1b\x7f\x9b") == r"a\tb\n\x1b\x7f\x9b"
    assert printable("\u202egpj.exe \udcff") == r"\u202egpj.exe \udcff"


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
