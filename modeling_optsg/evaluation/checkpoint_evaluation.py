"""Evaluation of a checkpoint on a split of a dataset, next to the kNN baseline on the same towers."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, GenerationConfig

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.registry import MODEL_TYPES, find_model_type
from modeling_optsg.baselines.retrieval import BOOK_FOLDER, ExampleRetriever, ExamplesWithBook
from modeling_optsg.data.atomic_files import write_text
from modeling_optsg.data.feature_cache import CachedFeatures, cache_readable_examples
from modeling_optsg.data.splits import split_examples
from modeling_optsg.data.training_summary import SUMMARY, read_training_summary
from modeling_optsg.generation_settings import FITTED_SETTINGS, setting_of_decoding
from modeling_optsg.processing_optsg import OPTSGProcessor

from .calibration import reliability
from .knn_comparison import score_knn, validate_knn
from .metrics import TagEvaluator
from .prediction import predict_tags
from .reporting import environment, novel_hits, score_modalities

# The training arguments that choose the examples, with their defaults.
SPLIT_ARGUMENTS = {"validation_ratio": None, "seed": 0, "train_ratio": 1.0, "streaming": False}
# The key of the only decoding of a model, as in the training summary.
ONLY = "only"
COLUMNS = {
    "full_f1": "Full F1",
    "rare_f1": "Rare F1",
    "common_f1": "Common F1",
    "micro_f1": "Micro F1",
    "tags_per_example": "tags per example",
}


@dataclass
class EvaluationSplits:
    """The examples that a checkpoint is evaluated on, and those that kNN is fitted on.

    Args:
        name: Name of the evaluated split.
        examples: Its examples.
        train: Training examples; `None` if there are none to compare with.
        validation: Validation examples; `None` if there are no training examples.
        notes: What the user should know about the choice, in sentences.
        knn_left_out: Why kNN is left out, in words; `None` if it is not.
    """

    name: str
    examples: Dataset
    train: Dataset | None = None
    validation: Dataset | None = None
    notes: list[str] = field(default_factory=list)
    knn_left_out: str | None = None


def evaluate_checkpoint(
    checkpoint: str,
    dataset: Mapping[str, Dataset],
    dataset_name: str,
    *,
    split: str | None = None,
    cache_dir: str | Path,
    max_unreadable: int = 100,
    batch_size: int = 64,
) -> dict:
    """Evaluate all decodings of a checkpoint, and the kNN baseline on its towers.

    The decoding settings are those of the checkpoint. Nothing is fitted on the evaluated examples, except the settings
    of kNN if these are the validation examples (see [`validate_knn`]).

    Args:
        checkpoint: Folder or Hub name of a model of `MODEL_TYPES`.
        dataset: Splits of [`load_tagging_dataset`].
        dataset_name: What messages call the dataset.
        split: Name of the split to evaluate, see [`choose_splits`].
        cache_dir: Cache folder for tower features.
        max_unreadable: Maximum number of unreadable examples per split. They are left out and listed in the result.
        batch_size: Number of examples per batch.

    Returns:
        A dictionary for a JSON file, without NaN (see docs/evaluation.md). [`result_lines`] shows the main metrics.

    Raises:
        OSError: The checkpoint cannot be loaded.
        ValueError: The checkpoint is of another kind or damaged, the split does not exist or has no tags, or more than
            `max_unreadable` examples cannot be read.
    """
    start = time.perf_counter()
    state = PartialState()  # the loggers of accelerate need it, too
    summary = read_training_summary(checkpoint)
    splits = choose_splits(dataset, dataset_name, split, summary)
    model_type, model, processor = load_checkpoint(checkpoint)
    model.to(state.device)
    spec = MODEL_TYPES[model_type]
    if splits.knn_left_out is None and model_type == "knn":
        splits.knn_left_out = "the model is kNN itself"

    settings = {"max_unreadable": max_unreadable, "batch_size": batch_size}
    parts, unreadable = _cache(splits, model, processor, Path(cache_dir) / "features", settings)
    if splits.validation is not None and "validation" not in dataset:
        splits.notes += _changes(summary, dataset_name, {len(splits.validation), len(parts["validation"])})
    counts = processor.label_vocabulary if splits.train is None else _tag_counts(parts["train"])
    examples = parts[splits.name]
    try:
        evaluator = TagEvaluator(examples.dataset["tags"], counts)
    except ValueError as error:
        raise ValueError(f"{dataset_name}, split {splits.name}: {error}") from error
    knn = _compare_with_knn(splits, model, processor, parts, evaluator, batch_size)
    if spec.needs_book:
        examples = _with_book(examples, checkpoint, model, processor)

    result = {
        "checkpoint": checkpoint,
        "model_type": model_type,
        "dataset": dataset_name,
        "split": splits.name,
        "examples": len(examples),
        "evaluated_tags": len(evaluator.evaluated_tags),
        splits.name: {
            decoding or ONLY: _score_decoding(model, processor, examples, evaluator, decoding, spec.fitted, batch_size)
            for decoding in spec.decodings
        },
        "modalities": score_modalities(model, processor, examples, evaluator, batch_size=batch_size),
    }
    result |= knn | {"unreadable_examples": unreadable, "notes": splits.notes}
    if "arguments" in summary:
        result |= {"seed": summary["arguments"].get("seed"), "training_seconds": summary.get("training_seconds")}
    return result | {"seconds": round(time.perf_counter() - start, 1)} | environment()


def write_result(result: Mapping, path: str | Path) -> None:
    """Write the result of [`evaluate_checkpoint`] to a JSON file, whose folder is created if necessary."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def choose_splits(
    dataset: Mapping[str, Dataset], dataset_name: str, split: str | None, summary: Mapping
) -> EvaluationSplits:
    """Choose the examples to evaluate on, and the training and validation examples to compare with.

    Without a validation split, the same training examples are set aside as in the training of the checkpoint.

    Args:
        dataset: Splits by name.
        dataset_name: What messages call the dataset.
        split: Name of the split. `None` for the test split, or else the validation split, or else the examples that
            are set aside. "validation" also stands for the latter.
        summary: Training summary of the checkpoint, with the arguments that set examples aside. Defaults of the
            training if it has none.

    Raises:
        ValueError: The split does not exist, no split can be chosen, or too few examples can be set aside.
    """
    names = {*dataset, *(["validation"] if "train" in dataset else [])}
    name = split or next((name for name in ("test", "validation") if name in names), None)
    if name is None:
        raise ValueError(f"{dataset_name} has no split test, validation or train; choose one of {_list(names)}.")
    if name not in names:
        raise ValueError(f"{dataset_name} has no split {name}; choose one of {_list(names)}.")
    if name == "train":
        note = "These are training examples: expect lower metrics on new examples."
        reason = "the nearest neighbour of a training example is the example itself"
        return EvaluationSplits(name, dataset[name], notes=[note], knn_left_out=reason)
    if "train" not in dataset:
        note = f"{dataset_name} has no train split: rare and common tags are those of the label vocabulary."
        return EvaluationSplits(name, dataset[name], notes=[note], knn_left_out="there is no train split")
    arguments = summary.get("arguments", {})
    chosen = {argument: arguments.get(argument, default) for argument, default in SPLIT_ARGUMENTS.items()}
    train, validation = split_examples(
        dataset,
        validation_ratio=chosen["validation_ratio"],
        seed=chosen["seed"],
        train_ratio=chosen["train_ratio"],
        by_id=chosen["streaming"],
    )
    examples = validation if name == "validation" else dataset[name]
    if not len(validation):
        raise ValueError(f"{dataset_name}: no training example is set aside for validation. Add a validation split.")
    notes = _notes(dataset, dataset_name, len(validation), chosen, arguments)
    return EvaluationSplits(name, examples, train, validation, notes)


