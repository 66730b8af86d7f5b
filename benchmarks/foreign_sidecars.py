r"""Tags images whose sidecars other programs wrote, and compares what exiftool reads before and after.

    python benchmarks/foreign_sidecars.py --output results/foreign_sidecars.json

Each sidecar of `foreign_sidecar_styles` is tagged twice with different tags, so that the second run also removes tags.
`kept` counts the values that exiftool reads before and, unchanged and in the same order, after. `changed` names all
other fields. `added` names the fields that are new or have more entries. `only_insertions` says whether every byte of
the sidecar is still there, in the same order.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from foreign_sidecar_styles import STYLES

from modeling_optsg.evaluation.reporting import environment
from optsg.media_files import MediaFile
from optsg.sidecars import SidecarLocator, make_writer

RUNS = (("dog", "winter", "a <b> & 'c'"), ("cat", "winter", "创意美食"))
OURS = frozenset(tag for run in RUNS for tag in run)
# Kinds of fields by the start of their names in exiftool; all others are "other".
KINDS = {
    "keywords": ("Subject", "Keywords", "PersonInImage"),
    "hierarchy": ("HierarchicalSubject", "TagsList", "LastKeywordXMP", "CatalogSets", "Categories"),
    "rating": ("Rating", "Label", "ColorLabel", "PickLabel", "Colorlabels"),
    "gps": ("GPS",),
    "crop": ("Crop", "HasCrop", "History", "DPP"),
}
EXIFTOOL = ("exiftool", "-j", "-struct", "-G1", "-x", "System:all", "-x", "File:all", "-x", "ExifTool:all")


def read_fields(path: Path) -> dict[str, Any]:
    """Read all metadata of a sidecar with exiftool, without the record of this program."""
    done = subprocess.run([*EXIFTOOL, str(path)], capture_output=True, check=True)
    [found] = json.loads(done.stdout)
    composite = ("SourceFile", "Composite:", "XMP-optsg:")
    return {name: value for name, value in found.items() if not name.startswith(composite)}


def tag_twice(path: Path) -> list[str]:
    """Write the tags of `RUNS` next to an image and return those of the last run."""
    for tags in RUNS:
        writer = make_writer("xmp", SidecarLocator(), lambda file, tags=tags: str(tags), "model", dry_run=False)
        writer.write(
            MediaFile(str(path), None, False), [{"tag": tag, "score": 0.5, "novel": tag == "cat"} for tag in tags]
        )
    return list(RUNS[-1])


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Count the values of each kind that are unchanged, and name the fields that are not."""
    kept, changed, added = Counter(dict.fromkeys((*KINDS, "other"), 0)), [], []
    for name, value in before.items():
        values = value if isinstance(value, list) else [value]
        now = after.get(name)
        now = now if isinstance(now, list) else [now]
        if now[: len(values)] != values:
            changed.append(name)
            continue
        field = name.partition(":")[2]
        kind = next((kind for kind, starts in KINDS.items() if field.startswith(starts)), "other")
        kept[kind] += len(values)
        if len(now) > len(values):
            added.append(name)
    return {
        "kept": dict(kept),
        "num_changed": len(changed),
        "changed": changed,
        "added": added + sorted(after.keys() - before.keys()),
    }


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Tag the sidecar of one program.

    Args:
        name: A key of `STYLES`.
        folder: An empty folder for the image and its sidecar.
    """
    image, sidecar = folder / "photo.jpg", folder / "photo.jpg.xmp"
    image.write_bytes(b"")
    sidecar.write_bytes(STYLES[name])
    before = read_fields(sidecar)
    tags = tag_twice(image)
    after = read_fields(sidecar)
    result = compare(before, after)
    subject = [str(keyword) for keyword in _as_list(after["XMP-dc:Subject"])]
    users = {str(keyword).casefold() for keyword in _as_list(before.get("XMP-dc:Subject"))}
    # A tag that the user has too stays the user's.
    result["tags_found"] = sum(tag in subject or tag.casefold() in users for tag in tags)
    result["earlier_tags_left"] = len(OURS.difference(tags, users) & set(subject))
    rest = iter(sidecar.read_bytes())
    result["only_insertions"] = all(byte in rest for byte in STYLES[name])
    return result


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if shutil.which("exiftool") is None:
        parser.error("exiftool is not installed (Debian: libimage-exiftool-perl)")
    styles = {}
    for name in STYLES:
        with tempfile.TemporaryDirectory() as folder:
            styles[name] = measure(name, Path(folder))
        print(name, json.dumps(styles[name], allow_nan=False))
    version = subprocess.run(["exiftool", "-ver"], capture_output=True, text=True, check=True).stdout.strip()
    result = {"exiftool": version, "runs": RUNS, "styles": styles} | environment()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
