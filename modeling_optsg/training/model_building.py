"""The model that a training begins with."""

import json
from collections import Counter
from pathlib import Path

from datasets import Dataset
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig

from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration, OPTSGPreTrainedModel
from modeling_optsg.processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from modeling_optsg.tokenization_optsg import train_tag_tokenizer

from .arguments import OPTSGTrainingArguments
from .data import NO_TAGS
from .pretrained_towers import tower_folder
from .text_tied_embeddings import tie_tokens_to_text

# Most tags of an example for systems without slots.
MAX_TAGS = 100
UNFITTED = {
    "pad_bias": 0.0,
    "threshold": 0.0,
    "fusion_weights": None,
    "logit_adjustment": None,
    "num_candidates": None,
}


def build(
    arguments: OPTSGTrainingArguments, train: Dataset, validation: Dataset
) -> tuple[OPTSGPreTrainedModel, OPTSGProcessor]:
    """A model and its processor: new on pretrained towers, or a checkpoint to be fine-tuned.

    Args:
        train: what tags there are; validation: whose frame features say how wide they are.

    Raises:
        ValueError: there are no tags, the system cannot be fine-tuned, the checkpoint is another's, or there are no
            frame features where they are all there is.
    """
    system = MODEL_TYPES[arguments.model_type]
    counts = Counter(tag for tags in train["tags"] for tag in set(tags))
    if not counts:
        raise ValueError(f"{arguments.dataset}: {NO_TAGS}")
    # What makes a system what it is comes last: a preset for all of them may give the number of slots.
    config = json.loads(arguments.config_overrides) | dict(system.config)
    if arguments.train_text_tower and not system.needs_classes:
        # Train tags are compared with by features computed once; a tower that learns has none.
        config["use_tag_classifier"] = False
    if arguments.checkpoint:
        if system.needs_classes:
            raise ValueError(
                f"{arguments.model_type} knows its own training tags only: it cannot be fine-tuned on others."
            )
        kind = PreTrainedConfig.get_config_dict(arguments.checkpoint)[0].get("model_type")
        if kind != system.model.config_class.model_type:
            raise ValueError(
                f"{arguments.checkpoint} is no checkpoint of {arguments.model_type}: its config.json has model_type="
                f"{kind!r}, not {system.model.config_class.model_type!r}."
            )
        model = system.model.from_pretrained(arguments.checkpoint, **config)
        processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
        # What the checkpoint was trained on stays known: a tag of it is no novelty of the fine-tuned model.
        processor.label_vocabulary = dict(Counter(processor.label_vocabulary) + counts)
        # What was fitted is not what is to be trained.
        for name, value in UNFITTED.items():
            setattr(model.generation_config, name, value)
        if isinstance(model, OPTSGForTagGeneration) and model.config.use_tag_classifier:
            model.set_label_vocabulary(*label_vocabulary(processor.tag_tokenizer, counts, processor.max_tag_tokens))
        return model, processor
    vision, text = (
        None if name == "none" else tower_folder(name, Path(arguments.cache_dir) / "towers")
        for name in (arguments.vision_tower, arguments.text_tower)
    )
    if vision is None:
        config["frame_feature_size"] = feature_width(validation)
    tag_tokenizer = train_tag_tokenizer((t for tags in train["tags"] for t in tags), arguments.tag_vocab_size)
    ids, class_counts = label_vocabulary(tag_tokenizer, counts, arguments.max_tag_tokens)
    if system.needs_classes:
        config["num_tag_classes"] = len(ids)
    model = system.model.from_vision_text_pretrained(
        vision, text, tag_vocab_size=len(tag_tokenizer), max_tag_tokens=arguments.max_tag_tokens, **config
    )
    if system.needs_classes or (isinstance(model, OPTSGForTagGeneration) and model.config.use_tag_classifier):
        model.set_label_vocabulary(ids, class_counts)
    settings = {
        "num_frames": arguments.num_frames,
        # Most tags of an example in training, which is all that a system without slots needs it for.
        "num_prompts": model.config.num_prompts if model.config.num_prompts > 1 else MAX_TAGS,
        "max_tag_tokens": arguments.max_tag_tokens,
        "label_vocabulary": dict(counts),
    }
    tokenizer = AutoTokenizer.from_pretrained(text)
    if vision is None:
        processor = OPTSGFeatureProcessor(tokenizer, tag_tokenizer, **settings)
    else:
        image_processor = AutoImageProcessor.from_pretrained(vision)
        if arguments.image_size:
            image_processor.size = {"height": arguments.image_size, "width": arguments.image_size}
        processor = OPTSGProcessor(image_processor, tokenizer, tag_tokenizer, **settings)
    if arguments.embedding_init_std and hasattr(model, "tag_decoder"):
        tie_tokens_to_text(model.eval(), processor, arguments.embedding_init_std)
    return model, processor


def feature_width(rows: Dataset) -> int:
    """Width of a dataset's own frame features."""
    if "frame_features" not in rows.column_names:
        raise ValueError(f"--vision_tower none needs a column frame_features; there are {rows.column_names}.")
    given = next(
        (f for f in rows.select_columns("frame_features").with_format("numpy") if f["frame_features"] is not None),
        None,
    )
    if given is None:
        raise ValueError("--vision_tower none: no example has frame features.")
    return given["frame_features"].shape[-1]


def label_vocabulary(tag_tokenizer, counts: Counter, max_tag_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Token ids and counts of the train tags, in the order of the tag table: without those too long."""
    ids = tag_tokenizer(sorted(counts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    kept = [(tokens, counts[tag]) for tag, tokens in zip(sorted(counts), ids) if len(tokens) <= max_tag_tokens]
    return [tokens for tokens, _ in kept], [count for _, count in kept]
