"""Evidence: pooled representations of title and image, which the tag classifier compares with its classes."""

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .layers import FeedForward, MultiHeadAttention, Standardizer, pool_tokens, unit_vectors

# Initial logarithms of the scales of title and image evidence.
INITIAL_LOG_SCALES = (2.7, 2.3)
# Minimum gate (with a title) or familiarity (without a title, if there are image words) for frames to stay in the
# memory.
TRUSTED = 0.5
# Initial logarithm of the weight of the image if there is also a title.
INITIAL_LOG_IMAGE_WEIGHT = -1.0
# Initial weight of the attention pooler. It is small, because the pooler is untrained and its output is normalised.
INITIAL_ATTENTION_WEIGHT = 0.05
# Standardised features beyond this many standard deviations are clipped.
MAX_DEVIATION = 5.0
# Hidden size of the gate.
GATE_SIZE = 64
# Number of principal components of the training images. The residual of an image measures how unfamiliar it is.
NUM_COMPONENTS = 128
# Familiarity is 0.5 at this multiple of the 99.9th percentile of the residuals of held-out training images. The
# exponent sets how steeply it falls.
HALF_FAMILIAR_RATIO = 1.5
FAMILIARITY_EXPONENT = 4.0


@dataclass
class TagEvidence:
    """Evidence of a batch, as vectors that the tag classifier compares with its class embeddings.

    Args:
        vectors: `[batch, hidden_size]`, the combined evidence of title and image.
        title_vectors: `[batch, hidden_size]`, the evidence of the title alone, without the attention pooler.
        image_vectors: `[batch, hidden_size]`, the evidence of the image alone, without the attention pooler.
        match_logits: `[batch]`, logit of the probability that the image belongs to the title.
        image_gate: `[batch]`, weight of the image if there is also a title: match probability times familiarity.
        familiarity: `[batch]`, 1 for an image like the training images, 0 for one unlike them.
        has_title: `[batch]`, boolean.
        has_image: `[batch]`, boolean.
        style: `[batch, style_size]`, the style of the image times its gate, or times its familiarity without a title.
            0 without an image. `None` if `style_size` is 0.
        image_features: `[batch, image_feature_size]`, standardised. 0 without an image.
        title_features: `[batch, text width]`, the mean text feature of the title. 0 without a title.
        word_vectors: `[batch, words, hidden_size]`, the evidence of each image word, 0 for an example with a title.
            `None` without image words.
        word_probabilities: `[batch, words]`, the probability of each word.
    """

    vectors: torch.Tensor
    title_vectors: torch.Tensor
    image_vectors: torch.Tensor
    match_logits: torch.Tensor
    image_gate: torch.Tensor
    familiarity: torch.Tensor
    has_title: torch.Tensor
    has_image: torch.Tensor
    image_features: torch.Tensor
    title_features: torch.Tensor
    style: torch.Tensor | None = None
    word_vectors: torch.Tensor | None = None
    word_probabilities: torch.Tensor | None = None

    def to_tuple(self) -> tuple[torch.Tensor, ...]:
        """Return the values that are not `None`, in their order."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)

    @property
    def uses_image(self) -> torch.Tensor:
        """Which examples have an image that is not ignored, `[batch]`, boolean."""
        return self.has_image & ~(self.has_title & (self.image_gate < TRUSTED))

    @property
    def uses_words(self) -> torch.Tensor:
        """Which examples have image words and no title, `[batch]`, boolean."""
        return self.has_image & ~self.has_title & (self.word_probabilities.sum(dim=1) > 0)

    @property
    def reads_words(self) -> torch.Tensor:
        """Which examples have words instead of frames in the memory, `[batch]`, boolean."""
        if self.word_probabilities is None:
            return torch.zeros_like(self.has_image)
        return self.uses_words & (self.familiarity < TRUSTED)


# So that exported programs can return it.
torch.export.register_dataclass(TagEvidence)


class ImageStandardizer(Standardizer):
    """Standardises image features with statistics of the training images, and measures how familiar an image is."""

    def __init__(self, config: PreTrainedConfig):
        width = config.image_feature_size
        super().__init__(width)
        self.register_buffer("components", torch.zeros(NUM_COMPONENTS, width))
        # 0: not fitted yet, every image is familiar.
        self.register_buffer("half_familiar_distance", torch.zeros(1))

    @torch.no_grad()
    def fit(self, image_features: torch.Tensor) -> None:
        """Fit mean, scale, principal components and distances to training images `[images, image_feature_size]`.

        When fine-tuning, mean and scale are kept, because the weights were trained with them. If there are too few
        images to fit components, the previous ones are kept; without any, every image is familiar.
        """
        image_features = image_features.float()
        if not self.half_familiar_distance:
            self.fit_moments(image_features)
        standardized = self.standardize(image_features)
        # The distances are those of images that the components were not fitted to.
        fitted, held_out = standardized[::2], standardized[1::2]
        number = min(len(self.components), len(fitted) // 4, standardized.shape[1] // 4)
        if number:
            self.components.zero_()
            directions = torch.linalg.svd(fitted.cpu().double(), full_matrices=False).Vh[:number]
            self.components[:number].copy_(directions)
            self.half_familiar_distance.fill_(HALF_FAMILIAR_RATIO * float(self.distances(held_out).quantile(0.999)))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Standardise `[batch, image_feature_size]`, and limit values far from those of the training images."""
        return self.standardize(image_features).clamp(-MAX_DEVIATION, MAX_DEVIATION)

    def distances(self, standardized: torch.Tensor) -> torch.Tensor:
        """Return the mean squared residual of each standardised image outside the components, `[batch]`."""
        # Differences of large numbers need 32 bits.
        with torch.autocast(standardized.device.type, enabled=False):
            components = self.components.float()
            residual = standardized - (standardized @ components.T) @ components
        return residual.square().mean(dim=-1)

    @torch.no_grad()
    def familiarity(self, image_features: torch.Tensor) -> torch.Tensor:
        """Return the familiarity of images `[batch, image_feature_size]`, between 0 and 1."""
        standardized = self.standardize(image_features)
        is_fitted = self.half_familiar_distance > 0
        ratio = self.distances(standardized) / self.half_familiar_distance.where(is_fitted, 1.0)
        familiarity = torch.sigmoid(-FAMILIARITY_EXPONENT * ratio.clamp(min=1e-6).log())
        return familiarity.where(is_fitted, 1.0)


