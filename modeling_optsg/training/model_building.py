"""The model that a training run starts from: new on pretrained towers, or a checkpoint to fine-tune."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.collator import TagTable
from modeling_optsg.data.feature_cache import build_tag_table
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from modeling_optsg.tokenization_optsg import train_tag_tokenizer
from modeling_optsg.towers import freeze_unused_weights

from .arguments import OPTSGTrainingArguments
from .checkpoint_arguments import check_checkpoint_arguments
from .data import NO_TAGS, fit_image_standardizer, too_long_tags
from .image_preprocessing import load_image_processor
from .image_word_heads import add_image_words, can_name_images, is_two_tower
from .lora import add_adapters, check_adapters
from .new_tag_tokenizer import replace_tag_tokenizer, train_better_tag_tokenizer
from .pretrained_towers import tower_folder
from .text_tied_embeddings import class_embeddings, initialize_classes_from_text, tie_tokens_to_text
from .tower_checks import check_towers, load_text_tokenizer

logger = get_logger(__name__)

# Maximum number of tags per example for models without slots.
MAX_TAGS = 100
TEXT_TOWER = "model.text_tower"
# Modules loaded from `--classifier_checkpoint`; a model without tag classifier has only the tower.
CLASSIFIER_PARTS = (TEXT_TOWER, "model.multimodal_encoder.evidence_pooler", "tag_classifier")
# Number of training tags that a tower such as CLIP looks for in images.
MAX_IMAGE_WORDS = 1000
# Settings of a checkpoint that were fitted to another dataset.
NOT_FITTED = {
    "pad_bias": 0.0,
    "threshold": 0.0,
    "fusion_weights": None,
    "logit_adjustment": None,
    "num_candidates": None,
}


def build_model(
    args: OPTSGTrainingArguments,
    train: Dataset,
    validation: Dataset,
    given: tuple[OPTSGPreTrainedModel, OPTSGProcessor] | None = None,
) -> tuple[OPTSGPreTrainedModel, OPTSGProcessor]:
    """Build a model and its processor, or prepare those to fine-tune, and run the towers on dummy examples.

    Args:
        args: Training arguments.
        train: Training examples, for their tags.
        validation: Validation examples, for the width of frame features.
        given: Model and processor to fine-tune, instead of `args.checkpoint`. They are changed.

    Raises:
        ValueError: There are no tags, the model type cannot be fine-tuned, the checkpoint is of another type or
            contradicts an argument, frame features are missing, a field of `args.config_overrides` does not exist, or
            a tower cannot work. The message names it.
        ImportError: `peft` is needed and not installed.
    """
    counts = Counter(tag for tags in train["tags"] for tag in set(tags))
    if not counts:
        raise ValueError(f"{args.dataset or 'train_dataset'}: {NO_TAGS}")
    if given is not None or args.checkpoint:
        model, processor = given or _load_checkpoint(args)
        # In half precision, small updates would be rounded away.
        model.float()
        _prepare_to_fine_tune(model, processor, args, train, counts)
    else:
        model, processor = _build_on_towers(args, train, counts, validation)
    if model.model.vision_tower is not None:
        model.model.vision_tower.requires_grad_(args.train_vision_tower)
        freeze_unused_weights(model.model.vision_tower)
    if model.model.image_words is not None:
        model.model.image_words.requires_grad_(False)
    freeze_text_layers(model.model.text_tower, args.train_text_layers)
    if args.lora_rank:
        check_adapters(model)
    return model, processor


def load_classifier(model: OPTSGPreTrainedModel, args: OPTSGTrainingArguments) -> None:
    """Load text tower, evidence pooler and tag classifier from `args.classifier_checkpoint`, if it is given.

    A model without a tag classifier loads only the text tower.

    Raises:
        ValueError: The sizes or the label vocabularies differ.
    """
    if not args.classifier_checkpoint:
        return
    source = MODEL_TYPES["asy"].model.from_pretrained(args.classifier_checkpoint)
    names = CLASSIFIER_PARTS
    if getattr(model, "tag_classifier", None) is None:
        names = (TEXT_TOWER,)
    else:
        own, other = (part.tag_classifier.label_vocabulary.tokens for part in (model, source))
        if own.shape != other.shape or not torch.equal(own.cpu(), other):
            raise ValueError(f"{args.classifier_checkpoint} has a different label vocabulary.")
    for name in names:
        part = model.get_submodule(name)
        try:
            part.load_state_dict(source.get_submodule(name).state_dict())
        except RuntimeError as error:
            raise ValueError(f"{args.classifier_checkpoint} does not fit this configuration: {error}") from error
        if name != TEXT_TOWER and args.train_text_layers == 0:
            part.requires_grad_(False)


def prepare_for_device(model: OPTSGPreTrainedModel, args: OPTSGTrainingArguments, device: torch.device) -> None:
    """Add adapters and enable gradient checkpointing if requested, and choose the attention implementation."""
    if args.lora_rank:
        # Not earlier: their weights have other names, by which features are cached and classifiers loaded.
        add_adapters(model, args.lora_rank, args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cpu":
        # On CPUs, training is 20 % faster with eager attention than with sdpa for such short sequences.
        model.set_attn_implementation("eager")


def freeze_text_layers(tower: PreTrainedModel, num_trained: int) -> None:
    """Freeze a text tower except for its upper layers.

    Args:
        tower: The text tower.
        num_trained: Number of layers to train; 0 freezes the tower, -1 trains all of it.

    Raises:
        ValueError: The text tower has fewer layers.
    """
    tower.requires_grad_(num_trained == -1)
    freeze_unused_weights(tower)
    if num_trained > 0:
        lists = [module for module in tower.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = max(lists, key=len, default=())
        if len(layers) < num_trained:
            raise ValueError(f"--train_text_layers {num_trained}: the text tower has {len(layers)} layers.")
        for layer in layers[-num_trained:]:
            layer.requires_grad_(True)


def _config_overrides(args: OPTSGTrainingArguments) -> dict:
    model_type, overrides = MODEL_TYPES[args.model_type], json.loads(args.config_overrides)
    config_class = model_type.model.config_class
    # All types can share one file of arguments: fields of other types are left out, and a type's own fields come last.
    known = {name for spec in MODEL_TYPES.values() for name in _config_fields(spec.model.config_class)}
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(f"--config_overrides sets unknown fields of {config_class.__name__}: {', '.join(unknown)}.")
    own = _config_fields(config_class)
    return {name: value for name, value in overrides.items() if name in own} | dict(model_type.config)


def _config_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Return the names that a configuration takes, with those that transformers accepts in addition to fields."""
    properties = {name for name in dir(config_class) if isinstance(getattr(config_class, name), property)}
    return {*config_class.__dataclass_fields__, *properties, "attn_implementation"}


