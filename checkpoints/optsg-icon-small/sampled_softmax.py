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


def classes_of_step(
    targets: torch.Tensor, num_classes: int, own: torch.Tensor, drawn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`sample_classes`] where what is drawn is the same for all parts of a step.

    Args:
        targets: `[positions]`, all of them among `own`.
        own: `[classes]`, those of the whole step's targets, each once; drawn: as many others as are sampled.
    """
    columns = torch.full((num_classes,), -1, device=own.device)
    columns[own] = torch.arange(len(own), device=own.device)
    correction = torch.zeros(len(own) + len(drawn), device=own.device)
    if len(drawn):
        correction[len(own) :] = math.log((num_classes - len(own)) / len(drawn))
    return torch.cat([own, drawn]), columns[targets], correction
