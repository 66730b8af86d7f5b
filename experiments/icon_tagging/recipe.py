r"""Trains the runs behind this folder's findings and gathers their metrics, one result file per experiment.

    python -m experiments.icon_tagging.recipe models --seeds 0 1 2 --rows asy op-tsg model-f
    python -m experiments.icon_tagging.recipe models
    python -m experiments.icon_tagging.recipe ladder --seeds 0 1

- `models`: OP-TSG and the other methods of the paper, scored on the test split with settings fitted on the validation
  split. All other models except kNN are trained in a second phase: they load the text tower of ASY and, if they have
  one, its tag classifier.
- `ladder`: the recipe with one thing changed in each row (`recipe_rows.json`), six epochs on a quarter of the training
  examples, compared on the validation split only. Most rows are ASY, the tag classifier without slots. The rows
  `continued` start from the checkpoint of the recipe.

Rows in bf16 are trained in fp32 where bf16 is slow, such as on processors without AVX-512. The commands in the result
files say which precision was used.

Runs that are already in a result file are skipped. Checkpoints that are already in `--work_dir` are not trained again.
When no run is missing, the program only prints the table again.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import torch

from experiments.icon_tagging.operating_point import FUSION_SETTINGS, without_novel_tags
from experiments.icon_tagging.runs import (
    F1_METRICS,
    RESULTS,
    Benchmark,
    Run,
    make_parser,
    mean_metric,
    read_summary,
    train,
    write_result,
)
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.evaluation.reporting import best_fit, environment, novel_hits
from modeling_optsg.training.precision import is_bfloat16_fast

CONFIG = Path("examples/configs/optsg-icon-small.json")
WORK_DIR = Path("runs/recipe")
LADDER = Path(__file__).with_name("recipe_rows.json")
# Takes two thirds of the time of fp32 where it is fast. The row "full-precision" of the ladder shows what it changes.
BF16 = {"mixed_precision": "bf16"}
LADDER_ARGUMENTS = {"model_type": "asy", "train_ratio": 0.25, "num_train_epochs": 6.0} | BF16
# The model whose text tower and classifier the second phase loads, and the arguments of this phase. Both parts are
# frozen, so text features can be cached.
FIRST_PHASE = "asy"
SECOND_PHASE = {"train_text_layers": 0, "num_train_epochs": 10.0}
# The other models are trained in fp32.
BF16_MODELS = {"model-f", "sequence", "open-book"}
METRIC = "full_f1+micro_f1"
# Settings that a fit must have to show what a part is worth by itself.
PARTS = {"slots": {"slot_weight": 1.0}, "classifier": {"slot_weight": 0.0}, "unadjusted": {"logit_adjustment": 0.0}}


def ladder_rows() -> dict[str, dict]:
    """Return the rows of the ladder."""
    rows = json.loads(LADDER.read_text(encoding="utf-8"))
    return {name: row | {"arguments": LADDER_ARGUMENTS | row.get("arguments", {})} for name, row in rows.items()}


def model_rows() -> dict[str, dict]:
    """Return a row for every model type, the first phase first."""
    rows = {}
    for name in sorted(MODEL_TYPES, key=lambda name: name != FIRST_PHASE):
        rows[name] = {"what": name, "arguments": {"model_type": name} | (BF16 if name in BF16_MODELS else {})}
        if name != FIRST_PHASE and MODEL_TYPES[name].is_trained:
            rows[name] |= {"arguments": rows[name]["arguments"] | SECOND_PHASE, "classifier_of": FIRST_PHASE}
    return rows


EXPERIMENTS: dict[str, Callable[[], dict[str, dict]]] = {"models": model_rows, "ladder": ladder_rows}


def in_fp32(arguments: dict) -> dict:
    """Return training arguments with fp32 instead of bf16."""
    return arguments | {"mixed_precision": "no"} if arguments.get("mixed_precision") == "bf16" else arguments


def in_fast_precision(arguments: dict) -> dict:
    """Return training arguments with fp32 instead of bf16 where bf16 is slow."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return arguments if is_bfloat16_fast(device) else in_fp32(arguments)


def training_arguments(row: dict, config: Path, work_dir: Path, seed: int) -> list:
    """Return the words of the command line with which `examples/train.py` trains a row."""
    words = ["--config", config, "--seed", seed]
    for name, value in row["arguments"].items():
        words += [f"--{name}", value]
    if "config_overrides" in row:
        overrides = json.loads(config.read_text(encoding="utf-8"))["config_overrides"] | row["config_overrides"]
        words += ["--config_overrides", json.dumps(overrides, allow_nan=False)]
    if "classifier_of" in row:
        words += ["--classifier_checkpoint", run_folder(row["classifier_of"], work_dir, seed)]
    return words


def training_command(row: dict, config: Path, seed: int) -> str:
    """Return the command that trains a row, with the default folder of the checkpoints."""
    words = training_arguments(row, config, WORK_DIR, seed)
    return shlex.join(map(str, ["python", "examples/train.py", *words]))


def run_folder(name: str, work_dir: Path, seed: int) -> Path:
    """Return the folder of a row's checkpoint."""
    return work_dir / f"{name}-seed{seed}"


