"""Annotation files are read example by example, and damaged ones are refused."""

import gzip
import itertools
import json
import tracemalloc

import pyarrow as pa
import pytest

from dataset_scripts import annotation_files
from dataset_scripts.annotation_files import read_annotations

EXAMPLES = [
    {"vid": f"v{index}", "raw_title": '创意美食 "教程" [1, {2}]', "tag": ["美食", "e-mail", "a\\b"], "category": index}
    for index in range(50)
]


def forms():
    lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in EXAMPLES)
    yield "list.json", json.dumps(EXAMPLES, ensure_ascii=False)
    yield "pretty.json", json.dumps(EXAMPLES, indent=1)
    yield "lines.jsonl", lines
    yield "blank lines.jsonl", "\ufeff\n" + lines.replace("\n", "\r\n\r\n")


@pytest.mark.parametrize("name, text", list(forms()))
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_lists_and_lines_give_the_same_examples_for_any_chunk_size(tmp_path, monkeypatch, name, text, chunk):
    monkeypatch.setattr(annotation_files, "CHUNK", chunk)
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert list(read_annotations(tmp_path / name)) == EXAMPLES


def test_compressed_files_give_the_same_examples(tmp_path):
    data = json.dumps(EXAMPLES, ensure_ascii=False).encode()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(data))
    assert list(read_annotations(tmp_path / "a.json.gz")) == EXAMPLES
    (tmp_path / "a.json.zst").write_bytes(pa.compress(data, "zstd", asbytes=True))
    assert list(read_annotations(tmp_path / "a.json.zst")) == EXAMPLES


def test_empty_files_and_lists_have_no_examples(tmp_path):
    for text in ("", "[]", " [ ] \n", "\n\n"):
        (tmp_path / "a.json").write_text(text)
        assert list(read_annotations(tmp_path / "a.json")) == []


@pytest.mark.parametrize(
    "text, message",
    [
        (json.dumps(EXAMPLES)[:-40], "the file ends in the middle of an example"),
        (json.dumps(EXAMPLES)[:-1], "the file ends in the middle of its list"),
        (json.dumps(EXAMPLES) + "]", "after the end of the list"),
        ('[{"vid": "v0"} {"vid": "v1"}]', "expected a comma, got '{'"),
        ('[{"vid": "v0"},]', "a comma before the end"),
        ('[{"vid": "v0"}, 17]', "expected an object, got 17"),
        ('{"vid": "v0"}\n"text"\n', 'expected an object, got "text"'),
        ('[{"vid": nonsense}]', "not JSON"),
        (json.dumps(EXAMPLES)[:-1] + ', {"vid": nonsense, "tag": []}]', "not JSON"),
        ('{"vid": "v0"}\n{"vid": "v1', "the file ends in the middle of an example"),
    ],
)
def test_a_damaged_file_is_named_with_the_number_of_examples(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    found = []
    with pytest.raises(ValueError, match=r"broken\.json, after \d+ examples: ") as caught:
        found.extend(example for example in read_annotations(path))
    assert message in str(caught.value) and f"after {len(found)} examples" in str(caught.value)


def test_files_with_invalid_utf8_or_truncated_archives_are_named(tmp_path):
    (tmp_path / "latin.json").write_bytes('[{"vid": "caf\xe9"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json, after 0 examples: not UTF-8"):
        list(read_annotations(tmp_path / "latin.json"))
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(EXAMPLES).encode())[:-30])
    (tmp_path / "cut.json.zst").write_bytes(pa.compress(json.dumps(EXAMPLES).encode(), "zstd", asbytes=True)[:-30])
    for name in ("cut.json.gz", "cut.json.zst"):
        with pytest.raises(ValueError, match=rf"{name}, after \d+ examples"):
            list(read_annotations(tmp_path / name))


def test_a_large_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "large.json"
    with path.open("w", encoding="utf-8") as file:
        file.write(
            "["
            + ",".join(
                json.dumps(example | {"vid": f"v{n}"}) for n, example in zip(range(60_000), itertools.cycle(EXAMPLES))
            )
        )
        file.write("]")
    assert path.stat().st_size > 8e6
    tracemalloc.start()
    count = sum(1 for _ in read_annotations(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60_000 and peak < 8e6
