"""`optsg tag --write`: whose tags stay, what is taken back, what is skipped, and what a killed run leaves.

A stand-in gives the tags wherever the model does not matter; the last tests use the shipped checkpoint.
"""

import csv
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from optsg import tag as command
from optsg.__main__ import main
from optsg.sidecars.ownership import key

ROOT = Path(__file__).parents[1]
RDF, DC = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "http://purl.org/dc/elements/1.1/"
SUFFIXES = {"xmp": ".jpg.xmp", "json": ".jpg.optsg.json", "txt": ".txt"}
SIDECARS = list(SUFFIXES)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def tag(tmp_path, monkeypatch, capsys):
    """Runs `optsg tag`; `run.given` has the tags by file name, `run.asked` the files the model was asked about."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    class StandIn:
        def __init__(self, name, settings):
            self.settings = settings

        def __call__(self, batch):
            run.asked += [Path(file.path).name for file in batch]
            tags = [run.given.get(Path(file.path).name, run.given["*"]) for file in batch]
            return [
                [{"tag": t, "score": 0.9 - 0.1 * i, "novel": t == "novel"} for i, t in enumerate(ts)] for ts in tags
            ]

    def run(*args):
        run.asked = []
        status = main(["tag", "--model", str(model), *map(str, args)])
        return status, *capsys.readouterr()

    run.given, run.asked, run.model = {"*": ["dog", "novel"]}, [], model
    monkeypatch.setattr(command, "Tagger", StandIn)
    return run


class Person:
    """Reads and edits a sidecar by other means than the program's."""

    def __init__(self, folder: Path, kind: str, stem: str = "a"):
        self.path, self.kind = folder / (stem + SUFFIXES[kind]), kind

    def read(self) -> list[str]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        if self.kind == "txt":
            return [piece.strip() for piece in text.split(",") if piece.strip()]
        if self.kind == "json":
            return [entry["tag"] for entry in json.loads(text)["tags"]]
        return [
            li.text for s in ElementTree.fromstring(text).iter(f"{{{DC}}}subject") for li in s.iter(f"{{{RDF}}}li")
        ]

    def write(self, tags: list[str]):
        if self.kind == "txt":
            self.path.write_text(", ".join(tags), encoding="utf-8")
        elif self.kind == "json":
            sidecar = json.loads(self.path.read_text(encoding="utf-8"))
            kept = {entry["tag"]: entry for entry in sidecar["tags"]}
            sidecar["tags"] = [kept.get(tag, {"tag": tag, "by": "me"}) for tag in tags]
            self.path.write_text(json.dumps(sidecar), encoding="utf-8")
        else:
            # A whole other serialisation: ElementTree makes up prefixes of its own.
            root = ElementTree.fromstring(self.path.read_text(encoding="utf-8"))
            subject = next(root.iter(f"{{{DC}}}subject"), None)
            if subject is None:
                description = ElementTree.SubElement(next(root.iter(f"{{{RDF}}}RDF")), f"{{{RDF}}}Description")
                description.set(f"{{{RDF}}}about", "")
                subject = ElementTree.SubElement(description, f"{{{DC}}}subject")
            subject.clear()
            bag = ElementTree.SubElement(subject, f"{{{RDF}}}Bag")
            for tag in tags:
                ElementTree.SubElement(bag, f"{{{RDF}}}li").text = tag
            self.path.write_bytes(ElementTree.tostring(root))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_second_run_adds_nothing_and_takes_back_only_its_own(tag, photos, kind):
    images = snapshot(photos)
    person = Person(photos, kind)
    assert tag("--write", kind, photos)[0] == 0
    assert person.read() == ["dog", "novel"]
    person.write(["mine", "dog", "novel"])
    once = snapshot(photos)
    assert tag("--write", kind, "--redo", photos)[0] == 0 and len(tag.asked) == 3
    assert person.read() == ["mine", "dog", "novel"]
    assert once.keys() == snapshot(photos).keys()
    tag.given = {"*": ["cat", "Mine"]}
    tag("--write", kind, "--redo", photos)
    assert person.read() == ["mine", "cat"]
    assert {name: data for name, data in snapshot(photos).items() if name in images} == images


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_tag_that_a_person_deleted_stays_away_until_they_write_it(tag, photos, kind):
    person = Person(photos, kind)
    tag("--write", kind, photos)
    person.write(["novel"])
    for given in (["dog", "novel"], [], ["DOG"]):
        tag.given = {"*": given}
        tag("--write", kind, "--redo", photos)
        assert "dog" not in [key(t) for t in person.read()]
    person.write(["dog"])
    tag("--write", kind, "--redo", photos)
    assert person.read() == ["dog"]


