"""Loads the model of `optsg tag`, tags files with it, and computes fingerprints."""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import threading
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .file_inputs import image_input, is_seen_as_video
from .file_tagger import FileTagger, FileTags, ReadFile, TagSettings
from .media_files import OWN_PREFIX, MediaFile
from .model_check import check_model
from .sidecars.reconciliation import tag_key
from .terminal import printable

if TYPE_CHECKING:
    import torch

    from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
    from modeling_optsg.book import BookTagger

MODEL_FILE_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".npz", ".onnx"}
# Name of the book's folder inside a folder of images.
BOOK_FOLDER = f"{OWN_PREFIX}book"
# Name of the book's folder inside a checkpoint, as in `modeling_optsg.book`, which is too slow to import here.
INDEX_FOLDER = "index"


class Tagger(FileTagger):
    """Loads a model and tags files with it.

    Args:
        name: A folder or a name on the Hub.
        settings: Settings of the generation.
        num_threads: Number of threads for the model, and of threads that read files. Default: that of PyTorch for the
            model, and one for each core that reads; see [`FileTagger`]. On an accelerator, one batch is tagged at a
            time.

    Raises:
        BookError: The book cannot be used.
        Exception: There is no such model, it is damaged, or it does not support the settings. The libraries raise
            exceptions of many types.
    """

    def __init__(self, name: str, settings: TagSettings, num_threads: int | None = None):
        import torch

        self.model, self.processor = load_model(name, settings.frames)
        is_on_cpu = self.model.device.type == "cpu"
        super().__init__(settings, num_threads, num_threads or torch.get_num_threads(), is_on_cpu)
        # Tokenizers and books must not be used by two threads at once.
        self.one_at_a_time = threading.Lock()
        options = {"threshold": settings.threshold, "max_tags": settings.max_tags, "decoding": settings.decoding}
        self.generate_options: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        self.max_tags = self.max_word_tags = None
        if self.excluded:
            from modeling_optsg.evaluation.calibration import NO_TAG_LIMIT

            # Limits are applied after the exclusion, so that excluded tags do not count.
            self.max_tags = settings.max_tags or getattr(self.model.generation_config, "max_tags", None)
            self.generate_options["max_tags"] = NO_TAG_LIMIT
            if settings.threshold is None:
                self.max_word_tags = self.model.num_word_tags
        self.book = self.library = None
        if settings.book:
            from modeling_optsg.book.book_files import find_library

            folder = find_book(settings.book)
            self.book = _load_book(folder, self.model, self.processor)
            self.library = find_library(folder)
            own_ids = self.book.book.examples["id"] if self.library else ()
            self.own_ids = {_comparable(own_id): own_id for own_id in own_ids}
            self.threshold = settings.threshold
            self.max_tags, self.max_word_tags = settings.max_tags, None
            self.generate_options |= self.book.generate_options
        if settings.vocabulary:
            from modeling_optsg.tag_vocabulary import TagVocabularyLogitsProcessor

            self.generate_options["tag_vocabulary"] = TagVocabularyLogitsProcessor.from_tags(
                sorted(settings.vocabulary), self.processor, self.model.config
            )
        self._tag_blank_images()

    def _tag_blank_images(self) -> None:
        """Raise any error that the model and the settings cause, with and without a title, before a file is tagged."""
        import numpy as np

        image = np.full((32, 32, 3), 255, dtype=np.uint8)
        inputs = self.processor(images=[image, image], titles=["title", None], return_tensors="pt")
        outputs = self.model.generate(**inputs.to(self.model.device), **self.generate_options)
        if self.book is None:
            self.processor.batch_decode(outputs)

    def _start_batch(self) -> None:
        import torch

        # A setting of the thread that calls PyTorch.
        torch.set_num_threads(self.threads_per_batch)

    def _read_pixels(self, file: MediaFile) -> "torch.Tensor":
        files = {"video": file.path} if is_seen_as_video(file) else {"image": image_input(file.path)}
        return self.processor.read_pixels(**files)

    def _generate(self, batch: list[ReadFile]) -> list[FileTags]:
        from modeling_optsg.generation_settings import IMAGE_WORDS
        from modeling_optsg.image_words import decode_image_words

        titles = [read.title for read in batch]
        with self.one_at_a_time:
            inputs = self.processor(pixel_values=[read.pixels for read in batch], titles=titles, return_tensors="pt")
        outputs = self.model.generate(**inputs.to(self.model.device), **self.generate_options)
        image_words = decode_image_words(outputs, self.model.config)
        tagged_by = outputs.tagged_by or [None] * len(batch)
        limits = [self.max_tags or (self.max_word_tags if name == IMAGE_WORDS else None) for name in tagged_by]
        with self.one_at_a_time:
            if self.book is None:
                decoded = self.processor.batch_decode(outputs, return_sources=True)
            else:
                own_ids = [self._id_in_book(read.file) for read in batch]
                decoded = self.book(outputs, titles, own_ids, self.threshold)
        results = []
        for tags, words, limit, read in zip(decoded, image_words, limits, batch, strict=True):
            kept = [tag for tag in tags if tag_key(tag["tag"]) not in self.excluded][:limit]
            sources = [{"source": tag["source"], "neighbours": tag.get("neighbours", [])} for tag in kept]
            kept = [{name: tag[name] for name in ("tag", "score", "novel")} for tag in kept]
            results.append(FileTags(kept, words, sources, read.title, read.embedded))
        return results

    def _id_in_book(self, file: MediaFile) -> str | None:
        """Return the id that a file has in the book of its own folder: it must not suggest its own keywords."""
        if self.library is None:
            return None
        folder, name = os.path.split(file.path)
        # A link inside the folder has its own name in the book, and a link from outside that of its target.
        for path in (os.path.join(os.path.realpath(folder), name), os.path.realpath(file.path)):
            # On Windows, no path leads from one drive to another.
            with contextlib.suppress(ValueError):
                key = os.path.relpath(_comparable(path), _comparable(self.library))
                if key in self.own_ids:
                    return self.own_ids[key]
        return None


