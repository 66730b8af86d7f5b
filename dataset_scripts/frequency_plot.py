"""Draws Figure 1 of the supplement for a tagging dataset."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np


def tag_frequencies(train_counts: Mapping[str, int], test_counts: Mapping[str, int], path: Path) -> None:
    """How often the evaluated tags occur, by falling training frequency, on a square-root axis."""
    tags = sorted((tag for tag in test_counts if tag in train_counts), key=lambda tag: -train_counts[tag])
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True)
    for ax, counts, split, colour in zip(axes, (train_counts, test_counts), ("train", "test"), ("#0072B2", "#D55E00")):
        ax.bar(np.arange(len(tags)), [counts[tag] for tag in tags], width=1.0, color=colour)
        ax.set_yscale("function", functions=(np.sqrt, np.square))
        ax.set_ylim(0, None)
        ax.set_ylabel(f"{split} examples")
    axes[1].set_xlabel(f"the {len(tags)} tags that training and test examples share, most frequent first")
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
