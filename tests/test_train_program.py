"""`examples/train.py`, `examples/score.py` and the model card, end to end on a folder of images drawn here."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.hub import write_model_card
from modeling_optsg.training import micro_batches

EXAMPLES = Path(__file__).parents[1] / "examples"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def train(load_program):
    return load_program("train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Plain images: the colour and the half it fills are the tags, one tag is 60 characters long."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        (root / split).mkdir()
        rows = []
        for index in range(count):
            colour, side = list(COLOURS)[index % 4], ("left", "right")[index // 4 % 2]
            image = Image.new("RGB", (48, 48), "black")
            image.paste(COLOURS[colour], (0, 0, 24, 48) if side == "left" else (24, 0, 48, 48))
            image.save(root / split / f"{index}.png")
            rows.append({"file_name": f"{index}.png", "title": f"a {colour} image", "tags": [colour, side]})
        if split == "train":
            rows[0]["tags"] = rows[0]["tags"] + ["qzxj" * 15]
            rows[1]["tags"] = []
        lines = (json.dumps(row) + "\n" for row in rows)
        (root / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


def arguments(train, folder, output, cache, *more):
    return train.parse_arguments(
        ["--dataset", str(folder), "--output_dir", str(output), "--cache_dir", str(cache), *map(str, more)]
    )


@pytest.fixture(scope="module")
def trained(train, folder, towers, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 4}
    preset = {
        "config_overrides": small,
        "train_batch_size": 8,
        "num_train_epochs": 2,
        "eval_steps": 0.5,
        "learning_rate": 1e-3,
    }
    (root / "preset.json").write_text(json.dumps(preset), encoding="utf-8")
    more = ("--config", root / "preset.json", "--vision_tower", towers / "vision", "--text_tower", towers / "text")
    more += ("--tag_vocab_size", 260, "--max_tag_tokens", 12, "--num_negatives", 3, "--save_half_precision", True)
    train.main(arguments(train, folder, root / "run", root / "cache", *more))
    return root


def test_a_run_leaves_a_checkpoint_with_fitted_settings_a_log_and_a_summary(trained):
    model = OPTSGForTagGeneration.from_pretrained(trained / "run")
    processor = OPTSGProcessor.from_pretrained(trained / "run")
    settings = model.generation_config
    for fitted in (settings.pad_bias, settings.threshold, settings.fusion_weights):
        assert {*fitted} == {"parallel", "sequential"}
    assert settings.num_candidates == 50 and all(len(weights) == 5 for weights in settings.fusion_weights.values())
    # The example as a whole knows the tags that are not too long.
    assert model.config.num_tag_classes == len({"red", "green", "blue", "white", "left", "right"})
    assert set(processor.label_vocabulary) >= {"red", "left"}
    log = [json.loads(line) for line in (trained / "run/training_log.jsonl").read_text().splitlines()]
    sample = log[-1]["sample_predictions"][0]
    assert sample["title"] == "a red image" and sample["tags"] == ["red", "left"]
    assert isinstance(sample["written"], list)
    assert len(log) == 2 and {"generation_loss", "alignment_loss", "examples_per_second", "validation"} <= set(log[0])
    summary = json.loads((trained / "run/training_summary.json").read_text())
    assert summary["examples"] == {"train": 15, "validation": 8}
    fit = summary["fits"]["parallel"]
    assert fit["pad_bias"] == model.generation_config.pad_bias["parallel"]
    assert fit["validation"]["full_f1"] == max(row["validation"]["full_f1"] for row in fit["tried"])


@pytest.mark.parametrize("system", ["asy", "model-f", "model-g", "sequence", "open-book", "knn"])
def test_other_systems_train_by_the_same_loop(train, trained, folder, towers, tmp_path, system):
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 4}
    more = ("--model_type", system, "--config_overrides", json.dumps(small), "--vision_tower", towers / "vision")
    more += ("--text_tower", towers / "text", "--tag_vocab_size", 260, "--max_tag_tokens", 12, "--num_train_epochs", 1)
    more += ("--eval_steps", 0.99, "--num_return_sequences", 2, "--train_batch_size", 8)
    train.main(arguments(train, folder, tmp_path / "run", trained / "cache", *more))
    summary = json.loads((tmp_path / "run/training_summary.json").read_text())
    assert summary["arguments"]["model_type"] == system
    assert all(math.isfinite(row["loss"]) for row in summary["history"]) and bool(summary["history"]) == (
        system != "knn"
    )
    assert "output_dir" not in summary["arguments"]
    fit = summary["fits"].get("only") or summary["fits"]["parallel"]
    assert ("pad_bias" in fit) == (system not in ("asy", "knn"))
    settings = train.MODEL_TYPES[system].model.from_pretrained(tmp_path / "run").generation_config
    saved = json.loads((tmp_path / "run/config.json").read_text())
    if system != "knn":
        assert saved["num_prompts"] == (4 if system.startswith("model") else 1), "a preset's slots are not for all"
    threshold = settings.threshold
    assert (threshold["parallel"] if isinstance(threshold, dict) else threshold) == fit["threshold"]
    assert (tmp_path / "run/book").is_dir() == (system == "open-book")


def test_what_cannot_be_trained_on_is_left_out_and_said(train, trained, caplog):
    processor = OPTSGProcessor.from_pretrained(trained / "run")
    rows = {"tags": [["red", "qzxj" * 15], [], ["left", "right", "red", "blue", "green"]]}
    kept = train.without_untrainable_tags(Dataset.from_dict(rows), processor)
    assert kept["tags"] == [["red"], ["left", "right", "red", "blue", "green"]]
    for said in (
        "1 of 6 training tags are longer",
        "1 of 3 training examples have no tags",
        "more than num_prompts=4",
    ):
        assert said in caplog.text
    with pytest.raises(ValueError, match="No training example has a tag"):
        train.without_untrainable_tags(Dataset.from_dict({"tags": [[], []]}), processor)


def test_a_dataset_without_tags_is_refused(train, trained, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    for path in (tmp_path / "data").rglob("metadata.jsonl"):
        rows = [json.loads(line) | {"tags": []} for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, rows)))
    for more in ([], ["--checkpoint", trained / "run"]):
        with pytest.raises(ValueError, match="data: No training example has a tag; the column `tags` holds"):
            train.main(arguments(train, tmp_path / "data", tmp_path / "run", tmp_path, *more))


def test_half_precision_weights_are_half_on_disk_and_single_in_use(trained):
    with safe_open(trained / "run/model.safetensors", "pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    tables = {"tag_decoder.token_embeddings.weight", "tag_classifier.classifier.class_embeddings.weight"}
    tables.add("model.text_tower.embeddings.word_embeddings.weight")
    assert {dtypes[name] for name in tables} == {"F8_E4M3"}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("weight") and name not in tables} == {"F16"}
    assert all(dtype == "F32" for name, dtype in dtypes.items() if "running_" in name)
    assert OPTSGForTagGeneration.from_pretrained(trained / "run").dtype == torch.float32


def test_frozen_towers_are_not_run_twice(train, trained, folder, towers, monkeypatch, caplog):
    monkeypatch.setattr(
        "modeling_optsg.modeling_optsg.OPTSGModel.encode_frames", lambda *a, **k: pytest.fail("the tower was run")
    )
    more = ("--vision_tower", towers / "vision", "--text_tower", towers / "text", "--tag_vocab_size", 260)
    more += ("--num_train_epochs", 0.1, "--eval_steps", 0.99, "--max_tag_tokens", 12)
    train.main(arguments(train, folder, trained / "again", trained / "cache", *more))
    assert "There are no 64 training examples: a step is 15 of them" in caplog.text


def test_fine_tuning_keeps_the_tokenizer_and_knows_the_tags_of_both(train, trained, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    rows = [{"file_name": f"{i}.png", "title": "", "tags": ["gelb", "黄色"]} for i in range(6)]
    for row in rows:
        Image.new("RGB", (20, 20), "yellow").save(tmp_path / "mine" / row["file_name"])
    lines = (json.dumps(row) + "\n" for row in rows)
    (tmp_path / "mine/metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    more = ("--checkpoint", trained / "run", "--num_train_epochs", 3, "--eval_steps", 0.99, "--train_batch_size", 2)
    more += ("--train_vision_tower", True, "--train_text_tower", True, "--validation_ratio", 0.34)
    train.main(arguments(train, tmp_path / "mine", tmp_path / "tuned", tmp_path / "cache", *more))
    before, after = (OPTSGProcessor.from_pretrained(f) for f in (trained / "run", tmp_path / "tuned"))
    assert after.tag_tokenizer.get_vocab() == before.tag_tokenizer.get_vocab()
    assert {"red", "gelb", "黄色"} <= set(after.label_vocabulary)
    old, new = (OPTSGForTagGeneration.from_pretrained(f).state_dict() for f in (trained / "run", tmp_path / "tuned"))
    for tower in ("vision_tower", "text_tower"):
        assert any(not torch.equal(old[n], new[n]) for n in old if tower in n and "running" not in n)


def test_a_finished_run_is_not_trained_again(train, trained, folder, towers, caplog, monkeypatch):
    more = ("--config", trained / "preset.json", "--vision_tower", towers / "vision", "--text_tower", towers / "text")
    more += ("--tag_vocab_size", 260, "--max_tag_tokens", 12, "--num_negatives", 3, "--save_half_precision", True)
    monkeypatch.setattr(train, "run", lambda *a: pytest.fail("it was begun again"))
    before = (trained / "run/state/status.json").read_text()
    with caplog.at_level("INFO"):
        train.main(arguments(train, folder, trained / "run", trained / "cache", *more, "--logging_steps", 7))
    assert "is finished with these arguments" in caplog.text
    with pytest.raises(
        ValueError, match=r"batch_size 8 \(now 4\).*another output_dir, or --resume_from_checkpoint never"
    ):
        train.main(arguments(train, folder, trained / "run", trained / "cache", *more, "--train_batch_size", 4))
    assert (trained / "run/state/status.json").read_text() == before


def test_fp16_is_refused_where_it_would_be_32_bits(train, folder, tmp_path):
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            train.main(arguments(train, folder, tmp_path / "run", tmp_path, "--mixed_precision", "fp16"))
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "settings, said",
    [
        (("--per_device_train_batch_size", 0), "at least one example at once, not 0"),
        (("--train_batch_size", 0), "A batch of 0 examples cannot be shared by 1 processes"),
        (("--report_to", "aim"), "--report_to aim: not installed"),
        (("--checkpoint", "TOWER"), "is no checkpoint of op-tsg: its config.json has model_type='bert', not 'optsg'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(train, folder, towers, tmp_path, settings, said):
    more = ("--vision_tower", towers / "vision", "--text_tower", towers / "text", "--tag_vocab_size", 260)
    more += ("--max_tag_tokens", 12, *(towers / "text" if given == "TOWER" else given for given in settings))
    with pytest.raises(ValueError, match=said):
        train.main(arguments(train, folder, tmp_path / "run", tmp_path / "cache", *more))
    assert not list((tmp_path / "cache").rglob("towers-*"))
    assert json.loads((tmp_path / "run/state/status.json").read_text())["status"] == "failed"


def test_a_preset_with_an_unknown_argument_is_refused(train, tmp_path, capsys):
    (tmp_path / "preset.json").write_text('{"epoch": 3}')
    with pytest.raises(SystemExit):
        train.parse_arguments(["--output_dir", "x", "--config", str(tmp_path / "preset.json")])
    assert "epoch" in capsys.readouterr().err


def test_the_command_line_overrides_the_preset(train, tmp_path):
    (tmp_path / "preset.json").write_text('{"num_train_epochs": 3, "config_overrides": {"num_prompts": 5}}')
    parsed = train.parse_arguments(
        ["--output_dir", "x", "--config", str(tmp_path / "preset.json"), "--num_train_epochs", "7"]
    )
    assert parsed.epochs == 7 and json.loads(parsed.config) == {"num_prompts": 5}


def test_score_writes_the_metrics_and_the_model_card_repeats_them(trained, folder):
    results = trained / "results.json"
    subprocess.run(
        [sys.executable, EXAMPLES / "score.py", "--checkpoint", trained / "run", "--dataset", folder]
        + ["--output", results, "--cache_dir", trained / "cache"],
        check=True,
        capture_output=True,
        cwd=EXAMPLES.parent,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
    )
    scores = json.loads(results.read_text())
    assert {"parallel", "sequential"} == set(scores["test"])
    assert {"full_f1", "micro_f1", "tags_per_example", "reliability"} <= set(scores["test"]["parallel"])
    assert {"image", "title", "both"} == set(scores["modalities"])
    assert scores["modalities"]["both"]["full_f1"] == scores["test"]["parallel"]["full_f1"]
    write_model_card(
        trained / "run", results, name="tiny", dataset_name="folder", train_command="train", score_command="score"
    )
    card = ModelCard.load(trained / "run/README.md")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    # None of the few tags is common.
    assert math.isnan(metrics.pop("common_f1"))
    assert metrics == {name: scores["test"]["parallel"][name] for name in ("full_f1", "rare_f1", "micro_f1")}


def test_without_a_result_file_the_card_has_the_validation_metrics(trained):
    write_model_card(trained / "run", name="org/tiny", dataset_name="folder", train_command="the command of training")
    card = ModelCard.load(trained / "run/README.md")
    summary = json.loads((trained / "run/training_summary.json").read_text())
    measured = summary["fits"]["parallel"]["validation"]
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert metrics["micro_f1"] == measured["micro_f1"] and metrics["full_f1"] == measured["full_f1"]
    assert card.data.model_name == "tiny" and card.data.license is None
    assert 'model="org/tiny"' in card.text and "the command of training" in card.text
    assert "better than new examples will show" in card.text and "No licence was named" in card.text
    assert (trained / "run/handler.py").exists() and (trained / "run/requirements.txt").exists()


def test_a_fit_in_one_pass_is_the_fit_of_every_pad_bias(train, trained, folder, monkeypatch):
    model = OPTSGForTagGeneration.from_pretrained(trained / "run").eval()
    # With it, thresholds and not biases decide, and there is one pass anyway.
    model.tag_classifier = model.generation_config.fusion_weights = model.generation_config.num_candidates = None
    processor = OPTSGProcessor.from_pretrained(trained / "run")
    validation = load_tagging_dataset(str(folder), cache_dir=str(trained / "cache"))["validation"]
    evaluator = train.TagEvaluator(validation["tags"], processor.label_vocabulary)
    settings = {
        "decoding": "parallel",
        "grid": {"pad_bias": (50.0, 0.0, -1.0), "num_beams": (2, 3)},
        "train_batch_size": 3,
    }
    once = train.fit_generation_config(model, processor, validation, evaluator, **settings)
    monkeypatch.setattr(OPTSGForTagGeneration, "independent_decodings", ())
    again = train.fit_generation_config(model, processor, validation, evaluator, **settings)

    # As text: a figure over no tags is NaN, which equals nothing.
    metrics, expected = ({json.dumps(row, sort_keys=True) for row in fit["tried"]} for fit in (once, again))
    assert metrics == expected and len(metrics) == 6
    assert len({row["validation"]["tags_per_example"] for row in once["tried"]}) > 1


def test_a_stream_without_a_validation_split_sets_the_same_examples_aside(train, folder, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copytree(folder / "train", tmp_path / "data/train")

    def streams(share):
        own = arguments(train, tmp_path / "data", tmp_path, tmp_path, "--streaming", True, "--validation_ratio", share)
        return train.load_streams(own)

    shards, known, validation = streams(0.3)
    ids = [row["id"] for rows in shards for row in rows]
    assert ids == known["id"][:] and len(known["tags"]) == len(ids)
    assert len(validation) and not set(ids) & set(validation["id"]) and len(ids) + len(validation) == 16
    again = streams(0.3)[2]
    assert again["id"][:] == validation["id"][:] and again._fingerprint == validation._fingerprint
    assert again.cache_files and streams(0.6)[2]._fingerprint != again._fingerprint
    assert validation[0]["image"]["path"] or validation[0]["image"]["bytes"]
    with pytest.raises(ValueError, match="no example is left for validation; give a larger --validation_ratio"):
        streams(1e-9)


def test_examples_of_a_stream_of_several_files_need_ids(train, tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(4):
        rows = {"title": [f"t{number}{row}" for row in range(10)], "tags": [[f"{number}-{row}"] for row in range(10)]}
        path = tmp_path / f"data/train-{number:05d}-of-00004.parquet"
        Dataset.from_dict(rows).to_parquet(path)
    own = arguments(train, tmp_path / "data", tmp_path, tmp_path, "--streaming", True, "--validation_ratio", 0.25)
    with pytest.raises(ValueError, match="several files need an `id`"):
        train.load_streams(own)
    # Ids of their own may be numbers.
    for number in range(4):
        path = tmp_path / f"data/train-{number:05d}-of-00004.parquet"
        rows = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "hf"))
        rows.add_column("id", [str(10 * number + row) for row in range(10)]).to_parquet(path)
    shards, known, validation = train.load_streams(own)
    shuffled = {row["id"] for rows in shards for row in rows.shuffle(seed=3, buffer_size=5)}
    assert shuffled == set(known["id"]) and not shuffled & set(validation["id"]) and len(validation)


def test_a_share_of_the_examples_is_the_same_whatever_the_seed(train, folder, tmp_path):
    def examples(share, seed):
        own = arguments(train, folder, tmp_path, tmp_path, "--train_ratio", share, "--seed", seed)
        return train.load_splits(own)[1]["title"][:]

    assert examples(0.25, 0) == examples(0.25, 1) and len(examples(0.25, 0)) == 4
    assert set(examples(0.25, 0)) <= set(examples(1.0, 0)) and len(examples(1.0, 0)) == 16
    for share in (0, 1.5):
        with pytest.raises(SystemExit):
            examples(share, 0)


@pytest.mark.parametrize(
    "preset, epochs, batch_size",
    [
        ("optsg-create-pretrain", 20, 1024),
        ("optsg-create", 30, 512),
        ("optsg-pexel", 20, 512),
        ("optsg-icon-small", 20, 64),
    ],
)
def test_presets_have_the_supplement_s_schedules_and_can_be_built(train, preset, epochs, batch_size):
    path = EXAMPLES / f"presets/{preset}.json"
    given = train.parse_arguments(["--config", str(path), "--output_dir", "run"])
    assert (given.epochs, given.batch_size) == (epochs, batch_size)
    OPTSGConfig(**json.loads(given.config), frame_feature_size=512)
    processes = 16 if "pretrain" in preset else 8
    if batch_size > 64:
        assert micro_batches(given.batch_size, processes, given.per_device_train_batch_size) == 1


def test_configurations_of_accelerate_are_read():
    paths = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
    assert [path.stem for path in paths] == ["ddp_2x8", "ddp_8", "deepspeed_zero2_8", "fsdp_8"]
    for path in paths:
        # It refuses keys that it does not know.
        config = load_config_from_file(str(path))
        assert config.num_processes == (16 if "2x8" in path.stem else 8) and config.mixed_precision == "bf16"
    # Every setting below is one that `accelerate launch` takes.
    known = {action.dest for action in launch_command_parser()._actions}
    for name in ("fsdp_8", "deepspeed_zero2_8"):
        config = load_config_from_file(str(EXAMPLES / f"accelerate/{name}.yaml"))
        assert set(config.fsdp_config) | set(config.deepspeed_config) <= known


def test_layers_computed_anew_give_the_same_gradients(make_model, tiny_processor):
    batch = tiny_processor(
        images=[Image.new("RGB", (32, 32), "red")] * 2, titles=["a red square"] * 2, tags=[["red"], ["blue"]]
    )
    gradients = []
    for anew in (False, True):
        model = make_model(dropout=0.0, attention_dropout=0.0).train()
        if anew:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(**batch, decoding="parallel").loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)
