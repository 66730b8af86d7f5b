"""The kNN baseline on the towers of another model: what the training examples give without any training."""

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.configuration import KNNConfig
from modeling_optsg.baselines.knn import KNNForTagVote
from modeling_optsg.baselines.pooling import pool_examples
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.feature_cache import CachedFeatures
from modeling_optsg.generation_settings import MODALITIES
from modeling_optsg.processing_optsg import OPTSGProcessor

from .calibration import fit_generation_config, modality_metric
from .metrics import TagEvaluator, metric_rank
from .prediction import predict_tags

# Columns that a tower reads, and the features that replace or accompany them.
TOWER_COLUMNS = {"image": "frame_features", "video": "frame_features", "title": "title_features"}


def validate_knn(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    train: CachedFeatures,
    validation: CachedFeatures,
    evaluator: TagEvaluator,
    metric_for_best_model: str = "full_f1",
    **predict_kwargs: object,
) -> dict:
    """Compute the validation metrics of the kNN baseline, to compare with those of a model at the end of its training.

    The settings of kNN are fitted on the same validation examples that its metrics are computed on, as the settings of
    the model are. Both are therefore a little better than on new examples, and comparable with each other.

    Args:
        model: The model with the towers. It is not changed.
        processor: The processor of the model.
        train: Training examples with the features of these towers and with `tags`. If towers were trained, the
            features that the training cached are not enough: see [`cache_readable_examples`].
        validation: Validation examples with the features of these towers.
        evaluator: Made from the ground truth of `validation`.
        metric_for_best_model: The validation metric to maximise, as in [`parse_metric`]; that of the model.
        predict_kwargs: Further arguments of [`predict_tags`].

    Returns:
        The metrics of [`TagEvaluator.score`], the fitted `neighbours`, `image_weight` and `threshold`, and
        `modalities`, the metrics of images alone and of titles alone with the `neighbours` and the `threshold` fitted
        for them.

    Raises:
        ValueError: Examples have no features, no training example has a tag, or the metric cannot be computed.
    """
    _, fit, alone = _fit(model, processor, train, validation, evaluator, metric_for_best_model, predict_kwargs)
    return _validation_metrics(fit) | {"modalities": {name: _validation_metrics(own) for name, own in alone.items()}}


def _validation_metrics(fit: dict) -> dict:
    return fit.pop("validation") | fit


def score_knn(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    train: CachedFeatures,
    validation: CachedFeatures,
    validation_evaluator: TagEvaluator,
    examples: CachedFeatures,
    evaluator: TagEvaluator,
    metric_for_best_model: str = "full_f1",
    **predict_kwargs: object,
) -> dict:
    """Compute the metrics of the kNN baseline on new examples. Its settings are fitted on the validation examples.

    Args:
        model, processor, train, validation, metric_for_best_model, predict_kwargs: See [`validate_knn`].
        validation_evaluator: Made from the ground truth of `validation`.
        examples: The new examples, such as the test split, with features.
        evaluator: Made from the ground truth of `examples`.

    Returns:
        As [`validate_knn`], with the metrics on `examples`. The metrics on `validation` are in `validation`, also for
        each of `modalities`.

    Raises:
        ValueError: See [`validate_knn`].
    """
    arguments = (train, validation, validation_evaluator, metric_for_best_model, predict_kwargs)
    knn, fit, alone = _fit(model, processor, *arguments)
    _check_features(examples)

    def score(**settings: object) -> dict:
        return evaluator.score(predict_tags(knn, processor, examples, **predict_kwargs | settings))

    modalities = {
        name: score(modalities=(name,), neighbours=own["neighbours"], threshold=own["threshold"]) | own
        for name, own in alone.items()
    }
    return score() | fit | {"modalities": modalities}


def _fit(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    train: CachedFeatures,
    validation: CachedFeatures,
    evaluator: TagEvaluator,
    metric_for_best_model: str,
    predict_kwargs: dict,
) -> tuple[KNNForTagVote, dict, dict[str, dict]]:
    """Fit kNN to the training examples, and its settings to the validation examples.

    Returns:
        The model, its settings with their metrics as `validation`, and the same for images alone and titles alone.
    """
    _check_features(validation)
    knn = fit_knn(model, processor, train)
    grid = MODEL_TYPES["knn"].grid()
    grid["neighbours"] = sorted({min(count, len(train)) for count in grid["neighbours"]})
    kwargs = {"metric_for_best_model": metric_for_best_model, "grid": grid} | predict_kwargs
    fit = fit_generation_config(knn, processor, validation, evaluator, **kwargs)
    del fit["tried"], fit["modalities"]
    metric = modality_metric(metric_for_best_model, evaluator)
    alone = {}
    for modality in MODALITIES[1:]:
        tried = []
        # The weight of the image changes nothing where there is only one similarity.
        for neighbours in grid["neighbours"]:
            kwargs = predict_kwargs | {"modalities": (modality,), "neighbours": neighbours, "threshold": 0.0}
            threshold, metrics = evaluator.best_threshold(predict_tags(knn, processor, validation, **kwargs), metric)
            tried.append({"neighbours": neighbours, "threshold": threshold, "validation": metrics})
        alone[modality] = max(tried, key=lambda own: metric_rank(own["validation"], metric))
    return knn, fit, alone


def fit_knn(model: OPTSGPreTrainedModel, processor: OPTSGProcessor, examples: CachedFeatures) -> KNNForTagVote:
    """Fit the kNN baseline to training examples, with the towers of a model.

    Args:
        model: The model with the towers.
        processor: The processor of the model.
        examples: Training examples with the features of these towers and with `tags`.

    Raises:
        ValueError: Examples have no features, or none has a tag.
    """
    _check_features(examples)
    tags = [list(dict.fromkeys(example_tags)) for example_tags in examples.dataset["tags"]]
    index = {tag: position for position, tag in enumerate(sorted({tag for row in tags for tag in row}))}
    if not index:
        raise ValueError("No training example has a tag that neighbours could give.")
    ids = processor.tag_tokenizer(list(index), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    config = KNNConfig(
        text_config=model.config.text_config,
        image_feature_size=model.config.image_feature_size,
        frame_feature_size=model.config.frame_feature_size,
        tag_vocab_size=model.config.tag_vocab_size,
        # Tags that are too long for the decoder of the model can also get votes.
        max_tag_tokens=max(map(len, ids)),
        num_tag_classes=len(index),
    )
    knn = KNNForTagVote(config).eval()
    knn.set_label_vocabulary(ids)
    knn.to(model.device)
    knn.fit(*pool_examples(examples, config), [[index[tag] for tag in row] for row in tags])
    return knn


def _check_features(examples: CachedFeatures) -> None:
    """Check that no tower must run: the towers of the kNN model have random weights."""
    for column, features in TOWER_COLUMNS.items():
        if column in examples.dataset.column_names and features not in examples.names:
            raise ValueError(
                f"The examples have a column {column}, but no {features}. Compute the features with "
                "cache_readable_examples, also those of a trained tower."
            )
