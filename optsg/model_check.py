"""Finds damage in a loaded model before it tags any file.

The libraries load many damaged folders without an error. The tags of such a model would replace those of earlier runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor

FLOATING_TYPES = ("F", "BF")
# Towers normalise pixels to a few units.
MAX_PIXEL_VALUE, MIN_CONTRAST = 1000, 0.01


def check_model(name: str, model: "OPTSGForTagGeneration", processor: "OPTSGProcessor") -> None:
    """Check weights, tokenizers, label vocabulary and generation config of a loaded model.

    Args:
        name: The folder or the name on the Hub that it was loaded from.
        model: The model.
        processor: Its processor.

    Raises:
        ValueError: The model is damaged. The message names the file and what is wrong with it.
    """
    _check_weights(model)
    _check_stored_types(name, model)
    _check_pixels(processor)
    _check_tokenizers(model, processor)
    _check_generation_config(name)


def _check_weights(model: "OPTSGForTagGeneration") -> None:
    for name, values in model.state_dict().items():
        if values.is_floating_point() and not values.isfinite().all():
            raise ValueError(f"the weight {name} contains NaN or inf; restore model.safetensors")


def _check_stored_types(name: str, model: "OPTSGForTagGeneration") -> None:
    from safetensors import safe_open

    # `from_pretrained` converts integers to the type of the weight.
    floating = {key for key, values in model.state_dict().items() if values.is_floating_point()}
    for path in sorted(Path(name).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in floating.intersection(file.keys()):
                stored = file.get_slice(key).get_dtype()
                if not stored.startswith(FLOATING_TYPES):
                    raise ValueError(f"the weight {key} is stored as {stored}, not as float; restore {path.name}")


def _check_pixels(processor: "OPTSGProcessor") -> None:
    from PIL import Image

    if processor.image_processor is None:
        return
    black, white = (processor.read_pixels(Image.new("RGB", (32, 32), colour)) for colour in ("black", "white"))
    for pixels in (black, white):
        if not pixels.isfinite().all() or pixels.abs().max() > MAX_PIXEL_VALUE:
            raise ValueError(
                f"processor_config.json turns pixels into values from {pixels.min():.3g} to {pixels.max():.3g}; "
                "restore the file"
            )
    if (black - white).abs().amin() < MIN_CONTRAST:
        raise ValueError("processor_config.json gives black and white pixels nearly the same value; restore the file")


def _check_tokenizers(model: "OPTSGForTagGeneration", processor: "OPTSGProcessor") -> None:
    sizes = {"tokenizer": model.config.text_config.vocab_size, "tag_tokenizer": model.config.tag_vocab_size}
    for name, size in sizes.items():
        ids = getattr(processor, name).get_vocab()
        # Without its file, transformers makes a tokenizer that knows only its special tokens.
        if set(ids) <= set(getattr(processor, name).all_special_tokens):
            raise ValueError(f"the {name} has no vocabulary; restore its tokenizer.json")
        if max(ids.values()) >= size:
            raise ValueError(
                f"the {name} has the token id {max(ids.values())}, but the model knows {size} tokens; restore the "
                "tokenizer.json of this model"
            )
    labels, classes = len(processor.label_vocabulary), model.config.num_tag_classes
    # A fine-tuned model may keep tags that its classifier does not have (`--keep_vocabulary`).
    if model.tag_classifier is not None and labels < classes:
        raise ValueError(
            f"label_vocabulary.json has {labels} tags, but the tag classifier has {classes}; restore the file"
        )


def _check_generation_config(name: str) -> None:
    from transformers import GenerationConfig

    from modeling_optsg.generation_settings import DECODINGS, FITTED_SETTINGS

    # `from_pretrained` of a model replaces a file that it cannot read by a config without thresholds.
    config = GenerationConfig.from_pretrained(name)
    if getattr(config, "threshold", None) is None:
        raise ValueError("generation_config.json has no threshold; restore the file")
    # `generate` has defaults for what is missing. These do not fit the model: every candidate would become a tag.
    for setting in FITTED_SETTINGS:
        if missing := _missing_entries(getattr(config, setting, None), DECODINGS):
            raise ValueError(
                f"generation_config.json has no {setting} for {', '.join(missing)}; restore the file, or give one "
                f"{setting} for everything"
            )


def _missing_entries(value: object, expected: tuple[str, ...]) -> list[str]:
    """Return the decodings and modalities that a setting lacks, if it does not have one value for all of them."""
    from modeling_optsg.generation_settings import MODALITIES

    if not isinstance(value, Mapping):
        return []
    if set(value) & set(MODALITIES):
        expected = MODALITIES
    missing = [name for name in expected if value.get(name) is None]
    parts = value.items() if expected != MODALITIES else ()
    return missing + [f"{name}, {entry}" for name, part in parts for entry in _missing_entries(part, MODALITIES)]
