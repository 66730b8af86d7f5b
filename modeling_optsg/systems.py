"""The systems of the paper by name, and what of each is fitted on validation items."""

from dataclasses import dataclass

from .modeling_asy import ASYForTagClassification
from .modeling_open_book import OpenBookForTagGeneration
from .modeling_optsg import OPTSGForTagGeneration, OPTSGPreTrainedModel
from .modeling_variants import ModelFForTagGeneration, ModelGForTagClassification
from .prediction import PAD_BIASES


@dataclass(frozen=True)
class System:
    """
    Args:
        model: its class.
        decodings: the ways it writes, each fitted by itself; `(None,)` where there is only one.
        has_pad: whether [PAD], or the end of the sequence, competes with the tags, so that `pad_bias` is fitted.
        has_alternatives: how a slot contributes several tags: "beams", "classes", or not at all.
        needs_classes: whether train tags are classes of it.
        config: what its configuration has beside the defaults.
    """

    model: type[OPTSGPreTrainedModel]
    decodings: tuple[str | None, ...] = (None,)
    has_pad: bool = True
    has_alternatives: str | None = None
    needs_classes: bool = False
    config: tuple[tuple[str, object], ...] = ()

    def grid(self) -> dict[str, tuple[float, ...]]:
        """What `fit_generation_config` tries beside the threshold."""
        return {"pad_bias": PAD_BIASES} if self.has_pad else {}

    def search(self, alternatives: int) -> dict[str, int]:
        """Arguments of `generate` for so many tags a slot."""
        names = {"beams": ("num_beams", "num_return_sequences"), "classes": ("alternatives",), None: ()}
        return dict.fromkeys(names[self.has_alternatives], alternatives)


SYSTEMS = {
    "op-tsg": System(OPTSGForTagGeneration, ("parallel", "sequential"), has_alternatives="beams"),
    "model-f": System(ModelFForTagGeneration, ("parallel", "sequential"), has_alternatives="beams"),
    "model-g": System(ModelGForTagClassification, has_alternatives="classes", needs_classes=True),
    "asy": System(ASYForTagClassification, has_pad=False, needs_classes=True),
    "sequence": System(OpenBookForTagGeneration, config=(("num_book_items", 0),)),
}
