"""Find what would make a published checkpoint unusable, or reveal something private, before anything is uploaded."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.training_summary import SUMMARY
from modeling_optsg.processing_optsg import OPTSGProcessor

REQUIRED = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "label_vocabulary.json",
    "tag_tokenizer/tokenizer.json",
    "README.md",
)
# Without one of these, transformers silently makes a tokenizer with an empty vocabulary.
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
# Tags and tokens may look like paths.
WORD_LISTS = frozenset("tokenizer.json label_vocabulary.json vocab.json".split())
MACHINE_PATH = re.compile(r"(?:~|[A-Za-z]:)?(?:[/\\][^/\\\n]+){2,}[/\\]?")
# A path inside a longer text: it ends at a space, and neither `org/name` nor a web address is one.
MACHINE_PATH_INSIDE = re.compile(r"(?<![\w./:~-])(?:~|[A-Za-z]:)?(?:[/\\][^/\\\s\"'<>|]+){2,}[/\\]?")
# Secrets by their kind.
_SECRETS = {
    "a Hub token": rb"(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}",
    "an AWS key": rb"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "a Google API key": rb"AIza[A-Za-z0-9_-]{35}",
    "an API key": rb"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{40,}",
    "a Slack token": rb"xox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
TOKENS = {kind: re.compile(rb"(?<![A-Za-z0-9_])(?:" + pattern + rb")") for kind, pattern in _SECRETS.items()}
# Formats without text. All other files are searched for tokens.
WITHOUT_TEXT = frozenset(".safetensors .onnx .gif .jpeg .jpg .png .webp .mp4".split())
# Files are searched in pieces that overlap by more than the length of a token.
PIECE, OVERLAP = 1 << 22, 1 << 10
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys, where other readers take either one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := sorted({str(key) for key in keys if keys.count(key) > 1}):
            message = f"{', '.join(repeated)} is repeated"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_mapping(node, deep)


def file_problems(paths: Mapping[str, Path]) -> list[str]:
    """Check a checkpoint's files without loading the model.

    Args:
        paths: Local paths by file name in the repository.

    Returns:
        One message per problem.
    """
    problems = [f"{name} is missing" for name in REQUIRED if name not in paths]
    if not any(name in paths for name in TOKENIZERS):
        problems.append(f"{TOKENIZERS[0]} is missing")
    problems += _json_problems(paths)
    if "README.md" in paths:
        problems += _card_problems(paths["README.md"], paths)
    return problems + _weight_problems(paths) + _private_data_problems(paths)


def load_checkpoint(folder: Path) -> tuple[OPTSGPreTrainedModel, OPTSGProcessor]:
    """Load a checkpoint with the classes of this package.

    Raises:
        ValueError: The model type is unknown, loading fails, or weights are missing or unexpected.
    """
    models = {spec.model.config_class.model_type: spec.model for spec in MODEL_TYPES.values()}
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type not in models:
        raise ValueError(f"config.json: model_type is {model_type!r}, expected one of {', '.join(models)}")
    try:
        processor = OPTSGProcessor.from_pretrained(folder)
        model, loading = models[model_type].from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # the libraries raise anything from KeyError to SafetensorError on a damaged folder
        raise ValueError(f"loading fails ({' '.join(f'{type(error).__name__}: {error}'.split())})") from error
    # `from_pretrained` of these classes raises for weights of another shape.
    kinds = {"missing_keys": "are missing", "unexpected_keys": "are not part of the model"}
    problems = [
        f"{len(keys)} weights {problem}, such as {min(keys)}"
        for kind, problem in kinds.items()
        if (keys := loading[kind])
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return model, processor


def shorten_paths(settings: Any, found: set[str]) -> Any:
    """Return a copy of a JSON value in which only the last part of each path of this machine is left.

    Args:
        settings: The JSON value.
        found: Receives the full paths.
    """

    def shorten(path: re.Match) -> str:
        found.add(path[0])
        return re.split(r"[/\\]", path[0].rstrip("/\\"))[-1]

    return _replace_paths(settings, shorten)


def _replace_paths(settings: Any, replace: Callable[[re.Match], str]) -> Any:
    if isinstance(settings, dict):
        return {key: _replace_paths(value, replace) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_replace_paths(value, replace) for value in settings]
    if isinstance(settings, str):
        whole = MACHINE_PATH.fullmatch(settings)
        return replace(whole) if whole else MACHINE_PATH_INSIDE.sub(replace, settings)
    return settings


def _json_problems(paths: Mapping[str, Path]) -> list[str]:
    problems = []
    for name, path in paths.items():
        if path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                problems.append(f"{name} is not JSON ({error})")
    return problems


def link_problems(paths: Mapping[str, Path], folder: Path) -> list[str]:
    """Find files of a folder that are links, which may lead to any file of this machine, or not files at all.

    Args:
        paths: Local paths by file name in the repository.
        folder: The folder. Files outside it come from this package.

    Returns:
        One message per problem.
    """
    own = {name: path for name, path in paths.items() if path.is_relative_to(folder)}
    return [
        f"{name} is a link to {path.readlink()}; replace it with the file itself"
        if path.is_symlink()
        else f"{name} is not a regular file"
        for name, path in own.items()
        if path.is_symlink() or not path.is_file()
    ]


def _private_data_problems(paths: Mapping[str, Path]) -> list[str]:
    problems = []
    for name, path in paths.items():
        if path.suffix.lower() not in WITHOUT_TEXT:
            problems += [f"{name} contains {kind}" for kind in _find_tokens(path)]
        # The paths of the summary are shortened when it is published.
        if path.suffix == ".json" and path.name not in WORD_LISTS and name != SUMMARY:
            found: set[str] = set()
            with contextlib.suppress(ValueError):
                shorten_paths(json.loads(path.read_bytes()), found)
            problems += [f"{name} contains {machine_path}, a path of this machine" for machine_path in sorted(found)]
    return problems


def _find_tokens(path: Path) -> list[str]:
    """Return the kinds of tokens in a file, in UTF-8 or UTF-16."""
    kinds, overlap = set(), b""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            text = overlap + piece.replace(b"\0", b"")
            kinds |= {kind for kind, pattern in TOKENS.items() if kind not in kinds and pattern.search(text)}
            overlap = text[-OVERLAP:]
    return sorted(kinds)


def _card_problems(path: Path, paths: Mapping[str, Path]) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if not (found := FRONT_MATTER.match(text)):
        return ["README.md does not begin with metadata between two lines ---"]
    try:
        if not isinstance(metadata := yaml.load(found[1], _StrictLoader), dict) or not metadata:
            return ["README.md: the metadata is not a mapping"]
        ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        return [f"README.md: the metadata cannot be read ({' '.join(str(error).split())})"]
    widget = metadata.get("widget") or []
    if not isinstance(widget, list):
        return ["README.md: the widget is not a list"]
    sources = [example.get("src") for example in widget if isinstance(example, dict)]
    return [
        f"{source}, an image of README.md, is missing"
        for source in sources
        if isinstance(source, str) and "://" not in source and source not in paths
    ]


def _weight_problems(paths: Mapping[str, Path]) -> list[str]:
    problems = []
    weights = {name: path for name, path in paths.items() if path.suffix == ".safetensors"}
    index = paths.get(SAFE_WEIGHTS_INDEX_NAME)
    if SAFE_WEIGHTS_NAME not in weights and index is None:
        problems.append(f"{SAFE_WEIGHTS_NAME} is missing")
    for name, path in weights.items():
        try:
            with safe_open(path, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            problems.append(f"{name} is incomplete ({error})")
    if index is not None:
        with contextlib.suppress(ValueError):  # reported as a file that is not JSON
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            problems += [f"{shard}, a file of {index.name}, is missing" for shard in sorted(shards - weights.keys())]
    return problems
