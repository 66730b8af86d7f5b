"""XMP sidecars are edited in place: everything that other programs wrote stays, byte for byte."""

import codecs
import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from itertools import count

import pytest

from optsg.media_files import MediaFile
from optsg.sidecars import SidecarError, SidecarLocator, make_writer
from optsg.sidecars.xmp_packet import XmpPacket

DC, RDF = "http://purl.org/dc/elements/1.1/", "http://www.w3.org/1999/02/22-rdf-syntax-ns#"

DARKTABLE = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp='http://ns.adobe.com/xap/1.0/'
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
    xmlns:darktable="http://darktable.sf.net/"
   xmp:Rating="4"
   darktable:history_end="3"   >
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Familie</rdf:li>
     <rdf:li>Rock &amp; Roll</rdf:li>
    </rdf:Bag>
   </dc:subject>
   <lr:hierarchicalSubject>
    <rdf:Seq><rdf:li>Orte|Küste|Sunset</rdf:li></rdf:Seq>
   </lr:hierarchicalSubject>
   <darktable:history><rdf:Seq>
     <rdf:li darktable:num="0" darktable:params="gz02eJx&#x2b;"/>
   </rdf:Seq></darktable:history>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""
LIGHTROOM = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><!-- my note -->\n'
    ' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
    '  <rdf:Description rdf:about="uuid:1" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="2"/>\n'
    '  <rdf:Description rdf:about="uuid:1" xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/">\n'
    "   <crs:ToneCurve><rdf:Seq><rdf:li>0, 0</rdf:li></rdf:Seq></crs:ToneCurve>\n"
    "  </rdf:Description>\n </rdf:RDF>\n</x:xmpmeta>\n" + " " * 200 + '\n<?xpacket end="w"?>'
)
EMPTY_LISTS = f"""<RDF xmlns="{RDF}" xmlns:d="{DC}"><Description about=""><d:subject/></Description></RDF>"""
EMPTY_BAG = f"""<x:xmpmeta xmlns:x='adobe:ns:meta/'><r:RDF xmlns:r='{RDF}'><r:Description xmlns:d='{DC}' r:about=''>
<d:subject><r:Bag /></d:subject></r:Description></r:RDF></x:xmpmeta>"""
CLOSED_RDF = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='{RDF}'/></x:xmpmeta>"
FOREIGN = {
    "darktable": DARKTABLE.encode(),
    "Lightroom": LIGHTROOM.encode(),
    "Lightroom on Windows": LIGHTROOM.replace("\n", "\r\n").encode(),
    "byte-order mark": codecs.BOM_UTF8 + DARKTABLE.encode(),
    "UTF-16": codecs.BOM_UTF16_LE + LIGHTROOM.encode("utf-16-le"),
    "Latin-1": DARKTABLE.replace('encoding="UTF-8"', 'encoding="ISO-8859-1"').encode("latin-1"),
    "no prefix, empty property": EMPTY_LISTS.encode(),
    "empty list": EMPTY_BAG.encode(),
    "nothing": CLOSED_RDF.encode(),
}
exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed (Debian: exiftool)")


@pytest.fixture
def write(tmp_path):
    """Writes tags next to `photo.jpg`, as `optsg tag --write xmp` does; returns the change."""
    (tmp_path / "photo.jpg").write_bytes(b"")
    runs = count()

    def run(*tags):
        fingerprint = f"fingerprint {next(runs)}"
        writer = make_writer("xmp", SidecarLocator(), lambda file: fingerprint, "model", dry_run=False)
        found = [{"tag": tag, "score": 0.5, "novel": tag == "novel"} for tag in tags]
        return writer.write(MediaFile(str(tmp_path / "photo.jpg"), None, False), found)

    return run


def text(data: bytes) -> str:
    return XmpPacket(data).data.decode()


def read(data: bytes, name=f"{{{DC}}}subject") -> list[str]:
    """A list property as the parser of the standard library reads it."""
    root = ElementTree.fromstring(text(data).encode().split(b"?>", 1)[1] if data.startswith(b"<?xml ") else text(data))
    return [entry.text for found in root.iter(name) for entry in found.iter(f"{{{RDF}}}li")]


def only_insertions(old: str, new: str) -> bool:
    rest = iter(new)
    return all(character in rest for character in old)


def exiftool_reads(path) -> dict:
    command = ["exiftool", "-j", "-G1", "-struct", "-a", "-x", "System:all", "-x", "File:all", str(path)]
    [found] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return {k: v for k, v in found.items() if not k.startswith(("SourceFile", "ExifTool"))}


@pytest.mark.parametrize("form", [name for name in FOREIGN if "empty" not in name and name != "nothing"])
def test_adding_tags_only_adds_bytes(tmp_path, write, form):
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(FOREIGN[form])
    before = read(FOREIGN[form])
    write("dog", "novel", "a <b> & 'c'", "创意美食")
    new = sidecar.read_bytes()
    assert read(new) == before + ["dog", "novel", "a <b> & 'c'", "创意美食"]
    assert only_insertions(text(FOREIGN[form]), text(new))
    # An inserted line could still split an existing one.
    assert set(text(FOREIGN[form]).split("\n")) <= set(text(new).split("\n"))
    assert new[:2] == FOREIGN[form][:2], "the encoding stays"
    if b"\r\n" in FOREIGN[form]:
        assert new.count(b"\n") == new.count(b"\r\n")