def _load_checkpoint(args: OPTSGTrainingArguments) -> tuple[OPTSGPreTrainedModel, OPTSGProcessor]:
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
    return model, OPTSGProcessor.from_pretrained(args.checkpoint)


def _prepare_to_fine_tune(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    args: OPTSGTrainingArguments,
    train: Dataset,
    counts: Counter,
) -> None:
    """Check a model to fine-tune, replace its label vocabulary, and reset what was fitted to another dataset."""
    tag_tokenizer = train_better_tag_tokenizer(
        processor, (tag for tags in train["tags"] for tag in tags), args.tag_vocab_size
    )
    name = f"--checkpoint {args.checkpoint}" if args.checkpoint else "the given model"
    check_checkpoint_arguments(args, model, processor, tag_tokenizer is not None)
    check_towers(model.model, processor, *[f"of {name}"] * 2)
    if tag_tokenizer is not None:
        replace_tag_tokenizer(model, processor, tag_tokenizer, args.embedding_init_std)
    _set_tags(model, processor, counts, args.keep_vocabulary)


def _set_tags(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, counts: Counter, keep_vocabulary: bool = False
) -> None:
    """Replace the label vocabulary of a model, and reset what was fitted to another dataset."""
    known = Counter(processor.label_vocabulary) if keep_vocabulary else Counter()
    processor.label_vocabulary = dict(known + counts)
    for name, value in NOT_FITTED.items():
        setattr(model.generation_config, name, value)
    if isinstance(model, OPTSGForTagGeneration) and model.config.use_tag_classifier:
        ids, class_counts = label_vocabulary(processor.tag_tokenizer, counts, processor.max_tag_tokens)
        model.set_label_vocabulary(ids, class_counts)