def _notes(
    dataset: Mapping[str, Dataset], dataset_name: str, num_set_aside: int, chosen: Mapping, arguments: Mapping
) -> list[str]:
    """Describe which training examples are set aside and which are used."""
    notes = []
    if "validation" not in dataset:
        source = f"as in the training of the checkpoint on {arguments.get('dataset')}"
        if "seed" not in arguments:
            source = f"but the checkpoint has no {SUMMARY} and may have been trained on them"
        notes.append(
            f"{dataset_name} has no validation split: {num_set_aside:,} of its {len(dataset['train']):,} training "
            f"examples are set aside (seed {chosen['seed']}), {source}."
        )
    if chosen["train_ratio"] < 1:
        notes.append(f"{chosen['train_ratio']} of the training examples are used, as in the training.")
    return notes


def _changes(summary: Mapping, dataset_name: str, num_set_aside: set[int]) -> list[str]:
    """Warn if the dataset of the training now sets other examples aside."""
    is_same = Path(str(summary.get("arguments", {}).get("dataset"))).name == Path(dataset_name).name
    before = summary.get("examples", {}).get("validation")
    if not is_same or before is None or before in num_set_aside:
        return []
    return [
        f"The training set {before:,} examples aside. {dataset_name} has changed since, so the model may have been "
        "trained on some of the examples."
    ]


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def load_checkpoint(checkpoint: str) -> tuple[str, OPTSGPreTrainedModel, OPTSGProcessor]:
    """Load a model of any type, in evaluation mode, and its processor.

    Args:
        checkpoint: Folder or Hub name.

    Returns:
        The model type, the model and the processor.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: It is of another kind, or weights are missing.
    """
    model_type = find_model_type(AutoConfig.from_pretrained(checkpoint))
    model, loading = MODEL_TYPES[model_type].model.from_pretrained(checkpoint, output_loading_info=True)
    if missing := loading["missing_keys"]:
        raise ValueError(f"{checkpoint}: {len(missing)} weights are missing, such as {sorted(missing)[0]}.")
    return model_type, model.eval(), OPTSGProcessor.from_pretrained(checkpoint)


