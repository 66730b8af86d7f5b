r"""Fits trained systems to one operating point and scores them there.

    python examples/operating_point.py --runs runs/recipe/op-tsg-1.0-seed0 runs/recipe/asy-1.0-seed0 \
        --objective "full_f1@micro_f1>=52" --output results/icon_tagging/recipe/operating_point.json

Full and Rare F1 are bought with micro F1, at another rate by each system: fitted for a mean of the two, systems end
at different points of their curves, and one figure of them alone says little. Here each has the settings with the
best Full F1 on validation examples among those that keep micro F1 above the same floor; checkpoints stay as they are. A
system that weighs slots against the example as a whole is fitted with each of the two alone as well.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from score import environment, novel_hits

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGProcessor, TagEvaluator
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.evaluation.metrics import metric_value
from modeling_optsg.evaluation.prediction import predict_tags

METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1", "tags_per_example")
# Of what a system with `slot_weight` says.
PARTS = {"classifier alone": 0.0, "slots alone": 1.0}


def best_of(tried: list[dict], setting: str, value: float, objective: str) -> dict | None:
    """The best of the fits that had a setting, `None` where none had."""
    own = [entry for entry in tried if entry.get(setting) == value]
    return max(own, key=lambda entry: metric_value(entry["validation"], objective), default=None)


@torch.no_grad()
def point_of(run: Path, arguments, dataset) -> dict:
    summary = json.loads((run / "training_summary.json").read_text(encoding="utf-8"))
    own = summary["arguments"]
    system = MODEL_TYPES[own["model_type"]]
    model = system.model.from_pretrained(run).eval()
    processor = OPTSGProcessor.from_pretrained(run)
    examples = {
        split: CachedFeatures(
            cache_tower_features(dataset[split], model.model, processor, arguments.cache_dir / "features")
        )
        for split in ("validation", "test")
    }
    counts = Counter(tag for tags in dataset["train"]["tags"] for tag in set(tags))
    validation, test = (TagEvaluator(dataset[split]["tags"], counts) for split in ("validation", "test"))
    decoding = arguments.decoding if arguments.decoding in system.decodings else system.decodings[0]
    system.set_search(model, own["num_return_sequences"], own["num_candidates"])
    fit = fit_generation_config(
        model,
        processor,
        examples["validation"],
        validation,
        decoding=decoding,
        objective=arguments.objective,
        grid=system.grid(arguments.pad_biases),
    )
    settings = {"decoding": decoding} if decoding else {}
    predictions = predict_tags(model, processor, examples["test"], progress=False, **settings)
    scored = test.score(predictions)
    parts = {}
    for part, share in PARTS.items():
        if best := best_of(fit["tried"], "slot_weight", share, arguments.objective):
            chosen = {name: best[name] for name in ("fusion_weights", "logit_adjustment", "threshold")}
            alone = predict_tags(model, processor, examples["test"], progress=False, **settings, **chosen)
            if not share:
                # Novel tags are the slots' alone.
                alone = [[tag for tag in tags if not tag["novel"]] for tags in alone]
            metrics = test.score(alone)
            parts[part] = {
                "settings": chosen,
                "validation": {name: best["validation"][name] for name in METRICS},
                "test": {name: metrics[name] for name in METRICS},
            }
    return {
        "model_type": own["model_type"],
        "seed": own["seed"],
        "num_train_epochs": own["num_train_epochs"],
        "decoding": decoding,
        "settings": {name: value for name, value in fit.items() if name not in ("tried", "validation")},
        "validation": {name: fit["validation"][name] for name in METRICS},
        "test": {name: scored[name] for name in METRICS},
        "novel": novel_hits(predictions, dataset["test"]["tags"]),
        **({"parts": parts} if parts else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of examples/train.py")
    parser.add_argument("--objective", default="full_f1@micro_f1>=52")
    parser.add_argument("--decoding", default="parallel", help="of systems that have several")
    parser.add_argument("--pad_biases", type=float, nargs="+", default=[-4.0])
    parser.add_argument("--dataset", default="icon_tagging")
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser())
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    dataset = load_tagging_dataset(arguments.dataset)
    found = {}
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text(encoding="utf-8"))
        found = before["runs"] if before["objective"] == arguments.objective else {}
    for run in arguments.runs:
        if run.name in found:
            continue
        found[run.name] = point_of(run, arguments, dataset)
        print(run.name, json.dumps(found[run.name]["validation"]), json.dumps(found[run.name]["test"]), flush=True)
        result = {"objective": arguments.objective, "runs": found}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
