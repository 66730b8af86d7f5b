"""A small dataset: a folder of plain images whose tags are the colour and the coloured half."""

import json
from pathlib import Path

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
LONG_TAG = "qzxj" * 15


def write_colour_folder(root: Path) -> None:
    """Write 16 training, 8 validation and 8 test images.

    The first training image has an additional tag of 60 characters; the second one has no tags.
    """
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        (root / split).mkdir()
        rows = []
        for index in range(count):
            colour, side = list(COLOURS)[index % 4], ("left", "right")[index // 4 % 2]
            image = Image.new("RGB", (48, 48), "black")
            image.paste(COLOURS[colour], (0, 0, 24, 48) if side == "left" else (24, 0, 48, 48))
            image.save(root / split / f"{index}.png")
            rows.append({"file_name": f"{index}.png", "title": f"a {colour} image", "tags": [colour, side]})
        if split == "train":
            rows[0]["tags"] = rows[0]["tags"] + [LONG_TAG]
            rows[1]["tags"] = []
        lines = (json.dumps(row) + "\n" for row in rows)
        (root / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
