"""Checks that damaged files of frame features are left out of a dataset, and undamaged ones are kept."""

import io
import json
import logging
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from dataset_scripts import load_tagging_dataset

from .byte_damage import BYTE_DAMAGES
from .jobs import make, run
from .results import Result, Workplace, choose, result

GOOD, DAMAGED, WIDTH = ("good-1", "good-2", "good-3"), "damaged", 4
SUFFIXES = (".npy", ".npz", ".pt", ".h5")
# 4 GB as 32-bit numbers: more than the limit, less than the memory of most machines.
HUGE = 2**28
# (suffix, content)
File = tuple[str, bytes]


def encode(array: np.ndarray, suffix: str) -> bytes:
    """Encode an array as a file of features."""
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, array)
    elif suffix == ".npz":
        np.savez_compressed(buffer, features=array)
    elif suffix == ".pt":
        torch.save(torch.from_numpy(array), buffer)
    else:
        with h5py.File(buffer, "w") as file:
            file.create_dataset("features", data=array, compression="gzip")
    return buffer.getvalue()


def damaged_bytes(rng: random.Random) -> File:
    """Damage the bytes of a valid file."""
    suffix = rng.choice(SUFFIXES)
    return suffix, rng.choice(list(BYTE_DAMAGES.values()))(encode(np.ones((3, WIDTH), np.float32), suffix), rng)


def wrong_array(rng: random.Random) -> File:
    """Save an array of another shape or type, or with values that are not finite."""
    arrays = (
        np.zeros((0, WIDTH)), np.zeros((3, 0)), np.zeros(WIDTH), np.zeros((1, 3, WIDTH)), np.zeros(()),
        np.full((3, WIDTH), np.nan), np.full((3, WIDTH), -np.inf), np.full((3, WIDTH), 1e30), np.ones((3, WIDTH + 1)),
        np.ones((3, WIDTH), bool), np.ones((3, WIDTH), np.uint64), np.ones((3, WIDTH), np.complex64),
    )  # fmt: skip
    suffix = rng.choice(SUFFIXES)
    # PyTorch has few operations for the other types.
    return suffix, encode(rng.choice(arrays[:-2] if suffix == ".pt" else arrays), suffix)


def other_objects(rng: random.Random) -> File:
    """Save objects instead of arrays of numbers."""
    kind, buffer = rng.randrange(7), io.BytesIO()
    if kind == 0:
        np.save(buffer, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
        return ".npy", buffer.getvalue()
    if kind == 1:
        np.save(buffer, np.array([["text", "b"]]))
        return ".npy", buffer.getvalue()
    if kind == 2:
        torch.save(rng.choice(({"features": torch.ones(3, WIDTH)}, [torch.ones(2)], "text", None, 5)), buffer)
        return ".pt", buffer.getvalue()
    if kind == 3:
        return ".pt", pickle.dumps(rng.choice((print, {"a": b"x"}, [1])))
    if kind == 4:
        torch.save(torch.ones(3, WIDTH).to_sparse(), buffer)
        return ".pt", buffer.getvalue()
    if kind == 5:
        with h5py.File(buffer, "w") as file:
            file.create_group("group")
            file.attrs["text"] = "x"
            if rng.random() < 0.5:
                file["text"] = "not numbers"
        return ".h5", buffer.getvalue()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(rng.choice(("a.txt", "../features.npy", "x/")), "text")
    return rng.choice((".npz", ".pt")), buffer.getvalue()


def huge_array(rng: random.Random) -> File:
    """Announce gigabytes in a small file."""
    kind, buffer = rng.randrange(4), io.BytesIO()
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({HUGE}, {WIDTH}), }}".encode().ljust(117) + b"\n"
    if kind == 0:
        return ".npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    if kind == 1:
        # A member that is decompressed to 2 GB.
        rows, compressor = 2**27, zlib.compressobj(9, zlib.DEFLATED, -15)
        small = header.replace(str(HUGE).encode(), str(rows).encode())[:-1].ljust(117) + b"\n"
        content, checksum, size = b"", 0, 0
        for block in (b"\x93NUMPY\1\0" + struct.pack("<H", len(small)) + small, *[bytes(2**26)] * 32):
            content += compressor.compress(block)
            checksum, size = zlib.crc32(block, checksum), size + len(block)
        return ".npz", _zip_member(b"features.npy", content + compressor.flush(), checksum, size)
    if kind == 2:
        torch.save(torch.zeros(1).expand(HUGE, WIDTH), buffer)
        return ".pt", buffer.getvalue()
    with h5py.File(buffer, "w") as file:
        options = rng.choice(({"chunks": (2**16, WIDTH), "compression": "gzip"}, {}))
        file.create_dataset("features", shape=(HUGE, WIDTH), dtype="f4", **({"chunks": (2**16, WIDTH)} | options))
    return ".h5", buffer.getvalue()


def _zip_member(name: bytes, content: bytes, checksum: int, size: int) -> bytes:
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, checksum, len(content), size, len(name), 0)
    local = b"PK\3\4" + fields + name + content
    central = b"PK\1\2\x14\0" + fields + bytes(10) + bytes(4) + name
    return local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


DAMAGES: dict[str, Callable[[random.Random], File]] = {
    "damaged bytes": damaged_bytes,
    "wrong array": wrong_array,
    "other objects": other_objects,
    "huge array": huge_array,
}
WEIGHTS = {"damaged bytes": 4, "wrong array": 2, "other objects": 2}


def _write_damaged(folder: Path, damage: str, seed: int) -> None:
    suffix, content = DAMAGES[damage](random.Random(f"features {seed}"))
    (folder / f"{DAMAGED}{suffix}").write_bytes(content)


def check_features(workplace: Workplace, seed: int) -> Result:
    """Load a dataset with the file of a seed among undamaged ones."""
    damage = choose(DAMAGES, seed, WEIGHTS)
    folder = workplace.folder / f"features-{seed}"
    (folder / "features").mkdir(parents=True)
    examples = [{"vid": name, "ann_title": "title", "raw_title": "title", "tag": ["red"]} for name in (*GOOD, DAMAGED)]
    (folder / "create_210k_train.json").write_text(json.dumps(examples, allow_nan=False), encoding="utf-8")
    for name in GOOD:
        np.save(folder / "features" / f"{name}.npy", np.ones((3, WIDTH), np.float32))
    make(lambda: _write_damaged(folder / "features", damage, seed))

    def load() -> None:
        # Warnings are printed, as the command line does.
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
        rows = load_tagging_dataset("create_tagging", data_dir=str(folder), cache_dir=str(folder / "cache"))
        print(json.dumps([row["id"] for row in rows["train"]], allow_nan=False))

    job = run(load)
    loaded = json.loads(job.output.splitlines()[-1]) if job.output.strip() else []
    if not set(GOOD) <= set(loaded):
        outcome = "lost neighbour"
    elif DAMAGED in loaded:
        outcome = "read"
    else:
        outcome = "left out" if "left out" in job.errors else "not named"
    shutil.rmtree(folder)
    return result("features", seed, damage, outcome, job)
