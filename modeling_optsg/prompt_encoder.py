"""Prompt encoder: K learned queries look at the memory and become the example's order prompts."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from .layers import TransformerLayer


class PromptEncoder(nn.Module):
    """Turns K learned queries into the order prompts of each example.

    In every layer the queries attend to one another and to the memory.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_prompts, config.hidden_size))
        self.layers = nn.ModuleList(
            TransformerLayer(config, cross_attention=True) for _ in range(config.num_prompt_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
        pooled: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Compute the order prompts.

        Args:
            memory: `[batch, memory length, hidden_size]`.
            memory_mask: Boolean `[batch, memory length]`, true for real tokens.
            pooled: `[batch, hidden_size]`, added to every query, so that the queries differ between examples
                from the first layer on.
            output_attentions: Return the attention weights with any attention implementation.

        Returns:
            The order prompts `[batch, num_prompts, hidden_size]`, and for each layer its attention over the
            memory `[batch, heads, num_prompts, memory length]` (`None` unless asked for or attention is eager).
        """
        hidden_states = self.queries.expand(memory.shape[0], -1, -1)
        if pooled is not None:
            hidden_states = hidden_states + pooled[:, None]
        attentions = []
        for layer in self.layers:
            hidden_states, weights = layer(
                hidden_states, None, memory, memory_mask[:, None, None, :], output_attentions
            )
            attentions.append(weights)
        return self.norm(hidden_states), attentions
