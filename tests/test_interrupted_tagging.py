"""`optsg tag --write` on disks that are full or protected, and after a run was killed."""

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sidecar_tools import SIDECARS, TagCommand, User, make_photos, snapshot

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture
def tag(tmp_path, monkeypatch, capsys):
    return TagCommand(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", [*SIDECARS, "csv"])
def test_unwritable_folders_are_reported_before_tagging(tag, photos, tmp_path, kind, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    (tmp_path / "locked").mkdir()
    if kind != "csv":
        assert tag("--write", kind, "--output", tmp_path / "locked", photos / "a.jpg")[0] == 1
        # Files that are done need no permission.
        with monkeypatch.context() as unlocked:
            unlocked.setattr(os, "access", lambda path, mode: True)
            tag("--write", kind, "--output", tmp_path / "locked", photos / "a.jpg")
        assert tag("--write", kind, "--output", tmp_path / "locked", photos / "a.jpg")[0] == 0
    for folder, message in (
        ("file/tags", "is not a folder|Not a directory"),
        ("locked/tags", "no permission to change"),
    ):
        for more in ((), ("--dry-run",)):
            try:
                status, _, error = tag("--write", kind, "--output", tmp_path / folder, *more, photos / "a.jpg")
            except SystemExit as stop:
                status, error = stop.code, capsys.readouterr().err
            assert status in (1, 2) and re.search(message, error) and not tag.tagged


def test_modes_and_links_stay_and_protected_files_are_unchanged(tag, photos, tmp_path):
    real = photos / "real.xmp"
    shutil.move(photos / "a.jpg", photos / "z.jpg")
    tag("--write", "xmp", photos)
    shutil.move(photos / "z.jpg.xmp", real)
    (photos / "z.jpg.xmp").symlink_to(real)
    real.chmod(0o640)
    (photos / "b.jpg.xmp").chmod(0o444)
    protected = (photos / "b.jpg.xmp").read_bytes()
    tag.predicted = {"*": ["cat"]}
    status, _, err = tag("--write", "xmp", "--redo", photos)
    assert status == 1 and "b.jpg.xmp is write-protected" in err
    assert (photos / "z.jpg.xmp").is_symlink() and b">cat<" in real.read_bytes()
    assert real.stat().st_mode & 0o777 == 0o640
    assert (photos / "b.jpg.xmp").read_bytes() == protected


@pytest.mark.parametrize("kind", [*SIDECARS, "csv"])
def test_a_full_disk_is_reported_and_the_old_file_stays(tag, photos, monkeypatch, kind):
    tag("--write", kind, "--output", photos, photos)
    before = snapshot(photos)
    tag.predicted = {"*": ["cat"]}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = tag("--write", kind, "--redo", "--output", photos, photos)
    assert status == 1 and "cannot be written: No space left on device" in err and "Traceback" not in err
    assert snapshot(photos) == before
    monkeypatch.undo()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_reported(tag, photos):
    photos.chmod(0o555)
    status, _, err = tag("--write", "xmp", photos / "a.jpg")
    photos.chmod(0o755)
    assert status == 1 and "cannot be written: Permission denied" in err


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_killed_between_record_and_caption_is_repaired(tag, photos, monkeypatch, when):
    from optsg.sidecars import caption_file

    tag("--write", "txt", photos)
    write = caption_file.replace_file

    def kill(path, data, **options):
        if when == "after":
            write(path, data, **options)
        raise KeyboardInterrupt

    tag.predicted = {"*": ["cat", "dog"]}
    monkeypatch.setattr(caption_file, "replace_file", kill)
    assert tag("--write", "txt", "--redo", photos / "a.jpg")[0] == 130
    monkeypatch.setattr(caption_file, "replace_file", write)
    tag("--write", "txt", "--redo", photos)
    assert sorted(User(photos, "txt").read()) == ["cat", "dog"]
    tag.predicted = {"*": []}
    tag("--write", "txt", "--redo", photos)
    assert User(photos, "txt").read() == []


TAG_SLOWLY = """
import sys
from optsg import main, tag, tagger

class StandIn:
    def __init__(self, name, settings, num_threads): pass
    def __call__(self, files, batch_size, with_metadata):
        for file in files:
            print("next", flush=True)
            tags = [{"tag": t, "score": 0.5, "novel": False} for t in file.path[-7:-4]]
            yield file, tagger.FileTags(tags, [])

tag.Tagger = StandIn
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_continues_and_gives_the_same_files(tmp_path, how):
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
        command = [sys.executable, "-c", TAG_SLOWLY, "tag", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A background job of a shell ignores Ctrl-C, and so would its children.
        reset = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=reset, **pipes)

    def finish(process):
        _, err = process.communicate(timeout=120)
        return process.returncode, err

    shutil.copytree(original, tmp_path / "whole")
    status, err = finish(start(tmp_path / "whole"))
    assert status == 0, err
    kills = 0
    for _ in range(7):
        # On a busy machine a run may finish before the signal is sent.
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
            assert how == signal.SIGKILL or "run the same command to continue" in err
            kills += 1
    assert kills, "without a killed run this would test nothing"
    if how == signal.SIGKILL:
        # Each of two simultaneous runs may lose the race for one table.
        both = [start(tmp_path / "killed") for _ in range(2)]
        for status, err in map(finish, both):
            assert status == 0 or "another run is writing to" in err, err
    status, err = finish(start(tmp_path / "killed"))
    assert status == 0, err

    whole, killed = snapshot(tmp_path / "whole"), snapshot(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name, data in whole.items():
        if not re.match(r"\.optsg-.*jsonl", name):
            assert killed[name] == data, name
