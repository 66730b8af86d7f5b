"""What a training is asked for: a command line, and presets of it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.evaluation.calibration import PAD_BIASES
from modeling_optsg.hub.commits import check_repo_id

LOCAL_ARGUMENTS = ("output_dir", "dataset_dir", "cache_dir", "push_to_hub", "hub_private_repo", "hub_revision")
# What a run may be resumed with other values of: nothing it ends with depends on them.
FREE_ARGUMENTS = (
    *LOCAL_ARGUMENTS,
    "preset",
    "per_device_train_batch_size",
    "num_workers",
    "save_steps",
    "resume",
    "logging_steps",
    "report_to",
)


@dataclass
class OPTSGTrainingArguments:
    """Arguments of `examples/train.py`."""

    output_dir: str = field(metadata={"help": "Where the best checkpoint, its log and its summary go."})
    preset: str | None = field(
        default=None, metadata={"help": "JSON file of arguments; the command line overrides it."}
    )
    system: str = field(default="op-tsg", metadata={"help": f"Which system: {', '.join(MODEL_TYPES)}."})
    dataset: str = field(
        default="icon_tagging",
        metadata={"help": "A benchmark, a folder with a metadata file or of Parquet, or a Hub name."},
    )
    dataset_dir: str | None = field(default=None, metadata={"help": "Where datasets are built and looked for."})
    cache_dir: str = field(default="~/.cache/optsg", metadata={"help": "Where tower outputs are kept."})
    checkpoint: str | None = field(
        default=None, metadata={"help": "Fine-tune this checkpoint instead of starting anew."}
    )
    vision_tower: str = field(
        default="efficientnet-lite0",
        metadata={"help": "A packaged tower, folder or Hub name; none: the dataset has frame features."},
    )
    text_tower: str = field(default="all-minilm-l6-v2", metadata={"help": "A packaged tower, folder or Hub name."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images; the tower's own if not given."}
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower too."})
    train_text_tower: bool = field(default=False, metadata={"help": "Train the text tower too."})
    num_frames: int = field(default=8, metadata={"help": "Most frames of a video."})
    max_tag_tokens: int = field(default=16, metadata={"help": "Longer training tags are left out, and counted."})
    tag_vocab_size: int = field(default=6000, metadata={"help": "Size of the tag tokenizer that is trained."})
    config: str = field(default="{}", metadata={"help": "JSON of further OPTSGConfig fields."})
    validation_ratio: float = field(
        default=0.1, metadata={"help": "Share of the training examples set aside where there is no validation split."}
    )
    train_ratio: float = field(
        default=1.0, metadata={"help": "Share of the training examples that is used, the same ones whatever the seed."}
    )
    epochs: float = 10.0
    batch_size: int = field(default=64, metadata={"help": "Examples a step, over all processes."})
    group_by_length: bool = field(
        default=False, metadata={"help": "Make a step of examples whose titles are of like length: less padding."}
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Most examples a process computes at once; the rest of its share follows."}
    )
    learning_rate: float = 6e-4
    tower_learning_rate: float = 2e-5
    embedding_init_std: float = field(
        default=0.06,
        metadata={"help": "Spread of token embeddings, tied to the text tower's features; 0: free, at random."},
    )
    embedding_lr_multiplier: float = field(
        default=0.3,
        metadata={"help": "Learning rate of token embeddings and classes, as a share: keeps what they begin with."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute layers anew in the backward pass: less memory, more time."}
    )
    weight_decay: float = 0.05
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps in which the rate rises."})
    max_grad_norm: float = 1.0
    num_negatives: int = field(default=2000, metadata={"help": "Training tags added to a batch's in the alignment."})
    evaluations: int = field(default=5, metadata={"help": "Validations during training, evenly spaced."})
    objective: str = field(
        default="full_f1",
        metadata={"help": "Validation figure the best checkpoint and the fit go by; a+b: the mean."},
    )
    num_return_sequences: int = field(
        default=1,
        metadata={"help": "Tags a slot may contribute, by beam search; pad_bias and threshold are fitted so."},
    )
    num_candidates: int = field(
        default=50,
        metadata={
            "help": "Train tags that suit an example as a whole and are candidates beside what its slots write."
        },
    )
    pad_biases: list[float] = field(
        default_factory=lambda: list(PAD_BIASES), metadata={"help": "Values of pad_bias the fit tries."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16 or bf16; what accelerate is configured for if not given."}
    )
    save_half_precision: bool = field(
        default=False,
        metadata={"help": "Save 16-bit weights, tables of tokens and tags 8-bit; they load as 32-bit."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read examples as a stream instead of building them and caching what frozen towers make of them."
        },
    )
    num_stream_shards: int = field(
        default=16,
        metadata={
            "help": "Most files of a stream, or parts of one, that are read side by side; processes share them."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Streamed examples among which the next is drawn."}
    )
    max_unreadable: int = field(
        default=100, metadata={"help": "Training examples that may be broken; with more the run stops."}
    )
    num_workers: int = 0
    save_steps: int = field(
        default=500, metadata={"help": "Steps between two states of the run; 0: only one before each validation."}
    )
    resume: str = field(
        default="auto", metadata={"help": "auto: where the run was stopped; never: anew; or the folder of a state."}
    )
    logging_steps: int = field(default=100, metadata={"help": "Steps between two rows of training_log.jsonl."})
    report_to: list[str] = field(default_factory=list, metadata={"help": "Of accelerate, such as tensorboard."})
    push_to_hub: str | None = field(default=None, metadata={"help": "At the end, publish it as this model, org/name."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new model on the Hub private."})
    hub_revision: str | None = field(default=None, metadata={"help": "Publish on this branch, not on main."})
    seed: int = 0

    def settled(self) -> dict:
        """Those that what the run ends with depends on."""
        return {name: value for name, value in vars(self).items() if name not in FREE_ARGUMENTS}


def parse_arguments(argv=None) -> OPTSGTrainingArguments:
    """
    Args:
        argv: the command line's words; those the program was called with if not given.
    """
    parser = HfArgumentParser(OPTSGTrainingArguments)
    preset, _ = parser.parse_known_args(argv)
    if preset.preset:
        values = json.loads(Path(preset.preset).read_text(encoding="utf-8"))
        if unknown := set(values) - set(OPTSGTrainingArguments.__dataclass_fields__):
            parser.error(f"{preset.preset} sets unknown arguments: {', '.join(sorted(unknown))}")
        values = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in values.items()}
        parser.set_defaults(**values)
    arguments = parser.parse_args_into_dataclasses(argv)[0]
    if arguments.model_type not in MODEL_TYPES:
        parser.error(f"--model_type {arguments.model_type} is unknown; expected one of {', '.join(MODEL_TYPES)}")
    if arguments.group_by_length and arguments.streaming:
        parser.error("--group_by_length takes examples from anywhere, --streaming as they come: leave out one of them")
    if arguments.num_stream_shards < 2:
        parser.error(f"--num_stream_shards {arguments.num_stream_shards} must be at least 2")
    if arguments.push_to_hub:
        try:
            check_repo_id(arguments.push_to_hub)
        except ValueError as error:
            parser.error(f"--push_to_hub: {error}")
    if not 0 < arguments.train_ratio <= 1:
        parser.error(f"--train_ratio {arguments.train_ratio} must be above 0 and at most 1")
    return arguments
