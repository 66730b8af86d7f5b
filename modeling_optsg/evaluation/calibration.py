"""Calibration: decoding settings fitted on validation examples, and the reliability of probabilities."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.generation_optsg import OrderPromptGenerationMixin
from modeling_optsg.generation_settings import MODALITIES
from modeling_optsg.processing_optsg import OPTSGProcessor
from modeling_optsg.tag_merging import MIN_SLOT_PROBABILITY

from .metrics import TagEvaluator, metric_rank
from .prediction import generate_batches, predict_tags

# Values that the fits try: the bias added to the logit of [PAD], the weight of the slots' logit (the rest is the
# classifier's), and the strength of the logit adjustment in favour of rare tags.
PAD_BIASES = (0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -4.0)
SLOT_WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
LOGIT_ADJUSTMENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)

# More tags than an example can have.
NO_TAG_LIMIT = 1_000_000


def fit_generation_config(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    *,
    decoding: str | None = None,
    metric_for_best_model: str = "full_f1",
    grid: Mapping[str, Sequence] | None = None,
    **predict_kwargs: object,
) -> dict:
    """Fit decoding settings on validation examples and store them in the model's `generation_config`.

    Every combination of `grid` is tried, and with each of them every threshold. For a model with a tag classifier only
    the smallest `pad_bias` is tried, and [`fit_fusion_weights`] fits `fusion_weights` and `logit_adjustment` together
    with the threshold.

    Args:
        model: A model with `generate`.
        processor: The processor of the model.
        examples: Validation examples.
        evaluator: Made from the ground truth of `examples`.
        decoding: The decoding to fit and to store the settings under; `None` for a model with only one.
        metric_for_best_model: The validation metric to maximise, as in [`parse_metric`].
        grid: Values to try for each argument of `generate`; `PAD_BIASES` for `pad_bias` by default.
        predict_kwargs: Further arguments of [`predict_tags`].

    Returns:
        The best settings by name, `threshold` among them; `validation`, the metrics with these settings; `tried`, the
        settings and validation metrics of every combination; and `modalities`, the validation metrics of the image
        alone and of the title alone.

    Example:

        >>> from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator, fit_generation_config
        >>> model = OPTSGForTagGeneration.from_pretrained("checkpoints/optsg-icon-small")
        >>> processor = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> examples = [{"title": "bus", "tags": ["bus", "vehicle"]}, {"title": "tent", "tags": ["camping"]}]
        >>> evaluator = TagEvaluator([example["tags"] for example in examples], processor.label_vocabulary)
        >>> fit = fit_generation_config(model, processor, examples, evaluator, decoding="parallel", progress=False)
        >>> sorted(set(fit) - {"tried", "validation", "modalities", "slot_weight"})
        ['fusion_weights', 'logit_adjustment', 'pad_bias', 'threshold']
    """
    # Fail before the predictions, which take long.
    evaluator.check_metric(metric_for_best_model)
    grid = {"pad_bias": PAD_BIASES} if grid is None else dict(grid)
    kwargs = predict_kwargs | ({} if decoding is None else {"decoding": decoding})
    fitted = (*grid, "threshold")
    tried = []
    if isinstance(model, OrderPromptGenerationMixin) and model.tag_classifier is not None:
        # The fused probability decides whether an unlikely tag is kept, so as many slots as possible should generate.
        grid["pad_bias"] = [min(grid.get("pad_bias", PAD_BIASES))]
        fitted = (*grid, "fusion_weights", "logit_adjustment", "threshold")
        for settings in _combinations(grid):
            fits = fit_fusion_weights(
                model, processor, examples, evaluator, metric_for_best_model, **kwargs, **settings
            )
            tried += [settings | fit for fit in fits]
    else:
        one_pass = decoding in getattr(model, "independent_decodings", ())
        predict = _predict_at_pad_biases if one_pass and grid.get("pad_bias") else _predict_combinations
        for settings, predictions in predict(model, processor, examples, grid, **kwargs):
            threshold, metrics = evaluator.best_threshold(predictions, metric_for_best_model)
            tried.append(settings | {"threshold": threshold, "validation": metrics})
    best = max(tried, key=lambda fit: metric_rank(fit["validation"], metric_for_best_model))
    fit_alone = fit_modality if "fusion_weights" in best else _validate_modality
    arguments = (model, processor, examples, evaluator, metric_for_best_model)
    alone = {modality: fit_alone(*arguments, modality, best, **kwargs) for modality in MODALITIES[1:]}
    if "fusion_weights" in best:
        by_modality = {MODALITIES[0]: best} | alone
        for name in ("fusion_weights", "threshold"):
            best = best | {name: {modality: fit[name] for modality, fit in by_modality.items()}}
    _store(model, {name: best[name] for name in fitted}, decoding)
    return best | {"modalities": {name: fit["validation"] for name, fit in alone.items()}, "tried": tried}


def _combinations(grid: Mapping[str, Sequence]) -> Iterator[dict]:
    return (dict(zip(grid, values)) for values in itertools.product(*grid.values()))


def _predict_combinations(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    grid: Mapping[str, Sequence],
    **kwargs: object,
) -> Iterator[tuple[dict, list[list[dict]]]]:
    """Predicts all tags of the examples with each combination of settings, one pass each."""
    for settings in _combinations(grid):
        yield settings, predict_tags(model, processor, examples, **kwargs | settings | {"threshold": 0.0})


def _predict_at_pad_biases(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    grid: Mapping[str, Sequence],
    **kwargs: object,
) -> Iterator[tuple[dict, list[list[dict]]]]:
    """Do the same as [`_predict_combinations`] with one pass for all values of `pad_bias`.

    Valid only where slots do not see one another: then the bias decides which slots generate a tag, and not which tag.
    """
    pad_biases = grid["pad_bias"]
    max_tags = kwargs.get("max_tags", getattr(model.generation_config, "max_tags", None))
    for settings in _combinations({name: values for name, values in grid.items() if name != "pad_bias"}):
        predictions = [[[] for _ in range(len(examples))] for _ in pad_biases]
        settings_of_pass = settings | {"threshold": 0.0, "pad_bias": min(pad_biases), "output_slots": True}
        for indices, outputs in generate_batches(model, processor, examples, **kwargs | settings_of_pass):
            for biased_predictions, pad_bias in zip(predictions, pad_biases):
                biased = outputs.at_pad_bias(pad_bias, model.config.tag_pad_token_id, max_tags)
                for index, tags in zip(indices, processor.batch_decode(biased)):
                    biased_predictions[index] = tags
        for pad_bias, biased_predictions in zip(pad_biases, predictions):
            yield settings | {"pad_bias": pad_bias}, biased_predictions


def _store(model: OPTSGPreTrainedModel, settings: Mapping[str, object], decoding: str | None) -> None:
    """Store settings in the `generation_config`, under the name of a decoding where there are several."""
    for name, value in settings.items():
        if decoding is not None:
            stored = getattr(model.generation_config, name, None)
            value = (stored if isinstance(stored, dict) else {}) | {decoding: value}
        setattr(model.generation_config, name, value)


def fit_fusion_weights(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    metric_for_best_model: str,
    **generate_kwargs: object,
) -> list[dict]:
    """Fit how the logits of the slots and of the tag classifier are fused into one probability.

    One pass over the examples finds all candidates. For each value of `SLOT_WEIGHTS`, and around the best of them for
    each of `LOGIT_ADJUSTMENTS`, the two logits are mixed, a logistic regression turns the mixture into a probability,
    and every threshold is tried. The likelihood alone would not find the best mixture, because common tags dominate
    it.

    Args:
        model: A model with a tag classifier.
        processor: The processor of the model.
        examples: Validation examples.
        evaluator: Made from the ground truth of `examples`.
        metric_for_best_model: The validation metric to maximise, as in [`parse_metric`].
        generate_kwargs: Arguments of [`generate_batches`] and of `generate`.

    Returns:
        For each mixture `{"slot_weight", "logit_adjustment", "fusion_weights", "threshold", "validation"}`, with the
        weights as `generate` takes them.
    """
    candidates = _find_candidates(model, processor, examples, evaluator, **generate_kwargs)
    fit = _MixtureFit(candidates, evaluator, metric_for_best_model)
    fits = [fit(slot_weight, LOGIT_ADJUSTMENTS[0]) for slot_weight in SLOT_WEIGHTS]
    # Coordinate descent: trying all pairs takes minutes.
    for _ in range(2):
        best = max(fits, key=lambda fit: metric_rank(fit["validation"], metric_for_best_model))
        if best["slot_weight"] < 1:
            pairs = {(best["slot_weight"], adjustment) for adjustment in LOGIT_ADJUSTMENTS}
            pairs |= {(weight, best["logit_adjustment"]) for weight in SLOT_WEIGHTS if weight < 1}
            done = {(fit["slot_weight"], fit["logit_adjustment"]) for fit in fits}
            fits += [fit(*pair) for pair in sorted(pairs - done)]
    return fits


def fit_modality(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    metric_for_best_model: str,
    modality: str,
    settings: Mapping,
    **generate_kwargs: object,
) -> dict:
    """Fit fusion weights and threshold for examples with only an image or only a title.

    The logit adjustment is not fitted again.

    Args:
        model: A model with a tag classifier.
        processor: The processor of the model.
        examples: Validation examples.
        evaluator: Made from the ground truth of `examples`.
        metric_for_best_model: The validation metric to maximise, as in [`parse_metric`].
        modality: "image" or "title".
        settings: The fit for examples with both.
        generate_kwargs: Arguments of [`generate_batches`] and of `generate`.

    Returns:
        `fusion_weights`, `threshold` and `validation`; `settings` if no known candidate is correct for this modality.
    """
    kwargs = dict(generate_kwargs) | {"modalities": (modality,)}
    if "pad_bias" in settings:
        kwargs["pad_bias"] = settings["pad_bias"]
    candidates = _find_candidates(model, processor, examples, evaluator, **kwargs)
    if not candidates.is_correct[~candidates.is_novel].any():
        return settings | {"validation": None}
    # Leave out examples without this modality; otherwise their tags count as false negatives.
    own = [index for index, tags in enumerate(candidates.tags) if tags]
    candidates, evaluator = replace(candidates, tags=[candidates.tags[index] for index in own]), evaluator.select(own)
    metric = modality_metric(metric_for_best_model, evaluator)
    fit = _MixtureFit(candidates, evaluator, metric)
    fits = [fit(slot_weight, settings["logit_adjustment"]) for slot_weight in SLOT_WEIGHTS]
    return max(fits, key=lambda fit: metric_rank(fit["validation"], metric))


def _validate_modality(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    metric_for_best_model: str,
    modality: str,
    settings: Mapping,
    **generate_kwargs: object,
) -> dict:
    """Do the same as [`fit_modality`] for a model without fusion weights: find the threshold, and store nothing."""
    kwargs = {name: settings[name] for name in settings.keys() - {"threshold", "validation"}} | generate_kwargs
    kwargs |= {"threshold": 0.0, "modalities": (modality,)}
    predictions = predict_tags(model, processor, examples, **kwargs)
    threshold, metrics = evaluator.best_threshold(predictions, modality_metric(metric_for_best_model, evaluator))
    return {"threshold": threshold, "validation": metrics}


def modality_metric(metric_for_best_model: str, evaluator: TagEvaluator) -> str:
    """Return the metric to maximise for examples without a modality.

    A condition such as @micro_f1>=52 applies to examples with both modalities. These examples may have no rare tags.
    """
    metric = metric_for_best_model.partition("@")[0]
    try:
        evaluator.check_metric(metric)
    except ValueError:
        return "full_f1"
    return metric


@dataclass
class _Candidates:
    """The candidates of all examples, one after the other.

    Args:
        tags: The candidates of each example, N in all.
        slot_logits: `[N]`.
        classifier_logits: `[N]`, without logit adjustment; 0 for novel tags.
        log_counts: `[N]`, logarithms of training counts, 0 for novel tags.
        is_novel: `[N]`.
        is_correct: `[N]`, 1 for candidates in the ground truth of their example, else 0.
    """

    tags: list[list[str]]
    slot_logits: np.ndarray
    classifier_logits: np.ndarray
    log_counts: np.ndarray
    is_novel: np.ndarray
    is_correct: np.ndarray

    def to_predictions(self, scores: np.ndarray) -> list[list[dict]]:
        """Return the candidates with scores `[N]` as predictions."""
        predictions = []
        ends = np.cumsum([len(tags) for tags in self.tags])[:-1]
        for tags, tag_scores in zip(self.tags, np.split(scores, ends)):
            # Different tokens may spell the same tag: the larger score counts.
            best = dict(sorted(zip(tags, tag_scores.tolist()), key=lambda pair: pair[1]))
            predictions.append([{"tag": tag, "score": score} for tag, score in best.items() if tag.strip()])
        return predictions


def _find_candidates(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    **generate_kwargs: object,
) -> _Candidates:
    # The classifier proposes its candidates after logit adjustment: with a medium one, they serve all that are tried.
    adjustment = LOGIT_ADJUSTMENTS[len(LOGIT_ADJUSTMENTS) // 2]
    # Placeholder weights: only the logits are read. Without limit, because the ranking depends on the weights.
    kwargs = {"max_tags": NO_TAG_LIMIT} | generate_kwargs
    kwargs |= {"threshold": 0.0, "fusion_weights": (1.0, 0.0, 0.0, 1.0, 0.0), "logit_adjustment": adjustment}
    pad_token_id, vocabulary = model.config.tag_pad_token_id, model.tag_classifier.label_vocabulary
    class_index, class_log_counts = vocabulary.class_index(), vocabulary.log_counts.tolist()
    tags = [[] for _ in range(len(examples))]
    slot_logits, classifier_logits, log_counts = ([torch.empty(0).double()] * len(examples) for _ in range(3))
    for indices, outputs in generate_batches(model, processor, examples, **kwargs):
        is_tag = outputs.sequences.ne(pad_token_id).any(dim=-1)
        for row, index in enumerate(indices):
            kept = is_tag[row]
            sequences = outputs.sequences[row, kept]
            tags[index] = processor.tag_tokenizer.batch_decode(sequences, skip_special_tokens=True)
            probabilities = outputs.slot_scores[row, kept].cpu().double()
            slot_logits[index] = probabilities.clamp(MIN_SLOT_PROBABILITY, 1 - MIN_SLOT_PROBABILITY).logit()
            classifier_logits[index] = outputs.classifier_logits[row, kept].cpu().double()
            token_ids = (tuple(token for token in ids if token != pad_token_id) for ids in sequences.tolist())
            classes = [class_index.get(ids) for ids in token_ids]
            counts = [math.nan if tag_class is None else class_log_counts[tag_class] for tag_class in classes]
            log_counts[index] = torch.tensor(counts).double()
    all_log_counts = torch.cat(log_counts).numpy()
    is_novel, all_log_counts = np.isnan(all_log_counts), np.nan_to_num(all_log_counts)
    correct = [tag in evaluator.references[index] for index, found in enumerate(tags) for tag in found]
    return _Candidates(
        tags=tags,
        slot_logits=torch.cat(slot_logits).numpy(),
        classifier_logits=torch.cat(classifier_logits).numpy() + adjustment * all_log_counts,
        log_counts=all_log_counts,
        is_novel=is_novel,
        is_correct=np.array(correct, dtype=float),
    )


class _MixtureFit:
    """Fits weighted sums of the slot logits and the classifier logits of candidates."""

    def __init__(self, candidates: _Candidates, evaluator: TagEvaluator, metric: str):
        self.candidates, self.evaluator, self.metric = candidates, evaluator, metric
        novel = candidates.is_novel
        self.novel_weights = logistic_regression(candidates.slot_logits[novel], candidates.is_correct[novel])

    def __call__(self, slot_weight: float, adjustment: float) -> dict:
        """Fit scale, bias and threshold of one mixture; see [`fit_fusion_weights`]."""
        candidates = self.candidates
        adjusted = candidates.classifier_logits - adjustment * candidates.log_counts
        mixture = slot_weight * candidates.slot_logits + (1 - slot_weight) * adjusted
        known = ~candidates.is_novel
        scale, bias = logistic_regression(mixture[known], candidates.is_correct[known])
        novel_scale, novel_bias = self.novel_weights
        novel_logits = novel_scale * candidates.slot_logits + novel_bias
        scores = expit(np.where(known, scale * mixture + bias, novel_logits))
        weights = [scale * slot_weight, scale * (1 - slot_weight), bias, *self.novel_weights]
        threshold, metrics = self.evaluator.best_threshold(candidates.to_predictions(scores), self.metric)
        return {
            "slot_weight": slot_weight,
            "logit_adjustment": adjustment,
            "fusion_weights": [round(float(weight), 4) for weight in weights],
            "threshold": threshold,
            "validation": metrics,
        }


def logistic_regression(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Fit a logistic regression with one input.

    Args:
        inputs: `[N]`.
        targets: `[N]`, 0 or 1.

    Returns:
        `[scale, bias]` with which `sigmoid(scale * inputs + bias)` has the largest likelihood; `[1, -1]` for N = 0.
    """
    if not len(targets):
        return np.array([1.0, -1.0])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = weights[0] * inputs + weights[1]
        gradient = (expit(logits) - targets) / len(targets)
        return np.mean(np.logaddexp(0, logits) - targets * logits), np.array([gradient @ inputs, gradient.sum()])

    return minimize(loss, np.array([1.0, -1.0]), jac=True).x


