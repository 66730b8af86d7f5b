"""Images of a comparison: F1 by training frequency, time against F1, and the tag frequencies of Figure 1."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from dataset_scripts.frequency_plot import tag_frequencies

# Colours that stay apart for the colour-blind (Okabe and Ito), and a marker beside each.
STYLES = {
    "op-tsg-parallel": ("#D55E00", "o"),
    "op-tsg-sequential": ("#E69F00", "s"),
    "model-f": ("#009E73", "^"),
    "model-g": ("#56B4E9", "v"),
    "asy": ("#0072B2", "D"),
    "open-book": ("#CC79A7", "P"),
    "sequence": ("#999999", "X"),
    "knn": ("#000000", "*"),
}


def write_images(
    comparison: Mapping, train_counts: Mapping[str, int], test_counts: Mapping[str, int], folder: Path
) -> None:
    """
    Args:
        comparison: what `examples/compare.py` gathers.
        train_counts, test_counts: examples of each tag in the two splits.
        folder: where `f1_by_frequency.png`, `time_and_f1.png` and `tag_frequencies.png` go.
    """
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "optsg"}
    )
    f1_by_frequency(comparison, folder / "f1_by_frequency.png")
    time_and_f1(comparison, folder / "time_and_f1.png")
    tag_frequencies(train_counts, test_counts, folder / "tag_frequencies.png")


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def f1_by_frequency(comparison: Mapping, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for row, entry in comparison["systems"].items():
        colour, marker = STYLES[row]
        groups = entry["by_frequency"]
        axes.plot(range(len(groups)), [g["f1"] for g in groups], color=colour, marker=marker, label=row, linewidth=1.2)
    labels = [f"{g['from']}+" if g["to"] is None else f"{g['from']}–{g['to']}" for g in groups]
    labels = [f"{g['from']}" if g["from"] == g["to"] else label for g, label in zip(groups, labels)]
    axes.set_xticks(range(len(groups)), [f"{label}\n{g['tags']} tags" for g, label in zip(groups, labels)], fontsize=7)
    axes.set(xlabel="training examples of a tag", ylabel="F1 averaged over tags, %")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    save(figure, path)


def time_and_f1(comparison: Mapping, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for row, entry in comparison["systems"].items():
        if "seconds_per_example" in entry:
            colour, marker = STYLES[row]
            axes.scatter(
                1000 * entry["seconds_per_example"], entry["full_f1"], color=colour, marker=marker, s=55, label=row
            )
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(ScalarFormatter())
    axes.set(xlabel="milliseconds an example, towers included (batches of 8)", ylabel="Full F1, %")
    if axes.collections:
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)
