"""Reads what a person wrote into an image or a video: keywords, rating, title and description.

Programs such as Immich and digiKam let a sidecar replace the metadata in the file. A new sidecar therefore starts with
them. Settings of raw converters and properties of the camera are left out: in a sidecar, they would be applied again.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..media_files import MediaFile, suffix_of
from .image_chunks import JXL_START, PNG_START, png_without_pixels, read_jxl_boxes
from .reconciliation import tag_key
from .xmp_packet import RDF, XmpPacket, is_xml_text

if TYPE_CHECKING:
    from PIL import Image

DC, LR = "http://purl.org/dc/elements/1.1/", "http://ns.adobe.com/lightroom/1.0/"
XMP, PHOTOSHOP = "http://ns.adobe.com/xap/1.0/", "http://ns.adobe.com/photoshop/1.0/"
DIGIKAM, MICROSOFT = "http://www.digikam.org/ns/1.0/", "http://ns.microsoft.com/photo/1.0/"
RECORD = "urn:x-optsg:1.0/"
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
# Namespaces that people write, with their usual prefixes.
_COPIED_NAMESPACES = {
    DC: "dc",
    LR: "lr",
    DIGIKAM: "digiKam",
    MICROSOFT: "MicrosoftPhoto",
    "http://ns.microsoft.com/photo/1.2/": "MP",
    "http://www.metadataworkinggroup.com/schemas/regions/": "mwg-rs",
    "http://www.metadataworkinggroup.com/schemas/keywords/": "mwg-kw",
    "http://ns.acdsee.com/iptc/1.0/": "acdsee",
    "http://ns.iview-multimedia.com/mediapro/1.0/": "mediapro",
    "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/": "Iptc4xmpCore",
    "http://iptc.org/std/Iptc4xmpExt/2008-02-29/": "Iptc4xmpExt",
    RECORD: "optsg",  # tags of this program, if another program wrote its sidecar into the image
}
# From these namespaces, only what people write.
_COPIED_PROPERTIES = {
    XMP: {"Rating", "Label"},
    PHOTOSHOP: {"Headline", "City", "State", "Country", "Credit", "Source", "Instructions", "CaptionWriter"},
}
_PREFIXES = {
    **_COPIED_NAMESPACES,
    XMP: "xmp",
    PHOTOSHOP: "photoshop",
    RDF: "rdf",
    "adobe:ns:meta/": "x",
    "http://ns.microsoft.com/photo/1.2/t/RegionInfo#": "MPRI",
    "http://ns.microsoft.com/photo/1.2/t/Region#": "MPReg",
    "http://ns.adobe.com/xmp/sType/Area#": "stArea",
    "http://ns.adobe.com/xap/1.0/sType/Dimensions#": "stDim",
}
for _namespace, _prefix in _PREFIXES.items():
    # Once: other threads read this table of the library.
    ElementTree.register_namespace(_prefix, _namespace)
# Lists of keywords. Some programs write a single keyword as plain text.
_LISTS = {(DC, "subject"), (LR, "hierarchicalSubject"), (DIGIKAM, "TagsList"), (MICROSOFT, "LastKeywordXMP")}

# Fields of IPTC-IIM 4.2 and EXIF for the texts of Dublin Core. digiKam does not read them next to a sidecar.
IPTC_TEXTS = {"title": (2, 5), "description": (2, 120), "creator": (2, 80), "rights": (2, 116)}
EXIF_TEXTS = {"description": 0x010E, "creator": 0x013B, "rights": 0x8298}
EXIFTOOL_TEXTS = {"title": "Title", "description": "Description", "creator": "Artist", "rights": "Copyright"}
IPTC_KEYWORDS, IPTC_CHARACTER_SET = (2, 25), (1, 90)
IPTC_UTF8 = b"\x1b%G"
IPTC_KEYWORD_BYTES = 64  # longer keywords are cut
# EXIF fields of Windows Explorer. Its keywords are UTF-16, separated by semicolons.
EXIF_KEYWORDS, EXIF_RATING = 0x9C9E, 0x4746
EXIFTOOL_SECONDS = 10
JPEG_START = b"\xff\xd8\xff"
# Elements inside each other; the functions of ElementTree call themselves for each.
MAX_DEPTH = 200
INSTALL = "install exiftool (Debian: libimage-exiftool-perl)"
NO_EXIFTOOL = f"did not read keywords inside videos and other files that Pillow cannot read; {INSTALL}"
UNREADABLE = "could not read the metadata inside the file"
INVALID_XMP = "the file contains invalid XMP"
REPAIRED_XMP = "read invalid XMP inside the file with exiftool"


@dataclass
class EmbeddedMetadata:
    """Metadata that a person wrote into an image or a video.

    Args:
        packet: An XMP document with this metadata, or `None` if there is none.
        texts: Titles, then descriptions.
        remark: A sentence about metadata that could not be read, for the report.
        error: Why the metadata cannot be read, although the file may have some. A new sidecar would hide it.
    """

    packet: bytes | None = None
    texts: list[str] = field(default_factory=list)
    remark: str | None = None
    error: str | None = None


@dataclass
class _Fields:
    """Metadata of a file outside the properties of its XMP.

    Args:
        xmp: The XMP document, if the file has one.
        keywords: Keywords of IPTC, EXIF and QuickTime.
        texts: Title, description, creator and rights of IPTC, EXIF or QuickTime.
        rating: Rating of EXIF or QuickTime, 1 to 5.
    """

    xmp: bytes | None = None
    keywords: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    rating: int | None = None


def read_embedded(file: MediaFile) -> EmbeddedMetadata:
    """Read what a person wrote into an image or a video.

    Images are read with Pillow. Videos, and images that are too large for Pillow, in other formats or with damaged
    metadata, are read with exiftool if it is installed.

    Args:
        file: The image or video. It is not changed.
    """
    from PIL import UnidentifiedImageError

    error = None
    if not file.is_video:
        try:
            if fields := _read_with_pillow(file.path):
                return _combine(fields)
        except UnidentifiedImageError:  # not an image
            return EmbeddedMetadata(remark=UNREADABLE)
        except _InvalidXmp:
            error = INVALID_XMP
        except Exception:  # Pillow's plugins raise errors of many types
            error = UNREADABLE
    if shutil.which("exiftool") is None:
        return EmbeddedMetadata(error=f"{error}; {INSTALL}") if error else EmbeddedMetadata(remark=NO_EXIFTOOL)
    try:
        fields = _read_with_exiftool(file.path)
        try:
            return _combine(fields)
        except _InvalidXmp:
            error = INVALID_XMP
            fields.xmp = _repair_xmp(file.path)
            return _combine(fields, REPAIRED_XMP)
    except Exception:  # exiftool fails or takes too long, or its output is not as expected
        return EmbeddedMetadata(error=error or UNREADABLE)


class _InvalidXmp(Exception):
    """The XMP in a file cannot be read."""


def _combine(fields: _Fields, remark: str | None = None) -> EmbeddedMetadata:
    """Return all fields of a file as one XMP document.

    Raises:
        _InvalidXmp: The XMP cannot be read.
    """
    try:
        properties = _copied_properties(fields.xmp) if fields.xmp else []
    except (ValueError, ElementTree.ParseError) as error:
        raise _InvalidXmp from error
    description = ElementTree.Element(f"{{{RDF}}}Description", {f"{{{RDF}}}about": ""})
    description.extend(properties)
    _add_fields(description, fields)
    texts = [
        text
        for name in ("title", "description")
        for element in description.findall(f"{{{DC}}}{name}")
        for text in _plain_texts(element)
    ]
    return EmbeddedMetadata(_to_packet(description) if len(description) else None, texts, remark)


def _read_with_pillow(path: str) -> _Fields | None:
    """Return the metadata of an image, or `None` if Pillow does not know the format or refuses so many pixels."""
    from PIL import Image, JpegImagePlugin, PngImagePlugin

    if suffix_of(path) not in Image.registered_extensions():
        return None
    with open(path, "rb") as file, contextlib.suppress(Image.DecompressionBombError):
        start = file.read(len(JXL_START))
        file.seek(0)
        if start.startswith((JXL_START, b"\xff\x0a")):
            return _read_jxl(read_jxl_boxes(file))
        # These need no pixels, so that their number does not matter.
        if start.startswith(JPEG_START):
            image = JpegImagePlugin.JpegImageFile(file)
        elif start.startswith(PNG_START):
            image = PngImagePlugin.PngImageFile(png_without_pixels(file))
        else:
            image = Image.open(file)
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        fields = _Fields(xmp.encode() if isinstance(xmp, str) else xmp)
        _read_iptc(image, fields)
        _read_exif(image.getexif(), fields)
        return fields
    return None


def _read_jxl(boxes: dict[bytes, bytes]) -> _Fields | None:
    from PIL import Image

    if b"brob" in boxes:
        return None
    fields = _Fields(boxes.get(b"xml "))
    exif = Image.Exif()
    exif.load(boxes.get(b"Exif", b"")[4:])
    _read_exif(exif, fields)
    return fields


def _read_iptc(image: "Image.Image", fields: _Fields) -> None:
    from PIL import IptcImagePlugin

    records = IptcImagePlugin.getiptcinfo(image) or {}
    encodings = ("utf-8",) if records.get(IPTC_CHARACTER_SET) == IPTC_UTF8 else ("utf-8", "latin-1")

    def read(field: tuple[int, int]) -> list[str]:
        values = records.get(field, [])
        return [_decode(value, encodings) for value in (values if isinstance(values, list) else [values])]

    fields.keywords += read(IPTC_KEYWORDS)
    fields.texts = {name: values[0] for name, field in IPTC_TEXTS.items() if (values := read(field))}


def _read_exif(exif: "Image.Exif", fields: _Fields) -> None:
    keywords = exif.get(EXIF_KEYWORDS)
    if isinstance(keywords, bytes):
        fields.keywords += keywords.decode("utf-16-le", "ignore").partition("\0")[0].split(";")
    fields.rating = exif.get(EXIF_RATING)
    found = {name: exif.get(number) for name, number in EXIF_TEXTS.items()}
    fields.texts = {name: text for name, text in found.items() if isinstance(text, str)} | fields.texts


def _read_with_exiftool(path: str) -> _Fields:
    names = ("XMP", "Keywords", "XPKeywords", "Rating", *EXIFTOOL_TEXTS.values())
    # An absolute path does not start with "-", which exiftool would read as an option.
    command = ["exiftool", "-j", "-b", *(f"-{name}" for name in names), os.path.abspath(path)]
    options = {"capture_output": True, "stdin": subprocess.DEVNULL, "timeout": EXIFTOOL_SECONDS}
    done = subprocess.run(command, check=True, **options)
    # exiftool prints text that looks like a number or a truth value without quotes, such as the keyword 1.10.
    [found] = json.loads(done.stdout, parse_int=str, parse_float=str)
    xmp = found.get("XMP")
    if isinstance(xmp, str):
        xmp = base64.b64decode(xmp[7:]) if xmp.startswith("base64:") else xmp.encode()
    keywords = found.get("Keywords", [])
    keywords = [_to_text(keyword) for keyword in (keywords if isinstance(keywords, list) else [keywords])]
    keywords += _to_text(found.get("XPKeywords", "")).split(";")
    texts = {name: _to_text(found[key]) for name, key in EXIFTOOL_TEXTS.items() if key in found}
    rating = _to_text(found.get("Rating", ""))
    return _Fields(xmp, keywords, texts, int(rating) if rating.isdecimal() else None)


def _to_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _repair_xmp(path: str) -> bytes:
    """Return what exiftool can read of invalid XMP, as a valid document."""
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "copy.xmp")
        command = ["exiftool", "-tagsFromFile", os.path.abspath(path), "-xmp:all", "-o", copy]
        options = {"capture_output": True, "stdin": subprocess.DEVNULL, "timeout": EXIFTOOL_SECONDS}
        subprocess.run(command, check=True, **options)
        return Path(copy).read_bytes()


def _copied_properties(xmp: bytes) -> list[ElementTree.Element]:
    """Return the properties of an XMP document that people write, each as an element.

    Raises:
        ValueError: The document cannot be read, or a property is nested too deeply.
    """
    packet = XmpPacket(xmp.rstrip(b"\0"))  # refuses document types, so there are no entities to expand
    root = ElementTree.fromstring(packet.data, ElementTree.XMLParser(encoding="utf-8"))
    rdf = next(root.iter(f"{{{RDF}}}RDF"))
    found = []
    for description in rdf:
        for name, value in description.attrib.items():
            if _is_copied(name):
                element = ElementTree.Element(name)
                element.text = value
                found.append(element)
        found += [child for child in description if _is_copied(child.tag)]
    for element in found:
        _check_depth(element, MAX_DEPTH)
        element.tail = None
        namespace, _, local = element.tag[1:].rpartition("}")
        if (namespace, local) in _LISTS and not len(element):
            text, element.text = (element.text or "").strip(), None
            _add_entries(element, "Bag", [text] if text else [])
    return found


def _check_depth(element: ElementTree.Element, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"elements are nested more than {MAX_DEPTH} deep")
    for child in element:
        _check_depth(child, depth - 1)


def _is_copied(name: str) -> bool:
    namespace, _, local = name[1:].rpartition("}")
    return namespace in _COPIED_NAMESPACES or local in _COPIED_PROPERTIES.get(namespace, ())


def _add_fields(description: ElementTree.Element, fields: _Fields) -> None:
    """Add the fields outside XMP, unless the XMP has them too."""
    subject = description.find(f"{{{DC}}}subject")
    present = _texts(subject) + _texts(description.find(f"{{{RECORD}}}Tags"))
    keys = {tag_key(text) for text in present}
    added = []
    for keyword in map(_clean, fields.keywords):
        is_cut = len(keyword.encode()) >= IPTC_KEYWORD_BYTES - 3 and any(text.startswith(keyword) for text in present)
        if keyword and tag_key(keyword) not in keys and not is_cut:
            added.append(keyword)
            keys.add(tag_key(keyword))
    if added:
        if subject is None:
            subject = ElementTree.SubElement(description, f"{{{DC}}}subject")
        if len(subject):
            _add_items(subject[0], added)
        else:
            _add_entries(subject, "Bag", added)
    for name, text in fields.texts.items():
        if (text := _clean(text)) and description.find(f"{{{DC}}}{name}") is None:
            kind = "Seq" if name == "creator" else "Alt"
            _add_entries(ElementTree.SubElement(description, f"{{{DC}}}{name}"), kind, [text])
    is_rated = description.find(f"{{{XMP}}}Rating") is not None
    if isinstance(fields.rating, int) and 1 <= fields.rating <= 5 and not is_rated:
        ElementTree.SubElement(description, f"{{{XMP}}}Rating").text = str(fields.rating)


def _add_entries(element: ElementTree.Element, kind: str, texts: list[str]) -> None:
    _add_items(ElementTree.SubElement(element, f"{{{RDF}}}{kind}"), texts)


def _add_items(container: ElementTree.Element, texts: list[str]) -> None:
    for text in texts:
        item = ElementTree.SubElement(container, f"{{{RDF}}}li")
        item.text = text
        if container.tag == f"{{{RDF}}}Alt":
            item.set(_LANGUAGE, "x-default")


def _texts(element: ElementTree.Element | None) -> list[str]:
    return [] if element is None else ["".join(item.itertext()).strip() for item in element.iter(f"{{{RDF}}}li")]


def _plain_texts(element: ElementTree.Element) -> list[str]:
    """Return the texts of a property, which should be a list but may be plain text."""
    items = list(element.iter(f"{{{RDF}}}li")) or [element]
    values = (item.find(f"{{{RDF}}}value") for item in items)
    return [(item if value is None else value).text or "" for item, value in zip(items, values, strict=True)]


def _clean(text: str) -> str:
    """Return a text without the characters that XML cannot hold."""
    return "".join(filter(is_xml_text, text)).strip()


def _to_packet(description: ElementTree.Element) -> bytes:
    root = ElementTree.Element("{adobe:ns:meta/}xmpmeta")
    ElementTree.SubElement(root, f"{{{RDF}}}RDF").append(description)
    ElementTree.indent(root, " ")
    start, end = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n', '\n<?xpacket end="w"?>\n'
    return (start + ElementTree.tostring(root, encoding="unicode") + end).encode()


def _decode(value: bytes, encodings: Iterable[str]) -> str:
    for encoding in encodings:
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode(encoding)
    return value.decode("utf-8", "replace")
