"""The keywords of images and of their sidecars."""

import pytest
from keyword_helpers import XMP, save_image, xmp
from PIL import Image
from PIL.ExifTags import Base

from optsg.media_files import MediaFile
from optsg.sidecars import SidecarError, SidecarLocator, embedded
from optsg.sidecars.embedded import EXIF_KEYWORDS, read_embedded
from optsg.sidecars.keywords import read_keywords


def keywords_of(path):
    file = MediaFile(str(path), None, path.suffix == ".mp4")
    keywords, problem = read_keywords(file, SidecarLocator(), read_embedded(file))
    assert problem is None
    return keywords


def test_keywords_of_a_sidecar(tmp_path):
    path = save_image(tmp_path / "a.jpg")
    assert keywords_of(path) == []
    sidecar = xmp(
        dc_subject=["Mia", "ours"],
        digiKam_TagsList=["People/Mia", "Places/Rome", "ours"],
        lr_hierarchicalSubject=["Trips|2021", "ours"],
        optsg_Tags=["ours"],
        optsg_Listed=["ours"],
    )
    (tmp_path / "a.jpg.xmp").write_text(sidecar, encoding="utf-8")
    assert keywords_of(path) == ["Mia", "Rome", "2021"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_keywords_in_the_xmp_of_an_image(tmp_path, suffix):
    path, packet = tmp_path / f"a.{suffix}", xmp(dc_subject=["Mia", "mia", " Grandma's  garden "])
    if suffix == "png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet)
        save_image(path, pnginfo=info)
    elif suffix == "tif":
        save_image(path, tiffinfo={700: packet.encode()})
    else:
        save_image(path, xmp=packet.encode())
    assert keywords_of(path) == ["Mia", "Grandma's garden"]


def test_keywords_in_exif_and_iptc(tmp_path):
    exif = Image.Exif()
    exif[EXIF_KEYWORDS] = "Mia;Überlingen\0".encode("utf-16-le")
    assert Base.XPKeywords == EXIF_KEYWORDS
    assert keywords_of(save_image(tmp_path / "a.jpg", exif=exif)) == ["Mia", "Überlingen"]
    path = save_image(tmp_path / "b.jpg")
    records = b"\x1c\x01\x5a\x00\x03\x1b%G"
    for keyword in ("Bruno", "Überlingen"):
        records += b"\x1c\x02\x19" + len(keyword.encode()).to_bytes(2, "big") + keyword.encode()
    block = b"8BIM\x04\x04\x00\x00" + len(records).to_bytes(4, "big") + records + b"\0" * (len(records) % 2)
    segment = b"Photoshop 3.0\0" + block
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:])
    assert keywords_of(path) == ["Bruno", "Überlingen"]


def test_damaged_metadata_in_an_image_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    path = save_image(tmp_path / "a.jpg", xmp=b"<x:xmpmeta")
    (tmp_path / "a.jpg.xmp").write_text(xmp(dc_subject=["Mia"]), encoding="utf-8")
    file = MediaFile(str(path), None, False)
    keywords, problem = read_keywords(file, SidecarLocator(), read_embedded(file))
    assert keywords == ["Mia"]
    assert problem.endswith("invalid XMP; install exiftool (Debian: libimage-exiftool-perl)")
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    assert keywords_of(tmp_path / "b.jpg") == []


def test_sidecars_of_raw_files_and_of_several_files(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        save_image(tmp_path / name)
    for name in ("a.cr2", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    for name in ("a.xmp", "b.xmp"):
        (tmp_path / name).write_text(xmp(dc_subject=["Mia"]), encoding="utf-8")
    # A raw file and its JPEG show the same; an image and a video of one name may not.
    assert keywords_of(tmp_path / "a.jpg") == ["Mia"] and keywords_of(tmp_path / "b.jpg") == []
    (tmp_path / "a.jpg.xmp").write_text(xmp(dc_subject=["Bruno"]), encoding="utf-8")
    file = MediaFile(str(tmp_path / "a.jpg"), None, False)
    assert read_keywords(file, SidecarLocator(), read_embedded(file)) == (["Bruno"], None)
    assert read_keywords(file, SidecarLocator(naming="stem"), read_embedded(file)) == (["Mia"], None)
    (tmp_path / "a.jpg.xmp").write_text(XMP.format("<dc:subject>Bruno</dc:subject>"), encoding="utf-8")
    with pytest.raises(SidecarError, match="a.jpg.xmp cannot be read: subject is not a list"):
        keywords_of(tmp_path / "a.jpg")


def test_copies_of_our_tags_in_an_image_are_not_the_users(tmp_path):
    path = save_image(tmp_path / "a.jpg", xmp=xmp(dc_subject=["ours", "Mia"]).encode())
    assert keywords_of(path) == ["ours", "Mia"]
    (tmp_path / "a.jpg.xmp").write_text(xmp(dc_subject=["ours"], optsg_Tags=["ours"]), encoding="utf-8")
    assert keywords_of(path) == ["Mia"]
