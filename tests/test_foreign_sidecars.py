"""Tags are added to sidecars of other programs, and nothing that these programs wrote changes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from optsg.sidecars.xmp_packet import XmpPacket

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import foreign_sidecars  # noqa: E402
from foreign_sidecar_styles import STYLES  # noqa: E402

NAMES = {
    "keywords": ("http://purl.org/dc/elements/1.1/", "subject"),
    "hierarchy": ("http://ns.adobe.com/lightroom/1.0/", "hierarchicalSubject"),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_byte_and_keyword_of_another_program_stays(tmp_path, style):
    (tmp_path / "photo.jpg").write_bytes(b"")
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(STYLES[style])
    tags = foreign_sidecars.tag_twice(tmp_path / "photo.jpg")
    before, after = XmpPacket(STYLES[style]), XmpPacket(sidecar.read_bytes())
    users = before.read_list(*NAMES["keywords"]) or []
    subject = after.read_list(*NAMES["keywords"])
    assert subject[: len(users)] == users and set(subject) == {*users, *tags} and len(subject) == len(set(subject))
    assert after.read_list(*NAMES["hierarchy"]) == before.read_list(*NAMES["hierarchy"])
    rest = iter(sidecar.read_bytes())
    assert all(byte in rest for byte in STYLES[style])


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed (Debian: exiftool)")
@pytest.mark.parametrize("style", ["darktable", "digiKam", "Lightroom"])
def test_exiftool_reads_the_same_as_in_the_committed_results(tmp_path, style):
    results = json.loads((ROOT / "results/foreign_sidecars.json").read_text(encoding="utf-8"))["styles"]
    assert results.keys() == STYLES.keys()
    assert foreign_sidecars.measure(style, tmp_path) == results[style]
    assert results[style]["changed"] == [] and results[style]["only_insertions"]
