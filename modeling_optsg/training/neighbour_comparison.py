"""What the nearest neighbours would give without any training, for the end of a training run."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features, without_unreadable
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.evaluation.knn_comparison import validate_knn
from modeling_optsg.evaluation.metrics import TagEvaluator, metric_rank
from modeling_optsg.processing_optsg import OPTSGProcessor

from .arguments import OPTSGTrainingArguments
from .finishing import main_metrics

logger = get_logger(__name__)

# With more training examples, a random selection of them is compared with, which keeps time and memory limited.
MAX_EXAMPLES = 20_000


def compare_with_neighbours(
    args: OPTSGTrainingArguments,
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    train: Dataset,
    validation: Dataset,
    evaluator: TagEvaluator,
    fits: Mapping[str, Mapping],
) -> dict | None:
    """Log the validation metric of the trained model and of the kNN baseline on its towers.

    Args:
        args: Training arguments.
        model: The trained model.
        processor: Its processor.
        train: Training examples, as the training encoded them.
        validation: Validation examples, as the training encoded them.
        evaluator: Evaluator for them.
        fits: Fit of each decoding; see [`fit_best_model`].

    Returns:
        The result of [`validate_knn`]. `None` if the comparison is left out: the model is kNN itself, or the features
        of the training examples are not cached, because they are streamed or the vision tower was trained.
    """
    if args.model_type == "knn":
        return None
    if args.streaming or args.train_vision_tower:
        reason = "the examples are streamed" if args.streaming else "the vision tower was trained"
        logger.info(f"The comparison with nearest neighbours is left out, because {reason}. See `optsg evaluate`.")
        return None
    kept = None
    if len(train) > MAX_EXAMPLES:
        kept = np.sort(np.random.default_rng(0).permutation(len(train))[:MAX_EXAMPLES])
    examples = [_encode(train, model, processor, args, kept), _encode(validation, model, processor, args)]
    metric = args.metric_for_best_model
    knn = validate_knn(model, processor, *examples, evaluator, metric, progress=False)
    best = max(fits.values(), key=lambda fit: metric_rank(fit["validation"], metric))
    neighbours = main_metrics(knn)
    for name, value in main_metrics(best["validation"]).items():
        logger.info(f"Validation {name}: your model {value:.1f}, nearest neighbours {neighbours[name]:.1f}.")
    return knn


def _encode(
    rows: Dataset,
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    args: OPTSGTrainingArguments,
    kept: np.ndarray | None = None,
) -> CachedFeatures:
    """Return examples with the features of frozen towers from the cache, and those of a trained text tower.

    `kept` are the row numbers of the examples to return, all by default.
    """
    folder, titles = Path(args.cache_dir) / "features", args.train_text_layers == 0
    # All examples, whose features the training has cached. A selection of them would be encoded again.
    features = cache_tower_features(
        rows, model.model, processor, folder, titles=titles, max_unreadable=args.max_unreadable
    )
    if kept is not None:
        rows, features = rows.select(kept), features.select(kept)
    if titles:
        return CachedFeatures(without_unreadable(rows, features)[1])
    if kept is not None:
        if "image_features" in features.column_names:
            # Many times larger, and nearest neighbours do not need them.
            features = features.remove_columns(["frame_features", "frame_features_shape"])
        # Otherwise `datasets` would write the selection to a file that nobody deletes.
        features = Dataset(features.with_format("arrow")[:])
    with tempfile.TemporaryDirectory() as temporary:
        texts = cache_tower_features(rows.select_columns("title"), model.model, processor, temporary)
        texts = texts.remove_columns("title").with_format("arrow")[:]
    features = concatenate_datasets([features, Dataset(texts)], axis=1)
    return CachedFeatures(without_unreadable(rows, features)[1])
