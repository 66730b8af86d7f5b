"""Room 2: K learned queries look at the memory and become the item's order prompts."""

import torch
from torch import nn

from .layers import TransformerLayer


class OrderPromptEncoder(nn.Module):
    """K learned queries; in each layer they see one another and the memory. With `item_query` one more sees them all
    and is seen by none: what it finds is for the item as a whole."""

    def __init__(self, config):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_prompts, config.hidden_size))
        asked = config.item_query and config.set_alignment
        self.item_query = nn.Parameter(torch.empty(config.hidden_size)) if asked else None
        # Normalised, what the query finds is far larger than the summary it is added to, and at first it says nothing.
        self.found_share = nn.Parameter(torch.zeros(1)) if asked else None
        self.layers = nn.ModuleList(
            TransformerLayer(config, cross_attention=True) for _ in range(config.num_prompt_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
        summary: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor | None]:
        """
        Args:
            memory: `[batch, memory length, hidden_size]`.
            memory_mask: `[batch, memory length]`, boolean.
            summary: `[batch, hidden_size]`, added to every query: prompts begin as the item's own.
            output_attentions: return where prompts look whatever the attention's implementation.

        Returns:
            Order prompts `[batch, num_prompts, hidden_size]`, each layer's attention over the memory
            (`[batch, heads, num_prompts, memory length]`, `None` unless asked for or attention is eager), and what the
            item's query has found, `[batch, hidden_size]` or `None`.
        """
        queries, prompts, mask = self.queries, len(self.queries), None
        if self.item_query is not None:
            queries = torch.cat([queries, self.item_query[None]])
            mask = torch.ones(prompts + 1, prompts + 1, dtype=torch.bool, device=queries.device)
            mask[:prompts, prompts] = False
        hidden_states = queries.expand(memory.shape[0], -1, -1)
        if summary is not None:
            hidden_states = hidden_states + summary[:, None]
        attentions = []
        for layer in self.layers:
            hidden_states, weights = layer(
                hidden_states, mask, memory, memory_mask[:, None, None, :], output_attentions
            )
            attentions.append(None if weights is None else weights[:, :, :prompts])
        hidden_states = self.norm(hidden_states)
        found = self.found_share * hidden_states[:, prompts] if self.item_query is not None else None
        return hidden_states[:, :prompts], attentions, found
