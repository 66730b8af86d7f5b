"""One unusual file is reported by name, the others are tagged, and nothing waits."""

import json
import os
from unittest.mock import Mock

import pytest
from PIL import Image
from sidecar_tools import SIDECARS, SUFFIXES, TagCommand, make_photos

from optsg.sidecars import SidecarError, table_file
from optsg.sidecars.files import lock_folder
from optsg.sidecars.xmp_packet import XmpPacket

PACKET = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:subject><rdf:Bag><rdf:li>Grüße</rdf:li>
</rdf:Bag></dc:subject></rdf:Description></rdf:RDF></x:xmpmeta>"""
DC = "http://purl.org/dc/elements/1.1/"
DEEP = b"[" * 100_000


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has a temporary folder for each user.")
@pytest.mark.parametrize("kind", ["folder", "link", "shared folder", "file"])
def test_locks_are_only_in_a_folder_of_the_user(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    locks = tmp_path / f"optsg-locks-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if kind == "link":
        locks.symlink_to("elsewhere")
    elif kind == "shared folder":
        locks.mkdir()
        locks.chmod(0o777)
    elif kind == "file":
        locks.touch()
    if kind == "folder":
        for _ in range(2):
            with lock_folder(str(tmp_path)):
                assert len(list(locks.iterdir())) == 1
        return
    with pytest.raises(SidecarError, match=str(locks)), lock_folder(str(tmp_path)):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture
def tag(tmp_path, monkeypatch, capsys):
    return TagCommand(tmp_path, monkeypatch, capsys)


def check_only_a_failed(tag, photos, kind: str, name: str) -> None:
    status, _, err = tag("--write", kind, photos)
    assert status == 1 and name in err and "2 tagged, 1 failed" in err and tag.tagged == ["b.jpg", "c.jpg"]
    assert (photos / f"b{SUFFIXES[kind]}").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("special", ["pipe", "device", "folder"])
@pytest.mark.parametrize("kind", SIDECARS)
def test_a_pipe_device_or_folder_in_place_of_a_sidecar_is_named(tag, photos, kind, special):
    path = photos / f"a{SUFFIXES[kind]}"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[special](path)
    if (kind, special) == ("txt", "device"):
        # A caption that is a link is replaced.
        assert tag("--write", kind, photos)[0] == 0 and path.read_text() == "dog, novel\n"
    else:
        check_only_a_failed(tag, photos, kind, path.name)


@pytest.mark.parametrize("kind", ["xmp", "json"])
def test_a_sidecar_that_is_a_link_out_of_the_folder_is_named(tag, photos, tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text(PACKET if kind == "xmp" else "{}")
    before = victim.read_bytes()
    (photos / f"a{SUFFIXES[kind]}").symlink_to(victim)
    check_only_a_failed(tag, photos, kind, "is a link out of the folder")
    assert victim.read_bytes() == before
    # Nor is it copied to another folder.
    status, _, err = tag("--write", kind, "--output", tmp_path / "out", photos)
    assert status == 1 and "is a link out of the folder" in err and not (tmp_path / f"out/a{SUFFIXES[kind]}").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_pipe_in_place_of_titles_is_named(tag, photos, name):
    os.mkfifo(photos / name)
    status, _, err = tag("--write", "xmp", photos)
    assert status == 1 and f"{name}: not a regular file" in err and len(tag.tagged) == 3


EARLIER = [
    b'{"name": "a.txt", "generated": [], "declined": [], "before": "x", "after": "x", "earlier": %s}\n' % earlier
    for earlier in (b"[]", b"null", b"0", b'{"generated": 1}')
]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    "content", [None, b"garbage\n", b'{"name": "a.txt", "written": ["x"]}\n', DEEP + b"\n", *EARLIER]
)
def test_another_record_of_captions_stops_only_captions(tag, photos, content):
    record = photos / ".optsg-captions.jsonl"
    os.mkfifo(record) if content is None else record.write_bytes(content)
    (photos / "a.txt").write_text("mine\n")
    status, _, err = tag("--write", "txt", "--write", "xmp", photos)
    assert status == 1 and record.name in err and (photos / "a.txt").read_text() == "mine\n"
    assert (photos / "a.jpg.xmp").exists() and (photos / "sub/c.txt").read_text("utf-8") == "dog, novel\n"


ENTRIES = [
    {"name": "a.jpg"},
    {"name": 7, "fingerprint": "x", "tags": []},
    {"name": "a.jpg", "fingerprint": "x", "tags": [{"tag": "dog"}]},
    {"name": "\0table", "digests": "x"},
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_record_of_a_table_ends_the_run_before_it_starts(tag, photos, tmp_path, capsys, entry):
    record = tmp_path / ".optsg-tags.csv.jsonl"
    record.write_text(json.dumps(entry) + "\n")
    with pytest.raises(SystemExit) as end:
        tag("--write", "csv", "--write", "xmp", "--output", tmp_path, photos)
    assert end.value.code == 2 and f"{record}: line 1 is not a valid entry" in capsys.readouterr().err
    assert tag.tagged == []


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        b'{"optsg": 1, "tags": [], "generated": [{"tag": "x"}], "declined": []}',
        b'{"optsg": 1, "tags": [], "generated": [], "declined": [null]}',
        b'{"optsg": 1, "x": ' + b"9" * 5000 + b"}",
        "\ufeff[]".encode("utf-32"),
    ],
)
def test_another_json_file_in_place_of_a_sidecar_is_named(tag, photos, content):
    (photos / "a.jpg.optsg.json").write_bytes(content)
    check_only_a_failed(tag, photos, "json", "a.jpg.optsg.json was not changed")


@pytest.mark.parametrize("encoding", ["utf-32", "utf-32-be", "utf-32-le", "utf-16-be", "utf-8-sig", "windows-1252"])
def test_xmp_in_any_encoding_of_xml_is_read(tag, photos, encoding):
    declaration = f'<?xml version="1.0" encoding="{encoding}"?>' if encoding.startswith("windows") else ""
    (photos / "a.jpg.xmp").write_bytes((declaration + PACKET).encode(encoding))
    assert tag("--write", "xmp", photos)[0] == 0
    data = (photos / "a.jpg.xmp").read_bytes()
    assert XmpPacket(data).read_list(DC, "subject") == ["Grüße", "dog", "novel"]
    assert data.decode(encoding).startswith(declaration + "<x:xmpmeta")


@pytest.mark.parametrize("encoding", ["idna", "punycode", "unicode_escape", "rot13", "zlib", "no-such-encoding"])
def test_xmp_that_declares_another_codec_is_named(tag, photos, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + PACKET.replace("Grüße", "a" * 100_000)
    (photos / "a.jpg.xmp").write_text(text)
    check_only_a_failed(tag, photos, "xmp", "a.jpg.xmp was not changed")


def test_files_of_a_folder_that_cannot_be_listed_are_named(tag, photos, monkeypatch):
    listdir = os.listdir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    status, _, err = tag("--write", "txt", photos)
    assert status == 1 and "sub cannot be listed: Permission denied" in err and tag.tagged == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("name, content", [("metadata.jsonl", DEEP), ("metadata.jsonl", b'{"file_name": ' + DEEP)])
def test_deep_json_in_place_of_titles_is_named(tag, photos, name, content):
    (photos / name).write_bytes(content)
    status, _, err = tag("--write", "xmp", photos)
    assert status == 1 and name in err and len(tag.tagged) == 3


def test_odd_dates_in_parquet_do_not_matter(tag, photos):
    import pyarrow
    import pyarrow.parquet

    dates = pyarrow.array([2**62], pyarrow.timestamp("us"))
    table = pyarrow.table({"file_name": ["a.jpg"], "title": ["A title"], "taken": dates})
    pyarrow.parquet.write_table(table, photos / "metadata.parquet")
    status, out, _ = tag("--json", photos)
    assert status == 0 and json.loads(out.splitlines()[0])["title"] == "A title"


@pytest.mark.parametrize("kind", ["xmp", "json", "csv"])
def test_an_unexpected_error_concerns_one_file(tag, photos, kind):
    """The tags of one file cannot be written."""
    tag.predicted["a.jpg"] = [7]
    status, _, err = tag("--write", kind, "--output", photos, photos)
    assert status == 1 and "a.jpg: " in err and "1 failed" in err and len(tag.tagged) == 3


def test_a_table_with_a_very_long_title_is_extended(tag, photos, tmp_path):
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "title": "x" * 200_000}) + "\n")
    assert tag("--write", "csv", "--output", tmp_path, photos / "a.jpg", photos)[0] == 0
    status, _, err = tag("--write", "csv", "--output", tmp_path, photos / "b.jpg")
    assert status == 0 and "Traceback" not in err and len((tmp_path / "tags.csv").read_text("utf-8-sig")) > 200_000


def test_a_table_that_cannot_be_read_ends_the_run_before_it_starts(tag, photos, tmp_path, monkeypatch, capsys):
    assert tag("--write", "csv", "--output", tmp_path, photos)[0] == 0
    monkeypatch.setattr(table_file.csv, "DictReader", Mock(side_effect=table_file.csv.Error("a reason")))
    with pytest.raises(SystemExit) as end:
        tag("--write", "csv", "--output", tmp_path, photos)
    assert end.value.code == 2 and "tags.csv cannot be read: a reason" in capsys.readouterr().err and tag.tagged == []


def test_warnings_of_pillow_do_not_reach_the_terminal(tag, photos, recwarn):
    # An entry of EXIF data that lies behind its end.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\xff\0\0\0\xf0\xff\0\0"
    Image.new("RGB", (8, 8)).save(photos / "a.jpg", exif=exif)
    with pytest.warns(UserWarning), Image.open(photos / "a.jpg") as image:
        image.getexif().get(0x10E)
    recwarn.clear()
    assert tag("--write", "xmp", photos)[0] == 0 and not recwarn.list
