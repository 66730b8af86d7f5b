"""Half precision: all models in float16 and bfloat16, loaded, cast, saved and used by the programs."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, Trainer, TrainingArguments, pipeline

from modeling_optsg import OPTSGDataCollator, OPTSGForTagGeneration, OPTSGProcessor, predict_tags
from modeling_optsg.baselines.registry import MODEL_TYPES
from optsg import main

DTYPES = (torch.float16, torch.bfloat16)
CHECKPOINT = "checkpoints/optsg-icon-small"
STATISTICS = ("standardizer.", "image_scaling.", "log_counts", "running_mean", "running_var")


@pytest.fixture(scope="module")
def examples():
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    rows = zip([*images, None], ["red", "a dog", None, "blue"], [["red"], ["blue", "red"], ["e-mail"], ["blue"]])
    return [{"image": image, "title": title, "tags": tags} for image, title, tags in rows]


@pytest.fixture(scope="module")
def batch(tiny_processor, examples):
    return OPTSGDataCollator(tiny_processor)(examples)


@pytest.fixture(scope="module")
def make(tower_configs, tiny_processor):
    """Makes a model of any type, with its classes or training examples."""

    def make(name, vision="efficientnet_lite"):
        spec = MODEL_TYPES[name]
        has_classes = name not in ("sequence", "open-book")
        tags = list(tiny_processor.label_vocabulary)
        settings = {
            "vision_config": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
            if vision == "resnet"
            else tower_configs[vision],
            "text_config": tower_configs["bert"],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_prompts": 4,
            "max_tag_tokens": 8,
            "alignment_size": 16,
            "tag_vocab_size": len(tiny_processor.tag_tokenizer),
            "num_tag_classes": len(tags) if has_classes else 0,
        }
        torch.manual_seed(0)
        model = spec.model(spec.model.config_class(**copy.deepcopy(settings | dict(spec.config))))
        if has_classes:
            ids = tiny_processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"]
            model.set_label_vocabulary(ids, list(tiny_processor.label_vocabulary.values()))
        if name == "knn":
            model.fit(torch.randn(3, model.config.image_feature_size), torch.randn(3, 16), [[0], [1, 2], [3]])
        return model.eval()

    return make


def inputs_of(batch):
    return {name: batch[name] for name in ("pixel_values", "frame_mask", "input_ids", "attention_mask")}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_every_model_runs_in_half_precision(make, batch, name, dtype, tmp_path):
    """Inputs in 32 bits, as the processor makes them, and tower features of any type."""
    model, half = make(name), make(name).to(dtype)
    inputs = inputs_of(batch)
    vision = model.model.encode_frames(inputs["pixel_values"], inputs["frame_mask"])
    titles = model.model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    masks = {name: inputs[name] for name in ("frame_mask", "attention_mask")}
    for cast in (torch.float32, torch.float16):
        features = [values.to(cast) for values in (vision.frame_features, vision.image_features, titles)]
        features = dict(zip(("frame_features", "image_features", "title_features"), features))
        expected, found = (own.generate(**features, **masks).tag_scores for own in (model, half))
        assert found[:, 0].tolist() == pytest.approx(expected[:, 0].tolist(), rel=0.1, abs=0.05)
    expected, found = (own.generate(**inputs).tag_scores for own in (model, half))
    assert found[:, 0].tolist() == pytest.approx(expected[:, 0].tolist(), rel=0.1, abs=0.05)
    half.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    torch.testing.assert_close(loaded.generate(**inputs).tag_scores, found)
    if name != "knn":
        assert half(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_towers_of_the_library_run_in_half_precision(make, batch, vision):
    model, half = make("op-tsg", vision), make("op-tsg", vision).to(torch.bfloat16)
    assert half(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=0.02)
    assert half.generate(**inputs_of(batch)).tag_scores.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["op-tsg", "knn"])
def test_statistics_keep_32_bits(make, name, dtype, tmp_path):
    model = make(name)
    expected = {key: value for key, value in model.state_dict().items() if any(part in key for part in STATISTICS)}
    for value in expected.values():
        value.add_(torch.rand(value.shape))
    assert any("running_var" in key for key in expected) and any("scal" in key for key in expected)
    model.save_pretrained(tmp_path)
    for half in (type(model).from_pretrained(tmp_path, dtype=dtype), model.to(dtype)):
        state = half.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
        assert half.dtype == dtype and state["model.text_tower.embeddings.word_embeddings.weight"].dtype == dtype


@torch.no_grad()
def test_a_forward_pass_in_training_mode_runs_in_half_precision(make, batch):
    model = make("op-tsg").to(torch.bfloat16).train()
    assert model(**batch).loss.isfinite()


def test_full_bf16_evaluation_of_trainer(make, tiny_processor, examples, tmp_path):
    settings = {"remove_unused_columns": False, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    losses = []
    for bf16 in (False, True):
        args = TrainingArguments(str(tmp_path), bf16_full_eval=bf16, **settings)
        collator = OPTSGDataCollator(tiny_processor)
        losses.append(Trainer(make("op-tsg"), args, data_collator=collator, eval_dataset=examples).evaluate())
    assert losses[1]["eval_loss"] == pytest.approx(losses[0]["eval_loss"], rel=0.02)


# The shipped checkpoint

IMAGES = [f"examples/images/{name}.png" for name in ("bus", "bird", "tent-tree")]
EXAMPLES = [{"image": image, "title": title} for image, title in zip(IMAGES, ("bus", "bird", "tent tree"))]


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    OPTSGForTagGeneration.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).save_pretrained(folder)
    OPTSGProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    # As a training saves it.
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    del config["custom_pipelines"]
    (folder / "config.json").write_text(json.dumps(config, allow_nan=False))
    return folder


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, "saved"])
def test_half_precision_gives_nearly_the_same_tags(bf16_checkpoint, source):
    def tags_of(**arguments):
        tagger = pipeline("tag-generation", **arguments)
        return [{tag["label"] for tag in tags} for tags in tagger(copy.deepcopy(EXAMPLES), batch_size=3)]

    expected = tags_of(model=CHECKPOINT)
    found = tags_of(model=str(bf16_checkpoint)) if source == "saved" else tags_of(model=CHECKPOINT, dtype=source)
    for own, wanted in zip(found, expected):
        assert len(own & wanted) >= 0.8 * len(own | wanted)


def test_the_programs_read_a_bf16_checkpoint(bf16_checkpoint, tmp_path, capsys):
    assert main(["tag", "--model", str(bf16_checkpoint), "--json", IMAGES[0]]) == 0
    assert '"vehicle"' in capsys.readouterr().out
    processor = OPTSGProcessor.from_pretrained(bf16_checkpoint)
    model = OPTSGForTagGeneration.from_pretrained(bf16_checkpoint)
    assert predict_tags(model, processor, EXAMPLES, progress=False)[0][0]["tag"] == "bus"
    (tmp_path / "data/test").mkdir(parents=True)
    rows = []
    for image, example in zip(IMAGES, EXAMPLES):
        Image.open(image).save(tmp_path / f"data/test/{example['title']}.png")
        rows.append({"file_name": f"{example['title']}.png", "title": example["title"], "tags": ["bus", "bird"]})
    metadata = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    (tmp_path / "data/test/metadata.jsonl").write_text(metadata)
    arguments = ["evaluate", tmp_path / "data", "--model", bf16_checkpoint, "--output", tmp_path / "scores.json"]
    arguments += ["--cache-dir", tmp_path / "features", "--dataset-dir", tmp_path / "hf"]
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
