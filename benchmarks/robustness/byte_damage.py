"""Damages that need no knowledge of a file's format. Each takes the bytes of a valid file and a random generator."""

import random
from collections.abc import Callable

HEADER_BYTES = 64


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """Flip one to twenty bits anywhere."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 20)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """Replace up to eight bytes of the header by extreme values."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(min(HEADER_BYTES, len(damaged)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(damaged)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Keep only the beginning."""
    return data[: rng.randrange(1, len(data))]


def cut_beginning(data: bytes, rng: random.Random) -> bytes:
    """Keep only the end."""
    return data[rng.randrange(1, min(len(data), 2 * HEADER_BYTES)) :]


def repeat_part(data: bytes, rng: random.Random) -> bytes:
    """Repeat a part of the file in place."""
    start = rng.randrange(len(data))
    end = rng.randrange(start, len(data)) + 1
    return data[:end] + data[start:end] * rng.randint(1, 4) + data[end:]


def remove_part(data: bytes, rng: random.Random) -> bytes:
    """Remove a part of the file."""
    start = rng.randrange(len(data))
    return data[:start] + data[rng.randrange(start, len(data)) :] or b"\0"


def zero_part(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a part of the file with zeros, as an interrupted copy does."""
    start = rng.randrange(len(data))
    end = rng.randrange(start, len(data)) + 1
    return data[:start] + bytes(end - start) + data[end:]


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    """Insert random bytes."""
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.randint(1, 64)) + data[start:]


def append_bytes(data: bytes, rng: random.Random) -> bytes:
    """Append random bytes."""
    return data + rng.randbytes(rng.randint(1, 4096))


def empty(data: bytes, rng: random.Random) -> bytes:
    """Return an empty file or a few zeros."""
    return bytes(rng.choice((0, 0, 1, 12, len(data))))


def replace_all(data: bytes, rng: random.Random) -> bytes:
    """Replace the content by random bytes."""
    return rng.randbytes(rng.randint(1, 4096))


def change_line_ends(data: bytes, rng: random.Random) -> bytes:
    """Convert line ends, as a transfer in text mode does."""
    return data.replace(b"\n", b"\r\n") if rng.random() < 0.5 else data.replace(b"\r", b"")


BYTE_DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped": flip_bits,
    "header damaged": damage_header,
    "cut": cut,
    "beginning cut": cut_beginning,
    "part repeated": repeat_part,
    "part removed": remove_part,
    "part zeroed": zero_part,
    "bytes inserted": insert_bytes,
    "bytes appended": append_bytes,
    "empty": empty,
    "random bytes": replace_all,
    "line ends converted": change_line_ends,
}
