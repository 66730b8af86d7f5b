"""OP-TSG: order-prompted tag sequence generation for pictures and videos."""

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_optsg import EfficientNetLiteConfig, OPTSGConfig
from .data_collator import OPTSGDataCollator, TagTable
from .efficientnet_lite import EfficientNetLiteModel
from .modeling_asy import ASYForTagClassification
from .modeling_knn import KNNForTagVote
from .modeling_open_book import OpenBookForTagGeneration
from .modeling_optsg import (
    OPTSGForTagGeneration,
    OPTSGModel,
    OPTSGModelOutput,
    OPTSGOutput,
    OPTSGPreTrainedModel,
)
from .modeling_variants import ModelFForTagGeneration, ModelGForTagClassification
from .pipeline_optsg import TASK, TagGenerationPipeline
from .processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from .tag_generation import OPTSGGenerateOutput, TagVocabularyLogitsProcessor
from .tag_metrics import TagEvaluator
from .tag_tokenizer import train_tag_tokenizer

__version__ = "0.1.0"

AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
for model in (
    OPTSGForTagGeneration,
    ModelFForTagGeneration,
    ModelGForTagClassification,
    ASYForTagClassification,
    OpenBookForTagGeneration,
    KNNForTagVote,
):
    AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
    AutoModel.register(model.config_class, model, exist_ok=True)
    AutoProcessor.register(model.config_class, OPTSGProcessor, exist_ok=True)
del model
PIPELINE_REGISTRY.register_pipeline(TASK, TagGenerationPipeline, pt_model=AutoModel, type="multimodal")

__all__ = [
    "ASYForTagClassification",
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "KNNForTagVote",
    "ModelFForTagGeneration",
    "ModelGForTagClassification",
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
    "OpenBookForTagGeneration",
    "TagEvaluator",
    "TagGenerationPipeline",
    "TagTable",
    "TagVocabularyLogitsProcessor",
    "train_tag_tokenizer",
]
