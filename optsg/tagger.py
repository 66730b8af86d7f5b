"""Loads the model of `optsg tag`, tags batches of files with it, and computes fingerprints."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .media_files import MediaFile
from .sidecars.reconciliation import tag_key

if TYPE_CHECKING:
    from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor

MODEL_FILE_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".npz"}
NO_LIMIT = 2**31


@dataclass(frozen=True)
class TagSettings:
    """Generation settings. `None` stands for the setting of the model.

    Args:
        threshold: Minimum probability of a tag. If `None`, an image that is tagged by its image words gets its five
            most probable tags.
        max_tags: Maximum number of tags per file.
        decoding: "parallel" or "sequential".
        frames: Number of frames to read from each video.
        exclude: Tags to leave out, ignoring letter case.
        vocabulary: Tags that may be generated. If empty, all tags may be generated.
    """

    threshold: float | None = None
    max_tags: int | None = None
    decoding: str | None = None
    frames: int | None = None
    exclude: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FileTags:
    """Predictions for one file.

    Args:
        tags: Tags as `OPTSGProcessor.batch_decode` returns them, most probable first.
        image_words: Image words of the file, `{"word": str, "score": float}`, most probable first.
    """

    tags: list[dict]
    image_words: list[dict]


class Tagger:
    """Loads a model and tags batches of files with it.

    Args:
        name: A folder or a name on the Hub.
        settings: Settings of the generation.

    Raises:
        Exception: There is no such model, it is damaged, or it does not support the settings. The libraries raise
            exceptions of many types.
    """

    def __init__(self, name: str, settings: TagSettings):
        self.model, self.processor = _load(name, settings.frames)
        self.excluded = {tag_key(tag) for tag in settings.exclude}
        options = {"threshold": settings.threshold, "max_tags": settings.max_tags, "decoding": settings.decoding}
        self.generate_options: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        self.max_tags = self.max_word_tags = None
        if self.excluded:
            # Limits are applied after the exclusion, so that excluded tags do not count.
            self.max_tags = settings.max_tags or getattr(self.model.generation_config, "max_tags", None)
            self.generate_options["max_tags"] = NO_LIMIT
            if settings.threshold is None:
                self.max_word_tags = self.model.num_word_tags
        if settings.vocabulary:
            from modeling_optsg.tag_vocabulary import TagVocabularyLogitsProcessor

            self.generate_options["tag_vocabulary"] = TagVocabularyLogitsProcessor.from_tags(
                sorted(settings.vocabulary), self.processor, self.model.config
            )

    def __call__(self, batch: list[MediaFile]) -> list[FileTags | Exception]:
        """Tag a batch of files.

        Returns:
            For each file its tags, or the error from reading the file.
        """
        from modeling_optsg.generation_settings import IMAGE_WORDS
        from modeling_optsg.image_words import decode_image_words

        try:
            inputs = self.processor(
                images=[None if file.is_video else file.path for file in batch],
                videos=[file.path if file.is_video else None for file in batch],
                titles=[file.title for file in batch],
                return_tensors="pt",
            )
        except (ValueError, OSError, ImportError) as error:
            if len(batch) == 1:
                return [error]
            # Halving the batch finds the unreadable files and still tags the others in large batches.
            half = len(batch) // 2
            return self(batch[:half]) + self(batch[half:])
        outputs = self.model.generate(**inputs.to(self.model.device), **self.generate_options)
        tagged_by = outputs.tagged_by or [None] * len(batch)
        limits = [self.max_tags or (self.max_word_tags if name == IMAGE_WORDS else None) for name in tagged_by]
        decoded = [
            [tag for tag in tags if tag_key(tag["tag"]) not in self.excluded]
            for tags in self.processor.batch_decode(outputs)
        ]
        kept = [tags[:limit] for tags, limit in zip(decoded, limits, strict=True)]
        return [FileTags(*pair) for pair in zip(kept, decode_image_words(outputs, self.model.config), strict=True)]


def split_into_batches(files: list[MediaFile], size: int) -> Iterator[list[MediaFile]]:
    """Yield the files in order, in batches of images only or videos only.

    In a batch with videos, images would be padded to the same number of frames and take as long as a video.

    Args:
        files: The files to tag.
        size: Maximum number of files in a batch.
    """
    for _, group in groupby(files, key=lambda file: file.is_video):
        group = list(group)
        yield from (group[start : start + size] for start in range(0, len(group), size))


class Fingerprinter:
    """Computes a fingerprint of each file, which depends on the model, the settings, the file and its title.

    Args:
        model: A folder or a name on the Hub.
        settings: Settings of the generation.

    Raises:
        Exception: There is no such model. The libraries raise exceptions of many types.
    """

    def __init__(self, model: str, settings: TagSettings):
        values = {
            name: sorted(value) if isinstance(value, frozenset) else value for name, value in asdict(settings).items()
        }
        self.run = json.dumps([_identify_model(model), values])

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
        if path.suffix in MODEL_FILE_SUFFIXES and path.is_file():
            digest.update(path.relative_to(name).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _load(name: str, num_frames: int | None) -> tuple["OPTSGForTagGeneration", "OPTSGProcessor"]:
    import torch
    import transformers

    from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor

    _check_name(name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError("the folder has no config.json, so it is not a checkpoint")
    model_type = OPTSGConfig.get_config_dict(name)[0].get("model_type")
    if model_type != OPTSGConfig.model_type:
        raise ValueError(f"its model_type is {model_type!r}, expected {OPTSGConfig.model_type!r}")
    processor = OPTSGProcessor.from_pretrained(name)
    model, loading = OPTSGForTagGeneration.from_pretrained(name, output_loading_info=True)
    if missing := loading["missing_keys"]:
        raise ValueError(f"{len(missing)} weights are missing, such as {sorted(missing)[0]}")
    if num_frames is not None:
        if num_frames > model.config.max_frames:
            raise ValueError(f"--frames {num_frames} is more than the {model.config.max_frames} that the model takes")
        processor.num_frames = num_frames
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, processor


def _check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise FileNotFoundError("there is no such folder, and a name on the Hub has the form org/name") from error
