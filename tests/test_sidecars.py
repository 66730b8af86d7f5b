"""`optsg tag --write`: which tags stay, which are removed, and which files are skipped.

A stand-in predicts the tags where the model does not matter. The last tests use a real one.
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from sidecar_tools import SIDECARS, SUFFIXES, TagCommand, User, make_photos, snapshot

from optsg import main
from optsg.sidecars.reconciliation import tag_key

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture
def tag(tmp_path, monkeypatch, capsys):
    return TagCommand(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_second_run_removes_only_the_tags_of_the_first(tag, photos, kind):
    images = snapshot(photos)
    user = User(photos, kind)
    assert tag("--write", kind, photos)[0] == 0
    assert user.read() == ["dog", "novel"]
    user.write(["mine", "dog", "novel"])
    once = snapshot(photos)
    assert tag("--write", kind, "--redo", photos)[0] == 0 and len(tag.tagged) == 3
    assert user.read() == ["mine", "dog", "novel"]
    assert once.keys() == snapshot(photos).keys()
    tag.predicted = {"*": ["cat", "Mine"]}
    tag("--write", kind, "--redo", photos)
    assert user.read() == ["mine", "cat"]
    assert {name: data for name, data in snapshot(photos).items() if name in images} == images


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_tag_that_the_user_deleted_is_not_added_again(tag, photos, kind):
    user = User(photos, kind)
    tag("--write", kind, photos)
    user.write(["novel"])
    for predicted in (["dog", "novel"], [], ["DOG"]):
        tag.predicted = {"*": predicted}
        tag("--write", kind, "--redo", photos)
        assert "dog" not in [tag_key(t) for t in user.read()]
    user.write(["dog"])
    tag("--write", kind, "--redo", photos)
    assert user.read() == ["dog"]


@pytest.mark.parametrize("kind", SIDECARS)
@pytest.mark.parametrize("seed", range(6))
def test_the_users_tags_stay_in_any_order_of_edits_and_runs(tag, photos, kind, seed):
    draw = random.Random(f"{kind} {seed}")
    words = ["dog", "cat", "bird", "tree", "sea", "e-mail", "创意美食", "Rock & Roll"]
    user = User(photos, kind)
    tag("--write", kind, photos)
    user_tags, deleted, touched = set(), set(), set()
    for _ in range(30):
        if draw.random() < 0.5:
            tag.predicted = {"*": draw.sample(words, draw.randint(0, 5))}
            before = user.read()
            assert tag("--write", kind, "--redo", photos)[0] == 0
            after = user.read()
            assert [t for t in after if t in user_tags] == [t for t in before if t in user_tags], "kept in order"
            assert sorted(after) == sorted(set(after))
            assert set(after) - user_tags == set(tag.predicted["*"]) - user_tags - deleted
            touched.clear()
            again = snapshot(photos)
            tag("--write", kind, "--redo", photos)
            assert snapshot(photos) == again
        else:
            # Each word at most once between two runs: a tag that was deleted and added again leaves no trace.
            tags = user.read()
            word = draw.choice(sorted({*words} - touched) or [None])
            if word is None:
                continue
            touched.add(word)
            if word in tags:
                tags.remove(word)
                if word not in user_tags:
                    deleted.add(word)
                user_tags.discard(word)
            else:
                tags.insert(draw.randint(0, len(tags)), word)
                user_tags.add(word)
                deleted.discard(word)
            user.write(tags)


def test_a_caption_keeps_the_users_text_byte_for_byte(tag, photos):
    caption = photos / "a.txt"
    caption.write_bytes("\ufeffA photo of Rex ,  at night\r\nsecond line\r\n".encode())
    tag("--write", "txt", photos)
    assert caption.read_bytes() == "\ufeffA photo of Rex ,  at night, dog, novel\r\nsecond line\r\n".encode()
    tag.predicted = {"*": []}
    tag("--write", "txt", "--redo", photos)
    assert caption.read_bytes() == "\ufeffA photo of Rex ,  at night\r\nsecond line\r\n".encode()
    tag.predicted = {"*": ["one, two", "three"]}
    _, _, err = tag("--write", "txt", "--redo", photos)
    assert "three" in caption.read_text("utf-8") and "two" not in caption.read_text("utf-8") and "with a comma" in err


def test_a_caption_that_is_a_link_is_replaced_and_its_target_unchanged(tag, photos, tmp_path):
    (tmp_path / "victim.txt").write_text("private")
    (photos / "own.caption").write_text("Rex\nsecond line\n")
    (photos / "a.txt").symlink_to(tmp_path / "victim.txt")
    (photos / "b.txt").symlink_to("own.caption")
    (photos / "sub/c.txt").symlink_to("nowhere")
    status, _, err = tag("--write", "txt", photos)
    assert status == 0 and "replaced captions that are links out of the folder, without reading their targets" in err
    assert (tmp_path / "victim.txt").read_text() == "private"
    assert (photos / "own.caption").read_text() == "Rex\nsecond line\n"
    captions = [photos / name for name in ("a.txt", "b.txt", "sub/c.txt")]
    assert not any(caption.is_symlink() for caption in captions)
    assert [caption.read_text() for caption in captions] == [
        "dog, novel\n",
        "Rex, dog, novel\nsecond line\n",
        "dog, novel\n",
    ]
    assert tag("--write", "txt", photos)[0] == 0 and tag.tagged == []


def test_captions_of_another_folder_are_not_read_through_links(tag, photos, tmp_path):
    (tmp_path / "victim.txt").write_text("private")
    (photos / "a.txt").symlink_to(tmp_path / "victim.txt")
    assert tag("--write", "txt", "--output", tmp_path / "out", photos)[0] == 0
    assert (tmp_path / "out/a.txt").read_text() == "dog, novel\n" and (photos / "a.txt").is_symlink()


def test_a_record_of_captions_that_is_a_link_is_refused(tag, photos, tmp_path):
    (tmp_path / "victim").write_text("one line")
    (photos / ".optsg-captions.jsonl").symlink_to(tmp_path / "victim")
    status, _, err = tag("--write", "txt", photos)
    assert status == 1 and ".optsg-captions.jsonl is a link; remove it" in err
    assert (tmp_path / "victim").read_text() == "one line" and (photos / "sub/c.txt").exists()


def test_a_file_without_tags_gets_no_sidecar_and_is_counted(tag, photos):
    tag.predicted = {"*": [], "a.jpg": ["dog"]}
    before = snapshot(photos)
    options = [part for kind in SIDECARS for part in ("--write", kind)]
    status, _, err = tag(*options, photos)
    assert status == 0 and "2 of 3 files got no tags: the model may not know this kind of image" in err
    written = {".optsg-captions.jsonl", "a.jpg.xmp", "a.jpg.optsg.json", "a.txt"}
    assert snapshot(photos).keys() - before.keys() == written
    # Another program's sidecar does not change either, and the files are not counted as done.
    (photos / "b.txt").write_text("mine\n")
    _, _, err = tag(*options, photos)
    assert tag.tagged == ["b.jpg", "c.jpg"] and "1 file already tagged" in err and "2 of 2 files" in err
    assert snapshot(photos).keys() - before.keys() == written | {"b.txt"}
    assert (photos / "b.txt").read_text() == "mine\n"
    # Tags of an earlier run are removed.
    tag.predicted = {"*": []}
    tag(*options, "--redo", photos)
    assert [User(photos, kind).read() for kind in SIDECARS] == [[], [], []]


def test_json_sidecars_have_probabilities_and_mark_novel_tags(tag, photos):
    tag("--write", "json", photos)
    sidecar = json.loads((photos / "a.jpg.optsg.json").read_text("utf-8"))
    assert sidecar["tags"] == [
        {"tag": "dog", "score": 0.9, "novel": False},
        {"tag": "novel", "score": 0.8, "novel": True},
    ]
    assert sidecar["generated"] == ["dog", "novel"] and sidecar["declined"] == []


BROKEN = {"xmp": [b"<x"], "json": [b'{"photoTakenTime": {}}', b'{"optsg": 1, "mine": NaN}'], "txt": [b"caf\xe9"]}


@pytest.mark.parametrize("kind, content", [(kind, content) for kind in SIDECARS for content in BROKEN[kind]])
def test_an_unreadable_sidecar_is_unchanged_and_the_others_written(tag, photos, kind, content):
    (photos / f"a{SUFFIXES[kind]}").write_bytes(content)
    status, _, err = tag("--write", kind, photos)
    assert status == 1 and f"a{SUFFIXES[kind]} was not changed" in err and "2 tagged, 1 failed" in err
    assert (photos / f"a{SUFFIXES[kind]}").read_bytes() == content
    assert tag.tagged == ["b.jpg", "c.jpg"], "its image is not tagged"


def test_existing_sidecars_are_used_under_either_name(tag, photos):
    tag("--write", "xmp", "--sidecar-names", "stem", photos / "a.jpg")
    assert (photos / "a.xmp").exists()
    status, _, err = tag("--write", "xmp", "--redo", photos)
    assert status == 0 and "used existing .xmp files" in err and "(1 file)" in err
    assert not (photos / "a.jpg.xmp").exists() and (photos / "b.jpg.xmp").exists()


@pytest.mark.parametrize("twin", ["a.png", "a.MOV"])
def test_files_that_share_a_stem_have_a_sidecar_each(tag, photos, twin):
    shutil.copy(photos / "a.jpg", photos / twin)
    status, _, err = tag("--write", "xmp", "--sidecar-names", "stem", photos)
    assert status == 0 and "used the full names for .xmp files" in err and "(2 files)" in err
    assert not (photos / "a.xmp").exists() and (photos / "b.xmp").exists()
    assert (photos / "a.jpg.xmp").exists() and (photos / f"{twin}.xmp").exists()
    assert "4 files already tagged" in tag("--write", "xmp", "--sidecar-names", "stem", photos)[2]


def test_raw_files_and_their_sidecars_are_skipped(tag, photos, monkeypatch):
    (photos / "a.CR2").write_bytes(b"raw")
    (photos / "a.xmp").write_bytes(b"of the raw file")
    status, _, err = tag("--write", "xmp", photos)
    assert status == 0 and "skipped 1 raw file" in err and "may belong to another file" in err
    assert (photos / "a.xmp").read_bytes() == b"of the raw file" and (photos / "a.jpg.xmp").exists()
    monkeypatch.setattr("optsg.media_files.can_read_raw", lambda: False)
    status, _, err = tag("--write", "xmp", photos / "a.CR2")
    assert status == 1 and 'it is a raw file; to read raw files: pip install "optsg[raw]"' in err


def test_sidecars_in_an_output_tree_start_as_copies(tag, photos, tmp_path):
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
    assert status == 1 and "is already the sidecar of" in err


def test_files_with_tags_are_skipped_until_something_changes(tag, photos):
    options = [part for kind in ("xmp", "json", "txt", "csv", "parquet") for part in ("--write", kind)]
    options += ["--output", photos]
    tag(*options, photos)
    done = snapshot(photos)
    status, out, err = tag(*options, photos)
    assert (status, out, tag.tagged) == (0, "", []) and "3 files already tagged" in err
    assert snapshot(photos) == done
    (photos / "b.jpg").write_bytes(b"another image")
    assert tag(*options, photos)[0] == 0 and tag.tagged == ["b.jpg"]
    tag(*options, "--exclude", "cat", photos)
    assert tag.tagged == ["a.jpg", "b.jpg", "c.jpg"]
    (tag.model / "config.json").write_text("[]")
    tag(*options, "--exclude", "cat", photos)
    assert tag.tagged == ["a.jpg", "b.jpg", "c.jpg"]
    (photos / "b.txt").unlink()
    tag(*options, "--exclude", "cat", photos)
    assert tag.tagged == ["b.jpg"] and (photos / "b.txt").read_text() == "dog, novel\n"


def test_the_title_inside_an_image_is_recorded(tag, photos, tmp_path):
    tag.title = "inside"
    for _ in range(2):  # the second time, the titles come from the record
        tag("--write", "json", "--write", "csv", "--output", tmp_path, photos / "a.jpg")
        assert json.loads((tmp_path / "a.jpg.optsg.json").read_text())["title"] == "inside"
        assert ",inside," in (tmp_path / "tags.csv").read_text("utf-8-sig")
    tag("--write", "json", "--title", "mine", "--output", tmp_path, photos / "a.jpg")
    assert json.loads((tmp_path / "a.jpg.optsg.json").read_text())["title"] == "mine"


def test_sidecars_in_a_folder_are_not_counted_as_skipped(tag, photos):
    tag("--write", "xmp", "--write", "json", "--write", "txt", photos)
    _, _, err = tag(photos)
    assert "found 9 sidecars" in err and "skipped" not in err


def test_a_dry_run_prints_the_changes_and_writes_nothing(tag, photos):
    (photos / "a.txt").write_text("dog\n")
    before = snapshot(photos)
    status, out, err = tag("--write", "txt", "--write", "xmp", "--write", "csv", "--dry-run", photos)
    assert status == 0 and snapshot(photos) == before
    assert f"{photos}/a.jpg -> {photos}/a.txt: +novel\n" in out
    assert f"{photos}/a.jpg.xmp: +dog, +novel\n" in out and "9 would be written" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--write", "exif", "a.jpg"], "invalid choice"),
        (["--dry-run", "a.jpg"], "--dry-run needs --write"),
        (["--vocabulary", "/no/such/file", "a.jpg"], "cannot be read"),
        (["--vocabulary", os.devnull, "a.jpg"], "contains no tags"),
    ],
)
def test_usage_errors_of_write_name_the_problem(tag, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        tag(*arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("page", ["docs/photo-libraries.md", "docs/tagging.md"])
def test_the_tag_commands_of_the_documentation_run(tag, photos, tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    photos.rename("my_photos")
    shutil.copytree("my_photos", "my_images")
    for name in ("photo.jpg", "video.mp4"):
        shutil.copy("my_photos/a.jpg", name)
    Path("unwanted.txt").write_text("logo\n")
    Path("keywords.txt").write_text("dog\n")
    text = (ROOT / page).read_text("utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [shlex.split(line.partition(" > ")[0])[2:] for line in commands if line.startswith("optsg tag")]
    # test_index_command.py runs the commands that need a book.
    commands = [words for words in commands if "--book" not in words]
    assert len(commands) >= 5
    for arguments in commands:
        status, _, err = tag(*arguments)
        assert status == 0, err


def exiftool_subjects(folder) -> dict[str, list[str]]:
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is not installed (Debian: libimage-exiftool-perl)")
    read = subprocess.run(["exiftool", "-j", "-struct", "-XMP-dc:Subject", folder, "-ext", "xmp"], capture_output=True)
    return {Path(row["SourceFile"]).name: row.get("Subject", []) for row in json.loads(read.stdout)}


def test_exiftool_reads_the_tags_of_the_shipped_checkpoint(tmp_path, capsys):
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


def test_unreadable_images_get_no_sidecar(tiny_checkpoint, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    assert main(["tag", "--model", str(tiny_checkpoint), "--write", "xmp", str(tmp_path)]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert (tmp_path / "good.png.xmp").exists() and not (tmp_path / "bad.png.xmp").exists()
