"""A softmax over a sample of its classes, for training steps whose widest layer is the last."""

import math

import torch


def sample_classes(
    targets: torch.Tensor, num_classes: int, num_sampled: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The classes of a step: those of the targets, and as many others drawn at random.

    Each drawn class stands for all that were not: with `correction` added to its logit, the sum over the classes keeps
    its expected value.

    Args:
        targets: `[positions]`, classes; num_sampled: at most so many others, 0 for all.

    Returns:
        `classes` `[columns]`, the `column` of each target `[positions]`, and `correction` `[columns]`.
    """
    own, column = targets.unique(return_inverse=True)
    rest = num_classes - len(own)
    if not 0 < num_sampled < rest:
        return torch.arange(num_classes, device=targets.device), targets, torch.zeros(num_classes, device=own.device)
    others = torch.ones(num_classes, device=own.device).index_fill_(0, own, 0.0)
    classes = torch.cat([own, others.multinomial(num_sampled)])
    correction = torch.zeros(len(classes), device=own.device)
    correction[len(own) :] = math.log(rest / num_sampled)
    return classes, column, correction


def mean_with_rare_class(losses: torch.Tensor, rare: torch.Tensor, share: float) -> torch.Tensor:
    """The mean of losses `[positions]` in which only a share of the positions where `rare` is true was kept, as if all
    had been."""
    weights = torch.where(rare, 1 / max(share, 1e-6), 1.0)
    return (losses * weights).sum() / weights.sum()
