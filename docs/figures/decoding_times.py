"""Draws how long generation takes, from results/speed/decoding.json.

python docs/figures/decoding_times.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[2]
PARTS = {"ms_without_towers": ("without towers", "#0969da"), "ms_with_towers": ("with towers", "#b6d7f2")}
VARIED = {"batch": "examples in a batch", "prompts": "order prompts", "frames": "frames"}


def main() -> None:
    """Draw times of all models, and of parallel decoding over batch size, prompts and frames."""
    result = json.loads((ROOT / "results/speed/decoding.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), width_ratios=(2, 1, 1, 1), constrained_layout=True)
    rows = result["rows"]["prepared"]
    for part, (label, color) in reversed(PARTS.items()):
        axes[0].barh(list(rows), [row[part] for row in rows.values()], color=color, label=label)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("ms per example, batches of 8, one thread")
    axes[0].legend(frameon=False)
    for axis, (name, label) in zip(axes[1:], VARIED.items(), strict=True):
        values = result["one_thread"][name]
        times = [value["parallel"] if isinstance(value, dict) else value for value in values.values()]
        axis.plot(list(map(int, values)), times, marker="o", color="#0969da")
        axis.set(xlabel=label, ylim=(0, None), xscale="log", xticks=list(map(int, values)), xticklabels=list(values))
        axis.minorticks_off()
    axes[1].set_ylabel("ms per example, parallel")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    # Without the version of matplotlib, so that the same results give the same file.
    figure.savefig(ROOT / "docs/figures/decoding_times.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