@pytest.mark.parametrize("kind", SIDECARS)
@pytest.mark.parametrize("seed", range(6))
def test_in_any_order_of_edits_and_runs_a_persons_tags_stay(tag, photos, kind, seed):
    draw = random.Random(f"{kind} {seed}")
    words = ["dog", "cat", "bird", "tree", "sea", "e-mail", "创意美食", "Rock & Roll"]
    person = Person(photos, kind)
    tag("--write", kind, photos)
    theirs, deleted, touched = set(), set(), set()
    for _ in range(30):
        if draw.random() < 0.5:
            tag.given = {"*": draw.sample(words, draw.randint(0, 5))}
            before = person.read()
            assert tag("--write", kind, "--redo", photos)[0] == 0
            after = person.read()
            assert [t for t in after if t in theirs] == [t for t in before if t in theirs], "kept, and in their order"
            assert sorted(after) == sorted(set(after))
            assert set(after) - theirs == set(tag.given["*"]) - theirs - deleted
            touched.clear()
            again = snapshot(photos)
            tag("--write", kind, "--redo", photos)
            assert snapshot(photos) == again
        else:
            # Each word once between two runs: that a tag was deleted and written again leaves no trace.
            tags = person.read()
            word = draw.choice(sorted({*words} - touched) or [None])
            if word is None:
                continue
            touched.add(word)
            if word in tags:
                tags.remove(word)
                if word not in theirs:
                    deleted.add(word)
                theirs.discard(word)
            else:
                tags.insert(draw.randint(0, len(tags)), word)
                theirs.add(word)
                deleted.discard(word)
            person.write(tags)


def test_a_caption_keeps_what_a_person_wrote_byte_for_byte(tag, photos):
    caption = photos / "a.txt"
    caption.write_bytes("\ufeffA photo of Rex ,  at night\r\nsecond line\r\n".encode())
    tag("--write", "txt", photos)
    assert caption.read_bytes() == "\ufeffA photo of Rex ,  at night, dog, novel\r\nsecond line\r\n".encode()
    tag.given = {"*": []}
    tag("--write", "txt", "--redo", photos)
    assert caption.read_bytes() == "\ufeffA photo of Rex ,  at night\r\nsecond line\r\n".encode()
    tag.given = {"*": ["one, two", "three"]}
    _, _, err = tag("--write", "txt", "--redo", photos)
    assert "three" in caption.read_text("utf-8") and "two" not in caption.read_text("utf-8") and "with a comma" in err


def test_json_holds_probabilities_and_the_novel_mark(tag, photos):
    tag("--write", "json", photos)
    sidecar = json.loads((photos / "a.jpg.optsg.json").read_text("utf-8"))
    assert sidecar["tags"] == [
        {"tag": "dog", "score": 0.9, "novel": False},
        {"tag": "novel", "score": 0.8, "novel": True},
    ]


BROKEN = {"xmp": b"<x", "json": b'{"photoTakenTime": {}}', "txt": b"caf\xe9"}


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_sidecar_that_cannot_be_read_fails_alone_and_stays(tag, photos, kind):
    (photos / f"a{SUFFIXES[kind]}").write_bytes(BROKEN[kind])
    status, _, err = tag("--write", kind, photos)
    assert status == 1 and f"a{SUFFIXES[kind]} is left as it is" in err and "1 could not be used, 2 tagged" in err
    assert (photos / f"a{SUFFIXES[kind]}").read_bytes() == BROKEN[kind]
    assert tag.asked == ["b.jpg", "c.jpg"], "no time is spent on its image"


