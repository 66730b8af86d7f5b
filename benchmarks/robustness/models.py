"""Checks that `optsg tag` refuses damaged model folders before it changes anything."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .byte_damage import BYTE_DAMAGES
from .jobs import make
from .results import Result, Workplace, choose, read_tags, result

WEIGHTS_FILE = "model.safetensors"
ODD_VALUES = (
    None, -1, 2**31, 10**30, "text", [], {}, [[]], float("nan"), float("inf"), "", [-1], {"a": 1}, "\0",
)  # fmt: skip
# Values of generation settings that are out of range.
GENERATION_VALUES = {
    "threshold": (1.6, -0.1, "high", float("nan"), [], {"image": 2}, {"x": 0.1}),
    "fusion_weights": ([1.0], [float("nan")] * 5, "text", {"image": [0.0] * 5}, [None] * 5, {}, 5, [1e999] * 5),
    "num_candidates": (-1, 1.5, "many", 10**9, []),
    "pad_bias": ("text", float("inf"), float("nan"), [], {"x": 1}),
    "num_beams": (0, -1, 10**9, "five", 1.5, []),
    "max_tags": (0, -5, "all", 0.5, []),
    "decoding": ("backwards", 5, [], {}),
    "num_return_sequences": (0, 50, "x", []),
    "logit_adjustment": ("x", float("nan"), []),
    "min_beam_probability": (1.0, -1, "x", float("nan")),
}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _json_files(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if path.suffix == ".json"]


def missing_file(folder: Path, rng: random.Random) -> str:
    """Delete a file."""
    path = rng.choice(_files(folder))
    path.unlink()
    return path.name


def damaged_bytes(folder: Path, rng: random.Random) -> str:
    """Damage the bytes of a file other than the weights. Other valid JSON would be another valid model."""
    path = rng.choice(_json_files(folder))
    data = path.read_bytes()
    while True:
        damaged = rng.choice(list(BYTE_DAMAGES.values()))(data, rng)
        try:
            json.loads(damaged)
        except (ValueError, RecursionError):
            path.write_bytes(damaged)
            return path.name


def other_json(folder: Path, rng: random.Random) -> str:
    """Replace a JSON file by other JSON."""
    path = rng.choice(_json_files(folder))
    texts = ("{}", "[]", "null", "5", '"text"', "[" * 100_000, '{"a": ' * 5000, "NaN", "{}{}", "\ufeff{}")
    path.write_text(rng.choice(texts), encoding="utf-8")
    return path.name


def odd_value(folder: Path, rng: random.Random) -> str:
    """Change a value of a JSON file to one of another type or out of range."""
    path = rng.choice([path for path in _json_files(folder) if path.name != "generation_config.json"])
    content = json.loads(path.read_text(encoding="utf-8"))
    parent, key = rng.choice(list(_places(content)))
    value = rng.choice(ODD_VALUES)
    parent[key] = value
    path.write_text(json.dumps(content, allow_nan=True), encoding="utf-8")
    return f"{path.name} {key}={value!r}"


def missing_key(folder: Path, rng: random.Random) -> str:
    """Delete a key of a JSON file."""
    path = rng.choice(_json_files(folder))
    content = json.loads(path.read_text(encoding="utf-8"))
    parent, key = rng.choice(list(_places(content)))
    del parent[key]
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    return f"{path.name} without {key}"


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Return the containers and keys of all values, at most 5 of each list."""
    keys = content if isinstance(content, dict) else range(min(len(content), 5)) if isinstance(content, list) else ()
    own = [(content, key) for key in keys]
    return own + [place for _, key in own for place in _places(content[key])]


def generation_value(folder: Path, rng: random.Random) -> str:
    """Change a generation setting to a value that is out of range."""
    path = folder / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    name = rng.choice(list(GENERATION_VALUES))
    content[name] = rng.choice(GENERATION_VALUES[name])
    path.write_text(json.dumps(content, allow_nan=True), encoding="utf-8")
    return f"{name}={content[name]!r}"


