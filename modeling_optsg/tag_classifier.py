"""Room 3, for the example as a whole: which tags belong to it, learned from every train tag at once.

The matching shows a prompt the tags of its batch; a classifier sees every train tag at every step, and learns more
from a rare one. Here the example's summary is compared with all train tags as a classifier compares it. What comes of it
is weighed against what the slots write, and proposes tags that they do not.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def asymmetric_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    asl_gamma_negative: float,
    asl_gamma_positive: float,
    asl_margin: float,
) -> torch.Tensor:
    """Asymmetric loss of multi-label classification (arXiv 2009.14119, equations 5 to 7), summed over the classes.

    Args:
        logits: `[batch, classes]`.
        targets: `[batch, classes]`, 1 where the class is present.
        asl_gamma_negative, asl_gamma_positive, asl_margin: γ⁻, γ⁺ and m of the paper.

    Returns:
        Scalar, the mean over the batch.
    """
    probability = logits.sigmoid()
    shifted = (probability - asl_margin).clamp(min=0)
    present = targets * (1 - probability) ** asl_gamma_positive * F.logsigmoid(logits)
    # Without a shift log(1 - p) is taken from the logit: p itself rounds to 1.
    log_absent = F.logsigmoid(-logits) if asl_margin == 0 else torch.log1p(-shifted)
    absent = (1 - targets) * shifted**asl_gamma_negative * log_absent
    return -(present + absent).sum(dim=-1).mean()


def multi_hot_targets(labels: torch.Tensor, tag_ids: torch.Tensor, num_tags: int) -> torch.Tensor:
    """Labels as a table: `[batch, num_tags]`, 1 where an example has the tag.

    Args:
        labels: `[batch, most tags of an example]`, indices into `tag_ids`, -100 where there is none.
        tag_ids: `[tags]`, the column of each tag of the batch.
    """
    targets = torch.zeros(len(labels), num_tags, device=labels.device)
    examples, places = (labels >= 0).nonzero(as_tuple=True)
    targets[examples, tag_ids[labels[examples, places]]] = 1.0
    return targets


class TagClassifier(nn.Module):
    """Compares an example's summary with the train tags; `label_vocabulary` says what they are."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = CosineClassifier(config, config.num_tag_classes)
        self.label_vocabulary = LabelVocabulary(config)

    def logits(self, summary: torch.Tensor) -> torch.Tensor:
        """`[batch, hidden_size]`, from the multimodal encoder -> `[batch, num_tag_classes]`."""
        return self.classifier(self.dropout(summary))

    def forward(self, summary: torch.Tensor, labels: torch.Tensor, tag_ids: torch.Tensor) -> torch.Tensor:
        """The asymmetric loss over all train tags.

        Args:
            summary: as in [`logits`]; labels, tag_ids: see [`OPTSGForTagGeneration.forward`].

        Raises:
            ValueError: `tag_ids` name a class there is not.
        """
        check_tag_ids(tag_ids, len(self.label_vocabulary))
        config, logits = self.config, self.logits(summary).float()
        return asymmetric_loss(
            logits,
            multi_hot_targets(labels, tag_ids, logits.shape[1]),
            config.asl_gamma_negative,
            config.asl_gamma_positive,
            config.asl_margin,
        )


