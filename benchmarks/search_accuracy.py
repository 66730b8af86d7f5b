r"""Compares the tags of the exact search and of the search with a score bound, and of an earlier version.

    git worktree add ../before REVISION
    python -m benchmarks.search_accuracy --before ../before --output results/speed/search_accuracy.json

The shipped checkpoint tags the validation and the test split of icon-tagging, from pixels and titles, with its own
settings. Each search runs in a process of its own. `different_sets` counts examples whose set of tags differs from
that of the exact search, and `largest_score_difference` is over tags that both found. `refitted_threshold` has the
best thresholds on the validation split for the search with the bound, also for images alone and titles alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import disable_progress_bars

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator, predict_tags

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
BEFORE, EXACT, BOUND, LOWER = "before", "exact", "bound", "bound, low threshold"
# `output_slots` needs every hypothesis, so the search is exact.
OPTIONS = {BEFORE: {}, EXACT: {"output_slots": True}, BOUND: {}, LOWER: {"threshold": 0.08}}
# The metric of the shipped checkpoint.
METRIC = "full_f1+micro_f1"
SPLITS = ("validation", "test")
METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")
MODALITIES = {"image+title": ("image", "title"), "image": ("image",), "title": ("title",)}


def tag(search: str, split: str, modality: str, output: Path) -> None:
    """Tag a split and write the tags and scores of each example."""
    torch.set_num_threads(1)
    disable_progress_bars()
    model, processor = OPTSGForTagGeneration.from_pretrained(CHECKPOINT), OPTSGProcessor.from_pretrained(CHECKPOINT)
    examples = load_tagging_dataset("icon_tagging")[split]
    options = OPTIONS[search] | {"batch_size": 32, "modalities": MODALITIES[modality]}
    found = predict_tags(model.eval(), processor, examples, progress=False, **options)
    rows = [{tag["tag"]: tag["score"] for tag in tags} for tags in found]
    output.write_text(json.dumps(rows, allow_nan=False), encoding="utf-8")


def tag_in(tree: Path, search: str, split: str, modality: str = "image+title") -> list[dict[str, float]]:
    """Tag a split with the code in a working tree."""
    # Not above: this file also runs with the packages of an earlier version, which may lack the function.
    from benchmarks.folder_reading import in_tree

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "tags.json")
        command = [sys.executable, __file__, "--search", search, "--split", split, "--modality", modality]
        command += ["--output", str(output)]
        subprocess.run(command, check=True, **in_tree(tree))
        return json.loads(output.read_text(encoding="utf-8"))


def as_predictions(rows: list[dict[str, float]]) -> list[list[dict]]:
    """Return tags and scores as a `TagEvaluator` expects them."""
    return [[{"tag": name, "score": score} for name, score in row.items()] for row in rows]


def compare(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> dict[str, float]:
    """Compare the tags of two searches."""
    pairs = list(zip(rows, expected, strict=True))
    differences = [abs(own[name] - other[name]) for own, other in pairs for name in own.keys() & other.keys()]
    different = sum(own.keys() != other.keys() for own, other in pairs)
    return {
        "different_sets": different,
        "different_sets_percent": round(100 * different / len(pairs), 2),
        "largest_score_difference": float(f"{max(differences):.1e}"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison, or one search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="working tree of the earlier version")
    parser.add_argument("--search", choices=OPTIONS, help="tag --split with this search only")
    parser.add_argument("--split", choices=SPLITS)
    parser.add_argument("--modality", choices=MODALITIES, default="image+title")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.search:
        tag(args.search, args.split, args.modality, args.output)
        return
    results: dict = {}
    counts = OPTSGProcessor.from_pretrained(CHECKPOINT).label_vocabulary
    for split in SPLITS:
        examples = load_tagging_dataset("icon_tagging")[split]
        trees = {BEFORE: args.before, EXACT: ROOT, BOUND: ROOT}
        tags = {search: tag_in(tree.resolve(), search, split) for search, tree in trees.items() if tree}
        results[split] = {"examples": len(examples)}
        evaluator = TagEvaluator(examples["tags"], counts)
        for search, rows in tags.items():
            metrics = evaluator.score(as_predictions(rows))
            results[split][search] = {name: metrics[name] for name in METRICS} | compare(rows, tags[EXACT])
        if split == "validation":
            results[split]["refitted_threshold"] = {
                modality: evaluator.best_threshold(as_predictions(tag_in(ROOT, LOWER, split, modality)), METRIC)[0]
                for modality in MODALITIES
            }
        print(json.dumps(results[split], indent=1, allow_nan=False), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