def test_names_of_xmp_sidecars(tag, photos):
    tag("--write", "xmp", "--sidecar-names", "stem", photos / "a.jpg")
    assert (photos / "a.xmp").exists()
    status, _, err = tag("--write", "xmp", "--redo", photos)
    assert status == 0 and "under the other name are used (1)" in err
    assert not (photos / "a.jpg.xmp").exists() and (photos / "b.jpg.xmp").exists()


def test_one_sidecar_for_two_images_is_refused(tag, photos):
    shutil.copy(photos / "a.jpg", photos / "a.png")
    status, _, err = tag("--write", "xmp", "--sidecar-names", "stem", photos)
    assert status == 1 and "a.jpg: its sidecar a.xmp would be that of a.png too" in err and "a.png: its" in err
    assert not (photos / "a.xmp").exists() and (photos / "b.xmp").exists()
    assert tag("--write", "xmp", photos)[0] == 0
    assert (photos / "a.jpg.xmp").exists() and (photos / "a.png.xmp").exists()


def test_raw_files_are_left_alone_with_their_sidecars(tag, photos):
    (photos / "a.CR2").write_bytes(b"raw")
    (photos / "a.xmp").write_bytes(b"of the raw file")
    status, _, err = tag("--write", "xmp", photos)
    assert status == 0 and "1 raw files are left alone" in err and "another file's" in err
    assert (photos / "a.xmp").read_bytes() == b"of the raw file" and (photos / "a.jpg.xmp").exists()
    status, _, err = tag("--write", "xmp", photos / "a.CR2")
    assert status == 1 and "a raw file" in err


def test_a_tree_elsewhere_begins_with_the_sidecars_beside_the_images(tag, photos, tmp_path):
    (photos / "a.txt").write_text("mine\n", encoding="utf-8")
    before = snapshot(photos)
    assert tag("--write", "txt", "--write", "xmp", "--output", tmp_path / "out", photos)[0] == 0
    assert snapshot(photos) == before
    assert (tmp_path / "out/a.txt").read_text("utf-8") == "mine, dog, novel\n"
    assert (tmp_path / "out/sub/c.jpg.xmp").exists()
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photos / "b.jpg", other)
    status, _, err = tag("--write", "xmp", "--output", tmp_path / "out", photos, other)
    assert status == 1 and "is the sidecar of" in err


def test_what_is_done_is_skipped_until_something_changes(tag, photos):
    options = [part for kind in ("xmp", "json", "txt", "csv", "parquet") for part in ("--write", kind)]
    options += ["--output", photos]
    tag(*options, photos)
    done = snapshot(photos)
    status, out, err = tag(*options, photos)
    assert (status, out, tag.asked) == (0, "", []) and "3 files have their tags" in err
    assert snapshot(photos) == done
    (photos / "b.jpg").write_bytes(b"another image")
    assert tag(*options, photos)[0] == 0 and tag.asked == ["b.jpg"]
    tag(*options, "--exclude", "cat", photos)
    assert tag.asked == ["a.jpg", "b.jpg", "c.jpg"]
    (tag.model / "config.json").write_text("[]")
    tag(*options, "--exclude", "cat", photos)
    assert tag.asked == ["a.jpg", "b.jpg", "c.jpg"]
    (photos / "b.txt").unlink()
    tag(*options, "--exclude", "cat", photos)
    assert tag.asked == ["b.jpg"] and (photos / "b.txt").read_text() == "dog, novel\n"


def test_sidecars_are_no_noise_in_a_folder(tag, photos):
    tag("--write", "xmp", "--write", "json", "--write", "txt", photos)
    _, _, err = tag(photos)
    assert "9 sidecars are beside these files" in err and "skipped" not in err


