"""Foreign, damaged and hostile sidecars. Each function writes those of one image."""

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .byte_damage import BYTE_DAMAGES

# A keyword that a person wrote. It is ASCII, so that it is found in every encoding.
KEYWORD = "grandmas garden"
JOURNAL = ".optsg-captions.jsonl"
RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
DC = 'xmlns:dc="http://purl.org/dc/elements/1.1/"'
SUBJECT = f"<dc:subject><rdf:Bag><rdf:li>{KEYWORD}</rdf:li><rdf:li>Ort/München</rdf:li></rdf:Bag></dc:subject>"


@dataclass(frozen=True)
class Sidecar:
    """A file that one of these functions wrote.

    Args:
        name: Name of the sidecar, or of the image if that has the keyword.
        has_keyword: Whether the new sidecar must have a person's keyword, which is in the image.
        is_valid: Whether the sidecar must be accepted.
        kept: Name of a file outside the folder that must not change.
    """

    name: str
    has_keyword: bool = False
    is_valid: bool = False
    kept: str | None = None


def xmp(properties: str = SUBJECT, namespaces: str = DC, before: str = "", after: str = "") -> str:
    """Build an XMP document."""
    return (
        f'{before}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {RDF}><rdf:Description rdf:about="" {namespaces}>'
        f"{properties}</rdf:Description></rdf:RDF></x:xmpmeta>{after}"
    )


XMP_STYLES = (
    xmp(before='<?xml version="1.0" encoding="UTF-8"?>\n'),
    xmp(before='<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n', after=" " * 2000 + '<?xpacket end="w"?>'),
    xmp(f"<dc:subject><rdf:Seq><rdf:li>{KEYWORD}</rdf:li></rdf:Seq></dc:subject>"),
    xmp(f"<dc:subject>\r\n<rdf:Bag>\r\n<rdf:li xml:lang='de'>{KEYWORD}</rdf:li>\r\n</rdf:Bag></dc:subject>"),
    xmp(f"<dc:subject><rdf:Bag><rdf:li><![CDATA[{KEYWORD}]]></rdf:li></rdf:Bag></dc:subject><!-- a > b -->"),
    xmp("", f'{DC} dc:subject="{KEYWORD}, beta"'),
    xmp("", f"{DC} xmlns:xmp='http://ns.adobe.com/xap/1.0/' xmp:Rating='4'").replace(
        "</rdf:RDF>", f'<rdf:Description {DC} rdf:about="">{SUBJECT}</rdf:Description></rdf:RDF>'
    ),
    xmp(
        f"<digiKam:TagsList><rdf:Seq><rdf:li>Ort/{KEYWORD}</rdf:li></rdf:Seq></digiKam:TagsList>",
        f'{DC} xmlns:digiKam="http://www.digikam.org/ns/1.0/"',
    ),
    xmp(
        f"{SUBJECT}<lr:hierarchicalSubject><rdf:Bag><rdf:li>Ort|{KEYWORD}</rdf:li></rdf:Bag></lr:hierarchicalSubject>",
        f'{DC} xmlns:lr="http://ns.adobe.com/lightroom/1.0/"',
    ),
    f'<xmpmeta xmlns="adobe:ns:meta/"><RDF {RDF.replace(":rdf", "")}><Description about="" {DC}><dc:subject><Bag>'
    f"<li>{KEYWORD}</li></Bag></dc:subject></Description></RDF></xmpmeta>",
    f'<rdf:RDF {RDF}><rdf:Description rdf:about="" {DC}>{SUBJECT}</rdf:Description></rdf:RDF>',
)  # fmt: skip


