r"""Runs the ladder of changes, the learning curves in examples and in time, or a second data set: many trainings of one
preset, each with one thing changed, gathered in one JSON and one table.

    python examples/recipe.py ladder --config examples/configs/optsg-icon-small.json --work_dir runs/recipe
    python examples/recipe.py curves --config examples/configs/optsg-icon-small.json --work_dir runs/recipe
    python examples/recipe.py time --config examples/configs/optsg-icon-small.json --work_dir runs/recipe
    python examples/recipe.py second --config examples/configs/optsg-icon-small.json --work_dir runs/recipe \
        --dataset data/glyphs

The ladder's rows are in `presets/recipe_rows.json`; they are trained on a share of the examples and compared on the
validation split alone. The curves and the second data set are scored on the test split too, with settings fitted on
validation examples. The curve in time is of trainings of 5 to 40 epochs of one share of the examples, each with a schedule
of its own. What is there already is not done again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import torch
from operating_point import best_of
from score import environment, novel_hits

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGProcessor, TagEvaluator
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.prediction import predict_tags

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROWS = Path(__file__).with_name("configs") / "recipe_rows.json"
METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")
SHARES = (0.125, 0.25, 0.5, 1.0)
LENGTHS = (5, 10, 20, 40)
COMPARED = ("op-tsg", "asy")
# Of the best fit with a setting.
OBJECTIVE = "full_f1+micro_f1"
LINES = (
    ("OP-TSG", "op-tsg", "parallel"),
    ("its classifier alone", "op-tsg", "parallel, classifier alone"),
    ("ASY", "asy", "only"),
)
EXAMPLES = (2000, 4000, 8000, 16000)
MINUTES = (1, 2, 4, 8, 16, 32)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ladder", "curves", "time", "second"))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="where checkpoints are kept, or already lie")
    parser.add_argument("--results_dir", type=Path, default=Path("results/icon_tagging/recipe"))
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser())
    parser.add_argument("--dataset", help="of the second data set: a folder")
    parser.add_argument("--rows", nargs="+", help="only these; all that there are if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--train_ratio", type=float, default=0.25, help="of the examples, for the ladder and the curve in time"
    )
    parser.add_argument("--num_train_epochs", type=float, default=10.0, help="of the ladder's rows")
    return parser.parse_args()


def planned(arguments) -> dict[str, dict]:
    """Each row's name -> what it is, arguments of `train.py` and changes of the configuration."""
    if arguments.what == "ladder":
        rows = json.loads(ROWS.read_text(encoding="utf-8"))
        for row in rows.values():
            shorter = {"train_ratio": arguments.train_ratio, "num_train_epochs": arguments.num_train_epochs}
            row["arguments"] = shorter | row.get("arguments", {})
    elif arguments.what == "curves":
        rows = {
            f"{system}-{share}": {
                "what": f"{system}, {100 * share:g} % of the examples",
                "arguments": {"model_type": system, "train_ratio": share},
            }
            for share in SHARES
            for system in COMPARED
        }
        rows["linear-asy"] = {
            "what": "asy as published: a linear layer, classes not tied to text",
            "arguments": {"model_type": "asy"},
            "config_overrides": {"cosine_classifier": False},
        }
    elif arguments.what == "time":
        usual = json.loads(arguments.config.read_text(encoding="utf-8"))["num_train_epochs"]
        share = arguments.train_ratio
        rows = {
            # A training of the preset's length is the learning curve's.
            f"{system}-{share}" + (f"-{epochs}-epochs" if epochs != usual else ""): {
                "what": f"{system}, {epochs} epochs of {100 * share:g} % of the examples",
                "arguments": {"model_type": system, "train_ratio": share, "num_train_epochs": epochs},
            }
            for epochs in LENGTHS
            for system in COMPARED
        }
    else:
        if arguments.dataset is None:
            raise SystemExit("second needs --dataset, the folder examples/second_dataset.py has built.")
        rows = {
            f"second-{system}": {
                "what": f"{system} on another data set",
                "arguments": {"model_type": system, "dataset": arguments.dataset},
            }
            for system in COMPARED
        }
    if unknown := set(arguments.rows or ()) - set(rows):
        raise SystemExit(f"There are no rows {sorted(unknown)}; there are {list(rows)}.")
    return {name: row for name, row in rows.items() if not arguments.rows or name in arguments.rows}


def train(arguments, name: str, row: dict, seed: int) -> tuple[Path, str]:
    """Trains a row unless it is trained; its folder, and the command as anybody would type it."""
    folder = arguments.work_dir / f"{name}-seed{seed}"
    command = ["--config", arguments.config, "--seed", seed]
    for argument, value in row.get("arguments", {}).items():
        command += [f"--{argument}", value]
    if "config" in row:
        config = json.loads(arguments.config.read_text(encoding="utf-8"))["config_overrides"] | row["config_overrides"]
        command += ["--config_overrides", json.dumps(config)]
    # Where the images lay is nobody else's business.
    names = [Path(part).name if part == arguments.dataset else part for part in command]
    shown = shlex.join(map(str, ["python", "examples/train.py", *names]))
    if not (folder / "training_summary.json").exists():
        program = [sys.executable, Path(__file__).with_name("train.py"), *command]
        program += ["--output_dir", folder, "--cache_dir", arguments.cache_dir]
        run(list(map(str, program)))
    return folder, shown


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


