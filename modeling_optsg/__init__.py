"""OP-TSG: order-prompted tag sequence generation for images and videos."""

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .baselines.asymmetric_classifier import ASYForTagClassification
from .baselines.knn import KNNForTagVote
from .baselines.open_book import OpenBookForTagGeneration
from .baselines.prompt_variants import ModelFForTagGeneration, ModelGForTagClassification
from .configuration_optsg import EfficientNetLiteConfig, OPTSGConfig
from .data.collator import OPTSGDataCollator, TagTable
from .efficientnet_lite import EfficientNetLiteModel
from .evaluation.metrics import TagEvaluator
from .generation_optsg import OPTSGGenerateOutput, TagVocabularyLogitsProcessor
from .modeling_optsg import OPTSGForTagGeneration, OPTSGModel, OPTSGModelOutput, OPTSGOutput, OPTSGPreTrainedModel
from .pipeline_optsg import TASK, TagGenerationPipeline
from .processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from .tokenization_optsg import train_tag_tokenizer

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
