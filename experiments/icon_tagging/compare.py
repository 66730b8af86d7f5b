r"""Compares trained models on the test split, with the settings that were fitted when they were trained.

    python -m experiments.icon_tagging.compare --output_dir runs/comparison \
        --checkpoints runs/recipe/op-tsg-seed0 runs/recipe/asy-seed0 runs/recipe/asy-seed1

`comparison.json` has for each model and decoding the means over its seeds: F1, Tag Gain, novel tags, F1 by training
frequency, and F1 with each modality alone. `f1_by_frequency.png` plots the F1 by training frequency, and
`examples.html` shows the predictions of all models next to each other. `recipe.py` trains the models, and
`timing.py` measures their time per example. `tag_book.py` evaluates OP-TSG with a book.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

from experiments.icon_tagging.compare_page import write_page
from experiments.icon_tagging.recipe import BF16, SECOND_PHASE
from experiments.icon_tagging.runs import (
    F1_METRICS,
    Benchmark,
    Run,
    make_parser,
    mean_metric,
    read_summary,
    write_result,
)
from modeling_optsg.evaluation.metrics import tag_gain
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.evaluation.reporting import environment, novel_hits, score_modalities
from modeling_optsg.training.arguments import RESUMABLE_ARGUMENTS

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

# Training counts at which the groups of the F1 by training frequency begin.
FREQUENCIES = (1, 2, 3, 5, 10, 25, 50, 100)
METRICS = (*F1_METRICS, "example_f1", "tag_gain", "tags_per_example")
# Arguments in which compared runs may differ.
FREE_ARGUMENTS = {*RESUMABLE_ARGUMENTS, "model_type", "seed", "classifier_checkpoint"}
# Arguments in which models of different types may also differ.
BETWEEN_MODELS = {*SECOND_PHASE, *BF16}


def score(run: Run, benchmark: Benchmark) -> tuple[dict[str, dict], dict[str, list[list[dict]]]]:
    """Score a run on the test split.

    Returns:
        For each row of the comparison (the model with one of its decodings) its metrics, and its predictions.
    """
    evaluator, references = benchmark.evaluator("test"), benchmark.splits["test"]["tags"]
    examples = benchmark.with_features(benchmark.splits["test"], run)
    scores, predictions = {}, {}
    for row, settings in run.rows().items():
        predictions[row] = predict_tags(run.model, run.processor, examples, **settings)
        tags = [[prediction["tag"] for prediction in predicted] for predicted in predictions[row]]
        scores[row] = evaluator.score(predictions[row]) | {
            "tag_gain": tag_gain(tags, references, benchmark.train_counts)["tag_gain"],
            "novel": novel_hits(predictions[row], references),
            "by_frequency": evaluator.by_frequency(predictions[row], FREQUENCIES),
            "modalities": score_modalities(run.model, run.processor, examples, evaluator, **settings),
        }
    return scores, predictions


def average(scores: Sequence[Mapping]) -> dict:
    """Return the means of the metrics of one row over its seeds."""

    def mean(*keys: str | int) -> float | None:
        values = scores
        for key in keys[:-1]:
            values = [value[key] for value in values]
        value = mean_metric(values, keys[-1])
        return None if value is None else round(value, 2)

    return {
        **{metric: mean(metric) for metric in METRICS},
        "novel": {name: mean("novel", name) for name in scores[0]["novel"]},
        "by_frequency": [
            {**group, "f1": mean("by_frequency", index, "f1")} for index, group in enumerate(scores[0]["by_frequency"])
        ],
        "modalities": {
            name: {metric: mean("modalities", name, metric) for metric in F1_METRICS}
            for name in scores[0]["modalities"]
        },
    }


def check_same_arguments(summaries: Mapping[str, Mapping]) -> dict:
    """Return the arguments that all runs were trained with, without those in which they may differ.

    Models of different types may differ in precision and in the arguments of the second phase.

    Args:
        summaries: Training summaries by the name of the run.

    Raises:
        ValueError: Two runs were trained with different arguments, so that comparing them says nothing.
    """
    arguments = {
        name: {key: value for key, value in summary["arguments"].items() if key not in FREE_ARGUMENTS}
        for name, summary in summaries.items()
    }
    (first, expected), *others = arguments.items()
    for name, found in others:
        if different := _different(expected, found) - BETWEEN_MODELS:
            raise ValueError(f"{first} and {name} were trained with different {', '.join(sorted(different))}.")
    for name, found in arguments.items():
        model_type = summaries[name]["arguments"]["model_type"]
        same = next(other for other in summaries if summaries[other]["arguments"]["model_type"] == model_type)
        if different := _different(arguments[same], found):
            raise ValueError(f"{same} and {name} were trained with different {', '.join(sorted(different))}.")
    return {key: value for key, value in expected.items() if key not in BETWEEN_MODELS}


def _different(first: Mapping, second: Mapping) -> set[str]:
    return {key for key in first | second if first.get(key) != second.get(key)}


def compare(runs: Iterable[Run], benchmark: Benchmark) -> tuple[dict[str, dict], dict[str, list[list[dict]]]]:
    """Score all runs.

    Returns:
        For each row of the comparison its mean metrics, seeds, parameters and training time; and the predictions of
        the first run of each row.
    """
    scores, seeds, summaries, predictions = {}, {}, {}, {}
    for run in runs:
        run_scores, run_predictions = score(run, benchmark)
        for row, metrics in run_scores.items():
            scores.setdefault(row, []).append(metrics)
            seeds.setdefault(row, []).append(run.arguments["seed"])
            summaries.setdefault(row, []).append(run.summary)
            predictions.setdefault(row, run_predictions[row])
            print(f"{run.name}, {row}: {', '.join(f'{name} {metrics[name]}' for name in F1_METRICS)}", flush=True)
    rows = {
        row: {
            **average(scores[row]),
            "seeds": seeds[row],
            "parameters": summaries[row][0]["parameters"],
            "trained_parameters": summaries[row][0]["trained_parameters"],
            "training_seconds": round(fmean(summary["training_seconds"] for summary in summaries[row])),
        }
        for row in scores
    }
    return rows, predictions


def plot_f1_by_frequency(rows: Mapping[str, Mapping], path: Path) -> None:
    """Plot the F1 of every row against the number of training examples of a tag."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for marker, (row, entry) in zip("osDv^P*Xdhp<>", rows.items()):
        groups = entry["by_frequency"]
        axes.plot(range(len(groups)), [group["f1"] for group in groups], marker=marker, label=row, linewidth=1.2)
    axes.set_xticks(range(len(groups)), [f"{group['from']}+\n{group['tags']} tags" for group in groups], fontsize=8)
    axes.set(xlabel="training examples of a tag (lower end of each group)", ylabel="F1 averaged over tags, %")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    # Without the version of matplotlib, so that the same results give the same file.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the checkpoints of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="folders of examples/train.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    shared = check_same_arguments({folder.name: read_summary(folder) for folder in arguments.checkpoints})
    benchmark = Benchmark(arguments.dataset, arguments.cache_dir)
    rows, predictions = compare(map(Run.load, arguments.checkpoints), benchmark)
    result = {"dataset": Path(arguments.dataset).name, "arguments": shared, "rows": rows}
    write_result(result | environment(), arguments.output_dir / "comparison.json")
    plot_f1_by_frequency(rows, arguments.output_dir / "f1_by_frequency.png")
    write_page(
        benchmark.splits["test"],
        {row: [[prediction["tag"] for prediction in tags] for tags in own] for row, own in predictions.items()},
        benchmark.splits["train"]["tags"],
        arguments.output_dir / "examples.html",
    )


if __name__ == "__main__":
    main()
