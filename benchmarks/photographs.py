"""Counts the photographs for which a checkpoint finds an acceptable tag.

    apt-get download mate-backgrounds && dpkg -x mate-backgrounds_*.deb backgrounds
    pip install scikit-image
    python benchmarks/photographs.py --backgrounds backgrounds/usr/share/backgrounds/mate/nature \
        --output results/icon_tagging/photographs.json

photographs.json lists photographs from installable packages and the acceptable tags of each. Do not train or tune on
these photographs. A photograph is a hit if one of its five most probable tags is acceptable. Files are tagged without
titles, also without those inside the files, with the default settings of `optsg tag`.
"""

import argparse
import json
from pathlib import Path

from modeling_optsg.evaluation.reporting import environment
from optsg.file_tagger import TagSettings
from optsg.media_files import find_media_files
from optsg.tagger import Tagger

PHOTOGRAPHS = Path(__file__).with_suffix(".json")
NUM_TAGS = 5
# A blank title is no input of the model, but replaces the title or caption inside a file.
NO_TITLE = " "


def photograph_path(package: str, name: str, backgrounds: Path) -> Path:
    """Return the path of a photograph in its package.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    if package == "scikit-image":
        import skimage

        path = Path(skimage.__file__).parent / "data" / name
    else:
        path = backgrounds / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Get {package} as described at the top of benchmarks/photographs.py."
        )
    return path


def main() -> None:
    """Tag the photographs and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/optsg-icon-small")
    parser.add_argument(
        "--backgrounds", type=Path, required=True, help="folder with the unpacked photographs of mate-backgrounds"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    photographs = json.loads(PHOTOGRAPHS.read_text(encoding="utf-8"))["photos"]
    paths = [photograph_path(entry["package"], entry["file"], arguments.backgrounds) for entry in photographs]
    files = find_media_files([str(path) for path in paths], NO_TITLE, False).files
    tag = Tagger(arguments.checkpoint, TagSettings())
    rows = []
    # Images come in the order of the files.
    for entry, (file, result) in zip(photographs, tag(files, batch_size=1), strict=True):
        if isinstance(result, Exception):
            raise SystemExit(f"{file.path}: {result}")
        tags = {tag["tag"]: round(tag["score"], 3) for tag in result.tags[:NUM_TAGS]}
        words = {word["word"]: round(word["score"], 3) for word in result.image_words[:3]}
        hit = bool(set(tags) & set(entry["accept"]))
        rows.append({"file": entry["file"], "hit": hit, "tags": tags, "image_words": words})
        print(f"{'hit ' if hit else 'miss'} {entry['file']}: {', '.join(tags) or '(no tags)'}")
    summary = {
        "photographs": len(rows),
        "hits": sum(row["hit"] for row in rows),
        "without_tags": sum(not row["tags"] for row in rows),
    }
    print(summary)
    content = json.dumps(summary | {"rows": rows} | environment(), indent=1, ensure_ascii=False, allow_nan=False)
    arguments.output.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
