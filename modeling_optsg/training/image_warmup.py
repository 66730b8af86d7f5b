"""Image warm-up: trains the image layers and the class embeddings on cached features, before the main training.

The model learns from images more slowly than from titles. A few minutes of warm-up replace many epochs of joint
training. Extra images can be added at little cost.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.atomic_files import os_errors
from modeling_optsg.data.checksums import is_cached, lock_cached, record_checksum
from modeling_optsg.data.feature_cache import CachedFeatures, digest
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.tag_classifier import asymmetric_loss

from .arguments import OPTSGTrainingArguments

logger = get_logger(__name__)

# Part of the cache key: increase it when the training below changes.
VERSION = 1
BATCH_SIZE = 128
WARMUP_RATIO = 0.06


def warm_up_image_evidence(
    model: OPTSGPreTrainedModel,
    args: OPTSGTrainingArguments,
    tags: Sequence[str],
    examples: CachedFeatures,
    extra_images: CachedFeatures | None,
) -> None:
    """Train the image evidence and the class embeddings of a model on cached image features.

    The weights are cached in `args.cache_dir`: runs with the same initial weights and data share them.

    Args:
        model: The model, whose image standardiser is fitted. One without a tag classifier is not changed.
        args: Training arguments. Nothing is done if `image_warmup_epochs` is 0 or `classifier_checkpoint` is
            given.
        tags: The tag of each class.
        examples: Training examples with `tags` and cached `image_features`.
        extra_images: Extra examples with `tags` and cached `image_features`. Tags that are not classes are ignored.

    Raises:
        ValueError: The examples have no cached image features, or no image has a tag that is a class.
    """
    if not args.image_warmup_epochs or args.classifier_checkpoint or getattr(model, "tag_classifier", None) is None:
        return
    if "image_features" not in examples.dataset.column_names:
        raise ValueError(
            "--image_warmup_epochs needs cached image features. They are not cached with --train_vision_tower, "
            "with --lora_rank or for datasets with frame_features; pass --image_warmup_epochs 0."
        )
    sources = [examples] if extra_images is None else [examples, extra_images]
    pooler, classifier = model.model.multimodal_encoder.evidence_pooler, model.tag_classifier
    modules = {"image_inner": pooler.image_inner, "image_outer": pooler.image_outer}
    shared = [pooler.log_scales, classifier.bias, classifier.class_embeddings.weight]
    rates = (args.learning_rate, args.learning_rate * args.embedding_lr_multiplier)
    parts = [source.dataset._fingerprint for source in sources] + [list(tags), args.image_warmup_epochs, rates]
    # Sums identify standardisation and class embeddings well enough, and do not depend on the order of rows.
    numbers = [pooler.standardizer.mean, pooler.standardizer.scale, shared[-1]]
    # Fine-tuning starts from the checkpoint's weights, other runs from the seed.
    numbers += [weight for part in modules.values() for weight in part.parameters()] if args.checkpoint else []
    config, names = model.config, ("classifier_dropout", "intermediate_size", "initializer_range")
    names += ("asl_gamma_negative", "asl_gamma_positive", "asl_margin")
    parts += [VERSION, args.seed, *(getattr(config, name) for name in names)]
    parts += [float(number.detach().sum()) for number in numbers]
    path = Path(args.cache_dir, "features", f"image-evidence-{digest(*parts)}.safetensors")
    trained = {f"{name}.{key}": value for name, part in modules.items() for key, value in part.named_parameters()}
    trained |= dict(zip(("log_scales", "bias", "class_embeddings"), shared, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_cached(path):
        if not is_cached(path):
            features, classes = _read(sources, tags)
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(args.seed)
                if not args.checkpoint:
                    for module in modules.values():
                        model._init_weights(module)
                groups = [
                    {"params": [p for part in modules.values() for p in part.parameters()], "lr": rates[0]},
                    {"params": [pooler.log_scales, classifier.bias], "lr": rates[0], "weight_decay": 0.0},
                    {"params": shared[-1:], "lr": rates[1], "weight_decay": 0.0},
                ]
                _train(model, features, classes, groups, args.image_warmup_epochs, args.seed)
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            with os_errors(path):
                save_file({name: value.detach().contiguous() for name, value in trained.items()}, partial)
            os.replace(partial, path)
            record_checksum(path)
    with torch.no_grad():
        for name, value in load_file(path).items():
            trained[name].copy_(value)


def _read(sources: Sequence[CachedFeatures], tags: Sequence[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return image features `[images, width]`, in half precision, and the classes of each image."""
    index = {tag: number for number, tag in enumerate(tags)}
    features, classes = [], []
    for source in sources:
        rows = source.dataset.select_columns(["image_features", "tags"])
        for row in rows:
            own = [index[tag] for tag in dict.fromkeys(row["tags"]) if tag in index]
            if row["image_features"] is not None and own:
                features.append(np.frombuffer(row["image_features"], np.float16))
                classes.append(torch.tensor(own))
    if not classes:
        raise ValueError("No training example has both an image and a training tag; pass --image_warmup_epochs 0.")
    return torch.from_numpy(np.stack(features)), classes


def _train(
    model: OPTSGPreTrainedModel,
    features: torch.Tensor,
    classes: list[torch.Tensor],
    groups: list[dict],
    num_epochs: float,
    seed: int,
) -> None:
    pooler, classifier, config = model.model.multimodal_encoder.evidence_pooler, model.tag_classifier, model.config
    exponents = (config.asl_gamma_negative, config.asl_gamma_positive, config.asl_margin)
    batch_size = min(BATCH_SIZE, len(features))
    steps = max(1, round(num_epochs * len(features) / batch_size))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP_RATIO * steps), steps)
    random, order = np.random.default_rng(seed), np.empty(0, dtype=int)
    model.train()
    total = 0.0
    for _ in tqdm(range(steps), desc="Image warm-up", unit="step"):
        if len(order) < batch_size:
            order = np.concatenate([order, random.permutation(len(features))])
        rows, order = order[:batch_size], order[batch_size:]
        targets = [classes[row] for row in rows]
        present = (
            torch.arange(batch_size).repeat_interleave(torch.tensor(list(map(len, targets)))),
            torch.cat(targets),
        )
        vectors = pooler.image_vectors(pooler.standardizer(features[rows].float().to(model.device)))
        loss = asymmetric_loss(classifier.project(vectors), tuple(p.to(model.device) for p in present), *exponents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 5.0)
        optimizer.step()
        scheduler.step()
        total += loss.item()
    # Training accumulates gradients, so clear them here.
    model.zero_grad()
    logger.info(f"Image warm-up: {steps} steps on {len(features)} images, mean loss {total / steps:.3f}.")
