"""A dataset tagged in shards: each as a whole or not at all, whoever makes it."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.evaluation.dataset_tagging import is_whole, shard_path, shards_of, tag_examples, write_shard


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
    (root / "4.png").write_bytes(b"no image")
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_shards_cover_every_example_once():
    assert shards_of(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    for examples, size in ((0, 3), (7, 0)):
        with pytest.raises(ValueError):
            shards_of(examples, size)


def test_what_cannot_be_read_is_said_and_its_neighbours_are_tagged(folder, tiny_checkpoint):
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


def test_a_shard_that_is_there_is_not_made_again(tmp_path):
    path = shard_path(tmp_path, 0, 1)
    pq.write_table(pa.table({"id": ["a", "b", "c"]}), path)
    before = path.read_bytes()
    assert write_shard(None, None, None, tmp_path, 0, 1, range(3)) == path and path.read_bytes() == before
    # What a machine lost while it failed is not there.
    for left in (b"", before[:-9]):
        path.write_bytes(left)
        assert not is_whole(path, range(3))
    path.write_bytes(before)
    assert is_whole(path, range(3)) and not is_whole(path, range(4)) and not is_whole(path.with_name("x"), range(3))


def test_the_program_makes_what_is_missing_and_refuses_other_arguments(
    program, folder, tiny_checkpoint, tmp_path, capsys
):
    given = ["--checkpoint", tiny_checkpoint, "--dataset", folder, "--output", tmp_path / "tags", "--shard_size", 3]
    arguments = program.parse_arguments(list(map(str, given)))
    program.with_accelerate(arguments)
    assert "7 examples in 3 files" in capsys.readouterr().out
    files = sorted((tmp_path / "tags").glob("*.parquet"))
    tables = [pq.read_table(path) for path in files]
    assert [len(table) for table in tables] == [3, 3, 1]
    assert tables[0].schema.names == ["id", "tags", "error"]
    files[1].unlink()
    files[0].write_bytes(b"")
    # In parts of another size, for less memory.
    program.with_accelerate(program.parse_arguments(list(map(str, [*given, "--batch_size", 2]))))
    assert "1 could not be read" in capsys.readouterr().out
    again = [pq.read_table(path) for path in files]
    assert [table["id"] for table in again] == [table["id"] for table in tables] and again[2] == tables[2]
    with pytest.raises(ValueError, match="another threshold"):
        program.with_accelerate(program.parse_arguments(list(map(str, [*given, "--threshold", 0.5]))))
    files[2].unlink()
    with pytest.raises(RuntimeError, match="1 shards are missing, such as tags-00002-of-00003"):
        program.report(arguments, [range(0, 3), range(3, 6), range(6, 7)])


def test_shards_of_other_weights_or_examples_are_not_mixed_and_nothing_is_left_behind(
    program, folder, tiny_checkpoint, tmp_path
):
    checkpoint, images = tmp_path / "model", tmp_path / "images"
    shutil.copytree(tiny_checkpoint, checkpoint)
    shutil.copytree(folder, images)
    given = ["--checkpoint", checkpoint, "--dataset", images, "--output", tmp_path / "tags"]
    given += ["--dataset_dir", tmp_path / "hf"]
    program.with_accelerate(program.parse_arguments(list(map(str, given))))
    killed = tmp_path / "tags/.tags-00000-of-00001.parquet.123"
    killed.write_text("half of it")
    program.with_accelerate(program.parse_arguments(list(map(str, given))))
    assert sorted(path.name for path in (tmp_path / "tags").iterdir()) == [
        "arguments.json",
        "tags-00000-of-00001.parquet",
    ]
    model = OPTSGForTagGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        model.lm_head.bias[3] += 1
    model.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="made with another weights"):
        program.with_accelerate(program.parse_arguments(list(map(str, given))))
    shutil.rmtree(checkpoint)
    shutil.copytree(tiny_checkpoint, checkpoint)
    lines = (images / "metadata.jsonl").read_text()
    (images / "metadata.jsonl").write_text(lines.replace("a red square", "a blue square"))
    with pytest.raises(ValueError, match="made with another examples"):
        program.with_accelerate(program.parse_arguments(list(map(str, given))))
    (images / "metadata.jsonl").write_text(lines)
    program.with_accelerate(program.parse_arguments(list(map(str, given))))
    PILImage.new("RGB", (32, 32), (1, 2, 3)).save(images / "0.png")
    with pytest.raises(ValueError, match="made with another examples"):
        program.with_accelerate(program.parse_arguments(list(map(str, given))))
    shutil.copy(folder / "0.png", images / "0.png")
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (checkpoint / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="made with another weights"):
        program.with_accelerate(program.parse_arguments(list(map(str, given))))
