"""What is trained, and how fast."""

import torch


def parameter_groups(
    model, *, learning_rate: float, tower_learning_rate: float, embedding_lr_multiplier: float, weight_decay: float
) -> list[dict]:
    """Towers and token embeddings have learning rates of their own; norms, biases and embeddings are not decayed.

    Args:
        embedding_lr_multiplier: the rate of token embeddings and of classes compared with the example, as a share of `learning_rate`.
    """
    groups = {}
    linear_head = isinstance(getattr(model, "classifier", None), torch.nn.Linear)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = tower_learning_rate if "_tower." in name else learning_rate
            decayed = parameter.ndim > 1 and not any(part in name for part in ("positions", "modalities", "queries"))
            if "token_embeddings" in name or ("classifier" in name and not linear_head):
                rate, decayed = learning_rate * embedding_lr_multiplier, False
            groups.setdefault((rate, decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if decayed else 0.0}
        for (rate, decayed), parameters in groups.items()
    ]