def _cache(
    splits: EvaluationSplits,
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    folder: Path,
    settings: Mapping,
) -> tuple[dict[str, CachedFeatures], dict[str, dict[str, str]]]:
    """Compute tower features of the evaluated split, and of the others if kNN needs them.

    Returns:
        Readable examples and reasons for the others, by split.
    """
    rows = {splits.name: splits.examples}
    if splits.train is not None:
        rows |= {"train": splits.train, "validation": splits.validation}
    parts, unreadable = {}, {}
    for name, own in rows.items():
        try:
            parts[name], _, reasons = cache_readable_examples(own, model.model, processor, folder, **settings)
        except ValueError as error:
            raise ValueError(f"Split {name}: {error}") from error
        if reasons:
            unreadable[name] = reasons
    return parts, unreadable


def _tag_counts(examples: CachedFeatures) -> Counter:
    return Counter(tag for tags in examples.dataset["tags"] for tag in set(tags))


def _with_book(
    examples: CachedFeatures, checkpoint: str, model: OPTSGPreTrainedModel, processor: OPTSGProcessor
) -> ExamplesWithBook:
    folder = Path(checkpoint, BOOK_FOLDER)
    if not folder.is_dir():
        raise ValueError(
            f"{checkpoint} has no folder {BOOK_FOLDER}, which examples/train.py saves with an open-book model."
        )
    return ExamplesWithBook(examples, ExampleRetriever.load(folder), model.config, processor.tag_tokenizer)


def _score_decoding(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    decoding: str | None,
    fitted: Sequence[str],
    batch_size: int,
) -> dict:
    """Score one decoding: metrics, its settings, its speed, novel tags and the reliability of its probabilities."""
    settings = _decoding_settings(model.generation_config, decoding, fitted)
    kwargs = {"batch_size": batch_size} | ({} if decoding is None else {"decoding": decoding})
    start = time.perf_counter()
    predictions = predict_tags(model, processor, examples, **kwargs)
    seconds = time.perf_counter() - start
    unfiltered = predict_tags(model, processor, examples, **kwargs, threshold=0.0)
    return (
        evaluator.score(predictions)
        | settings
        | {
            "seconds_per_example_without_towers": round(seconds / len(examples), 5),
            "novel": novel_hits(predictions, evaluator.references),
            "reliability": reliability(unfiltered, evaluator.references),
        }
    )


def _decoding_settings(config: GenerationConfig, decoding: str | None, fitted: Sequence[str]) -> dict:
    """Return the fitted settings of a decoding, as `generate` reads them."""
    names = dict.fromkeys([*FITTED_SETTINGS, *fitted])
    if decoding is None:
        settings = {name: getattr(config, name, None) for name in names}
    else:
        settings = {name: setting_of_decoding(config, name, decoding) for name in names}
    return {name: value for name, value in settings.items() if value is not None}


def _compare_with_knn(
    splits: EvaluationSplits,
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    parts: Mapping[str, CachedFeatures],
    evaluator: TagEvaluator,
    batch_size: int,
) -> dict:
    """Score kNN on the evaluated split, or say why it is left out."""
    if splits.knn_left_out is not None:
        return {"knn": None, "knn_left_out": splits.knn_left_out}
    train, validation = parts["train"], parts["validation"]
    if not {tag for tags in validation.dataset["tags"] for tag in tags} & evaluator.train_counts.keys():
        reason = "no tag of the validation examples is a training tag, so its settings cannot be fitted"
        return {"knn": None, "knn_left_out": reason}
    if splits.name == "validation":
        return {"knn": validate_knn(model, processor, train, validation, evaluator, batch_size=batch_size)}
    validation_evaluator = TagEvaluator(validation.dataset["tags"], evaluator.train_counts)
    arguments = (model, processor, train, validation, validation_evaluator, parts[splits.name], evaluator)
    return {"knn": score_knn(*arguments, batch_size=batch_size)}


def result_lines(result: Mapping) -> list[str]:
    """Return the main metrics of [`evaluate_checkpoint`] as lines of text: notes, a table and the comparison."""
    split = result["split"]
    lines = [
        f"{result['checkpoint']} ({result['model_type']}) on {result['dataset']}, split {split}: "
        f"{result['examples']:,} examples, {result['evaluated_tags']:,} evaluated tags",
        *result["notes"],
    ]
    for name, reasons in result["unreadable_examples"].items():
        lines.append(f"Split {name}: {len(reasons):,} unreadable examples left out: {next(iter(reasons.values()))}")
    rows = dict(result[split]) | ({"nearest neighbours": result["knn"]} if result["knn"] else {})
    width = max(map(len, rows))
    lines.append("  ".join([" " * width, *COLUMNS.values()]))
    for name, metrics in rows.items():
        cells = [f"{_cell(metrics[key]):>{len(title)}}" for key, title in COLUMNS.items()]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    decoding, metrics = next(iter(result[split].items()))
    own = f"your model {_cell(metrics['full_f1'])}" + ("" if decoding == ONLY else f" ({decoding})")
    if result["knn"]:
        lines.append(f"Full F1: {own}, nearest neighbours {_cell(result['knn']['full_f1'])}")
    else:
        lines.append(f"Full F1: {own}; nearest neighbours are left out: {result['knn_left_out']}")
    return lines


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