def reliability(
    predictions: Sequence[Sequence[Mapping]], references: Sequence[Sequence[str]], bins: int = 10
) -> dict[str, object]:
    """Measure how often tags of a given probability are correct.

    Args:
        predictions: For each example its tags as `{"tag", "score"}`, including improbable ones (`threshold=0`).
        references: For each example its ground-truth tags.
        bins: Number of equal intervals of the probability.

    Returns:
        `table`, with one row per interval that has tags: `from`, `to`, the number of `tags`, their `mean_probability`
        and how many of them are `correct`, in percent; and `expected_calibration_error` in percentage points, the
        distance of the two, averaged over the tags.
    """
    pairs = [
        (prediction["score"], prediction["tag"] in reference)
        for predicted, reference in zip(predictions, map(set, references), strict=True)
        for prediction in predicted
    ]
    scores, correct = np.array(pairs, dtype=float).reshape(-1, 2).T
    bin_of_score = np.minimum((scores * bins).astype(int), bins - 1)
    table = []
    for index in range(bins):
        inside = bin_of_score == index
        if inside.any():
            row = {"from": index / bins, "to": (index + 1) / bins, "tags": int(inside.sum())}
            row["mean_probability"] = round(100 * float(scores[inside].mean()), 1)
            row["correct"] = round(100 * float(correct[inside].mean()), 1)
            table.append(row)
    error = sum(row["tags"] * abs(row["mean_probability"] - row["correct"]) for row in table) / max(len(pairs), 1)
    return {"table": table, "expected_calibration_error": round(error, 2)}
