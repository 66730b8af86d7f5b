"""A checkpoint's folder to the Hub: what of it is published, whether it is complete, and the upload."""

import ast
import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from .commits import TEXT_SUFFIXES, LocalFiles, Published, check_repo_id, push_files
from .model_card import ENDPOINT_FILES, NAMELESS

REQUIRED = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "label_vocabulary.json",
    "tag_tokenizer/tokenizer.json",
    "README.md",
)
# Without one of these the library makes a tokenizer that knows no word, and says nothing.
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
AUTO_CLASSES = {"config.json": ("AutoConfig", "AutoModel"), "processor_config.json": ("AutoProcessor",)}
SUFFIXES = frozenset(
    ".gif .jinja .jpeg .jpg .json .md .model .mp4 .onnx .png .py .safetensors .svg .webp .arrow".split()
)
NAMES = frozenset("LICENSE LICENSE.txt NOTICE merges.txt requirements.txt vocab.txt".split())
OTHER_FOLDERS = {"state": "state of the training", "__pycache__": "cache"}
SUMMARY = "training_summary.json"
# Weights of an earlier push in other shards would be loaded in place of these.
REPLACED = ("*.safetensors", "*.safetensors.index.json")
# Tags and tokens may look like anything.
WORD_LISTS = frozenset("tokenizer.json label_vocabulary.json vocab.json".split())
MACHINE_PATH = re.compile(r"(?:~|[A-Za-z]:)?(?:[/\\][^/\\\n]+){2,}[/\\]?")
# In a longer text, where a space ends it, and neither `org/name` nor an address is one.
MACHINE_PATH_INSIDE = re.compile(r"(?<![\w./:~-])(?:~|[A-Za-z]:)?(?:[/\\][^/\\\s\"'<>|]+){2,}[/\\]?")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which others take either."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Checkpoint:
    """What of a folder is published.

    Args:
        left_out: reasons by the names of files and folders that are not.
        shortened: paths of this computer that `training_summary.json` has; only their last parts are published.
    """

    files: LocalFiles
    left_out: dict[str, str]
    shortened: list[str]


