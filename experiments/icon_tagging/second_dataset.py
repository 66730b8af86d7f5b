"""Builds a folder of tagged images on which nothing was tuned: Carbon icons, Ionicons, and emoji drawn by Twemoji
with the keywords of emojilib. None of them is in icon-tagging.

    python examples/second_dataset.py --output data/glyphs
    accelerate launch examples/train.py --config examples/configs/optsg-icon-small.json --dataset data/glyphs \\
        --output_dir runs/glyphs

The packages are installed by npm at pinned versions. Splits are made as icon-tagging makes them: by the words of the
title, so that a concept is in one split only.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.icon_tagging.icon_sets import Icon, as_words
from dataset_scripts.icon_tagging.icon_tagging import clean_tags, split_of
from dataset_scripts.icon_tagging.rendering import render_files

PACKAGES = {"@carbon/icons": "11.89.0", "ionicons": "8.1.0", "@twemoji/svg": "15.0.0", "emojilib": "4.0.3"}


def read_carbon(node_modules: Path) -> Iterator[Icon]:
    package = node_modules / "@carbon" / "icons"
    for entry in json.loads((package / "metadata.json").read_text(encoding="utf-8"))["icons"]:
        largest = max(entry["assets"], key=lambda asset: asset["size"] if isinstance(asset["size"], int) else 0)
        title = as_words(entry["friendlyName"]).lower()
        yield Icon("carbon", entry["name"], title, entry.get("aliases", []), package / "svg" / largest["filepath"])


def read_ionicons(node_modules: Path) -> Iterator[Icon]:
    package = node_modules / "ionicons" / "dist"
    entries = {e["name"]: e for e in json.loads((package / "ionicons.json").read_text(encoding="utf-8"))["icons"]}
    for name, entry in entries.items():
        # A drawing in another style has the tags of the filled one.
        style = name.rpartition("-")[2]
        if style not in ("outline", "sharp") or name.removesuffix(f"-{style}") not in entries:
            yield Icon("ionicons", name, as_words(name), entry["tags"], package / "svg" / f"{name}.svg")


def read_emoji(node_modules: Path) -> Iterator[Icon]:
    keywords = json.loads((node_modules / "emojilib" / "dist" / "emoji-en-US.json").read_text(encoding="utf-8"))
    drawings = node_modules / "@twemoji" / "svg"
    for emoji, (name, *tags) in keywords.items():
        codes = [f"{ord(character):x}" for character in emoji]
        # Twemoji leaves the variation selector out of file names, except where characters are joined.
        names = ["-".join(codes), "-".join(code for code in codes if code != "fe0f")]
        svg = next((drawings / f"{n}.svg" for n in names if (drawings / f"{n}.svg").is_file()), None)
        if svg is not None:
            yield Icon("emoji", svg.stem, as_words(name), list(map(as_words, tags)), svg)


def install(folder: Path) -> Path:
    """
    Raises:
        FileNotFoundError: npm is not on the PATH.
        subprocess.CalledProcessError: npm failed; what it said is on the error stream.
    """
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not on the PATH, and the images come from npm packages: install Node.js.")
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *wanted]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "node_modules"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        node_modules = install(Path(work))
        icons = [icon for read in (read_carbon, read_ionicons, read_emoji) for icon in read(node_modules)]
        icons = [icon._replace(tags=tags) for icon in icons if (tags := clean_tags(icon.tags))]
        images, failed = render_files([icon.svg for icon in icons], Path(work) / "png")
        rows = {"train": [], "validation": [], "test": []}
        for icon, image in zip(icons, images, strict=True):
            if image is not None:
                name = f"{icon.source}-{icon.name}.png"
                split = split_of(icon.title)
                row = {"file_name": name, "title": icon.title, "tags": icon.tags, "source": icon.source}
                rows[split].append(row)
                (arguments.output / split).mkdir(exist_ok=True)
                shutil.copy(image, arguments.output / split / name)
    for split, own in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (arguments.output / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
        tags = Counter(tag for row in own for tag in row["tags"])
        print(f"{split}: {len(own)} images, {len(tags)} tags, {tags.total() / max(len(own), 1):.1f} an image")
    if failed:
        print(f"{len(failed)} drawings could not be drawn and are left out.")


if __name__ == "__main__":
    main()
