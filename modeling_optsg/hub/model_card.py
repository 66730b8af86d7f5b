"""A checkpoint's model card, made of its training summary and its result file."""

import json
import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("model_card_template.md")
FIGURES = {
    "full_f1": "Full F1",
    "rare_f1": "Rare F1",
    "common_f1": "Common F1",
    "micro_precision": "Micro precision",
    "micro_recall": "Micro recall",
    "micro_f1": "Micro F1",
    "tags_per_item": "Tags an item",
}


def write_model_card(
    checkpoint: str | os.PathLike,
    results: str | os.PathLike,
    *,
    name: str,
    dataset_name: str,
    train_command: str,
    score_command: str,
    license: str = "apache-2.0",
    language: str = "en",
) -> ModelCard:
    """Writes `README.md` into a checkpoint's folder. Every figure in it is read from a file.

    Args:
        checkpoint: folder with `training_summary.json`, as `examples/train.py` leaves it.
        results: what `examples/score.py` wrote for it.
        name: the model's name; dataset_name: the benchmark's.
        train_command, score_command: the commands that made the two.

    Raises:
        FileNotFoundError: one of the two files is missing.
    """
    checkpoint = Path(checkpoint)
    summary = json.loads((checkpoint / "training_summary.json").read_text(encoding="utf-8"))
    scores = json.loads(Path(results).read_text(encoding="utf-8"))
    parallel = scores["test"]["parallel"]
    data = ModelCardData(
        model_name=name,
        license=license,
        language=language,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["tag-generation", "optsg", "image-tagging", "video-tagging"],
        datasets=[dataset_name],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Tag generation",
                dataset_type=dataset_name,
                dataset_name=dataset_name,
                dataset_split="test",
                metric_type=metric,
                metric_name=FIGURES[metric],
                metric_value=parallel[metric],
            )
            for metric in ("full_f1", "rare_f1", "common_f1", "micro_f1")
        ],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=name,
        dataset_name=dataset_name,
        license=license,
        fitted_with=summary.get("fitted_with"),
        arguments=summary["arguments"],
        parameters=round(summary["parameters"] / 1e6, 1),
        trained_parameters=round(summary["trained_parameters"] / 1e6, 1),
        items=summary["items"],
        training_minutes=round(summary["training_seconds"] / 60),
        scores=scores,
        figures=FIGURES,
        train_command=train_command,
        score_command=score_command,
    )
    card.save(checkpoint / "README.md")
    return card
