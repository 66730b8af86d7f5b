"""The checkpoint in the repository: its files, its card, and its tags for the sample images."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, pipeline

from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor, TagGenerationPipeline
from modeling_optsg.hub.model_card import METRICS
from optsg import main

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
RESULTS = ROOT / "results/icon_tagging/optsg-icon-small.json"


@pytest.fixture(scope="module")
def scores():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_it_has_one_weight_file_no_code_and_at_most_75_mb():
    assert [path.name for path in CHECKPOINT.glob("*.safetensors")] == ["model.safetensors"]
    assert not [*CHECKPOINT.rglob("*.py"), *CHECKPOINT.glob("requirements.txt")]
    for path in CHECKPOINT.rglob("*config.json"):
        assert not {"auto_map", "custom_pipelines"} & json.loads(path.read_text(encoding="utf-8")).keys()
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 75_000_000


def test_auto_classes_and_pipeline_load_it_without_remote_code():
    assert type(AutoConfig.from_pretrained(CHECKPOINT)) is OPTSGConfig
    assert type(AutoModel.from_pretrained(CHECKPOINT)) is OPTSGForTagGeneration
    assert type(AutoProcessor.from_pretrained(CHECKPOINT)) is OPTSGProcessor
    titles = ["a red bus"]
    tokenizer = OPTSGProcessor.from_pretrained(CHECKPOINT).tokenizer
    assert AutoTokenizer.from_pretrained(CHECKPOINT)(titles)["input_ids"] == tokenizer(titles)["input_ids"]
    assert type(pipeline("tag-generation", model=CHECKPOINT)) is TagGenerationPipeline


def test_its_half_precision_weights_load_in_single_precision():
    model = OPTSGForTagGeneration.from_pretrained(CHECKPOINT)
    assert model.dtype == torch.float32
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        stored = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    # Normalisation statistics exceed the range of half precision.
    assert {dtype for name, dtype in stored.items() if "running_" in name} == {"F32"}
    assert {dtype for name, dtype in stored.items() if name.endswith("weight")} <= {"F16", "F8_E4M3"}


def strict_card():
    """Return the card's metadata and text; repeated keys and unknown types are errors."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"repeated: {keys}"
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    _, metadata, text = (CHECKPOINT / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.load(metadata, Strict), text


def test_its_card_parses_strictly_and_survives_the_hubs_classes():
    metadata, text = strict_card()
    assert text.startswith("\n# optsg-icon-small\n") and "{{" not in text and "{%" not in text
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert yaml.safe_load(card.data.to_yaml()) == metadata
    results = model_index_to_eval_results(metadata["model-index"])
    assert eval_results_to_model_index(*results) == metadata["model-index"]
    assert metadata["pipeline_tag"] == "image-classification" and metadata["library_name"] == "transformers"
    assert "tag-generation" in metadata["tags"] and metadata["metrics"] == ["f1"]
    assert (metadata["license"], metadata["language"], metadata["datasets"]) == ("apache-2.0", "en", ["icon-tagging"])


def test_its_card_repeats_the_result_file(scores):
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        name: scores["test"]["parallel"][name] for name in ("full_f1", "rare_f1", "common_f1", "micro_f1")
    }
    _, text = strict_card()
    for decoding in ("parallel", "sequential"):
        metrics = " | ".join(str(scores["test"][decoding][name]) for name in METRICS)
        assert f"| {decoding} | {metrics} |" in text


def test_its_widget_shows_the_tags_of_the_pipeline():
    metadata, _ = strict_card()
    tagger = pipeline("tag-generation", model=CHECKPOINT)
    assert len(metadata["widget"]) >= 3
    for example in metadata["widget"]:
        tags = tagger(CHECKPOINT / example["src"], top_k=5)
        assert [tag["label"] for tag in tags] == [tag["label"] for tag in example["output"]]
        scores = [tag["score"] for tag in example["output"]]
        assert [tag["score"] for tag in tags] == pytest.approx(scores, abs=2e-4)


def test_its_generation_settings_are_those_fitted_in_training():
    summary = json.loads((CHECKPOINT / "training_summary.json").read_text(encoding="utf-8"))
    settings = OPTSGForTagGeneration.from_pretrained(CHECKPOINT).generation_config
    for decoding, fit in summary["fits"].items():
        assert (settings.pad_bias[decoding], settings.threshold[decoding]) == (fit["pad_bias"], fit["threshold"])


def test_it_tags_the_sample_images_and_the_video(capsys):
    assert main(["tag", "--model", str(CHECKPOINT), "--json", str(ROOT / "examples/images")]) == 0
    rows = {Path(row["file"]).name: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert len(rows) == 7
    tags = {name: [tag["tag"] for tag in row["tags"]] for name, row in rows.items()}
    assert all(tags.values())
    assert "vehicle" in tags["bus.png"] or "transportation" in tags["bus.png"]


def test_most_repeated_training_tags_are_a_single_token():
    processor = OPTSGProcessor.from_pretrained(CHECKPOINT)
    tags = [tag for tag, count in processor.label_vocabulary.items() if count > 1]
    ids = processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert sum(len(tokens) == 1 for tokens in ids) > 0.6 * len(tags)
