r"""Fits trained systems to one operating point and scores them there.

    python examples/operating_point.py --runs runs/recipe/op-tsg-1.0-seed0 runs/recipe/asy-1.0-seed0 \
        --objective "full_f1@micro_f1>=52" --output results/icon_tagging/recipe/operating_point.json

Full and Rare F1 are bought with micro F1, at another rate by each system: fitted for a mean of the two, systems end
at different points of their curves, and one figure of them alone says little. Here each has the settings with the
best Full F1 on validation items among those that keep micro F1 above the same floor; checkpoints stay as they are. A
system that weighs slots against the item as a whole is fitted with each of the two alone as well.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from score import environment, novel_hits

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGProcessor, TagEvaluator
from modeling_optsg.baselines.registry import SYSTEMS
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.evaluation.metrics import objective_value
from modeling_optsg.evaluation.prediction import predict_tags

FIGURES = ("full_f1", "rare_f1", "common_f1", "micro_f1", "tags_per_item")
# Of what a system with `slot_share` says.
PARTS = {"item alone": 0.0, "slots alone": 1.0}


def best_of(tried: list[dict], setting: str, value: float, objective: str) -> dict | None:
    """The best of the fits that had a setting, `None` where none had."""
    own = [entry for entry in tried if entry.get(setting) == value]
    return max(own, key=lambda entry: objective_value(entry["validation"], objective), default=None)


@torch.no_grad()
def point_of(run: Path, arguments, dataset) -> dict:
    summary = json.loads((run / "training_summary.json").read_text(encoding="utf-8"))
    own = summary["arguments"]
    system = SYSTEMS[own["system"]]
    model = system.model.from_pretrained(run).eval()
    processor = OPTSGProcessor.from_pretrained(run)
    items = {
        split: CachedFeatures(
            cache_tower_features(dataset[split], model.model, processor, arguments.cache_dir / "features")
        )
        for split in ("validation", "test")
    }
    counts = Counter(tag for tags in dataset["train"]["tags"] for tag in set(tags))
    validation, test = (TagEvaluator(dataset[split]["tags"], counts) for split in ("validation", "test"))
    decoding = arguments.decoding if arguments.decoding in system.decodings else system.decodings[0]
    system.set_search(model, own["alternatives"], own["proposals"])
    fit = fit_generation_config(
        model,
        processor,
        items["validation"],
        validation,
        decoding=decoding,
        objective=arguments.objective,
        grid=system.grid(arguments.pad_biases),
    )
    settings = {"decoding": decoding} if decoding else {}
    predictions = predict_tags(model, processor, items["test"], progress=False, **settings)
    scored = test.score(predictions)
    parts = {}
    for part, share in PARTS.items():
        if best := best_of(fit["tried"], "slot_share", share, arguments.objective):
            chosen = {name: best[name] for name in ("score_weights", "logit_adjustment", "threshold")}
            alone = predict_tags(model, processor, items["test"], progress=False, **settings, **chosen)
            if not share:
                # Novel tags are the slots' alone.
                alone = [[tag for tag in tags if not tag["novel"]] for tags in alone]
            figures = test.score(alone)
            parts[part] = {
                "settings": chosen,
                "validation": {name: best["validation"][name] for name in FIGURES},
                "test": {name: figures[name] for name in FIGURES},
            }
    return {
        "system": own["system"],
        "seed": own["seed"],
        "epochs": own["epochs"],
        "decoding": decoding,
        "settings": {name: value for name, value in fit.items() if name not in ("tried", "validation")},
        "validation": {name: fit["validation"][name] for name in FIGURES},
        "test": {name: scored[name] for name in FIGURES},
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
