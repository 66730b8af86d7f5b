"""Settings of `generate` fitted on validation examples."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from modeling_optsg.tag_ranking import MIN_SLOT_PROBABILITY

from .metrics import TagEvaluator, metric_value
from .prediction import MODALITY_COLUMNS, _generate, predict_tags

# What the slots may count for in a probability, the rest being for the example as a whole.
SLOT_WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


# How much rare tags may be favoured ([`LabelVocabulary.adjust`]).
LOGIT_ADJUSTMENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


EVERY_TAG = 1_000_000


PAD_BIASES = (0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -4.0)


def _predict_at_pad_biases(model, processor, examples, pad_biases, **generate_kwargs) -> list[list[list[dict]]]:
    """[`predict_tags`] with each of several `pad_bias`, from one pass; only where slots do not see one another."""
    predictions = [[[] for _ in range(len(examples))] for _ in pad_biases]
    kwargs = generate_kwargs | {"pad_bias": min(pad_biases), "output_slots": True}
    batch_size, progress = kwargs.pop("batch_size", 64), kwargs.pop("progress", True)
    modalities = kwargs.pop("modalities", tuple(MODALITY_COLUMNS))
    max_tags = kwargs.get("max_tags", getattr(model.generation_config, "max_tags", None))
    for rows, outputs in _generate(model, processor, examples, batch_size, modalities, progress, kwargs):
        for place, pad_bias in enumerate(pad_biases):
            biased = outputs.at_pad_bias(pad_bias, model.config.tag_pad_token_id, max_tags)
            for index, tags in zip(rows, processor.batch_decode(biased)):
                predictions[place][index] = tags
    return predictions


def fit_fusion_weights(
    model, processor, examples: Sequence[Mapping], evaluator: TagEvaluator, objective: str, **generate_kwargs
) -> list[dict]:
    """How much the slots and the example as a whole count in a tag's probability, from one pass over validation examples.

    For each of `SLOT_WEIGHTS`, and around the best of `LOGIT_ADJUSTMENTS`, the two logits are mixed, a logistic
    regression makes a probability of the mixture, and every threshold is looked at. What is most likely would not do:
    the likelihood is that of common tags.

    Returns:
        For each that was tried `{"slot_weight", "logit_adjustment", "fusion_weights", "threshold", "validation"}`, the
        weights as `generate` takes them.
    """
    # Of so many tags as there may be: the best are not known before the weights are.
    kwargs = {"max_tags": EVERY_TAG} | generate_kwargs
    middle = LOGIT_ADJUSTMENTS[len(LOGIT_ADJUSTMENTS) // 2]
    kwargs |= {"threshold": 0.0, "fusion_weights": (1.0, 0.0, 0.0, 1.0, 0.0), "logit_adjustment": middle}
    batch_size, progress = kwargs.pop("batch_size", 64), kwargs.pop("progress", True)
    modalities, pad = kwargs.pop("modalities", tuple(MODALITY_COLUMNS)), model.config.tag_pad_token_id
    tags, slots, wholes, log_counts = ([[] for _ in range(len(examples))] for _ in range(4))
    classes = model.tag_classifier.label_vocabulary
    label_vocabulary, counts_of = classes.index(), classes.log_counts.tolist()
    for rows, outputs in _generate(model, processor, examples, batch_size, modalities, progress, kwargs):
        written = outputs.sequences.ne(pad).any(dim=-1)
        for place, row in enumerate(rows):
            real = written[place]
            tags[row] = processor.tag_tokenizer.batch_decode(outputs.sequences[place, real], skip_special_tokens=True)
            slots[row] = (
                outputs.slot_scores[place, real]
                .cpu()
                .double()
                .clamp(MIN_SLOT_PROBABILITY, 1 - MIN_SLOT_PROBABILITY)
                .logit()
            )
            wholes[row] = outputs.classifier_logits[place, real].cpu().double()
            tokens = ([t for t in tag if t != pad] for tag in outputs.sequences[place, real].tolist())
            known = [label_vocabulary.get(tuple(tag)) for tag in tokens]
            log_counts[row] = torch.tensor([math.nan if k is None else counts_of[k] for k in known]).double()
    lengths = [len(row) for row in tags]
    slot_logits, classifier_logits, log_counts = (
        torch.cat([*map(torch.as_tensor, rows)]).numpy() for rows in (slots, wholes, log_counts)
    )
    novel = np.isnan(log_counts)
    classifier_logits = classifier_logits + middle * np.nan_to_num(log_counts)
    hits = np.array([tag in evaluator.references[row] for row, own in enumerate(tags) for tag in own], dtype=float)
    novel_weights = logistic_regression(slot_logits[novel], hits[novel])

    def fit(share: float, adjustment: float) -> dict:
        mixture = share * slot_logits + (1 - share) * (classifier_logits - adjustment * np.nan_to_num(log_counts))
        scale, bias = logistic_regression(mixture[~novel], hits[~novel])
        weights = [scale * share, scale * (1 - share), bias, *novel_weights]
        scores = expit(np.where(novel, weights[3] * slot_logits + weights[4], scale * mixture + bias))
        predictions = []
        for own, row_scores in zip(tags, np.split(scores, np.cumsum(lengths)[:-1])):
            # Different tokens may write one tag.
            best = dict(sorted(zip(own, row_scores.tolist()), key=lambda pair: pair[1]))
            predictions.append([{"tag": tag, "score": score} for tag, score in best.items() if tag.strip()])
        threshold, metrics = evaluator.best_threshold(predictions, objective)
        return {
            "slot_weight": share,
            "logit_adjustment": adjustment,
            "fusion_weights": [round(float(weight), 4) for weight in weights],
            "threshold": threshold,
            "validation": metrics,
        }

    fits = [fit(share, LOGIT_ADJUSTMENTS[0]) for share in SLOT_WEIGHTS]
    for _ in range(2):
        # One of the two after the other, each at the best of the other: a grid of both takes minutes.
        best = max(fits, key=lambda row: metric_value(row["validation"], objective))
        done = {(row["slot_weight"], row["logit_adjustment"]) for row in fits}
        if best["slot_weight"] < 1:
            more = {(best["slot_weight"], adjustment) for adjustment in LOGIT_ADJUSTMENTS}
            more |= {(share, best["logit_adjustment"]) for share in SLOT_WEIGHTS if share < 1}
            fits += [fit(*pair) for pair in sorted(more - done)]
    return fits


def logistic_regression(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """`[scale, bias]` under which `sigmoid(scale * inputs + bias)` makes `targets` (0 or 1) most likely; `[1, -1]`
    where there are none."""
    if not len(targets):
        return np.array([1.0, -1.0])

    def loss(weights):
        logits = weights[0] * inputs + weights[1]
        slope = (expit(logits) - targets) / len(targets)
        return np.mean(np.logaddexp(0, logits) - targets * logits), np.array([slope @ inputs, slope.sum()])

    return minimize(loss, np.array([1.0, -1.0]), jac=True).x


def fit_generation_config(
    model,
    processor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    *,
    decoding: str | None = None,
    objective: str = "full_f1",
    grid: Mapping[str, Sequence] | None = None,
    **predict_kwargs,
) -> dict:
    """Finds the settings with the largest validation figure, the threshold among them, and puts them into the model's
    `generation_config`.

    Args:
        examples: validation examples; evaluator: a [`TagEvaluator`] made of their tags.
        decoding: the decoding they are fitted for and kept under; `None` for a model that knows only one.
        objective: a figure of [`TagEvaluator.score`], or the mean of several, as in `"full_f1+micro_f1"`.
        grid: the values of each argument of `generate` that are tried, every combination with its own prediction of
            all examples; `PAD_BIASES` of `pad_bias` if not given. For each, every threshold is looked at.

    For a model with `use_tag_classifier` the smallest `pad_bias` is taken, and `fusion_weights` and `logit_adjustment` are
    fitted with the threshold ([`fit_fusion_weights`]).

    Returns:
        The best settings by name with `threshold`, the validation metrics there (`validation`), and the best of every
        combination (`tried`).
    """
    grid = {"pad_bias": PAD_BIASES} if grid is None else dict(grid)
    fixed = predict_kwargs | ({} if decoding is None else {"decoding": decoding})
    if getattr(model, "tag_classifier", None) is not None:
        # Whether an unlikely tag is kept is for its probability to say: the more slots are written the better.
        grid["pad_bias"] = [min(grid.get("pad_bias", PAD_BIASES))]
        tried = []
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values))
            fits = fit_fusion_weights(model, processor, examples, evaluator, objective, **fixed, **settings)
            tried += [settings | row for row in fits]
        return _keep_best(
            model, tried, (*grid, "fusion_weights", "logit_adjustment", "threshold"), decoding, objective
        )
    # A bias only says which slots are written; where no slot sees another, one pass shows what each would give.
    pad_biases = grid.pop("pad_bias", None) if decoding in getattr(model, "independent_decodings", ()) else None
    tried = []
    with torch.no_grad():
        for values in itertools.product(*grid.values()):
            settings = fixed | dict(zip(grid, values)) | {"threshold": 0.0}
            if pad_biases:
                passes = _predict_at_pad_biases(model, processor, examples, pad_biases, **settings)
                found = [({"pad_bias": bias}, predictions) for bias, predictions in zip(pad_biases, passes)]
            else:
                found = [({}, predict_tags(model, processor, examples, **settings))]
            for more, predictions in found:
                threshold, metrics = evaluator.best_threshold(predictions, objective)
                tried.append(dict(zip(grid, values)) | more | {"threshold": threshold, "validation": metrics})
    grid |= {"pad_bias": pad_biases} if pad_biases else {}
    return _keep_best(model, tried, (*grid, "threshold"), decoding, objective)


def _keep_best(model, tried: list[dict], names: Sequence[str], decoding: str | None, objective: str) -> dict:
    """Puts the best settings that were tried into the model's `generation_config`."""
    best = max(tried, key=lambda row: metric_value(row["validation"], objective))
    for name in names:
        value = best[name]
        if decoding is not None:
            fitted = getattr(model.generation_config, name, None)
            value = (fitted if isinstance(fitted, dict) else {}) | {decoding: value}
        setattr(model.generation_config, name, value)
    return best | {"tried": tried}
