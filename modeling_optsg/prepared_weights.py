"""Memory layouts of weights that are faster for inference on a CPU."""

import torch
from torch import nn

from .efficientnet_lite import ConvNormAct


@torch.no_grad()
def prepare_weights(model: nn.Module) -> list[tuple[nn.Linear, nn.Parameter]]:
    """Transpose the 32-bit weights of linear layers in memory, and fold batch normalisation into convolutions.

    Shapes and values stay the same. Matrix libraries of CPUs multiply few rows faster by a transposed weight. A weight
    that is also that of embeddings is copied, because their rows are looked up in the usual layout.

    Args:
        model: The model, in evaluation mode. Quantised and offloaded weights are left as they are.

    Returns:
        Each layer that got a copy, with its own weight, for [`restore_weights`].
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    copied = []
    for module in model.modules():
        if isinstance(module, ConvNormAct):
            module.fold()
        elif isinstance(module, nn.Linear) and _is_plain(weight := module.weight) and weight.dtype == torch.float32:
            transposed = weight.T.contiguous().T
            if weight in embeddings:
                copied.append((module, weight))
                module.weight = nn.Parameter(transposed, requires_grad=weight.requires_grad)
            else:
                weight.data = transposed
    return copied


@torch.no_grad()
def restore_weights(model: nn.Module, copied: list[tuple[nn.Linear, nn.Parameter]]) -> None:
    """Undo [`prepare_weights`], also after the model was moved or cast."""
    for module, weight in copied:
        module.weight = weight
    for module in model.modules():
        if isinstance(module, ConvNormAct):
            module.unfold()
        elif isinstance(module, nn.Linear) and _is_plain(module.weight):
            module.weight.data = module.weight.contiguous()


def _is_plain(weight: torch.Tensor) -> bool:
    """Return whether a weight is neither quantised nor offloaded."""
    return type(weight.data) is torch.Tensor and weight.is_floating_point() and not weight.is_meta
