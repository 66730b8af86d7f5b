"""Room 2: K learned queries look at the memory and become the item's order prompts."""

import torch
from torch import nn

from .transformer import TransformerLayer


class OrderPromptEncoder(nn.Module):
    """K learned queries; in each layer they see one another and the memory."""

    def __init__(self, config):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_prompts, config.hidden_size))
        self.layers = nn.ModuleList(
            TransformerLayer(config, cross_attention=True) for _ in range(config.num_prompt_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self, memory: torch.Tensor, memory_mask: torch.Tensor, summary: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """
        Args:
            memory: `[batch, memory length, hidden_size]`.
            memory_mask: `[batch, memory length]`, boolean.
            summary: `[batch, hidden_size]`, added to every query: prompts begin as the item's own.

        Returns:
            Order prompts `[batch, num_prompts, hidden_size]` and each layer's attention over the memory
            (`[batch, heads, num_prompts, memory length]`, `None` unless attention is eager).
        """
        hidden_states = self.queries.expand(memory.shape[0], -1, -1)
        if summary is not None:
            hidden_states = hidden_states + summary[:, None]
        attentions = []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, None, memory, memory_mask[:, None, None, :])
            attentions.append(weights)
        return self.norm(hidden_states), attentions
