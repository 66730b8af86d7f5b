r"""Trains the runs behind this folder's findings and gathers their metrics, one result file per experiment.

    python -m experiments.icon_tagging.recipe ladder
    python -m experiments.icon_tagging.recipe curves --rows op-tsg-1.0 asy-1.0 --seeds 0 1 2
    python -m experiments.icon_tagging.recipe time
    python -m experiments.icon_tagging.recipe models
    python -m experiments.icon_tagging.recipe second --dataset data/glyphs

- `ladder`: the recipe with one thing changed in each row (`recipe_rows.json`), ten epochs on a quarter of the training
  examples, compared on the validation split only.
- `curves`: OP-TSG and ASY on an eighth, a quarter, half and all of the training examples.
- `time`: OP-TSG and ASY on a quarter of the training examples, for 5 to 40 epochs with a schedule of their own.
- `models`: the other methods of the paper.
- `second`: OP-TSG and ASY on another dataset, see `second_dataset.py`.

All but the ladder are scored on the test split too, with settings fitted on the validation split. A run that a result
file already has is not repeated, and a checkpoint that `--work_dir` already has is not trained again. When no run is
missing, the program only prints the table and draws the plot again.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from experiments.icon_tagging.operating_point import FUSION_SETTINGS, without_novel_tags
from experiments.icon_tagging.recipe_plots import plot_curves
from experiments.icon_tagging.runs import (
    F1_METRICS,
    RESULTS,
    Benchmark,
    Run,
    make_parser,
    read_summary,
    train,
    write_result,
)
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.evaluation.reporting import best_fit, environment, novel_hits

CONFIG = Path("examples/configs/optsg-icon-small.json")
LADDER = Path(__file__).with_name("recipe_rows.json")
# What the learning curves, the ladder and the curves in time are trained with.
TRAIN_RATIOS = (0.125, 0.25, 0.5, 1.0)
LADDER_ARGUMENTS = {"train_ratio": 0.25, "num_train_epochs": 10.0}
TIME_TRAIN_RATIO, TIME_EPOCHS = 0.25, (5, 10, 20, 40)
COMPARED = ("op-tsg", "asy")
METRIC = "full_f1+micro_f1"
PLOTS = {"curves": ("learning_curves.png", "examples"), "time": ("time_curves.png", "minutes")}
# Settings that a fit must have to show what a part is worth by itself.
PARTS = {"slots": {"slot_weight": 1.0}, "classifier": {"slot_weight": 0.0}, "unadjusted": {"logit_adjustment": 0.0}}


def ladder_rows(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return the rows of the ladder."""
    rows = json.loads(LADDER.read_text(encoding="utf-8"))
    return {name: row | {"arguments": LADDER_ARGUMENTS | row.get("arguments", {})} for name, row in rows.items()}


def curve_rows(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return the rows of the learning curves, and ASY without the improvements that it shares with OP-TSG."""
    rows = {
        f"{model_type}-{ratio}": {
            "what": f"{model_type}, {100 * ratio:g} % of the training examples",
            "arguments": {"model_type": model_type, "train_ratio": ratio},
        }
        for ratio in TRAIN_RATIOS
        for model_type in COMPARED
    }
    rows["linear-asy"] = {
        "what": "asy as published: a linear layer, class weights not initialised from text",
        "arguments": {"model_type": "asy"},
        "config_overrides": {"cosine_classifier": False},
    }
    return rows


def time_rows(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return the rows of the curves in time. Those with the usual number of epochs belong to the learning curves."""
    usual_epochs = json.loads(arguments.config.read_text(encoding="utf-8"))["num_train_epochs"]
    rows = {}
    for epochs in TIME_EPOCHS:
        for model_type in COMPARED:
            name = f"{model_type}-{TIME_TRAIN_RATIO}"
            row = {
                "what": f"{model_type}, {epochs} epochs on {100 * TIME_TRAIN_RATIO:g} % of the training examples",
                "arguments": {"model_type": model_type, "train_ratio": TIME_TRAIN_RATIO},
            }
            if epochs != usual_epochs:
                name += f"-{epochs}-epochs"
                row["arguments"]["num_train_epochs"] = epochs
            rows[name] = row
    return rows


def model_rows(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return a row for every model type that the learning curves do not have."""
    others = [model_type for model_type in MODEL_TYPES if model_type not in COMPARED]
    return {name: {"what": name, "arguments": {"model_type": name}} for name in others}


def second_rows(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return the rows on the second dataset."""
    return {
        f"second-{model_type}": {
            "what": f"{model_type} on another dataset",
            "arguments": {"model_type": model_type, "dataset": arguments.dataset},
        }
        for model_type in COMPARED
    }


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], dict[str, dict]]] = {
    "ladder": ladder_rows,
    "curves": curve_rows,
    "time": time_rows,
    "models": model_rows,
    "second": second_rows,
}