def test_a_dry_run_says_what_would_change_and_changes_nothing(tag, photos):
    (photos / "a.txt").write_text("dog\n")
    before = snapshot(photos)
    status, out, err = tag("--write", "txt", "--write", "xmp", "--write", "csv", "--dry-run", photos)
    assert status == 0 and snapshot(photos) == before
    assert f"{photos}/a.jpg -> {photos}/a.txt: +novel\n" in out
    assert f"{photos}/a.jpg.xmp: +dog, +novel\n" in out and "9 would be written" in err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_has_a_row_for_every_file(tag, photos, kind, tmp_path):
    (photos / "gone.png").symlink_to("nowhere")
    options = ["--write", kind, "--output", tmp_path]
    assert tag(*options, photos)[0] == 1
    table = tmp_path / f"tags.{kind}"
    if kind == "csv":
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0]["tags"].split("|") == ["dog", "novel"] and rows[0]["novel"] == "0|1"
    else:
        rows = pyarrow.parquet.read_table(table).to_pylist()
        assert rows[0]["tags"] == ["dog", "novel"] and rows[0]["novel"] == [False, True]
    assert [Path(row["file"]).name for row in rows] == ["a.jpg", "b.jpg", "c.jpg", "gone.png"]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True]
    table.write_bytes(b"a person's own")
    with pytest.raises(SystemExit):
        tag(*options, photos)
    assert table.read_bytes() == b"a person's own"


def rows_of(table: Path) -> dict[str, str]:
    with table.open(encoding="utf-8", newline="") as file:
        return {Path(row["file"]).name: row["error"] or row["tags"] for row in csv.DictReader(file)}


def test_what_one_kind_of_file_cannot_be_written_for_stays_in_the_others(tag, photos, tmp_path):
    """A caption would be that of two images; the table has both, and has them after a second run."""
    (photos / "a.png").write_bytes(b"a.png")
    options = ["--write", "csv", "--write", "txt", "--output", tmp_path / "out", photos]
    for _ in range(2):
        status, _, error = tag(*options)
        assert status == 1 and "would be that of a.png too" in error
        assert rows_of(tmp_path / "out/tags.csv") == {
            name: "dog|novel" for name in ("a.jpg", "a.png", "b.jpg", "c.jpg")
        }


def test_each_file_is_one_line_of_json_whatever_becomes_of_what_is_written(tag, photos, tmp_path):
    (photos / "a.png").write_bytes(b"a.png")
    options = ["--json", "--write", "csv", "--write", "txt", "--output", tmp_path / "out", photos]
    lines = [json.loads(line) for line in tag(*options)[1].splitlines()]
    assert sorted(Path(line["file"]).name for line in lines) == ["a.jpg", "a.png", "b.jpg", "c.jpg"]
    assert all(line["tags"] for line in lines)
    lines = {Path(line["file"]).name: line for line in map(json.loads, tag(*options)[1].splitlines())}
    assert lines["b.jpg"]["done"] and lines["c.jpg"]["done"] and "not every file" in lines["a.jpg"]["error"]


def test_rows_that_another_run_made_are_missed_aloud(tag, photos, tmp_path):
    options = ["--write", "csv", "--output", tmp_path]
    tag(*options, photos / "a.jpg", photos / "b.jpg")
    _, _, error = tag(*options, photos / "sub")
    assert "2 rows of an earlier run, of other files, are not in it any more" in error
    assert list(rows_of(tmp_path / "tags.csv")) == ["c.jpg"]


