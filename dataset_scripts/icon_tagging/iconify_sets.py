"""Reads the npm packages `@iconify-json/*`, which hold all drawings of an icon set in one JSON file."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .icon_sets import Icon, as_words
from .splits import split_of

_VIEW_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}
_NUMBERED = re.compile(r"(.+)-(?:\d+|one|two|three|four)")
_VARIATION_SELECTOR = "fe0f"
_SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def wrap_body(entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the SVG of an icon.

    Args:
        entry: The icon, with its `body`, and the parts of its view box that differ from those of the set.
        defaults: The set, with its view box.
    """
    left, top, width, height = (entry.get(key, defaults.get(key, value)) for key, value in _VIEW_BOX.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{entry["body"]}</svg>'
    )


def read_drawings(package: Path) -> dict[str, str]:
    """Return the SVGs of a set by name, without hidden icons, which are former ones."""
    icon_set = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    entries = icon_set["icons"].items()
    return {name: wrap_body(entry, icon_set) for name, entry in entries if not entry.get("hidden")}


def read_iconify(package: Path, styles: Collection[str] = ("",)) -> Iterator[Icon]:
    """Yield the icons of a set in some of its styles, without tags.

    The title of an icon is its name without the suffix of its style and without the number of a variant. A number, in
    digits or as a word, marks a variant if the set also has the name without it (`user` and `user-2`), or if it begins
    with a zero (`user-02`).

    Args:
        package: The npm package.
        styles: Suffixes of the styles, such as `("", "fill")`. `""` stands for names without the suffix of a style.
    """
    drawings = read_drawings(package)
    suffixes = {*json.loads((package / "metadata.json").read_text(encoding="utf-8")).get("suffixes", ()), *styles}
    parts = {name: split_style(name, suffixes) for name in drawings}
    names = {base for base, _ in parts.values()}
    for name, (base, style) in parts.items():
        if style in styles:
            yield Icon(package.name, name, as_words(without_number(base, names)), [], drawings[name])


def split_style(name: str, suffixes: Iterable[str]) -> tuple[str, str]:
    """Split the longest suffix of a style off a name: `("home", "fill")`, or `("home", "")` if it has none."""
    for suffix in sorted(filter(None, suffixes), key=len, reverse=True):
        base = name.removesuffix(f"-{suffix}")
        if base not in (name, ""):
            return base, suffix
    return name, ""


def without_number(name: str, names: Collection[str]) -> str:
    """Remove the number of a variant from a name, given all names of the set."""
    match = _NUMBERED.fullmatch(name)
    if match and (match[1] in names or name[len(match[1]) + 1] == "0" and name[-1] != "0"):
        return match[1]
    return name


def read_emoji(package: Path, openmoji: Iterable[Icon]) -> Iterator[Icon]:
    """Yield the emoji of a set that OpenMoji has too, with the titles and tags of OpenMoji.

    An emoji is found by its code points if the package has them, and otherwise by its name: the letters and digits of
    name and title are the same. Emoji that are not found are left out, and so are skin tones: `openmoji` has no
    variants of emoji in skin tones, and the five swatches are skipped. An emoji is also left out if only one of its
    name and its title is in the training split.

    Args:
        package: The npm package.
        openmoji: The emoji of OpenMoji.
    """
    openmoji = [icon for icon in openmoji if icon.name not in _SKIN_TONES]
    by_codes = {_without_selector(icon.name.lower()): icon for icon in openmoji}
    by_letters = {_letters(icon.title): icon for icon in reversed(openmoji)}
    chars = package / "chars.json"
    codes = json.loads(chars.read_text(encoding="utf-8")) if chars.is_file() else {}
    found = {name: by_codes.get(_without_selector(code)) for code, name in codes.items()}
    for name, svg in read_drawings(package).items():
        emoji = found.get(name) if found else by_letters.get(_letters(name))
        # A set may use another name than OpenMoji, and a held-out concept must not be in training by either.
        if emoji is not None and _is_training(as_words(name)) == _is_training(emoji.title):
            yield Icon(package.name, name, emoji.title, emoji.tags, svg)


def _is_training(title: str) -> bool:
    return split_of(title) == "train"


def _without_selector(codes: str) -> str:
    return "-".join(code for code in codes.split("-") if code != _VARIATION_SELECTOR)


def _letters(text: str) -> str:
    return "".join(re.findall("[a-z0-9]+", text.lower()))
