"""Validation during training."""

from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.evaluation.metrics import TagEvaluator
from modeling_optsg.evaluation.prediction import predict_tags
from modeling_optsg.processing_optsg import OPTSGProcessor

from .interruption import Interrupted, StopSignal


def validate(
    accelerator: Accelerator,
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    metric: str,
    stop_signal: StopSignal,
    **generate_kwargs: object,
) -> tuple[dict, list[list[str]]]:
    """Compute validation metrics at the best threshold. All processes must call it, and they share the work.

    Args:
        accelerator: The accelerator.
        model: The unsharded model.
        processor: The processor of the model.
        examples: Validation examples.
        evaluator: Evaluator for these examples.
        metric: Metric that selects the threshold.
        stop_signal: Ends the validation early.
        generate_kwargs: Arguments of `generate`.

    Returns:
        The metrics with the `threshold`, and the predicted tags of each example.

    Raises:
        Interrupted: A process received the stop signal. All processes raise this error.
    """
    own = range(accelerator.process_index, len(examples), accelerator.num_processes)
    try:
        with accelerator.autocast():
            tags = predict_tags(model, processor, _UntilStopped(examples, own, stop_signal), **generate_kwargs)
        found = list(zip(own, tags, strict=True))
    except Interrupted:
        # The other processes wait for the predictions of this process.
        found = [None]
    pairs = gather_object(found)
    if None in pairs:
        raise Interrupted(stop_signal.saved_step)
    predictions = [tags for _, tags in sorted(pairs, key=lambda pair: pair[0])]
    threshold, metrics = evaluator.best_threshold(predictions, metric)
    predicted = [[tag["tag"] for tag in own if tag["score"] >= threshold] for own in predictions]
    return {"threshold": threshold} | metrics, predicted


class _UntilStopped(Dataset):
    """A subset of the examples. After a stop signal, reading an example raises [`Interrupted`]."""

    def __init__(self, examples: Sequence[Mapping], indices: Sequence[int], stop_signal: StopSignal):
        self.examples, self.indices, self.stop_signal = examples, indices, stop_signal

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Mapping:
        if self.stop_signal.received:
            raise Interrupted(self.stop_signal.saved_step)
        return self.examples[self.indices[index]]


def sample_predictions(examples: Sequence[Mapping], predicted: Sequence[Sequence[str]], count: int = 3) -> list[dict]:
    """Return `id`, `title`, `tags` and predicted tags of a few fixed examples."""
    indices = range(0, len(examples), max(1, len(examples) // count))[:count]
    rows = {index: examples[index] for index in indices}
    return [
        {name: row[name] for name in ("id", "title", "tags") if name in row} | {"predicted": list(predicted[index])}
        for index, row in rows.items()
    ]
