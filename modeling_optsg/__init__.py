"""OP-TSG: order-prompted tag sequence generation for images and videos."""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .base_models import OPTSGModel
from .baselines.asymmetric_classifier import ASYForTagClassification
from .baselines.knn import KNNForTagVote
from .baselines.open_book import OpenBookForTagGeneration
from .baselines.prompt_variants import ModelFForTagGeneration, ModelGForTagClassification
from .configuration_optsg import EfficientNetLiteConfig, OPTSGConfig
from .efficientnet_lite import EfficientNetLiteModel
from .modeling_optsg import OPTSGForTagGeneration
from .pipeline_optsg import TASK, TagGenerationPipeline
from .processing_optsg import OPTSGFeatureProcessor, OPTSGProcessor
from .tokenization_optsg import train_tag_tokenizer

if TYPE_CHECKING:
    from .data.collator import OPTSGDataCollator
    from .evaluation.calibration import fit_generation_config
    from .evaluation.metrics import TagEvaluator
    from .evaluation.prediction import predict_tags
    from .training.arguments import OPTSGTrainingArguments
    from .training.model_building import prepare_for_fine_tuning
    from .training.tag_trainer import TagMetrics, TagTrainer
    from .training.trainer import OPTSGTrainer

__version__ = "0.1.0"

__all__ = [
    "OPTSGConfig",
    "OPTSGDataCollator",
    "OPTSGFeatureProcessor",
    "OPTSGForTagGeneration",
    "OPTSGModel",
    "OPTSGProcessor",
    "OPTSGTrainer",
    "OPTSGTrainingArguments",
    "TagEvaluator",
    "TagGenerationPipeline",
    "TagMetrics",
    "TagTrainer",
    "fit_generation_config",
    "predict_tags",
    "prepare_for_fine_tuning",
    "train_tag_tokenizer",
]

# Imported on first use: they load `datasets` and `accelerate`, which tagging does not need.
_LAZY = {
    "OPTSGDataCollator": "data.collator",
    "OPTSGTrainer": "training.trainer",
    "OPTSGTrainingArguments": "training.arguments",
    "TagEvaluator": "evaluation.metrics",
    "TagMetrics": "training.tag_trainer",
    "TagTrainer": "training.tag_trainer",
    "fit_generation_config": "evaluation.calibration",
    "predict_tags": "evaluation.prediction",
    "prepare_for_fine_tuning": "training.model_building",
}

AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
for _model in (
    OPTSGForTagGeneration,
    ModelFForTagGeneration,
    ModelGForTagClassification,
    ASYForTagClassification,
    OpenBookForTagGeneration,
    KNNForTagVote,
):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _model, exist_ok=True)
    AutoProcessor.register(_model.config_class, OPTSGProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, TagGenerationPipeline, pt_model=AutoModel, type="multimodal")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
