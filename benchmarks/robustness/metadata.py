"""Checks `optsg tag` and `optsg check` on folders with damaged metadata files."""

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from optsg import main

from .byte_damage import BYTE_DAMAGES
from .jobs import make, run
from .results import GOOD_NAMES, Result, Workplace, choose, result

TITLES = {name: title for name, title in zip(GOOD_NAMES, ("a red square", "标签1", "Straße é"))}
ROWS = [{"file_name": name, "title": title, "tags": ["red", "标签"]} for name, title in TITLES.items()]
MANY_ROWS = 20_000_000
# Titles by file name that must be used, or whose loss must be reported.
Titles = dict[str, str]


def _json_lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n" for row in rows)


def _csv_text(rows: list[dict], **options: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_rows() -> list[dict]:
    return [row | {"tags": "|".join(row["tags"])} for row in ROWS]


def _write_parquet(path: Path, **columns: pa.Array) -> None:
    names = pa.array([row["file_name"] for row in ROWS])
    pq.write_table(pa.table({"file_name": names} | columns), path)


def damaged_bytes(folder: Path, rng: random.Random) -> Titles:
    """Damage the bytes of a valid file."""
    name = rng.choice(("metadata.jsonl", "metadata.csv", "metadata.parquet"))
    path = folder / name
    if name.endswith("parquet"):
        _write_parquet(path, title=pa.array(TITLES.values()), tags=pa.array([row["tags"] for row in ROWS]))
    else:
        path.write_text(_csv_text(_csv_rows()) if name.endswith("csv") else _json_lines(ROWS), encoding="utf-8")
    path.write_bytes(rng.choice(list(BYTE_DAMAGES.values()))(path.read_bytes(), rng))
    return {}


def encoding(folder: Path, rng: random.Random) -> Titles:
    """Save in another encoding than UTF-8."""
    name = rng.choice(("metadata.jsonl", "metadata.csv"))
    text = _csv_text(_csv_rows()) if name.endswith("csv") else _json_lines(ROWS)
    encodings = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030", "cp1252", "latin-1", "shift_jis", "utf-7")
    (folder / name).write_bytes(text.encode(rng.choice(encodings), "replace"))
    # Characters that an encoding does not have are lost when the file is written.
    return {GOOD_NAMES[0]: TITLES[GOOD_NAMES[0]]}


def json_value(folder: Path, rng: random.Random) -> Titles:
    """Put an odd value into one row of JSON."""
    rows: list = [dict(row) for row in ROWS]
    values = (
        None, 5, -1.5, True, [], {}, [[[]]], "", "\0", "a\nb", "x" * 100_000, "../../etc/passwd", "/etc/passwd",
        "\ud800", float("nan"), float("inf"), 10**400, ["a", None], {"a": {"b": 1}}, ".", "C:\\x.jpg", "file:///x",
    )  # fmt: skip
    rows[1][rng.choice(("file_name", "title", "tags", "id", "extra"))] = rng.choice(values)
    text = json.dumps(rows[1], allow_nan=True) + "\n"
    (folder / "metadata.jsonl").write_text(_json_lines(rows[:1]) + text + _json_lines(rows[2:]), encoding="utf-8")
    return {name: TITLES[name] for name in (GOOD_NAMES[0], GOOD_NAMES[2])}


def json_structure(folder: Path, rng: random.Random) -> Titles:
    """Write JSON of another structure, or deeply nested."""
    depth, first = rng.choice((500, 5000, 200_000)), _json_lines(ROWS[:1])
    nested = '{"file_name": "m-middle.jpg", "title": ' + "[" * depth + "]" * depth + "}\n"
    texts = (
        nested, "[" * depth + "\n", '{"a":' * depth + "\n", json.dumps(ROWS, indent=1, allow_nan=False),
        "[]\n", "5\n", '"text"\n', "null\n", "{}\n", "{,}\n", "// comment\n", "{'file_name': 'a.png'}\n", "9" * 5000,
        '{"file_name": "m-middle.jpg", "file_name": 5}\n', "\u2028\n", "\x1a\n", first.strip() + first,
    )  # fmt: skip
    (folder / "metadata.jsonl").write_text(first + rng.choice(texts), encoding="utf-8")
    return {GOOD_NAMES[0]: TITLES[GOOD_NAMES[0]]}


def csv_structure(folder: Path, rng: random.Random) -> Titles:
    """Write CSV with missing, additional or broken cells."""
    lines = _csv_text(_csv_rows()).splitlines()
    kind = rng.randrange(9)
    if kind == 0:
        lines[1] = lines[1].replace("a red", '"a red')
    elif kind == 1:
        lines[2] += ",more,cells"
    elif kind == 2:
        lines[2] = lines[2].split(",")[0]
    elif kind == 3:
        lines[0] = ""
    elif kind == 4:
        lines[0] = "file_name,title,title"
    elif kind == 5:
        lines[2] = lines[2].replace("标签1", "x" * 200_000)
    elif kind == 6:
        lines[2] = lines[2].replace("标签1", "a\0b")
    elif kind == 7:
        lines = lines[:1]
    else:
        lines = [rng.choice(("", "\ufeff", "\n\n", ";;;", "\t", '"'))]
    (folder / "metadata.csv").write_text(rng.choice(("\n", "\r\n", "\r")).join(lines) + "\n", encoding="utf-8")
    return TITLES if kind < 3 else {}


def csv_style(folder: Path, rng: random.Random) -> Titles:
    """Write CSV as spreadsheets and other programs do."""
    rows, options = _csv_rows(), {}
    kind = rng.randrange(6)
    if kind < 2:
        options["delimiter"] = ";" if kind else "\t"
    elif kind == 2:
        options["quoting"] = csv.QUOTE_ALL
    else:
        renamed = {3: {"title": " title"}, 4: {"title": rng.choice(("text", "caption", "description"))}, 5: {}}[kind]
        rows = [{renamed.get(name, name): value for name, value in row.items()} for row in rows]
    text = _csv_text(rows, **options)
    if kind == 5:
        text = text.replace("file_name,title", "File_Name,Title", 1)
    (folder / "metadata.csv").write_bytes((b"\xef\xbb\xbf" if rng.random() < 0.5 else b"") + text.encode())
    return TITLES


def parquet_values(folder: Path, rng: random.Random) -> Titles:
    """Write Parquet with odd types next to the titles."""
    far = pa.array([2**62] * len(ROWS), pa.int64())
    extra = rng.choice((
        far.cast(pa.timestamp("us")), pa.array([2**52] * len(ROWS), pa.timestamp("s")), far.cast(pa.timestamp("ns")),
        pa.array([2**30] * len(ROWS), pa.int32()).cast(pa.date32()),
        far.cast(pa.timestamp("us", tz="Nowhere/Unknown")), far.cast(pa.duration("ms")),
        pa.array([b"\xff\0"] * len(ROWS)), pa.array([[{"a": [1]}]] * len(ROWS)), pa.nulls(len(ROWS)),
        pa.array([2**62] * len(ROWS), pa.time64("ns"), safe=False), pa.array([1] * len(ROWS), pa.decimal256(70, 2)),
    ))  # fmt: skip
    _write_parquet(folder / "metadata.parquet", title=pa.array(TITLES.values()), extra=extra)
    return TITLES


def parquet_columns(folder: Path, rng: random.Random) -> Titles:
    """Write Parquet whose columns have the wrong type, are missing or are empty."""
    columns = rng.choice((
        {"title": pa.array([1, 2, 3])}, {"title": pa.array([["a"], [], None])}, {}, {"file_name": pa.array([1, 2, 3])},
        {"file_name": pa.nulls(3)}, {"file_name": pa.array([b"\xff\xfe"] * 3)}, {"title": pa.array([b"\xff"] * 3)},
        {"file_name": pa.array([{"path": "a"}] * 3)}, {"title": pa.array([float("nan")] * 3)},
        {"title": pa.array(["a\0b", "\n", "x" * 10**6])}, {"tags": pa.array([1, 2, 3])},
        {"title": pa.array(list(TITLES.values())).dictionary_encode()},
    ))  # fmt: skip
    _write_parquet(folder / "metadata.parquet", **columns)
    return {}


def parquet_rows(folder: Path, rng: random.Random) -> Titles:
    """Write a small file with very many rows, or with one very long text."""
    if rng.random() < 0.5:
        table = pa.table({"file_name": pa.nulls(MANY_ROWS, pa.string()), "title": pa.nulls(MANY_ROWS, pa.string())})
    else:
        table = pa.table({"file_name": [GOOD_NAMES[0]], "title": [" " * 300_000_000]})
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, folder / "metadata.parquet", **options)
    return {}


