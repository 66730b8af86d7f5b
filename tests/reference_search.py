"""Reference implementation of generation: no caches, no batches, one hypothesis at a time."""

import math
from dataclasses import dataclass

import pytest
import torch

from modeling_optsg.tag_decoder import SlotSequence

PAD, SEP = 0, 1
TAG_VOCAB_SIZE = 12
NUM_PROMPTS, MAX_TAG_TOKENS = 5, 4
BATCH_SIZE = 4
BOTH_DECODINGS = pytest.mark.parametrize("decoding", ["parallel", "sequential"])


def make_slot_model(make_model):
    """Makes a model that generates short and long tags and leaves slots empty."""
    model = make_model(
        None,
        seed=7,
        frame_feature_size=6,
        num_prompts=NUM_PROMPTS,
        max_tag_tokens=MAX_TAG_TOKENS,
        tag_vocab_size=TAG_VOCAB_SIZE,
        # With tied embeddings, an untrained model repeats its first token.
        tie_word_embeddings=False,
        use_prompt_pooler=False,
        use_tag_classifier=False,
    )
    with torch.no_grad():
        model.lm_head.bias.normal_(std=0.5)
        model.lm_head.bias[[PAD, SEP]] += 1.0
    return model


def make_slot_inputs():
    """Makes precomputed frame features of four videos."""
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    return {"frame_features": 3 * torch.randn(BATCH_SIZE, 3, 6), "frame_mask": mask}


def select_example(inputs, index):
    return {name: value[index : index + 1] for name, value in inputs.items()}


class ReferenceDecoder:
    """Computes next-token logits of one example from all earlier tokens, and keeps nothing between calls."""

    def __init__(self, model, inputs):
        self.model = model
        with torch.no_grad():
            self.encoded = model.model(**inputs)

    @torch.no_grad()
    def logits(self, context, slot, prefix):
        """Returns the logits after `prefix` in `slot`, given the `(slot, tag)` pairs of `context`."""
        positions = [(s, p, t) for s, tag in [*context, (slot, prefix)] for p, t in enumerate([PAD, *tag])]
        slots, slot_positions, tokens = (torch.tensor([column]) for column in zip(*positions))
        valid = torch.ones_like(slots).bool()
        sequence = SlotSequence(tokens, torch.full_like(tokens, -100), slots, slot_positions, valid)
        encoded = self.encoded
        hidden_states = self.model.tag_decoder(
            encoded.order_prompts, sequence, torch.tensor([False]), encoded.memory, encoded.memory_mask
        )
        return self.model.lm_head(hidden_states[0, -1]).float()

    def step(self, context, slot, prefix, pad_bias=0.0, process=None):
        """Returns the model's own log-probabilities, and the scores that the next token is chosen by."""
        logits = self.logits(context, slot, prefix)
        log_probs = logits.log_softmax(-1)
        if len(prefix) == MAX_TAG_TOKENS:
            return log_probs, torch.where(torch.arange(len(logits)) == SEP, logits, -torch.inf)
        logits[SEP if not prefix else PAD] = -torch.inf
        if not prefix:
            logits[PAD] += pad_bias
        if process is not None:
            logits = process(torch.tensor([prefix], dtype=torch.long), logits[None])[0]
        return log_probs, logits


@dataclass
class Hypothesis:
    tag: tuple = ()
    log_prob: float = 0.0
    ranking: float = 0.0
    finished: bool = False


def search_slot(decoder, context, slot, num_beams=1, length_penalty=0.0, **settings):
    """Returns the hypotheses of a slot, best first; none where [PAD] wins."""

    def penalised(hypothesis):
        return hypothesis.ranking / len(hypothesis.tag) ** length_penalty

    log_probs, scores = decoder.step(context, slot, (), **settings)
    if scores.argmax() == PAD:
        return []
    scores[PAD] = -torch.inf
    ranking = scores.log_softmax(-1)
    possible = (ranking > -torch.inf).nonzero().flatten().tolist()
    beam = [Hypothesis((token,), log_probs[token].item(), ranking[token].item()) for token in possible]
    beam = sorted(beam, key=penalised, reverse=True)[:num_beams]
    while not all(hypothesis.finished for hypothesis in beam):
        candidates = [hypothesis for hypothesis in beam if hypothesis.finished]
        for parent in beam:
            if parent.finished:
                continue
            log_probs, scores = decoder.step(context, slot, parent.tag, **settings)
            if scores.max() == -torch.inf:
                continue
            ranking = scores.log_softmax(-1)
            for token in (ranking > -torch.inf).nonzero().flatten().tolist():
                tag = parent.tag if token == SEP else (*parent.tag, token)
                log_prob = parent.log_prob + log_probs[token].item()
                candidates.append(Hypothesis(tag, log_prob, parent.ranking + ranking[token].item(), token == SEP))
        beam = sorted(candidates, key=penalised, reverse=True)[:num_beams]
    return beam


def search_all_slots(model, inputs, decoding, num_return_sequences=1, **settings):
    """Returns every `(slot, tag, log-probability)` of one example, before tags are merged or dropped."""
    decoder, context, generated = ReferenceDecoder(model, inputs), [], []
    for slot in range(model.config.num_prompts):
        found = search_slot(decoder, context if decoding == "sequential" else [], slot, **settings)
        generated += [(slot, h.tag, h.log_prob) for h in found[:num_return_sequences]]
        context.append((slot, found[0].tag if found else ()))
    return generated


def merge_slots(generated):
    """Lists each tag once with its most probable slot and the probability that any slot generates it, best first."""
    best_slot, missed = {}, {}
    for slot, tag, log_prob in sorted(generated, key=lambda row: -row[2]):
        best_slot.setdefault(tag, slot)
        missed[tag] = missed.get(tag, 1.0) * (1.0 - math.exp(log_prob))
    return sorted(((tag, slot, 1.0 - missed[tag]) for tag, slot in best_slot.items()), key=lambda row: -row[2])


def tags_of(outputs, index):
    """Returns `(tag, slot, score)` of each tag of an example."""
    rows = zip(outputs.sequences[index].tolist(), outputs.slots[index].tolist(), outputs.tag_scores[index].tolist())
    return [(tuple(t for t in tokens if t != PAD), slot, score) for tokens, slot, score in rows if slot >= 0]


def assert_same_tags(actual, expected):
    assert [row[:2] for row in actual] == [row[:2] for row in expected]
    actual_scores, expected_scores = (torch.tensor([row[2] for row in rows]) for rows in (actual, expected))
    torch.testing.assert_close(actual_scores, expected_scores, rtol=2e-4, atol=0)