class AttentionPooler(nn.Module):
    """One learned query that attends to the tokens of frames and title, because a mean of tokens loses details."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        widths = (config.frame_feature_size, config.text_config.hidden_size)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.projections = nn.ModuleList(nn.Linear(width, config.hidden_size) for width in widths)
        self.query = nn.Parameter(torch.empty(1, config.hidden_size))
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: list[torch.Tensor | None], masks: list[torch.Tensor | None]) -> torch.Tensor:
        """Pool the tokens of both towers.

        Args:
            tokens: Tokens of frames and of titles, `[batch, length, width]` each, `None` for a missing modality.
            masks: `[batch, length]` each, true for visible tokens. Every example has at least one.

        Returns:
            `[batch, hidden_size]`.
        """
        parts = zip(tokens, self.norms, self.projections, strict=True)
        memory = [projection(norm(part.to(norm.weight.dtype))) for part, norm, projection in parts if part is not None]
        mask = torch.cat([mask for mask in masks if mask is not None], dim=1)
        memory = self.dropout(torch.cat(memory, dim=1))
        query = self.query.expand(memory.shape[0], -1, -1)
        attended, _ = self.attention(query, memory, mask[:, None, None, :])
        hidden_states = query + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))
        return self.norm(hidden_states)[:, 0]


class EvidencePooler(nn.Module):
    """Turns pooled tower features into evidence.

    Title and image have separate evidence, so that either is enough. If both are given, a style vector from the image
    modifies the evidence of the title, because the images of one author look similar and authors differ in how they
    tag. A gate reduces the weight of an image that does not match the title or is unlike the training images.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        text_size, width = config.text_config.hidden_size, config.hidden_size
        self.title_norm = nn.LayerNorm(text_size)
        self.title_inner = nn.Linear(text_size, config.intermediate_size)
        self.title_outer = nn.Linear(config.intermediate_size, width)
        # Titles and tags share one text tower, so this projection initially maps a title close to tags with the same
        # words.
        self.title_projection = nn.Linear(text_size, width, bias=False)
        self.standardizer = ImageStandardizer(config)
        self.image_inner = nn.Linear(config.image_feature_size, config.intermediate_size)
        self.image_outer = nn.Linear(config.intermediate_size, width)
        self.style = None
        if config.style_size:
            self.style = nn.Linear(config.image_feature_size, config.style_size)
            self.style_inner = nn.Linear(config.style_size, config.intermediate_size, bias=False)
            self.style_outer = nn.Linear(config.style_size, width, bias=False)
        self.gate_inner = nn.Linear(width + 1, GATE_SIZE)
        self.gate_outer = nn.Linear(GATE_SIZE, 1)
        self.log_scales = nn.Parameter(torch.tensor(INITIAL_LOG_SCALES))
        # With a title, the image gets a smaller weight.
        self.log_image_weight = nn.Parameter(torch.full((1,), INITIAL_LOG_IMAGE_WEIGHT))
        self.attention_pooler = AttentionPooler(config)
        self.attention_weight = nn.Parameter(torch.full((1,), INITIAL_ATTENTION_WEIGHT))
        self.dropout = nn.Dropout(config.classifier_dropout)

    def title_vectors(self, pooled_titles: torch.Tensor, style: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the evidence of mean-pooled titles.

        Args:
            pooled_titles: `[..., text width]`.
            style: `[..., style_size]`, the style of the images.

        Returns:
            `[..., hidden_size]`.
        """
        pooled = self.title_norm(pooled_titles.to(self.title_norm.weight.dtype))
        hidden_states, projected = self.title_inner(self.dropout(pooled)), self.title_projection(pooled)
        if style is not None:
            hidden_states, projected = hidden_states + self.style_inner(style), projected + self.style_outer(style)
        hidden_states = self.title_outer(self.dropout(F.gelu(hidden_states)))
        return self.log_scales[0].exp() * unit_vectors(hidden_states + projected)

    def word_vectors(self, word_features: torch.Tensor) -> torch.Tensor:
        """Compute the evidence of image words as titles: `[batch, words, text width]` to `[..., hidden_size]`."""
        titles = word_features.flatten(0, 1)[:, None]
        mask = torch.ones(titles.shape[:2], dtype=torch.bool, device=titles.device)
        attended = self.attention_pooler([None, titles], [None, mask]).unflatten(0, word_features.shape[:2])
        return self.title_vectors(word_features) + self.attention_weight * attended

    def image_vectors(self, standardized: torch.Tensor) -> torch.Tensor:
        """Compute the evidence of standardised images: `[batch, image_feature_size]` to `[batch, hidden_size]`."""
        hidden_states = self.image_outer(self.dropout(F.gelu(self.image_inner(self.dropout(standardized)))))
        return self.log_scales[1].exp() * unit_vectors(hidden_states)

    def forward(
        self,
        image_features: torch.Tensor | None,
        tokens: list[torch.Tensor | None],
        masks: list[torch.Tensor | None],
        word_features: torch.Tensor | None = None,
    ) -> TagEvidence:
        """Compute the evidence of a batch.

        Args:
            image_features: `[batch, image_feature_size]`, `None` without images.
            tokens, masks: See [`AttentionPooler.forward`].
            word_features: `[batch, words, text width]`, see [`EncoderInputs`].
        """
        some_mask = next(mask for mask in masks if mask is not None)
        batch, device = some_mask.shape[0], some_mask.device
        has_image, has_title = (
            torch.zeros(batch, dtype=torch.bool, device=device) if mask is None else mask.any(dim=1) for mask in masks
        )
        if image_features is None:
            image_features = torch.zeros(batch, self.standardizer.mean.shape[0], device=device)
        pooled_titles = pool_tokens(tokens[1], masks[1])
        if pooled_titles is None:
            pooled_titles = torch.zeros(batch, *self.title_norm.normalized_shape, device=device)
        dtype = self.title_norm.weight.dtype
        standardized = self.standardizer(image_features).to(dtype)
        title, image = self.title_vectors(pooled_titles), self.image_vectors(standardized)
        familiarity = self.standardizer.familiarity(image_features).to(dtype)
        unit_title, unit_image = unit_vectors(title), unit_vectors(image)
        agreement = unit_title * unit_image
        # The products of unit vectors are small, so they are scaled. Their sum is the cosine.
        clues = [agreement * agreement.shape[1] ** 0.5, agreement.sum(dim=-1, keepdim=True)]
        match_logits = self.gate_outer(F.gelu(self.gate_inner(torch.cat(clues, dim=-1))))
        gate = match_logits.sigmoid() * familiarity[:, None]
        styled, style = title, None
        if self.style is not None:
            trust = torch.where(has_title[:, None], gate, familiarity[:, None]) * has_image[:, None]
            style = trust * F.gelu(self.style(self.dropout(standardized)))
            styled = self.title_vectors(pooled_titles, style)
        both = styled + gate * self.log_image_weight.exp() * image
        has_both = (has_title & has_image)[:, None]
        alone = torch.where(has_title[:, None], title, image)
        evidence = TagEvidence(
            vectors=torch.where(has_both, both, alone),
            title_vectors=title,
            image_vectors=image,
            match_logits=match_logits.squeeze(-1),
            image_gate=gate.squeeze(-1),
            familiarity=familiarity,
            has_title=has_title,
            has_image=has_image,
            image_features=standardized * has_image[:, None],
            title_features=pooled_titles * has_title[:, None],
            style=style,
        )
        frames = None if masks[0] is None else masks[0] & evidence.uses_image[:, None]
        evidence.vectors = evidence.vectors + self.attention_weight * self.attention_pooler(tokens, [frames, masks[1]])
        if word_features is not None:
            evidence.word_vectors = self._needed_word_vectors(word_features, evidence)
        return evidence

    def _needed_word_vectors(self, word_features: torch.Tensor, evidence: TagEvidence) -> torch.Tensor:
        """Compute the evidence of the image words, zero for examples with a title, which do not use them."""
        if torch.compiler.is_compiling():  # which rows are needed depends on the data
            return self.word_vectors(word_features)
        rows = evidence.has_image & ~evidence.has_title
        vectors = evidence.vectors.new_zeros(*word_features.shape[:2], evidence.vectors.shape[1])
        if rows.any():
            vectors[rows] = self.word_vectors(word_features[rows]).to(vectors.dtype)
        return vectors
