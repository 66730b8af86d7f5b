"""A new XMP sidecar starts with what a person wrote into the image, so that no program loses it."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from optsg.embedded_titles import find_title
from optsg.media_files import MediaFile
from optsg.sidecars import SidecarError, SidecarLocator, embedded, make_writer, xmp_sidecar
from optsg.sidecars.xmp_packet import XmpPacket

ROOT = Path(__file__).parents[1]
VIDEO = next((ROOT / "examples/images").glob("*.mp4"))
exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed (Debian: exiftool)")
DC, DIGIKAM = "http://purl.org/dc/elements/1.1/", "http://www.digikam.org/ns/1.0/"
PACKET = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:lr="http://ns.adobe.com/lightroom/1.0/" xmlns:digiKam="http://www.digikam.org/ns/1.0/"
 xmlns:MicrosoftPhoto="http://ns.microsoft.com/photo/1.0/" xmlns:optsg="urn:x-optsg:1.0/"
 xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
 xmlns:darktable="http://darktable.sf.net/" {attributes}>{properties}</rdf:Description></rdf:RDF></x:xmpmeta>"""
TITLE = '<dc:title><rdf:Alt><rdf:li xml:lang="x-default">Robin</rdf:li></rdf:Alt></dc:title>'


def bag(name: str, *texts: str) -> str:
    return f"<{name}><rdf:Bag>{''.join(f'<rdf:li>{text}</rdf:li>' for text in texts)}</rdf:Bag></{name}>"


def packet(*properties: str, attributes: str = "") -> bytes:
    return PACKET.format(attributes=attributes, properties="".join(properties)).encode()


def save(path, xmp: bytes | None = None, iptc: dict[tuple[int, int], list[str]] | None = None):
    """Saves an image with metadata."""
    options = {"xmp": xmp} if xmp else {}
    if path.suffix == ".png" and xmp:
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    Image.new("RGB", (8, 8), "red").save(path, **options)
    if iptc:
        records = b"\x1c\x01\x5a\x00\x03\x1b%G"
        for (record, dataset), texts in iptc.items():
            for text in map(str.encode, texts):
                records += bytes((0x1C, record, dataset)) + len(text).to_bytes(2, "big") + text
        block = b"8BIM\x04\x04\x00\x00" + len(records).to_bytes(4, "big") + records + b"\0" * (len(records) % 2)
        segment = b"Photoshop 3.0\0" + block
        data = path.read_bytes()
        path.write_bytes(data[:2] + b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:])
    return path


def tag(path, *tags: str):
    """Writes tags as `optsg tag --write xmp` does."""
    writer = make_writer("xmp", SidecarLocator(), lambda file: str(tags), "model", dry_run=False)
    found = [{"tag": tag, "score": 0.5, "novel": False} for tag in tags]
    return writer.write(MediaFile(str(path), None, path.suffix == ".mp4"), found)


def read(path) -> embedded.EmbeddedMetadata:
    return embedded.read_embedded(MediaFile(str(path), None, False))


def lists(path) -> dict[str, list[str] | None]:
    """The keyword lists of an image's sidecar."""
    sidecar = XmpPacket(path.with_name(path.name + ".xmp").read_bytes())
    return {name: sidecar.read_list(namespace, name) for namespace, name in ((DC, "subject"), (DIGIKAM, "TagsList"))}


def exiftool_reads(path) -> dict:
    [found] = json.loads(subprocess.run(["exiftool", "-j", "-struct", str(path)], capture_output=True).stdout)
    return found


def immich_keywords(path) -> list[str]:
    """The keywords that Immich shows: keys of the sidecar replace those of the image, and the first list wins."""
    merged = exiftool_reads(path) | exiftool_reads(f"{path}.xmp")
    found = next(merged[key] for key in ("TagsList", "HierarchicalSubject", "Keywords") if key in merged)
    return [str(text) for text in (found if isinstance(found, list) else [found])]


@exiftool
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_immich_shows_the_keywords_of_the_image_and_the_tags(tmp_path, suffix):
    path = save(tmp_path / f"flat.{suffix}", packet(bag("dc:subject", "Grandma's garden", "Easter 2019")))
    tag(path, "dog", "easter 2019")
    assert immich_keywords(path) == ["Grandma's garden", "Easter 2019", "dog"]
    people = bag("digiKam:TagsList", "People/Anna", "Places/Europe")
    path = save(tmp_path / f"tree.{suffix}", packet(people, bag("dc:subject", "Anna", "Europe")))
    tag(path, "dog", "anna")
    assert immich_keywords(path) == ["People/Anna", "Places/Europe", "dog"]
    path = save(tmp_path / f"lightroom.{suffix}", packet(bag("lr:hierarchicalSubject", "Places|Rome")))
    assert any("keyword hierarchy" in remark for remark in tag(path, "dog", "rome").remarks)
    assert immich_keywords(path) == ["Places|Rome"] and lists(path)["subject"] == ["dog"]
    path = save(tmp_path / f"windows.{suffix}", packet(bag("MicrosoftPhoto:LastKeywordXMP", "Places/Rome", "Sea")))
    tag(path, "dog", "rome")
    assert immich_keywords(path) == ["Places/Rome", "Sea", "dog"]


