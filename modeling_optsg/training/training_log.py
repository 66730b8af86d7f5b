"""What a training tells of itself while it runs."""

import json
from pathlib import Path

from accelerate import Accelerator


class TrainingLog:
    """Rows of a JSON lines file, and of the trackers that `accelerate` was told of.

    Args:
        start: the step a run goes on from; rows of later ones are forgotten.
    """

    def __init__(self, accelerator: Accelerator, path: Path, start: int):
        self.accelerator, self.path = accelerator, path
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if start and path.exists() else []
            # A line that a kill cut off is of a step after the last state.
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= start]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, row: dict) -> None:
        flat = {name: value for name, value in row.items() if not isinstance(value, dict)}
        flat |= {f"validation/{name}": value for name, value in row.get("validation", {}).items()}
        self.accelerator.log(flat, step=row["step"])
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
