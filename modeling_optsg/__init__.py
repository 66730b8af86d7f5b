"""OP-TSG: order-prompted tag sequence generation for pictures and videos."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_optsg import EfficientNetLiteConfig, OPTSGConfig
from .data_collator import OPTSGDataCollator, TagTable
from .efficientnet_lite import EfficientNetLiteModel
from .modeling_optsg import (
    OPTSGForTagGeneration,
    OPTSGModel,
    OPTSGModelOutput,
    OPTSGOutput,
    OPTSGPreTrainedModel,
)
from .processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from .tag_generation import OPTSGGenerateOutput, TagVocabularyLogitsProcessor
from .tag_metrics import TagEvaluator
from .tag_tokenizer import train_tag_tokenizer

__version__ = "0.1.0"

AutoConfig.register("optsg", OPTSGConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoModel.register(OPTSGConfig, OPTSGForTagGeneration, exist_ok=True)
AutoProcessor.register(OPTSGConfig, OPTSGProcessor, exist_ok=True)

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "OPTSGConfig",
    "OPTSGDataCollator",
    "OPTSGFeatureProcessor",
    "OPTSGForTagGeneration",
    "OPTSGGenerateOutput",
    "OPTSGModel",
    "OPTSGModelOutput",
    "OPTSGOutput",
    "OPTSGPreTrainedModel",
    "OPTSGProcessor",
    "TagEvaluator",
    "TagTable",
    "TagVocabularyLogitsProcessor",
    "train_tag_tokenizer",
]
