"""Adds the pretrained classifier of the vision tower to a model, for image words."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_optsg.base_models import OPTSGPreTrainedModel, OPTSGTowers
from modeling_optsg.image_words import POOLINGS, ImageWords, pool_for_words
from modeling_optsg.towers import register_tower
from modeling_optsg.vision_tower import image_inputs, pretraining_size

# CLIP's prompt for a class name (Radford et al., 2021, section 3.1.4).
PROMPT = "a photo of a {}."
TOLERANCE = 1e-3


def can_name_images(vision_name_or_path: str) -> bool:
    """Whether a vision tower comes with a classifier, or with a text tower as in CLIP."""
    config = AutoConfig.from_pretrained(vision_name_or_path)
    return _is_classifier(config) or _is_two_tower(config)


def add_image_words(
    model: OPTSGPreTrainedModel,
    vision_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str] | None = None,
) -> None:
    """Give a model the image words of its vision tower.

    Args:
        model: The model, built on this vision tower.
        vision_name_or_path: Folder or Hub name of an image classifier, whose `id2label` has the words, or of a
            two-tower model such as CLIP or SigLIP.
        tokenizer: Tokenizer of the model's text tower.
        words: Only for a two-tower model: the words to look for.

    Raises:
        ValueError: The tower cannot name images, `words` are missing or not needed, or the input of the classifier is
            not the tower's pooled output, first token or mean token.
    """
    tower_config = AutoConfig.from_pretrained(vision_name_or_path)
    towers = model.model
    if _is_two_tower(tower_config):
        if not words:
            raise ValueError(f"{vision_name_or_path} is a two-tower model; pass the words that it should look for.")
        weights, settings = _two_tower_head(vision_name_or_path, list(words))
    elif _is_classifier(tower_config):
        if words:
            raise ValueError(
                f"{vision_name_or_path} is an image classifier and uses its own class names; pass no other words."
            )
        register_tower(tower_config)
        weights, settings = _classifier_head(vision_name_or_path, tower_config, towers.vision_tower)
    else:
        raise ValueError(f"{vision_name_or_path} is neither an image classifier nor a two-tower model such as CLIP.")
    for name, value in settings.items():
        setattr(model.config, name, value)
    image_words = ImageWords(model.config)
    image_words.load_state_dict(weights, strict=False)
    towers.image_words = image_words.requires_grad_(False).to(model.device).train(model.training)
    embed_image_words(towers, tokenizer)


@torch.no_grad()
def embed_image_words(towers: OPTSGTowers, tokenizer: PreTrainedTokenizerBase, batch_size: int = 256) -> None:
    """Compute the text features of the image words. Call this again after the text tower has changed.

    Args:
        towers: The towers of a model.
        tokenizer: Tokenizer of its text tower.
        batch_size: Words per forward pass.
    """
    if towers.image_words is None:
        return
    labels, mode = towers.config.image_word_labels, towers.text_tower.training
    towers.text_tower.eval()
    for start in range(0, len(labels), batch_size):
        batch = tokenizer(labels[start : start + batch_size], padding=True, truncation=True, return_tensors="pt")
        features = towers.embed_tags(batch["input_ids"].to(towers.device), batch["attention_mask"].to(towers.device))
        towers.image_words.text_features[start : start + batch_size] = features
    towers.text_tower.train(mode)


def is_two_tower(name_or_path: str) -> bool:
    """Return whether a checkpoint is a model such as CLIP, with a text tower of its own."""
    return _is_two_tower(AutoConfig.from_pretrained(name_or_path))


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForImageClassification") for name in config.architectures or ())


def _is_two_tower(config: PreTrainedConfig) -> bool:
    # An image classifier that was made from a two-tower model has no text tower.
    return hasattr(config, "text_config") and hasattr(config, "vision_config") and not _is_classifier(config)


def _classifier_head(
    name_or_path: str, config: PreTrainedConfig, tower: PreTrainedModel
) -> tuple[dict[str, torch.Tensor], dict]:
    model = AutoModelForImageClassification.from_pretrained(name_or_path, dtype=torch.float32).eval()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    if linear.out_features != config.num_labels:
        raise ValueError(
            f"{name_or_path}: the last linear layer has {linear.out_features} outputs for {config.num_labels} labels."
        )
    read = []
    handle = linear.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    pixel_values = torch.randn(2, 3, *pretraining_size(tower.config), generator=torch.Generator().manual_seed(0))
    inputs = image_inputs(tower, pixel_values.to(tower.device))
    with torch.no_grad():
        model.to(tower.device)(**inputs)
        outputs = tower.eval()(**inputs)
    handle.remove()
    pooling = next((pooling for pooling in POOLINGS if _reads(outputs, pooling, read[0].flatten(1))), None)
    if pooling is None:
        raise ValueError(f"{name_or_path}: the input of the classifier is none of {', '.join(POOLINGS)} of the tower.")
    settings = {
        "image_word_labels": [str(config.id2label[index]) for index in range(config.num_labels)],
        "image_word_feature_size": linear.in_features,
        "image_word_pooling": pooling,
    }
    weights = {"classifier.weight": linear.weight.detach()}
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    return weights | {"classifier.bias": bias}, settings


def _reads(outputs: object, pooling: str, read: torch.Tensor) -> bool:
    if pooling == "pooler_output" and getattr(outputs, "pooler_output", None) is None:
        return False
    pooled = pool_for_words(outputs, pooling).to(read.device)
    return pooled.shape == read.shape and torch.allclose(pooled, read, atol=TOLERANCE)


@torch.no_grad()
def _two_tower_head(name_or_path: str, words: list[str]) -> tuple[dict[str, torch.Tensor], dict]:
    model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    features = []
    for start in range(0, len(words), 256):
        texts = [PROMPT.format(word) for word in words[start : start + 256]]
        # SigLIP was trained with texts padded to this length.
        settings = {"padding": True, "truncation": True}
        if "siglip" in model.config.model_type:
            settings |= {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings}
        batch = tokenizer(texts, return_tensors="pt", **settings)
        outputs = model.get_text_features(**batch)
        features.append(outputs if isinstance(outputs, torch.Tensor) else outputs.pooler_output)
    features = nn.functional.normalize(torch.cat(features), dim=-1) * model.logit_scale.exp()
    weights = {"classifier.weight": features, "classifier.bias": features.new_zeros(len(words))}
    projection = getattr(model, "visual_projection", None)
    if projection is not None:
        weights["projection.weight"] = projection.weight
    settings = {
        "image_word_labels": words,
        "image_word_feature_size": features.shape[1] if projection is None else projection.in_features,
        "image_word_projection_size": None if projection is None else projection.out_features,
        "image_word_pooling": "pooler_output",
        "image_word_normalize": True,
    }
    return weights, settings
