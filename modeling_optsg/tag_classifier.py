"""Tag classifier: a multi-label head over the label vocabulary.

The tag alignment compares prompts only with the tags of a batch. The classifier is trained on every tag of the label
vocabulary in every step, which helps with rare tags. During generation, its most probable tags are candidates, and its
logits are fused with those of the slots.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


def asymmetric_loss(
    logits: torch.Tensor, targets: torch.Tensor, gamma_negative: float, gamma_positive: float, margin: float
) -> torch.Tensor:
    """Compute the asymmetric loss of multi-label classification (Ridnik et al., 2021, equations 5 to 7).

    Args:
        logits: `[batch, classes]`.
        targets: `[batch, classes]`, 1 where the class is present, else 0.
        gamma_negative: Focusing exponent γ⁻ of absent classes.
        gamma_positive: Focusing exponent γ⁺ of present classes.
        margin: Probability margin m, subtracted from the probabilities of absent classes.

    Returns:
        Scalar: the sum over the classes, averaged over the batch.
    """
    probability = logits.sigmoid()
    shifted = (probability - margin).clamp(min=0)
    present = targets * (1 - probability) ** gamma_positive * F.logsigmoid(logits)
    # Without a margin, log(1 - p) is computed from the logit, because p may be rounded to 1.
    log_absent = F.logsigmoid(-logits) if margin == 0 else torch.log1p(-shifted)
    absent = (1 - targets) * shifted**gamma_negative * log_absent
    return -(present + absent).sum(dim=-1).mean()


def multi_hot_targets(labels: torch.Tensor, tag_ids: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Convert labels to multi-hot targets.

    Args:
        labels: `[batch, max tags per example]`, indices into `tag_ids`, -100 for padding.
        tag_ids: `[tags]`, the class of each tag of the batch.
        num_classes: Number of classes.

    Returns:
        `[batch, num_classes]`, 1 where an example has the tag, else 0.
    """
    targets = torch.zeros(len(labels), num_classes, device=labels.device)
    examples, columns = (labels >= 0).nonzero(as_tuple=True)
    targets[examples, tag_ids[labels[examples, columns]]] = 1.0
    return targets


def check_tag_ids(tag_ids: torch.Tensor | None, num_classes: int) -> None:
    """Check the classes of a batch's tags.

    Raises:
        ValueError: `tag_ids` is missing, or a class is out of range.
    """
    if tag_ids is None:
        raise ValueError(
            "labels need tag_ids, the class of every tag of the batch. OPTSGDataCollator with a tag_table adds them."
        )
    if tag_ids.numel() and (tag_ids.min() < 0 or tag_ids.max() >= num_classes):
        raise ValueError(f"tag_ids contains class {int(tag_ids.max())}; this model has {num_classes} classes.")


