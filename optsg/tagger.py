"""The model behind `optsg tag`: loading it, naming it, and asking it for the tags that are wanted."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from .media_files import MediaFile
from .sidecars.ownership import key


@dataclass(frozen=True)
class TagSettings:
    """What is asked of the model; `None` leaves a setting to it.

    Args:
        frames: of each video.
        exclude: tags never to give, whatever their letter case.
        vocabulary: the only tags to give.
    """

    threshold: float | None = None
    max_tags: int | None = None
    decoding: str | None = None
    frames: int | None = None
    exclude: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()


class Tagger:
    """Loads a model and tags batches of files with it.

    Args:
        name: a folder or a name on the Hub.

    Raises:
        Exception: of any kind, if there is no such model, it is damaged, or it cannot be used with the settings.
    """

    def __init__(self, name: str, settings: TagSettings):
        self.model, self.processor = _load(name, settings.frames)
        self.excluded = {key(tag) for tag in settings.exclude}
        own = {"threshold": settings.threshold, "max_tags": settings.max_tags, "decoding": settings.decoding}
        self.generate_settings = {name: value for name, value in own.items() if value is not None}
        self.most = None
        if self.excluded:
            # What is excluded must not take a place from what is not.
            self.most = settings.max_tags or getattr(self.model.generation_config, "max_tags", None)
            self.generate_settings["max_tags"] = 2**31
        if settings.vocabulary:
            from modeling_optsg.generation_optsg import TagVocabularyLogitsProcessor

            tags = sorted(settings.vocabulary)
            vocabulary = TagVocabularyLogitsProcessor.of_tags(tags, self.processor, self.model.config)
            self.generate_settings["tag_vocabulary"] = vocabulary

    def __call__(self, batch: list[MediaFile]) -> list[list[dict] | Exception]:
        """One outcome a file, in order: its tags, the most probable first, or why it has none."""
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
            # Halves, so that a bad file costs its neighbours neither their tags nor their company in a batch.
            half = len(batch) // 2
            return [outcome for part in (batch[:half], batch[half:]) for outcome in self(part)]
        outputs = self.model.generate(**inputs.to(self.model.device), **self.generate_settings)
        found = self.processor.batch_decode(outputs)
        return [[tag for tag in tags if key(tag["tag"]) not in self.excluded][: self.most] for tags in found]


def batches(files: list[MediaFile], size: int) -> Iterator[list[MediaFile]]:
    """Files in order, at most `size` at a time, images and videos apart: beside a video, an image would be padded to
    the video's frames and cost as much."""
    for _, run in groupby(files, key=lambda file: file.is_video):
        run = list(run)
        yield from (run[start : start + size] for start in range(0, len(run), size))


class Stamps:
    """Gives every file a text that changes with the model, the settings, the file's content and its title.

    Args:
        model: a folder or a name on the Hub.

    Raises:
        Exception: of any kind, if there is no such model.
    """

    def __init__(self, model: str, settings: TagSettings):
        own = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in asdict(settings).items()}
        self.run = json.dumps([_identity(model), own])

    def __call__(self, file: MediaFile) -> str:
        # Size and time instead of content: that a file is done must cost less than reading it.
        try:
            status = os.stat(file.path)
            content = [status.st_size, status.st_mtime_ns]
        except OSError:
            content = None
        return hashlib.sha256(json.dumps([self.run, content, file.title]).encode()).hexdigest()[:32]


def _identity(name: str) -> str:
    """A digest of what is in a model's folder, or the commit of a model on the Hub."""
    if not Path(name).is_dir():
        from modeling_optsg import OPTSGConfig

        return OPTSGConfig.get_config_dict(name)[0].get("_commit_hash") or name
    digest = hashlib.sha256()
    for path in sorted(Path(name).rglob("*")):
        if path.suffix in {".json", ".safetensors", ".txt", ".model", ".npz"} and path.is_file():
            digest.update(path.relative_to(name).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _load(name: str, num_frames: int | None):
    import torch
    import transformers
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor

    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise FileNotFoundError("there is no such folder, and a Hub name has the form org/name") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_type = OPTSGConfig.get_config_dict(name)[0].get("model_type")
    if model_type != OPTSGConfig.model_type:
        raise ValueError(f"its model_type is {model_type!r}, expected {OPTSGConfig.model_type!r}")
    processor = OPTSGProcessor.from_pretrained(name)
    model, loading = OPTSGForTagGeneration.from_pretrained(name, output_loading_info=True)
    if missing := loading["missing_keys"]:
        raise ValueError(f"{len(missing)} of its weights are missing, {sorted(missing)[0]} among them")
    if num_frames is not None:
        if num_frames > model.config.max_frames:
            raise ValueError(f"it looks at no more than {model.config.max_frames} frames, --frames is {num_frames}")
        processor.num_frames = num_frames
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, processor
