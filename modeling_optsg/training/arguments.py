"""Training arguments, which are read from the command line of `examples/train.py` and from JSON files."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import HfArgumentParser

from dataset_scripts.column_names import COLUMN_ARGUMENTS
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.evaluation.calibration import PAD_BIASES
from modeling_optsg.evaluation.metrics import parse_metric
from modeling_optsg.hub.commits import check_repo_id

from .config_file import read_config_file

# These depend on the machine or the user, and are not published.
LOCAL_ARGUMENTS = ("output_dir", "dataset_dir", "cache_dir", "push_to_hub", "hub_private_repo", "hub_revision")
# A run can be resumed with other values of these arguments. The trained weights do not depend on them.
RESUMABLE_ARGUMENTS = (
    *LOCAL_ARGUMENTS,
    "config",
    "per_device_train_batch_size",
    "max_unreadable",
    "dataloader_num_workers",
    "save_steps",
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
)
# Without a value, they are chosen for the number of training examples.
CHOSEN_ARGUMENTS = ("num_train_epochs", "train_batch_size")
# Fewer steps leave a model for a small dataset behind a vote of the nearest neighbours, and with many more it forgets
# what the checkpoint knows: `STEPS_PER_ROOT` times the square root of the number of examples, at most `MAX_FEW_STEPS`.
STEPS_PER_ROOT, MAX_FEW_STEPS = 40, 500
MIN_EPOCHS = 10.0
# Adapters are new, so they learn faster than pretrained weights.
TOWER_LEARNING_RATE, LORA_LEARNING_RATE = 2e-5, 2e-4
# Ranges of arguments.
POSITIVE = (
    "num_frames",
    "max_tag_tokens",
    "tag_vocab_size",
    "image_size",
    "num_train_epochs",
    "train_batch_size",
    "learning_rate",
    "tower_learning_rate",
    "max_grad_norm",
    "num_return_sequences",
    "shuffle_buffer_size",
    "logging_steps",
)
NOT_NEGATIVE = (
    "image_warmup_epochs",
    "num_image_copies",
    "embedding_init_std",
    "embedding_lr_multiplier",
    "weight_decay",
    "num_negatives",
    "num_candidates",
    "lora_rank",
    "max_unreadable",
    "dataloader_num_workers",
    "save_steps",
)
RATIOS = ("extra_image_ratio", "mismatch_ratio", "warmup_ratio")
# A checkpoint has its own values of these arguments. These are the defaults of a training run from pretrained towers.
TOWER_DEFAULTS = {
    "vision_tower": "efficientnet-lite0",
    "text_tower": "all-minilm-l6-v2",
    "image_words": "auto",
    "num_frames": 8,
    "max_tag_tokens": 16,
    "tag_vocab_size": 6000,
}


def _column_help(name: str) -> str:
    text = COLUMN_ARGUMENTS[name]
    return f"{text[0].upper()}{text[1:]}."


def _default_help(name: str) -> str:
    return f"Default: that of --checkpoint, else {TOWER_DEFAULTS[name]}."


@dataclass
class OPTSGTrainingArguments:
    """Arguments of [`OPTSGTrainer`] and of `examples/train.py`; names follow `transformers.TrainingArguments`.

    With `checkpoint`, the arguments in `TOWER_DEFAULTS` and `image_size` are `None` unless they are given.

    Raises:
        ValueError: A value is out of range, or two arguments exclude each other.

    Example:

        >>> from modeling_optsg import OPTSGTrainingArguments
        >>> arguments = OPTSGTrainingArguments("runs/mine", dataset="my_images", num_train_epochs=5)
        >>> arguments.learning_rate, arguments.metric_for_best_model
        (0.0006, 'full_f1')
    """

    # Callbacks of transformers read these.
    load_best_model_at_end: ClassVar[bool] = True
    greater_is_better: ClassVar[bool] = True
    eval_strategy: ClassVar[str] = "steps"

    output_dir: str = field(metadata={"help": "Folder for the best checkpoint, the log and the summary."})
    config: str | None = field(
        default=None, metadata={"help": "JSON file with these arguments. The command line overrides it."}
    )
    config_overrides: str = field(default="{}", metadata={"help": "JSON object with fields of OPTSGConfig."})
    model_type: str = field(
        default="op-tsg", metadata={"help": f"OP-TSG or a baseline. One of {', '.join(MODEL_TYPES)}."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "A benchmark, a folder (docs/datasets.md), or a dataset on the Hub."},
    )
    image_column: str | None = field(default=None, metadata={"help": _column_help("image_column")})
    video_column: str | None = field(default=None, metadata={"help": _column_help("video_column")})
    title_column: str | None = field(default=None, metadata={"help": _column_help("title_column")})
    tags_column: str | None = field(default=None, metadata={"help": _column_help("tags_column")})
    tag_separator: str | None = field(default=None, metadata={"help": _column_help("tag_separator")})
    dataset_dir: str | None = field(default=None, metadata={"help": "Cache folder of the datasets library."})
    cache_dir: str = field(default="~/.cache/optsg", metadata={"help": "Cache folder for tower features."})
    checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint to fine-tune. By default, training starts from pretrained towers."}
    )
    keep_vocabulary: bool = field(
        default=False,
        metadata={"help": "Keep the tags that --checkpoint was trained on: when predicted, they are not novel."},
    )
    classifier_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of --model_type asy on the same tags. The text tower and, if the model has one, the "
            "tag classifier are loaded from it, and frozen if --train_text_layers is 0."
        },
    )
    vision_tower: str | None = field(
        default=None,
        metadata={
            "help": "A packaged tower, a folder or a Hub name. Use none for a dataset with frame features. "
            + _default_help("vision_tower")
        },
    )
    text_tower: str | None = field(
        default=None, metadata={"help": f"A packaged tower, a folder or a Hub name. {_default_help('text_tower')}"}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels to which images are resized, without cropping. Default: the "
            "preprocessing of --checkpoint, else that of the vision tower."
        },
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower as well."})
    augment_images: bool = field(
        default=True,
        metadata={
            "help": "If the vision tower is trained, change the training images differently in each epoch: size, "
            "position and angle, the colours of photographs and the stroke width of drawings."
        },
    )
    train_text_layers: int = field(
        default=0,
        metadata={"help": "Number of upper layers of the text tower to train. 0 freezes it; -1 trains all of it."},
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA adapters, which are trained instead of the weights of towers. They are added to the "
            "layers that --train_vision_tower and --train_text_layers select, or to both towers if neither is given. "
            "0: no adapters."
        },
    )
    save_adapter: bool = field(
        default=False,
        metadata={"help": "Also save the LoRA adapters, which are merged into the weights of the checkpoint."},
    )
    image_words: str | None = field(
        default=None,
        metadata={
            "help": "Words for images without a title. auto: the class names of an image classifier, or the 1,000 "
            "most frequent training tags for a two-tower model such as CLIP. none: no image words. A file: one word "
            f"per line, for two-tower models. {_default_help('image_words')}"
        },
    )
    extra_images: str | None = field(
        default=None,
        metadata={
            "help": "Dataset with extra images: NAME, NAME:CONFIGURATION or none. The images of its training split "
            "are used in the image warm-up. They also replace images with the same title: --extra_image_ratio."
        },
    )
    num_image_copies: int = field(
        default=0,
        metadata={
            "help": "Number of augmented copies of each training image (different size, position, angle and stroke "
            "width), used like extra images."
        },
    )
    extra_image_ratio: float = field(
        default=0.5,
        metadata={"help": "Probability that an extra image with the same title replaces a training image."},
    )
    image_warmup_epochs: float = field(
        default=0.0,
        metadata={"help": "Epochs of the image warm-up, which trains only the image layers of the tag classifier."},
    )
    mismatch_ratio: float = field(
        default=0.1,
        metadata={"help": "Probability of a mismatched image, so that the model learns to ignore such images."},
    )
    num_frames: int | None = field(
        default=None, metadata={"help": f"Maximum number of frames per video. {_default_help('num_frames')}"}
    )
    max_tag_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum length of a tag in tokens. Longer training tags are skipped. "
            + _default_help("max_tag_tokens")
        },
    )
    tag_vocab_size: int | None = field(
        default=None, metadata={"help": f"Vocabulary size of the tag tokenizer. {_default_help('tag_vocab_size')}"}
    )
    validation_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Ratio of training examples for validation if there is no validation split. Default: a tenth, "
            "or more of fewer than 100 examples."
        },
    )
    train_ratio: float = field(
        default=1.0,
        metadata={"help": "Ratio of training examples to use. The selection does not depend on the seed."},
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Number of epochs. Default: depends on the number of examples."}
    )
    train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples per training step, across all processes. Default: depends on the number of examples."
        },
    )
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Maximum number of examples per forward pass. Larger batches use gradient accumulation."},
    )
    group_by_length: bool = field(
        default=False, metadata={"help": "Group examples with titles of similar length to reduce padding."}
    )
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate of AdamW."})
    tower_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of towers that are trained. Default: 2e-5, or 2e-4 with --lora_rank."},
    )
    embedding_init_std: float = field(
        default=0.06,
        metadata={
            "help": "Standard deviation of the text-initialised token embeddings. "
            "0 initialises them randomly instead of from text."
        },
    )
    embedding_lr_multiplier: float = field(
        default=0.3,
        metadata={"help": "Factor on learning_rate for token and class embeddings, to keep them near their text."},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass, which saves memory and takes more time."},
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    warmup_ratio: float = field(
        default=0.05, metadata={"help": "Ratio of steps with a linear warmup of the learning rate."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm."})
    num_negatives: int = field(
        default=2000,
        metadata={"help": "Number of random training tags added to each step as negatives of the tag alignment."},
    )
    eval_steps: float = field(
        default=0.2,
        metadata={
            "help": "Steps between two validations. A value below 1 is a ratio of all steps. "
            "The last step is always followed by a validation."
        },
    )
    metric_for_best_model: str = field(
        default="full_f1",
        metadata={
            "help": "Validation metric that selects the best checkpoint and the generation settings. a+b is the mean "
            "of two metrics. a@b>=c is metric a with metric b of at least c."
        },
    )
    num_return_sequences: int = field(
        default=1, metadata={"help": "Maximum number of tags per slot, found by beam search after training."}
    )
    num_candidates: int = field(
        default=50, metadata={"help": "Number of classifier candidates added to the generated tags."}
    )
    pad_biases: list[float] = field(
        default_factory=lambda: list(PAD_BIASES), metadata={"help": "Values of pad_bias to try after training."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16 or bf16. Default: the setting of accelerate."}
    )
    save_half_precision: bool = field(
        default=False,
        metadata={
            "help": "Save weights in 16 bits, and large tables and layers in 8 bits. They are loaded as 32-bit."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream the examples. Nothing is built or cached before training."}
    )
    num_stream_shards: int = field(
        default=16,
        metadata={"help": "Maximum number of stream shards. They are read in parallel and divided among processes."},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Number of examples in the shuffle buffer, for all stream shards together."}
    )
    max_unreadable: int = field(default=100, metadata={"help": "Maximum number of unreadable training examples."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Number of data loader workers per process."})
    save_steps: int = field(
        default=500,
        metadata={
            "help": "Steps between two saved states of the run. With 0, states are saved only before validations."
        },
    )
    resume_from_checkpoint: str = field(
        default="auto",
        metadata={
            "help": "auto: resume the last state of this run; never: start over; or the folder of a saved state."
        },
    )
    logging_steps: int = field(default=100, metadata={"help": "Steps between two rows of training_log.jsonl."})
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers of accelerate to report to, such as tensorboard."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Hub repository to push the model to at the end of training, as org/name."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Create the repository as private."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to. Default: main."})
    seed: int = field(default=0, metadata={"help": "Random seed."})

    def __post_init__(self) -> None:
        """Check the values that can be checked without the data.

        Raises:
            ValueError: A value is out of range, or two arguments exclude each other.
        """
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"--model_type {self.model_type} is unknown; expected one of {', '.join(MODEL_TYPES)}")
        self._check_ranges()
        if not self.checkpoint:
            for name, value in TOWER_DEFAULTS.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        spec = MODEL_TYPES[self.model_type]
        if spec.needs_book or not spec.is_trained:
            # These find neighbours by the features of frozen towers.
            self.train_text_layers = 0
        self._set_lora(has_frozen_towers=spec.needs_book or not spec.is_trained)
        parse_metric(self.metric_for_best_model)
        if self.checkpoint and self.classifier_checkpoint:
            raise ValueError("--checkpoint and --classifier_checkpoint exclude each other")
        if self.train_text_layers < -1:
            raise ValueError(f"--train_text_layers {self.train_text_layers} must be at least -1")
        for name in ("image_warmup_epochs", "num_image_copies"):
            if getattr(self, name) and self.streaming:
                raise ValueError(f"--{name} needs cached features, so it cannot be combined with --streaming")
        if self.group_by_length and self.streaming:
            raise ValueError("--group_by_length needs random access, so it cannot be combined with --streaming")
        if self.num_stream_shards < 2:
            raise ValueError(f"--num_stream_shards {self.num_stream_shards} must be at least 2")
        if not 0 < self.train_ratio <= 1:
            raise ValueError(f"--train_ratio {self.train_ratio} must be above 0 and at most 1")
        if self.eval_steps <= 0 or (self.eval_steps > 1 and not float(self.eval_steps).is_integer()):
            raise ValueError(f"--eval_steps {self.eval_steps} must be a ratio below 1 or a whole number of steps")
        if self.push_to_hub:
            try:
                check_repo_id(self.push_to_hub)
            except ValueError as error:
                raise ValueError(f"--push_to_hub: {error}") from error

    def _check_ranges(self) -> None:
        ranges = (
            (POSITIVE, lambda value: value > 0, "must be positive"),
            (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
            (RATIOS, lambda value: 0 <= value <= 1, "must be between 0 and 1"),
            (("validation_ratio",), lambda value: 0 < value < 1, "must be above 0 and below 1"),
        )
        for names, is_valid, rule in ranges:
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_valid(value):
                    raise ValueError(f"--{name} {value} {rule}")
        try:
            is_object = isinstance(json.loads(self.config_overrides), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError(f"--config_overrides {self.config_overrides} must be a JSON object")
        if self.keep_vocabulary and not self.checkpoint:
            raise ValueError("--keep_vocabulary needs --checkpoint")

    def _set_lora(self, has_frozen_towers: bool) -> None:
        """Choose the towers that get adapters, and the learning rate of the towers."""
        if self.save_adapter and not self.lora_rank:
            raise ValueError("--save_adapter needs --lora_rank")
        if self.lora_rank and has_frozen_towers:
            raise ValueError(
                f"--model_type {self.model_type} needs frozen towers; it cannot be combined with --lora_rank"
            )
        if self.lora_rank and not self.train_vision_tower and self.train_text_layers == 0:
            self.train_vision_tower, self.train_text_layers = self.vision_tower != "none", -1
        if self.tower_learning_rate is None:
            self.tower_learning_rate = LORA_LEARNING_RATE if self.lora_rank else TOWER_LEARNING_RATE

    def column_arguments(self) -> dict[str, str | None]:
        """Return the arguments of [`load_tagging_dataset`] that name the columns of the dataset."""
        return {name: getattr(self, name) for name in COLUMN_ARGUMENTS}

    def result_arguments(self) -> dict[str, object]:
        """Return the arguments that the trained weights depend on."""
        return {name: value for name, value in vars(self).items() if name not in RESUMABLE_ARGUMENTS}

    def public_arguments(self) -> dict[str, object]:
        """Return the arguments that do not depend on the machine or the user."""
        return {name: value for name, value in vars(self).items() if name not in LOCAL_ARGUMENTS}

    def for_examples(self, number: int) -> "OPTSGTrainingArguments":
        """Return a copy in which the arguments without a value are chosen for a number of training examples.

        The batch size is the power of two nearest to a tenth of n examples, from 8 to 64, but at most n. Training
        takes 40 √n steps, at most 500, but at least 10 epochs.
        """
        batch_size, epochs = self.train_batch_size, self.num_train_epochs
        if batch_size is None:
            batch_size = min(2 ** round(math.log2(min(max(number / 10, 8), 64))), number)
        if epochs is None:
            steps = min(STEPS_PER_ROOT * math.sqrt(number), MAX_FEW_STEPS)
            epochs = max(MIN_EPOCHS, float(math.ceil(steps * min(batch_size, number) / number)))
        chosen = copy.copy(self)
        chosen.train_batch_size, chosen.num_train_epochs = batch_size, epochs
        return chosen

    def evaluation_steps(self, total_steps: int) -> set[int]:
        """Return the steps that are followed by a validation, including the last step."""
        interval = math.ceil(total_steps * self.eval_steps) if self.eval_steps < 1 else int(self.eval_steps)
        return {*range(interval, total_steps, interval), total_steps}


def parse_arguments(argv: Sequence[str] | None = None, prog: str | None = None) -> OPTSGTrainingArguments:
    """Read training arguments from a command line and from its JSON file, `--config`.

    Args:
        argv: Words of the command line. Default: `sys.argv[1:]`.
        prog: Name of the program in messages. Default: the name of the file that is run.

    Returns:
        The arguments. If one is invalid, the program exits with a message and status 2, as with `argparse`.
    """
    parser = HfArgumentParser(OPTSGTrainingArguments, prog=prog, usage="%(prog)s --output_dir FOLDER [arguments]")
    config_file = parser.parse_known_args(argv)[0].config
    if config_file:
        try:
            values = read_config_file(config_file, parser)
        except ValueError as error:
            parser.error(str(error))
        parser.set_defaults(**values)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments
