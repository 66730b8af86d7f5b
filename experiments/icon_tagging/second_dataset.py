r"""Builds a folder of tagged images that no setting was tuned on.

    python -m experiments.icon_tagging.second_dataset --output data/glyphs
    python -m experiments.icon_tagging.recipe second --dataset data/glyphs

The images are Carbon icons, Ionicons, and emoji as drawn by Twemoji with the keywords of emojilib; none of them is in
icon-tagging. npm installs the packages in pinned versions. The split is that of icon-tagging: the words of the title
decide, so that a concept is in one split only.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset_scripts.icon_tagging.icon_sets import Icon, as_words
from dataset_scripts.icon_tagging.icon_tagging import clean_tags, split_of
from dataset_scripts.icon_tagging.rendering import render_files

PACKAGES = {"@carbon/icons": "11.89.0", "ionicons": "8.1.0", "@twemoji/svg": "15.0.0", "emojilib": "4.0.3"}


def read_carbon(node_modules: Path) -> Iterator[Icon]:
    """Yield the Carbon icons, with their aliases as tags."""
    package = node_modules / "@carbon" / "icons"
    for entry in json.loads((package / "metadata.json").read_text(encoding="utf-8"))["icons"]:
        largest = max(entry["assets"], key=lambda asset: asset["size"] if isinstance(asset["size"], int) else 0)
        title = as_words(entry["friendlyName"]).lower()
        yield Icon("carbon", entry["name"], title, entry.get("aliases", []), package / "svg" / largest["filepath"])


def read_ionicons(node_modules: Path) -> Iterator[Icon]:
    """Yield the Ionicons, one style of each."""
    package = node_modules / "ionicons" / "dist"
    entries = {e["name"]: e for e in json.loads((package / "ionicons.json").read_text(encoding="utf-8"))["icons"]}
    for name, entry in entries.items():
        # The other styles of a filled icon have its tags; names such as cloud-outline may also be the only style.
        style = name.rpartition("-")[2]
        if style not in ("outline", "sharp") or name.removesuffix(f"-{style}") not in entries:
            yield Icon("ionicons", name, as_words(name), entry["tags"], package / "svg" / f"{name}.svg")


def read_emoji(node_modules: Path) -> Iterator[Icon]:
    """Yield the emoji that Twemoji draws, with the keywords of emojilib as tags."""
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
    """Install the packages.

    Returns:
        The `node_modules` folder.

    Raises:
        FileNotFoundError: npm is not installed.
        subprocess.CalledProcessError: npm failed; the reason is on standard error.
    """
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not on the PATH, and the images come from npm packages: install Node.js.")
    packages = [f"{name}@{version}" for name, version in PACKAGES.items()]
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "node_modules"


def build(output: Path) -> tuple[dict[str, list[dict]], int]:
    """Build the folder.

    Returns:
        The metadata rows of each split, and how many drawings could not be rendered and are left out.
    """
    rows = {"train": [], "validation": [], "test": []}
    for split in rows:
        (output / split).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work_dir:
        node_modules = install(Path(work_dir))
        icons = [icon for read in (read_carbon, read_ionicons, read_emoji) for icon in read(node_modules)]
        icons = [icon._replace(tags=tags) for icon in icons if (tags := clean_tags(icon.tags))]
        images, failed = render_files([icon.svg for icon in icons], Path(work_dir) / "png")
        for icon, image in zip(icons, images, strict=True):
            if image is not None:
                split, name = split_of(icon.title), f"{icon.source}-{icon.name}.png"
                rows[split].append({"file_name": name, "title": icon.title, "tags": icon.tags, "source": icon.source})
                shutil.copy(image, output / split / name)
    for split, own in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (output / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return rows, len(failed)


def main(argv: Sequence[str] | None = None) -> None:
    """Build the folder of the command line and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args(argv)
    rows, num_failed = build(arguments.output)
    for split, own in rows.items():
        tags = Counter(tag for row in own for tag in row["tags"])
        print(f"{split}: {len(own)} images, {len(tags)} tags, {tags.total() / max(len(own), 1):.1f} per image")
    if num_failed:
        print(f"{num_failed} drawings could not be rendered and are left out")


if __name__ == "__main__":
    main()
