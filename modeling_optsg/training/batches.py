"""What a step looks at and what it minimises, the same for any number of processes."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather, pad_across_processes
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def micro_batches(batch_size: int, num_processes: int, most_items: int | None) -> int:
    """How many parts of a global batch each process computes one after the other.

    Args:
        batch_size: items of a step, over all processes.
        most_items: most items that fit a process at once; no limit if not given.

    Raises:
        ValueError: a process's part would have no item.
    """
    if batch_size < num_processes:
        raise ValueError(f"A batch of {batch_size} items cannot be shared by {num_processes} processes.")
    if most_items is not None and most_items < 1:
        raise ValueError(f"A process computes at least one item at once, not {most_items}.")
    parts = 1 if most_items is None else math.ceil(math.ceil(batch_size / num_processes) / most_items)
    if parts * num_processes > batch_size:
        raise ValueError(
            f"{batch_size} items cannot be shared by {num_processes} processes in {parts} parts each; choose a batch "
            "that they divide, or a larger process_batch_size."
        )
    return parts


class SharedSteps:
    """The steps of a training, and what of each is one process's.

    A step's items are divided among processes and parts in order, so what a step sees depends on `seed` alone.

    Args:
        items: how many items there are, or what has so many.
        batch_size: items of a step, over all processes.
        steps: of the whole training.
        parts: how many parts each process has in a step (see [`micro_batches`]); one batch is yielded for each.
        start: steps that are done already.

    Raises:
        ValueError: there are no items.
    """

    def __init__(
        self,
        items,
        batch_size: int,
        steps: int,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        parts: int = 1,
        start: int = 0,
    ):
        if not (items if isinstance(items, int) else len(items)):
            raise ValueError("There are no items to train on.")
        self.items, self.batch_size, self.steps, self.seed = items, batch_size, steps, seed
        self.process, self.num_processes, self.parts, self.start = process, num_processes, parts, start

    def own_places(self) -> list[np.ndarray]:
        """For each of this process's parts the places of its items among a step's."""
        shares = np.array_split(np.arange(self.batch_size), self.num_processes * self.parts)
        return shares[self.process * self.parts : (self.process + 1) * self.parts]


class GlobalBatches(SharedSteps, Sampler):
    """Batches of (item, seed) for one process, from the step asked for to the last.

    Items come epoch after epoch, each epoch in an order of its own, and every `batch_size` of them are a step's: no
    item is seen twice or missed in an epoch, and the last batch is as large as the others.

    Args: those of [`SharedSteps`], with the number of items, and
        lengths: of the items; those of a step are then of like length, as `transformers` groups them.

    Yields:
        lists of pairs for [`SeededItems`].
    """

    def __init__(self, *args, lengths: Sequence[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lengths = lengths

    def __len__(self) -> int:
        return (self.steps - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        own = self.own_places()
        for step in range(self.start, self.steps):
            pairs = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                if place // self.items != epoch:
                    epoch = place // self.items
                    order = self._order(epoch)
                item = int(order[place % self.items])
                pairs.append((item, item_seed(self.seed, epoch, item)))
            for places in own:
                yield [pairs[place] for place in places]

    def _order(self, epoch: int) -> Sequence[int]:
        random = np.random.default_rng([self.seed, epoch])
        if self.lengths is None:
            return random.permutation(self.items)
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # The first items of an epoch fill up the last step of the one before; groups begin with the next.
        begun = -epoch * self.items % self.batch_size
        return order[self.items - begun :] + order[: self.items - begun]


def item_seed(seed: int, epoch: int, item: int | str) -> int:
    """The seed of an item's random choices in an epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{item}".encode(), digest_size=7).digest(), "big")


class SeededItems(Dataset):
    """Items of a map-style dataset with what [`GlobalBatches`] says of them, as `item_index` and `item_seed`."""

    def __init__(self, items):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, pair: tuple[int, int]) -> dict:
        item, seed = pair
        return {**self.items[item], "item_index": item, "item_seed": seed}


def share_candidates(
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


def weigh_losses(
    accelerator: Accelerator, config, batches: Sequence[Mapping], weights: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """What each part of a global batch must multiply its mean losses with, so that their sum over parts and processes
    is the mean over the global batch's tokens, prompts and items.

    Exact for OP-TSG, whose empty slots count as they do without `pad_slot_share`, and for losses that are means over
    items.

    Args:
        config: the model's.
        batches: this process's parts, of [`OPTSGDataCollator`].
        weights: 0 for a part that does not count.

    Returns:
        For each part its share of the written tokens (`generation_loss`), prompts (`alignment_loss`) and items
        (`set_loss`).
    """
    counts = torch.tensor([_counts(config, batch) for batch in batches])
    if weights is not None:
        counts = counts * torch.tensor(weights)[:, None]
    totals = accelerator.reduce(counts.sum(dim=0).to(accelerator.device), "sum").cpu()
    shares = (counts / totals.clamp(min=1e-9)).tolist()
    return [dict(zip(("generation_loss", "alignment_loss", "set_loss"), row)) for row in shares]


def weighted_losses(config, outputs: Mapping, shares: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """A part's contribution to the global batch's loss and its parts: `loss`, and those of the parts that there are.

    Args:
        config: the model's, with the weight of each part.
        outputs: of the model; shares: of [`weigh_losses`].
    """
    if outputs.get("alignment_loss") is None:
        return {"loss": outputs["loss"] * shares["set_loss"]}
    weights = {"generation_loss": 1.0, "alignment_loss": config.alignment_weight}
    weights["set_loss"] = config.set_alignment_weight
    parts = {name: outputs[name] * shares[name] for name in weights if outputs.get(name) is not None}
    return {"loss": sum(weights[name] * part for name, part in parts.items()), **parts}


def _counts(config, batch: Mapping) -> tuple[float, float, float]:
    """Weights of a batch's mean losses: of its written tokens, its prompts and its items."""
    labels = batch["labels"]
    given = labels >= 0
    items, tags = labels.shape[0], int(given.sum())
    empty = items * config.num_prompts - tags
    # Each tag is its tokens and [SEP]; an empty slot is one [PAD].
    lengths = int(batch["tag_lengths"][labels[given]].sum()) if "tag_lengths" in batch else 0
    return lengths + tags + empty, tags + config.alignment_pad_weight * empty, float(items)
