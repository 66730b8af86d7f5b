"""kNN: what a user would try first. The tags of the most similar training items, by a weighted vote."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin

from modeling_optsg.baselines.configuration import KNNConfig
from modeling_optsg.baselines.pooling import pool_frames
from modeling_optsg.generation_optsg import OPTSGGenerateOutput, evaluation_mode, plain_settings
from modeling_optsg.layers import pool_tokens
from modeling_optsg.modeling_optsg import OPTSGPreTrainedModel, OPTSGTowers
from modeling_optsg.tag_classifier import TagClasses
from modeling_optsg.tag_ranking import collect_tags


class KNNForTagVote(OPTSGPreTrainedModel, GenerationMixin):
    """Neighbours by `title similarity + picture_weight * picture similarity`, cosine similarities of mean-pooled
    features of the towers (pictures centred on the training mean). Each votes for its tags with its similarity; a
    tag's score is its share of all votes. There is nothing to train: [`remember`] takes the training items in.
    """

    config_class = KNNConfig

    def __init__(self, config: KNNConfig):
        super().__init__(config)
        self.model = OPTSGTowers(config)
        self.tag_classes = TagClasses(config)
        widths = (config.frame_feature_size, config.text_config.hidden_size)
        for name, width in zip(("pictures", "titles"), widths):
            self.register_buffer(name, torch.zeros(config.num_items, width))
        self.register_buffer("picture_mean", torch.zeros(widths[0]))
        # Padded with one class more than there are, which is thrown away after the count.
        empty = torch.full((config.num_items, config.max_item_tags), config.num_tag_classes, dtype=torch.int32)
        self.register_buffer("item_tags", empty)
        self.post_init()
        self.generation_config = GenerationConfig(
            threshold=0.0, neighbours=min(10, max(config.num_items, 1)), picture_weight=0.4
        )

    def set_tag_classes(self, input_ids, counts=None) -> None:
        """Says which tag each class is; see [`TagClasses.set_tags`]."""
        self.tag_classes.set_tags(input_ids, counts)

    def remember(self, pictures: torch.Tensor, titles: torch.Tensor, item_tags: Sequence[Sequence[int]]) -> None:
        """Takes in the training items.

        Args:
            pictures: `[items, frame_feature_size]`, mean-pooled; zero for an item without one.
            titles: `[items, text width]`, likewise.
            item_tags: the classes of each item's tags.

        Raises:
            ValueError: there are none, or not as many of one as of the others.
        """
        if not len(pictures) == len(titles) == len(item_tags) > 0:
            raise ValueError(
                f"{len(pictures)} pictures, {len(titles)} titles and {len(item_tags)} tag sets: there must be as "
                "many of each, and at least one."
            )
        config = self.config
        config.num_items, config.max_item_tags = len(item_tags), max(1, *map(len, item_tags))
        seen = pictures.any(dim=1)
        self.picture_mean.copy_(pictures[seen].mean(dim=0) if seen.any() else torch.zeros_like(self.picture_mean))
        device = self.picture_mean.device
        self.pictures = F.normalize((pictures.to(device) - self.picture_mean) * seen.to(device)[:, None], dim=-1)
        self.titles = F.normalize(titles.to(device), dim=-1)
        shape = (config.num_items, config.max_item_tags)
        self.item_tags = torch.full(shape, config.num_tag_classes, dtype=torch.int32, device=device)
        for row, classes in enumerate(item_tags):
            self.item_tags[row, : len(classes)] = torch.tensor(list(classes), dtype=torch.int32)

    def similarity(self, pictures: torch.Tensor | None, titles: torch.Tensor | None, picture_weight: float):
        """`[batch, num_items]`; an item without a picture or a title is compared by what it has."""
        total = 0.0
        if titles is not None:
            total = total + F.normalize(titles, dim=-1) @ self.titles.float().T
        if pictures is not None:
            seen = pictures.any(dim=1, keepdim=True)
            centred = F.normalize((pictures - self.picture_mean) * seen, dim=-1)
            total = total + picture_weight * centred @ self.pictures.float().T
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
        picture_weight: float | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> OPTSGGenerateOutput:
        """Each item's tags by falling share of the vote.

        Args:
            pixel_values, …, attention_mask: see [`OPTSGModel.forward`].
            threshold: tags with a smaller share are left out.
            max_tags: at most so many tags an item.
            neighbours: k, how many training items vote.
            picture_weight: how much the pictures' likeness counts beside the titles'.
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
            picture_weight=picture_weight,
        )
        k, weight = settings["neighbours"], settings["picture_weight"]
        if not isinstance(k, int) or not 1 <= k <= self.config.num_items:
            raise ValueError(f"neighbours={k!r} must be a whole number from 1 to num_items={self.config.num_items}.")
        if weight < 0:
            raise ValueError(f"picture_weight={weight} must not be negative.")
        with evaluation_mode(self):
            frames, titles = self.model.read(
                pixel_values, frame_features, frame_mask, input_ids, title_features, attention_mask
            )
        if frames is None and titles is None:
            raise ValueError("Nothing to look at: give pixel_values, frame_features, input_ids or title_features.")
        similarity = self.similarity(pool_frames(frames, frame_mask), pool_tokens(titles, attention_mask), weight)
        weights, rows = similarity.topk(k, dim=1)
        # An unlike item has no negative vote.
        weights = weights.clamp(min=1e-6)
        weights = weights / weights.sum(dim=1, keepdim=True)
        tags = self.item_tags[rows].long().flatten(1)
        votes = weights.new_zeros(len(rows), self.config.num_tag_classes + 1)
        votes.scatter_add_(1, tags, weights.repeat_interleave(self.config.max_item_tags, dim=1))
        most = max(int((votes[:, :-1] > 0).sum(dim=1).max()), 1)
        shares, classes = votes[:, :-1].topk(most, dim=1)
        log_probs = shares.clamp(max=1.0).log()
        tokens = self.tag_classes.of(classes)[:, :, None]
        collected = collect_tags(
            tokens, log_probs[:, :, None], settings["threshold"], settings["max_tags"], self.config.tag_pad_token_id
        )
        return OPTSGGenerateOutput(sequences=collected.sequences, tag_scores=collected.tag_scores)


KNNConfig.register_for_auto_class()
KNNForTagVote.register_for_auto_class("AutoModel")

__all__ = ["KNNForTagVote"]
