"""The traced programs of parallel decoding. Search and ranking, which depend on the data, stay outside."""

import torch
from torch import nn
from transformers import DynamicCache

from modeling_optsg.modeling_optsg import OPTSGForTagGeneration

# Tokens that a decoding step returns for each slot. More beams are not possible.
MAX_BEAMS = 16


class EncoderProgram(nn.Module):
    """Towers, encoder and order prompts.

    Args:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: OPTSGForTagGeneration):
        super().__init__()
        self.model, self.tag_decoder, self.tag_classifier = model.model, model.tag_decoder, model.tag_classifier
        self.word_vectors = None
        if self.tag_classifier is not None and model.model.image_words is not None:
            # The evidence of a word does not depend on the image.
            features = model.model.image_words.text_features
            with torch.no_grad():
                self.word_vectors = model.model.multimodal_encoder.evidence_pooler.word_vectors(features[None])[0]

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
            classifier also its evidence `[batch, hidden_size]`, and what the examples are tagged by, boolean `[batch]`
            each: `has_title`, `uses_image`, `uses_words` and `reads_words` of [`TagEvidence`]. With image words also
            the evidence of the most probable words, `[batch, words, hidden_size]`, the probability of each
            `[batch, words]`, and the familiarity of the image `[batch]`.
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
        uses_words = no_words if self.word_vectors is None else evidence.uses_words
        found += (evidence.vectors, evidence.has_title, evidence.uses_image, uses_words, evidence.reads_words)
        if self.word_vectors is None:
            return found
        word_vectors = self.word_vectors[outputs.image_words]
        return *found, word_vectors, evidence.word_probabilities, evidence.familiarity


class ClassifierProgram(nn.Module):
    """The logits of the tag classifier for the evidence of examples or of image words.

    Args:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: OPTSGForTagGeneration):
        super().__init__()
        self.tag_classifier = model.tag_classifier

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits `[rows, num_tag_classes]` of vectors `[rows, hidden_size]`, without logit adjustment."""
        return self.tag_classifier.project(vectors)


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
        config = model.config
        self.pad, self.sep = config.tag_pad_token_id, config.tag_sep_token_id
        tokens = torch.arange(config.tag_vocab_size, device=model.device)
        self.impossible = torch.zeros(len(tokens), device=model.device)
        self.impossible[(tokens == self.pad) | (tokens == self.sep)] = -torch.inf
        self.num_tokens = min(MAX_BEAMS, len(tokens) - 2)

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
    ) -> tuple[torch.Tensor, ...]:
        """Decode one more position of every slot.

        Args:
            prompts: `[batch, slots, hidden_size]`, the order prompt of each slot. A slot may occur several times, once
                for each of its hypotheses.
            position: `[1]`, position within the slot, which is also the number of cached positions; 0 is the prompt.
            input_ids: `[batch, slots]`, the last token of each slot. At position 0 it is not read.
            keys, values: `[layers, batch, slots, heads, position, head size]` of the earlier positions.
            memory_keys, memory_values, memory_mask: From [`EncoderProgram`].

        Returns:
            The log-probabilities of the most probable tokens among those other than [PAD] and [SEP],
            `[batch, slots, tokens]`, and the tokens; the logarithm of the sum of the exponentials of these tokens'
            logits, and the logits of [PAD] and [SEP], `[batch, slots]` each; keys and values with one position more.
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
        others = logits + self.impossible
        log_probs, tokens = others.log_softmax(dim=-1).topk(self.num_tokens, dim=-1)
        normalizer = others.amax(dim=-1) - log_probs[..., 0]
        found = (log_probs, tokens, normalizer, logits[..., self.pad], logits[..., self.sep])
        return *found, *(states.unflatten(1, (batch, slots)) for states in cached)