def prepare_for_fine_tuning(
    model: OPTSGForTagGeneration,
    processor: OPTSGProcessor,
    tags: Iterable[Sequence[str]],
    examples: Sequence[Mapping] | None = None,
) -> TagTable:
    """Prepare a model for training on other tags with [`TagTrainer`]. [`OPTSGTrainer`] does this itself.

    The label vocabulary of model and processor is replaced, the class embeddings start from the text features of the
    tags, both towers are frozen, and settings that were fitted to other tags are reset. If the tags are in another
    script, the model gets a new tag tokenizer.

    Args:
        model: The model. It is changed.
        processor: Its processor. It is changed.
        tags: Tags of each training example.
        examples: Training examples as [`OPTSGDataCollator`] reads them. A sample of their images tells the model which
            images are familiar; it trusts others less. Without them, the images are those of the earlier training.

    Returns:
        The tag table, for [`OPTSGDataCollator`].

    Raises:
        ValueError: There are no tags, or all are longer than `processor.max_tag_tokens`.

    Example:

        >>> from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, prepare_for_fine_tuning
        >>> model = OPTSGForTagGeneration.from_pretrained("checkpoints/optsg-icon-small")
        >>> processor = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> tag_table = prepare_for_fine_tuning(model, processor, [["bus", "our trip"], ["bus"]])
        >>> processor.label_vocabulary
        {'bus': 2, 'our trip': 1}
    """
    own = [list(dict.fromkeys(example_tags)) for example_tags in tags]
    counts = Counter(tag for example_tags in own for tag in example_tags)
    if not counts:
        raise ValueError(NO_TAGS)
    tag_tokenizer = train_better_tag_tokenizer(processor, (tag for example_tags in own for tag in example_tags))
    if tag_tokenizer is not None:
        replace_tag_tokenizer(model, processor, tag_tokenizer, OPTSGTrainingArguments.embedding_init_std)
        # The parametrization is for the training loop of this package.
        parametrize.remove_parametrizations(model.tag_decoder.token_embeddings, "weight")
        model.tie_weights()
    long = set(too_long_tags(sorted(counts), processor))
    counts = Counter({tag: count for tag, count in counts.items() if tag not in long})
    if not counts:
        raise ValueError(f"All tags are longer than max_tag_tokens={processor.max_tag_tokens} tokens.")
    _set_tags(model, processor, counts)
    defaults = OPTSGTrainingArguments
    MODEL_TYPES["op-tsg"].set_search(model, defaults.num_return_sequences, defaults.num_candidates)
    for tower in (model.model.vision_tower, model.model.text_tower, model.model.image_words):
        if tower is not None:
            tower.requires_grad_(False)
    if examples is not None:
        fit_image_standardizer(model, processor, examples)
    with tempfile.TemporaryDirectory() as folder:
        tag_table = build_tag_table(sorted(counts), model.model, processor, folder)
    if class_embeddings(model) is not None:
        initialize_classes_from_text(model, tag_table.features, init_title=False)
    return tag_table


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
    max_tags = MAX_TAGS if model_type.tags_per_slot is None else model.config.num_prompts
    processor = _build_processor(args, vision, text, tag_tokenizer, max_tags, counts, model.model.text_tower)
    check_towers(model.model, processor, args.vision_tower, args.text_tower, args.image_size)
    can_have_words = vision is not None and can_name_images(vision)
    if args.image_words not in ("auto", "none") and not can_have_words:
        raise ValueError(
            f"--image_words {args.image_words}: the vision tower {args.vision_tower} is neither an image classifier "
            "nor part of a two-tower model."
        )
    if args.image_words != "none" and can_have_words:
        _add_image_words(model, vision, processor, args.image_words, counts)
    if args.embedding_init_std and hasattr(model, "tag_decoder"):
        tie_tokens_to_text(model.eval(), processor, args.embedding_init_std)
    return model, processor


def _add_image_words(
    model: OPTSGPreTrainedModel, vision: str, processor: OPTSGProcessor, image_words: str, counts: Counter
) -> None:
    """Add image words as `--image_words` says. A tower without them is an error only if a word file was given."""
    if image_words == "auto":
        words = [tag for tag, _ in counts.most_common(MAX_IMAGE_WORDS)] if is_two_tower(vision) else None
    else:
        words = read_image_words(image_words)
    try:
        add_image_words(model, vision, processor.tokenizer, words)
    except ValueError as error:
        if image_words != "auto":
            raise
        logger.warning(f"The model has no image words: {error}")


def read_image_words(path: str | Path) -> list[str]:
    """Read a file of `--image_words`, one word per line, without duplicates.

    Raises:
        ValueError: The file is not text in UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--image_words {path} is not text in UTF-8: {error}") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _build_processor(
    args: OPTSGTrainingArguments,
    vision: str | None,
    text: str,
    tag_tokenizer: PreTrainedTokenizerBase,
    max_tags: int,
    counts: Counter,
    text_tower: PreTrainedModel,
) -> OPTSGProcessor:
    settings = {
        "num_frames": args.num_frames,
        # The maximum number of tags per example in training, also for models without slots.
        "num_prompts": max_tags,
        "max_tag_tokens": args.max_tag_tokens,
        "label_vocabulary": dict(counts),
    }
    tokenizer = load_text_tokenizer(text, text_tower)
    if vision is None:
        return OPTSGFeatureProcessor(tokenizer, tag_tokenizer, **settings)
    return OPTSGProcessor(load_image_processor(vision, args.image_size), tokenizer, tag_tokenizer, **settings)


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
