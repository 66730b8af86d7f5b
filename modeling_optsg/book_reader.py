"""Book reader: order prompts point at the tags of similar examples."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .layers import Standardizer, TransformerLayer

# Initially, a slot generates its tag instead of pointing at a candidate.
INITIAL_GENERATE_LOGIT = 3.0
# Pointers of padding. Not -inf, because an example may have no candidates.
NO_POINTER = -1e4
MIN_LOG_MISSED = -1e-6


@dataclass
class CandidateTags:
    """Candidate tags from a book, the tags of similar examples.

    Args:
        embeddings: `[batch, candidates, hidden_size]`, the mean embedding of each tag's tokens.
        evidence: `[batch, candidates, book_evidence_size]`, how similar the examples with the tag are.
        mask: Boolean `[batch, candidates]`, false for padding.
    """

    embeddings: torch.Tensor
    evidence: torch.Tensor
    mask: torch.Tensor


class BookReader(nn.Module):
    """Decides for each slot whether it generates its tag or points at a candidate.

    Order prompts and candidates attend to one another and to the memory. Each slot has one distribution over all
    candidates and over generating. The reader does not change the rest of the model, so a model generates the same
    tags with and without a book.

    The model was trained on the examples that the reader is trained on, so their order prompts and memory say more
    about their tags than those of new examples. In training, each of the two is therefore set to zero for a random
    half of the examples.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        width = config.hidden_size
        layer_config = copy.copy(config)
        layer_config.intermediate_size = 2 * width
        self.standardizer = Standardizer(config.book_evidence_size)
        self.tag_projection = nn.Linear(width, width)
        self.evidence_projection = nn.Sequential(
            nn.Linear(config.book_evidence_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.prompt_projection = nn.Linear(width, width)
        self.slots = nn.Parameter(torch.empty(config.num_prompts, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(layer_config, cross_attention=True) for _ in range(config.num_reader_layers)
        )
        self.slot_norm, self.candidate_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.evidence_logit = nn.Linear(config.book_evidence_size, 1)
        self.generate_logit = nn.Linear(width, 1)

    def forward(
        self,
        order_prompts: torch.Tensor,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
        candidates: CandidateTags,
    ) -> torch.Tensor:
        """Compute the pointers.

        Args:
            order_prompts: `[batch, num_prompts, hidden_size]`.
            memory: `[batch, memory length, hidden_size]`.
            memory_mask: Boolean `[batch, memory length]`.
            candidates: The candidates of each example.

        Returns:
            Log-probabilities `[batch, num_prompts, candidates + 1]`. The last column is that of generating the tag.
        """
        if self.training:
            order_prompts, memory = _hide_half(order_prompts), _hide_half(memory)
        evidence = self.standardizer(candidates.evidence).to(self.slots.dtype)
        embeddings = F.layer_norm(candidates.embeddings, candidates.embeddings.shape[-1:])
        tags = self.norm(self.tag_projection(embeddings) + self.evidence_projection(evidence))
        slots = self.norm(self.prompt_projection(order_prompts) + self.slots)
        hidden_states = self.dropout(torch.cat([slots, tags], dim=1))
        mask = F.pad(candidates.mask, (slots.shape[1], 0), value=True)[:, None, None, :]
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, mask, memory, memory_mask[:, None, None, :])
        slots, tags = hidden_states.split([slots.shape[1], tags.shape[1]], dim=1)
        slots, tags = self.slot_norm(slots), self.candidate_norm(tags)
        logits = self.q_proj(slots) @ self.k_proj(tags).transpose(1, 2) / tags.shape[-1] ** 0.5
        logits = logits.float() + self.evidence_logit(evidence).float().transpose(1, 2)
        logits = logits.masked_fill(~candidates.mask[:, None], NO_POINTER)
        return torch.cat([logits, self.generate_logit(slots).float()], dim=-1).log_softmax(dim=-1)

    def loss(self, log_pointers: torch.Tensor, mask: torch.Tensor, is_correct: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the probability that at least one slot points at a candidate.

        Args:
            log_pointers: Output of [`forward`].
            mask: Boolean `[batch, candidates]`, false for padding.
            is_correct: Boolean `[batch, candidates]`, whether the example has the tag.
        """
        log_missed = log_missed_by_all(log_pointers)
        log_hit = torch.log(-torch.expm1(log_missed))
        return -torch.where(is_correct, log_hit, log_missed)[mask].mean()


def log_missed_by_all(log_pointers: torch.Tensor) -> torch.Tensor:
    """Return the log-probability that no slot points at a candidate, `[batch, candidates]`.

    Args:
        log_pointers: `[batch, num_prompts, candidates + 1]`, output of [`BookReader.forward`].
    """
    pointers = log_pointers[..., :-1].exp().clamp(max=1 - 1e-6)
    return torch.log1p(-pointers).sum(dim=1).clamp(max=MIN_LOG_MISSED)


def _hide_half(tokens: torch.Tensor) -> torch.Tensor:
    """Set the tokens `[batch, length, width]` of a random half of the examples to zero."""
    return tokens * (torch.rand(len(tokens), 1, 1, device=tokens.device) < 0.5)
