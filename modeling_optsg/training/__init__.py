"""Training that does not depend on the number of processes and can be resumed after any interruption."""

from .arguments import OPTSGTrainingArguments, parse_arguments
from .checkpoints import save_checkpoint
from .data import (
    cache_examples,
    divide_examples,
    examples_fingerprint,
    fit_image_standardizer,
    has_evidence,
    load_examples,
    load_extra_images,
    load_splits,
    load_streams,
    make_stream,
    title_lengths,
    without_untrainable_tags,
)
from .finishing import finish, finished_summary, fit_best_model
from .image_augmentation import AugmentedImages, augment_images
from .image_warmup import warm_up_image_evidence
from .image_word_heads import add_image_words, can_name_images, embed_image_words
from .interruption import RunStatus, StopSignal
from .loop import TrainingLoop
from .losses import gather_candidates, global_loss_weights, weighted_losses
from .model_building import build_model, load_classifier, prepare_for_device
from .processes import check_shared_folders, full_state_dict, make_accelerator, start_trackers
from .run_state import STATE_FOLDER, RunState
from .sampling import GlobalBatches, SeededExamples, num_micro_batches
from .streaming import StreamBatches, TaggedStream, open_stream_shards
from .text_tied_embeddings import (
    class_embeddings,
    copy_without_text_tying,
    initialize_classes_from_text,
    tie_tokens_to_text,
)
from .trainer import OPTSGTrainer
from .unreadable_examples import SkippingCollator

__all__ = [
    "STATE_FOLDER",
    "AugmentedImages",
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
    "TrainingLoop",
    "add_image_words",
    "augment_images",
    "build_model",
    "cache_examples",
    "can_name_images",
    "check_shared_folders",
    "class_embeddings",
    "copy_without_text_tying",
    "embed_image_words",
    "examples_fingerprint",
    "finish",
    "finished_summary",
    "fit_best_model",
    "fit_image_standardizer",
    "full_state_dict",
    "gather_candidates",
    "has_evidence",
    "global_loss_weights",
    "initialize_classes_from_text",
    "load_classifier",
    "load_examples",
    "load_extra_images",
    "load_splits",
    "load_streams",
    "make_accelerator",
    "make_stream",
    "num_micro_batches",
    "open_stream_shards",
    "parse_arguments",
    "prepare_for_device",
    "save_checkpoint",
    "divide_examples",
    "start_trackers",
    "tie_tokens_to_text",
    "title_lengths",
    "warm_up_image_evidence",
    "weighted_losses",
    "without_untrainable_tags",
]