def describe_training(summary: dict) -> dict:
    """Return what a training summary says about a run: its size, its speed, its losses and its validation metrics."""
    fits = {}
    for decoding, fit in summary["fits"].items():
        parts = {part: best_fit(fit["tried"], METRIC, **settings) for part, settings in PARTS.items()}
        fits[decoding] = {name: value for name, value in fit.items() if name != "tried"} | {
            part: {name: best["validation"][name] for name in F1_METRICS} for part, best in parts.items() if best
        }
    epochs, history = summary["arguments"]["num_train_epochs"], summary["history"]
    return {
        "seed": summary["arguments"]["seed"],
        "examples": summary["examples"]["train"],
        "num_train_epochs": epochs,
        "seconds_per_epoch": round(summary["training_seconds"] / epochs, 1),
        "losses": {name: value for name, value in history[-1].items() if name.endswith("loss")} if history else {},
        "validation": fits,
    }


def score_on_test(run: Run, benchmark: Benchmark) -> dict[str, dict]:
    """Score a run on the test split, with each decoding and with its tag classifier alone.

    The classifier alone is that of ASY with the same seed; only its fitted settings differ. The decoding makes no
    difference to it: the settings of the first decoding are used.
    """
    evaluator, references = benchmark.evaluator("test"), benchmark.splits["test"]["tags"]
    examples = benchmark.with_features(benchmark.splits["test"], run)

    def predict(**settings: object) -> list[list[dict]]:
        return predict_tags(run.model, run.processor, examples, progress=False, **settings)

    scores = {}
    for decoding in run.spec.decodings:
        predictions = predict(**({"decoding": decoding} if decoding else {}))
        hits = novel_hits(predictions, references)
        scores[decoding or "only"] = evaluator.score(predictions) | {"novel": hits}
    decoding, fit = next(iter(run.summary["fits"].items()))
    if best := best_fit(fit["tried"], METRIC, slot_weight=0.0):
        settings = {"decoding": decoding} | {name: best[name] for name in FUSION_SETTINGS}
        predictions = without_novel_tags(predict(**settings))
        scores[f"{decoding}, classifier alone"] = evaluator.score(predictions) | {"settings": settings}
    return scores


def existing_runs(path: Path) -> dict[tuple[str, int], dict]:
    """Return the runs in a result file, by row and seed."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {(name, run["seed"]): run for name, row in rows.items() for run in row["runs"]}


def gather(rows: dict[str, dict], runs: dict[tuple[str, int], dict]) -> dict[str, dict]:
    """Return what the result file of an experiment holds: each row's runs, by seed."""
    gathered = {}
    for name, row in rows.items():
        if own := [runs[key] for key in sorted(runs) if key[0] == name]:
            gathered[name] = {"what": row["what"], "runs": own}
    return gathered


def markdown_table(gathered: dict[str, dict], split: str) -> str:
    """Return a table of the rows' means over their seeds."""
    heads = ["Row", "What", "Seeds", "Full", "Rare", "Common", "Micro", "s per epoch"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in gathered.items():
        runs, decoding = row["runs"], next(iter(row["runs"][0]["validation"]))
        scores = [run["test"][decoding] if split == "test" else run["validation"][decoding][split] for run in runs]
        cells = [name, row["what"], ", ".join(str(run["seed"]) for run in runs)]
        means = [mean_metric(scores, metric) for metric in F1_METRICS]
        cells += ["–" if value is None else f"{value:.1f}" for value in means]
        cells.append(f"{fmean(run['seconds_per_epoch'] for run in runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_missing(
    rows: dict[str, dict], names: Sequence[str], runs: dict[tuple[str, int], dict], arguments: argparse.Namespace
) -> None:
    """Train and score the rows that have no run yet, and write the result file after each of them."""
    benchmark, dataset = None, json.loads(arguments.config.read_text(encoding="utf-8"))["dataset"]
    for seed in arguments.seeds:
        for name in names:
            if (name, seed) in runs:
                continue
            row = rows[name] | {"arguments": in_fast_precision(rows[name]["arguments"])}
            folder = run_folder(name, arguments.work_dir, seed)
            if not (folder / "training_summary.json").exists():
                first = row.get("classifier_of")
                if first and not run_folder(first, arguments.work_dir, seed).exists():
                    raise FileNotFoundError(f"{name} needs the checkpoint of {first}: train --rows {first} first.")
                words = training_arguments(row, arguments.config, arguments.work_dir, seed)
                train(words, folder, arguments.cache_dir)
            run = {"row": name, "command": training_command(row, arguments.config, seed)}
            run |= describe_training(read_summary(folder))
            if arguments.experiment != "ladder":
                benchmark = benchmark or Benchmark(dataset, arguments.cache_dir)
                run["test"] = score_on_test(Run.load(folder), benchmark)
            runs[name, seed] = run | environment()
            write_result(gather(rows, runs), result_path(arguments))


def result_path(arguments: argparse.Namespace) -> Path:
    """Return the result file of an experiment."""
    return arguments.results_dir / f"{arguments.experiment}.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing training runs of an experiment, and write its result file."""
    parser = make_parser(__doc__, has_dataset=False)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--config", type=Path, default=CONFIG, help="arguments of examples/train.py for all rows")
    parser.add_argument("--work_dir", type=Path, default=WORK_DIR, help="folder of the checkpoints")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--rows", nargs="+", help="train these rows only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args(argv)
    rows = EXPERIMENTS[arguments.experiment]()
    if unknown := set(arguments.rows or ()) - set(rows):
        parser.error(f"--rows {' '.join(sorted(unknown))} are unknown; expected some of {', '.join(rows)}")

    runs = existing_runs(result_path(arguments))
    # In the order of the experiment: the first phase comes before the second.
    run_missing(rows, [name for name in rows if name in (arguments.rows or rows)], runs, arguments)
    gathered = gather(rows, runs)
    write_result(gathered, result_path(arguments))
    print(markdown_table(gathered, "validation" if arguments.experiment == "ladder" else "test"))


if __name__ == "__main__":
    main()