@exiftool
def test_the_sidecar_has_rating_title_and_description_but_no_raw_settings(tmp_path):
    settings = "<darktable:history><rdf:Seq><rdf:li darktable:num='0'/></rdf:Seq></darktable:history>"
    attributes = 'xmp:Rating="4" crs:HasCrop="True" crs:CropTop="0.1" tiff:Orientation="6" dc:subject="one keyword"'
    path = save(tmp_path / "a.jpg", packet(TITLE, settings, attributes=attributes), {(2, 5): ["ignored"]})
    tag(path, "dog")
    found = exiftool_reads(f"{path}.xmp")
    assert (found["Rating"], found["Title"], found["Subject"]) == (4, "Robin", ["one keyword", "dog"])
    assert not {"HasCrop", "CropTop", "Orientation", "HistoryNum", "History"} & found.keys()


def test_iptc_and_exif_fields_are_added_unless_xmp_has_them(tmp_path):
    iptc = {(2, 25): ["Überlingen", "cut" * 21 + "c", "MIA"], (2, 5): ["A title"], (2, 120): ["A caption"]}
    path = save(tmp_path / "a.jpg", packet(bag("dc:subject", "cut" * 30, "Mia")), iptc)
    tag(path, "dog")
    assert lists(path)["subject"] == ["cut" * 30, "Mia", "Überlingen", "dog"]
    text = (tmp_path / "a.jpg.xmp").read_text("utf-8")
    assert text.count(">A title<") == 1 and text.count(">A caption<") == 1
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x4746] = "By the lake", "A. Person", 3
    Image.new("RGB", (8, 8)).save(tmp_path / "c.jpg", exif=exif)
    tag(tmp_path / "c.jpg", "dog")
    text = (tmp_path / "c.jpg.xmp").read_text("utf-8")
    assert all(part in text for part in (">By the lake<", ">A. Person<", "<xmp:Rating>3<"))
    path = save(tmp_path / "b.jpg", iptc={(2, 25): ["only here"]})
    tag(path, "dog")
    assert lists(path) == {"subject": ["only here", "dog"], "TagsList": ["only here", "dog"]}


def test_keywords_of_the_image_stay_but_tags_copied_into_it_do_not(tmp_path):
    path = save(tmp_path / "a.jpg", packet(bag("dc:subject", "Mia")))
    tag(path, "dog")
    tag(path, "cat")
    tag(path)
    assert lists(path) == {"subject": ["Mia"], "TagsList": ["Mia"]}
    # Another program wrote the sidecar into the image; then the sidecar was deleted.
    path = save(tmp_path / "b.jpg", packet(bag("dc:subject", "Mia", "dog"), bag("optsg:Tags", "dog")))
    tag(path, "cat")
    assert lists(path)["subject"] == ["Mia", "cat"]


def test_no_sidecar_without_tags(tmp_path):
    path = save(tmp_path / "a.jpg", packet(bag("dc:subject", "Mia")))
    assert not tag(path).written and not (tmp_path / "a.jpg.xmp").exists()
    foreign = packet(bag("dc:subject", "Mia"))
    (tmp_path / "a.jpg.xmp").write_bytes(foreign)
    assert not tag(path).written and (tmp_path / "a.jpg.xmp").read_bytes() == foreign


def test_text_after_the_pixels_of_a_png_is_read(tmp_path):
    path = save(tmp_path / "a.png", packet(bag("dc:subject", "Mia")))
    data = path.read_bytes()
    start = data.index(b"iTXt") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    path.write_bytes(data[:start] + data[stop:end] + data[start:stop] + data[end:])
    tag(path, "dog")
    assert lists(path)["subject"] == ["Mia", "dog"]


@exiftool
def test_images_with_too_many_pixels_for_pillow_are_read(tmp_path, monkeypatch):
    path = save(tmp_path / "a.jpg", packet(bag("dc:subject", "Mia")), {(2, 25): ["Anna"]})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    tag(path, "dog")
    assert lists(path)["subject"] == ["Mia", "Anna", "dog"]


NESTED = "<dc:relation>" + "<dc:a>" * 3000 + "</dc:a>" * 3000 + "</dc:relation>"
INVALID = [b"<x:xmpmeta", b"<!DOCTYPE x [<!ENTITY a 'b'>]><x/>", packet("<dc:subject>&a;"), packet(NESTED)]


@pytest.mark.parametrize("xmp", INVALID, ids=["unclosed", "entity", "half", "nested"])
def test_no_sidecar_hides_metadata_that_cannot_be_read(tmp_path, monkeypatch, xmp):
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    path = save(tmp_path / "a.webp", xmp, None)
    with pytest.raises(SidecarError, match="a.webp.xmp was not written.*invalid XMP; install exiftool"):
        tag(path, "dog")
    assert not tag(path).written
    (tmp_path / "a.webp.xmp").write_bytes(packet(bag("dc:subject", "Mia")))
    tag(path, "dog")
    assert lists(path)["subject"] == ["Mia", "dog"]


