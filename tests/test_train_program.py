"""`examples/train.py`, `examples/score.py` and the model card, end to end on a folder of plain images."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from colour_folder import write_colour_folder
from datasets import load_from_disk
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from transformers import BertModel, pipeline

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, OPTSGTrainer, TagEvaluator
from modeling_optsg.base_models import OPTSGModel
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.book.building import group_of
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.evaluation.checkpoint_evaluation import evaluate_checkpoint
from modeling_optsg.hub import write_model_card
from modeling_optsg.training import trainer
from modeling_optsg.training.checkpoints import is_eight_bit

ROOT = Path(__file__).parents[1]
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 4}


@pytest.fixture(scope="module")
def program():
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_colour_folder(root)
    return root


@pytest.fixture(scope="module")
def settings(towers):
    """Arguments of all training runs on pretrained towers."""
    more = {"vision_tower": towers / "vision", "text_tower": towers / "text", "tag_vocab_size": 260}
    return more | {"max_tag_tokens": 12}


@pytest.fixture(scope="module")
def train(program):
    """Train in this process."""

    def run(dataset, output, cache, **more):
        given = {"dataset": dataset, "output_dir": output, "cache_dir": cache} | more
        program.main([str(word) for key, value in given.items() for word in (f"--{key}", value)])

    return run


@pytest.fixture(scope="module")
def trained(train, folder, settings, tmp_path_factory):
    """A folder with a trained model in `run`, the arguments in `settings` and `config.json`, and the cache."""
    root = tmp_path_factory.mktemp("trained")
    config = {"config_overrides": SMALL, "train_batch_size": 8, "num_train_epochs": 2, "eval_steps": 0.5}
    (root / "config.json").write_text(json.dumps(config | {"learning_rate": 1e-3}), encoding="utf-8")
    train(folder, root / "run", root / "cache", **first_run(root, settings))
    return root


def first_run(root, settings):
    return settings | {"config": root / "config.json", "num_negatives": 3, "save_half_precision": True}


def test_a_run_leaves_a_fitted_checkpoint_a_log_and_a_summary(trained):
    model = OPTSGForTagGeneration.from_pretrained(trained / "run")
    processor = OPTSGProcessor.from_pretrained(trained / "run")
    fitted = model.generation_config
    for setting in (fitted.pad_bias, fitted.threshold, fitted.fusion_weights):
        assert {*setting} == {"parallel", "sequential"}
    assert fitted.num_candidates == 50
    for by_modality in fitted.fusion_weights.values():
        assert {*by_modality} == {"image+title", "image", "title"}
        assert all(len(weights) == 5 for weights in by_modality.values())
    # The classifier knows the tags that are not too long.
    assert model.config.num_tag_classes == len({"red", "green", "blue", "white", "left", "right"})
    assert set(processor.label_vocabulary) >= {"red", "left"}
    lines = (trained / "run/training_log.jsonl").read_text().splitlines()
    # None of the few tags is common, and no metric is NaN.
    log = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    sample = log[-1]["sample_predictions"][0]
    assert sample["title"] == "a red image" and sample["tags"] == ["red", "left"]
    assert isinstance(sample["predicted"], list)
    assert len(log) == 2 and {"generation_loss", "alignment_loss", "examples_per_second", "validation"} <= set(log[0])
    summary = json.loads((trained / "run/training_summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["examples"] == {"train": 15, "validation": 8} and "output_dir" not in summary["arguments"]
    fit = summary["fits"]["parallel"]
    assert fit["pad_bias"] == fitted.pad_bias["parallel"]
    assert fit["validation"]["full_f1"] == max(row["validation"]["full_f1"] for row in fit["tried"])
    assert sorted(path.name for path in (trained / "run/state").iterdir()) == ["run.lock", "status.json"]


@pytest.mark.parametrize("model_type", ["asy", "model-f", "model-g", "sequence", "open-book", "knn"])
def test_baselines_train_with_the_same_loop(train, trained, folder, settings, tmp_path, model_type):
    more = {"model_type": model_type, "config_overrides": json.dumps(SMALL), "num_train_epochs": 1}
    more |= {"eval_steps": 100, "num_return_sequences": 2, "train_batch_size": 8}
    train(folder, tmp_path / "run", trained / "cache", **settings, **more)
    summary = json.loads((tmp_path / "run/training_summary.json").read_text())
    assert summary["arguments"]["model_type"] == model_type
    assert all(math.isfinite(row["loss"]) for row in summary["history"])
    assert bool(summary["history"]) == (model_type != "knn")
    fit = summary["fits"].get("only") or summary["fits"]["parallel"]
    assert ("pad_bias" in fit) == (model_type not in ("asy", "knn"))
    if model_type != "knn":
        saved = json.loads((tmp_path / "run/config.json").read_text())
        has_one_prompt = model_type in ("sequence", "open-book")
        assert saved["num_prompts"] == (1 if has_one_prompt else 4)
        max_tags = json.loads((tmp_path / "run/processor_config.json").read_text())["num_prompts"]
        assert max_tags == (4 if model_type.startswith("model") else 100), "only Models F and G have slots"
    threshold = MODEL_TYPES[model_type].model.from_pretrained(tmp_path / "run").generation_config.threshold
    assert (threshold["parallel"] if isinstance(threshold, dict) else threshold) == fit["threshold"]
    dataset = load_tagging_dataset(folder)
    assert (tmp_path / "run/book").is_dir() == (model_type == "open-book")
    if model_type == "open-book":
        train_split = dataset["train"].select_columns(["id", "title", "tags"])
        # An example without tags is left out of the training.
        groups = [group_of(row["id"], row["title"]) for row in train_split if row["tags"]]
        assert load_from_disk(str(tmp_path / "run/book"))["group"][:] == groups
    result = evaluate_checkpoint(
        str(tmp_path / "run"), dataset, "mine", split="validation", cache_dir=trained / "cache"
    )
    assert result["model_type"] == model_type and (result["knn"] is None) == (model_type == "knn")
    assert {*result["validation"]} == {*summary["fits"]}
    for decoding, scored in result["validation"].items():
        # The fusion weights are rounded.
        expected = summary["fits"][decoding]["validation"]
        assert {name: scored[name] for name in expected} == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("fine_tuning", [False, True])
def test_a_dataset_without_tags_is_refused(train, trained, folder, tmp_path, fine_tuning):
    shutil.copytree(folder, tmp_path / "data")
    for path in (tmp_path / "data").rglob("metadata.jsonl"):
        rows = [json.loads(line) | {"tags": []} for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, rows)))
    more = {"checkpoint": trained / "run"} if fine_tuning else {}
    with pytest.raises(ValueError, match="data: No training example has a tag. Tags are read from"):
        train(tmp_path / "data", tmp_path / "run", tmp_path, **more)


def test_half_precision_checkpoints_load_as_32_bits(trained):
    with safe_open(trained / "run/model.safetensors", "pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    coarse = set(filter(is_eight_bit, dtypes))
    layer = "model.text_tower.encoder.layer.0"
    assert f"{layer}.output.dense.weight" in coarse and f"{layer}.attention.output.dense.weight" not in coarse
    assert len(coarse) >= 5 and {dtypes[name] for name in coarse} == {"F8_E4M3"}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("weight") and name not in coarse} == {"F16"}
    assert all(dtype == "F32" for name, dtype in dtypes.items() if "running_" in name)
    assert OPTSGForTagGeneration.from_pretrained(trained / "run").dtype == torch.float32


def test_a_trained_folder_loads_in_a_pipeline_without_remote_code(trained):
    tagger = pipeline("tag-generation", model=str(trained / "run"))
    assert isinstance(tagger({"title": "a red image"}), list)


@pytest.mark.slow
def test_frozen_towers_are_not_run_twice(train, trained, folder, settings, monkeypatch, caplog, tmp_path):
    encode_frames = OPTSGModel.encode_frames

    def encode_dummies(self, pixel_values, frame_mask=None):
        # `build_model` runs the tower on one or two dummy examples.
        assert len(pixel_values) <= 2, "the tower was run"
        return encode_frames(self, pixel_values, frame_mask)

    monkeypatch.setattr(OPTSGModel, "encode_frames", encode_dummies)
    train(
        folder,
        tmp_path / "run",
        trained / "cache",
        **settings,
        num_train_epochs=0.1,
        eval_steps=100,
        train_batch_size=64,
    )
    assert "There are only 15 training examples: a step has 15, not 64" in caplog.text


@pytest.mark.parametrize("keep_vocabulary", [False, True])
def test_fine_tuning_keeps_the_tokenizer(train, trained, tmp_path, keep_vocabulary):
    (tmp_path / "mine").mkdir()
    # The text tower learns from titles; tags have the features that it had at first.
    rows = [{"file_name": f"{i}.png", "title": "a red image" * (i % 2), "tags": ["gelb", "黄色"]} for i in range(6)]
    for row in rows:
        Image.new("RGB", (20, 20), "yellow").save(tmp_path / "mine" / row["file_name"])
    lines = (json.dumps(row) + "\n" for row in rows)
    (tmp_path / "mine/metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    more = {"checkpoint": trained / "run", "num_train_epochs": 3, "eval_steps": 100, "train_batch_size": 2}
    more |= {"train_vision_tower": True, "train_text_layers": -1, "validation_ratio": 0.34}
    more |= {"keep_vocabulary": keep_vocabulary}
    train(tmp_path / "mine", tmp_path / "tuned", tmp_path / "cache", **more)
    before, after = (OPTSGProcessor.from_pretrained(f) for f in (trained / "run", tmp_path / "tuned"))
    assert after.tag_tokenizer.get_vocab() == before.tag_tokenizer.get_vocab()
    known = {*before.label_vocabulary} if keep_vocabulary else set()
    assert set(after.label_vocabulary) == {"gelb", "黄色"} | known
    old, new = (OPTSGForTagGeneration.from_pretrained(f).state_dict() for f in (trained / "run", tmp_path / "tuned"))
    for tower in ("vision_tower", "text_tower"):
        assert any(not torch.equal(old[n], new[n]) for n in old if tower in n and "running" not in n)


def test_only_the_upper_text_layers_learn_and_have_dropout(
    train, folder, settings, tower_configs, text_tokenizer, monkeypatch, tmp_path
):
    config = copy.deepcopy(tower_configs["bert"])
    config.num_hidden_layers = 2
    tower = BertModel(config)
    tower.save_pretrained(tmp_path / "text")
    text_tokenizer.save_pretrained(tmp_path / "text")
    modes, forward = set(), BertModel.forward

    def record(self, *args, **kwargs):
        if torch.is_grad_enabled():
            modes.update((name, module.training) for name, module in self.named_modules())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertModel, "forward", record)
    more = {"text_tower": tmp_path / "text", "train_text_layers": 1, "num_train_epochs": 2, "eval_steps": 100}
    more |= {"train_batch_size": 8, "tower_learning_rate": 1e-2, "config_overrides": json.dumps(SMALL)}
    train(folder, tmp_path / "run", tmp_path / "cache", **settings | more)
    trained = OPTSGForTagGeneration.from_pretrained(tmp_path / "run").model.text_tower.state_dict()
    changed = {name for name, tensor in tower.state_dict().items() if not torch.equal(trained[name], tensor)}
    learned = {name for name in trained if "layer.1." in name}
    # Biases of keys have no gradient: the softmax of attention does not depend on them.
    assert learned - {"encoder.layer.1.attention.self.key.bias"} <= changed <= learned
    for name in ("embeddings.dropout", "encoder.layer.0", "encoder.layer.0.output.dropout"):
        assert (name, False) in modes and (name, True) not in modes, f"{name} is frozen"
    for name in ("encoder.layer.1", "encoder.layer.1.output.dropout"):
        assert (name, True) in modes and (name, False) not in modes, f"{name} is trained"


def test_an_unreadable_image_does_not_end_the_training_of_a_vision_tower(train, settings, tmp_path):
    (tmp_path / "data").mkdir()
    write_colour_folder(tmp_path / "data")
    (tmp_path / "data/train/5.png").write_bytes(b"not an image")
    more = {"train_vision_tower": True, "max_unreadable": 1, "num_train_epochs": 1, "eval_steps": 100}
    more |= {"train_batch_size": 8, "config_overrides": json.dumps(SMALL)}
    train(tmp_path / "data", tmp_path / "run", tmp_path / "cache", **settings | more)
    assert json.loads((tmp_path / "run/training_summary.json").read_text())["history"]


def test_a_finished_run_is_not_trained_again(train, trained, folder, settings, caplog, monkeypatch):
    monkeypatch.setattr(OPTSGTrainer, "_train", lambda *a: pytest.fail("it was trained again"))
    before = (trained / "run/state/status.json").read_text()
    more = first_run(trained, settings)
    with caplog.at_level("INFO"):
        train(folder, trained / "run", trained / "cache", **more, logging_steps=7)
    assert "is finished" in caplog.text
    with pytest.raises(
        ValueError, match=r"train_batch_size 8 \(now 4\).*another output_dir, or --resume_from_checkpoint never"
    ):
        train(folder, trained / "run", trained / "cache", **more, train_batch_size=4)
    assert (trained / "run/state/status.json").read_text() == before


def test_fp16_is_refused_on_a_cpu(train, folder, tmp_path):
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            train(folder, tmp_path / "run", tmp_path, mixed_precision="fp16")
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ({"report_to": "aim"}, "--report_to aim: not installed"),
        ({"metric_for_best_model": "common_f1"}, "no evaluated tag is common. Use full_f1 or micro_f1"),
        ({"checkpoint": "TOWER"}, "is not a checkpoint of op-tsg: its config.json has model_type='bert', not 'optsg'"),
    ],
)
def test_errors_are_reported_before_the_towers_run(train, folder, settings, tmp_path, more, message):
    more = {key: settings["text_tower"] if value == "TOWER" else value for key, value in more.items()}
    with pytest.raises(ValueError, match=message):
        train(folder, tmp_path / "run", tmp_path / "cache", **settings, **more)
    assert not list((tmp_path / "cache").rglob("towers-*"))
    assert json.loads((tmp_path / "run/state/status.json").read_text())["status"] == "failed"


def test_the_model_card_repeats_the_metrics_of_score(trained, folder):
    results = trained / "results.json"
    command = [sys.executable, ROOT / "examples/score.py", "--checkpoint", trained / "run", "--dataset", folder]
    command += ["--output", results, "--cache_dir", trained / "cache"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    scores = json.loads(results.read_text())
    assert {"parallel", "sequential"} == set(scores["test"])
    assert {"full_f1", "micro_f1", "tags_per_example", "reliability"} <= set(scores["test"]["parallel"])
    assert {"image", "title", "image+title"} == set(scores["modalities"])
    assert scores["modalities"]["image+title"]["full_f1"] == scores["test"]["parallel"]["full_f1"]
    write_model_card(
        trained / "run", results, name="tiny", dataset_name="folder", train_command="train", score_command="score"
    )
    card = ModelCard.load(trained / "run/README.md")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    # None of the few tags is common.
    assert scores["test"]["parallel"]["common_f1"] is None and "| – |" in card.text and "nan" not in card.text.lower()
    assert metrics == {name: scores["test"]["parallel"][name] for name in ("full_f1", "rare_f1", "micro_f1")}
    assert "On the test split, the model" in card.text
    # As `optsg evaluate` writes it without a test split.
    results.write_text(json.dumps(scores | {"split": "validation", "validation": scores.pop("test")}))
    write_model_card(trained / "run", results, name="tiny", dataset_name="folder", train_command="train")
    card = ModelCard.load(trained / "run/README.md")
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert "On the validation split, the model" in card.text and "expect lower metrics" in card.text


def test_without_scores_the_card_has_the_validation_metrics(trained):
    write_model_card(trained / "run", name="org/tiny", dataset_name="folder", train_command="the training command")
    card = ModelCard.load(trained / "run/README.md")
    summary = json.loads((trained / "run/training_summary.json").read_text())
    expected = summary["fits"]["parallel"]["validation"]
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert metrics["micro_f1"] == expected["micro_f1"] and metrics["full_f1"] == expected["full_f1"]
    assert card.data.model_name == "tiny" and card.data.license is None
    assert 'model="org/tiny"' in card.text and "the training command" in card.text


def test_one_pass_fits_every_pad_bias_like_many_passes(trained, folder, monkeypatch):
    model = OPTSGForTagGeneration.from_pretrained(trained / "run").eval()
    # With a tag classifier there is only one pass anyway.
    model.tag_classifier = model.generation_config.fusion_weights = model.generation_config.num_candidates = None
    processor = OPTSGProcessor.from_pretrained(trained / "run")
    validation = load_tagging_dataset(str(folder), cache_dir=str(trained / "cache"))["validation"]
    evaluator = TagEvaluator(validation["tags"], processor.label_vocabulary)
    grid = {"pad_bias": (50.0, 0.0, -1.0), "num_beams": (2, 3)}
    # With this metric, the threshold is 0.
    fit = {"decoding": "parallel", "grid": grid, "batch_size": 3, "metric_for_best_model": "tags_per_example"}
    one_pass = fit_generation_config(model, processor, validation, evaluator, **fit)
    monkeypatch.setattr(OPTSGForTagGeneration, "independent_decodings", ())
    many_passes = fit_generation_config(model, processor, validation, evaluator, **fit)

    found, expected = ({json.dumps(row, sort_keys=True) for row in fit["tried"]} for fit in (one_pass, many_passes))
    assert found == expected and len(found) == 6
    assert len({row["validation"]["tags_per_example"] for row in one_pass["tried"]}) > 1


def test_gradient_checkpointing_gives_the_same_gradients(make_model, tiny_processor):
    batch = tiny_processor(
        images=[Image.new("RGB", (32, 32), "red")] * 2, titles=["a red square"] * 2, tags=[["red"], ["blue"]]
    )
    gradients = []
    for checkpointing in (False, True):
        model = make_model(dropout=0.0, attention_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(**batch, decoding="parallel").loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)