def _comparable(path: str) -> str:
    """Return a path in the same letter case and Unicode form as other spellings of it on this system."""
    return os.path.normcase(unicodedata.normalize("NFC", path))


class Fingerprinter:
    """Computes a fingerprint of each file, which depends on the model, the settings, the file and its title.

    Args:
        model: A folder or a name on the Hub.
        settings: Settings of the generation.

    Raises:
        BookError: There is no such book.
        Exception: There is no such model. The libraries raise exceptions of many types.
    """

    def __init__(self, model: str, settings: TagSettings):
        values = {
            name: sorted(value) if isinstance(value, frozenset) else value for name, value in asdict(settings).items()
        }
        if settings.book:
            values["book"] = _identify_book(settings.book)
        else:
            # Without a book, the fingerprint stays what it was before there were books, so sidecars stay valid.
            del values["book"]
        self.run = json.dumps([_identify_model(model), values], allow_nan=False)

    def __call__(self, file: MediaFile) -> str:
        """Return the fingerprint of a file."""
        # Size and modification time represent the content, because finished files must not be read again.
        try:
            status = os.stat(file.path)
            content = [status.st_size, status.st_mtime_ns]
        except OSError:
            content = None
        return hashlib.sha256(json.dumps([self.run, content, file.title]).encode()).hexdigest()[:32]


