"""Training that does not depend on the number of processes and can be resumed after any interruption."""

from .arguments import OPTSGTrainingArguments, parse_arguments
from .checkpoints import save_checkpoint
from .data import (
    cache_examples,
    examples_fingerprint,
    load_examples,
    load_splits,
    load_streams,
    make_stream,
    title_lengths,
    without_unreadable,
    without_untrainable_tags,
)
from .finishing import finish, fit_best_model, is_finished
from .interruption import RunStatus, StopSignal
from .losses import gather_candidates, global_loss_weights, weighted_losses
from .model_building import build_model
from .processes import check_shared_folders, full_state_dict, make_accelerator, start_trackers
from .run_state import STATE_FOLDER, RunState
from .sampling import GlobalBatches, SeededExamples, num_micro_batches
from .streaming import StreamBatches, TaggedStream, open_stream_shards
from .text_tied_embeddings import (
    copy_without_text_tying,
    has_class_embeddings,
    tie_classes_to_text,
    tie_tokens_to_text,
)
from .trainer import OPTSGTrainer
from .unreadable_examples import SkippingCollator

__all__ = [
    "STATE_FOLDER",
    "GlobalBatches",
    "OPTSGTrainer",
    "OPTSGTrainingArguments",
    "RunState",
    "RunStatus",
    "SeededExamples",
    "SkippingCollator",
    "StopSignal",
    "StreamBatches",
    "TaggedStream",
    "build_model",
    "cache_examples",
    "check_shared_folders",
    "copy_without_text_tying",
    "examples_fingerprint",
    "finish",
    "fit_best_model",
    "full_state_dict",
    "gather_candidates",
    "global_loss_weights",
    "has_class_embeddings",
    "is_finished",
    "load_examples",
    "load_splits",
    "load_streams",
    "make_accelerator",
    "make_stream",
    "num_micro_batches",
    "open_stream_shards",
    "parse_arguments",
    "save_checkpoint",
    "start_trackers",
    "tie_classes_to_text",
    "tie_tokens_to_text",
    "title_lengths",
    "weighted_losses",
    "without_unreadable",
    "without_untrainable_tags",
]
