"""Log of a training run: rows of a JSON lines file, trackers and a progress bar."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from modeling_optsg.data.atomic_files import write_text
from modeling_optsg.data.process_logging import get_logger

from .losses import LOSSES

logger = get_logger(__name__)


class TrainingLog:
    """Log of the mean losses, the speed and the validation metrics of a training run.

    Args:
        accelerator: The accelerator, whose trackers get the rows too.
        path: JSON lines file.
        start: Step after which the run is resumed. Rows of later steps are deleted.
        total: Number of steps of the run.
        sums: Sums of losses since the last row, for a resumed run.
        history: Rows with validation metrics, from the state of a resumed run. Those that the file has lost are
            written again.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        start: int,
        total: int,
        sums: Mapping[str, float] | None = None,
        history: Sequence[Mapping] = (),
    ):
        self.accelerator, self.path, self.sums = accelerator, path, Counter(sums or {})
        self.bar = tqdm(
            total=total, initial=start, desc="Training", disable=not accelerator.is_local_main_process, smoothing=0.05
        )
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = _read_rows(path) if start and path.exists() else {}
            if start and not path.exists():
                logger.warning(f"{path} is missing. Only its rows with validation metrics are written again.")
            lost = {row["step"]: json.dumps(row, ensure_ascii=False, allow_nan=False) for row in history}
            rows = {step: line for step, line in sorted({**lost, **rows}.items()) if step <= start}
            write_text(path, "".join(line + "\n" for line in rows.values()))

    def record(self, losses: Mapping[str, float]) -> None:
        """Add the losses of a step."""
        self.sums.update(losses, steps=1)
        self.bar.update()

    def mean_losses(self, examples_per_second: float) -> dict[str, float]:
        """Return the mean losses since the last call, and show them with the speed in the progress bar."""
        means = {
            name: round(self.sums[name] / self.sums["steps"], 6) for name in ("loss", *LOSSES) if name in self.sums
        }
        self.sums.clear()
        shown = {name: f"{loss:.3g}" for name, loss in means.items()}
        self.bar.set_postfix(shown | {"examples/s": f"{examples_per_second:.0f}"})
        return means

    def write(self, row: Mapping) -> None:
        """Write a row with a `step` to the file and the trackers, and print its validation metrics if it has any."""
        flat = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        flat |= {f"validation/{name}": value for name, value in row.get("validation", {}).items()}
        # A metric without tags to average over is `None`.
        self.accelerator.log({name: value for name, value in flat.items() if value is not None}, step=row["step"])
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        if "validation" in row:
            self._print(row)

    def close(self) -> None:
        """Close the progress bar."""
        self.bar.close()

    def _print(self, row: Mapping) -> None:
        losses = ", ".join(f"{name} {row[name]:.3f}" for name in ("loss", *LOSSES) if name in row)
        metrics = row["validation"]
        self.bar.write(
            f"step {row['step']}: {losses}, {row['examples_per_second']:.0f} examples/s; validation F1: "
            + ", ".join(
                f"{name} {metrics[key]:.1f}"
                for name in ("full", "rare", "common", "micro")
                if metrics[key := f"{name}_f1"] is not None
            )
        )
        for example in row.get("sample_predictions", ()):
            name = example.get("title") or example.get("id") or "an example"
            self.bar.write(f"  {name}: {', '.join(example['tags'])} -> {', '.join(example['predicted']) or '(none)'}")


class SlotChanges:
    """Ratio of tags that were matched to another slot than the last time their example was seen.

    Args:
        max_examples: Maximum number of examples to follow, the first ones seen. Following millions would fill the
            memory.
    """

    def __init__(self, max_examples: int = 20_000):
        self.max_examples = max_examples
        self.slots: dict[int, dict[int, int]] = {}
        self.changed = self.seen = 0

    def record(self, examples: Sequence[int], assignment: torch.Tensor, labels: torch.Tensor) -> None:
        """Record the assignment of a batch.

        Args:
            examples: Index of each example of the batch.
            assignment: `[batch, prompts]`, which of the example's tags is matched to each prompt; -1 for [PAD].
            labels: `[batch, max tags, max length]`, the tokens of the tags, -100 for padding.
        """
        for example, row, tags in zip(examples, assignment.cpu().numpy(), labels.tolist(), strict=True):
            if example not in self.slots and len(self.slots) >= self.max_examples:
                continue
            slots = np.flatnonzero(row >= 0)
            # Hashes take less memory than tokens. Two tags of an example hardly have the same one.
            now = {hash(tuple(token for token in tags[row[slot]] if token >= 0)): int(slot) for slot in slots}
            before = self.slots.get(example, {})
            again = now.keys() & before.keys()
            self.seen += len(again)
            self.changed += sum(now[tag] != before[tag] for tag in again)
            self.slots[example] = now

    def ratio(self) -> float | None:
        """Return the ratio since the last call; `None` if no tag was seen again."""
        ratio = self.changed / self.seen if self.seen else None
        self.changed = self.seen = 0
        return ratio


def _read_rows(path: Path) -> dict[int, str]:
    """Return the rows of a log by their steps. Damaged rows are left out and counted."""
    *lines, last = path.read_bytes().split(b"\n")
    rows = {step: line.decode() for line in lines if (step := _step_in(line)) is not None}
    if damaged := sum(_step_in(line) is None for line in lines):
        logger.warning(f"{path}: {damaged} damaged rows are left out.")
    if (step := _step_in(last)) is not None:
        rows[step] = last.decode()
    return rows


def _step_in(line: bytes) -> int | None:
    """Return the step of a row; `None` for a damaged one, or an incomplete last line after a kill."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None
