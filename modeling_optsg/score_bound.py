"""Upper bounds of tags' scores, by which generation drops hypotheses that no threshold lets through."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .tag_merging import MIN_SLOT_PROBABILITY, ClassifierOutput

# A threshold so close to 1 that rounding decides is treated as this.
MAX_THRESHOLD = 0.99
# Logits may differ by rounding between the bound and the final score.
TOLERANCE = 1e-3
# A slot whose hypothesis is below this ratio of the likeliest slot with the same tokens so far is dropped. It would
# usually generate the same tag, and hardly change its probability.
MIN_RATIO = 0.1


class PrefixTree:
    """The tags of the label vocabulary as a prefix tree in tensors.

    Tags are sorted by their tokens, so the tags below a node are neighbours. Node 0 is the root. Nodes are numbered
    level by level, and -1 stands for a prefix of no tag.

    Args:
        tokens: `[classes, max length]`, the tag of each class, padded with `pad_token_id`.
        pad_token_id: Token of [PAD].
    """

    def __init__(self, tokens: torch.Tensor, pad_token_id: int):
        rows = tokens.cpu().numpy().astype(np.int64)
        self.num_tokens = int(rows.max(initial=0)) + 1
        rows[rows == pad_token_id] = -1
        # The last key of `lexsort` is the most important one.
        order = np.lexsort(rows.T[::-1])
        rows = rows[order]
        nodes = np.zeros(len(rows), np.int64)
        edges, starts, sizes, count = [], [np.zeros(1, np.int64)], [np.array([len(rows)])], 1
        for column in rows.T:
            below = np.flatnonzero(column >= 0)
            # Ascending, because nodes are numbered in the order of the rows.
            keys, first, inverse, number = np.unique(
                nodes[below] * self.num_tokens + column[below],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            nodes[below] = count + inverse
            count += len(keys)
            edges.append(keys)
            starts.append(below[first])
            sizes.append(number)
        device = tokens.device
        self.classes = torch.from_numpy(order).to(device)
        # Edge i leads from node `edges[i] // num_tokens` with token `edges[i] % num_tokens` to node i + 1.
        self.edges, self.starts, self.sizes = (
            torch.from_numpy(np.concatenate(parts)).to(device) for parts in (edges, starts, sizes)
        )

    def find(self, prefixes: torch.Tensor) -> torch.Tensor:
        """Return the nodes `[rows]` of prefixes `[rows, length]`, -1 for a prefix of no tag."""
        nodes = torch.zeros(len(prefixes), dtype=torch.long, device=prefixes.device)
        if not len(self.edges):
            return nodes if prefixes.shape[1] == 0 else nodes - 1
        for tokens in prefixes.unbind(dim=1):
            # No tag has a token above the largest one of the tree.
            keys = torch.where((nodes >= 0) & (tokens < self.num_tokens), nodes * self.num_tokens + tokens, -1)
            index = torch.searchsorted(self.edges, keys).clamp(max=len(self.edges) - 1)
            nodes = torch.where(self.edges[index] == keys, index + 1, -1)
        return nodes

    def max_logits(self, logits: torch.Tensor, examples: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """Return the largest classifier logit among the tags below nodes.

        Args:
            logits: `[batch, classes]`.
            examples: `[rows]`, the example of each row.
            nodes: `[rows]`, from [`find`].

        Returns:
            `[rows]`, -inf at node -1.
        """
        sizes = torch.where(nodes >= 0, self.sizes[nodes], 0)
        rows = torch.arange(len(nodes), device=nodes.device).repeat_interleave(sizes)
        shift = self.starts[nodes] - (sizes.cumsum(0) - sizes)
        columns = self.classes[torch.arange(len(rows), device=rows.device) + shift[rows]]
        found = logits.new_full((len(nodes),), -torch.inf)
        return found.scatter_reduce_(0, rows, logits[examples[rows], columns], "amax")


class ScoreBound:
    """Tells which hypotheses can still become tags that reach the threshold of their example.

    A tag's score is at most that of the best classifier logit among the tags with the same prefix, fused with the
    probability that at least one slot generates the prefix. A novel tag has the weights of novel tags.

    Beyond this bound, a hypothesis is dropped if another slot has the same tokens with a much higher probability, see
    `MIN_RATIO`. A different tag with the same first tokens may be lost.

    Args:
        thresholds: Threshold of each example.
        classifier: The tag classifier's output. Without fusion weights, a score is the slots' probability.
        tree: The label vocabulary, given with fusion weights.
    """

    def __init__(self, thresholds: Sequence[float], classifier: ClassifierOutput | None, tree: PrefixTree | None):
        fused = classifier is not None and classifier.fusion_weights is not None
        weights = classifier.fusion_weights if fused else [(1.0, 0.0, 0.0, 1.0, 0.0)] * len(thresholds)
        self.weights = torch.tensor(weights)
        self.min_logits = torch.tensor(thresholds).clamp(max=MAX_THRESHOLD).logit() - TOLERANCE
        # The largest logit bounds the score only if its weight is not negative.
        self.min_logits[self.weights[:, 1] < 0] = -torch.inf
        self.logits, self.tree = (classifier.logits, tree) if fused else (None, None)
        if fused:
            self.weights, self.min_logits = self.weights.to(self.logits), self.min_logits.to(self.logits)

    def can_reach(self, examples: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        """Return which hypotheses can reach the threshold and matter for their tag's probability, boolean `[rows]`.

        Args:
            examples: `[rows]`, the example of each hypothesis.
            tokens: `[rows, length]`, all unfinished hypotheses of these examples, which have the same length.
            log_probs: `[rows]`, their log-probabilities.
        """
        same = examples
        for column in tokens.unbind(dim=1):
            _, same = torch.unique(same * (column.max() + 1) + column, return_inverse=True)
        log_missed = torch.log1p(-log_probs.exp().clamp(max=1 - 1e-7))
        missed = torch.zeros_like(log_missed).index_add_(0, same, log_missed)[same].exp()
        largest = (1 - missed).clamp(MIN_SLOT_PROBABILITY, 1 - MIN_SLOT_PROBABILITY).logit()
        smallest = torch.full_like(largest, MIN_SLOT_PROBABILITY).logit()
        slot_weight, classifier_weight, bias, novel_weight, novel_bias = self.weights.to(largest)[examples].unbind(1)
        best = torch.maximum(novel_weight * largest, novel_weight * smallest) + novel_bias
        if self.tree is not None:
            slots = torch.maximum(slot_weight * largest, slot_weight * smallest)
            logits = self.tree.max_logits(self.logits, examples, self.tree.find(tokens))
            # A weight of 0 times -inf would be NaN.
            known = torch.where(logits.isneginf(), -torch.inf, slots + classifier_weight * logits + bias)
            best = torch.maximum(best, known)
        likeliest = torch.full_like(log_probs, -torch.inf).scatter_reduce_(0, same, log_probs, "amax")[same]
        return (best >= self.min_logits.to(best)[examples]) & (log_probs >= likeliest + math.log(MIN_RATIO))
