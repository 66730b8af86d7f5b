"""Draws the README's image strip: the sample images with their titles and the tags of the shipped model.

python docs/figures/tagged_examples.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from transformers import pipeline

import modeling_optsg  # noqa: F401 (registers the pipeline)

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "examples/images"
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
SHOWN = ("tent-tree.png", "bird.png", "swimming-pool.png", "bus.png", "baby-bottle.png")
MAX_TAGS = 6
INK, MUTED, BAR, FRAME = "#1f2328", "#656d76", "#b6d7f2", "#d0d7de"


def draw_card(axes: plt.Axes, image: Path, title: str, tags: list[dict]) -> None:
    """Draw an image, its title, and its tags with a bar for each probability."""
    axes.set(xlim=(0, 1), ylim=(0, 2.1))
    axes.axis("off")
    axes.add_patch(
        FancyBboxPatch((0.02, 0.03), 0.96, 2.04, boxstyle="round,pad=0,rounding_size=0.05", fc="white", ec=FRAME)
    )
    inset = axes.inset_axes((0.24, 0.6, 0.52, 0.36))
    inset.imshow(Image.open(image).convert("RGBA"))
    inset.axis("off")
    axes.text(0.5, 1.19, f"“{title}”", ha="center", va="center", color=MUTED, fontsize=10, style="italic")
    for row, tag in enumerate(tags):
        height = 0.98 - 0.165 * row
        axes.barh(height, 0.7 * tag["score"], 0.13, left=0.07, color=BAR)
        axes.text(0.1, height, tag["label"], va="center", color=INK, fontsize=9)
        axes.text(0.93, height, f"{tag['score']:.2f}", ha="right", va="center", color=MUTED, fontsize=9)


def main() -> None:
    """Tag the sample images and write `tagged_examples.png` next to this program."""
    lines = (IMAGES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    titles = {row["file_name"]: row["title"] for row in map(json.loads, lines)}
    tagger = pipeline("tag-generation", model=str(CHECKPOINT))
    examples = [{"image": str(IMAGES / name), "title": titles[name]} for name in SHOWN]
    figure, cards = plt.subplots(1, len(SHOWN), figsize=(2.1 * len(SHOWN), 4.2))
    for axes, name, tags in zip(cards, SHOWN, tagger(examples, top_k=MAX_TAGS), strict=True):
        draw_card(axes, IMAGES / name, titles[name], tags)
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0, wspace=0.02)
    figure.savefig(Path(__file__).with_name("tagged_examples.png"), dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
