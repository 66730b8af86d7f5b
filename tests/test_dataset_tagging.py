"""Tagging a dataset in shards: complete files, unreadable examples, resumed runs."""

import json
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.evaluation.dataset_tagging import (
    is_complete,
    shard_path,
    split_into_shards,
    tag_examples,
    write_shard,
)


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("tag_dataset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rows = []
    for index in range(7):
        PILImage.new("RGB", (32, 32), (30 * index, 60, 90)).save(root / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "title": "a red square", "tags": []})
    (root / "4.png").write_bytes(b"not an image")
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_shards_cover_every_example_once():
    assert split_into_shards(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    for examples, size in ((0, 3), (7, 0)):
        with pytest.raises(ValueError):
            split_into_shards(examples, size)


def test_an_unreadable_example_does_not_affect_the_others(folder, tiny_checkpoint):
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint).eval()
    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    paths = [str(folder / f"{index}.png") for index in range(7)]
    rows = Dataset.from_dict({"id": list("abcdefg"), "image": paths, "title": ["a red square"] * 7})
    rows = rows.cast_column("image", Image(decode=False))
    found = tag_examples(model, processor, rows, batch_size=7)
    assert [row["id"] for row in found] == list("abcdefg")
    assert [row["error"] is None for row in found] == [True] * 4 + [False] + [True] * 2
    assert "4.png" in found[4]["error"] and not found[4]["tags"]
    assert all(row["tags"] for row in found if row["error"] is None)
    one = tag_examples(model, processor, [rows[2]])
    assert [tag["tag"] for tag in one[0]["tags"]] == [tag["tag"] for tag in found[2]["tags"]]


def test_a_complete_shard_is_not_made_again(tmp_path):
    path = shard_path(tmp_path, 0, 1)
    pq.write_table(pa.table({"id": ["a", "b", "c"]}), path)
    before = path.read_bytes()
    write_shard(None, None, None, path, range(3))
    assert path.read_bytes() == before
    for damaged in (b"", before[:-9]):
        path.write_bytes(damaged)
        assert not is_complete(path, 3)
    path.write_bytes(before)
    assert is_complete(path, 3) and not is_complete(path, 4) and not is_complete(path.with_name("x"), 3)


def test_the_program_makes_missing_shards_only(program, folder, tiny_checkpoint, tmp_path, capsys):
    given = ["--checkpoint", tiny_checkpoint, "--dataset", folder, "--output", tmp_path / "tags", "--shard_size", 3]
    arguments = program.parse_arguments(list(map(str, given)))
    program.tag_with_accelerate(arguments)
    assert "7 examples in 3 files" in capsys.readouterr().out
    files = sorted((tmp_path / "tags").glob("*.parquet"))
    tables = [pq.read_table(path) for path in files]
    assert [len(table) for table in tables] == [3, 3, 1]
    assert tables[0].schema.names == ["id", "tags", "error"]
    files[1].unlink()
    files[0].write_bytes(b"")
    program.tag_with_accelerate(program.parse_arguments(list(map(str, [*given, "--batch_size", 2]))))
    assert "1 unreadable" in capsys.readouterr().out
    again = [pq.read_table(path) for path in files]
    assert [table["id"] for table in again] == [table["id"] for table in tables] and again[2] == tables[2]
    with pytest.raises(ValueError, match="made with different threshold"):
        program.tag_with_accelerate(program.parse_arguments(list(map(str, [*given, "--threshold", 0.5]))))
    files[2].unlink()
    with pytest.raises(RuntimeError, match="1 shards are missing, such as tags-00002-of-00003"):
        program.report(arguments, [range(0, 3), range(3, 6), range(6, 7)])


@pytest.fixture
def copies(folder, tiny_checkpoint, tmp_path):
    """Copies the checkpoint and the images, tags the images, and returns the command and the two copies."""
    checkpoint, images = tmp_path / "model", tmp_path / "images"
    shutil.copytree(tiny_checkpoint, checkpoint)
    shutil.copytree(folder, images)
    given = ["--checkpoint", checkpoint, "--dataset", images, "--output", tmp_path / "tags"]
    return [*map(str, given), "--dataset_dir", str(tmp_path / "hf")], checkpoint, images


def test_the_report_reads_a_folder_whose_name_is_like_a_pattern(program, tmp_path, capsys):
    output = tmp_path / "run [1]*"
    output.mkdir()
    pq.write_table(pa.table({"error": [None, "no image", "no image"]}), program.shard_path(output, 0, 1))
    program.report(SimpleNamespace(output=output), [range(3)])
    printed = capsys.readouterr().out
    assert printed.startswith("3 examples in 1 files") and "2 unreadable\n  2: no image" in printed


def test_partial_files_of_killed_runs_are_removed(program, copies, tmp_path):
    command, _, _ = copies
    program.tag_with_accelerate(program.parse_arguments(command))
    (tmp_path / "tags/.tags-00000-of-00001.parquet.123").write_text("incomplete")
    program.tag_with_accelerate(program.parse_arguments(command))
    names = sorted(path.name for path in (tmp_path / "tags").iterdir())
    assert names == ["arguments.json", "tags-00000-of-00001.parquet"]


def change_weights(checkpoint, images):
    model = OPTSGForTagGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        model.lm_head.bias[3] += 1
    model.save_pretrained(checkpoint)


def change_image_normalisation(checkpoint, images):
    path = checkpoint / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(settings))


def change_titles(checkpoint, images):
    path = images / "metadata.jsonl"
    path.write_text(path.read_text().replace("a red square", "a blue square"))


def change_first_image(checkpoint, images):
    PILImage.new("RGB", (32, 32), (1, 2, 3)).save(images / "0.png")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_weights, "weights"),
        (change_image_normalisation, "weights"),
        (change_titles, "examples"),
        (change_first_image, "examples"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_shards_of_other_weights_or_examples_are_not_mixed(program, copies, change, name):
    command, checkpoint, images = copies
    program.tag_with_accelerate(program.parse_arguments(command))
    change(checkpoint, images)
    with pytest.raises(ValueError, match=f"made with different {name}"):
        program.tag_with_accelerate(program.parse_arguments(command))
