"""Write a checkpoint's model card from its training summary, its results and the tags of example images."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError
from transformers import pipeline
from transformers.utils import CONFIG_NAME

from modeling_optsg.book.book_files import INDEX_FOLDER, SETTINGS_NAME
from modeling_optsg.data.training_summary import SUMMARY, summary_base_models, summary_towers
from modeling_optsg.pipeline_optsg import HUB_TASK, TASK, TagGenerationPipeline

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
METRICS = {
    "full_f1": "Full F1",
    "rare_f1": "Rare F1",
    "common_f1": "Common F1",
    "micro_precision": "Micro precision",
    "micro_recall": "Micro recall",
    "micro_f1": "Micro F1",
    "tags_per_example": "Tags per example",
}
MODEL_INDEX_METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")
# The name of a model that has none on the Hub yet; `push_checkpoint` replaces it.
PLACEHOLDER_NAME = "FOLDER"
MAX_WIDGET_TAGS, WIDGET_DIGITS = 5, 4


def write_model_card(
    checkpoint: str | os.PathLike,
    results: str | os.PathLike | None = None,
    *,
    name: str,
    dataset_name: str | None,
    train_command: str | None = None,
    score_command: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    examples: Sequence[str | os.PathLike] = (),
    use: str | None = None,
    license_details: str | None = None,
) -> ModelCard:
    """Write `README.md` and the widget's example images into a checkpoint's folder.

    All numbers are read from files, and the tags of the examples are predicted by the model.

    Args:
        checkpoint: Folder with `training_summary.json`, as `examples/train.py` leaves it.
        results: Output of `optsg evaluate` or `examples/score.py`. Without it, the card shows the validation metrics
            of the training.
        name: The model's name, or its repository as `org/name`.
        dataset_name: Name of the training data, `None` if it has none.
        train_command: Command that trained the model; by default it is composed from the training arguments, if the
            model was trained by a command.
        score_command: Command that made `results`.
        license: Licence of the weights, by its identifier on the Hub.
        language: Languages of titles and tags, by their codes.
        examples: Images for the widget, with file names that describe them. An image without predicted tags is left
            out with a warning.
        use: Intended use and limits, in Markdown; by default a general text.
        license_details: Licences of the material the model was made from, in Markdown.

    Returns:
        The card.

    Raises:
        FileNotFoundError: A file is missing.
    """
    checkpoint = Path(checkpoint)
    summary = json.loads((checkpoint / SUMMARY).read_text(encoding="utf-8"))
    scores = json.loads(Path(results).read_text(encoding="utf-8")) if results is not None else None
    split, metrics, knn = _metrics(summary, scores)
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        license=license,
        language=language,
        # The Hub shows how to load a model with this library. A baseline needs the package.
        library_name="transformers" if summary["arguments"]["model_type"] == "op-tsg" else "optsg",
        pipeline_tag=HUB_TASK,
        tags=[TASK, "optsg", "image-tagging", "video-tagging", "custom_code"],
        base_model=summary_base_models(summary) or None,
        datasets=[dataset_name] if dataset_name else None,
        metrics=["f1"],
        widget=_widget(checkpoint, examples) or None,
        eval_results=_eval_results(next(iter(metrics.values()), None), dataset_name, split),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        **_training_values(summary),
        model_name=data.model_name,
        folder=name if "/" in name else PLACEHOLDER_NAME,
        dataset_name=dataset_name,
        license=license,
        split=split,
        results=metrics,
        scores=scores,
        metrics=METRICS,
        knn=knn,
        train_command=train_command or _train_command(summary, checkpoint),
        score_command=score_command,
        use=use,
        license_details=license_details,
        **_contents(checkpoint),
    )
    card.save(checkpoint / "README.md")
    return card


def write_training_card(
    folder: str | os.PathLike, repo_id: str, results: str | os.PathLike | None = None, **settings: Any
) -> None:
    """Write the card of a checkpoint that `examples/train.py` trained; the summary names the training data.

    Args:
        folder: The training's output folder.
        repo_id: `org/name`.
        results: Output of `optsg evaluate` or `examples/score.py`.
        settings: Further arguments of [`write_model_card`].

    Raises:
        ValueError: There is no training summary, a file does not have the expected contents, or the card or an
            example is a link.
    """
    folder = Path(folder)
    for path in (folder / "README.md", folder / "examples", *map(Path, settings.get("examples", ()))):
        # Writing would change the target of the link, and copying would publish it.
        if path.is_symlink():
            raise ValueError(f"{path} is a link; replace it with the file itself")
    if not (folder / SUMMARY).is_file():
        raise ValueError(f"{folder} has no README.md, and no {SUMMARY} to make one from")
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        dataset = summary["arguments"]["dataset"]
        dataset_name = public_dataset_name(dataset) if dataset else None
        write_model_card(folder, results, name=repo_id, dataset_name=dataset_name, **settings)
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        sources = SUMMARY if results is None else f"{SUMMARY} or {results}"
        raise ValueError(f"{folder}: no card can be made from {sources} ({type(error).__name__}: {error})") from error


def public_dataset_name(dataset: str) -> str:
    """Return the name under which a card shows the `--dataset` argument of `examples/train.py`.

    A Hub name stays, a benchmark's module name becomes its usual name (`icon-tagging`), and of a folder only the last
    part is shown.
    """
    path = Path(dataset)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not dataset.startswith(".") and not path.exists():
        return dataset
    return path.name.replace("_", "-") if path.name.endswith("_tagging") else path.name


def _metrics(summary: Mapping[str, Any], scores: Mapping[str, Any] | None) -> tuple[str, dict, Mapping | None]:
    """Return the split, the metrics of each decoding, and those of the nearest neighbours if they are known."""
    if scores is not None:
        split = scores.get("split", "test")
        return split, scores[split], scores.get("knn")
    fits = {way: fit["validation"] for way, fit in summary.get("fits", {}).items()}
    return "validation", fits, summary.get("nearest_neighbours")


def _eval_results(
    metrics: Mapping[str, float] | None, dataset_name: str | None, split: str
) -> list[EvalResult] | None:
    if not metrics:
        return None
    return [
        EvalResult(
            task_type=HUB_TASK,
            task_name="Tag generation",
            # Both are required.
            dataset_type=dataset_name or "unknown",
            dataset_name=dataset_name or "unknown",
            dataset_split=split,
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=metrics[metric],
        )
        for metric in MODEL_INDEX_METRICS
        # Without rare tags, there is no Rare F1.
        if metrics.get(metric) is not None
    ]


def _contents(checkpoint: Path) -> dict[str, Any]:
    """Return what the card says about a book and about class names of the vision tower in the checkpoint."""
    config = json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
    return {
        "has_book": (checkpoint / INDEX_FOLDER / SETTINGS_NAME).is_file(),
        "class_names": (config.get("vision_config") or {}).get("id2label_source"),
    }


def _training_values(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's values that come from the training summary."""
    arguments = summary["arguments"]
    roles = {"vision": "images", "text": "titles and, in training, the text of tags"}
    checkpoint = summary.get("checkpoint") or arguments.get("checkpoint")
    history = summary.get("history")
    return {
        "arguments": arguments,
        "checkpoint": checkpoint and _public(checkpoint),
        "towers": [
            tower | {"half": half, "role": roles[half], "name": tower["name"] and _public(tower["name"])}
            for half, tower in summary_towers(summary).items()
        ],
        # The last step is always validated. It may come early, and there is none without a training run.
        "epochs": f"{round(history[-1]['epoch'], 1):g}" if history else None,
        "parameters": round(summary["parameters"] / 1e6, 1),
        "trained_parameters": round(summary["trained_parameters"] / 1e6, 1),
        "examples": summary["examples"],
        "training_minutes": round(summary["training_seconds"] / 60),
        "fit_options": _options(summary.get("fitted_with") or {}),
    }


