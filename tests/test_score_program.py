"""`examples/score.py` writes the keys of the committed result file, and scores the split of `optsg evaluate`."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.generation_settings import MODALITIES

RESULT = Path(__file__).parents[1] / "results/icon_tagging/optsg-icon-small.json"
TAGS = [["red", "square"], ["blue", "colour"], ["red", "colour"], ["new tag"]]
TITLES = ["a red square", "blue", "red", "a green dog"]


@pytest.fixture(scope="module")
def score(load_program):
    return load_program("score")


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "images"
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        rows = []
        for index, (title, tags) in enumerate(zip(TITLES, TAGS)):
            if split == "train" and tags == ["new tag"]:
                tags = ["square"]
            Image.new("RGB", (32, 32), (60 * index, 90, 120)).save(folder / split / f"{index}.png")
            rows.append({"file_name": f"{index}.png", "title": title, "tags": tags})
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def checkpoint(make_model, tiny_processor, tmp_path):
    """Saves a model with a label vocabulary and with settings for both decodings."""
    model = make_model()
    tags = sorted(tiny_processor.label_vocabulary)
    ids = tiny_processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"]
    model.set_label_vocabulary(ids, [tiny_processor.label_vocabulary[tag] for tag in tags])
    settings = {
        "pad_bias": -4.0,
        "fusion_weights": dict.fromkeys(MODALITIES, [0.5, 0.5, 0.1, 0.5, 0.1]),
        "logit_adjustment": 0.2,
        "threshold": dict.fromkeys(MODALITIES, 0.01),
    }
    for name, value in settings.items():
        setattr(model.generation_config, name, {"parallel": value, "sequential": value})
    model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    summary = {"arguments": {"seed": 7}, "training_seconds": 12.5}
    (tmp_path / "model/training_summary.json").write_text(json.dumps(summary))
    return tmp_path / "model"


def keys_of(value):
    """Returns the keys of nested dictionaries; lists count as one value, except lists of dictionaries."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [keys_of(value[0])]
    return {key: keys_of(entry) for key, entry in value.items()} if isinstance(value, dict) else None


def run(score, monkeypatch, checkpoint, dataset, tmp_path):
    output = tmp_path / "results/scores.json"
    arguments = ["--checkpoint", checkpoint, "--dataset", dataset, "--output", output]
    arguments += ["--dataset_dir", tmp_path / "hf", "--cache_dir", tmp_path / "cache"]
    monkeypatch.setattr("sys.argv", ["score.py", *map(str, arguments)])
    score.main()
    return json.loads(output.read_text())


def test_the_program_writes_the_keys_of_the_committed_file(score, checkpoint, dataset, tmp_path, monkeypatch):
    result = run(score, monkeypatch, checkpoint, dataset, tmp_path)
    expected = keys_of(json.loads(RESULT.read_text()))
    assert keys_of(result) == expected
    assert (result["examples"], result["evaluated_tags"]) == (4, 4)
    assert (result["seed"], result["training_seconds"]) == (7, 12.5)
    assert result["test"]["parallel"]["fusion_weights"]["title"] == [0.5, 0.5, 0.1, 0.5, 0.1]
    assert result["test"]["parallel"]["full_f1"] == result["modalities"]["image+title"]["full_f1"]
    assert result["knn"]["neighbours"] <= 4 and result["knn"]["full_f1"] > 0


def test_a_model_without_fitted_settings_is_scored(score, tiny_checkpoint, dataset, tmp_path, monkeypatch):
    result = run(score, monkeypatch, tiny_checkpoint, dataset, tmp_path)
    assert result["test"]["sequential"]["pad_bias"] == -5.0 and "seed" not in result
    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint)
    found = processor.batch_decode(model.generate(**processor(titles=TITLES), decoding="parallel"))
    assert result["modalities"]["title"]["tags_per_example"] == pytest.approx(sum(map(len, found)) / 4, abs=0.01)


def test_without_a_test_split_validation_is_scored(score, tiny_checkpoint, dataset, tmp_path, monkeypatch):
    shutil.rmtree(dataset / "test")
    result = run(score, monkeypatch, tiny_checkpoint, dataset, tmp_path)
    assert result["split"] == "validation" and {*result["validation"]} == {"parallel", "sequential"}
