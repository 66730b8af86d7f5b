"""The model that a training starts from: new on pretrained towers, or a checkpoint to fine-tune."""

import json
from collections import Counter
from pathlib import Path

from datasets import Dataset
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration, OPTSGPreTrainedModel
from modeling_optsg.processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from modeling_optsg.tokenization_optsg import train_tag_tokenizer

from .arguments import OPTSGTrainingArguments
from .data import NO_TAGS
from .pretrained_towers import tower_folder
from .text_tied_embeddings import tie_tokens_to_text

# Maximum number of tags per example for models without slots.
MAX_TAGS = 100
# Settings of a checkpoint that were fitted to another dataset.
NOT_FITTED = {
    "pad_bias": 0.0,
    "threshold": 0.0,
    "fusion_weights": None,
    "logit_adjustment": None,
    "num_candidates": None,
}


def build_model(
    args: OPTSGTrainingArguments, train: Dataset, validation: Dataset
) -> tuple[OPTSGPreTrainedModel, OPTSGProcessor]:
    """Build a model and its processor, or load the checkpoint to fine-tune.

    Args:
        args: Arguments of the training.
        train: Training examples, for their tags.
        validation: Validation examples, for the width of frame features.

    Raises:
        ValueError: There are no tags, the model type cannot be fine-tuned, the checkpoint is of another type, or frame
            features are missing.
    """
    counts = Counter(tag for tags in train["tags"] for tag in set(tags))
    if not counts:
        raise ValueError(f"{args.dataset}: {NO_TAGS}")
    if args.checkpoint:
        model, processor = _load_checkpoint(args, counts)
    else:
        model, processor = _build_on_towers(args, train, counts, validation)
    for tower, is_trained in (
        (model.model.vision_tower, args.train_vision_tower),
        (model.model.text_tower, args.train_text_tower),
    ):
        if tower is not None:
            tower.requires_grad_(is_trained)
    return model, processor


def _config_overrides(args: OPTSGTrainingArguments) -> dict:
    model_type = MODEL_TYPES[args.model_type]
    # The model type's own fields come last, so that all types can share one file of arguments.
    overrides = json.loads(args.config_overrides) | dict(model_type.config)
    if args.train_text_tower and not model_type.needs_classes:
        # The tag classifier compares with text features that are computed once, by a frozen tower.
        overrides["use_tag_classifier"] = False
    return overrides


def _load_checkpoint(args: OPTSGTrainingArguments, counts: Counter) -> tuple[OPTSGPreTrainedModel, OPTSGProcessor]:
    model_type = MODEL_TYPES[args.model_type]
    if model_type.needs_classes:
        raise ValueError(f"{args.model_type} cannot be fine-tuned: its classes are the tags it was trained on.")
    found = PreTrainedConfig.get_config_dict(args.checkpoint)[0].get("model_type")
    expected = model_type.model.config_class.model_type
    if found != expected:
        raise ValueError(
            f"{args.checkpoint} is not a checkpoint of {args.model_type}: its config.json has model_type={found!r}, "
            f"not {expected!r}."
        )
    model = model_type.model.from_pretrained(args.checkpoint, **_config_overrides(args))
    processor = OPTSGProcessor.from_pretrained(args.checkpoint)
    # Tags that the checkpoint was trained on stay known: they are not novel for the fine-tuned model.
    processor.label_vocabulary = dict(Counter(processor.label_vocabulary) + counts)
    for name, value in NOT_FITTED.items():
        setattr(model.generation_config, name, value)
    if isinstance(model, OPTSGForTagGeneration) and model.config.use_tag_classifier:
        ids, class_counts = label_vocabulary(processor.tag_tokenizer, counts, processor.max_tag_tokens)
        model.set_label_vocabulary(ids, class_counts)
    return model, processor


def _build_on_towers(
    args: OPTSGTrainingArguments, train: Dataset, counts: Counter, validation: Dataset
) -> tuple[OPTSGPreTrainedModel, OPTSGProcessor]:
    model_type, config = MODEL_TYPES[args.model_type], _config_overrides(args)
    vision, text = (
        None if name == "none" else tower_folder(name, Path(args.cache_dir) / "towers")
        for name in (args.vision_tower, args.text_tower)
    )
    if vision is None:
        config["frame_feature_size"] = frame_feature_width(validation)
    tag_tokenizer = train_tag_tokenizer((tag for tags in train["tags"] for tag in tags), args.tag_vocab_size)
    ids, class_counts = label_vocabulary(tag_tokenizer, counts, args.max_tag_tokens)
    if model_type.needs_classes:
        config["num_tag_classes"] = len(ids)
    model = model_type.model.from_vision_text_pretrained(
        vision, text, tag_vocab_size=len(tag_tokenizer), max_tag_tokens=args.max_tag_tokens, **config
    )
    if model_type.needs_classes or (isinstance(model, OPTSGForTagGeneration) and model.config.use_tag_classifier):
        model.set_label_vocabulary(ids, class_counts)
    processor = _build_processor(args, vision, text, tag_tokenizer, model.config.num_prompts, counts)
    if args.embedding_init_std and hasattr(model, "tag_decoder"):
        tie_tokens_to_text(model.eval(), processor, args.embedding_init_std)
    return model, processor


def _build_processor(
    args: OPTSGTrainingArguments,
    vision: str | None,
    text: str,
    tag_tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    counts: Counter,
) -> OPTSGProcessor:
    settings = {
        "num_frames": args.num_frames,
        # The maximum number of tags per example in training, also for models without slots.
        "num_prompts": num_prompts if num_prompts > 1 else MAX_TAGS,
        "max_tag_tokens": args.max_tag_tokens,
        "label_vocabulary": dict(counts),
    }
    tokenizer = AutoTokenizer.from_pretrained(text)
    if vision is None:
        return OPTSGFeatureProcessor(tokenizer, tag_tokenizer, **settings)
    image_processor = AutoImageProcessor.from_pretrained(vision)
    if args.image_size:
        image_processor.size = {"height": args.image_size, "width": args.image_size}
    return OPTSGProcessor(image_processor, tokenizer, tag_tokenizer, **settings)


def frame_feature_width(rows: Dataset) -> int:
    """Return the width of a dataset's own frame features.

    Raises:
        ValueError: No example has frame features.
    """
    if "frame_features" not in rows.column_names:
        raise ValueError(f"--vision_tower none needs a column frame_features; the columns are {rows.column_names}.")
    for row in rows.select_columns("frame_features").with_format("numpy"):
        if row["frame_features"] is not None:
            return row["frame_features"].shape[-1]
    raise ValueError("--vision_tower none: no example has frame features.")


def label_vocabulary(
    tag_tokenizer: PreTrainedTokenizerBase, counts: Counter, max_tag_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Return token ids and counts of the training tags that are not too long, in alphabetical order."""
    ids = tag_tokenizer(sorted(counts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    kept = [(tokens, counts[tag]) for tag, tokens in zip(sorted(counts), ids) if len(tokens) <= max_tag_tokens]
    return [tokens for tokens, _ in kept], [count for _, count in kept]
