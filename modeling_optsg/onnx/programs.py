"""The two traced programs of parallel decoding. Search and ranking, which depend on the data, stay outside."""

import torch
from torch import nn
from transformers import DynamicCache

from modeling_optsg.modeling_optsg import OPTSGForTagGeneration


class EncoderProgram(nn.Module):
    """Towers, encoder, order prompts and tag classifier.

    Args:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: OPTSGForTagGeneration):
        super().__init__()
        self.model, self.tag_decoder, self.tag_classifier = model.model, model.tag_decoder, model.tag_classifier

    def forward(
        self,
        pixel_values: torch.Tensor,
        frame_mask: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Encode a batch.

        Args:
            pixel_values, frame_mask, input_ids, attention_mask: See [`OPTSGModel.forward`]. An example without an
                image or without a title has a mask of zeros.

        Returns:
            Order prompts `[batch, num_prompts, hidden_size]`, the memory's keys and values
            `[layers, batch, heads, memory length, head size]`, and its mask `[batch, memory length]`. With a tag
            classifier also its logits `[batch, num_tag_classes]`, and what the examples are tagged by, boolean
            `[batch]` each: `has_title`, `uses_image`, `uses_words` and `reads_words` of [`TagEvidence`].
        """
        outputs = self.model(
            pixel_values=pixel_values, frame_mask=frame_mask, input_ids=input_ids, attention_mask=attention_mask
        )
        cache = self.tag_decoder.cache_memory(outputs.memory)
        keys, values = (torch.stack([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))
        found = (outputs.order_prompts, keys, values, outputs.memory_mask)
        if self.tag_classifier is None:
            return found
        evidence = outputs.evidence
        no_words = torch.zeros_like(evidence.has_title)
        uses_words = no_words if evidence.word_probabilities is None else evidence.uses_words
        tagged_by = (evidence.has_title, evidence.uses_image, uses_words, evidence.reads_words)
        return *found, self.tag_classifier(evidence), *tagged_by


class EvenRows:
    """Rows of slots of which every example has the same number; see [`SlotRows`]."""

    def __init__(self, batch: int, slots: int):
        self.shape = (batch, slots)

    def by_example(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rearrange `[batch * slots, width]` to `[batch, slots, width]`."""
        return hidden_states.unflatten(0, self.shape)

    def by_slot(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Invert [`by_example`]."""
        return hidden_states.flatten(0, 1)


class DecodingStep(nn.Module):
    """One step of parallel decoding: the next token of all slots of a batch.

    Args:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: OPTSGForTagGeneration):
        super().__init__()
        self.tag_decoder, self.lm_head = model.tag_decoder, model.lm_head

    def forward(
        self,
        prompts: torch.Tensor,
        position: torch.Tensor,
        input_ids: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        memory_keys: torch.Tensor,
        memory_values: torch.Tensor,
        memory_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode one more position of every slot.

        Args:
            prompts: `[batch, slots, hidden_size]`, the order prompt of each slot. A slot may occur several times, once
                for each of its hypotheses.
            position: `[1]`, position within the slot, which is also the number of cached positions; 0 is the prompt.
            input_ids: `[batch, slots]`, the last token of each slot. At position 0 it is not read.
            keys, values: `[layers, batch, slots, heads, position, head size]` of the earlier positions.
            memory_keys, memory_values, memory_mask: From [`EncoderProgram`].

        Returns:
            Logits `[batch, slots, tag_vocab_size]`, and keys and values with one position more.
        """
        batch, slots = input_ids.shape
        cache, memory_cache = DynamicCache(), DynamicCache()
        for index in range(keys.shape[0]):
            cache.update(keys[index].flatten(0, 1), values[index].flatten(0, 1), index)
            memory_cache.update(memory_keys[index], memory_values[index], index)
        embedded = self.tag_decoder.embed(prompts.flatten(0, 1), position, input_ids.flatten())
        hidden_states = self.tag_decoder.step(embedded, cache, None, EvenRows(batch, slots), memory_cache, memory_mask)
        logits = self.lm_head(hidden_states).unflatten(0, (batch, slots))
        cached = (torch.stack([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))
        return logits, *(states.unflatten(1, (batch, slots)) for states in cached)