@exiftool
def test_exiftool_repairs_invalid_xmp(tmp_path):
    path = save(tmp_path / "a.jpg", packet(bag("dc:subject", "R&D", "Mia"), TITLE), {(2, 25): ["Anna"]})
    assert tag(path, "dog").remarks == [embedded.REPAIRED_XMP]
    assert lists(path)["subject"] == ["R&D", "Mia", "Anna", "dog"]
    assert find_title(read(path)) == "Robin"
    with pytest.raises(SidecarError, match="invalid XMP"):
        tag(save(tmp_path / "b.jpg", b"<x:xmpmeta"), "dog")


def test_the_title_may_have_any_form(tmp_path):
    def title(*properties: str, attributes: str = "") -> str | None:
        return find_title(read(save(tmp_path / "a.jpg", packet(*properties, attributes=attributes))))

    assert title(TITLE) == "Robin"
    assert title("<dc:title>A robin</dc:title>") == title(attributes='dc:title="A robin"') == "A robin"
    structure = '<dc:title rdf:parseType="Resource"><rdf:value>A robin</rdf:value></dc:title>'
    assert title(structure) == "A robin"
    assert title("<dc:title><dc:other>A</dc:other></dc:title><dc:description>B</dc:description>") == "B"
    assert title("<dc:title/>") is None


def test_threads_read_the_same_metadata(tmp_path):
    path = save(tmp_path / "a.jpg", packet(bag("lr:hierarchicalSubject", "Places|Rome"), TITLE))
    with ThreadPoolExecutor(8) as pool:
        packets = {found.packet for found in pool.map(read, [path] * 200)}
    assert len(packets) == 1 and b"<lr:hierarchicalSubject>" in packets.pop()


def test_metadata_is_read_without_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    exif = Image.Exif()
    exif[0x010E] = "By the lake"
    xmp = packet(bag("dc:subject", "Mia"))
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "a.png", pnginfo=info, exif=exif)
    image.save(tmp_path / "b.jpg", xmp=xmp, exif=exif)
    boxes = {b"JXL ": b"\r\n\x87\n", b"jxlc": b"pixels", b"Exif": bytes(4) + exif.tobytes(), b"xml ": xmp}
    jxl = b"".join((len(data) + 8).to_bytes(4, "big") + kind + data for kind, data in boxes.items())
    (tmp_path / "c.jpg").write_bytes(jxl)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    for name in ("a.png", "b.jpg", "c.jpg"):
        assert tag(tmp_path / name, "dog").remarks == []
        assert lists(tmp_path / name)["subject"] == ["Mia", "dog"]
        assert find_title(read(tmp_path / name)) == "By the lake"


def test_metadata_that_was_already_read_is_not_read_again(tmp_path, monkeypatch):
    path = save(tmp_path / "a.jpg", packet(bag("dc:subject", "Mia")))
    found = read(path)
    monkeypatch.setattr(xmp_sidecar, "read_embedded", None)
    writer = make_writer("xmp", SidecarLocator(), lambda file: "", "model", dry_run=False)
    writer.write(MediaFile(str(path), None, False), [{"tag": "dog", "score": 0.5, "novel": False}], embedded=found)
    assert lists(path)["subject"] == ["Mia", "dog"]


def test_metadata_inside_videos_needs_exiftool(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"a video")
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    assert tag(tmp_path / "a.mp4", "dog").remarks == [embedded.NO_EXIFTOOL]


@exiftool
def test_exiftool_reads_the_keywords_inside_videos(tmp_path):
    path = shutil.copy(VIDEO, tmp_path / "a.mp4")
    fields = ["-XMP-dc:Subject=Mia", "-XMP-digiKam:TagsList=People/Mia", "-Keys:Title=A film", "-XMP-xmp:Rating=3"]
    subprocess.run(["exiftool", "-q", "-overwrite_original", *fields, path], check=True)
    tag(tmp_path / "a.mp4", "dog")
    assert lists(tmp_path / "a.mp4") == {"subject": ["Mia", "dog"], "TagsList": ["People/Mia", "dog"]}
    found = exiftool_reads(tmp_path / "a.mp4.xmp")
    assert found["Title"] == "A film" and found["Rating"] == 3


@exiftool
@pytest.mark.parametrize("rating", ["3", "3.5"])
def test_text_that_looks_like_a_number_stays_as_it_is(tmp_path, rating):
    keywords = ["1.10", "true", "1e3", "007", "20240101"]
    path = save(tmp_path / "a.jpg", iptc={(2, 25): keywords})
    fields = ["-EXIF:Artist=2024.50", "-XPKeywords=1e5;2.50", f"-XMP-xmp:Rating={rating}"]
    subprocess.run(["exiftool", "-q", "-overwrite_original", *fields, path], check=True)
    found = embedded._read_with_exiftool(str(path))
    assert found.keywords == [*keywords, "1e5", "2.50"] and found.texts["creator"] == "2024.50"
    assert found.rating == (3 if rating == "3" else None)
    save(path, iptc={(2, 25): ["2.50"]})
    assert "2.50" in embedded._read_with_exiftool(str(path)).keywords