def _identify_model(name: str) -> str:
    """Return a digest of the files in a model's folder, or the commit of a model on the Hub."""
    if not Path(name).is_dir():
        from modeling_optsg import OPTSGConfig

        return OPTSGConfig.get_config_dict(name)[0].get("_commit_hash") or name
    digest = hashlib.sha256()
    for path in sorted(Path(name).rglob("*")):
        # The tags of a model do not depend on its book.
        is_book = path.relative_to(name).parts[0] == INDEX_FOLDER
        if path.suffix in MODEL_FILE_SUFFIXES and path.is_file() and not is_book:
            digest.update(path.relative_to(name).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def find_book(name: str) -> Path:
    """Return the folder of a book; see [`modeling_optsg.book.book_files.find_book`].

    Raises:
        BookError: There is no such book.
    """
    from modeling_optsg.book.book_files import find_book as find

    try:
        return find(name)
    except (OSError, ValueError) as error:
        # Messages of the Hub have several lines.
        raise BookError(" ".join(str(error).split())) from error


class BookError(Exception):
    """A book cannot be used; the message says why."""


def _load_book(folder: Path, model: "OPTSGForTagGeneration", processor: "OPTSGProcessor") -> "BookTagger":
    from modeling_optsg.book import BookTagger

    try:
        tagger = BookTagger(model, processor, folder)
        tagger.book.prepare()
    except (OSError, ValueError, ImportError) as error:
        raise BookError(str(error)) from error
    return tagger


def _identify_book(name: str) -> str:
    """Return a digest of a book's settings, which include the digests of its other files."""
    from modeling_optsg.book.book_files import SETTINGS_NAME

    try:
        return hashlib.sha256((find_book(name) / SETTINGS_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise BookError(f"{name} does not contain a book: {error.strerror}. Make one with optsg index.") from error


@contextlib.contextmanager
def exit_if_unusable(parser: argparse.ArgumentParser, model: str) -> Iterator[None]:
    """Exit with a one-line message if the model or the book cannot be used."""
    try:
        yield
    except BookError as error:
        parser.exit(2, printable(f"{parser.prog}: {error}") + "\n")
    except Exception as error:  # the libraries raise anything from KeyError to SafetensorError on a damaged folder
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        parser.exit(2, printable(f"{parser.prog}: model {model} cannot be loaded: {reason}") + "\n")


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turn garbage collection off, and exempt all objects that exist afterwards from it.

    Modules and weights are many objects that stay until the end. Searching them for garbage again and again slows down
    the start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@without_garbage_collection()
def load_model(name: str, num_frames: int | None = None) -> tuple["OPTSGForTagGeneration", "OPTSGProcessor"]:
    """Load a model and its processor.

    Args:
        name: A folder or a name on the Hub.
        num_frames: Number of frames to read from each video. Default: the setting of the processor.

    Raises:
        Exception: There is no such model, or it is damaged. The libraries raise exceptions of many types.
    """
    import torch

    from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor

    _prepare_loading(name)
    model_type = OPTSGConfig.get_config_dict(name)[0].get("model_type")
    if model_type != OPTSGConfig.model_type:
        raise ValueError(f"its model_type is {model_type!r}, expected {OPTSGConfig.model_type!r}")
    processor = OPTSGProcessor.from_pretrained(name)
    model, loading = OPTSGForTagGeneration.from_pretrained(name, output_loading_info=True)
    if missing := loading["missing_keys"]:
        raise ValueError(f"{len(missing)} weights are missing, such as {sorted(missing)[0]}")
    check_model(name, model, processor)
    if num_frames is not None:
        if num_frames > model.config.max_frames:
            raise ValueError(f"--frames {num_frames} is more than the {model.config.max_frames} that the model takes")
        processor.num_frames = num_frames
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.prepare_for_inference(), processor


def load_processor(name: str) -> "OPTSGProcessor":
    """Load the processor of a model, without the model. See [`load_model`]."""
    from modeling_optsg import OPTSGProcessor

    _prepare_loading(name)
    return OPTSGProcessor.from_pretrained(name)


def _prepare_loading(name: str) -> None:
    """Check that a name can be that of a checkpoint, and make `transformers` quiet."""
    import transformers

    _check_name(name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError("the folder has no config.json, so it is not a checkpoint")


def _check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise FileNotFoundError("there is no such folder, and a name on the Hub has the form org/name") from error
