"""The README of a dataset names only files of that dataset."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from datasets import Dataset

from dataset_scripts import data_file_checks, generic_datasets, load_tagging_dataset

ROWS = {"id": ["a"], "title": ["own"], "tags": [["x"]]}


@pytest.fixture
def folder(tmp_path):
    """A folder of Parquet files, next to another one with private files."""
    for name, title in (("own", "own"), ("private", "private")):
        (tmp_path / name).mkdir()
        rows = ROWS | {"title": [title]}
        Dataset.from_dict(rows).to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
    return tmp_path / "own"


def write_card(folder, name="README.md", **config):
    metadata = json.dumps({"configs": [{"config_name": "default", **config}]}, allow_nan=False)
    (folder / name).write_text(f"---\n{metadata}\n---\n# card\n" if name == "README.md" else metadata)


OUTSIDE = [
    {"data_files": "{private}/*.parquet"},
    {"data_files": "../private/*.parquet"},
    {"data_files": "data/../../private/train-00000-of-00001.parquet"},
    {"data_files": [{"split": "train", "path": ["train-*", "../private/*.parquet"]}]},
    {"data_files": [{"split": "train", "path": "train-*"}, {"split": "test", "path": "~/x.parquet"}]},
    {"data_files": "https://localhost:9/x.parquet"},
    {"data_files": "hf://datasets/org/name/x.parquet"},
    {"data_files": "file://{private}/train-00000-of-00001.parquet"},
    {"data_files": "zip://x.parquet::https://localhost:9/x.zip"},
    {"data_files": "..\\private\\x.parquet"},
    {"data_dir": "../private"},
    {"data_dir": "{private}"},
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("config", OUTSIDE, ids=str)
def test_data_files_outside_the_folder_are_refused(folder, name, config, streaming):
    private = str(folder.parent / "private")
    config = json.loads(json.dumps(config, allow_nan=False).replace("{private}", private))
    write_card(folder, name, **config)
    with pytest.raises(ValueError, match="which are outside the folder"):
        load_tagging_dataset(folder, cache_dir=folder.parent / "cache", streaming=streaming)


@pytest.mark.parametrize(
    "config", [{"data_files": "train-*"}, {"data_files": [{"split": "train", "path": "*.parquet"}]}]
)
def test_data_files_of_the_folder_are_loaded(folder, config):
    write_card(folder, **config)
    assert load_tagging_dataset(folder, cache_dir=folder.parent / "cache")["train"]["title"][:] == ["own"]


def test_links_that_lead_outside_the_folder_are_refused(folder):
    (folder / "train-00001-of-00002.parquet").symlink_to("../private/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet', which .* is a link that leads outside"):
        load_tagging_dataset(folder, cache_dir=folder.parent / "cache")


def test_links_in_the_cache_of_the_hub_are_loaded(folder):
    snapshot = folder.parent / "datasets--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (folder / "train-00000-of-00001.parquet").rename(snapshot.parent.parent / "blobs/123")
    (snapshot / "train-00000-of-00001.parquet").symlink_to("../../blobs/123")
    assert load_tagging_dataset(snapshot, cache_dir=folder.parent / "cache")["train"]["title"][:] == ["own"]


REPOSITORY = "hf://datasets/org/name"


@pytest.mark.parametrize(
    "path, is_own",
    [
        ("data/*.parquet", True),
        (f"{REPOSITORY}/data/*.parquet", True),
        ("http://169.254.169.254/x.parquet", False),
        ("hf://datasets/org/name2/x.parquet", False),
        (f"{REPOSITORY}/../other/x.parquet", False),
        ("zip://x.parquet::http://localhost:9/x.zip", False),
        ("/etc/x.parquet", False),
    ],
)
def test_a_dataset_on_the_hub_names_only_its_own_files(folder, monkeypatch, path, is_own):
    write_card(folder, data_files=path)
    monkeypatch.setattr(data_file_checks, "snapshot_download", lambda *args, **kwargs: str(folder))
    built = []
    monkeypatch.setattr(generic_datasets, "_builder", lambda *args: built.append(args) or 1 / 0)
    with pytest.raises((ValueError, ZeroDivisionError), match="by zero" if is_own else "outside the dataset"):
        load_tagging_dataset("org/name")
    assert bool(built) == is_own, "no address is opened before the check"


@pytest.mark.parametrize(
    "file, is_own",
    [
        (f"{REPOSITORY}@0123/x.parquet", True),
        ("hf://datasets/org/other@0123/x.parquet", False),
        ("https://localhost/x.parquet", False),
        ("/etc/x.parquet", False),
    ],
)
def test_resolved_files_belong_to_the_dataset(file, is_own):
    builder = SimpleNamespace(repo_id="org/name", config=SimpleNamespace(data_files={"train": [file]}))
    with nullcontext() if is_own else pytest.raises(ValueError, match="not inside it"):
        data_file_checks.check_resolved_files(builder, "org/earlier-name")


@pytest.mark.parametrize("text", ["---\nconfigs: [\n---\n", "---\nconfigs: 3\n---\n", "---\nconfigs:\n- a\n---\n"])
def test_damaged_metadata_is_named(folder, text):
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: the metadata cannot be read"):
        load_tagging_dataset(folder, cache_dir=folder.parent / "cache")
