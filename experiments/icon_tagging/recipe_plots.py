"""Plots of the learning curves."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import matplotlib

from experiments.icon_tagging.runs import F1_METRICS

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

# Label of each line, the prefix of its rows and the entry of their test metrics. The colours are those of Okabe and
# Ito, which colour-blind readers can tell apart.
LINES = (
    ("OP-TSG", "op-tsg-", "parallel", "#D55E00", "o"),
    ("its tag classifier alone", "op-tsg-", "parallel, classifier alone", "#E69F00", "s"),
    ("ASY", "asy-", "only", "#0072B2", "D"),
)
TICKS = {"examples": (2000, 4000, 8000, 16000), "minutes": (1, 2, 4, 8, 16, 32)}


def plot_curves(gathered: Mapping[str, dict], path: Path, against: str) -> None:
    """Plot the test metrics of OP-TSG and ASY, one panel per metric.

    Args:
        gathered: Rows of a result file of `recipe.py`, by name; each point is the mean over a row's seeds.
        path: File of the plot.
        against: "examples" (training examples) or "minutes" (training time).
    """
    figure, panels = plt.subplots(1, len(F1_METRICS), figsize=(14, 3.6), sharex=True, layout="constrained")
    for axes, metric in zip(panels, F1_METRICS):
        for label, prefix, decoding, colour, marker in LINES:
            rows = [row["runs"] for name, row in gathered.items() if name.startswith(prefix)]
            points = sorted(
                (fmean(_size(run, against) for run in runs), fmean(run["test"][decoding][metric] for run in runs))
                for runs in rows
                if all(decoding in run["test"] for run in runs)
            )
            if points:
                axes.plot(*zip(*points), marker=marker, label=label, color=colour)
        title = metric.removesuffix("_f1").capitalize()
        axes.set(xscale="log", title=f"{title} F1 on the test split, %", xlabel=f"training {against}")
        labels = [f"{tick:,}" for tick in TICKS[against]]
        axes.set_xticks(TICKS[against], labels=labels)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    handles_and_labels = panels[0].get_legend_handles_labels()
    figure.legend(*handles_and_labels, loc="outside lower center", ncols=len(LINES), frameon=False)
    # Without the version of matplotlib, so that the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _size(run: Mapping, against: str) -> float:
    return run["examples"] if against == "examples" else run["seconds_per_epoch"] * run["num_train_epochs"] / 60
