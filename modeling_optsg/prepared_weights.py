"""Memory layouts of weights that are faster for inference on a CPU."""

import torch
from torch import nn


def _share_nothing(linear: nn.Linear, embeddings: set[nn.Parameter]) -> None:
    """Give an output layer its own weight, because rows of embeddings are looked up in the usual layout."""
    if linear.weight in embeddings:
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=linear.weight.requires_grad)


@torch.no_grad()
def lay_out_weights(model: nn.Module, transposed: bool) -> None:
    """Store the 32-bit weights of linear layers transposed, or as usual. Shapes and values stay the same.

    The matrix libraries of CPUs multiply few rows by a transposed weight up to four times as fast.

    Args:
        model: The model. Its class embeddings are multiplied like the weight of a linear layer.
        transposed: Whether to store them transposed.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {module.class_embeddings.weight for module in model.modules() if hasattr(module, "class_embeddings")}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if transposed:
                _share_nothing(module, embeddings - weights)
            weights.add(module.weight)
    for weight in weights:
        if weight.dtype == torch.float32 and weight.device.type == "cpu":
            weight.data = weight.T.contiguous().T if transposed else weight.contiguous()
