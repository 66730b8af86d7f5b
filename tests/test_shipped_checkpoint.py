"""The checkpoint in the repository: its size, what it says about itself, and that it tags the sample pictures."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.cli import main

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
RESULTS = ROOT / "results/icon_tagging/optsg-icon-small.json"


@pytest.fixture(scope="module")
def scores():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_it_is_one_safetensors_file_of_at_most_75_mb_in_all():
    assert [path.name for path in CHECKPOINT.glob("*.safetensors")] == ["model.safetensors"]
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 75_000_000


def test_the_code_beside_the_weights_is_the_package_s_own(tmp_path):
    OPTSGForTagGeneration.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    OPTSGProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    saved, shipped = ({p.name: p.read_text(encoding="utf-8") for p in f.glob("*.py")} for f in (tmp_path, CHECKPOINT))
    assert saved.keys() == shipped.keys()
    for name, code in shipped.items():
        assert code == (ROOT / "modeling_optsg" / name).read_text(encoding="utf-8"), (
            f"run `make code`: {name} is stale"
        )


def test_its_half_precision_weights_are_used_in_single_precision():
    model = OPTSGForTagGeneration.from_pretrained(CHECKPOINT)
    assert model.dtype == torch.float32
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        stored = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    # Normalisation statistics span more than half precision does.
    assert {dtype for name, dtype in stored.items() if "running_" in name} == {"F32"}
    assert {dtype for name, dtype in stored.items() if name.endswith("weight")} <= {"F16", "F8_E4M3"}


def test_its_card_repeats_the_result_file(scores):
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        name: scores["test"]["parallel"][name] for name in ("full_f1", "rare_f1", "common_f1", "micro_f1")
    }


def test_the_readme_repeats_the_result_file(scores):
    rows = re.findall(r"^\| (parallel|sequential|kNN vote) \| (.+) \|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    names = ("full_f1", "rare_f1", "common_f1", "micro_precision", "micro_recall", "micro_f1", "tags_per_item")
    assert {name for name, _ in rows} == {"parallel", "sequential", "kNN vote"}
    for name, figures in rows:
        row = scores["knn"] if name == "kNN vote" else scores["test"][name]
        assert [float(figure) for figure in figures.split(" | ")] == [row[figure] for figure in names]


def test_its_settings_are_those_its_training_fitted():
    summary = json.loads((CHECKPOINT / "training_summary.json").read_text(encoding="utf-8"))
    settings = OPTSGForTagGeneration.from_pretrained(CHECKPOINT).generation_config
    for decoding, fit in summary["fits"].items():
        assert (settings.pad_bias[decoding], settings.threshold[decoding]) == (fit["pad_bias"], fit["threshold"])


def test_it_tags_the_sample_pictures_and_the_clip(capsys):
    assert main(["tag", "--model", str(CHECKPOINT), "--json", str(ROOT / "examples/pictures")]) == 0
    rows = {Path(row["file"]).name: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert len(rows) == 7
    tags = {name: [tag["tag"] for tag in row["tags"]] for name, row in rows.items()}
    assert all(tags.values())
    assert "vehicle" in tags["bus.png"] or "transportation" in tags["bus.png"]


def test_most_training_tags_seen_twice_or_more_are_a_single_token():
    processor = OPTSGProcessor.from_pretrained(CHECKPOINT)
    tags = [tag for tag, count in processor.train_tags.items() if count > 1]
    ids = processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert sum(len(tokens) == 1 for tokens in ids) > 0.6 * len(tags)
