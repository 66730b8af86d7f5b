"""Softmax over a sample of the classes, which makes training steps with a large output layer faster."""

import math

import torch


def sample_classes(
    targets: torch.Tensor, num_classes: int, num_sampled: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the classes of a step: the target classes and `num_sampled` random other classes.

    The sampled classes represent all other classes. With `correction` added to their logits, the sum of exponentials
    has the same expected value as without sampling.

    Args:
        targets: `[positions]`, classes.
        num_classes: Number of all classes.
        num_sampled: Number of other classes. With 0, or if there are no more of them, all classes are returned.

    Returns:
        The classes `[columns]`, the column of each target `[positions]`, and the correction `[columns]`.
    """
    own, columns = targets.unique(return_inverse=True)
    num_others = num_classes - len(own)
    if not 0 < num_sampled < num_others:
        return torch.arange(num_classes, device=targets.device), targets, torch.zeros(num_classes, device=own.device)
    is_other = torch.ones(num_classes, device=own.device).index_fill_(0, own, 0.0)
    classes = torch.cat([own, is_other.multinomial(num_sampled)])
    correction = torch.zeros(len(classes), device=own.device)
    correction[len(own) :] = math.log(num_others / num_sampled)
    return classes, columns, correction


def use_sampled_classes(
    targets: torch.Tensor, num_classes: int, own: torch.Tensor, sampled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the same as [`sample_classes`], for classes that were chosen for all micro-batches of a step.

    Args:
        targets: `[positions]`, classes. All of them must be in `own`.
        num_classes: Number of all classes.
        own: `[classes]`, the distinct target classes of the step.
        sampled: `[classes]`, the sampled other classes.

    Returns:
        See [`sample_classes`].
    """
    columns = torch.full((num_classes,), -1, device=own.device)
    columns[own] = torch.arange(len(own), device=own.device)
    correction = torch.zeros(len(own) + len(sampled), device=own.device)
    if len(sampled):
        correction[len(own) :] = math.log((num_classes - len(own)) / len(sampled))
    return torch.cat([own, sampled]), columns[targets], correction
