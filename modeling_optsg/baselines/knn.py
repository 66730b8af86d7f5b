"""kNN: what a user would try first. The tags of the most similar training examples, by a weighted vote."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin

from modeling_optsg.baselines.configuration import KNNConfig
from modeling_optsg.baselines.pooling import pool_frames
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode, plain_settings
from modeling_optsg.layers import pool_tokens
from modeling_optsg.modeling_optsg import OPTSGPreTrainedModel, OPTSGTowers
from modeling_optsg.tag_classifier import LabelVocabulary
from modeling_optsg.tag_ranking import rank_tags


class KNNForTagVote(OPTSGPreTrainedModel, GenerationMixin):
    """Neighbours by `title similarity + image_weight * image similarity`, cosine similarities of mean-pooled
    features of the towers (images centred on the training mean). Each votes for its tags with its similarity; a
    tag's score is its share of all votes. There is nothing to train: [`fit`] takes the training examples in.
    """

    config_class = KNNConfig

    def __init__(self, config: KNNConfig):
        super().__init__(config)
        self.model = OPTSGTowers(config)
        self.label_vocabulary = LabelVocabulary(config)
        widths = (config.frame_feature_size, config.text_config.hidden_size)
        for name, width in zip(("images", "titles"), widths):
            self.register_buffer(name, torch.zeros(config.num_examples, width))
        self.register_buffer("image_mean", torch.zeros(widths[0]))
        # Padded with one class more than there are, which is thrown away after the count.
        empty = torch.full(
            (config.num_examples, config.max_tags_per_example), config.num_tag_classes, dtype=torch.int32
        )
        self.register_buffer("example_tags", empty)
        self.post_init()
        self.generation_config = GenerationConfig(
            threshold=0.0, neighbours=min(10, max(config.num_examples, 1)), image_weight=0.4
        )

    def set_label_vocabulary(self, input_ids, counts=None) -> None:
        """Says which tag each class is; see [`LabelVocabulary.set_tags`]."""
        self.label_vocabulary.set_tags(input_ids, counts)

    def fit(self, images: torch.Tensor, titles: torch.Tensor, example_tags: Sequence[Sequence[int]]) -> None:
        """Takes in the training examples.

        Args:
            images: `[examples, frame_feature_size]`, mean-pooled; zero for an example without one.
            titles: `[examples, text width]`, likewise.
            example_tags: the classes of each example's tags.

        Raises:
            ValueError: there are none, or not as many of one as of the others.
        """
        if not len(images) == len(titles) == len(example_tags) > 0:
            raise ValueError(
                f"{len(images)} images, {len(titles)} titles and {len(example_tags)} tag sets: there must be as "
                "many of each, and at least one."
            )
        config = self.config
        config.num_examples, config.max_tags_per_example = len(example_tags), max(1, *map(len, example_tags))
        seen = images.any(dim=1)
        self.image_mean.copy_(images[seen].mean(dim=0) if seen.any() else torch.zeros_like(self.image_mean))
        device = self.image_mean.device
        self.images = F.normalize((images.to(device) - self.image_mean) * seen.to(device)[:, None], dim=-1)
        self.titles = F.normalize(titles.to(device), dim=-1)
        shape = (config.num_examples, config.max_tags_per_example)
        self.example_tags = torch.full(shape, config.num_tag_classes, dtype=torch.int32, device=device)
        for row, classes in enumerate(example_tags):
            self.example_tags[row, : len(classes)] = torch.tensor(list(classes), dtype=torch.int32)

    def similarity(self, images: torch.Tensor | None, titles: torch.Tensor | None, image_weight: float):
        """`[batch, num_examples]`; an example without an image or a title is compared by what it has."""
        total = 0.0
        if titles is not None:
            total = total + F.normalize(titles, dim=-1) @ self.titles.float().T
        if images is not None:
            seen = images.any(dim=1, keepdim=True)
            centred = F.normalize((images - self.image_mean) * seen, dim=-1)
            total = total + image_weight * centred @ self.images.float().T
        return total

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
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
        """Each example's tags by falling share of the vote.

        Args:
            pixel_values, …, attention_mask: see [`OPTSGModel.forward`].
            threshold: tags with a smaller share are left out.
            max_tags: at most so many tags an example.
            neighbours: k, how many training examples vote.
            image_weight: how much the images' similarity counts beside the titles'.
            generation_config: instead of the model's.

        Raises:
            ValueError: there is nothing to look at, or a setting is out of range.
        """
        settings = plain_settings(
            self,
            generation_config,
            threshold=threshold,
            max_tags=max_tags,
            neighbours=neighbours,
            image_weight=image_weight,
        )
        k, weight = settings["neighbours"], settings["image_weight"]
        if not isinstance(k, int) or not 1 <= k <= self.config.num_examples:
            raise ValueError(
                f"neighbours={k!r} must be a whole number from 1 to num_examples={self.config.num_examples}."
            )
        if weight < 0:
            raise ValueError(f"image_weight={weight} must not be negative.")
        with evaluation_mode(self):
            frames, titles = self.model.read(
                pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask
            )
        if frames is None and titles is None:
            raise ValueError("Nothing to look at: give pixel_values, frame_features, input_ids or title_features.")
        similarity = self.similarity(pool_frames(frames, frame_mask), pool_tokens(titles, attention_mask), weight)
        weights, rows = similarity.topk(k, dim=1)
        # An unlike example has no negative vote.
        weights = weights.clamp(min=1e-6)
        weights = weights / weights.sum(dim=1, keepdim=True)
        tags = self.example_tags[rows].long().flatten(1)
        votes = weights.new_zeros(len(rows), self.config.num_tag_classes + 1)
        votes.scatter_add_(1, tags, weights.repeat_interleave(self.config.max_tags_per_example, dim=1))
        most = max(int((votes[:, :-1] > 0).sum(dim=1).max()), 1)
        shares, classes = votes[:, :-1].topk(most, dim=1)
        log_probs = shares.clamp(max=1.0).log()
        tokens = self.label_vocabulary.of(classes)[:, :, None]
        collected = rank_tags(
            tokens, log_probs[:, :, None], settings["threshold"], settings["max_tags"], self.config.tag_pad_token_id
        )
        return OPTSGGenerateOutput(sequences=collected.sequences, tag_scores=collected.tag_scores)


KNNConfig.register_for_auto_class()
KNNForTagVote.register_for_auto_class("AutoModel")

__all__ = ["KNNForTagVote"]