def push_checkpoint(
    folder: str | os.PathLike | Checkpoint,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> Published:
    """Publishes a checkpoint as the Hub model `repo_id`, by one commit.

    Args:
        folder: as `save_pretrained` of model and processor leave it, and a model card; see [`read_checkpoint`].
        private: whether a new repository is; one that is there must be.
        revision: branch, made if it is not there; main if not given.
        create_pr: make a pull request instead, to a repository that is there.

    Raises:
        ValueError: the folder is not complete, or the name is malformed. The Hub was not asked.
        PublishingError: the Hub cannot be reached or refuses, or a file was changed on the way.
    """
    check_repo_id(repo_id)
    checkpoint = folder if isinstance(folder, Checkpoint) else read_checkpoint(folder)
    return push_files(
        _named(checkpoint.files, repo_id),
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload model, processor and code",
        replace=REPLACED,
    )


def read_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Chooses what of a folder is published and makes sure that whoever loads it can.

    Weights, configurations, the processor's files, the remote code that they name, the card with its images, a
    licence and the training's summary are published; the state of a training, logs, hidden files and everything else
    are left out.

    Raises:
        ValueError: a file is missing, torn or would tell of this computer; the message names all that is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    chosen, left_out, problems = _choose(folder)
    content, shortened = _shortened_summary(chosen)
    files = LocalFiles(chosen, {SUMMARY: content} if shortened else {})
    problems += [f"{name} is missing" for name in REQUIRED if name not in chosen]
    if not any(name in chosen for name in TOKENIZERS):
        problems.append(f"{TOKENIZERS[0]} is missing")
    if "README.md" in chosen:
        problems += _card_problems(chosen["README.md"], chosen)
    problems += _weight_problems(chosen)
    problems += _private_matters(chosen)
    # Of a folder with pieces missing, loading would only say the same in other words.
    problems = problems or _loading_problems(folder)
    if problems:
        raise ValueError(f"{folder} cannot be published: {'; '.join(problems)}")
    return Checkpoint(files, left_out, shortened)


def _choose(folder: Path) -> tuple[dict[str, Path], dict[str, str], list[str]]:
    """Paths of what is published by name, reasons for the rest, and what is wrong with the code."""
    chosen, left_out = {}, {}
    for parent, folders, names in os.walk(folder):
        parent = Path(parent)
        inside = parent.relative_to(folder)
        for name in sorted(folders):
            reason = OTHER_FOLDERS.get(name) or ("hidden" if name.startswith(".") else None)
            if reason is None and (parent / name).is_symlink():
                reason = "link to another folder"
            if reason is None and (parent / name / "config.json").is_file():
                reason = "another checkpoint"
            if reason is not None:
                left_out[f"{(inside / name).as_posix()}/"] = reason
                folders.remove(name)
        for name in sorted(names):
            path = parent / name
            if name.startswith("."):
                left_out[(inside / name).as_posix()] = "hidden"
            elif path.suffix in SUFFIXES or name in NAMES:
                chosen[(inside / name).as_posix()] = path
            else:
                left_out[(inside / name).as_posix()] = "no file of a model"
    code, problems = _remote_code(folder, chosen)
    for name in [name for name in chosen if name.endswith(".py") and name not in {*code, *ENDPOINT_FILES}]:
        left_out[name] = "no code of this model"
        del chosen[name]
    for name in ENDPOINT_FILES:
        # What Inference Endpoints look for; a card written by hand has none beside it.
        chosen.setdefault(name, Path(__file__).with_name(name))
    return chosen, left_out, problems


def _named(files: LocalFiles, repo_id: str) -> LocalFiles:
    """With the repository's name in a card that was made before there was one."""
    card = files.paths["README.md"].read_text(encoding="utf-8")
    named = card.replace(f'"{NAMELESS}"', f'"{repo_id}"')
    return files if named == card else LocalFiles(files.paths, {**files.replaced, "README.md": named.encode()})


def _remote_code(folder: Path, chosen: dict[str, Path]) -> tuple[set[str], list[str]]:
    """Names of the files that the configurations name and of those that these import, and what is missing."""
    problems, classes = [], []
    for name, path in chosen.items():
        if path.suffix != ".json" or name in WORD_LISTS:
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{name} is not JSON ({error})")
            continue
        classes += [(name, reference) for reference in _references(settings)]
        known = settings.get("auto_map", {}) if isinstance(settings, dict) else {}
        if lacking := [auto for auto in AUTO_CLASSES.get(name, ()) if auto not in known]:
            problems.append(f"{name} names no class for {', '.join(lacking)} in auto_map")
    code, waiting = set(), []
    for name, reference in classes:
        # Code of another repository is loaded from there.
        if "--" in reference:
            continue
        module, _, class_name = reference.rpartition(".")
        waiting.append((f"{module}.py", class_name, name))
    while waiting:
        module, class_name, wanted_by = waiting.pop()
        if not (folder / module).is_file():
            problems.append(f"{module} is missing, which {wanted_by} names")
            continue
        try:
            tree = ast.parse((folder / module).read_text(encoding="utf-8"))
        except SyntaxError as error:
            problems.append(f"{module} is not Python (line {error.lineno})")
            continue
        if class_name and not any(isinstance(n, ast.ClassDef) and n.name == class_name for n in tree.body):
            problems.append(f"{module} has no class {class_name}, which {wanted_by} names")
        if module not in code:
            code.add(module)
            waiting += [(f"{imported}.py", "", module) for imported in _relative_imports(tree)]
    return code, sorted(set(problems))


def _references(settings) -> list[str]:
    """`module.Class` of every `auto_map` and custom pipeline in a configuration."""
    if not isinstance(settings, dict):
        return []
    found = []
    for key, value in settings.items():
        if key == "auto_map" and isinstance(value, dict):
            for reference in value.values():
                found += [r for r in (reference if isinstance(reference, list) else [reference]) if r]
        elif key == "impl" and isinstance(value, str):
            found.append(value)
        else:
            found += _references(value)
    return found


def _relative_imports(tree: ast.AST) -> list[str]:
    """Modules beside it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found += [node.module] if node.module else [alias.name for alias in node.names]
    return found


def _shortened_summary(chosen: dict[str, Path]) -> tuple[bytes, list[str]]:
    """The training's summary without paths of this computer, and these. Nothing that loads a model reads it."""
    try:
        summary = json.loads(chosen[SUMMARY].read_text(encoding="utf-8"))
    except (KeyError, ValueError):
        return b"", []
    found = []

    def shorten(path: re.Match) -> str:
        found.append(path[0])
        return re.split(r"[/\\]", path[0].rstrip("/\\"))[-1]

    shortened = _with_paths(summary, shorten)
    return (json.dumps(shortened, indent=1) + "\n").encode(), sorted(set(found))


def _with_paths(settings, replace: Callable[[re.Match], str]):
    """A copy of a JSON value with what `replace` makes of each path of this computer."""
    if isinstance(settings, dict):
        return {key: _with_paths(value, replace) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_with_paths(value, replace) for value in settings]
    if isinstance(settings, str):
        whole = MACHINE_PATH.fullmatch(settings)
        return replace(whole) if whole else MACHINE_PATH_INSIDE.sub(replace, settings)
    return settings


def _private_matters(chosen: dict[str, Path]) -> list[str]:
    problems = []
    for name, path in chosen.items():
        if path.suffix not in TEXT_SUFFIXES:
            continue
        content = path.read_bytes()
        if TOKEN.search(content):
            problems.append(f"{name} holds a token of the Hub")
        if path.suffix == ".json" and path.name not in WORD_LISTS and name != SUMMARY:
            found = []
            with contextlib.suppress(ValueError):
                _with_paths(json.loads(content), lambda path, found=found: found.append(path[0]) or "")
            problems += [f"{name} names {path}, a path of this computer" for path in sorted(set(found))]
    return problems


def _card_problems(path: Path, chosen: dict[str, Path]) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if not (found := FRONT_MATTER.match(text)):
        return ["README.md does not begin with metadata between two lines ---"]
    try:
        if not isinstance(metadata := yaml.load(found[1], _StrictLoader), dict) or not metadata:
            return ["README.md: its metadata is no mapping"]
        ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        return [f"README.md: its metadata cannot be read ({' '.join(str(error).split())})"]
    shown = metadata.get("widget") or []
    if not isinstance(shown, list):
        return ["README.md: its widget is no list"]
    sources = [example.get("src") for example in shown if isinstance(example, dict)]
    return [
        f"{source} is missing, which README.md shows"
        for source in sources
        if isinstance(source, str) and "://" not in source and source not in chosen
    ]


def _weight_problems(chosen: dict[str, Path]) -> list[str]:
    problems = []
    weights = {name: path for name, path in chosen.items() if path.suffix == ".safetensors"}
    index = chosen.get("model.safetensors.index.json")
    if "model.safetensors" not in weights and index is None:
        problems.append("model.safetensors is missing")
    for name, path in weights.items():
        try:
            with safe_open(path, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            problems.append(f"{name} is not whole ({error})")
    if index is not None:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        problems += [f"{shard} is missing, which {index.name} names" for shard in sorted(shards - weights.keys())]
    return problems


def _loading_problems(folder: Path) -> list[str]:
    from modeling_optsg import OPTSGProcessor
    from modeling_optsg.baselines.registry import MODEL_TYPES

    models = {system.model.config_class.model_type: system.model for system in MODEL_TYPES.values()}
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type not in models:
        return [f"config.json: model_type is {model_type!r}, expected one of {', '.join(models)}"]
    try:
        OPTSGProcessor.from_pretrained(folder)
        _, loading = models[model_type].from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # the libraries raise anything from KeyError to SafetensorError on a damaged folder
        return [f"it cannot be loaded ({' '.join(f'{type(error).__name__}: {error}'.split())})"]
    kinds = {"missing_keys": "are missing", "unexpected_keys": "belong to no part", "mismatched_keys": "do not fit"}
    return [
        f"{len(keys)} weights {what}, {min(map(str, keys))} among them"
        for kind, what in kinds.items()
        if (keys := loading[kind])
    ]
