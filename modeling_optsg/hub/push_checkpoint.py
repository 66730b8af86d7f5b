"""Publish the folder of a checkpoint as a model on the Hub, together with the model code."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers.dynamic_module_utils import custom_object_save

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.book import encoder_fingerprint, load_pretrained_book
from modeling_optsg.book.book_files import EXAMPLES_NAME, INDEX_FOLDER
from modeling_optsg.data.training_summary import SUMMARY
from modeling_optsg.pipeline_optsg import CUSTOM_PIPELINES, TagGenerationPipeline
from modeling_optsg.processing_optsg import OPTSGProcessor

from .checkpoint_checks import file_problems, link_problems, load_checkpoint, shorten_paths
from .commits import LocalFiles, PublishingError, PushResult, check_repo_id, push_files
from .model_card import PLACEHOLDER_NAME, write_training_card

logger = logging.getLogger(__name__)

# Inference Endpoints run `handler.py` after installing `requirements.txt`.
ENDPOINT_FILES = ("handler.py", "requirements.txt")
SUFFIXES = frozenset(".arrow .jinja .json .md .model .onnx .safetensors .svg".split())
# In any letter case: cameras write `.JPG`.
MEDIA_SUFFIXES = frozenset(".gif .jpeg .jpg .mp4 .png .webp".split())
NAMES = frozenset("LICENSE LICENSE.txt NOTICE handler.py merges.txt requirements.txt vocab.txt".split())
NAMES |= {EXAMPLES_NAME}
OTHER_FOLDERS = {"state": "training state", "__pycache__": "cache"}
# Weights from an earlier push with another number of shards would be loaded instead of the new ones, and a book from
# an earlier push may belong to other towers.
REPLACED = ("*.safetensors", "*.safetensors.index.json", f"{INDEX_FOLDER}/*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is ready to be published.

    Args:
        files: The files to publish.
        left_out: Files and folders that are not published, with the reason.
        shortened_paths: Local paths in `training_summary.json`. Only their last parts are published.
    """

    files: LocalFiles
    left_out: dict[str, str]
    shortened_paths: list[str]


