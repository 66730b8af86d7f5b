r"""Fits trained models to one operating point and scores them there.

    python -m experiments.icon_tagging.operating_point --checkpoints runs/recipe/op-tsg-seed0 \
        runs/recipe/asy-seed0 --output experiments/icon_tagging/results/operating_point.json

Full and Rare F1 can be traded for micro F1, and every model trades at another rate: fitted for the mean of two
metrics, models end at different points. Here each of them gets the settings with the best Full F1 on the validation
split among those that keep micro F1 above the same floor. Models with a tag classifier are also fitted with the
classifier alone and with the slots alone. The checkpoints are not changed, and a run that the output file already has
is not repeated.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.icon_tagging.runs import F1_METRICS, Benchmark, Run, make_parser, write_result
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.evaluation.reporting import best_fit, environment, novel_hits, score_modalities

METRICS = (*F1_METRICS, "tags_per_example")
SLOT_WEIGHTS = {"classifier alone": 0.0, "slots alone": 1.0}
FUSION_SETTINGS = ("fusion_weights", "logit_adjustment", "threshold")
# The smallest bias lets as many slots as possible generate; the threshold decides which tags are kept.
PAD_BIAS = -4.0


def score_at_operating_point(run: Run, benchmark: Benchmark, metric: str, decoding: str = "parallel") -> dict:
    """Fit the decoding settings of a run on the validation split and score them on the test split.

    Args:
        run: The trained run.
        benchmark: The dataset.
        metric: Validation metric to maximise, as in `metric_value`.
        decoding: Decoding of a model that has several.

    Returns:
        The settings and the metrics, as they are written to the result file.
    """
    arguments = run.arguments
    decoding = decoding if decoding in run.spec.decodings else run.spec.decodings[0]
    examples = {split: benchmark.with_features(benchmark.splits[split], run) for split in ("validation", "test")}
    run.spec.set_search(run.model, arguments["num_return_sequences"], arguments["num_candidates"])
    fit = fit_generation_config(
        run.model,
        run.processor,
        examples["validation"],
        benchmark.evaluator("validation"),
        decoding=decoding,
        metric_for_best_model=metric,
        grid=run.spec.grid([PAD_BIAS]),
    )
    tried, validation, _ = (fit.pop(name) for name in ("tried", "validation", "modalities"))

    def predict(**settings: object) -> list[list[dict]]:
        settings |= {"decoding": decoding} if decoding else {}
        return predict_tags(run.model, run.processor, examples["test"], progress=False, **settings)

    evaluator, predictions, parts = benchmark.evaluator("test"), predict(), {}
    for part, slot_weight in SLOT_WEIGHTS.items():
        if best := best_fit(tried, metric, slot_weight=slot_weight):
            settings = {name: best[name] for name in FUSION_SETTINGS}
            part_predictions = predict(**settings)
            if part == "classifier alone":
                part_predictions = without_novel_tags(part_predictions)
            parts[part] = {
                "settings": settings,
                "validation": _select(best["validation"]),
                "test": _select(evaluator.score(part_predictions)),
            }
    return {
        "model_type": arguments["model_type"],
        "seed": arguments["seed"],
        "num_train_epochs": arguments["num_train_epochs"],
        "decoding": decoding,
        "settings": fit,
        "validation": _select(validation),
        "test": _select(evaluator.score(predictions)),
        "novel": novel_hits(predictions, benchmark.splits["test"]["tags"]),
        "modalities": score_modalities(
            run.model,
            run.processor,
            examples["test"],
            evaluator,
            progress=False,
            **({"decoding": decoding} if decoding else {}),
        ),
        **({"parts": parts} if parts else {}),
    }


def without_novel_tags(predictions: Sequence[Sequence[dict]]) -> list[list[dict]]:
    """Return the predictions of the label vocabulary. A classifier predicts no others; those are the slots'."""
    return [[tag for tag in tags if not tag["novel"]] for tags in predictions]


def _select(metrics: dict) -> dict:
    return {name: metrics[name] for name in METRICS}


def main(argv: Sequence[str] | None = None) -> None:
    """Score the checkpoints of the command line and add them to the result file."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="folders of examples/train.py")
    parser.add_argument(
        "--metric_for_best_model", default="full_f1@micro_f1>=52", help="validation metric to maximise"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    benchmark = Benchmark(arguments.dataset, arguments.cache_dir)
    runs = {}
    if arguments.output.exists():
        existing = json.loads(arguments.output.read_text(encoding="utf-8"))
        if existing["metric_for_best_model"] != arguments.metric_for_best_model:
            parser.error(
                f"{arguments.output} was fitted for {existing['metric_for_best_model']}; give another --output."
            )
        runs = existing["runs"]
    for folder in arguments.checkpoints:
        if folder.name in runs:
            continue
        runs[folder.name] = score_at_operating_point(Run.load(folder), benchmark, arguments.metric_for_best_model)
        metrics = {split: runs[folder.name][split] for split in ("validation", "test")}
        print(folder.name, json.dumps(metrics, allow_nan=False), flush=True)
        result = {"metric_for_best_model": arguments.metric_for_best_model, "runs": runs}
        write_result(result | environment(), arguments.output)


if __name__ == "__main__":
    main()
