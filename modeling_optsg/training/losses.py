"""Losses of a global batch."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather, pad_across_processes


def gather_candidates(
    accelerator: Accelerator,
    config,
    batches: Sequence[dict],
    tag_table,
    num_negatives: int = 0,
    seed: Sequence[int] = (0,),
    weights: Sequence[float] | None = None,
) -> None:
    """Makes every tag of a global batch a candidate of every prompt's alignment, in all its parts and processes, and
    its tokens those of every part's output layer.

    Changes `tag_features` of the batches of [`OPTSGDataCollator`] with a [`TagTable`] and, with `num_sampled_tokens`,
    gives them `step_tokens` and `sampled_tokens`. Without a table tags are embedded where they are, and each part has
    its own.

    Args:
        config: the model's.
        num_negatives: so many random tags of the table are candidates too, those that are not yet.
        seed: of what is drawn, the same in all processes.
        weights: 0 for a part that does not count, and whose tags are nobody's candidates.
    """
    if tag_table is None or not all("tag_ids" in batch for batch in batches):
        return
    counted = [batch for batch, weight in zip(batches, weights or [1.0] * len(batches)) if weight]
    # Of a process without any the first part's, marked as nobody's.
    ids = [batch["tag_ids"] for batch in counted] or [torch.full_like(batches[0]["tag_ids"], -1)]
    own = torch.cat(ids).unique().to(accelerator.device)
    if accelerator.num_processes > 1:
        own = gather(pad_across_processes(own, dim=0, pad_index=-1))
    everybody = own.unique().cpu()
    everybody = everybody[everybody >= 0]
    random = np.random.default_rng(seed)
    if config.num_sampled_tokens:
        written = {token for tag in everybody.tolist() for token in tag_table.input_ids[tag]}
        own = np.array(sorted(written | {config.tag_pad_token_id, config.tag_sep_token_id}))
        others = np.setdiff1d(np.arange(config.tag_vocab_size), own, assume_unique=True)
        drawn = random.choice(others, min(config.num_sampled_tokens, len(others)), replace=False)
        for batch in counted:
            batch |= {"step_tokens": torch.from_numpy(own), "sampled_tokens": torch.from_numpy(drawn)}
    if num_negatives:
        tags = len(tag_table.tags)
        drawn = random.choice(tags, min(num_negatives, tags), replace=False)
        everybody = torch.cat([everybody, torch.from_numpy(drawn)]).unique()
    for batch in batches:
        others = everybody[~torch.isin(everybody, batch["tag_ids"].cpu())]
        features = tag_table.features[others].to(batch["tag_features"])
        batch["tag_features"] = torch.cat([batch["tag_features"], features])


def global_loss_weights(
    accelerator: Accelerator, config, batches: Sequence[Mapping], weights: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """What each part of a global batch must multiply its mean losses with, so that their sum over parts and processes
    is the mean over the global batch's tokens, prompts and examples.

    Exact for OP-TSG, whose empty slots count as they do without `pad_slot_ratio`, and for losses that are means over
    examples.

    Args:
        config: the model's.
        batches: this process's parts, of [`OPTSGDataCollator`].
        weights: 0 for a part that does not count.

    Returns:
        For each part its share of the written tokens (`generation_loss`), prompts (`alignment_loss`) and examples
        (`classifier_loss`).
    """
    counts = torch.tensor([_counts(config, batch) for batch in batches])
    if weights is not None:
        counts = counts * torch.tensor(weights)[:, None]
    totals = accelerator.reduce(counts.sum(dim=0).to(accelerator.device), "sum").cpu()
    shares = (counts / totals.clamp(min=1e-9)).tolist()
    return [dict(zip(("generation_loss", "alignment_loss", "classifier_loss"), row)) for row in shares]


def weighted_losses(config, outputs: Mapping, shares: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """A part's contribution to the global batch's loss and its parts: `loss`, and those of the parts that there are.

    Args:
        config: the model's, with the weight of each part.
        outputs: of the model; shares: of [`global_loss_weights`].
    """
    if outputs.get("alignment_loss") is None:
        return {"loss": outputs["loss"] * shares["classifier_loss"]}
    weights = {"generation_loss": 1.0, "alignment_loss": config.alignment_loss_weight}
    weights["classifier_loss"] = config.classifier_loss_weight
    parts = {name: outputs[name] * shares[name] for name in weights if outputs.get(name) is not None}
    return {"loss": sum(weights[name] * part for name, part in parts.items()), **parts}


def _counts(config, batch: Mapping) -> tuple[float, float, float]:
    """Weights of a batch's mean losses: of its written tokens, its prompts and its examples."""
    labels = batch["labels"]
    given = labels >= 0
    examples, tags = labels.shape[0], int(given.sum())
    empty = examples * config.num_prompts - tags
    # Each tag is its tokens and [SEP]; an empty slot is one [PAD].
    lengths = int(batch["tag_lengths"][labels[given]].sum()) if "tag_lengths" in batch else 0
    return lengths + tags + empty, tags + config.no_object_weight * empty, float(examples)