def push_checkpoint(
    folder: str | os.PathLike | Checkpoint,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> PushResult:
    """Publish a checkpoint as the Hub model `repo_id`, in one commit.

    Args:
        folder: Folder of a checkpoint with the files of `save_pretrained` of model and processor and a model card, or
            the result of [`read_checkpoint`].
        repo_id: `org/name`, created if necessary.
        private: Create the repository as private. An existing repository must be private.
        revision: Branch, created if necessary; main by default.
        create_pr: Open a pull request on an existing repository instead.
        commit_message: Title of the commit or pull request.

    Raises:
        ValueError: The folder is incomplete or the name is invalid. No request was sent.
        PublishingError: The Hub cannot be reached or rejects the push, or a local file changed during the upload.
    """
    check_repo_id(repo_id)
    checkpoint = folder if isinstance(folder, Checkpoint) else read_checkpoint(folder)
    # Replaces the placeholder in a card that was written before the model had a name on the Hub.
    card = checkpoint.files.contents["README.md"].replace(f'"{PLACEHOLDER_NAME}"'.encode(), f'"{repo_id}"'.encode())
    return push_files(
        checkpoint.files.with_contents({"README.md": card}),
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload model, processor and code",
        delete_patterns=REPLACED,
    )


def push_trained(
    folder: str | os.PathLike, repo_id: str, *, private: bool = False, revision: str | None = None
) -> str | None:
    """Publish the checkpoint of a finished training run. If it has no model card, one is written first.

    A failure is logged together with a command to try again. No error is raised, because the training has finished.

    Args:
        folder: Output folder of the training run.
        repo_id: `org/name`, created if necessary.
        private: Create the repository as private.
        revision: Branch, created if necessary; main by default.

    Returns:
        The URL of the commit, or `None` if publishing failed.
    """
    folder = Path(folder)
    try:
        if not (folder / "README.md").is_file():
            write_training_card(folder, repo_id)
        result = push_checkpoint(
            folder, repo_id, private=private, revision=revision, commit_message="Training finished"
        )
    except (PublishingError, ValueError, OSError) as error:
        command = f"optsg push {folder} {repo_id}"
        command += (" --private" if private else "") + (f" --revision {revision}" if revision else "")
        logger.warning(f"Training has finished, but publishing failed: {error}. To try again: {command}")
        return None
    logger.info(f"Published: {result.url}")
    return result.url


def read_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Choose the files of a folder to publish, check them, and add the model code.

    Weights, configurations, the files of the processor, the card with its images, a licence, the training summary, the
    book in the folder `index` and the adapters in `adapter` are published. Training states, logs, hidden files and all
    other files are left out. The remote code is always that of this package, with which the folder is loaded for the
    check. The same is true of `handler.py` and `requirements.txt`, unless the folder has its own. The folder is not
    changed.

    Args:
        folder: Folder with the files of `save_pretrained` of model and processor, and a model card.

    Raises:
        ValueError: A file is missing or damaged, is a link, or contains a token or a local path. The message lists all
            problems.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths, left_out = _choose_files(folder)
    # Before any file is read: a link may lead to a device that never ends.
    problems = link_problems(paths, folder) or file_problems(paths)
    try:
        if problems:
            # Loading would report the same problems less clearly.
            raise ValueError("; ".join(problems))
        model, processor = load_checkpoint(folder)
        if (folder / INDEX_FOLDER).is_dir():
            load_pretrained_book(folder, encoder_fingerprint(model, processor))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder} cannot be published: {error}") from error
    contents = _remote_code(model, processor, paths)
    for path in sorted(folder.glob("*.py")):
        if path.name not in paths and path.read_bytes() != contents.get(path.name):
            left_out[path.name] = (
                "the installed package's version is published" if path.name in contents else "not code of this model"
            )
    shortened: set[str] = set()
    if SUMMARY in paths:
        summary = shorten_paths(json.loads(paths[SUMMARY].read_text(encoding="utf-8")), shortened)
        if shortened:
            contents[SUMMARY] = (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode()
    return Checkpoint(LocalFiles(paths, contents), left_out, sorted(shortened))


def _choose_files(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the paths of the files to publish by their names, and the reasons why others are left out."""
    chosen, left_out = {}, {}
    for parent, folders, names in os.walk(folder):
        parent = Path(parent)
        inside = parent.relative_to(folder)
        for name in sorted(folders):
            if reason := _folder_reason(parent / name):
                left_out[f"{(inside / name).as_posix()}/"] = reason
                folders.remove(name)
        for name in sorted(names):
            path = parent / name
            if name.startswith("."):
                left_out[(inside / name).as_posix()] = "hidden"
            elif path.suffix in SUFFIXES or path.suffix.lower() in MEDIA_SUFFIXES or name in NAMES:
                chosen[(inside / name).as_posix()] = path
            elif path.suffix != ".py" or parent != folder:
                left_out[(inside / name).as_posix()] = "not a file of a model"
    for name in ENDPOINT_FILES:
        chosen.setdefault(name, Path(__file__).with_name(name))
    return chosen, left_out


def _folder_reason(path: Path) -> str | None:
    """Return why a folder inside a checkpoint is left out, or None if it belongs to the checkpoint."""
    if path.name in OTHER_FOLDERS:
        return OTHER_FOLDERS[path.name]
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink():
        return "link to another folder"
    return "another checkpoint" if (path / "config.json").is_file() else None


def _remote_code(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, paths: Mapping[str, Path]
) -> dict[str, bytes]:
    """Return the code files for `trust_remote_code=True`, and the JSON files that refer to them.

    The code of the pipeline is left out for baselines, because they import this package, which registers the pipeline.
    """
    saved = {
        name: json.loads(paths[name].read_text(encoding="utf-8")) for name in ("config.json", "processor_config.json")
    }
    settings = {name: values | {"auto_map": {}} for name, values in saved.items()}
    with tempfile.TemporaryDirectory() as folder:
        custom_object_save(model.config, folder, config=settings["config.json"])
        custom_object_save(model, folder, config=settings["config.json"])
        custom_object_save(processor, folder, config=settings["processor_config.json"])
        contents = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    settings["config.json"].pop("custom_pipelines", None)
    if f"{TagGenerationPipeline.__module__.rpartition('.')[2]}.py" in contents:
        settings["config.json"]["custom_pipelines"] = CUSTOM_PIPELINES
    for name, values in settings.items():
        if values != saved[name]:
            contents[name] = (
                json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
            ).encode()
    return contents
