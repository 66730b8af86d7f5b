"""Reads and checks the settings of a `generate` call."""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

DECODINGS = ("parallel", "sequential")
# Possible modalities of an example. Each has its own threshold and fusion weights, because an image alone is less
# informative than a title.
MODALITIES = ("image+title", "image", "title")
# Settings that are fitted for each decoding, and some of them for each modality.
FITTED_SETTINGS = ("pad_bias", "fusion_weights", "logit_adjustment", "threshold")
# What an unfamiliar image without a title is tagged by. It has no threshold of its own.
IMAGE_WORDS = "image words"

# Arguments of `generate` that are inputs of the model and not settings.
INPUT_NAMES = (
    "pixel_values",
    "frame_features",
    "image_features",
    "frame_mask",
    "input_ids",
    "title_features",
    "attention_mask",
)
# Further inputs of models that retrieve examples.
BOOK_INPUT_NAMES = ("book_input_ids", "book_mask")

# Fields of `GenerationConfig` that have a meaning when every slot generates one tag. The others would be ignored
# silently, so they are rejected.
SEARCH_SETTINGS = (
    "num_beams",
    "length_penalty",
    "num_return_sequences",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "min_length",
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "renormalize_logits",
    "remove_invalid_values",
)


@dataclass(frozen=True)
class GenerationSettings:
    """Checked settings of one `generate` call; see [`OrderPromptGenerationMixin.generate`].

    Args:
        config: The remaining settings, for the logits processors.
        decoding: "parallel" or "sequential".
        thresholds: Minimum probability of a tag for each of `MODALITIES`.
        by_modality: Whether a threshold was given for each of `MODALITIES`, instead of one for all.
        pad_bias: Added to the logit of [PAD].
        max_tags: Maximum number of tags of an example, or `None`.
        num_candidates: Number of classifier candidates.
        fusion_weights: Five fusion weights for each of `MODALITIES`, or `None`.
        logit_adjustment: Temperature of the logit adjustment.
        length_penalty: Exponent of the length that beams are divided by.
        min_log_probability: Logarithm of `min_beam_probability`.
    """

    config: GenerationConfig
    decoding: str
    thresholds: dict[str, float]
    by_modality: bool
    pad_bias: float
    max_tags: int | None
    num_candidates: int
    fusion_weights: dict[str, tuple[float, ...]] | None
    logit_adjustment: float
    length_penalty: float
    min_log_probability: float

    @property
    def num_hypotheses(self) -> int:
        """Number of samples or beams per slot."""
        return self.config.num_return_sequences if self.config.do_sample else self.config.num_beams


def read_generation_settings(
    model: PreTrainedModel, generation_config: GenerationConfig | None, own: dict[str, Any], search: dict[str, Any]
) -> GenerationSettings:
    """Merge the arguments of a `generate` call with the generation config, and check them.

    Args:
        model: The model, for its `generation_config` and its limits.
        generation_config: Used instead of the model's.
        own: Settings of this package, `None` where not given.
        search: Settings of `GenerationConfig`.

    Raises:
        ValueError: A setting is unknown, out of range, or contradicts another one.
    """
    if unknown := search.keys() - set(SEARCH_SETTINGS):
        raise ValueError(
            f"generate() got unknown settings {sorted(unknown)}; it takes {sorted([*own, *SEARCH_SETTINGS])}."
        )
    config = copy.deepcopy(generation_config if generation_config is not None else model.generation_config)
    for name, value in own.items():
        setattr(config, name, value if value is not None else getattr(config, name, None))
    config.update(**search)
    # Read before the library's default of 1 is filled in: tags are short, and beams need no penalty.
    length_penalty = _finite("length_penalty", _given(config.length_penalty, 0.0))
    config.update(**config._get_default_generation_params(), defaults_only=True)
    decoding = _given(config.decoding, "parallel")
    if not isinstance(decoding, str) or decoding not in DECODINGS:
        raise ValueError(f"decoding={decoding!r} must be one of {DECODINGS}.")
    settings = GenerationSettings(
        config=config,
        decoding=decoding,
        thresholds=_read_thresholds(config, decoding),
        by_modality=isinstance(setting_of_decoding(config, "threshold", decoding), Mapping),
        pad_bias=_finite("pad_bias", _for_decoding(config, "pad_bias", decoding, 0.0)),
        max_tags=config.max_tags,
        num_candidates=_given(config.num_candidates, 0),
        fusion_weights=_read_fusion_weights(config, decoding),
        logit_adjustment=_finite("logit_adjustment", _for_decoding(config, "logit_adjustment", decoding, 0.0)),
        length_penalty=length_penalty,
        min_log_probability=_log_of_probability("min_beam_probability", _given(config.min_beam_probability, 0.0)),
    )
    _check_ranking(settings, has_classifier=model.tag_classifier is not None)
    _check_search(config, model.config.tag_vocab_size)
    return settings


