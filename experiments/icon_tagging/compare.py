r"""Trains, scores and times every system of the paper on one benchmark, at one configuration.

    python examples/compare.py --config examples/configs/optsg-icon-small.json --work_dir runs/compare

Each training leaves a checkpoint in `--work_dir` and its metrics in `results/<benchmark>/runs/`. What is there already
is not done again, so the whole can be gathered over several sittings: an interrupted training begins anew, everything
finished stays. Then all systems are timed in turn, and `comparison.json`, its table, its images and the page of
side-by-side examples are written. All settings are fitted on the validation split when a system is trained; the test
split is only scored.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from compare_page import write_page
from compare_plots import write_images
from score import MODALITIES, environment, novel_hits

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGDataCollator, OPTSGProcessor, TagEvaluator
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.baselines.retrieval import ExamplesWithBook, TagBook
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.metrics import tag_gain
from modeling_optsg.evaluation.prediction import predict_tags

# The rows of the comparison: name -> system and decoding.
ROWS = {
    "op-tsg-parallel": ("op-tsg", "parallel"),
    "op-tsg-sequential": ("op-tsg", "sequential"),
    "model-f": ("model-f", "parallel"),
    "model-g": ("model-g", None),
    "asy": ("asy", None),
    "open-book": ("open-book", None),
    "sequence": ("sequence", None),
    "knn": ("knn", None),
}
BY_MODALITY = ("op-tsg-parallel", "asy", "knn")
# Training counts at which a new group of tags begins.
FREQUENCIES = (1, 2, 3, 5, 10, 25, 50, 100)
AVERAGED = ("full_f1", "rare_f1", "common_f1", "micro_f1", "example_f1", "tag_gain", "tags_per_example")
PER_RUN = ("system", "seed")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="arguments of examples/train.py for every system")
    parser.add_argument("--work_dir", type=Path, required=True, help="where checkpoints are kept, or already lie")
    parser.add_argument("--systems", nargs="+", choices=sorted(MODEL_TYPES), default=sorted(MODEL_TYPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results_dir", type=Path, help="results/<benchmark> unless given")
    parser.add_argument("--dataset_dir")
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser())
    parser.add_argument("--batch_size", type=int, default=64, help="of scoring; timing is at 8")
    parser.add_argument("--timing_rounds", type=int, default=5)
    parser.add_argument("--timing_batches", type=int, default=8)
    parser.add_argument("--skip_training", action="store_true", help="score and gather what is there")
    parser.add_argument("--skip_timing", action="store_true", help="keep the timings there are")
    arguments = parser.parse_args(argv)
    dataset = json.loads(arguments.config.read_text(encoding="utf-8")).get("dataset", "icon_tagging")
    arguments.dataset = dataset
    arguments.results_dir = arguments.results_dir or Path("results") / Path(dataset).name
    return arguments


def checkpoint_folder(arguments, system: str, seed: int) -> Path:
    return arguments.work_dir / f"{system}-seed{seed}"


def train(arguments, system: str, seed: int) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", str(Path(__file__).with_name("train.py"))]
    command += ["--config", arguments.config, "--model_type", system, "--seed", seed]
    command += ["--output_dir", checkpoint_folder(arguments, system, seed), "--cache_dir", arguments.cache_dir]
    command += ["--dataset_dir", arguments.dataset_dir] if arguments.dataset_dir else []
    subprocess.run(list(map(str, command)), check=True)


class Benchmark:
    """The splits of a benchmark and the tower features of its test examples."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.splits = load_tagging_dataset(arguments.dataset, cache_dir=arguments.dataset_dir)
        if "test" not in self.splits:
            raise ValueError(f"{arguments.dataset} has no test split to score systems on.")
        self.test = self.splits["test"]
        self.references = self.test["tags"]
        self.train_counts = Counter(tag for tags in self.splits["train"]["tags"] for tag in set(tags))
        self.evaluator = TagEvaluator(self.references, self.train_counts)

    def examples(self, model, processor, book: TagBook | None):
        examples = CachedFeatures(
            cache_tower_features(self.test, model.model, processor, self.arguments.cache_dir / "features")
        )
        return examples if book is None else ExamplesWithBook(examples, book, model.config)


