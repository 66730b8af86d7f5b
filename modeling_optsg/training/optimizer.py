"""Parameter groups of the optimizer."""

from modeling_optsg.base_models import OPTSGPreTrainedModel

# Name parts of learned inputs, which have no weight decay.
NOT_DECAYED = ("positions", "modalities", "queries", "pooler.query")


def parameter_groups(
    model: OPTSGPreTrainedModel,
    *,
    learning_rate: float,
    tower_learning_rate: float,
    embedding_lr_multiplier: float,
    weight_decay: float,
) -> list[dict]:
    """Group the trained parameters by learning rate and weight decay.

    Norms, biases and embeddings are not decayed.

    Args:
        model: The model to train.
        learning_rate: Learning rate of all parameters but those named below.
        tower_learning_rate: Learning rate of the towers.
        embedding_lr_multiplier: Factor on `learning_rate` for token and class embeddings.
        weight_decay: Weight decay of all matrices but embeddings.

    Returns:
        Groups for a `torch.optim.Optimizer`.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = tower_learning_rate if "_tower." in name else learning_rate
            decayed = parameter.ndim > 1 and not any(part in name for part in NOT_DECAYED)
            if "token_embeddings" in name or "class_embeddings" in name:
                rate, decayed = learning_rate * embedding_lr_multiplier, False
            groups.setdefault((rate, decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if decayed else 0.0}
        for (rate, decayed), parameters in groups.items()
    ]