def _train_command(summary: Mapping[str, Any], checkpoint: Path) -> str | None:
    """Return the command of a training run; `None` if a Python program passed the model or the examples."""
    arguments = summary["arguments"]
    if not arguments["dataset"] or summary.get("checkpoint", arguments.get("checkpoint")) != arguments.get(
        "checkpoint"
    ):
        return None
    names = ("config", "model_type", "seed")
    if not arguments.get("config"):
        names += ("dataset", "checkpoint")
    if arguments.get("classifier_checkpoint"):
        names += ("classifier_checkpoint", "train_text_layers", "num_train_epochs")
    chosen = {name: arguments.get(name) for name in names} | {"output_dir": checkpoint}
    return f"accelerate launch examples/train.py {_options(chosen)}"


def _options(arguments: Mapping[str, Any]) -> str:
    """Return arguments as they are typed on a command line, without those that are None."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return " ".join(
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else _public(value)}"
        for name, value in given.items()
    )


def _public(path: object) -> str:
    """Return the last part of an absolute path; names and relative paths stay."""
    path = str(path).rstrip("/")
    return os.path.basename(path) if os.path.isabs(os.path.expanduser(path)) else path


def _widget(checkpoint: Path, examples: Sequence[str | os.PathLike]) -> list[dict]:
    """Copy the example images that get tags into the checkpoint's folder and return the widget's entries.

    The images are tagged without a title, because the Hub's widget does not ask for one.
    """
    if not examples:
        return []
    tagger = pipeline(TASK, model=str(checkpoint), pipeline_class=TagGenerationPipeline, device="cpu")
    folder = checkpoint / "examples"
    folder.mkdir(exist_ok=True)
    widget = []
    for example in map(Path, examples):
        tags = tagger(example, top_k=MAX_WIDGET_TAGS)
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
