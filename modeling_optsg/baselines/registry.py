"""All models by `model_type` of the training arguments, and which of their settings are fitted on validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.asymmetric_classifier import ASYForTagClassification
from modeling_optsg.baselines.knn import KNNForTagVote
from modeling_optsg.baselines.open_book import OpenBookForTagGeneration
from modeling_optsg.baselines.prompt_variants import ModelFForTagGeneration, ModelGForTagClassification
from modeling_optsg.evaluation.calibration import LOGIT_ADJUSTMENTS, PAD_BIASES
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration

# Thresholds lie far above, so a beam below this probability is not worth its time.
MIN_BEAM_PROBABILITY = 0.002


@dataclass(frozen=True)
class ModelSpec:
    """A model and how it is trained and fitted.

    Args:
        model: Its class.
        decodings: Its decodings, each fitted separately; `(None,)` if it has only one.
        has_pad: Whether [PAD], or the end of the sequence, competes with the tags, so that `pad_bias` is fitted.
        tags_per_slot: How a slot contributes several tags: "beams", "classes", or `None` if it cannot.
        needs_classes: Whether it needs the label vocabulary as its classes.
        needs_book: Whether it reads the tags of retrieved training examples ([`ExampleRetriever`]).
        is_trained: Whether it is trained; otherwise it only stores the training examples.
        config: Configuration fields that it has whatever the training arguments say.
        fitted: Other arguments of `generate` that are fitted, with the values to try.
    """

    model: type[OPTSGPreTrainedModel]
    decodings: tuple[str | None, ...] = (None,)
    has_pad: bool = True
    tags_per_slot: str | None = None
    needs_classes: bool = False
    needs_book: bool = False
    is_trained: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    fitted: Mapping[str, Sequence] = field(default_factory=dict)

    def grid(self, pad_biases: Sequence[float] = PAD_BIASES) -> dict[str, Sequence]:
        """Return the settings that `fit_generation_config` tries, in addition to the threshold."""
        return dict(self.fitted) | ({"pad_bias": pad_biases} if self.has_pad else {})

    def set_search(self, model: OPTSGPreTrainedModel, num_return_sequences: int, num_candidates: int) -> None:
        """Store in a model's `generation_config` how it searches for tags.

        Args:
            model: A model of this type.
            num_return_sequences: Number of tags that a slot may contribute.
            num_candidates: Number of classifier candidates, for a model with a tag classifier.
        """
        settings = {}
        if self.tags_per_slot is not None:
            # `transformers` does not save more sequences than beams, even for a model without beam search.
            settings |= {"num_return_sequences": num_return_sequences, "num_beams": num_return_sequences}
        if self.tags_per_slot == "beams":
            settings["min_beam_probability"] = MIN_BEAM_PROBABILITY
            if model.tag_classifier is not None:
                settings["num_candidates"] = num_candidates
        for name, value in settings.items():
            setattr(model.generation_config, name, value)


ADJUSTED = {"logit_adjustment": LOGIT_ADJUSTMENTS}
# Models that generate one sequence have one prompt.
ONE_PROMPT = {"num_prompts": 1}

MODEL_TYPES = {
    "op-tsg": ModelSpec(OPTSGForTagGeneration, ("parallel", "sequential"), tags_per_slot="beams"),
    "model-f": ModelSpec(ModelFForTagGeneration, ("parallel", "sequential"), tags_per_slot="beams"),
    "model-g": ModelSpec(ModelGForTagClassification, tags_per_slot="classes", needs_classes=True, fitted=ADJUSTED),
    "asy": ModelSpec(
        ASYForTagClassification,
        has_pad=False,
        needs_classes=True,
        fitted=ADJUSTED,
    ),
    "sequence": ModelSpec(OpenBookForTagGeneration, config=ONE_PROMPT | {"num_book_examples": 0}),
    "open-book": ModelSpec(OpenBookForTagGeneration, needs_book=True, config=ONE_PROMPT),
    "knn": ModelSpec(
        KNNForTagVote,
        has_pad=False,
        needs_classes=True,
        is_trained=False,
        fitted={"neighbours": (3, 5, 8, 10, 15), "image_weight": (0.2, 0.4, 0.7, 1.0)},
    ),
}


def find_model_type(config: PreTrainedConfig) -> str:
    """Return the name in `MODEL_TYPES` of the model that a configuration belongs to.

    Raises:
        ValueError: It is not the configuration of one of these models.
    """
    for name, spec in MODEL_TYPES.items():
        # "sequence" and "open-book" are one class and differ in these fields.
        has_fields = all(getattr(config, field, None) == value for field, value in spec.config.items())
        if spec.model.config_class.model_type == config.model_type and has_fields:
            return name
    raise ValueError(
        f"model_type={config.model_type!r} of config.json is not a model of this package; expected one of "
        f"{', '.join(sorted({spec.model.config_class.model_type for spec in MODEL_TYPES.values()}))}."
    )