def generation_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of `generate` among those of a batch, which may also contain tags."""
    names = INPUT_NAMES
    if BOOK_INPUT_NAMES[0] in inspect.signature(model.generate).parameters:
        names += BOOK_INPUT_NAMES
    return {name: batch[name] for name in names if name in batch}


def read_ranking_settings(
    model: PreTrainedModel, generation_config: GenerationConfig | None, inputs: Mapping[str, Any], **given: Any
) -> dict[str, Any]:
    """Read the settings of a `generate` call that classifies tags instead of generating them.

    Args:
        model: The model, for its `generation_config`.
        generation_config: Used instead of the model's.
        inputs: Other arguments of the call, which must be inputs of the model.
        given: Settings of the call, `None` where not given.

    Raises:
        ValueError: A setting is unknown or out of range.
    """
    if unknown := inputs.keys() - set(INPUT_NAMES):
        raise ValueError(
            f"generate() of {type(model).__name__} got unknown settings {sorted(unknown)}; it takes {sorted(given)}."
        )
    config = generation_config if generation_config is not None else model.generation_config
    settings = {name: getattr(config, name, None) if value is None else value for name, value in given.items()}
    for name in ("threshold", "pad_bias", "logit_adjustment"):
        if name in settings:
            settings[name] = _finite(name, settings[name] if settings[name] is not None else 0.0)
    check_threshold(settings["threshold"])
    for name in ("max_tags", "num_return_sequences"):
        check_positive_integer(name, settings.get(name))
    return settings


def _check_ranking(settings: GenerationSettings, has_classifier: bool) -> None:
    check_positive_integer("max_tags", settings.max_tags)
    if settings.fusion_weights is not None and not has_classifier:
        raise ValueError("fusion_weights need a tag classifier, which this model does not have.")
    num_candidates = settings.num_candidates
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 0:
        raise ValueError(f"num_candidates={num_candidates!r} must be an integer of at least 0.")
    if num_candidates and settings.fusion_weights is None:
        raise ValueError(
            f"num_candidates={num_candidates} needs fusion_weights: no slot gives these candidates a probability."
        )


def _read_thresholds(config: GenerationConfig, decoding: str) -> dict[str, float]:
    """Read one threshold, or a mapping with one for each of `MODALITIES`."""
    thresholds = _by_modality("threshold", setting_of_decoding(config, "threshold", decoding))
    thresholds = thresholds or dict.fromkeys(MODALITIES, 0.0)
    thresholds = {name: _finite("threshold", threshold) for name, threshold in thresholds.items()}
    for threshold in thresholds.values():
        check_threshold(threshold)
    return thresholds


def _read_fusion_weights(config: GenerationConfig, decoding: str) -> dict[str, tuple[float, ...]] | None:
    """Read five numbers, or a mapping with five numbers for each of `MODALITIES`."""
    by_modality = _by_modality("fusion_weights", setting_of_decoding(config, "fusion_weights", decoding))
    if by_modality is None:
        return None
    for weights in by_modality.values():
        if not isinstance(weights, Sequence) or len(weights) != 5:
            raise ValueError(f"fusion_weights={weights} must be five numbers, or five for each of {MODALITIES}.")
    return {name: tuple(_finite("fusion_weights", w) for w in weights) for name, weights in by_modality.items()}


def setting_of_decoding(config: GenerationConfig, name: str, decoding: str) -> Any:
    """Read a setting of a decoding: one value, or a mapping by modality, or `None`.

    Args:
        config: The generation config. Its settings are one value, or mappings by decoding, by modality, or both.
        name: Name of the setting.
        decoding: "parallel" or "sequential".

    Raises:
        ValueError: The setting is a mapping by something else.
    """
    given = getattr(config, name, None)
    if isinstance(given, Mapping) and not set(given) & set(MODALITIES):
        given = _for_decoding(config, name, decoding)
    return given


def _by_modality(name: str, given: Any) -> dict[str, Any] | None:
    """Return a setting for each of `MODALITIES`. A missing entry defaults to that of image+title."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return dict.fromkeys(MODALITIES, given)
    if MODALITIES[0] not in given or set(given) - set(MODALITIES):
        raise ValueError(
            f"{name} has the keys {list(given)}; expected {MODALITIES[0]!r}, and optionally {MODALITIES[1:]}."
        )
    return {modality: given.get(modality, given[MODALITIES[0]]) for modality in MODALITIES}


def _check_search(config: GenerationConfig, tag_vocab_size: int) -> None:
    for name in ("num_beams", "num_return_sequences"):
        check_positive_integer(name, getattr(config, name))
    if config.num_beams > tag_vocab_size:
        raise ValueError(f"num_beams={config.num_beams} exceeds tag_vocab_size={tag_vocab_size}.")
    if config.num_beams > 1 and config.do_sample:
        raise ValueError(f"num_beams={config.num_beams} and do_sample=True exclude each other; choose one.")
    if not config.do_sample and config.num_return_sequences > config.num_beams:
        raise ValueError(
            f"num_return_sequences={config.num_return_sequences} needs at least as many num_beams "
            f"(now {config.num_beams}), or do_sample=True."
        )


def check_threshold(threshold: float) -> None:
    """Raise a `ValueError` unless a threshold is a probability."""
    if not 0 <= _finite("threshold", threshold) <= 1:
        raise ValueError(f"threshold={threshold} is a probability and must lie between 0 and 1.")


def check_positive_integer(name: str, value: Any) -> None:
    """Raise a `ValueError` unless a setting is `None` or an integer of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def _given(value: Any, default: Any) -> Any:
    """Return a setting, or its default if it is `None`. Other empty values are errors, not defaults."""
    return default if value is None else value


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    return float(value)


def _log_of_probability(name: str, value: Any) -> float:
    if not 0 <= _finite(name, value) < 1:
        raise ValueError(f"{name}={value} must lie in [0, 1).")
    return math.log(value) if value else -math.inf


def _for_decoding(config: GenerationConfig, name: str, decoding: str, default: Any = None) -> Any:
    """Read a setting that is one value for all decodings, or a mapping with a value per decoding."""
    value = getattr(config, name)
    if isinstance(value, Mapping):
        if unknown := set(value) - set(DECODINGS):
            raise ValueError(f"{name} is given for {sorted(map(str, unknown))}; the decodings are {DECODINGS}.")
        value = value.get(decoding)
    return default if value is None else value
