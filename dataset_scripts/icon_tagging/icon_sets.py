"""Reads the names, tags and drawings of the six icon sets from an installed `node_modules` tree.

Each reader knows where one npm package keeps its metadata and gives back one `Icon` for every icon the set names,
with the tags as the set has them; cleaning and splitting are the builder's work.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Icon(NamedTuple):
    """One icon of one set: `name` is unique within `source`, `svg` is the path of its drawing."""

    source: str
    name: str
    title: str
    tags: list[str]
    svg: Path


def as_words(name: str) -> str:
    """`"arrow-left"` -> `"arrow left"`."""
    return " ".join(name.replace("-", " ").replace("_", " ").split())


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_tabler(package: Path) -> Iterator[Icon]:
    for name, entry in _read_json(package / "icons.json").items():
        # The filled style redraws an outline icon under the same name and tags, as Phosphor's other weights do.
        if "outline" in entry["styles"]:
            svg = package / "icons" / "outline" / f"{name}.svg"
            tags = [str(tag) for tag in entry["tags"]]  # "24" and its like are numbers in this JSON
            yield Icon("tabler", name, as_words(name), tags, svg)


def read_lucide(package: Path) -> Iterator[Icon]:
    tags = _read_json(package / "tags.json")
    # The folder also holds every former name of a renamed icon; those are in no entry of tags.json.
    for svg in sorted((package / "icons").glob("*.svg")):
        yield Icon("lucide", svg.stem, as_words(svg.stem), tags.get(svg.stem, []), svg)


def read_mdi(package: Path) -> Iterator[Icon]:
    for entry in _read_json(package / "meta.json"):
        name = entry["name"]
        # Aliases are written as icon names ("account-circle"); as tags they are words, like every other set's.
        tags = entry["tags"] + [as_words(alias) for alias in entry["aliases"]]
        yield Icon("mdi", name, as_words(name), tags, package / "svg" / f"{name}.svg")


# The package has no JSON: its catalogue is a JavaScript list of objects whose `tags` alone are valid JSON.
_PHOSPHOR_ENTRY = re.compile(r'\bname:\s*("[^"]+"),\s*pascal_name:.*?\btags:\s*(\[.*?\])', re.DOTALL)


def read_phosphor(package: Path) -> Iterator[Icon]:
    catalogue = package / "dist" / "index.mjs"
    tags_by_name = {
        json.loads(name): json.loads(tags)
        for name, tags in _PHOSPHOR_ENTRY.findall(catalogue.read_text(encoding="utf-8"))
    }
    drawings = {svg.stem: svg for svg in sorted((package / "assets" / "regular").glob("*.svg"))}
    if not tags_by_name or tags_by_name.keys() - drawings.keys():
        raise ValueError(
            f"{catalogue}: read {len(tags_by_name)} icons where {len(drawings)} are drawn in assets/regular; "
            "this version of @phosphor-icons/core lays out its catalogue in another way"
        )
    for name, svg in drawings.items():
        # "*new*" and "*updated*" mark a release, not what the icon shows.
        tags = [tag for tag in tags_by_name.get(name, []) if not re.fullmatch(r"\*\w+\*", tag)]
        yield Icon("phosphor", name, as_words(name), tags, svg)


def read_fontawesome(package: Path) -> Iterator[Icon]:
    for name, entry in _read_json(package / "metadata" / "icon-families.json").items():
        drawn = {style["style"] for style in entry["familyStylesByLicense"]["free"]}
        # An icon drawn in two styles is one example; "solid" is the style nearly all of them have.
        style = next((style for style in ("solid", "regular", "brands") if style in drawn), None)
        if style is not None:
            # svgs-full centres every icon on one square canvas; svgs crops each to its own width.
            svg = package / "svgs-full" / style / f"{name}.svg"
            yield Icon("fontawesome", name, as_words(name), entry["search"]["terms"], svg)


def read_openmoji(package: Path) -> Iterator[Icon]:
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


def read_icons(node_modules: Path) -> Iterator[Icon]:
    """Every icon of the six sets, set by set.

    Raises:
        ValueError: a set's metadata is missing or is not laid out as in the pinned version; names the package.
    """
    for package, reader in READERS.items():
        try:
            yield from reader(node_modules / package)
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"cannot read the metadata of {package} in {node_modules} ({type(error).__name__}: {error}); "
                "install the version that package-lock.json names"
            ) from error