def weights_bytes(folder: Path, rng: random.Random) -> str:
    """Damage the structure of the file of weights: its length, its header or its order."""
    path = folder / WEIGHTS_FILE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        data = rng.choice((0, 1, size - 1, size + 1, 2**40, 2**64 - 1)).to_bytes(8, "little") + header + body
    elif kind == 2:
        data = data[:8] + rng.choice((b"{", b"[]", b"null", b"{}", b"\xff")).ljust(size) + body
    elif kind == 3:
        data = data[:8] + header.replace(b'"F32"', rng.choice((b'"F64"', b'"I64"', b'"XXX"', b'"I32"'))) + body
    elif kind == 4:
        data = data[: 8 + size] + body + rng.randbytes(100)
    elif kind == 5:
        start = header.index(b"data_offsets") + 15
        data = data[:8] + header[:start] + b"9" + header[start + 1 :] + body
    elif kind == 6:
        data = b""
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        data = rng.choice((b"PK\3\4" + data, pointer, bytes(99)))
    path.write_bytes(data)
    return path.name


def weights_values(folder: Path, rng: random.Random) -> str:
    """Give a tensor NaN, inf, another shape or another type, or leave it out."""
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    name = rng.choice(sorted(name for name, tensor in tensors.items() if tensor.is_floating_point()))
    tensor = tensors[name].clone()
    kind = rng.choice(("nan", "one nan", "inf", "shape", "transposed", "missing", "empty", "integers", "renamed"))
    if kind == "nan":
        tensor = torch.full_like(tensor, math.nan)
    elif kind in ("one nan", "inf"):
        tensor.view(-1)[rng.randrange(tensor.numel())] = math.nan if kind == "one nan" else math.inf
    elif kind == "shape":
        tensor = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
    elif kind == "transposed":
        tensor = tensor[None].contiguous()
    elif kind == "empty":
        tensor = tensor[:0].contiguous()
    elif kind == "integers":
        tensor = tensor.to(torch.bool)
    if kind in ("missing", "renamed"):
        del tensors[name]
    if kind != "missing":
        tensors[f"{name}_" if kind == "renamed" else name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name} {kind}"


def not_a_file(folder: Path, rng: random.Random) -> str:
    """Replace a file by a folder, or by a link to nothing or to itself."""
    path = rng.choice(_files(folder))
    path.unlink()
    kind = rng.choice(("folder", "broken link", "loop"))
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere" if kind == "broken link" else path.name)
    return f"{path.name} {kind}"


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "missing file": missing_file,
    "damaged bytes": damaged_bytes,
    "other JSON": other_json,
    "odd value": odd_value,
    "missing key": missing_key,
    "generation setting out of range": generation_value,
    "weights file": weights_bytes,
    "weights": weights_values,
    "not a file": not_a_file,
}
WEIGHTS = {"odd value": 3, "other JSON": 2, "damaged bytes": 2, "weights": 2, "generation setting out of range": 3}


def check_model(workplace: Workplace, seed: int) -> Result:
    """Tag a folder, which the undamaged model has tagged, with the damaged model of a seed."""
    damage = choose(DAMAGES, seed, WEIGHTS)
    model, folder = workplace.folder / f"model-{seed}", workplace.folder / f"images-{seed}"
    shutil.copytree(workplace.model, model)
    detail = make(lambda: DAMAGES[damage](model, random.Random(f"models {seed}")))
    shutil.copytree(workplace.tagged, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    job = workplace.tag("--json", "--write", "json", folder, model=model)
    tags = {Path(name).name: found for name, found in read_tags(job).items()}
    if job.status == 2:
        is_unchanged = before == {path.name: path.read_bytes() for path in folder.iterdir()}
        outcome = "refused" if is_unchanged else "changed files"
        if model.name not in job.errors:
            outcome = "not named"
    elif job.status == 0:
        # Files that are tagged by this model already are not tagged again.
        is_done = not any(tags.values()) and job.output.count('"done": true') == len(tags)
        outcome = "same tags" if is_done or tags == workplace.tags else "other result"
    else:
        outcome = "not refused"
    for path in (model, folder):
        shutil.rmtree(path)
    return result("models", seed, f"{damage}: {detail}"[:120], outcome, job)
