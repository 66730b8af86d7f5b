"""kNN: a weighted vote of the nearest training examples, with features from the same towers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.utils import ModelOutput

from modeling_optsg.base_models import OPTSGPreTrainedModel, OPTSGTowers
from modeling_optsg.baselines.configuration import KNNConfig
from modeling_optsg.baselines.pooling import ImageScaling
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode
from modeling_optsg.generation_settings import read_ranking_settings
from modeling_optsg.layers import pool_tokens
from modeling_optsg.tag_classifier import LabelVocabulary
from modeling_optsg.tag_ranking import rank_tags


@dataclass
class KNNOutput(ModelOutput):
    """Output of [`KNNForTagVote`].

    Args:
        scores: `[batch, num_tag_classes]`, the ratio of the votes that each tag gets.
    """

    scores: torch.Tensor | None = None


class KNNForTagVote(OPTSGPreTrainedModel, GenerationMixin):
    """Predicts the tags of the k nearest training examples, each weighted by its similarity.

    The similarity is `title similarity + image_weight * image similarity`. Both terms are cosine similarities of
    pooled tower features; image features are standardised by the training images. The training examples are stored in
    buffers and saved with the model. There are no trained parameters.
    """

    config_class = KNNConfig

    def __init__(self, config: KNNConfig):
        super().__init__(config)
        self.model = OPTSGTowers(config)
        # Collects what the towers declare, such as the statistics that keep 32 bits.
        self.model.post_init()
        self.label_vocabulary = LabelVocabulary(config)
        widths = (config.image_feature_size, config.text_config.hidden_size)
        for name, width in zip(("images", "titles"), widths, strict=True):
            self.register_buffer(name, torch.zeros(config.num_examples, width))
        self.image_scaling = ImageScaling(widths[0])
        self.register_buffer("example_tags", self._empty_tags())
        self.post_init()
        self.generation_config = GenerationConfig(
            threshold=0.0, neighbours=min(10, max(config.num_examples, 1)), image_weight=0.4
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # No training examples.
            init.zeros_(self.images)
            init.zeros_(self.titles)
            init.constant_(self.example_tags, self.config.num_tag_classes)

    def _empty_tags(self) -> torch.Tensor:
        # Rows are padded with an additional class, whose votes are dropped.
        shape = (self.config.num_examples, self.config.max_tags_per_example)
        return torch.full(shape, self.config.num_tag_classes, dtype=torch.int32)

    def set_label_vocabulary(self, input_ids: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> None:
        """Set the tag of each class; see [`LabelVocabulary.set_tags`]."""
        self.label_vocabulary.set_tags(input_ids, counts)

    def fit(self, images: torch.Tensor, titles: torch.Tensor, example_tags: Sequence[Sequence[int]]) -> None:
        """Store the training examples.

        Args:
            images: `[examples, image_feature_size]`, zero for an example without an image.
            titles: `[examples, text width]`, mean-pooled, zero for an example without a title.
            example_tags: The classes of each example's tags.

        Raises:
            ValueError: There are no examples, or the lengths differ.
        """
        if not len(images) == len(titles) == len(example_tags) > 0:
            raise ValueError(
                f"{len(images)} images, {len(titles)} titles and {len(example_tags)} tag sets; expected the same "
                "number of each, at least one."
            )
        config, device = self.config, self.example_tags.device
        config.num_examples, config.max_tags_per_example = len(example_tags), max(1, *map(len, example_tags))
        self.image_scaling.fit(images)
        self.images = F.normalize(self.image_scaling(images.to(device)), dim=-1)
        self.titles = F.normalize(titles.to(device), dim=-1)
        self.example_tags = self._empty_tags().to(device)
        for row, classes in enumerate(example_tags):
            self.example_tags[row, : len(classes)] = torch.tensor(list(classes), dtype=torch.int32)

    def similarity(
        self, images: torch.Tensor | None, titles: torch.Tensor | None, image_weight: float
    ) -> torch.Tensor:
        """Compute the similarity `[batch, num_examples]` to the training examples.

        Args:
            images: `[batch, image_feature_size]`. A missing modality is ignored.
            titles: `[batch, text width]`, pooled.
            image_weight: Weight of the image similarity.
        """
        total = 0.0
        if titles is not None:
            total = total + F.normalize(titles, dim=-1) @ self.titles.float().T
        if images is not None:
            standardized = F.normalize(self.image_scaling(images), dim=-1)
            total = total + image_weight * standardized @ self.images.float().T
        return total

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        neighbours: int | None = None,
        image_weight: float | None = None,
    ) -> KNNOutput:
        """Compute the votes for each tag.

        Args:
            pixel_values, frame_features, image_features, frame_mask, input_ids, title_features, attention_mask: See
                [`OPTSGModel.forward`].
            neighbours: k, the number of training examples that vote.
            image_weight: Weight of the image similarity.

        Raises:
            ValueError: An example has neither an image nor a title, or a setting is out of range.
        """
        settings = self.generation_config
        k = settings.neighbours if neighbours is None else neighbours
        image_weight = settings.image_weight if image_weight is None else image_weight
        if not isinstance(k, int) or not 1 <= k <= self.config.num_examples:
            raise ValueError(f"neighbours={k!r} must be an integer from 1 to num_examples={self.config.num_examples}.")
        if image_weight < 0:
            raise ValueError(f"image_weight={image_weight} must not be negative.")
        vision, titles = self.model.encode_inputs(
            pixel_values, frame_features, image_features, frame_mask, input_ids, title_features, attention_mask
        )
        if vision is None and titles is None:
            raise ValueError("Nothing to encode: pass pixel_values, frame_features, input_ids or title_features.")
        images, titles = vision and vision.image_features, pool_tokens(titles, attention_mask)
        return KNNOutput(scores=self._vote(self.similarity(images, titles, image_weight), k))

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        threshold: float | None = None,
        max_tags: int | None = None,
        neighbours: int | None = None,
        image_weight: float | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> OPTSGGenerateOutput:
        """Predicts the tags of each example. The score of a tag is its ratio of the votes.

        Args:
            pixel_values, frame_features, image_features, frame_mask, input_ids, title_features, attention_mask: See
                [`OPTSGModel.forward`].
            threshold: Minimum score of a tag.
            max_tags: Maximum number of tags of an example.
            neighbours: k, the number of training examples that vote.
            image_weight: Weight of the image similarity.
            generation_config: Generation config that replaces the one of the model.

        Raises:
            ValueError: An example has neither an image nor a title, or a setting is out of range.
        """
        own = {"threshold": threshold, "max_tags": max_tags, "neighbours": neighbours, "image_weight": image_weight}
        settings = read_ranking_settings(self, generation_config, {}, **own)
        with evaluation_mode(self):
            votes = self(
                pixel_values,
                frame_features,
                image_features,
                frame_mask,
                input_ids,
                title_features,
                attention_mask,
                settings["neighbours"],
                settings["image_weight"],
            ).scores
        scores, classes = votes.topk(max(int((votes > 0).sum(dim=1).max()), 1), dim=1)
        ranked = rank_tags(
            self.label_vocabulary.tokens_of(classes)[:, :, None],
            scores.clamp(max=1.0).log()[:, :, None],
            settings["threshold"],
            settings["max_tags"],
            self.config.tag_pad_token_id,
        )
        return OPTSGGenerateOutput(sequences=ranked.sequences, tag_scores=ranked.tag_scores)

    def _vote(self, similarity: torch.Tensor, k: int) -> torch.Tensor:
        """Return the ratio of the votes for each class, `[batch, num_tag_classes]`."""
        weights, rows = similarity.topk(k, dim=1)
        # A neighbour with a negative similarity has no vote.
        weights = weights.clamp(min=1e-6)
        weights = weights / weights.sum(dim=1, keepdim=True)
        classes = self.example_tags[rows].long().flatten(1)
        votes = weights.new_zeros(rows.shape[0], self.config.num_tag_classes + 1)
        votes = votes.scatter_add(1, classes, weights.repeat_interleave(self.config.max_tags_per_example, dim=1))
        return votes[:, :-1]


KNNConfig.register_for_auto_class()
KNNForTagVote.register_for_auto_class("AutoModel")