@pytest.mark.parametrize("form", FOREIGN)
def test_removing_our_tags_restores_the_users_list(tmp_path, write, form):
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(FOREIGN[form])
    before = read(FOREIGN[form])
    write("dog", "cat")
    assert read(sidecar.read_bytes()) == before + ["dog", "cat"]
    write("cat", "bird")
    assert read(sidecar.read_bytes()) == before + ["cat", "bird"]
    write()
    assert read(sidecar.read_bytes()) == before
    if before:
        assert only_insertions(text(FOREIGN[form]), text(sidecar.read_bytes()))
    once = sidecar.read_bytes()
    writer = make_writer("xmp", SidecarLocator(), lambda file: "fingerprint 2", "model", dry_run=False)
    assert not writer.write(MediaFile(str(tmp_path / "photo.jpg"), None, False), []).written
    assert sidecar.read_bytes() == once


@exiftool
# exiftool cannot read RDF without a prefix.
@pytest.mark.parametrize("form", [name for name in FOREIGN if not name.startswith("no prefix")])
def test_exiftool_reads_our_tags_and_everything_else_unchanged(tmp_path, write, form):
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(FOREIGN[form])
    before = exiftool_reads(sidecar)
    write("dog", "novel", "a <b> & 'c'", "创意美食")
    after = exiftool_reads(sidecar)
    subject = before.pop("XMP-dc:Subject", None) or []
    assert after.pop("XMP-dc:Subject") == subject + ["dog", "novel", "a <b> & 'c'", "创意美食"]
    assert after.pop("XMP-optsg:Probabilities") == [0.5] * 4 and after["XMP-optsg:Novel"] == ["novel"]
    ours = {name for name in after if name.startswith(("XMP-optsg:", "XMP-digiKam:TagsList"))}
    assert {name: value for name, value in after.items() if name not in ours} == before


@exiftool
def test_the_record_survives_another_programs_rewrite(tmp_path, write):
    sidecar = tmp_path / "photo.jpg.xmp"
    write("dog", "cat", "bird")
    # Like Immich when a user edits tags: it rewrites the whole digiKam:TagsList.
    arguments = ["-XMP-digiKam:TagsList=dog", "-XMP-digiKam:TagsList=bird", "-XMP-digiKam:TagsList=Places/Bay"]
    subprocess.run(["exiftool", "-q", "-overwrite_original", *arguments, sidecar], check=True)
    change = write("dog", "cat", "bay")
    assert (change.added, change.removed) == ([], ["cat", "bird"]), "the user deleted cat and already has bay"
    assert exiftool_reads(sidecar)["XMP-dc:Subject"] == ["dog"]
    assert exiftool_reads(sidecar)["XMP-digiKam:TagsList"] == ["dog", "Places/Bay"]


def test_a_new_tags_list_includes_the_users_keywords(tmp_path, write):
    sidecar, listed = tmp_path / "photo.jpg.xmp", "{http://www.digikam.org/ns/1.0/}TagsList"
    plain = DARKTABLE.replace("lr:hierarchicalSubject", "lr:weightedFlatSubject").encode()
    sidecar.write_bytes(plain)
    write("dog")
    assert read(sidecar.read_bytes(), listed) == ["Familie", "Rock & Roll", "dog"]
    sidecar.write_bytes(sidecar.read_bytes().replace(b"     <rdf:li>Familie</rdf:li>\n", b"", 1))
    write("cat")
    assert read(sidecar.read_bytes(), listed) == ["Rock & Roll", "cat"]


def test_no_tags_list_is_created_that_would_hide_a_hierarchy(tmp_path, write):
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(DARKTABLE.encode())
    change = write("dog", "sunset", "familie")
    assert b"TagsList" not in sidecar.read_bytes()
    assert change.added == ["dog"], "the user has Familie and Orte|Küste|Sunset"
    assert any("hierarchicalSubject" in remark for remark in change.remarks)


BROKEN = {
    "not XML": b"<x:xmpmeta",
    "empty": b"",
    "no RDF": b"<a/>",
    "not UTF-8": DARKTABLE.encode("latin-1"),
    "unknown encoding": DARKTABLE.replace("UTF-8", "no-such").encode(),
    "cut off": DARKTABLE.encode()[:-40],
    "external entity": b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + CLOSED_RDF.encode(),
    "entity bomb": b'<!DOCTYPE a [<!ENTITY e "eeee"><!ENTITY f "&e;&e;&e;">]>' + CLOSED_RDF.encode(),
    "text for a list": DARKTABLE.replace("<rdf:Bag>", "x<rdf:Bag>").encode(),
    "attribute for a list": DARKTABLE.replace("darktable:history_end=", "dc:subject=").encode(),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_an_unreadable_sidecar_is_named_and_unchanged(tmp_path, write, damage):
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(BROKEN[damage])
    with pytest.raises(SidecarError, match="photo.jpg.xmp was not changed"):
        write("dog")
    assert sidecar.read_bytes() == BROKEN[damage]
    assert {path.name for path in tmp_path.iterdir()} == {"photo.jpg", "photo.jpg.xmp"}


def test_tags_that_xml_cannot_hold_are_left_out_and_reported(tmp_path, write):
    change = write("dog", "bell\a")
    assert read((tmp_path / "photo.jpg.xmp").read_bytes()) == ["dog"]
    assert any("control characters" in remark for remark in change.remarks)