@pytest.mark.parametrize("kind", [*SIDECARS, "csv"])
def test_what_cannot_be_written_is_said_before_anything_is_tagged(tag, photos, tmp_path, kind, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    (tmp_path / "locked").mkdir()
    if kind != "csv":
        assert tag("--write", kind, "--output", tmp_path / "locked", photos / "a.jpg")[0] == 1
        # What is done needs no right.
        with monkeypatch.context() as unlocked:
            unlocked.setattr(os, "access", lambda path, mode: True)
            tag("--write", kind, "--output", tmp_path / "locked", photos / "a.jpg")
        assert tag("--write", kind, "--output", tmp_path / "locked", photos / "a.jpg")[0] == 0
    for place, said in (("file/tags", "is no folder|Not a directory"), ("locked/tags", "no right to change")):
        for more in ((), ("--dry-run",)):
            try:
                status, _, error = tag("--write", kind, "--output", tmp_path / place, *more, photos / "a.jpg")
            except SystemExit as stop:
                status, error = stop.code, capsys.readouterr().err
            assert status in (1, 2) and re.search(said, error) and not tag.asked


def test_modes_and_links_stay_and_protected_files_are_left(tag, photos, tmp_path):
    real = tmp_path / "real.xmp"
    shutil.move(photos / "a.jpg", photos / "z.jpg")
    tag("--write", "xmp", photos)
    shutil.move(photos / "z.jpg.xmp", real)
    (photos / "z.jpg.xmp").symlink_to(real)
    real.chmod(0o640)
    (photos / "b.jpg.xmp").chmod(0o444)
    protected = (photos / "b.jpg.xmp").read_bytes()
    tag.given = {"*": ["cat"]}
    status, _, err = tag("--write", "xmp", "--redo", photos)
    assert status == 1 and "b.jpg.xmp is write-protected" in err
    assert (photos / "z.jpg.xmp").is_symlink() and b">cat<" in real.read_bytes()
    assert real.stat().st_mode & 0o777 == 0o640
    assert (photos / "b.jpg.xmp").read_bytes() == protected


@pytest.mark.parametrize("kind", [*SIDECARS, "csv"])
def test_a_full_disk_is_said_and_leaves_the_old_file(tag, photos, monkeypatch, kind):
    tag("--write", kind, "--output", photos, photos)
    before = snapshot(photos)
    tag.given = {"*": ["cat"]}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = tag("--write", kind, "--redo", "--output", photos, photos)
    assert status == 1 and "cannot be written: No space left on device" in err and "Traceback" not in err
    assert snapshot(photos) == before
    monkeypatch.undo()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_said(tag, photos):
    photos.chmod(0o555)
    status, _, err = tag("--write", "xmp", photos / "a.jpg")
    photos.chmod(0o755)
    assert status == 1 and "cannot be written: Permission denied" in err


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_caption_cut_off_from_its_record_is_understood(tag, photos, monkeypatch, when):
    from optsg.sidecars import caption

    tag("--write", "txt", photos)
    write = caption.write_whole

    def cut_off(path, data):
        if when == "after":
            write(path, data)
        raise KeyboardInterrupt

    tag.given = {"*": ["cat", "dog"]}
    monkeypatch.setattr(caption, "write_whole", cut_off)
    assert tag("--write", "txt", "--redo", photos / "a.jpg")[0] == 130
    monkeypatch.setattr(caption, "write_whole", write)
    tag("--write", "txt", "--redo", photos)
    assert sorted(Person(photos, "txt").read()) == ["cat", "dog"]
    tag.given = {"*": []}
    tag("--write", "txt", "--redo", photos)
    assert Person(photos, "txt").read() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--write", "exif", "a.jpg"], "invalid choice"),
        (["--dry-run", "a.jpg"], "--dry-run is about the files of --write"),
        (["--vocabulary", "/no/such/file", "a.jpg"], "cannot be read"),
        (["--vocabulary", os.devnull, "a.jpg"], "holds no tags"),
    ],
)
def test_usage_errors(tag, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        tag(*arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("page", ["docs/photo-libraries.md", "README.md"])
def test_the_commands_of_the_documentation_run(tag, photos, tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    photos.rename("images")
    shutil.copy("images/a.jpg", "photo.jpg")
    shutil.copy("images/a.jpg", "video.mp4")
    Path("unwanted.txt").write_text("logo\n")
    Path("keywords.txt").write_text("dog\n")
    text = (ROOT / page).read_text("utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [shlex.split(line.partition(" > ")[0])[2:] for line in commands if line.startswith("optsg tag")]
    assert len(commands) >= 5
    for arguments in commands:
        status, _, err = tag(*arguments)
        assert status == 0, err


KILLED = """
import sys, types
package = sys.modules["modeling_optsg"] = types.ModuleType("modeling_optsg")
package.__path__ = [sys.argv.pop(1)]
from modeling_optsg.cli import main, tag

class StandIn:
    def __init__(self, name, settings): pass
    def __call__(self, batch):
        print("next", flush=True)
        return [[{"tag": t, "score": 0.5, "novel": False} for t in file.path[-7:-4]] for file in batch]

tag.Tagger = StandIn
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_anywhere_goes_on_and_ends_the_same(tmp_path, how):
    draw = random.Random(int(how))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    original = tmp_path / "original"
    original.mkdir()
    for number in range(40):
        (original / f"{number:03}.jpg").write_bytes(b"image")
        if number % 3 == 0:
            (original / f"{number:03}.txt").write_text("0, mine\n")

    def start(folder):
        kinds = [part for kind in ("xmp", "json", "txt", "csv", "parquet") for part in ("--write", kind)]
        options = ["--batch-size", "1", "--model", "../model", *kinds, "."]
        command = [sys.executable, "-c", KILLED, str(ROOT / "modeling_optsg"), "tag", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Where the tests run as a shell's background job, Ctrl-C is ignored, and so it would be below them.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, cwd=folder, preexec_fn=heed, **pipes)

    shutil.copytree(original, tmp_path / "whole")
    assert start(tmp_path / "whole").wait(60) == 0
    kills = 0
    for _ in range(7):
        # On a busy machine a run may be over before the signal is sent.
        if not kills:
            shutil.rmtree(tmp_path / "killed", ignore_errors=True)
            shutil.copytree(original, tmp_path / "killed")
        elif how != signal.SIGKILL:
            break
        process = start(tmp_path / "killed")
        for _ in range(draw.randint(1, 6)):
            process.stdout.readline()
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        if process.returncode:
            assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how], err
            assert how == signal.SIGKILL or "the same command goes on from here" in err
            kills += 1
    assert kills, "a run that is not killed tests nothing"
    if how == signal.SIGKILL:
        both = [start(tmp_path / "killed") for _ in range(2)]
        assert 0 in [process.wait(60) for process in both], "of two at once, one may be sent away"
    assert start(tmp_path / "killed").wait(60) == 0

    whole, killed = snapshot(tmp_path / "whole"), snapshot(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name, data in whole.items():
        if not re.match(r"\.optsg-.*jsonl", name):
            assert killed[name] == data, name


def exiftool_subjects(folder) -> dict[str, list[str]]:
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is not installed (Debian: libimage-exiftool-perl)")
    read = subprocess.run(["exiftool", "-j", "-struct", "-XMP-dc:Subject", folder, "-ext", "xmp"], capture_output=True)
    return {Path(row["SourceFile"]).name: row.get("Subject", []) for row in json.loads(read.stdout)}


def test_the_shipped_checkpoints_tags_are_what_exiftool_reads(tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(ROOT / "examples/images", folder)
    options = ["--model", str(ROOT / "checkpoints/optsg-icon-small"), str(folder)]
    assert main(["tag", "--json", "--write", "xmp", *options]) == 0
    printed = {Path(r["file"]).name: r["tags"] for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert len(printed) == 7 and all(printed.values()), "six images and a video"
    wanted = {f"{name}.xmp": [tag["tag"] for tag in tags] for name, tags in printed.items()}
    assert exiftool_subjects(folder) == wanted

    vocabulary = tmp_path / "vocabulary.txt"
    vocabulary.write_text("bird\nanimal\nbus\ncamping\ntent\n")
    limits = ["--vocabulary", str(vocabulary), "--exclude", "Tent", "--max-tags", "1", "--min-score", "0.3"]
    assert main(["tag", "--write", "xmp", *limits, *options]) == 0
    found = {name: tags for name, tags in exiftool_subjects(folder).items() if tags}
    assert found["bird.png.xmp"] == ["bird"] and found["tent-tree.png.xmp"] == ["camping"]
    assert set().union(*found.values()) <= {"bird", "animal", "bus", "camping"}


def test_images_that_cannot_be_read_get_no_sidecar(tiny_checkpoint, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    assert main(["tag", "--model", str(tiny_checkpoint), "--write", "xmp", str(tmp_path)]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert (tmp_path / "good.png.xmp").exists() and not (tmp_path / "bad.png.xmp").exists()
