"""Files that are complete or unchanged."""

import os
import stat
from pathlib import Path

import pytest

from modeling_optsg.data import atomic_files
from modeling_optsg.data.atomic_files import sync, write_text


def test_a_text_file_has_the_same_bytes_on_every_system(tmp_path, monkeypatch):
    def open_as_on_windows(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
        newline = None if "b" in mode else newline or "\r\n"
        return path_open(path, mode, buffering, encoding, errors, newline)

    path_open = Path.open
    monkeypatch.setattr(Path, "open", open_as_on_windows)
    write_text(tmp_path / "a.txt", "a\nb\n")
    assert (tmp_path / "a.txt").read_bytes() == b"a\nb\n"


def test_a_text_that_cannot_be_written_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")

    def fail(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]


@pytest.mark.parametrize("is_windows", [False, True])
def test_files_and_folders_are_synchronised_as_the_system_allows(tmp_path, monkeypatch, is_windows):
    path, synchronised = tmp_path / "a.txt", []
    path.write_text("text", encoding="utf-8")
    fsync, modes = os.fsync, []

    def record(descriptor):
        synchronised.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    def record_mode(name, flags, *args, **kwargs):
        modes.append(flags)
        return os_open(name, flags, *args, **kwargs)

    os_open = os.open
    monkeypatch.setattr(atomic_files.os, "fsync", record)
    monkeypatch.setattr(atomic_files.os, "open", record_mode)
    for own in (path, tmp_path):
        sync(own, is_windows)
    assert synchronised == ([False] if is_windows else [False, True])
    assert modes == ([os.O_RDWR] if is_windows else [os.O_RDONLY] * 2)
    assert path.read_text(encoding="utf-8") == "text"