def not_a_file(folder: Path, rng: random.Random) -> Titles:
    """Give a folder, a pipe, a device or a link the name of a metadata file."""
    path = folder / rng.choice(("metadata.jsonl", "metadata.csv", "metadata.parquet"))
    kind = rng.choice(("folder", "pipe", "device", "broken link", "loop"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "broken link": "nowhere", "loop": path.name}[kind])
    return {}


DAMAGES: dict[str, Callable[[Path, random.Random], Titles]] = {
    "damaged bytes": damaged_bytes,
    "encoding": encoding,
    "odd value in JSON": json_value,
    "other JSON": json_structure,
    "broken CSV": csv_structure,
    "CSV of other programs": csv_style,
    "odd types in Parquet": parquet_values,
    "wrong columns in Parquet": parquet_columns,
    "many rows or long text": parquet_rows,
    "not a file": not_a_file,
}
WEIGHTS = {"damaged bytes": 3, "odd value in JSON": 3, "other JSON": 2, "broken CSV": 2, "CSV of other programs": 2}


def check_metadata(workplace: Workplace, seed: int) -> Result:
    """Tag and check a folder of undamaged images with the metadata of a seed."""
    damage = choose(DAMAGES, seed, WEIGHTS)
    folder = workplace.folder / f"metadata-{seed}"
    workplace.add_good_files(folder)
    expected = make(lambda: DAMAGES[damage](folder, random.Random(f"metadata {seed}")))
    job = workplace.tag("--json", folder)
    rows = [json.loads(line) for line in job.output.splitlines() if line.startswith("{")]
    titles = {Path(row["file"]).name: row["title"] for row in rows if row.get("tags")}
    if set(titles) != set(GOOD_NAMES):
        outcome = "lost neighbour"
    elif "metadata." in job.errors:
        outcome = "named"
    elif all(titles[name] == title for name, title in expected.items()):
        outcome = "titles used" if expected else "tagged"
    else:
        outcome = "lost titles"
    command = ["check", str(folder), "--dataset-dir", str(workplace.folder / "hf")]
    checked = run(lambda: main(command))
    is_silent = checked.status and folder.name not in checked.errors
    if is_silent and outcome not in ("lost neighbour", "lost titles"):
        outcome = "not named"
    shutil.rmtree(folder)
    return result("metadata", seed, damage, outcome, job, checked, shown=checked if outcome == "not named" else job)
