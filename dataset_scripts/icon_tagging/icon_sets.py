"""Reads names, tags and drawings of the six icon sets from a `node_modules` folder.

Each reader knows the layout of one npm package and yields one `Icon` for every icon of the set, with the set's own
tags. The builder cleans the tags and divides the icons among splits.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Icon(NamedTuple):
    """One icon of one set.

    Args:
        source: The set.
        name: A name that is unique within the set.
        title: The name as words.
        tags: Tags of the set, not cleaned.
        svg: The drawing: the path of an SVG file, or an SVG.
    """

    source: str
    name: str
    title: str
    tags: list[str]
    svg: Path | str


def as_words(name: str) -> str:
    """Replace hyphens and underscores by spaces: `"arrow-left"` becomes `"arrow left"`."""
    return " ".join(name.replace("-", " ").replace("_", " ").split())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_tabler(package: Path) -> Iterator[Icon]:
    """Yield the icons of Tabler in outline style."""
    for name, entry in _read_json(package / "icons.json").items():
        # The filled style repeats outline icons with the same names and tags, like Phosphor's other weights.
        if "outline" in entry["styles"]:
            svg = package / "icons" / "outline" / f"{name}.svg"
            tags = [str(tag) for tag in entry["tags"]]  # tags such as "24" are numbers in this JSON
            yield Icon("tabler", name, as_words(name), tags, svg)


def read_lucide(package: Path) -> Iterator[Icon]:
    """Yield the icons of Lucide."""
    tags = _read_json(package / "tags.json")
    # The folder also contains the former names of renamed icons, which tags.json does not have.
    for svg in sorted((package / "icons").glob("*.svg")):
        yield Icon("lucide", svg.stem, as_words(svg.stem), tags.get(svg.stem, []), svg)


def read_mdi(package: Path) -> Iterator[Icon]:
    """Yield the icons of Material Design Icons, with aliases as further tags."""
    for entry in _read_json(package / "meta.json"):
        name = entry["name"]
        # Aliases look like icon names ("account-circle"), while the tags of all sets are words.
        tags = entry["tags"] + [as_words(alias) for alias in entry["aliases"]]
        yield Icon("mdi", name, as_words(name), tags, package / "svg" / f"{name}.svg")


# The package has no JSON. Its catalogue is a JavaScript list of objects, of which only names and tags are valid JSON.
_PHOSPHOR_ENTRY = re.compile(r'\bname:\s*("[^"]+"),\s*pascal_name:.*?\btags:\s*(\[.*?\])', re.DOTALL)


def read_phosphor(package: Path) -> Iterator[Icon]:
    """Yield the icons of Phosphor in regular weight.

    Raises:
        ValueError: The catalogue has another layout than in the pinned version.
    """
    catalogue = package / "dist" / "index.mjs"
    tags_by_name = {
        json.loads(name): json.loads(tags)
        for name, tags in _PHOSPHOR_ENTRY.findall(catalogue.read_text(encoding="utf-8"))
    }
    drawings = {svg.stem: svg for svg in sorted((package / "assets" / "regular").glob("*.svg"))}
    if not tags_by_name or tags_by_name.keys() - drawings.keys():
        raise ValueError(
            f"{catalogue}: found {len(tags_by_name)} icons, but assets/regular has {len(drawings)}; this version of "
            "@phosphor-icons/core has another layout"
        )
    for name, svg in drawings.items():
        # "*new*" and "*updated*" describe a release, not the icon.
        tags = [tag for tag in tags_by_name.get(name, []) if not re.fullmatch(r"\*\w+\*", tag)]
        yield Icon("phosphor", name, as_words(name), tags, svg)


def read_fontawesome(package: Path) -> Iterator[Icon]:
    """Yield the free icons of Font Awesome, each in one style."""
    for name, entry in _read_json(package / "metadata" / "icon-families.json").items():
        styles = {style["style"] for style in entry["familyStylesByLicense"]["free"]}
        # An icon in two styles is one example. Nearly all icons have the style "solid".
        style = next((style for style in ("solid", "regular", "brands") if style in styles), None)
        if style is not None:
            # svgs-full has all icons centred on a square canvas; svgs crops each to its own width.
            svg = package / "svgs-full" / style / f"{name}.svg"
            yield Icon("fontawesome", name, as_words(name), entry["search"]["terms"], svg)


def read_openmoji(package: Path) -> Iterator[Icon]:
    """Yield the emoji of OpenMoji in colour, without skin-tone variants."""
    for entry in _read_json(package / "data" / "openmoji.json"):
        if not entry["skintone"]:
            name = entry["hexcode"]
            tags = entry["tags"].split(",") + entry["openmoji_tags"].split(",")
            svg = package / "color" / "svg" / f"{name}.svg"
            yield Icon("openmoji", name, entry["annotation"], tags, svg)


READERS: dict[str, Callable[[Path], Iterable[Icon]]] = {
    "@tabler/icons": read_tabler,
    "lucide-static": read_lucide,
    "@mdi/svg": read_mdi,
    "@phosphor-icons/core": read_phosphor,
    "@fortawesome/fontawesome-free": read_fontawesome,
    "openmoji": read_openmoji,
}


@contextmanager
def naming_errors(package: str, node_modules: Path) -> Iterator[None]:
    """Raise a `ValueError` that names the package if its metadata is missing or has another layout."""
    try:
        yield
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"cannot read the metadata of {package} in {node_modules} ({type(error).__name__}: {error}); "
            "install the version that package-lock.json names"
        ) from error


def read_icons(node_modules: Path) -> Iterator[Icon]:
    """Yield every icon of the six sets, set by set.

    Raises:
        ValueError: The metadata of a set is missing or has another layout than in the pinned version.
    """
    for package, reader in READERS.items():
        with naming_errors(package, node_modules):
            yield from reader(node_modules / package)
