"""Further drawings for training: the configuration `more_drawings` of icon-tagging.

The drawings are of icon sets and emoji that the default configuration does not have. Only the titles of training
examples are kept, and only training examples of the default configuration give them tags.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .icon_sets import Icon, as_words, naming_errors
from .iconify_sets import read_emoji, read_iconify, split_style, without_number
from .splits import split_key, split_of

ICONIFY = "@iconify-json"

EMOJI_SETS = ("fluent-emoji-flat", "emojione", "fxemoji", "fluent-emoji-high-contrast", "emojione-monotone")

# The styles of each set that are read. Of styles that differ by little, such as two widths of a line, one is read.
STYLES = {
    "icon-park": ("",),
    "icon-park-twotone": ("",),
    "fluent-color": ("24",),
    "flat-color-icons": ("",),
    "solar": ("bold-duotone", "bold", "linear"),
    "material-symbols": ("",),
    "mingcute": ("fill", "line"),
    "hugeicons": ("",),
    "mynaui": ("", "solid"),
    "fluent": ("24-filled", "24-regular"),
    "bi": ("", "fill"),
    "bx": ("",),
    "bxs": ("",),
    "teenyicons": ("outline", "solid"),
    "heroicons": ("", "solid"),
    "flowbite": ("outline", "solid"),
    "basil": ("outline", "solid"),
    "eva": ("fill", "outline"),
    "ant-design": ("filled", "outlined", "twotone"),
    "iconamoon": ("", "fill", "duotone"),
    "si": ("fill", "duotone"),
    "iconoir": ("", "solid"),
    "game-icons": ("",),
    "vaadin": ("", "o"),
    "cil": ("",),
    "gg": ("",),
}


def read_healthicons(package: Path) -> Iterator[Icon]:
    """Yield Health Icons, filled and as outlines, with their tags."""
    folder = package / "public" / "icons"
    for entry in json.loads((folder / "meta-data.json").read_text(encoding="utf-8")):
        # "dhis2:war" is a name in another program.
        tags = [tag for tag in entry["tags"] if ":" not in tag]
        for style in ("filled", "outline"):
            svg = folder / "svg" / style / f"{entry['path']}.svg"
            if svg.is_file():
                yield Icon("healthicons", f"{entry['path']}-{style}", as_words(entry["title"]).lower(), tags, svg)


def read_octicons(package: Path) -> Iterator[Icon]:
    """Yield Octicons in their largest size, with their keywords."""
    entries = json.loads((package / "build" / "data.json").read_text(encoding="utf-8"))
    bases = {name: split_style(name, ("fill",))[0] for name in entries}
    for name, entry in entries.items():
        title = as_words(without_number(bases[name], set(bases.values())))
        svg = package / "build" / "svg" / f"{name}-{max(entry['heights'], key=int)}.svg"
        yield Icon("octicons", name, title, entry["keywords"], svg)


def read_codicons(package: Path) -> Iterator[Icon]:
    """Yield Codicons, with their tags."""
    entries = json.loads((package / "dist" / "metadata.json").read_text(encoding="utf-8"))
    for svg in sorted((package / "src" / "icons").glob("*.svg")):
        yield Icon("codicons", svg.stem, as_words(svg.stem), entries.get(svg.stem, {}).get("tags", []), svg)


# Sets with tags of their own.
READERS = {"healthicons": read_healthicons, "@primer/octicons": read_octicons, "@vscode/codicons": read_codicons}


def read_more_icons(node_modules: Path, openmoji: Iterable[Icon]) -> Iterator[Icon]:
    """Yield the icons of all sets, with the sets' own tags if they have any.

    Args:
        node_modules: Where the packages are installed.
        openmoji: The emoji of OpenMoji, which give the titles of emoji.

    Raises:
        ValueError: The metadata of a set is missing or has another layout than in the pinned version.
    """
    openmoji = list(openmoji)
    readers = {package: (reader, ()) for package, reader in READERS.items()}
    readers |= {f"{ICONIFY}/{name}": (read_iconify, (styles,)) for name, styles in STYLES.items()}
    readers |= {f"{ICONIFY}/{name}": (read_emoji, (openmoji,)) for name in EMOJI_SETS}
    for package, (reader, arguments) in readers.items():
        with naming_errors(package, node_modules):
            yield from reader(node_modules / package, *arguments)


def add_training_tags(icons: Iterable[Icon], default_icons: Iterable[Icon]) -> Iterator[Icon]:
    """Add to the tags of each icon those of all training examples with the same concept.

    The concept is that of [`split_key`], but the struck-through drawing "bell off" gives no tags to a "bell".

    Args:
        icons: Icons of training concepts.
        default_icons: The icons of the default configuration. Those of validation and test are not used.
    """
    tags = defaultdict(list)
    for icon in default_icons:
        if split_of(icon.title) == "train":
            tags[_tag_key(icon.title)] += icon.tags
    for icon in icons:
        yield icon._replace(tags=[*icon.tags, *tags.get(_tag_key(icon.title), ())])


def _tag_key(title: str) -> tuple[str, bool]:
    return split_key(title), "off" in title.lower().split()
