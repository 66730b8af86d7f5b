"""Draws two image strips: icons with their titles and tags, and photographs with their image words and tags.

python docs/figures/tagged_examples.py

The photographs come from scikit-image and are in the public domain.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import skimage
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from transformers import pipeline

import modeling_optsg  # noqa: F401 (registers the pipeline)

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "examples/images"
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
SHOWN = ("tent-tree.png", "bird.png", "swimming-pool.png", "bus.png", "baby-bottle.png")
SHOWN_PHOTOGRAPHS = ("chelsea.png", "coffee.png", "camera.png", "rocket.jpg", "moon.png")
MAX_TAGS, MAX_WORDS = 6, 2
INK, MUTED, BAR, FRAME = "#1f2328", "#656d76", "#b6d7f2", "#d0d7de"


def draw_card(axes: plt.Axes, image: Path, caption: str, tags: list[dict]) -> None:
    """Draw an image, its caption, and its tags with a bar for each probability."""
    axes.set(xlim=(0, 1), ylim=(0, 2.1))
    axes.axis("off")
    axes.add_patch(
        FancyBboxPatch((0.02, 0.03), 0.96, 2.04, boxstyle="round,pad=0,rounding_size=0.05", fc="white", ec=FRAME)
    )
    inset = axes.inset_axes((0.14, 0.6, 0.72, 0.36))
    inset.imshow(Image.open(image).convert("RGBA"))
    inset.axis("off")
    axes.text(0.5, 1.19, caption, ha="center", va="center", color=MUTED, fontsize=9, style="italic")
    for row, tag in enumerate(tags):
        height = 0.98 - 0.165 * row
        axes.barh(height, 0.7 * tag["score"], 0.13, left=0.07, color=BAR)
        axes.text(0.1, height, tag["label"], va="center", color=INK, fontsize=9)
        axes.text(0.93, height, f"{tag['score']:.2f}", ha="right", va="center", color=MUTED, fontsize=9)


def draw_strip(name: str, cards: list[tuple[Path, str, list[dict]]]) -> None:
    """Draw cards side by side and write the strip next to this program."""
    figure, axes = plt.subplots(1, len(cards), figsize=(2.1 * len(cards), 4.2))
    for own_axes, card in zip(axes, cards, strict=True):
        draw_card(own_axes, *card)
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0, wspace=0.02)
    figure.savefig(Path(__file__).with_name(name), dpi=160, facecolor="white")


def main() -> None:
    """Tag the images, and write `tagged_examples.png` and `tagged_photographs.png`."""
    lines = (IMAGES / "metadata.jsonl").read_text(encoding="utf-8").strip().split("\n")
    titles = {row["file_name"]: row["title"] for row in map(json.loads, lines)}
    tagger = pipeline("tag-generation", model=str(CHECKPOINT))
    examples = [{"image": str(IMAGES / name), "title": titles[name]} for name in SHOWN]
    cards = [
        (IMAGES / name, f"“{titles[name]}”", tags)
        for name, tags in zip(SHOWN, tagger(examples, top_k=MAX_TAGS), strict=True)
    ]
    draw_strip("tagged_examples.png", cards)
    cards = []
    for name in SHOWN_PHOTOGRAPHS:
        found = tagger(str(PHOTOGRAPHS / name), return_image_words=True)
        seen = ", ".join(word["word"] for word in found["image_words"][:MAX_WORDS])
        cards.append((PHOTOGRAPHS / name, f"sees: {seen}", found["tags"]))
    draw_strip("tagged_photographs.png", cards)


if __name__ == "__main__":
    main()
