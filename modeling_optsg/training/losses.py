"""Losses of a global batch that is divided among processes and micro-batches."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather, pad_across_processes

from modeling_optsg.configuration_optsg import OPTSGConfig
from modeling_optsg.data.collator import TagTable

LOSSES = ("generation_loss", "alignment_loss", "classifier_loss")


def gather_candidates(
    accelerator: Accelerator,
    config: OPTSGConfig,
    batches: Sequence[dict],
    tag_table: TagTable | None,
    num_negatives: int = 0,
    seed: Sequence[int] = (0,),
    weights: Sequence[float] | None = None,
) -> None:
    """Make every tag of a global batch a candidate in the tag alignment of all its micro-batches.

    Adds `negative_input_ids` and `negative_features` to the batches in place. With `config.num_sampled_tokens`, the
    output layers of all micro-batches share their tokens too, as `step_tokens` and `sampled_tokens`. Without a table
    each micro-batch keeps its own tags.

    Args:
        accelerator: The accelerator.
        config: Configuration of the model.
        batches: Micro-batches of this process, from [`OPTSGDataCollator`].
        tag_table: Text features of all training tags, or `None`.
        num_negatives: Number of random training tags to add as candidates.
        seed: Seed of the random tags and tokens, the same in all processes.
        weights: Weight of each micro-batch. Tags of a micro-batch of weight 0 are no candidates.
    """
    if tag_table is None or not all("labels" in batch for batch in batches):
        return
    counted = [batch for batch, weight in zip(batches, weights or [1.0] * len(batches)) if weight]
    # A process without any tags takes part in the gathering with padding.
    ids = [tag_table.rows_of(batch["labels"]).flatten() for batch in counted] or [torch.tensor([-1])]
    candidates = torch.cat(ids).unique().to(accelerator.device)
    if accelerator.num_processes > 1:
        candidates = gather(pad_across_processes(candidates, dim=0, pad_index=-1))
    candidates = candidates.unique().cpu()
    candidates = candidates[candidates >= 0]
    random = np.random.default_rng(seed)
    if config.num_sampled_tokens:
        tokens = _sample_tokens(config, [tag_table.input_ids[tag] for tag in candidates.tolist()], random)
        for batch in counted:
            batch |= tokens
    if num_negatives:
        tags = len(tag_table.tags)
        drawn = random.choice(tags, min(num_negatives, tags), replace=False)
        candidates = torch.cat([candidates, torch.from_numpy(drawn)]).unique()
    for batch in batches:
        # The model leaves out those that an example of the batch has.
        negatives = tag_table.encode(candidates[None])
        batch["negative_input_ids"] = negatives["labels"].to(batch["labels"].device)
        batch["negative_features"] = negatives["features"].to(batch["labels"].device)


def _sample_tokens(
    config: OPTSGConfig, input_ids: Sequence[Sequence[int]], random: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Return the tokens of the step's tags and a random sample of the others."""
    used = {token for tag in input_ids for token in tag}
    used = np.array(sorted(used | {config.tag_pad_token_id, config.tag_sep_token_id}))
    others = np.setdiff1d(np.arange(config.tag_vocab_size), used, assume_unique=True)
    sampled = random.choice(others, min(config.num_sampled_tokens, len(others)), replace=False)
    return {"step_tokens": torch.from_numpy(used), "sampled_tokens": torch.from_numpy(sampled)}


def global_loss_weights(
    accelerator: Accelerator,
    config: OPTSGConfig,
    batches: Sequence[Mapping],
    weights: Sequence[float] | None = None,
) -> list[dict[str, float]]:
    """Return factors that turn mean losses of micro-batches into means over the global batch.

    Each mean loss times its factor, summed over micro-batches and processes, is the mean over the tokens, prompts or
    examples of the global batch. This is exact for OP-TSG, where `pad_slot_ratio` does not change the weight of empty
    slots, and for losses that are means over examples.

    Args:
        accelerator: The accelerator.
        config: Configuration of the model.
        batches: Micro-batches of this process, from [`OPTSGDataCollator`].
        weights: Weight of each micro-batch; 0 leaves it out.

    Returns:
        For each micro-batch the factors of `generation_loss`, `alignment_loss` and `classifier_loss`.
    """
    counts = torch.tensor([_loss_counts(config, batch) for batch in batches])
    if weights is not None:
        counts = counts * torch.tensor(weights)[:, None]
    totals = accelerator.reduce(counts.sum(dim=0).to(accelerator.device), "sum").cpu()
    return [dict(zip(LOSSES, row)) for row in (counts / totals.clamp(min=1e-9)).tolist()]


def weighted_losses(config: OPTSGConfig, outputs: Mapping, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Return what a micro-batch contributes to the losses of the global batch.

    Args:
        config: Configuration of the model, with the weight of each loss.
        outputs: Outputs of the model.
        weights: Factors of the micro-batch, from [`global_loss_weights`].

    Returns:
        `loss`, and the losses it consists of if there are several.
    """
    if outputs.get("alignment_loss") is None:
        return {"loss": outputs["loss"] * weights["classifier_loss"]}
    loss_weights = dict(zip(LOSSES, (1.0, config.alignment_loss_weight, config.classifier_loss_weight)))
    losses = {name: outputs[name] * weights[name] for name in LOSSES if outputs.get(name) is not None}
    return {"loss": sum(loss_weights[name] * loss for name, loss in losses.items()), **losses}


def _loss_counts(config: OPTSGConfig, batch: Mapping) -> tuple[float, float, float]:
    """Return what the mean losses of a batch are means over: tokens, weighted prompts and examples."""
    labels = batch["labels"]
    examples, tags = labels.shape[0], int((labels >= 0).any(dim=-1).sum())
    empty = examples * config.num_prompts - tags
    # A tag consists of its tokens and [SEP]; an empty slot holds one [PAD].
    lengths = int((labels >= 0).sum())
    return lengths + tags + empty, tags + config.no_object_weight * empty, float(examples)