def _write(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return name


def xmp_style(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Write XMP as other programs do."""
    return Sidecar(_write(folder, f"{image}.xmp", rng.choice(XMP_STYLES)), is_valid=True)


def xmp_encoding(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Write XMP in another encoding, or with a declaration that is wrong or unknown."""
    encodings = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "cp1252", "utf-7")
    declared = ("", "UTF-8", "UTF-16", "utf-32", "idna", "cp1252", "x-unknown", "rot13", "unicode_escape", "base64")
    name = rng.choice(declared)
    text = xmp(before=f'<?xml version="1.0" encoding="{name}"?>' if name else "")
    return Sidecar(_write(folder, f"{image}.xmp", text.encode(rng.choice(encodings))))


def xmp_structure(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Write XML of another structure, with entities, or deeply nested."""
    depth = rng.choice((1000, 100_000))
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "x" * 99}">' for i in range(10))
    texts = (
        xmp(before=f"<!DOCTYPE x [{entities}]>").replace(KEYWORD, "&a9;"),
        xmp(before='<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>').replace(KEYWORD, "&e;"),
        xmp("<dc:subject>" + "<rdf:Bag>" * depth + "</rdf:Bag>" * depth + "</dc:subject>"), "<a>" * depth,
        xmp("<dc:subject><rdf:Bag><rdf:li><rdf:Bag/></rdf:li></rdf:Bag></dc:subject>"), xmp(SUBJECT * 2),
        xmp("<dc:subject>text</dc:subject>"), xmp("<dc:subject rdf:resource='x'/>"), xmp(namespaces=""), "<a/>", "",
        " ", "<html><body>404</body></html>", '{"optsg": 1}', xmp() + xmp(), xmp(after="\0"), xmp()[:-20], "<?xml",
        xmp(f"<dc:subject><rdf:Bag>{'<rdf:li>x</rdf:li>' * 100_000}</rdf:Bag></dc:subject>"),
        xmp(f"<dc:subject><rdf:Bag><rdf:li>{'x' * 10**7}</rdf:li></rdf:Bag></dc:subject>"),
        xmp("<dc:subject><rdf:Bag><rdf:li>&#0;</rdf:li></rdf:Bag></dc:subject>"), xmp("<dc:subject/>"),
        xmp('<o:Tags><rdf:Bag><rdf:li rdf:resource="x"/></rdf:Bag></o:Tags>', 'xmlns:o="urn:x-optsg:1.0/"'),
        xmp("<o:Run>text</o:Run>", 'xmlns:o="urn:x-optsg:1.0/"'),
    )  # fmt: skip
    return Sidecar(_write(folder, f"{image}.xmp", rng.choice(texts)))


def json_structure(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Write a JSON sidecar of another shape."""
    odd = rng.choice((
        5, "text", None, True, {"a": 1}, [1], [None], [[]], [{"tag": 1}], [{"tag": None}], ["\ud800"], [{"a": [{}]}],
        {}, [{"tag": "x", "score": "high"}], float("nan"), 10**400, ["x"] * 50_000, [{"tag": ""}], ["\0", "\n"],
        [True],
    ))  # fmt: skip
    base = {"optsg": 1, "tags": [{"tag": "x"}], "generated": [], "declined": [], "fingerprint": "f"}
    content = base | {rng.choice(list(base)): odd}
    text = json.dumps(content if rng.random() < 0.8 else odd, allow_nan=True)
    return Sidecar(_write(folder, f"{image}.optsg.json", text))


def json_text(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Write a JSON sidecar that a parser refuses or that fills its stack."""
    depth, valid = rng.choice((900, 5000, 200_000)), json.dumps({"optsg": 1, "tags": []}, allow_nan=False)
    texts = (
        "[" * depth, '{"optsg": 1, "tags": ' + "[" * depth + "]" * depth + "}", '{"a":' * depth, "", "\0" * 99,
        valid * 2, valid[:-1], valid.encode("utf-16"), valid.encode("utf-32"), b"\xff\xfe" + valid.encode(),
        "9" * 5000, "null", f'{{"optsg": 1, "tags": [], "x": {"9" * 5000}}}', '{"optsg": 1e999}',
        '{"optsg": true, "tags": []}',
    )  # fmt: skip
    return Sidecar(_write(folder, f"{image}.optsg.json", rng.choice(texts)))


def json_of_a_person(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Write a valid JSON sidecar with a person's tag."""
    tag = rng.choice((KEYWORD, {"tag": KEYWORD}, {"tag": KEYWORD, "note": {"by": "me"}}))
    text = json.dumps({"optsg": 1, "tags": [tag], "more": [1]}, allow_nan=False)
    name = _write(folder, f"{image}.optsg.json", rng.choice(("", "\ufeff")) + text)
    return Sidecar(name, is_valid=True)


def caption(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Write a valid caption as other programs do."""
    text = rng.choice((
        KEYWORD, f"{KEYWORD}\n", f"{KEYWORD}, red,\r\nsecond line\r\n", f",, {KEYWORD} ,,", f"\ufeff{KEYWORD}, é",
        f"{KEYWORD}\n" * 1000, f"{'x' * 10**6}, {KEYWORD}",
    ))  # fmt: skip
    return Sidecar(_write(folder, f"{Path(image).stem}.txt", text), is_valid=True)


def caption_encoding(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Write a caption in another encoding, or bytes that are no text."""
    encodings = ("utf-16", "utf-16-le", "utf-32", "cp1252", "gb18030", "shift_jis")
    content = f"{KEYWORD}, 标签, é".encode(rng.choice(encodings), "ignore")
    content = rng.choice((content, content, rng.randbytes(500), bytes(99)))
    return Sidecar(_write(folder, f"{Path(image).stem}.txt", content))


def caption_link(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Make a caption, an XMP or a JSON sidecar a link to a file outside."""
    victim = folder.parent / f"{folder.name}-outside.txt"
    victim.write_text(rng.choice((f"{KEYWORD}\n", xmp(), '{"optsg": 1, "tags": []}')), encoding="utf-8")
    name = rng.choice((f"{Path(image).stem}.txt", f"{image}.xmp", f"{image}.optsg.json"))
    (folder / name).symlink_to(victim)
    return Sidecar(name, kept=victim.name)


def journal(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Damage the journal of captions."""
    name = f"{Path(image).stem}.txt"
    _write(folder, name, f"{KEYWORD}, red\n")
    entries: tuple = (
        {"name": name, "generated": [{"a": 1}], "declined": []}, {"name": name, "generated": "red"}, {"name": [1]}, {},
        {"name": name, "generated": ["red"], "declined": 5}, {"name": name, "after": 1}, {"name": name, "after": "x"},
        {"name": None}, {"name": name, "x": 10**4000}, [], "text", 5, None, {"name": name, "generated": [None, 1, []]},
        {"name": name, "before": "x", "after": "y", "earlier": 5, "generated": []}, {"name": "../../outside.txt"},
        {"name": name, "generated": ["red"], "declined": ["\ud800"], "fingerprint": float("nan")},
    )  # fmt: skip
    text = json.dumps(rng.choice(entries), allow_nan=True) + "\n"
    kind = rng.randrange(6)
    if kind == 0:
        text = "garbage\n" + text
    elif kind == 1:
        text = text + '{"na'
    elif kind == 2:
        text = "[" * 100_000 + "\n"
    content = rng.choice(list(BYTE_DAMAGES.values()))(text.encode(), rng) if kind == 3 else text
    _write(folder, JOURNAL, content)
    return Sidecar(JOURNAL)


def damaged_bytes(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Damage the bytes of a valid sidecar."""
    suffix = rng.choice((".xmp", ".xmp", ".optsg.json"))
    text = rng.choice(XMP_STYLES) if suffix == ".xmp" else json.dumps({"optsg": 1, "tags": ["x"]}, allow_nan=False)
    damage = rng.choice(list(BYTE_DAMAGES.values()))
    return Sidecar(_write(folder, image + suffix, damage(text.encode(), rng)))


def not_a_file(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Give a folder, a pipe, a device or a broken link the name of a sidecar."""
    name = rng.choice((f"{image}.xmp", f"{image}.optsg.json", f"{Path(image).stem}.txt", JOURNAL))
    kind = rng.choice(("folder", "pipe", "device", "broken link", "loop"))
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to({"device": "/dev/zero", "broken link": "nowhere", "loop": name}[kind])
    return Sidecar(name)


def embedded_keywords(folder: Path, image: str, rng: random.Random) -> Sidecar:
    """Put a person's keyword into the image itself, as XMP."""
    block = b"http://ns.adobe.com/xap/1.0/\0" + rng.choice(XMP_STYLES[:9]).encode()
    jpeg = (folder / image).read_bytes()
    _write(folder, image, jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:])
    return Sidecar(image, has_keyword=True, is_valid=True)


DAMAGES: dict[str, Callable[[Path, str, random.Random], Sidecar]] = {
    "XMP of other programs": xmp_style,
    "encoding of XMP": xmp_encoding,
    "other XML": xmp_structure,
    "JSON of another shape": json_structure,
    "broken JSON": json_text,
    "JSON of a person": json_of_a_person,
    "caption": caption,
    "encoding of a caption": caption_encoding,
    "link to a file outside": caption_link,
    "journal": journal,
    "damaged bytes": damaged_bytes,
    "not a file": not_a_file,
    "keywords in the image": embedded_keywords,
}
WEIGHTS = {"encoding of XMP": 2, "other XML": 2, "JSON of another shape": 2, "journal": 2, "damaged bytes": 2}
