"""Plots tag frequencies as Figure 1 of the supplement does."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np


def plot_tag_frequencies(train_counts: Mapping[str, int], test_counts: Mapping[str, int], path: Path) -> None:
    """Plot how many examples have each evaluated tag, the most frequent training tags first.

    Args:
        train_counts: Number of training examples with each tag.
        test_counts: Number of test examples with each tag. Tags in both are plotted.
        path: File of the plot; its suffix decides the format.
    """
    tags = sorted((tag for tag in test_counts if tag in train_counts), key=lambda tag: -train_counts[tag])
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True)
    for ax, counts, split, colour in zip(axes, (train_counts, test_counts), ("train", "test"), ("#0072B2", "#D55E00")):
        ax.bar(np.arange(len(tags)), [counts[tag] for tag in tags], width=1.0, color=colour)
        ax.set_yscale("function", functions=(np.sqrt, np.square))
        ax.set_ylim(0, None)
        ax.set_ylabel(f"{split} examples")
    axes[1].set_xlabel(f"the {len(tags)} tags of both training and test examples, most frequent first")
    figure.tight_layout()
    # Without the version of matplotlib, so that the same counts give the same file.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
