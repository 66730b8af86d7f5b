"""`datasets` loads an export without this package."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard
from numbered_videos import write_video
from PIL import Image

from dataset_scripts import load_tagging_dataset
from dataset_scripts.export_manifest import exported_files
from dataset_scripts.media_suffixes import VIDEO_SUFFIXES
from dataset_scripts.parquet_export import write_parquet
from optsg import main

# Loads a folder without this package and prints each example as text.
ELSEWHERE = """
import hashlib, json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_optsg", "dataset_scripts"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import datasets
loaded = datasets.load_dataset(sys.argv[1], cache_dir=sys.argv[2])
def shown(value):
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, dict) and "path" in value:
        return hashlib.sha256(value["bytes"] or open(value["path"], "rb").read()).hexdigest()
    return value
for split, rows in loaded.items():
    if "video" in rows.features:
        rows = rows.cast_column("video", datasets.Video(decode=False))
    for row in rows:
        print(json.dumps([split, {name: shown(value) for name, value in sorted(row.items())}]))
"""
shown = {}
exec(ELSEWHERE[ELSEWHERE.index("def shown") : ELSEWHERE.index("for split")], {"hashlib": __import__("hashlib")}, shown)


def examples_elsewhere(folder, tmp_path):
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "elsewhere")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def examples_here(dataset):
    return [
        [split, {name: shown["shown"](value) for name, value in sorted(row.items())}]
        for split, rows in dataset.items()
        for row in rows
    ]


@pytest.fixture
def export(capsys, tmp_path):
    def run(*arguments):
        status = main(["export", *map(str, arguments), "--dataset-dir", str(tmp_path / "cache")])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    random = np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 2)):
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
                folder / split / f"{number}.png"
            )
            rows.append({"file_name": f"{number}.png", "title": f"凉面 {number}", "tags": ["美食", f"tag {number}"]})
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def create(tmp_path):
    folder = tmp_path / "create"
    (folder / "features").mkdir(parents=True)
    examples = [
        {"vid": f"v{n}", "ann_title": f"标题{n}", "raw_title": "", "tag": ["美食"], "category": n} for n in range(5)
    ]
    for split in ("train", "test"):
        (folder / f"create_210k_{split}.json").write_text(json.dumps(examples), encoding="utf-8")
    for number in range(5):
        np.save(folder / "features" / f"v{number}.npy", np.random.default_rng(number).normal(size=(number + 1, 4)))
    return folder


def test_images_are_stored_in_parquet_shards(images, export, tmp_path):
    status, output, _ = export(images, tmp_path / "out", "--max-shard-size", "20KB", "--license", "cc0-1.0")
    assert status == 0 and "unique tags" in output
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        ".optsg-export.json",
        "README.md",
        "test-00000-of-00001.parquet",
        *(f"train-{number:05d}-of-00003.parquet" for number in range(3)),
    ]
    found = examples_elsewhere(tmp_path / "out", tmp_path)
    assert found == examples_here(load_tagging_dataset(images)) and len(found) == 11
    card = DatasetCard.load(tmp_path / "out/README.md").data
    assert (card.license, card.size_categories, card.pretty_name) == ("cc0-1.0", ["n<1K"], "out")
    assert [(split["name"], split["num_examples"]) for split in card.dataset_info["splits"]] == [
        ("train", 9),
        ("test", 2),
    ]
    assert card.dataset_info["features"][1] == {"name": "image", "dtype": "image"}


def test_frame_features_are_stored_in_parquet(create, export, tmp_path):
    status, _, problems = export("create_tagging", tmp_path / "out", "--data-dir", create)
    assert status == 0, problems
    built = load_tagging_dataset("create_tagging", data_dir=str(create), cache_dir=tmp_path / "cache")
    assert examples_elsewhere(tmp_path / "out", tmp_path) == examples_here(built)
    card = DatasetCard.load(tmp_path / "out/README.md")
    assert card.data.language == ["zh"] and "| train examples | 5 |" in card.text


def test_videos_are_stored_as_separate_files(create, export, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset_scripts.parquet_export.VIDEOS_PER_FOLDER", 2)
    (create / "videos").mkdir()
    for number in range(4):
        write_video(create / "videos" / f"v{number}.mp4", 3 + number)
    arguments = ("create_tagging", tmp_path / "out", "--data-dir", create, "--visual", "video", "--missing", "keep")
    assert export(*arguments)[0] == 0
    built = load_tagging_dataset(
        "create_tagging", data_dir=str(create), visual="video", missing="keep", cache_dir=tmp_path / "cache"
    )
    expected = examples_here(built)
    assert expected[4][1]["video"] is None and len(expected) == 10
    assert examples_elsewhere(tmp_path / "out", tmp_path) == expected
    assert sorted(path.name for path in (tmp_path / "out/data/train/00001").iterdir()) == ["00000.mp4", "00001.mp4"]
    # `load_tagging_dataset` reads them too.
    again = load_tagging_dataset(tmp_path / "out", cache_dir=tmp_path / "again")
    assert examples_here(again) == expected


def test_a_dataset_with_images_and_videos_is_exported(tmp_path, export):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_video(folder / "a.mp4", 3)
    Image.new("RGB", (8, 8), "red").save(folder / "b.png")
    (folder / "metadata.csv").write_text("file_name,title,tags\na.mp4,a,x|y\nb.png,b,z\n")
    assert export(folder, tmp_path / "out")[0] == 0
    assert examples_elsewhere(tmp_path / "out", tmp_path) == examples_here(load_tagging_dataset(folder))


def test_a_second_export_replaces_the_files_of_the_first_only(images, export, tmp_path):
    assert export(images, tmp_path / "out", "--max-shard-size", "10KB")[0] == 0
    assert export(images, tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").glob("train-*.parquet"))) == 1
    (tmp_path / "out/mine.txt").write_text("a note")
    assert export(images, tmp_path / "out", "--max-shard-size", "15KB")[0] == 0
    assert (tmp_path / "out/mine.txt").read_text() == "a note"
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    for size in ("banana", "0"):
        assert export(images, tmp_path / "out", "--max-shard-size", size)[0] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert load_tagging_dataset(tmp_path / "out", cache_dir=tmp_path / "again")["train"].num_rows == 9


def test_a_folder_with_other_files_is_refused(images, export, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("PROJECT")
    for output in (own, images, images.parent):
        status, _, problems = export(images, output)
        assert status == 2 and "not from an export" in problems
    assert (own / "README.md").read_text() == "PROJECT" and (images / "train/0.png").exists()
    assert not list(tmp_path.glob(".*partial"))


def manifest_of(*names, hashes=("0" * 64,)):
    return json.dumps({"format": 2, "files": {name: list(hashes) for name in names}})


@pytest.mark.parametrize(
    "manifest",
    [
        '["../victim.txt"]',
        manifest_of("../victim.txt"),
        manifest_of("{tmp_path}/victim.txt"),
        manifest_of("data/../../victim.txt"),
        manifest_of("data/../metadata.parquet"),
        manifest_of("mine.txt"),
        manifest_of("link/train-00000-of-00001.parquet"),
        manifest_of("data/link/metadata.parquet"),
        manifest_of("linked-00000-of-00001.parquet"),
        manifest_of("train-00000-of-00001.parquet"),
        '{"format": 2, "files": ["../victim.txt"]}',
        '{"format": 2, "files": {"README.md": "' + "0" * 64 + '"}}',
        "{",
        "[" * 100_000,
        "null",
    ],
)
def test_an_export_deletes_only_what_an_export_wrote(images, export, tmp_path, manifest):
    (tmp_path / "victim.txt").write_text("victim")
    (tmp_path / "elsewhere").mkdir()
    for name in ("train-00000-of-00001.parquet", "metadata.parquet"):
        (tmp_path / "elsewhere" / name).write_text("victim")
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data/link").symlink_to(tmp_path / "elsewhere")
    (out / "linked-00000-of-00001.parquet").symlink_to(tmp_path / "victim.txt")
    for name in ("mine.txt", "train-00000-of-00001.parquet"):
        (out / name).write_text("mine")
    (out / ".optsg-export.json").write_text(manifest.replace("{tmp_path}", str(tmp_path)))
    before = sorted((str(path), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    status, _, problems = export(images, out)
    assert status == 2 and "give a new folder" in problems
    after = sorted((str(path), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    assert [entry for entry in after if "/cache" not in entry[0]] == before
    try:
        published = exported_files(out)
    except ValueError:
        published = []
    assert set(published) <= {"README.md", "train-00000-of-00001.parquet"}


def test_files_of_others_in_the_folder_of_an_export_are_kept(images, export, tmp_path, caplog):
    out = tmp_path / "out"
    assert export(images, out, "--max-shard-size", "20KB")[0] == 0
    (out / "empty").mkdir()
    (out / "README.md").write_text("my own text")
    (out / "train-00000-of-00001.parquet").write_text("mine")
    assert "train-00000-of-00001.parquet is not from an export" in export(images, out)[2]
    (out / "train-00000-of-00001.parquet").unlink()
    assert export(images, out)[0] == 0 and (out / "empty").is_dir()
    assert (out / "README.md.bak").read_text() == "my own text" and "kept as README.md.bak" in caplog.text
    (out / "README.md").write_text("edited again")
    assert export(images, out)[0] == 0 and (out / "README.md.bak").read_text() == "my own text"
    assert (out / "README.md.bak.1").read_text() == "edited again"
    with (out / "train-00000-of-00001.parquet").open("ab") as file:
        file.write(b"x")
    assert "was changed after it was exported" in export(images, out)[2]


def test_a_manifest_that_is_a_link_is_refused(images, export, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim.json"
    out.mkdir()
    victim.write_text(manifest_of("README.md"))
    (out / ".optsg-export.json").symlink_to(victim)
    assert ".optsg-export.json is a link" in export(images, out)[2]
    assert victim.read_text() == manifest_of("README.md")


@pytest.mark.parametrize("suffix", sorted(VIDEO_SUFFIXES))
def test_videos_with_every_suffix_load_again(tmp_path, suffix):
    folder = tmp_path / "videos"
    folder.mkdir()
    # The suffix alone matters for how a video is stored.
    write_video(tmp_path / "a.mp4", 3).rename(folder / f"a{suffix}")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": f"a{suffix}", "title": "a", "tags": ["x"]}))
    dataset = load_tagging_dataset(folder)
    write_parquet(dataset, tmp_path / "out", DatasetCard("---\nlicense: mit\n---\n# videos\n"))
    again = load_tagging_dataset(tmp_path / "out", cache_dir=tmp_path / "again")
    assert examples_here(again) == examples_here(dataset)


def test_splits_with_any_name_and_missing_videos_are_exported(create, tmp_path):
    (create / "videos").mkdir()
    write_video(create / "videos/v1.mp4", 3)
    built = load_tagging_dataset(
        "create_tagging", data_dir=str(create), visual="video", missing="keep", cache_dir=tmp_path / "cache"
    )
    renamed = datasets.DatasetDict({"pretrain": built["train"], "gold": built["test"].select([0, 2])})
    write_parquet(renamed, tmp_path / "out", DatasetCard("---\nlicense: mit\n---\n# videos\n"))
    found = examples_elsewhere(tmp_path / "out", tmp_path)
    assert found == examples_here(renamed) and [split for split, _ in found] == ["pretrain"] * 5 + ["gold"] * 2


def test_local_files_that_a_parquet_dataset_names_are_not_exported(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    rows = {"id": ["a"], "title": [""], "tags": [["x"]], "image": [{"bytes": None, "path": str(secret)}]}
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "title": datasets.Value("string"),
            "tags": datasets.List(datasets.Value("string")),
        }
        | {"image": datasets.Image()}
    )
    (tmp_path / "evil").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "evil/train-00000-of-00001.parquet")
    dataset = load_tagging_dataset(tmp_path / "evil", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"secret\.png.*not the file itself"):
        write_parquet(dataset, tmp_path / "out", DatasetCard("---\nlicense: mit\n---\n# x\n"))


def test_a_failed_export_leaves_the_earlier_one(images, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    dataset = load_tagging_dataset(images)
    write_parquet(dataset, tmp_path / "out", DatasetCard("---\nlicense: mit\n---\n# cards\n"))
    monkeypatch.setattr(datasets.Dataset, "to_parquet", full)
    with pytest.raises(OSError, match="No space"):
        write_parquet(dataset, tmp_path / "out", DatasetCard("---\nlicense: mit\n---\n# cards\n"))
    assert load_tagging_dataset(tmp_path / "out", cache_dir=tmp_path / "again")["train"].num_rows == 9


def test_datasets_that_cannot_be_exported_are_reported(tmp_path, export):
    assert "not a benchmark" in export("nonsense", tmp_path / "out")[2]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png"}')
    status, _, problems = export(folder, tmp_path / "out")
    assert status == 2 and "gone.png" in problems
    assert not Path(tmp_path / "out").exists()