def training_arguments(row: dict, config: Path, seed: int) -> list:
    """Return the words of the command line with which `examples/train.py` trains a row."""
    words = ["--config", config, "--seed", seed]
    for name, value in row["arguments"].items():
        words += [f"--{name}", value]
    if "config_overrides" in row:
        overrides = json.loads(config.read_text(encoding="utf-8"))["config_overrides"] | row["config_overrides"]
        words += ["--config_overrides", json.dumps(overrides)]
    return words


def training_command(row: dict, config: Path, seed: int) -> str:
    """Return the command that trains a row, without the path of this machine's dataset folder."""
    dataset = row["arguments"].get("dataset")
    words = training_arguments(row, config, seed)
    words = [Path(word).name if dataset is not None and word == dataset else word for word in words]
    return shlex.join(map(str, ["python", "examples/train.py", *words]))


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

    The classifier alone has weights of its own, so it stands for ASY with every improvement that OP-TSG has, trained
    as long. The decoding makes no difference to it: the settings of the first decoding are used.
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


def existing_runs(results_dir: Path) -> dict[tuple[str, int], dict]:
    """Return the runs in the result files of all experiments, by row and seed."""
    runs = {}
    for experiment in EXPERIMENTS:
        if (path := results_dir / f"{experiment}.json").exists():
            for name, row in json.loads(path.read_text(encoding="utf-8")).items():
                runs |= {(name, run["seed"]): run for run in row["runs"]}
    return runs


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
        cells += [f"{fmean(score[metric] for score in scores):.1f}" for metric in F1_METRICS]
        cells.append(f"{fmean(run['seconds_per_epoch'] for run in runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_missing(
    rows: dict[str, dict], names: Sequence[str], runs: dict[tuple[str, int], dict], arguments: argparse.Namespace
) -> None:
    """Train and score the rows that have no run yet, and write the result file after each of them."""
    benchmark = None
    dataset = arguments.dataset or json.loads(arguments.config.read_text(encoding="utf-8"))["dataset"]
    for seed in arguments.seeds:
        for name in names:
            if (name, seed) in runs:
                continue
            folder = arguments.work_dir / f"{name}-seed{seed}"
            if not (folder / "training_summary.json").exists():
                train(training_arguments(rows[name], arguments.config, seed), folder, arguments.cache_dir)
            run = {"row": name, "command": training_command(rows[name], arguments.config, seed)}
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
    """Run the missing trainings of an experiment, and write its result file and its plot."""
    parser = make_parser(__doc__)
    parser.set_defaults(dataset=None)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--config", type=Path, default=CONFIG, help="arguments of examples/train.py for all rows")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/recipe"), help="folder of the checkpoints")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--rows", nargs="+", help="train these rows only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args(argv)
    if (arguments.experiment == "second") != (arguments.dataset is not None):
        parser.error("second, and no other experiment, needs --dataset, the folder that second_dataset.py built")
    rows = EXPERIMENTS[arguments.experiment](arguments)
    if unknown := set(arguments.rows or ()) - set(rows):
        parser.error(f"--rows {' '.join(sorted(unknown))} are unknown; expected some of {', '.join(rows)}")

    runs = existing_runs(arguments.results_dir)
    run_missing(rows, arguments.rows or list(rows), runs, arguments)
    gathered = gather(rows, runs)
    write_result(gathered, result_path(arguments))
    print(markdown_table(gathered, "validation" if arguments.experiment == "ladder" else "test"))
    if arguments.experiment in PLOTS:
        file_name, against = PLOTS[arguments.experiment]
        plot_curves(gathered, arguments.results_dir / file_name, against)


if __name__ == "__main__":
    main()
