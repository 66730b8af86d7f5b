"""Parts of a training loop: batches that do not depend on the number of processes, and checkpoints that survive."""

from .arguments import LOCAL_ARGUMENTS, OPTSGTrainingArguments, parse_arguments
from .checkpoints import save_checkpoint
from .data import (
    VALIDATION_ROWS,
    examples_fingerprint,
    load_splits,
    load_streams,
    title_lengths,
    without_unreadable,
    without_untrainable_tags,
)
from .interruption import Interrupted, RunStatus, StopSignal, end_workers, ignore_sigterm
from .losses import gather_candidates, global_loss_weights, weighted_losses
from .model_building import build
from .optimizer import parameter_groups
from .processes import make_accelerator, prepare_model, prepare_training, refuse_unshared, shard_model, whole_state
from .run_state import RunState, refuse_other_run
from .sampling import GlobalBatches, SeededExamples, micro_batches
from .slot_changes import SlotChanges
from .streaming import StreamBatches, TaggedStream, open_shards
from .training_log import TrainingLog
from .unreadable_examples import CollatedExamples, CollateReadable, Unreadable
from .validation import sample_predictions, validate

__all__ = [
    "LOCAL_ARGUMENTS",
    "VALIDATION_ROWS",
    "CollateReadable",
    "CollatedExamples",
    "GlobalBatches",
    "Interrupted",
    "SlotChanges",
    "RunState",
    "RunStatus",
    "SeededExamples",
    "StopSignal",
    "StreamBatches",
    "TaggedStream",
    "OPTSGTrainingArguments",
    "TrainingLog",
    "Unreadable",
    "build",
    "end_workers",
    "ignore_sigterm",
    "examples_fingerprint",
    "load_splits",
    "load_streams",
    "make_accelerator",
    "micro_batches",
    "open_shards",
    "parameter_groups",
    "parse_arguments",
    "prepare_model",
    "prepare_training",
    "refuse_other_run",
    "refuse_unshared",
    "sample_predictions",
    "save_checkpoint",
    "shard_model",
    "gather_candidates",
    "title_lengths",
    "validate",
    "global_loss_weights",
    "weighted_losses",
    "whole_state",
    "without_unreadable",
    "without_untrainable_tags",
]
