"""Parts of result files: the environment of a run, counts of novel tags and the best of many fits."""

import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.generation_settings import MODALITIES
from modeling_optsg.processing_optsg import OPTSGProcessor

from .calibration import reliability
from .metrics import TagEvaluator, metric_rank
from .prediction import predict_tags

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "numpy", "scipy")


def environment() -> dict[str, object]:
    """Describe the software and the machine that produced a result.

    Returns:
        `python`, `versions` (of `PACKAGES`), `machine` and `commit` (the git revision of the working directory, `None`
        outside a repository).
    """
    commit = ""
    if shutil.which("git"):
        described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = described.stdout.strip()
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": commit or None,
    }


def novel_hits(predictions: Sequence[Sequence[Mapping]], references: Sequence[Sequence[str]]) -> dict[str, int]:
    """Count novel tags and how many of them are in the ground truth.

    Args:
        predictions: For each example its tags as `{"tag", "score", "novel"}`.
        references: For each example its ground-truth tags.

    Returns:
        `predicted`, the number of novel tags, and `exact_hits`, the number of those among their example's references.
    """
    hits = [
        prediction["tag"] in reference
        for predicted, reference in zip(predictions, references, strict=True)
        for prediction in predicted
        if prediction["novel"]
    ]
    return {"predicted": len(hits), "exact_hits": sum(hits)}


def best_fit(tried: Sequence[Mapping], metric: str, **settings: object) -> Mapping | None:
    """Find the best of the fits that have given settings.

    Args:
        tried: Fits as in `fit_generation_config(...)["tried"]`.
        metric: The validation metric to maximise, as in [`parse_metric`].
        settings: Values that a fit must have, by name, such as `slot_weight=1.0`.

    Returns:
        The fit with the largest metric, `None` where no fit has these settings.
    """
    matching = [fit for fit in tried if all(fit.get(name) == value for name, value in settings.items())]
    return max(matching, key=lambda fit: metric_rank(fit["validation"], metric), default=None)


def score_modalities(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    **predict_kwargs: object,
) -> dict[str, dict[str, float]]:
    """Score a model on images and titles together, and on each of the two alone.

    Args:
        examples: As in [`predict_tags`].
        evaluator: Made from the ground truth of `examples`.
        predict_kwargs: Further arguments of [`predict_tags`].

    Returns:
        The metrics for each entry of `MODALITIES`, and `expected_calibration_error` of [`reliability`].
    """
    scores = {}
    for name in MODALITIES:
        kwargs = predict_kwargs | {"modalities": tuple(name.split("+"))}
        unfiltered = predict_tags(model, processor, examples, **kwargs | {"threshold": 0.0})
        error = reliability(unfiltered, evaluator.references)["expected_calibration_error"]
        scores[name] = evaluator.score(predict_tags(model, processor, examples, **kwargs))
        scores[name]["expected_calibration_error"] = error
    return scores