class LabelVocabulary(nn.Module):
    """The tokens of each class's tag, so that a class comes back from the processor as a written tag does.

    They are a buffer of the model and are saved with its weights: class 0 is the first of the tags the model was
    trained on, and a checkpoint needs no list beside it. So are the tags' training counts, as logarithms.
    """

    def __init__(self, config):
        super().__init__()
        self.pad_token_id = config.tag_pad_token_id
        shape = (config.num_tag_classes, config.max_tag_tokens)
        self.register_buffer("tokens", torch.full(shape, self.pad_token_id, dtype=torch.int32))
        self.register_buffer("log_counts", torch.zeros(config.num_tag_classes))
        self._index = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def set_tags(self, input_ids: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> None:
        """Says which tag each class is.

        Args:
            input_ids: token ids of each class's tag, without [SEP].
            counts: training examples of each tag; without them no tag is rarer than another.

        Raises:
            ValueError: there are not as many tags as classes, one is empty or too long, two are the same, or the
                counts are not as many or below one.
        """
        classes, longest = self.tokens.shape
        if len(input_ids) != classes:
            raise ValueError(f"{len(input_ids)} tags for {classes} classes; set num_tag_classes={len(input_ids)}.")
        lengths = [len(ids) for ids in input_ids]
        if not classes or min(lengths) < 1 or max(lengths) > longest:
            raise ValueError(f"Tags of {sorted(set(lengths))} tokens; each must have 1 to max_tag_tokens={longest}.")
        if len(set(map(tuple, input_ids))) < classes:
            raise ValueError("Two classes have the same tag; list each once.")
        if counts is not None and (len(counts) != classes or min(counts) < 1):
            raise ValueError(f"{len(counts)} counts for {classes} classes; each must have one, of at least 1.")
        self.log_counts.copy_(torch.tensor(counts or [1] * classes).log())
        rows = [list(ids) + [self.pad_token_id] * (longest - len(ids)) for ids in input_ids]
        self.tokens.copy_(torch.tensor(rows, dtype=torch.int32))

    def index(self) -> dict[tuple[int, ...], int]:
        """The class of each tag, by its tokens."""
        version = (self.tokens.data_ptr(), self.tokens._version)
        if self._index is None or self._index[0] != version:
            rows = self.tokens.tolist()
            tags = {tuple(t for t in row if t != self.pad_token_id): place for place, row in enumerate(rows)}
            self._index = (version, tags)
        return self._index[1]

    def adjust(self, logits: torch.Tensor, logit_adjustment: float) -> torch.Tensor:
        """Logits `[..., classes]` less `logit_adjustment` times the logarithm of each tag's training count (Menon et
        al., arXiv 2007.07314, section 4.1): an average over tags asks for more rare ones than are likely."""
        return logits - logit_adjustment * self.log_counts if logit_adjustment else logits

    def of(self, classes: torch.Tensor) -> torch.Tensor:
        """Tokens `[..., longest of them]` of the classes' tags `[...]`, filled up with [PAD]."""
        tokens = self.tokens[classes].long()
        longest = int((tokens != self.pad_token_id).sum(dim=-1).max()) if tokens.numel() else 1
        return tokens[..., : max(longest, 1)]


class CosineClassifier(nn.Module):
    """Logits of classes for an example: the example's direction times each class's weights, at a learned scale, and a bias.

    The example is normalised and the classes are not: what is common may have larger weights. In training the weights
    may be tied to the text tower's features of the tags (`text_tying.py`): a rare one is found from its neighbours.
    """

    def __init__(self, config, classes: int):
        super().__init__()
        self.class_embeddings = nn.Embedding(classes, config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(classes))
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.initial_logit_scale = config.logit_scale_init_value

    def forward(self, hidden_states: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., hidden_size]` -> `[..., classes]`, of all classes or of those given."""
        direction = self.logit_scale.exp() * F.normalize(hidden_states, dim=-1)
        weight, bias = self.class_embeddings.weight, self.bias
        return F.linear(direction, *((weight, bias) if classes is None else (weight[classes], bias[classes])))


def check_tag_ids(tag_ids: torch.Tensor | None, classes: int) -> None:
    """
    Raises:
        ValueError: the batch does not say which classes its tags are, or names one there is not.
    """
    if tag_ids is None:
        raise ValueError(
            "labels need tag_ids, the class of every tag of the batch: a data collator with a tag_table makes them."
        )
    if tag_ids.numel() and (tag_ids.min() < 0 or tag_ids.max() >= classes):
        raise ValueError(f"tag_ids name class {int(tag_ids.max())}; this model has {classes} classes.")
