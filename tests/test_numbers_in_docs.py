"""The numbers in tables of the documentation equal those in the committed result files.

A table with numbers needs an HTML comment directly above it, which names the JSON file and the key of every number:

    <!-- numbers from results/icon_tagging/optsg-icon-small.json
    columns: full_f1 | rare_f1 | novel/predicted ; novel/exact_hits
    test/parallel
    test/sequential
    knn | full_f1 | rare_f1 | -
    -->
    | Decoding | Full F1 | Rare F1 | Novel tags (exact hits) |
    |---|---|---|---|
    | parallel | 46.56 | 41.00 | 227 (70) |
    | sequential | 47.11 | 41.91 | 297 (73) |
    | kNN | 42.67 | 40.18 | – |

- The path of the file is relative to the root of the repository.
- `columns:` has one entry for each column of the table after the first, separated by `|`. An entry is a key, several
  keys separated by `;` for a cell with several numbers, or `-` for a column that is not checked.
- Every other line is the key of one row of the table, in order. The key of a cell is the row's key, `/`, and the
  column's key. A row may end with entries of its own for the columns, as the last one above.
- A row with a file of its own starts with the file and a colon: `results/other.json: test/parallel`.
- A row that is only `-` is not checked.
- A key may have the wildcards of file names: the number is the mean over all keys, or all elements of a list, that
  match (`runs/op-tsg-seed*/test`, `runs/asy-seed[12]/test`).
- `A - B` in a row is the difference of two keys, and ` * 1000` after a key is a factor.
- A printed number must equal the value rounded to the printed decimals.

A table whose numbers are not results says so: `<!-- numbers not from results: Table 4 of the paper -->`.

A number in the text can be checked as well, by a comment that follows it:

    Full F1 is 46.56<!-- = results/icon_tagging/optsg-icon-small.json: test/parallel/full_f1 --> on the test split.
"""

import fnmatch
import functools
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "MODEL_CARD.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "experiments/icon_tagging/README.md"]

TABLE = re.compile(r"(?:^[ ]*<!--((?:(?!-->)[\s\S])*)-->\n)?((?:^[ ]*\|.*\n)+)", re.M)
INLINE = re.compile(r"([^\s|(]+)\s*<!-- = (.*?): (.*?) -->")
NUMBER = re.compile(r"[+\-−–]?\d[\d,]*(?:\.\d+)?")
STARTS_WITH_NUMBER = re.compile(rf"[*~≈]*{NUMBER.pattern}")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


