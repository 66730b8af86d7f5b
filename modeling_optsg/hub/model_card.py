"""What lies beside a checkpoint's weights on the Hub: the model card, its example images, the endpoint handler."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import pipeline

from modeling_optsg.pipeline_optsg import TASK

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
ENDPOINT_FILES = ("handler.py", "requirements.txt")
METRICS = {
    "full_f1": "Full F1",
    "rare_f1": "Rare F1",
    "common_f1": "Common F1",
    "micro_precision": "Micro precision",
    "micro_recall": "Micro recall",
    "micro_f1": "Micro F1",
    "tags_per_example": "Tags an example",
}
# What a card calls a model that has no name on the Hub yet.
NAMELESS = "FOLDER"
MEASURED = ("full_f1", "rare_f1", "common_f1", "micro_f1")
WIDGET_TAGS, WIDGET_DIGITS = 5, 4


def write_model_card(
    checkpoint: str | os.PathLike,
    results: str | os.PathLike | None = None,
    *,
    name: str,
    dataset_name: str,
    train_command: str | None = None,
    score_command: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    examples: Sequence[str | os.PathLike] = (),
    use: str | None = None,
    licences: str | None = None,
) -> ModelCard:
    """Writes `README.md` into a checkpoint's folder, and beside it the example images and the endpoint handler.
    Every figure in the card is read from a file, and the tags of the examples are the model's.

    Args:
        checkpoint: folder with `training_summary.json`, as `examples/train.py` leaves it.
        results: what `examples/score.py` wrote for it; without, the card has the validation metrics of the training.
        name: the model's name, or the repository's as `org/name`; dataset_name: the benchmark's.
        train_command, score_command: the commands that made the two; the training's is told by its arguments if not
            given.
        license, language: as the Hub names them.
        examples: images for the widget, named as their files are. One that gets no tags is left out, with a warning.
        use: what the model is for and what its limits are, in Markdown; a general text if not given.
        licences: of what it was made from, in Markdown.

    Raises:
        FileNotFoundError: a file is missing.
    """
    checkpoint = Path(checkpoint)
    summary = json.loads((checkpoint / "training_summary.json").read_text(encoding="utf-8"))
    arguments = summary["arguments"]
    scores = json.loads(Path(results).read_text(encoding="utf-8")) if results is not None else None
    if scores is not None:
        split, metrics = "test", scores["test"]
    else:
        split, metrics = "validation", {way: fit["validation"] for way, fit in summary.get("fits", {}).items()}
    for file in ENDPOINT_FILES:
        shutil.copy(Path(__file__).with_name(file), checkpoint)
    measured = next(iter(metrics.values()), None)
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        license=license,
        language=language,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=[TASK, "optsg", "image-tagging", "video-tagging", "custom_code"],
        datasets=[dataset_name],
        metrics=["f1"],
        widget=_widget(checkpoint, examples) or None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Tag generation",
                dataset_type=dataset_name,
                dataset_name=dataset_name,
                dataset_split=split,
                metric_type=metric,
                metric_name=METRICS[metric],
                metric_value=measured[metric],
            )
            for metric in MEASURED
        ]
        if measured
        else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=data.model_name,
        folder=name if "/" in name else NAMELESS,
        dataset_name=dataset_name,
        license=license,
        fitted_with=summary.get("fitted_with"),
        arguments=arguments,
        towers=[
            (_public(arguments[tower]), role, arguments.get(tuned))
            for tower, role, tuned in (
                ("vision_tower", "images", "train_vision_tower"),
                ("text_tower", "titles and, in training, the text of tags", "train_text_tower"),
            )
            if arguments.get(tower) not in (None, "none")
        ],
        parameters=round(summary["parameters"] / 1e6, 1),
        trained_parameters=round(summary["trained_parameters"] / 1e6, 1),
        examples=summary["examples"],
        training_minutes=round(summary["training_seconds"] / 60),
        split=split,
        results=metrics,
        scores=scores,
        metrics=METRICS,
        train_command=train_command or _train_command(arguments, checkpoint),
        score_command=score_command,
        use=use,
        licences=licences,
    )
    card.save(checkpoint / "README.md")
    return card


def _train_command(arguments: dict, checkpoint: Path) -> str:
    names = ("preset",) if arguments.get("config") else ("system", "dataset", "checkpoint", "seed")
    chosen = {name: arguments.get(name) for name in names} | {"output_dir": checkpoint}
    given = [f"--{name} {_public(value)}" for name, value in chosen.items() if value is not None]
    return f"accelerate launch examples/train.py {' '.join(given)}"


def _public(path) -> str:
    """A name or relative path as it is; of another the last part: where it lay is nobody else's business."""
    path = str(path).rstrip("/")
    return os.path.basename(path) if os.path.isabs(path) else path


def _widget(checkpoint: Path, examples: Sequence[str | os.PathLike]) -> list[dict]:
    """The examples that get tags, copied beside the weights, with the tags the pipeline gives them without a title:
    the widget asks for none."""
    if not examples:
        return []
    tagger = pipeline(TASK, model=str(checkpoint), trust_remote_code=True, device="cpu")
    folder = checkpoint / "examples"
    folder.mkdir(exist_ok=True)
    widget = []
    for example in map(Path, examples):
        tags = tagger(example, top_k=WIDGET_TAGS)
        if not tags:
            logger.warning("%s gets no tags without a title; it is left out of the widget", example)
            continue
        if example.resolve().parent != folder.resolve():
            shutil.copy(example, folder)
        widget.append(
            {
                "src": f"examples/{example.name}",
                "example_title": example.stem.replace("-", " "),
                "output": [{"label": tag["label"], "score": round(tag["score"], WIDGET_DIGITS)} for tag in tags],
            }
        )
    return widget