def load(folder: Path):
    """A trained system: its summary, model, processor and book."""
    summary = json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))
    model = MODEL_TYPES[summary["arguments"].get("system", "op-tsg")].model.from_pretrained(folder)
    book = TagBook.load(folder / "book") if (folder / "book").exists() else None
    return summary, model, OPTSGProcessor.from_pretrained(folder), book


def score(arguments, benchmark: Benchmark, system: str, seed: int) -> None:
    """Scores one trained system on the test split and writes its JSON and its predictions."""
    summary, model, processor, book = load(checkpoint_folder(arguments, system, seed))
    examples = benchmark.items(model, processor, book)
    run = {"model_type": system, "seed": seed} | {
        name: summary[name] for name in ("arguments", "parameters", "trained_parameters", "training_seconds", "fits")
    }
    run |= {"rows": {}, "modalities": {}}
    written = {}
    for row, (name, decoding) in ROWS.items():
        if name != system:
            continue
        settings = {"batch_size": arguments.batch_size} | ({"decoding": decoding} if decoding else {})
        predictions = predict_tags(model, processor, examples, **settings)
        tags = [[p["tag"] for p in tags] for tags in predictions]
        gain = tag_gain(tags, benchmark.references, benchmark.train_counts)
        metrics = benchmark.evaluator.score(predictions) | benchmark.evaluator.at_k(predictions)
        metrics |= {"tag_gain": gain["tag_gain"], "novel": novel_hits(predictions, benchmark.references)}
        run["rows"][row] = metrics | {
            "by_frequency": benchmark.evaluator.by_frequency(predictions, FREQUENCIES),
        }
        written[row] = [[[p["tag"], round(p["score"], 4)] for p in tags] for tags in predictions]
        if row in BY_MODALITY:
            run["modalities"][row] = {
                name: benchmark.evaluator.score(
                    predict_tags(model, processor, examples, modalities=modalities, **settings)
                )
                for name, modalities in MODALITIES.items()
            }
        print(f"{row}, seed {seed}: {json.dumps({name: run['rows'][row][name] for name in AVERAGED})}", flush=True)
    if book is not None:
        run["copy_gate"] = copy_gate(model, processor, examples, arguments.batch_size)
    run |= environment()
    path = run_path(arguments, system, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(predictions_path(path), "wb", mtime=0) as file:
        file.write(json.dumps({"ids": benchmark.test["id"][:], "rows": written}, ensure_ascii=False).encode())
    # Last: what is there counts as done.
    path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def copy_gate(model, processor, examples, batch_size: int) -> float:
    """The mean over examples of the share of each written token's probability that is copied from the book."""
    collate = OPTSGDataCollator(processor, max_book_tokens=model.config.max_book_tokens)
    gates = []
    for start in range(0, len(examples), batch_size):
        rows = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        names = ("frame_features", "title_features", "book_tags")
        batch = collate([{name: row[name] for name in names} for row in rows])
        gates += model.generate(**batch).copy_gate.tolist()
    return round(statistics.fmean(gates), 4)


def run_path(arguments, system: str, seed: int) -> Path:
    return arguments.results_dir / "runs" / f"{system}-seed{seed}.json"


def predictions_path(path: Path) -> Path:
    return path.with_suffix(".predictions.json.gz")


@torch.no_grad()
def time_systems(arguments, benchmark: Benchmark, seed: int) -> dict:
    """Seconds an example of every trained system at batches of 8, as the supplement's section 4 measures them: systems
    take turns batch by batch, so that whatever else slows the machine slows them alike. Opening and scaling images
    and splitting titles into tokens are the same for all and stay outside; with towers, the towers' work is in."""
    systems = [
        name for name in MODEL_TYPES if (checkpoint_folder(arguments, name, seed) / "training_summary.json").exists()
    ]
    loaded = {name: load(checkpoint_folder(arguments, name, seed))[1:] for name in systems}
    batches_of_eight = min(arguments.timing_batches, len(benchmark.test) // 8)
    if not batches_of_eight:
        raise ValueError(f"{len(benchmark.test)} test examples are too few to time batches of 8; give --skip_timing.")
    calls, seconds = {}, {}
    for row, (name, decoding) in ROWS.items():
        if name in loaded:
            model, processor, book = loaded[name]
            examples = benchmark.items(model, processor, book)
            for with_towers in (True, False):
                calls[row, with_towers] = [
                    timed_call(benchmark, model, processor, book, examples, batch, decoding, with_towers)
                    for batch in range(batches_of_eight)
                ]
    for round_number in range(arguments.timing_rounds + 1):
        for batch in range(batches_of_eight if round_number else 1):
            for key, batches in calls.items():
                started = time.perf_counter()
                batches[batch]()
                # The first round warms up.
                if round_number:
                    seconds.setdefault(key, []).append((time.perf_counter() - started) / 8)
    metrics = {}
    for (row, with_towers), values in seconds.items():
        name = "seconds_per_example" if with_towers else "seconds_per_example_without_towers"
        metrics.setdefault(row, {})[name] = round(statistics.median(values), 5)
    return {
        "seed": seed,
        "batch_size": 8,
        "batches": batches_of_eight,
        "rounds": arguments.timing_rounds,
        "rows": metrics,
    } | environment()


def timed_call(benchmark, model, processor, book, examples, batch, decoding, with_towers):
    rows = range(batch * 8, batch * 8 + 8)
    settings = {"decoding": decoding} if decoding else {}
    if with_towers:
        column = "image" if "image" in benchmark.test.column_names else "video"
        shown = benchmark.test.select(rows)
        inputs = processor(**{f"{column}s": shown[column][:]}, titles=shown["title"][:])
        if book is None:
            return lambda: model.generate(**inputs, **settings)
        return lambda: model.generate(**book.open(model, processor, **inputs))
    names = ("frame_features", "title_features", "book_tags")
    collate = OPTSGDataCollator(processor, max_book_tokens=getattr(model.config, "max_book_tokens", None))
    inputs = collate([{name: row[name] for name in names if name in row} for row in map(examples.__getitem__, rows)])
    return lambda: model.generate(**inputs, **settings)


def gather(arguments, timing: dict) -> dict:
    """What all runs have found, put together."""
    runs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(run_path(arguments, "x", 0).parent.glob("*.json"))
    ]
    check_one_configuration(runs)
    systems, modalities = {}, {}
    for row, (system, _) in ROWS.items():
        own = sorted((run for run in runs if run["model_type"] == system), key=lambda run: run["seed"])
        if not own:
            continue
        entry = {name: round(statistics.fmean(run["rows"][row][name] for run in own), 2) for name in AVERAGED}
        entry |= {
            "seeds": [run["seed"] for run in own],
            "by_seed": {name: [run["rows"][row][name] for run in own] for name in AVERAGED[:4]},
            "novel": {
                name: round(statistics.fmean(run["rows"][row]["novel"][name] for run in own), 1)
                for name in ("written", "exact_hits")
            },
            "by_frequency": [
                {
                    **group,
                    "f1": round(statistics.fmean(run["rows"][row]["by_frequency"][place]["f1"] for run in own), 2),
                }
                for place, group in enumerate(own[0]["rows"][row]["by_frequency"])
            ],
            "training_seconds": round(statistics.fmean(run["training_seconds"] for run in own)),
            "parameters": own[0]["parameters"],
            "trained_parameters": own[0]["trained_parameters"],
        }
        written = entry["novel"]["written"]
        entry["novel"]["exact_hit_ratio"] = round(100 * entry["novel"]["exact_hits"] / written, 2) if written else 0.0
        if gates := [run["copy_gate"] for run in own if "copy_gate" in run]:
            entry["copy_gate"] = round(statistics.fmean(gates), 4)
        systems[row] = entry | timing.get("rows", {}).get(row, {})
        if row in BY_MODALITY:
            modalities[row] = {
                which: {
                    name: round(statistics.fmean(run["modalities"][row][which][name] for run in own), 2)
                    for name in AVERAGED[:4]
                }
                for which in MODALITIES
            }
    order = {
        f"{best} above {row}": {
            name: round(systems[best][name] - systems[row][name], 2) for name in ("full_f1", "rare_f1")
        }
        for best in ("op-tsg-parallel", "op-tsg-sequential")
        for row in systems
        if best in systems and not row.startswith("op-tsg")
    }
    shared = {name: value for name, value in runs[0]["arguments"].items() if name not in PER_RUN}
    return {
        "dataset": arguments.dataset,
        "configuration": shared,
        "systems": systems,
        "order": order,
        "modalities": modalities,
        "timing": {name: value for name, value in timing.items() if name != "rows"},
        "missing": sorted(set(ROWS) - set(systems)),
    }


def check_one_configuration(runs: list[dict]) -> None:
    """
    Raises:
        ValueError: there are no runs, or two were trained with different arguments: comparing them means nothing.
    """
    if not runs:
        raise ValueError("There are no runs to compare yet; leave --skip_training out.")
    first = runs[0]
    for run in runs[1:]:
        names = set(first["arguments"]) | set(run["arguments"])
        if other := sorted(n for n in names - set(PER_RUN) if first["arguments"].get(n) != run["arguments"].get(n)):
            raise ValueError(
                f"{run['system']} (seed {run['seed']}) and {first['system']} (seed {first['seed']}) were trained with "
                f"different {', '.join(other)}; remove the run that is not of this configuration."
            )


def markdown_table(comparison: dict) -> str:
    heads = ["", "Full", "Rare", "Common", "Micro", "Tag Gain", "Novel (exact)", "ms an example", "… without towers"]
    heads += ["Training min", "Seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, entry in comparison["systems"].items():
        times = [
            f"{1000 * entry[name]:.1f}" if name in entry else "–"
            for name in ("seconds_per_example", "seconds_per_example_without_towers")
        ]
        novel = f"{entry['novel']['written']:.0f} ({entry['novel']['exact_hits']:.0f})"
        cells = [row, *(f"{entry[name]:.2f}" for name in AVERAGED[:4]), f"{entry['tag_gain']:.2f}", novel, *times]
        cells += [f"{entry['training_seconds'] / 60:.0f}", str(len(entry["seeds"]))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    arguments = parse_arguments(argv)
    benchmark = Benchmark(arguments)
    # All systems with one seed before any with the next: the comparison is complete as early as it can be.
    for seed in arguments.seeds:
        for system in arguments.systems:
            if run_path(arguments, system, seed).exists() or (
                not MODEL_TYPES[system].learns and seed != arguments.seeds[0]
            ):
                continue
            if not (checkpoint_folder(arguments, system, seed) / "training_summary.json").exists():
                if arguments.skip_training:
                    continue
                train(arguments, system, seed)
            score(arguments, benchmark, system, seed)

    timing_path = arguments.results_dir / "timing.json"
    if not arguments.skip_timing:
        timing = time_systems(arguments, benchmark, arguments.seeds[0])
        timing_path.write_text(json.dumps(timing, indent=1) + "\n", encoding="utf-8")
    timing = json.loads(timing_path.read_text(encoding="utf-8")) if timing_path.exists() else {}
    comparison = gather(arguments, timing)
    comparison["command"] = f"python examples/compare.py --config {arguments.config} --work_dir …"
    comparison |= {"examples": len(benchmark.references), "evaluated_tags": len(benchmark.evaluator.evaluated_tags)}
    path = arguments.results_dir / "comparison.json"
    path.write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    table = markdown_table(comparison)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)

    test_counts = Counter(tag for tags in benchmark.references for tag in set(tags))
    write_images(comparison, benchmark.train_counts, test_counts, arguments.results_dir)
    predictions = {}
    for row, (system, _) in ROWS.items():
        runs = [run_path(arguments, system, seed) for seed in arguments.seeds]
        if found := next((run for run in runs if run.exists()), None):
            with gzip.open(predictions_path(found), "rt", encoding="utf-8") as file:
                predictions[row] = json.load(file)["rows"][row]
    write_page(benchmark.test, predictions, benchmark.splits["train"]["tags"], arguments.results_dir / "examples.html")


if __name__ == "__main__":
    main()
