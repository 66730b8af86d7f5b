"""Low-rank adapters (LoRA) of the towers, with `peft`. Saved checkpoints have merged weights."""

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.efficientnet_lite import SameConv2d
from modeling_optsg.towers import HALVES

from .processes import full_state_dict

# Folder of the adapters in that of the checkpoint, with a folder for each tower.
ADAPTER_FOLDER = "adapter"
# The name that `peft` gives to an adapter.
DEFAULT = "default"
# Exact classes: others, such as the output layer of `nn.MultiheadAttention`, may use their weights in their own way.
LINEAR_LAYERS = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv2d, SameConv2d)

# Config and weights of an adapter, by the name of its tower.
AdapterStates = dict[str, tuple[Any, dict[str, torch.Tensor]]]


def adaptable_layers(tower: PreTrainedModel) -> list[str]:
    """Return the names of the layers of a tower that are trained and can have adapters.

    These are all linear layers, or in a tower without any, the convolutions that are neither grouped nor dilated.
    """
    trained = {
        name: module
        for name, module in tower.named_modules()
        # The pooled output of a tower is not used.
        if type(module) in LINEAR_LAYERS + CONVOLUTIONS and module.weight.requires_grad and "pooler" not in name
    }
    linear = [name for name, module in trained.items() if type(module) in LINEAR_LAYERS]
    return linear or [name for name, conv in trained.items() if conv.groups == 1 and set(conv.dilation) == {1}]


def check_adapters(model: OPTSGPreTrainedModel) -> None:
    """Check that each tower that is trained can have adapters.

    Raises:
        ImportError: `peft` is not installed.
        ValueError: A tower has no layers to adapt, or no tower is trained. The message names it.
    """
    if find_spec("peft") is None:
        raise ImportError('--lora_rank needs peft: pip install "optsg[lora]"')
    towers = [(name, tower) for name, tower in _towers(model) if any(p.requires_grad for p in tower.parameters())]
    if not towers:
        raise ValueError("--lora_rank: no tower is trained.")
    for name, tower in towers:
        if not adaptable_layers(tower):
            raise ValueError(
                f"--lora_rank: the {name.replace('_', ' ')} ({tower.config.model_type}) has no layers to adapt. They "
                "must be linear layers, or convolutions that are neither grouped nor dilated. Train its weights, "
                "without --lora_rank."
            )


def add_adapters(model: OPTSGPreTrainedModel, rank: int, seed: int) -> None:
    """Add adapters to the trained layers of the towers, and freeze the weights of these towers.

    Args:
        model: The model. [`check_adapters`] has checked it.
        rank: Rank of the adapters.
        seed: Seed of their initial weights. They do not change the output yet.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # Every process makes the same adapters, and the random state of the training does not depend on them.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, tower in _towers(model):
            if layers := adaptable_layers(tower):
                is_transposed = type(tower.get_submodule(layers[0])) is Conv1D
                config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, fan_in_fan_out=is_transposed)
                # Not `tower.add_adapter`, for which the library asks for a newer version.
                inject_adapter_in_model(config, tower)


def copy_adapters(model: OPTSGPreTrainedModel, other: OPTSGPreTrainedModel) -> None:
    """Add adapters like those of a model to another model without adapters. Their weights are not copied."""
    for name, tower in _adapted_towers(model):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(copy.deepcopy(tower.peft_config[DEFAULT]), getattr(other.model, name))


def merge_adapters(model: OPTSGPreTrainedModel) -> None:
    """Add the adapters of a model to the weights of its towers, and remove them."""
    for _, tower in _adapted_towers(model):
        for name, module in list(tower.named_modules()):
            if hasattr(module, "lora_A"):
                module.merge()
                tower.set_submodule(name, module.get_base_layer())
        del tower.peft_config


def adapter_states(model: OPTSGPreTrainedModel) -> AdapterStates:
    """Return config and weights of a model's adapters. All processes call this."""
    states = {}
    for name, tower in _adapted_towers(model):
        config = copy.deepcopy(tower.peft_config[DEFAULT])
        # A local path would be published.
        config.base_model_name_or_path, config.inference_mode = None, True
        weights = {key: tensor for key, tensor in full_state_dict(tower).items() if ".lora_" in key}
        states[name] = config, {key.replace(f".{DEFAULT}.", "."): tensor for key, tensor in weights.items()}
    return states


def save_adapters(adapters: AdapterStates, folder: Path) -> None:
    """Save adapters in the format of `peft`, each in a folder with the name of its tower."""
    for name, (config, weights) in adapters.items():
        path = folder / ADAPTER_FOLDER / name
        path.mkdir(parents=True)
        config.save_pretrained(str(path))
        # `peft` names all weights as parts of its own model.
        weights = {f"base_model.model.{key}": tensor.cpu().contiguous() for key, tensor in weights.items()}
        save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})


def _towers(model: OPTSGPreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    for half in HALVES:
        if (tower := getattr(model.model, f"{half}_tower")) is not None:
            yield f"{half}_tower", tower


def _adapted_towers(model: OPTSGPreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    return ((name, tower) for name, tower in _towers(model) if hasattr(tower, "peft_config"))
