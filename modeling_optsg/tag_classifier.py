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

from .batch_tags import NO_LABEL
from .layers import Float32Buffers, OutputLayer, compute_columns, unit_vectors
from .score_bound import PrefixTree
from .tag_evidence import TagEvidence

# Weight of the gate loss, a mean over examples. The tag loss is a sum over thousands of tags.
GATE_LOSS_WEIGHT = 1.0
# Temperature for the probabilities of image words. The vision tower is overconfident in its most probable class.
WORD_TEMPERATURE = 2.0
# Clamp probabilities so that their logits are finite.
MIN_PROBABILITY = 1e-6


def asymmetric_loss(
    logits: torch.Tensor,
    present: tuple[torch.Tensor, torch.Tensor],
    gamma_negative: float,
    gamma_positive: float,
    margin: float,
) -> torch.Tensor:
    """Compute the asymmetric loss of multi-label classification (Ridnik et al., 2021, equations 5 to 7).

    Absent classes below the margin have no loss and no gradient. Nearly all classes are of this kind, so leaving them
    out makes the loss several times faster.

    Args:
        logits: `[batch, classes]`.
        present: Rows and columns of the present classes, each once; the other classes are absent.
        gamma_negative: Focusing exponent γ⁻ of absent classes.
        gamma_positive: Focusing exponent γ⁺ of present classes.
        margin: Probability margin m, subtracted from the probabilities of absent classes.

    Returns:
        Scalar: the sum over the classes, averaged over the batch.
    """
    present_logits = logits[present]
    loss = (1 - present_logits.sigmoid()) ** gamma_positive * F.logsigmoid(present_logits)
    with torch.no_grad():
        counts = torch.ones_like(logits, dtype=torch.bool) if margin == 0 else logits.sigmoid() > margin
        counts[present] = False
        absent = counts.flatten().nonzero().squeeze(1)
    absent_logits = logits.flatten()[absent]
    shifted = absent_logits.sigmoid() - margin
    # Without a margin, log(1 - p) is computed from the logit, because p may be rounded to 1.
    log_absent = F.logsigmoid(-absent_logits) if margin == 0 else torch.log1p(-shifted)
    return -(loss.sum() + (shifted**gamma_negative * log_absent).sum()) / len(logits)


class LabelVocabulary(Float32Buffers):
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
        self._class_index = self._prefix_tree = None

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

    def classes_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the classes of tags.

        Args:
            labels: `[batch, max tags per example, max length]`, tokens of each example's tags, -100 for padding.

        Returns:
            `[batch, max tags per example]`, -100 for padding and for a tag that is not in the label vocabulary.
        """
        index = self.class_index()
        rows = [tuple(token for token in row if token >= 0) for row in labels.flatten(0, 1).tolist()]
        classes = [index.get(row, NO_LABEL) if row else NO_LABEL for row in rows]
        return torch.tensor(classes, dtype=torch.long, device=labels.device).view(labels.shape[:2])

    def known_classes_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the classes of tags as [`classes_of`] does, for a model that knows no other tags.

        Raises:
            ValueError: A tag is not in the label vocabulary.
        """
        classes = self.classes_of(labels)
        unknown = (classes < 0) & (labels >= 0).any(dim=-1)
        if unknown.any():
            tokens = [token for token in labels[unknown][0].tolist() if token >= 0]
            raise ValueError(
                f"The tag with the tokens {tokens} is not one of the {len(self)} classes; set the classes with "
                "set_label_vocabulary, or leave the tag out."
            )
        return classes

    def prefix_tree(self) -> PrefixTree:
        """Return the tags as a prefix tree."""
        version = (self.tokens.data_ptr(), self.tokens._version)
        if self._prefix_tree is None or self._prefix_tree[0] != version:
            self._prefix_tree = (version, PrefixTree(self.tokens, self.pad_token_id))
        return self._prefix_tree[1]

    def adjust_logits(self, logits: torch.Tensor, logit_adjustment: float) -> torch.Tensor:
        """Favours rare tags by subtracting `logit_adjustment` times the logarithm of each tag's training count.

        Source: Menon et al., "Long-tail learning via logit adjustment", arXiv 2007.07314, section 4.1.

        Args:
            logits: `[..., classes]`.
            logit_adjustment: The temperature τ of the adjustment; 0 changes nothing.
        """
        return logits - logit_adjustment * self.log_counts if logit_adjustment else logits

    def mean_log_count(self) -> torch.Tensor:
        """Return the logarithm of the training count, averaged over all tags of all training examples."""
        return torch.softmax(self.log_counts, dim=-1) @ self.log_counts

    def tokens_of(self, classes: torch.Tensor) -> torch.Tensor:
        """Return the tokens `[..., max length]` of the tags of `classes` `[...]`, padded with [PAD].

        Raises:
            ValueError: A class has no tag.
        """
        tokens = self.tokens[classes].long()
        if not tokens.numel():
            return tokens[..., :1]
        lengths = (tokens != self.pad_token_id).sum(dim=-1)
        if not lengths.all():
            raise ValueError(
                f"Class {int(classes[lengths == 0][0])} of the tag classifier has no tag: the model was built, or its "
                "checkpoint saved, without a label vocabulary. Call set_label_vocabulary."
            )
        return tokens[..., : int(lengths.max())]


