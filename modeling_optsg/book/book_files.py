"""Saves books in folders, and loads them."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.numpy import load_file, save_file

from dataset_scripts.file_hash import file_sha256
from modeling_optsg.data.atomic_files import os_errors, write_json

from .example_rows import COLUMNS, STATE_COLUMN
from .fusion import BookScore
from .nearest import Clusters, check_faiss
from .normalization import VectorNormalizer
from .tag_book import TagBook
from .votes import SOURCES, VECTOR_SOURCES

# Increase it when older versions could not read the files.
VERSION = 3
# Folder of a book inside the folder or the repository of a checkpoint.
INDEX_FOLDER = "index"
# Folder of a book inside a folder of images.
LIBRARY_FOLDER = ".optsg-book"
# Path of the images of a book. Its name is hidden, so that it is not published.
LIBRARY_NAME = ".optsg-library.json"
SETTINGS_NAME, EXAMPLES_NAME, VECTORS_NAME = "book.json", "book-examples.parquet", "book-vectors.safetensors"


def save_book(book: TagBook, folder: str | os.PathLike, library: str | os.PathLike | None = None) -> None:
    """Save a book in a folder: the examples, their vectors and the settings. An older book there is replaced.

    Args:
        book: The book.
        folder: Its folder.
        library: Folder of the images that the book is made from; see [`find_library`].

    Raises:
        OSError: The folder cannot be written. An older book is then unchanged, or it is reported as damaged.
        ValueError: The folder has a file `book.json` that does not belong to a book.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_replaceable(folder)
    book.make_clusters()
    partial = {name: folder / f".{name}.partial" for name in (EXAMPLES_NAME, VECTORS_NAME)}
    pq.write_table(book.examples.with_format("arrow")[:], partial[EXAMPLES_NAME])
    tensors = {name: vectors.numpy() for name, vectors in book.vectors.items()}
    for name, clusters in book.clusters.items():
        tensors |= {f"{name}_centroids": clusters.centroids.numpy(), f"{name}_members": clusters.members.numpy()}
    tensors |= {name: getattr(book.normalize, name).numpy() for name in ("image_mean", "image_components")}
    with os_errors(partial[VECTORS_NAME]):
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial[VECTORS_NAME])
    settings = {"version": VERSION, "fingerprint": book.fingerprint, "examples": len(book)}
    settings |= {"num_neighbours": book.num_neighbours, "num_candidates": book.num_candidates}
    settings |= {"own_tags_only": book.own_tags_only, "temperatures": book.temperatures}
    settings |= {"threshold": book.threshold, "score": book.score.to_dict()}
    # With the digests, files of two books are not mistaken for one.
    settings["sha256"] = {name: file_sha256(path) for name, path in partial.items()}
    for name, path in partial.items():
        os.replace(path, folder / name)
    if library is None:
        (folder / LIBRARY_NAME).unlink(missing_ok=True)
    else:
        write_json(folder / LIBRARY_NAME, {"folder": os.path.abspath(library)})
    write_json(folder / SETTINGS_NAME, settings)


