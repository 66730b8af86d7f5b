"""The settings of an exported model: what processor, generation config and label vocabulary say, as JSON."""

from typing import Any

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from modeling_optsg.generation_settings import read_generation_settings
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.processing_optsg import NO_MAX_LENGTH, SIZE_BEFORE_RESIZE, OPTSGProcessor

from .programs import MAX_BEAMS

# Raised when an older runner could not read the folder.
FORMAT = 1


def export_settings(model: OPTSGForTagGeneration, processor: OPTSGProcessor) -> dict[str, Any]:
    """Return the settings of a model and its processor.

    Raises:
        ValueError: The model or a setting cannot be exported.
    """
    if type(model) is not OPTSGForTagGeneration:
        raise ValueError(f"{type(model).__name__} cannot be exported; only OPTSGForTagGeneration can")
    if model.config.vision_config is None or processor.image_processor is None:
        raise ValueError("the model takes precomputed frame features; only models with a vision tower can be exported")
    config = model.config
    settings = {
        "format": FORMAT,
        "image": _image_settings(processor.image_processor),
        "generation": _generation_settings(model),
        "pad_token_id": config.tag_pad_token_id,
        "sep_token_id": config.tag_sep_token_id,
        "num_prompts": config.num_prompts,
        "max_tag_tokens": config.max_tag_tokens,
        "label_vocabulary": processor.label_vocabulary,
    }
    if model.tag_classifier is not None:
        vocabulary = model.tag_classifier.label_vocabulary
        # Raises an error if a class has no tag.
        rows = vocabulary.tokens_of(range(len(vocabulary))).tolist()
        settings["classes"] = [[token for token in row if token != config.tag_pad_token_id] for row in rows]
        settings["class_counts"] = vocabulary.log_counts.exp().round().long().tolist()
    return settings


def tokenizer_json(tokenizer: PreTrainedTokenizerBase, pads: bool) -> str:
    """Return a tokenizer as the text of a `tokenizer.json`, which truncates as the processor does.

    Args:
        tokenizer: The tokenizer.
        pads: Whether it pads batches.

    Raises:
        ValueError: It is not a tokenizer of the library `tokenizers`.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json and cannot be exported")
    # A copy, because the settings are those of the last call.
    own = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    if pads:
        own.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, direction="right")
        if tokenizer.model_max_length < NO_MAX_LENGTH:
            own.enable_truncation(tokenizer.model_max_length, direction=tokenizer.truncation_side)
    return own.to_str()


def _image_settings(image_processor: BaseImageProcessor) -> dict[str, Any]:
    size, crop = dict(image_processor.size), getattr(image_processor, "crop_size", None)
    settings = {
        "size": {name: length for name, length in size.items() if isinstance(length, int)},
        "crop": [crop["height"], crop["width"]] if getattr(image_processor, "do_center_crop", False) else None,
        "resample": int(image_processor.resample),
        "rescale_factor": image_processor.rescale_factor if image_processor.do_rescale else 1.0,
        "mean": list(image_processor.image_mean) if image_processor.do_normalize else [0.0] * 3,
        "std": list(image_processor.image_std) if image_processor.do_normalize else [1.0] * 3,
    }
    settings["min_side"] = SIZE_BEFORE_RESIZE * max(settings["size"].values(), default=0) or None
    return settings


def _generation_settings(model: OPTSGForTagGeneration) -> dict[str, Any]:
    """Return the settings of parallel decoding."""
    names = ("threshold", "pad_bias", "max_tags", "num_candidates", "fusion_weights", "logit_adjustment")
    own = dict.fromkeys((*names, "min_beam_probability")) | {"decoding": "parallel"}
    settings = read_generation_settings(model, None, own, {})
    processors = model._build_processors(settings, None, None)
    if settings.config.do_sample or len(processors):
        named = ["do_sample"] * bool(settings.config.do_sample) + [type(one).__name__ for one in processors]
        raise ValueError(f"the generation config asks for {', '.join(named)}; exported models search without it")
    if settings.num_hypotheses > MAX_BEAMS:
        raise ValueError(f"num_beams={settings.num_hypotheses}; exported models have at most {MAX_BEAMS} beams")
    return {
        "thresholds": settings.thresholds,
        "by_modality": settings.by_modality,
        "pad_bias": settings.pad_bias,
        "max_tags": settings.max_tags,
        "num_candidates": settings.num_candidates,
        "fusion_weights": settings.fusion_weights,
        "logit_adjustment": settings.logit_adjustment,
        "length_penalty": settings.length_penalty,
        "min_beam_probability": settings.config.min_beam_probability or 0.0,
        "num_beams": settings.num_hypotheses,
        "num_return_sequences": settings.config.num_return_sequences,
        "num_word_tags": model.num_word_tags,
        "min_word_tag_probability": model.min_word_tag_probability,
    }