class LabelVocabulary(nn.Module):
    """The tag of each class, as token ids, and its training count.

    Both are buffers, so a checkpoint contains its classes without a separate list. The processor decodes a class in
    the same way as a generated tag.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.pad_token_id = config.tag_pad_token_id
        shape = (config.num_tag_classes, config.max_tag_tokens)
        self.register_buffer("tokens", torch.full(shape, self.pad_token_id, dtype=torch.int32))
        self.register_buffer("log_counts", torch.zeros(config.num_tag_classes))
        self._class_index = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def set_tags(self, input_ids: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> None:
        """Set the tag of each class.

        Args:
            input_ids: Token ids of each class's tag, without [SEP].
            counts: Number of training examples of each tag. By default, all tags are equally frequent.

        Raises:
            ValueError: The number of tags or counts differs from the number of classes, a tag is empty or too long,
                two tags are equal, or a count is below 1.
        """
        num_classes, max_length = self.tokens.shape
        if len(input_ids) != num_classes:
            raise ValueError(f"{len(input_ids)} tags for {num_classes} classes; set num_tag_classes={len(input_ids)}.")
        lengths = [len(ids) for ids in input_ids]
        if not num_classes or min(lengths) < 1 or max(lengths) > max_length:
            raise ValueError(
                f"The tags have {sorted(set(lengths))} tokens; each must have 1 to max_tag_tokens={max_length}."
            )
        if len(set(map(tuple, input_ids))) < num_classes:
            raise ValueError("Two classes have the same tag; list each tag once.")
        if counts is not None and (len(counts) != num_classes or min(counts) < 1):
            raise ValueError(
                f"{len(counts)} counts for {num_classes} classes; each class needs a count of at least 1."
            )
        self.log_counts.copy_(torch.tensor(counts or [1] * num_classes).log())
        rows = [list(ids) + [self.pad_token_id] * (max_length - len(ids)) for ids in input_ids]
        self.tokens.copy_(torch.tensor(rows, dtype=torch.int32))

    def class_index(self) -> dict[tuple[int, ...], int]:
        """Return the class of each tag, by its token ids."""
        version = (self.tokens.data_ptr(), self.tokens._version)
        if self._class_index is None or self._class_index[0] != version:
            rows = self.tokens.tolist()
            classes = {tuple(t for t in row if t != self.pad_token_id): index for index, row in enumerate(rows)}
            self._class_index = (version, classes)
        return self._class_index[1]

    def adjust_logits(self, logits: torch.Tensor, logit_adjustment: float) -> torch.Tensor:
        """Favours rare tags by subtracting `logit_adjustment` times the logarithm of each tag's training count.

        Source: Menon et al., "Long-tail learning via logit adjustment", arXiv 2007.07314, section 4.1.

        Args:
            logits: `[..., classes]`.
            logit_adjustment: The temperature τ of the adjustment; 0 changes nothing.
        """
        return logits - logit_adjustment * self.log_counts if logit_adjustment else logits

    def tokens_of(self, classes: torch.Tensor) -> torch.Tensor:
        """Return the tokens `[..., max length]` of the tags of `classes` `[...]`, padded with [PAD]."""
        tokens = self.tokens[classes].long()
        max_length = int((tokens != self.pad_token_id).sum(dim=-1).max()) if tokens.numel() else 1
        return tokens[..., : max(max_length, 1)]


class CosineClassifier(nn.Module):
    """Linear classifier on normalised inputs, with a learned scale.

    Inputs are normalised. Class embeddings are not, so frequent classes can have larger weights. In training, the
    class embeddings may be text-initialised (`training/text_tied_embeddings.py`).
    """

    def __init__(self, config: PreTrainedConfig, num_classes: int):
        super().__init__()
        self.class_embeddings = nn.Embedding(num_classes, config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.logit_scale = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits.

        Args:
            hidden_states: `[..., hidden_size]`.
            classes: `[columns]`, the classes of the logits. By default, all classes.

        Returns:
            `[..., columns]`.
        """
        hidden_states = self.logit_scale.exp() * F.normalize(hidden_states, dim=-1)
        weight, bias = self.class_embeddings.weight, self.bias
        if classes is not None:
            weight, bias = weight[classes], bias[classes]
        return F.linear(hidden_states, weight, bias)


class TagClassifier(nn.Module):
    """Multi-label classifier over the label vocabulary, trained with the asymmetric loss."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = CosineClassifier(config, config.num_tag_classes)
        self.label_vocabulary = LabelVocabulary(config)

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Compute logits `[batch, num_tag_classes]` from a pooled representation `[batch, hidden_size]`."""
        return self.classifier(self.dropout(pooled))

    def forward(self, pooled: torch.Tensor, labels: torch.Tensor, tag_ids: torch.Tensor) -> torch.Tensor:
        """Compute the asymmetric loss over the label vocabulary.

        Args:
            pooled: `[batch, hidden_size]`, the multimodal encoder's `classifier_pooler_output`.
            labels: `[batch, max tags per example]`, indices into `tag_ids`, -100 for padding.
            tag_ids: `[tags]`, the class of each tag of the batch.

        Raises:
            ValueError: A class is out of range.
        """
        check_tag_ids(tag_ids, len(self.label_vocabulary))
        config, logits = self.config, self.logits(pooled).float()
        targets = multi_hot_targets(labels, tag_ids, logits.shape[1])
        return asymmetric_loss(
            logits, targets, config.asl_gamma_negative, config.asl_gamma_positive, config.asl_margin
        )