class CosineClassifier(nn.Module):
    """Linear classifier on normalised inputs, with a learned scale.

    Inputs are normalised. Class embeddings are not, so frequent classes can have larger weights. In training, the
    class embeddings may be text-initialised (`training/text_tied_embeddings.py`).
    """

    def __init__(self, config: PreTrainedConfig, num_classes: int):
        super().__init__()
        self.class_embeddings = OutputLayer(config.hidden_size, num_classes, bias=False)
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
        hidden_states = self.logit_scale.exp() * unit_vectors(hidden_states)
        if classes is None:
            return self.class_embeddings(hidden_states) + self.bias
        return compute_columns(self.class_embeddings, hidden_states, classes) + self.bias[classes]


class TagClassifier(nn.Module):
    """Multi-label classifier over the label vocabulary, trained with the asymmetric loss.

    The dot products of an example's evidence with the class embeddings are the logits. The embeddings are not
    normalised, so frequent classes can have larger weights. In training, they may be text-initialised
    (`training/text_tied_embeddings.py`).
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.classifier_dropout)
        # A linear layer, which quantisation and adapters know.
        self.class_embeddings = nn.Linear(config.hidden_size, config.num_tag_classes, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.num_tag_classes))
        self.label_vocabulary = LabelVocabulary(config)

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits `[..., num_tag_classes]` from vectors `[..., hidden_size]`."""
        return self.class_embeddings(self.dropout(vectors)).float() + self.bias.float()

    def logits(
        self,
        evidence: TagEvidence,
        scale: torch.Tensor | float = 1.0,
        bias: torch.Tensor | float = 0.0,
        logit_adjustment: float = 0.0,
    ) -> torch.Tensor:
        """Compute logits `[batch, num_tag_classes]`, with the logit adjustment of [`LabelVocabulary.adjust_logits`].

        For an image without a title, a tag's probability is a weighted mean of two: one from the image, and one
        averaged over its image words as titles. The weight of the image is its familiarity. The logit adjustment does
        not favour rare tags of image words.

        Args:
            evidence: The encoder's evidence.
            scale: `[batch, 1]` or one number: the probability of a tag is `sigmoid(scale * logit + bias)`. These
                probabilities are averaged, not the logits.
            bias: `[batch, 1]` or one number.
            logit_adjustment: See [`LabelVocabulary.adjust_logits`].
        """
        return self(evidence, scale=scale, bias=bias, logit_adjustment=logit_adjustment)

    def _logits(
        self,
        evidence: TagEvidence,
        scale: torch.Tensor | float,
        bias: torch.Tensor | float,
        logit_adjustment: float,
    ) -> torch.Tensor:
        def project(vectors: torch.Tensor) -> torch.Tensor:
            return self.label_vocabulary.adjust_logits(self.project(vectors), logit_adjustment)

        logits = project(evidence.vectors)
        # A traced program computes the rows without words as well.
        is_traced = torch.compiler.is_compiling()
        if evidence.word_vectors is None or (not is_traced and not evidence.uses_words.any()):
            return logits
        uses_words = evidence.uses_words
        rows = slice(None) if is_traced else uses_words
        scale, bias = (torch.as_tensor(value).to(logits).expand(logits.shape[0], 1)[rows] for value in (scale, bias))
        familiarity = evidence.familiarity[rows, None]
        weights = evidence.word_probabilities[rows] ** (1 / WORD_TEMPERATURE)
        weights = weights / weights.sum(dim=1, keepdim=True)
        # The few tags of an unfamiliar image should be the most probable ones. Rare tags are therefore not favoured:
        # all tags have the adjustment of an average tag.
        shift = logit_adjustment * self.label_vocabulary.mean_log_count()
        # A loop over the words: all at once would need a tensor `[examples, words, classes]`.
        of_words = torch.zeros_like(logits[rows])
        for index in range(weights.shape[1]):
            word_logits = scale * (self.project(evidence.word_vectors[rows, index]) - shift) + bias
            of_words = of_words + weights[:, index, None] * word_logits.sigmoid()
        of_images = (scale * logits[rows] + bias).sigmoid()
        probabilities = familiarity * of_images + (1 - familiarity) * of_words
        mixed = (probabilities.clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY).logit() - bias) / scale
        if is_traced:
            return torch.where(uses_words[:, None], mixed, logits)
        return logits.index_put((uses_words,), mixed)

    def forward(
        self,
        evidence: TagEvidence,
        labels: torch.Tensor | None = None,
        is_mismatched: torch.Tensor | None = None,
        scale: torch.Tensor | float = 1.0,
        bias: torch.Tensor | float = 0.0,
        logit_adjustment: float = 0.0,
    ) -> torch.Tensor:
        """Compute the logits, or with `labels` the asymmetric loss over the label vocabulary.

        An example with a title and an image also has a title-only and an image-only loss, because either may be
        missing at inference. Tags that are not in the label vocabulary are ignored. If a batch has only such tags, the
        loss is 0.

        Args:
            evidence: The encoder's evidence.
            labels: `[batch, max tags per example, max length]`, tokens of each example's tags, -100 for padding.
            is_mismatched: `[batch]`, true for an example whose image belongs to another example. It has no
                image-only loss. The gate is trained to detect such examples.
            scale, bias, logit_adjustment: See [`logits`]. Not used with `labels`.
        """
        if labels is None:
            return self._logits(evidence, scale, bias, logit_adjustment)
        return self._loss(evidence, labels, is_mismatched)

    def _loss(self, evidence: TagEvidence, labels: torch.Tensor, is_mismatched: torch.Tensor | None) -> torch.Tensor:
        config, classes = self.config, self.label_vocabulary.classes_of(labels)
        is_known = classes >= 0
        present = (is_known.nonzero(as_tuple=True)[0], classes[is_known])
        exponents = (config.asl_gamma_negative, config.asl_gamma_positive, config.asl_margin)
        loss = asymmetric_loss(self.project(evidence.vectors), present, *exponents)
        has_both = evidence.has_title & evidence.has_image
        has_matching = has_both if is_mismatched is None else has_both & ~is_mismatched
        for vectors, rows, weight in (
            (evidence.title_vectors, has_both, config.title_loss_weight),
            (evidence.image_vectors, has_matching, config.image_loss_weight),
        ):
            if weight and rows.any():
                own = rows[present[0]]
                index = rows.cumsum(dim=0) - 1
                part = asymmetric_loss(
                    self.project(vectors[rows]), (index[present[0][own]], present[1][own]), *exponents
                )
                loss = loss + weight * part * rows.sum() / len(rows)
        if is_mismatched is not None and has_both.any():
            losses = F.binary_cross_entropy_with_logits(
                evidence.match_logits.float(), (~is_mismatched).float(), reduction="none"
            )
            loss = loss + GATE_LOSS_WEIGHT * (losses * has_both).mean()
        # Every parameter still gets a gradient, which processes with other tags wait for.
        return loss if is_known.any() else 0.0 * loss
