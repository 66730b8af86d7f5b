"""How good a model is on the way."""

from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from modeling_optsg.evaluation.metrics import TagEvaluator
from modeling_optsg.evaluation.prediction import predict_tags

from .interruption import Interrupted, StopSignal


def validate(
    accelerator: Accelerator,
    model,
    processor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    objective: str,
    stop: StopSignal,
    **generate_kwargs,
) -> tuple[dict, list[list[str]]]:
    """Figures at the best threshold, and the tags of each example there. All processes call it, each tags its share.

    Args:
        model: a whole one, in every process; examples, evaluator, objective: see [`fit_generation_config`].

    Raises:
        Interrupted: `stop` has noted something in any process; all of them raise it.
    """
    mine = range(accelerator.process_index, len(examples), accelerator.num_processes)
    try:
        with accelerator.autocast():
            tags = predict_tags(model, processor, _UntilStopped(examples, mine, stop), **generate_kwargs)
        found = list(zip(mine, tags, strict=True))
    except Interrupted:
        # The others wait for this process's share.
        found = [None]
    pairs = gather_object(found)
    if None in pairs:
        raise Interrupted(stop.saved_step)
    predictions = [tags for _, tags in sorted(pairs, key=lambda pair: pair[0])]
    threshold, metrics = evaluator.best_threshold(predictions, objective)
    written = [[tag["tag"] for tag in own if tag["score"] >= threshold] for own in predictions]
    return {"threshold": threshold} | metrics, written


class _UntilStopped(Dataset):
    """Examples that are there until the program is asked to stop."""

    def __init__(self, examples: Sequence[Mapping], indices: Sequence[int], stop: StopSignal):
        self.examples, self.indices, self.stop = examples, indices, stop

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Mapping:
        if self.stop.noted:
            raise Interrupted(self.stop.saved_step)
        return self.examples[self.indices[index]]


def sample_predictions(rows, written: Sequence[Sequence[str]], count: int = 3) -> list[dict]:
    """A few examples, always the same: their titles, their tags, and those written.

    Args:
        rows: of a dataset with `tags`.
    """
    places = range(0, len(rows), max(1, len(rows) // count))[:count]
    shown = rows.select_columns([name for name in ("id", "title", "tags") if name in rows.column_names])
    return [{**shown[place], "written": list(written[place])} for place in places]
