"""Parts of a training loop: batches that do not depend on the number of processes, and checkpoints that survive."""

from .arguments import LOCAL_ARGUMENTS, TrainArguments, parse_arguments
from .checkpoints import save_checkpoint
from .data import (
    VALIDATION_ROWS,
    items_digest,
    load_splits,
    load_streams,
    title_lengths,
    without_unreadable,
    without_untrainable_tags,
)
from .interruption import Interrupted, RunStatus, StopSignal, end_workers, ignore_sigterm
from .losses import share_candidates, weigh_losses, weighted_losses
from .model_building import build
from .optimizer import parameter_groups
from .processes import make_accelerator, prepare_model, prepare_training, refuse_unshared, shard_model, whole_state
from .run_state import RunState, refuse_other_run
from .sampling import GlobalBatches, SeededItems, micro_batches
from .slot_changes import MatchingMoves
from .streaming import StreamBatches, TaggedStream, open_lanes
from .training_log import TrainingLog
from .unreadable_examples import CollatedItems, CollateReadable, Unreadable
from .validation import samples, validate

__all__ = [
    "LOCAL_ARGUMENTS",
    "VALIDATION_ROWS",
    "CollateReadable",
    "CollatedItems",
    "GlobalBatches",
    "Interrupted",
    "MatchingMoves",
    "RunState",
    "RunStatus",
    "SeededItems",
    "StopSignal",
    "StreamBatches",
    "TaggedStream",
    "TrainArguments",
    "TrainingLog",
    "Unreadable",
    "build",
    "end_workers",
    "ignore_sigterm",
    "items_digest",
    "load_splits",
    "load_streams",
    "make_accelerator",
    "micro_batches",
    "open_lanes",
    "parameter_groups",
    "parse_arguments",
    "prepare_model",
    "prepare_training",
    "refuse_other_run",
    "refuse_unshared",
    "samples",
    "save_checkpoint",
    "shard_model",
    "share_candidates",
    "title_lengths",
    "validate",
    "weigh_losses",
    "weighted_losses",
    "whole_state",
    "without_unreadable",
    "without_untrainable_tags",
]
