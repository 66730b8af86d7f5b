"""The end of a training run: generation settings fitted on the validation examples, and the summary."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.utils import cached_file

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.data.training_summary import SUMMARY
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.evaluation.metrics import TagEvaluator
from modeling_optsg.processing_optsg import OPTSGProcessor

from .arguments import CHOSEN_ARGUMENTS, OPTSGTrainingArguments
from .data import VALIDATION_ROWS
from .interruption import RunStatus
from .run_state import STATE_FOLDER, check_same_run, delete_states

logger = get_logger(__name__)

# Below this, the fit follows single examples.
MIN_VALIDATION_EXAMPLES = 50
NOTICES = ("LICENSE", "NOTICE")


def fit_best_model(
    args: OPTSGTrainingArguments,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    device: str,
) -> tuple[OPTSGPreTrainedModel, dict[str, dict]]:
    """Fit the generation settings of the best checkpoint, for each of its decodings, and save them.

    Args:
        args: Training arguments.
        processor: Processor of the model.
        examples: Validation examples.
        evaluator: Evaluator for them.
        device: Device to generate on.

    Returns:
        The model, and the fit of each decoding ("only" for a model with a single one).
    """
    if len(examples) < MIN_VALIDATION_EXAMPLES:
        logger.warning(
            f"Only {len(examples)} validation examples: thresholds and probabilities are not reliable. Use at least "
            f"{MIN_VALIDATION_EXAMPLES}."
        )
    model_type = MODEL_TYPES[args.model_type]
    model = model_type.model.from_pretrained(args.output_dir).to(device)
    model_type.set_search(model, args.num_return_sequences, args.num_candidates)
    fits = {}
    for decoding in model_type.decodings:
        fit = fits[decoding or "only"] = fit_generation_config(
            model,
            processor,
            examples,
            evaluator,
            decoding=decoding,
            metric_for_best_model=args.metric_for_best_model,
            grid=model_type.grid(args.pad_biases),
        )
        logger.info(
            f"{decoding or 'only'}: pad_bias {fit.get('pad_bias')}, threshold {fit['threshold']}, validation "
            + ", ".join(f"{name} {value:.1f}" for name, value in main_metrics(fit["validation"]).items())
        )
    model.generation_config.save_pretrained(args.output_dir)
    return model, fits


def main_metrics(metrics: Mapping) -> dict[str, float]:
    """Return Full F1 and micro F1 by their names. Full F1 is left out if no ground-truth tag is a training tag."""
    found = {"Full F1": metrics["full_f1"], "micro F1": metrics["micro_f1"]}
    return {name: value for name, value in found.items() if value is not None}


def finish(args: OPTSGTrainingArguments, status: RunStatus, summary: Mapping) -> None:
    """Write the summary, set the status "finished" and delete the saved states.

    Args:
        args: Training arguments.
        status: Status of the run.
        summary: Content of the summary besides the arguments.
    """
    output_dir = Path(args.output_dir)
    content = json.dumps({"arguments": args.public_arguments(), **summary}, indent=1, allow_nan=False)
    (output_dir / SUMMARY).write_text(content + "\n", encoding="utf-8")
    status.set("finished")
    delete_states(output_dir / STATE_FOLDER)
    (output_dir / VALIDATION_ROWS).unlink(missing_ok=True)


def copy_notices(checkpoint: str | None, output_dir: str | os.PathLike) -> None:
    """Copy the licence and the notices of a fine-tuned checkpoint, which its weights must keep.

    Args:
        checkpoint: Folder or Hub name of the checkpoint; `None` without one.
        output_dir: Folder of the new checkpoint. Files in it are kept.
    """
    for name in NOTICES if checkpoint else ():
        path = cached_file(
            checkpoint,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is not None and not os.path.lexists(Path(output_dir, name)):
            shutil.copyfile(path, Path(output_dir, name))


def finished_summary(args: OPTSGTrainingArguments, status: RunStatus, data: str | None = None) -> dict | None:
    """Return the summary of this run if it has finished already, and log that.

    Args:
        args: Training arguments.
        status: Status of the run.
        data: Fingerprint of the examples and of the given model. `None` to compare only the arguments.

    Raises:
        ValueError: A run with other arguments or other examples has finished in this folder, or the summary is
            damaged.
    """
    summary = Path(args.output_dir, SUMMARY)
    if args.resume_from_checkpoint != "auto" or not summary.exists():
        return None
    found_status = status.read().get("status")
    # A run deletes the summary of an earlier one, and its own states at its end.
    is_finished = found_status == "damaged" and not any(Path(args.output_dir, STATE_FOLDER).glob("step-*"))
    if found_status != "finished" and not is_finished:
        return None
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        found["arguments"], found["examples"]["train"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{summary} is damaged ({type(error).__name__}: {error}), so its arguments are unknown. "
            "To train again, pass --resume_from_checkpoint never."
        ) from error
    own = args.result_arguments()
    # Those that depend on the examples were chosen for them.
    own = {name: value for name, value in own.items() if name not in CHOSEN_ARGUMENTS or value is not None}
    if own.get("train_batch_size", 0) > found["examples"]["train"]:
        # A step had all the examples, and the summary says how many.
        own["train_batch_size"] = found["arguments"]["train_batch_size"]
    saved = {name: found["arguments"].get(name) for name in own}
    if data is not None and found.get("data") is not None:
        own, saved = own | {"data": data}, saved | {"data": found["data"]}
    check_same_run(saved, own, args.output_dir)
    logger.info(f"{args.output_dir} is finished. To train again, give --resume_from_checkpoint never.")
    return found