def load_book(folder: str | os.PathLike, fingerprint: str | None = None) -> TagBook:
    """Load a saved book.

    Args:
        folder: Its folder.
        fingerprint: Fingerprint of the model that will use the book. By default, it is not checked.

    Raises:
        FileNotFoundError: The folder does not contain a book.
        ValueError: A file is damaged, or the book was made with another model or another version of this package.
        ImportError: The book has more than 200,000 examples, and `faiss` is not installed.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} does not contain a book ({SETTINGS_NAME} is missing). Make one with optsg index."
        )
    try:
        with _named(SETTINGS_NAME):
            settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
            is_current = settings["version"] == VERSION
            digests = dict(settings["sha256"]) if is_current else {}
        for name, digest in digests.items():
            with _named(name):
                if file_sha256(folder / name) != digest:
                    raise ValueError("the file changed after the book was saved")
        if is_current:
            book = _read(folder, settings)
    except _DamagedFileError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The book in {folder} is damaged ({reason}). Run optsg index again.") from error
    if not is_current:
        raise ValueError(f"The book in {folder} was made by another version of optsg. Run optsg index again.")
    if fingerprint is not None and fingerprint != book.fingerprint:
        raise ValueError(f"The book in {folder} was made with another model. Run optsg index again with this model.")
    check_faiss(len(book))
    return book


def find_book(name: str | os.PathLike, **hub_options: Any) -> Path:
    """Return the folder of a book. A book on the Hub is downloaded.

    Args:
        name: That folder, the folder of its images, or the folder or Hub name of its checkpoint.
        hub_options: Arguments of `huggingface_hub.snapshot_download`, such as `revision` or `token`.

    Raises:
        FileNotFoundError: There is neither a folder nor a repository of this name, or the repository has no book.
    """
    if Path(name).is_dir():
        inside = (Path(name, folder) for folder in (LIBRARY_FOLDER, INDEX_FOLDER))
        return next((folder for folder in inside if (folder / SETTINGS_NAME).is_file()), Path(name))
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=f"{INDEX_FOLDER}/*", **hub_options), INDEX_FOLDER)
    except GatedRepoError:
        raise
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor the name of a repository on the Hub. Make a book with optsg index."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is not a folder, and no repository of this name can be downloaded."
        ) from error
    if not (folder / SETTINGS_NAME).is_file():
        raise FileNotFoundError(
            f"The repository {name} does not contain a book ({INDEX_FOLDER}/{SETTINGS_NAME}), or offline, it is not "
            "in the cache."
        )
    return folder


def find_library(folder: Path) -> str | None:
    """Return the folder of the images that a book on this machine is made from.

    A book inside the folder of its images moves with it. Any other book has the path in a file that is not published.

    Args:
        folder: Folder of the book.

    Returns:
        The path without links, or `None` if the book is made from a dataset or comes from the Hub.
    """
    try:
        return os.path.realpath(json.loads((folder / LIBRARY_NAME).read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        # The folder may be given as "." or by a link.
        parent, name = os.path.split(os.path.realpath(folder))
        return parent if name == LIBRARY_FOLDER else None


def load_pretrained_book(name: str | os.PathLike, fingerprint: str | None = None, **hub_options: Any) -> TagBook:
    """Load the book of a checkpoint, from its folder `index`.

    Args:
        name: Folder of the checkpoint, or its name on the Hub; see [`find_book`].
        fingerprint: See [`load_book`].
        hub_options: Arguments of `huggingface_hub.snapshot_download`, such as `revision` or `token`.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it has no book.
        ValueError: As in [`load_book`].

    Example:

        >>> from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
        >>> from modeling_optsg.book import encoder_fingerprint, load_pretrained_book
        >>> model = OPTSGForTagGeneration.from_pretrained("org/optsg-pexel")  # doctest: +SKIP
        >>> processor = OPTSGProcessor.from_pretrained("org/optsg-pexel")  # doctest: +SKIP
        >>> fingerprint = encoder_fingerprint(model, processor)  # doctest: +SKIP
        >>> book = load_pretrained_book("org/optsg-pexel", fingerprint)  # doctest: +SKIP
    """
    return load_book(find_book(name, **hub_options), fingerprint)


def check_replaceable(folder: Path) -> None:
    """Check that a book may be saved in a folder.

    With other files of a book, a damaged `book.json` is replaced.

    Raises:
        ValueError: The folder has a file `book.json` that does not belong to a book.
    """
    settings = folder / SETTINGS_NAME
    if any((folder / name).exists() for name in (EXAMPLES_NAME, VECTORS_NAME)):
        return
    with contextlib.suppress(OSError, ValueError, TypeError):
        if not settings.exists() or "fingerprint" in json.loads(settings.read_text(encoding="utf-8")):
            return
    raise ValueError(f"{settings} does not belong to a book and is not replaced. Choose another folder.")


def _read(folder: Path, settings: dict) -> TagBook:
    book = TagBook.__new__(TagBook)
    with _named(EXAMPLES_NAME):
        table = pq.read_table(folder / EXAMPLES_NAME, columns=[*COLUMNS, STATE_COLUMN])
        book.examples = Dataset(InMemoryTable(table))
    with _named(VECTORS_NAME):
        tensors = {name: torch.from_numpy(array) for name, array in load_file(folder / VECTORS_NAME).items()}
        book.vectors = {name: tensors[name] for name in VECTOR_SOURCES}
        book.clusters = {
            name: Clusters(tensors[f"{name}_centroids"], tensors[f"{name}_members"])
            for name in VECTOR_SOURCES
            if f"{name}_centroids" in tensors
        }
        book.normalize = VectorNormalizer(tensors["image_mean"], tensors["image_components"])
    with _named(SETTINGS_NAME):
        book.fingerprint, book.threshold = settings["fingerprint"], settings["threshold"]
        book.own_tags_only = settings["own_tags_only"]
        book.num_neighbours, book.num_candidates = settings["num_neighbours"], settings["num_candidates"]
        book.temperatures = {name: settings["temperatures"][name] for name in SOURCES}
        book.score = BookScore.from_dict(settings["score"])
        lengths = {settings["examples"], len(book), *map(len, book.vectors.values())}
        lengths |= {len(clusters.members) for clusters in book.clusters.values()}
        if len(lengths) > 1:
            raise ValueError(f"the files disagree on the number of examples: {sorted(lengths)}")
    return book


class _DamagedFileError(Exception):
    """A file of a book is missing or damaged."""


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Add the name of a file to every error, such as those of safetensors, which do not name it."""
    try:
        yield
    except Exception as error:  # json, pyarrow and safetensors raise errors of many types
        raise _DamagedFileError(f"{name}: {type(error).__name__}: {error}") from error