@torch.no_grad()
def metrics_of(arguments, folder: Path, row: dict, seed: int) -> dict:
    """A run's metrics: those of the training summary, and for what is scored on test those of the test examples."""
    summary = json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))
    fits, alone = summary["fits"], {}
    for decoding, fit in fits.items():
        tried = fit.pop("tried")
        # What the slots say alone, the example as a whole alone, and both with rare tags not favoured.
        parts = {
            "slots": ("slot_weight", 1.0),
            "classifier": ("slot_weight", 0.0),
            "unadjusted": ("logit_adjustment", 0.0),
        }
        for part, (setting, value) in parts.items():
            if best := best_of(tried, setting, value, OBJECTIVE):
                fit[part] = {name: best["validation"][name] for name in METRICS}
        # The classifier inside OP-TSG, its slots ignored: it has parameters of its own, so this is ASY with every
        # improvement that applies to it, at the same length. The decoding makes no difference to it.
        if not alone and (best := best_of(tried, "slot_weight", 0.0, OBJECTIVE)):
            settings = ("fusion_weights", "logit_adjustment", "threshold")
            alone = {"decoding": decoding} | {name: best[name] for name in settings}
    history = summary["history"]
    found = {
        "seed": seed,
        "examples": summary["examples"]["train"],
        "num_train_epochs": summary["arguments"]["num_train_epochs"],
        "seconds_per_epoch": round(summary["training_seconds"] / summary["arguments"]["num_train_epochs"], 1),
        "losses": {name: value for name, value in history[-1].items() if name.endswith("loss")} if history else {},
        "validation": fits,
    }
    if arguments.what == "ladder":
        return found | environment()
    system = MODEL_TYPES[row["arguments"]["model_type"]]
    dataset = load_tagging_dataset(arguments.dataset or "icon_tagging")
    model = system.model.from_pretrained(folder).eval()
    processor = OPTSGProcessor.from_pretrained(folder)
    cached = cache_tower_features(dataset["test"], model.model, processor, arguments.cache_dir / "features")
    references = dataset["test"]["tags"]
    # A share of the examples knows a share of the tags; every row is judged on the tags of all training examples.
    counts = Counter(tag for tags in dataset["train"]["tags"] for tag in set(tags))
    evaluator = TagEvaluator(references, counts)
    found["test"] = {}
    for decoding in system.decodings:
        settings = {"decoding": decoding} if decoding else {}
        predictions = predict_tags(model, processor, CachedFeatures(cached), progress=False, **settings)
        found["test"][decoding or "only"] = evaluator.score(predictions) | {
            "novel": novel_hits(predictions, references)
        }
    if alone:
        predictions = predict_tags(model, processor, CachedFeatures(cached), progress=False, **alone)
        predictions = [[tag for tag in tags if not tag["novel"]] for tags in predictions]
        found["test"][f"{alone['decoding']}, classifier alone"] = evaluator.score(predictions) | {"settings": alone}
    return found | environment()


def table(rows: dict[str, dict], split: str) -> str:
    heads = ["Row", "What", "Seeds", "Full", "Rare", "Common", "Micro", "s an epoch"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        runs = row["runs"]
        decoding = next(iter(runs[0]["validation"]))
        own = [
            run["validation"][decoding]["validation"] if split == "validation" else run["test"][decoding]
            for run in runs
        ]
        means = [f"{sum(f[figure] for f in own) / len(own):.1f}" for figure in METRICS]
        seconds = sum(run["seconds_per_epoch"] for run in runs) / len(runs)
        cells = [name, row["what"], ", ".join(str(run["seed"]) for run in runs), *means, f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_curves(rows: dict[str, dict], path: Path, against: str) -> None:
    """Test metrics against `examples` or training `minutes`, a line for each of `LINES`."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(14, 3.4), sharex=True)

    def place(run: dict) -> float:
        return run["examples"] if against == "examples" else run["seconds_per_epoch"] * run["num_train_epochs"] / 60

    for axis, name in zip(axes, METRICS):
        for label, system, decoding in LINES:
            own = [row["runs"] for key, row in rows.items() if key.startswith(f"{system}-")]
            points = sorted(
                (
                    sum(place(run) for run in runs) / len(runs),
                    sum(run["test"][decoding][name] for run in runs) / len(runs),
                )
                for runs in own
                if all(decoding in run["test"] for run in runs)
            )
            if points:
                axis.plot(*zip(*points), marker="o", label=label)
        axis.set(xscale="log", title=name.replace("_f1", " F1, test"), xlabel=f"training {against}")
        if against == "examples":
            axis.set_xticks(EXAMPLES, labels=[f"{examples // 1000}k" for examples in EXAMPLES], minor=False)
        else:
            axis.set_xticks(MINUTES, labels=map(str, MINUTES), minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_arguments()
    runs_dir = arguments.results_dir / "runs"
    runs_dir.mkdir(parents=True, exist_ok=True)
    rows = planned(arguments)
    for seed in arguments.seeds:
        for name, row in rows.items():
            path = runs_dir / f"{name}-seed{seed}.json"
            if not path.exists():
                folder, command = train(arguments, name, row, seed)
                result = {"row": name, "command": command} | metrics_of(arguments, folder, row, seed)
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    arguments.rows = None
    gathered = {}
    for name, row in planned(arguments).items():
        if found := sorted(runs_dir.glob(f"{name}-seed*.json")):
            gathered[name] = {"what": row["what"], "runs": [json.loads(p.read_text(encoding="utf-8")) for p in found]}
    (arguments.results_dir / f"{arguments.what}.json").write_text(
        json.dumps(gathered, indent=1) + "\n", encoding="utf-8"
    )
    text = table(gathered, "validation" if arguments.what == "ladder" else "test")
    (arguments.results_dir / f"{arguments.what}.md").write_text(text, encoding="utf-8")
    print(text)
    if arguments.what in ("curves", "time"):
        name, against = ("learning_curves", "examples") if arguments.what == "curves" else ("time_curves", "minutes")
        draw_curves(gathered, arguments.results_dir / f"{name}.png", against)


if __name__ == "__main__":
    main()
