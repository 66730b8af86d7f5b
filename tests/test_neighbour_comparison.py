"""The comparison with nearest neighbours at the end of a training run."""

import pytest
from accelerate import PartialState
from datasets import Dataset
from PIL import Image

from modeling_optsg import OPTSGModel, OPTSGTrainingArguments, TagEvaluator
from modeling_optsg.training import neighbour_comparison
from modeling_optsg.training.data import cache_examples
from modeling_optsg.training.neighbour_comparison import compare_with_neighbours

COLOURS = ("red", "green", "blue")


def examples(number):
    names = [COLOURS[index % 3] for index in range(number)]
    images = [Image.new("RGB", (20, 20), name) for name in names]
    return Dataset.from_dict({"image": images, "title": names, "tags": [[name] for name in names]})


@pytest.mark.parametrize("text_layers", [0, 1])
def test_a_selection_of_the_training_examples_is_not_encoded_again(
    tiny_model, tiny_processor, tmp_path, monkeypatch, text_layers
):
    PartialState()
    args = OPTSGTrainingArguments(str(tmp_path), cache_dir=str(tmp_path / "cache"), train_text_layers=text_layers)
    train, validation = examples(12), examples(6)
    for rows in (train, validation):
        cache_examples(rows, tiny_model, tiny_processor, args)
    files = set((tmp_path / "cache/features").iterdir())
    monkeypatch.setattr(neighbour_comparison, "MAX_EXAMPLES", 7)
    monkeypatch.setattr(OPTSGModel, "encode_frames", lambda *args: pytest.fail("the vision tower was run again"))
    compared, validate_knn = [], neighbour_comparison.validate_knn

    def record(model, processor, train, *rest, **kwargs):
        compared.extend(train)
        return validate_knn(model, processor, train, *rest, **kwargs)

    monkeypatch.setattr(neighbour_comparison, "validate_knn", record)
    evaluator = TagEvaluator(validation["tags"], dict.fromkeys(COLOURS, 4))
    fits = {"only": {"validation": {"full_f1": 50.0, "micro_f1": 40.0}}}
    knn = compare_with_neighbours(args, tiny_model, tiny_processor, train, validation, evaluator, fits)
    assert 0 <= knn["full_f1"] <= 100
    assert len(compared) == 7 and {tag for example in compared for tag in example["tags"]} == set(COLOURS)
    for example in compared:
        found = example["title_features"]
        title = tiny_processor(titles=example["title"])
        assert abs(found - tiny_model.model.eval().encode_text(**title)[0].detach().numpy()).max() < 0.01
        assert example["image_features"] is not None
    assert set((tmp_path / "cache/features").iterdir()) == files
