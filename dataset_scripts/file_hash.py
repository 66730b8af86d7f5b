"""The SHA-256 of a file."""

import hashlib
import os


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file of any size, in hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