@functools.cache
def read(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def values(node, key: list[str]) -> list[float]:
    """Return all numbers below a node of a JSON file that a key stands for."""
    if not key:
        assert isinstance(node, (int, float)) and not isinstance(node, bool), f"{node!r} is not a number"
        return [node]
    part, *rest = key
    children = dict(enumerate(node)) if isinstance(node, list) else node
    children = {str(name): child for name, child in children.items()}
    names = [part] if part in children else fnmatch.filter(children, part)
    assert names, f"there is no {part!r}; there are {', '.join(children)}"
    return [value for name in names for value in values(children[name], rest)]


def expected(path: str, row: str, column: str = "") -> float:
    """Return the number for a cell, from the keys of its row and its column."""
    (row, _, row_factor), (column, _, column_factor) = row.partition(" * "), column.partition(" * ")
    terms = [[part.strip() for part in f"{term}/{column}".split("/") if part.strip()] for term in row.split(" - ")]
    means = [statistics.fmean(values(read(path), term)) for term in terms]
    return (means[0] - sum(means[1:])) * float(row_factor or column_factor or 1)


def equals(printed: str, value: float) -> bool:
    """Return whether a printed number is a value, rounded."""
    printed = printed.replace(",", "").replace("−", "-").replace("–", "-")
    decimals = len(printed.partition(".")[2])
    return abs(float(printed) - value) <= 0.5 * 10**-decimals + 1e-9


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def errors_of_table(comment: str, lines: list[str]) -> list[str]:
    """Compare the body of a table with the result file that the comment names."""
    heading, columns, *rows = [line.strip() for line in comment.strip().splitlines()]
    default_path = heading.removeprefix("numbers from ")
    columns = [entry.strip() for entry in columns.removeprefix("columns:").split("|")]
    if len(rows) != len(lines):
        return [f"{len(rows)} rows are named, and the table has {len(lines)}"]
    errors = []
    for row, line in zip(rows, lines):
        if row == "-":
            continue
        path, separator, row = row.rpartition(".json: ")
        path = path + ".json" if separator else default_path
        row, *own_columns = [entry.strip() for entry in row.split("|")]
        entries = own_columns or columns
        if len(entries) != len(cells(line)) - 1:
            errors.append(f"{len(entries)} columns are named for the row {line}")
            continue
        for entry, cell in zip(entries, cells(line)[1:]):
            if entry == "-":
                continue
            keys, printed = entry.split(";"), NUMBER.findall(cell)
            try:
                numbers = [expected(path, row, key) for key in keys]
            except (AssertionError, OSError) as error:
                errors.append(f"{path}: {row}: {error}")
                continue
            if len(printed) != len(numbers) or not all(map(equals, printed, numbers)):
                errors.append(f"{cell!r} should be {numbers}, from {path}: {row}/{entry}, in the row {line}")
    return errors


def errors_of_page(text: str) -> list[str]:
    """Return what is wrong with the numbers of a page."""
    errors = []
    text = FENCE.sub("", text)
    for comment, table in TABLE.findall(text + "\n"):
        lines = table.strip().splitlines()[2:]
        comment = comment.strip()
        if comment.startswith("numbers not from results: "):
            continue
        if comment.startswith("numbers from "):
            errors += errors_of_table(comment, lines)
        elif numbers := [cell for line in lines for cell in cells(line)[1:] if STARTS_WITH_NUMBER.match(cell)]:
            errors.append(f"no comment says where the table with {numbers[0]!r} gets its numbers from")
    for printed, path, key in INLINE.findall(text):
        numbers = NUMBER.findall(printed)
        if len(numbers) != 1 or not equals(numbers[0], value := expected(path, key)):
            errors.append(f"{printed!r} should be {value}, from {path}: {key}")
    return errors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_numbers_equal_the_result_files(page):
    assert not errors_of_page(page.read_text(encoding="utf-8"))


FILE = "results/icon_tagging/optsg-icon-small.json"
GOOD = """
<!-- numbers from results/icon_tagging/optsg-icon-small.json
columns: full_f1 | novel/predicted ; novel/exact_hits | -
test/parallel
test/par* - test/sequential
-->
| | Full F1 | Novel | Note |
|---|---|---|---|
| parallel | **46.56** | 227 (70) | 7 |
| difference | −0.5 | -70 (-3) | |

A Full F1 of 46.6<!-- = results/icon_tagging/optsg-icon-small.json: test/parallel/full_f1 --> is printed.
"""


def test_a_page_with_right_numbers_has_no_errors():
    assert errors_of_page(GOOD) == []
    assert errors_of_page("<!-- numbers not from results: a schedule -->\n| | epochs |\n|---|---|\n| A | 20 |\n") == []


def test_every_table_of_a_page_is_checked():
    wrong = GOOD.replace("46.56", "46.59")
    assert len(errors_of_page(wrong + wrong.replace("\n", "\n  "))) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("46.56", "46.59", "should be"),
        ("227 (70)", "227 (71)", "should be"),
        ("227 (70)", "227", "should be"),
        ("−0.5", "0.5", "should be"),
        ("46.6<", "46.7<", "should be"),
        ("test/parallel\n", "test/missing\n", "there is no 'missing'"),
        ("test/parallel\n", "", "1 rows are named"),
        (" | -\n", "\n", "2 columns are named"),
        ("<!-- numbers from", "<!-- about", "no comment says"),
    ],
)
def test_a_page_with_wrong_numbers_has_errors(old, new, message):
    assert old in GOOD
    assert any(message in error for error in errors_of_page(GOOD.replace(old, new, 1)))


def test_a_change_in_the_result_file_is_found(tmp_path, monkeypatch):
    results = json.loads((ROOT / FILE).read_text(encoding="utf-8"))
    results["test"]["parallel"]["novel"]["exact_hits"] += 1
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text(json.dumps(results), encoding="utf-8")
    monkeypatch.setattr("test_numbers_in_docs.ROOT", tmp_path)
    read.cache_clear()
    try:
        assert any("227 (70)" in error for error in errors_of_page(GOOD))
    finally:
        read.cache_clear()
