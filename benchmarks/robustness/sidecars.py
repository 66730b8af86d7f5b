"""Checks `optsg tag --write` on folders with damaged sidecars."""

import dataclasses
import os
import random
import shutil
from pathlib import Path

from .jobs import make
from .results import GOOD_NAMES, Result, Workplace, choose, read_tags, result
from .sidecar_files import DAMAGES, JOURNAL, KEYWORD, WEIGHTS, Sidecar

IMAGE = GOOD_NAMES[1]
NEIGHBOURS = (GOOD_NAMES[0], GOOD_NAMES[2])


def check_sidecars(workplace: Workplace, seed: int) -> Result:
    """Tag a folder with the damaged sidecar of a seed, twice."""
    damage = choose(DAMAGES, seed, WEIGHTS)
    folder = workplace.folder / f"sidecars-{seed}"
    workplace.add_good_files(folder)

    def write() -> dict:
        return dataclasses.asdict(DAMAGES[damage](folder, IMAGE, random.Random(f"sidecars {seed}")))

    sidecar = Sidecar(**make(write))
    outside = sidecar.kept and (folder.parent / sidecar.kept).read_bytes()
    before = _snapshot(folder)
    arguments = ("--json", "--write", "xmp", "--write", "json", "--write", "txt", folder)
    first = workplace.tag(*arguments)
    after = _snapshot(folder)
    second = workplace.tag(*arguments)
    is_named = any(name in first.errors for name in (sidecar.name, IMAGE))
    # The image itself never changes; its new sidecar must have its keyword.
    name = f"{IMAGE}.xmp" if sidecar.name == IMAGE else sidecar.name
    is_changed = before.get(name) != after.get(name)
    keyword_files = [path for path, data in before.items() if _has_keyword(data)] + [name] * sidecar.has_keyword
    if _lost_neighbours(read_tags(first), after, sidecar.name):
        outcome = "lost neighbour"
    elif outside != (sidecar.kept and (folder.parent / sidecar.kept).read_bytes()):
        outcome = "written outside"
    elif not all(_has_keyword(after.get(path)) for path in keyword_files):
        outcome = "lost keywords"
    elif _snapshot(folder) != after:
        outcome = "not repeatable"
    elif sidecar.is_valid and not is_changed:
        outcome = "wrongly refused"
    elif is_changed:
        outcome = "tags added"
    else:
        outcome = "refused" if is_named else "not named"
    shutil.rmtree(folder)
    return result("sidecars", seed, damage, outcome, first, second)


def _has_keyword(data: bytes | None) -> bool:
    """Return whether the keyword is in a file of any encoding whose ASCII characters are the usual bytes and zeros."""
    return KEYWORD.encode() in (data or b"").replace(b"\0", b"")


def _lost_neighbours(tags: dict[str, list[str] | None], files: dict[str, bytes | None], sidecar: str) -> list[str]:
    tagged = {Path(path).name for path, found in tags.items() if found}
    lost = []
    for name in NEIGHBOURS:
        sidecars = [f"{name}.xmp", f"{name}.optsg.json"]
        # Without its journal, no caption of a folder can be written.
        sidecars += [f"{Path(name).stem}.txt"] * (sidecar != JOURNAL)
        if name not in tagged or not all(path in files for path in sidecars):
            lost.append(name)
    return lost


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return the content of the files of a folder, `None` for everything that is not a file."""
    return {
        entry.name: Path(entry.path).read_bytes() if entry.is_file(follow_symlinks=False) else None
        for entry in os.scandir(folder)
    }
