"""A model divided among processes by torch's FSDP2."""

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard_model(model, reshard_after_forward: bool = True, **settings):
    """Divides a model's parameters, in place: each module of its `_no_split_modules` by itself, and all that is
    outside them as one group, which stays whole for the length of a step: the output layer reads the token embeddings.

    `accelerate` would give embeddings and output layer groups of their own, which must not share weights.

    Args:
        model: of [`OPTSGPreTrainedModel`], before its optimiser is made.
        settings: of [`fully_shard`].

    Raises:
        ValueError: a parameter has no dimension to be divided along.
    """
    if scalars := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
        raise ValueError(f"{', '.join(scalars)} cannot be divided among processes: no dimension.")
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, reshard_after_forward=reshard_after_forward, **settings)
    return fully_shard(model, **settings)


def whole_state(model) -> dict[str, torch.Tensor]:
    """A model's state with whole tensors, in every process; all processes call it."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
