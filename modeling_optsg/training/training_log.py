"""What a training tells of itself while it runs."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm

from modeling_optsg.data.atomic_files import write_text

LOSS_PARTS = ("loss", "generation_loss", "alignment_loss", "classifier_loss")


class TrainingLog:
    """Rows of a JSON lines file, and of the report_to that `accelerate` was told of; a bar with the time that is left.

    Args:
        start: the step a run goes on from; rows of later ones are forgotten.
        total: steps of the whole run.
        sums: of losses since the last row, where a run goes on.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, start: int, total: int, sums: Mapping[str, float] | None = None
    ):
        self.accelerator, self.path, self.sums = accelerator, path, Counter(sums or {})
        self.bar = tqdm(
            total=total, initial=start, desc="Training", disable=not accelerator.is_local_main_process, smoothing=0.05
        )
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if start and path.exists() else []
            kept = [line + "\n" for line in lines if (step := _step_of(line)) is not None and step <= start]
            write_text(path, "".join(kept))

    def note(self, losses: Mapping[str, float]) -> None:
        """The losses of a step."""
        self.sums.update(losses, steps=1)
        self.bar.update()

    def means(self, rate: float) -> dict[str, float]:
        """Mean losses of the steps since the last call; shows them, and the examples a second."""
        means = {part: round(self.sums[part] / self.sums["steps"], 6) for part in LOSS_PARTS if part in self.sums}
        self.sums.clear()
        self.bar.set_postfix({part: f"{loss:.3g}" for part, loss in means.items()} | {"examples/s": f"{rate:.0f}"})
        return means

    def write(self, row: dict) -> None:
        flat = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        flat |= {f"validation/{name}": value for name, value in row.get("validation", {}).items()}
        self.accelerator.log(flat, step=row["step"])
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if "validation" in row:
            self._show(row)

    def _show(self, row: dict) -> None:
        losses = ", ".join(f"{part} {row[part]:.3f}" for part in LOSS_PARTS if part in row)
        metrics = row["validation"]
        self.bar.write(
            f"step {row['step']}: {losses}, {row['examples_per_second']:.0f} examples/s; validation Full "
            f"{metrics['full_f1']:.1f} / Rare {metrics['rare_f1']:.1f} / Common {metrics['common_f1']:.1f}, micro "
            f"{metrics['micro_f1']:.1f}"
        )
        for example in row.get("sample_predictions", ()):
            name = example.get("title") or example.get("id") or "an example"
            self.bar.write(f"  {name}: {', '.join(example['tags'])} -> {', '.join(example['written']) or '(none)'}")


def _step_of(line: str) -> int | None:
    """The step of a row; a line that a kill cut off, which is of a step after the last state, has none."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return None
