"""The README of a dataset names only files of that dataset."""

import json

import pytest
from datasets import Dataset

from dataset_scripts import load_tagging_dataset

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


@pytest.mark.parametrize("text", ["---\nconfigs: [\n---\n", "---\nconfigs: 3\n---\n", "---\nconfigs:\n- a\n---\n"])
def test_damaged_metadata_is_named(folder, text):
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: the metadata cannot be read"):
        load_tagging_dataset(folder, cache_dir=folder.parent / "cache")
