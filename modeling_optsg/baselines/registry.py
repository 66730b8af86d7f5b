"""The systems of the paper by name, and what of each is fitted on validation examples."""

from collections.abc import Sequence
from dataclasses import dataclass

from modeling_optsg.baselines.asymmetric_classifier import ASYForTagClassification
from modeling_optsg.baselines.knn import KNNForTagVote
from modeling_optsg.baselines.open_book import OpenBookForTagGeneration
from modeling_optsg.baselines.prompt_variants import ModelFForTagGeneration, ModelGForTagClassification
from modeling_optsg.evaluation.calibration import LOGIT_ADJUSTMENTS, PAD_BIASES
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration, OPTSGPreTrainedModel


@dataclass(frozen=True)
class BaselineSpec:
    """
    Args:
        model: its class.
        decodings: the ways it writes, each fitted by itself; `(None,)` where there is only one.
        has_pad: whether [PAD], or the end of the sequence, competes with the tags, so that `pad_bias` is fitted.
        has_alternatives: how a slot contributes several tags: "beams", "classes", or not at all.
        needs_classes: whether train tags are classes of it.
        needs_book: whether it looks into a [`TagBook`] of the training examples.
        learns: whether it has anything to train; what has not remembers the training examples.
        config: what its configuration has whatever a preset says.
        fitted: further arguments of `generate` that are fitted, with the values tried.
    """

    model: type[OPTSGPreTrainedModel]
    decodings: tuple[str | None, ...] = (None,)
    has_pad: bool = True
    has_alternatives: str | None = None
    needs_classes: bool = False
    needs_book: bool = False
    learns: bool = True
    config: tuple[tuple[str, object], ...] = ()
    fitted: tuple[tuple[str, tuple], ...] = ()

    def grid(self, pad_biases: Sequence[float] = PAD_BIASES) -> dict[str, Sequence]:
        """What `fit_generation_config` tries beside the threshold."""
        return dict(self.fitted) | ({"pad_bias": pad_biases} if self.has_pad else {})

    def set_search(self, model: OPTSGPreTrainedModel, num_return_sequences: int, num_candidates: int) -> None:
        """Puts into a model's `generation_config` how it looks for tags.

        Args:
            num_return_sequences: tags a slot may contribute.
            num_candidates: train tags that suit an example as a whole, candidates too; of models with `use_tag_classifier`.
        """
        names = {"beams": ("num_beams", "num_return_sequences"), "classes": ("num_return_sequences",), None: ()}
        settings = dict.fromkeys(names[self.has_alternatives], num_return_sequences)
        if self.has_alternatives == "beams":
            settings["min_beam_probability"] = MIN_BEAM_PROBABILITY
        if getattr(model, "tag_classifier", None) is not None:
            settings["num_candidates"] = num_candidates
        for name, value in settings.items():
            setattr(model.generation_config, name, value)


# Alternatives of a slot below this probability are not worth their time: thresholds lie far above.
MIN_BEAM_PROBABILITY = 0.002

RARER = (("logit_adjustment", LOGIT_ADJUSTMENTS),)

# Systems without slots: one query pools the memory.
ONE_QUERY = (("num_prompts", 1),)
# Whatever OP-TSG's prompts begin from, a classifier has the example's summary.
WITH_POOLER = (*ONE_QUERY, ("use_prompt_pooler", True))

MODEL_TYPES = {
    "op-tsg": BaselineSpec(OPTSGForTagGeneration, ("parallel", "sequential"), has_alternatives="beams"),
    "model-f": BaselineSpec(ModelFForTagGeneration, ("parallel", "sequential"), has_alternatives="beams"),
    "model-g": BaselineSpec(ModelGForTagClassification, has_alternatives="classes", needs_classes=True, fitted=RARER),
    "asy": BaselineSpec(ASYForTagClassification, has_pad=False, needs_classes=True, config=WITH_POOLER, fitted=RARER),
    "sequence": BaselineSpec(OpenBookForTagGeneration, config=(*ONE_QUERY, ("num_book_examples", 0))),
    "open-book": BaselineSpec(OpenBookForTagGeneration, needs_book=True, config=ONE_QUERY),
    "knn": BaselineSpec(
        KNNForTagVote,
        has_pad=False,
        needs_classes=True,
        learns=False,
        fitted=(("neighbours", (3, 5, 8, 10, 15)), ("image_weight", (0.2, 0.4, 0.7, 1.0))),
    ),
}
