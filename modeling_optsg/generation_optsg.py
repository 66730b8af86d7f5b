"""Order-prompted `generate`: the tag of every prompt, autoregressively or in parallel."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput

from .generation_settings import IMAGE_WORDS, MODALITIES, GenerationSettings, read_generation_settings
from .multimodal_encoder import MemoryLayout
from .score_bound import ScoreBound
from .slot_search import SlotCandidates, SlotContext, SlotSearch, SlotSearchSettings
from .tag_evidence import TagEvidence
from .tag_merging import ClassifierOutput
from .tag_ranking import rank_tags
from .tag_vocabulary import TagVocabularyLogitsProcessor


@dataclass
class OPTSGGenerateOutput(ModelOutput):
    """Output of `generate`.

    Args:
        sequences: `[batch, max tags per example, max length]`, the tags' tokens without [SEP], padded with
            `tag_pad_token_id`. Tags are sorted by probability, highest first.
        tag_scores: `[batch, max tags per example]`, the probability of each tag, 0 for padding.
        slots: `[batch, max tags per example]`, the prompt that generated the tag, -1 for padding and for candidates of
            the tag classifier.
        slot_scores: `[batch, max tags per example]`, the probability that at least one slot generates the tag.
            Returned by models with a tag classifier.
        classifier_logits: `[batch, max tags per example]`, the classifier logit of each tag, 0 for a novel tag.
            Returned by models with a tag classifier.
        pad_margins: `[batch, num_prompts]`, in each slot the best first token's logit minus that of [PAD]. With greedy
            or beam search a slot is generated where this exceeds `pad_bias`.
        slot_tokens: `[batch, num_prompts, num_return_sequences, max length]`, what every slot generated before
            `threshold` and `max_tags`. Returned with `output_slots`.
        slot_log_probs: `[batch, num_prompts, num_return_sequences]`, -inf where nothing was generated. Returned with
            `output_slots`.
        classifier_output: The tag classifier's output. Returned with `output_slots` by models that have one.
        evidence: The evidence of the tag classifier. Returned with `output_evidence`.
        order_prompts, memory, memory_mask: See [`OPTSGModelOutput`]. Returned with `output_evidence`.
        image_words: See [`OPTSGModelOutput`].
        image_word_scores: See [`OPTSGModelOutput`].
        tagged_by: For each example the modalities that it is tagged by, one of `MODALITIES` or "image words". An image
            with a title that it does not match is tagged by the title. Returned by models with a tag classifier.
        prompt_attentions: See [`OPTSGModelOutput`]. Returned with `output_attentions`.
        memory_layout: See [`OPTSGModelOutput`]. Returned with `output_attentions`.
    """

    sequences: torch.Tensor | None = None
    tag_scores: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    slot_scores: torch.Tensor | None = None
    classifier_logits: torch.Tensor | None = None
    pad_margins: torch.Tensor | None = None
    slot_tokens: torch.Tensor | None = None
    slot_log_probs: torch.Tensor | None = None
    classifier_output: ClassifierOutput | None = None
    evidence: TagEvidence | None = None
    order_prompts: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    image_words: torch.Tensor | None = None
    image_word_scores: torch.Tensor | None = None
    tagged_by: list[str] | None = None
    prompt_attentions: tuple[torch.Tensor, ...] | None = None
    memory_layout: MemoryLayout | None = None

    def at_pad_bias(self, pad_bias: float, pad_token_id: int, max_tags: int | None = None) -> "OPTSGGenerateOutput":
        """Compute what `generate` would have returned with a larger `pad_bias` and a `threshold` of 0.

        Valid where slots do not see one another: a slot is then generated or not, and is the same if generated. Needs
        `output_slots`.

        Args:
            pad_bias: At least the `pad_bias` that `generate` was called with.
            pad_token_id: Token of [PAD].
            max_tags: See [`OrderPromptGenerationMixin.generate`].
        """
        is_pad = (self.pad_margins <= pad_bias)[..., None]
        log_probs = self.slot_log_probs.masked_fill(is_pad, -torch.inf)
        ranked = rank_tags(self.slot_tokens, log_probs, 0.0, max_tags, pad_token_id, self.classifier_output)
        return OPTSGGenerateOutput(**vars(ranked), pad_margins=self.pad_margins)


class OrderPromptGenerationMixin(GenerationMixin):
    """Adds `generate` to models whose `tag_decoder` generates one tag per order prompt.

    A slot is empty if its first token is [PAD]. Every other slot generates one tag. The probability of a tag in a
    slot is the product of its tokens' probabilities, including [SEP], before `pad_bias`, processors or
    temperature. If [PAD] wins, the slot has no tag at any threshold. A tag of several slots is listed once, with
    the probability that at least one of them generates it. With `fusion_weights`, its logit is fused with the
    classifier logit.
    """

    # Decodings with independent slots, for which `at_pad_bias` is valid.
    independent_decodings = ("parallel",)
    # Default maximum number and minimum probability of tags for an image that is tagged by its image words. No
    # threshold can be fitted for such images, because validation images resemble the training images.
    num_word_tags = 5
    min_word_tag_probability = 0.02

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        title_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        decoding: str | None = None,
        threshold: float | Mapping[str, float] | None = None,
        pad_bias: float | None = None,
        max_tags: int | None = None,
        num_candidates: int | None = None,
        fusion_weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        logit_adjustment: float | None = None,
        min_beam_probability: float | None = None,
        tag_vocabulary: Iterable[Sequence[int]] | TagVocabularyLogitsProcessor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_config: GenerationConfig | None = None,
        output_slots: bool = False,
        output_evidence: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> OPTSGGenerateOutput:
        """Generate the tags of each example.

        Args:
            pixel_values, frame_features, image_features, frame_mask, input_ids, title_features, attention_mask: See
                [`OPTSGModel.forward`].
            decoding: "sequential", each slot sees those before it (the paper), or "parallel", all slots at once.
            threshold: Minimum probability of a tag; one number, or one for each of `MODALITIES`. In the second case,
                none applies to an image that is tagged by its image words: it gets its five most probable tags, or
                `max_tags`.
            pad_bias: Added to the logit of [PAD]. A negative value generates more tags.
            max_tags: Maximum number of tags of an example.
            num_candidates: Number of classifier candidates, the tags with the highest classifier logits. Ignored with
                sampling, a tag vocabulary or logits processors.
            fusion_weights: Five numbers, or five for each of `MODALITIES`; see [`ClassifierOutput`]. Needs a tag
                classifier.
            logit_adjustment: See [`LabelVocabulary.adjust_logits`].
            min_beam_probability: Drop a slot's beams below this, except the first.
            tag_vocabulary: Token ids of the only tags allowed, from `processor.encode_tags`, or a
                [`TagVocabularyLogitsProcessor`].
            logits_processor: Processors of `transformers`. Their `input_ids` are a slot's own tokens.
            generation_config: Used instead of the model's. `threshold`, `pad_bias`, `fusion_weights` and
                `logit_adjustment` may be mappings with a value per decoding.
            output_slots: Return what every slot generated. Without it, parallel decoding drops hypotheses whose tags
                cannot reach `threshold`; see [`ScoreBound`].
            output_evidence: Return what a book needs: the evidence of the tag classifier, by which it compares
                examples, and the order prompts and the memory, which the book reader reads.
            output_attentions: Return where each order prompt looks.
            kwargs: Other `SEARCH_SETTINGS`, such as `num_beams`, `num_return_sequences` (tags that a slot may
                contribute) or `do_sample`. `length_penalty` defaults to 0.

        Raises:
            ValueError: A setting is unknown or out of range, or the model cannot generate the tag vocabulary.
        """
        own = {"decoding": decoding, "threshold": threshold, "pad_bias": pad_bias, "max_tags": max_tags}
        own |= {"num_candidates": num_candidates, "fusion_weights": fusion_weights}
        own |= {"logit_adjustment": logit_adjustment, "min_beam_probability": min_beam_probability}
        settings = read_generation_settings(self, generation_config, own, kwargs)
        processors = self._build_processors(settings, tag_vocabulary, logits_processor)
        inputs = {"pixel_values": pixel_values, "frame_features": frame_features, "frame_mask": frame_mask}
        inputs |= {"input_ids": input_ids, "title_features": title_features, "attention_mask": attention_mask}
        inputs |= {"image_features": image_features}
        with evaluation_mode(self):
            outputs = self.model(**inputs, output_attentions=output_attentions, return_dict=True)
            found = self._find_tags(outputs, settings, processors, output_slots)
        if output_evidence:
            found.evidence, found.order_prompts = outputs.evidence, outputs.order_prompts
            found.memory, found.memory_mask = outputs.memory, outputs.memory_mask
        return found

    def _find_tags(
        self, outputs: ModelOutput, settings: GenerationSettings, processors: LogitsProcessorList, output_slots: bool
    ) -> OPTSGGenerateOutput:
        """Generate the tags of slots and classifier, and rank them."""
        classifier_output = self._classify(outputs.evidence, settings, processors)
        tagged_by = None if outputs.evidence is None else _tagged_by(outputs.evidence)
        limits = self._limits(tagged_by, settings, len(outputs.memory))
        bound = None if output_slots else self._bound_scores(limits[0], classifier_output, settings)
        candidates = self._generate_slots(outputs, settings, processors, bound)
        pad = self.config.tag_pad_token_id
        ranked = rank_tags(candidates.tokens, candidates.log_probs, *limits, pad, classifier_output)
        return OPTSGGenerateOutput(
            **vars(ranked),
            pad_margins=candidates.pad_margins,
            slot_tokens=candidates.tokens if output_slots else None,
            slot_log_probs=candidates.log_probs if output_slots else None,
            classifier_output=classifier_output if output_slots else None,
            image_words=outputs.image_words,
            image_word_scores=outputs.image_word_scores,
            tagged_by=tagged_by,
            prompt_attentions=outputs.prompt_attentions,
            memory_layout=outputs.memory_layout,
        )

    def _build_processors(
        self,
        settings: GenerationSettings,
        tag_vocabulary: Iterable[Sequence[int]] | TagVocabularyLogitsProcessor | None,
        logits_processor: LogitsProcessorList | None,
    ) -> LogitsProcessorList:
        config, device = settings.config, self.device
        config._eos_token_tensor = torch.tensor([self.config.tag_sep_token_id], device=device)
        processors = self._get_logits_processor(
            config, input_ids_seq_length=0, logits_processor=logits_processor, device=device
        )
        if tag_vocabulary is not None:
            # Remote code may load a class twice, but its base class of the library only once.
            if not isinstance(tag_vocabulary, LogitsProcessor):
                tag_vocabulary = TagVocabularyLogitsProcessor(
                    tag_vocabulary, self.config.tag_pad_token_id, self.config.tag_sep_token_id
                )
            tag_vocabulary.check_fits(self.config)
            processors.insert(0, tag_vocabulary)
        return processors

    def _bound_scores(
        self, thresholds: list[float], classifier_output: ClassifierOutput | None, settings: GenerationSettings
    ) -> ScoreBound | None:
        """Return the bound that drops hopeless hypotheses, `None` where every hypothesis counts.

        In sequential decoding later slots see them, and samples follow the model's distribution.
        """
        if settings.decoding == "sequential" or settings.config.do_sample or not any(thresholds):
            return None
        tree = None if self.tag_classifier is None else self.tag_classifier.label_vocabulary.prefix_tree()
        return ScoreBound(thresholds, classifier_output, tree)

    def _generate_slots(
        self,
        outputs: ModelOutput,
        settings: GenerationSettings,
        processors: LogitsProcessorList,
        bound: ScoreBound | None,
    ) -> SlotCandidates:
        """Generate all slots. The fields of the result are `[batch, num_prompts, ...]`."""
        search_settings = SlotSearchSettings(
            processors=processors,
            pad_bias=settings.pad_bias,
            num_hypotheses=settings.num_hypotheses,
            do_sample=settings.config.do_sample,
            length_penalty=settings.length_penalty,
            min_log_probability=settings.min_log_probability,
            keep_context=settings.decoding == "sequential",
            bound=bound,
        )
        search = SlotSearch(self.tag_decoder, self.lm_head, search_settings, outputs.memory, outputs.memory_mask)
        generate = self._generate_parallel if settings.decoding == "parallel" else self._generate_sequential
        found = generate(outputs.order_prompts, search)
        # Beams that are not returned only widen the search.
        num_returned = settings.config.num_return_sequences
        found.tokens, found.log_probs = found.tokens[:, :, :num_returned], found.log_probs[:, :, :num_returned]
        return found

    def _generate_parallel(self, order_prompts: torch.Tensor, search: SlotSearch) -> SlotCandidates:
        shape = order_prompts.shape[:2]
        examples = torch.arange(shape[0], device=order_prompts.device).repeat_interleave(shape[1])
        found = self._search_slots(search, order_prompts.flatten(0, 1), examples)
        return SlotCandidates(
            found.tokens.unflatten(0, shape),
            found.log_probs.unflatten(0, shape),
            found.pad_margins.unflatten(0, shape),
        )

    def _generate_sequential(self, order_prompts: torch.Tensor, search: SlotSearch) -> SlotCandidates:
        examples = torch.arange(len(order_prompts), device=order_prompts.device)
        context, slots = None, []
        for prompts in order_prompts.unbind(dim=1):
            found = self._search_slots(search, prompts, examples, context)
            slots.append(found)
            if context is None:
                context = found.context
            else:
                context.append(found.context)
        max_length = max(slot.tokens.shape[-1] for slot in slots)
        tokens = [
            F.pad(slot.tokens, (0, max_length - slot.tokens.shape[-1]), value=self.config.tag_pad_token_id)
            for slot in slots
        ]
        return SlotCandidates(
            torch.stack(tokens, dim=1),
            torch.stack([slot.log_probs for slot in slots], dim=1),
            torch.stack([slot.pad_margins for slot in slots], dim=1),
        )

    def _search_slots(
        self, search: SlotSearch, prompts: torch.Tensor, examples: torch.Tensor, context: SlotContext | None = None
    ) -> SlotCandidates:
        """Generate the tags of some slots; see [`SlotSearch.run`]. Variants of the model override this."""
        return search.run(prompts, examples, context)

    def _classify(
        self, evidence: TagEvidence | None, settings: GenerationSettings, processors: LogitsProcessorList
    ) -> ClassifierOutput | None:
        if self.tag_classifier is None:
            return None
        vocabulary = self.tag_classifier.label_vocabulary
        fusion_weights, calibration = None, {}
        if settings.fusion_weights is not None:
            # Image words are read like titles.
            names = ["title" if name == IMAGE_WORDS else name for name in _tagged_by(evidence)]
            fusion_weights = [settings.fusion_weights[name] for name in names]
        if fusion_weights is not None:
            # If the classifier weight is 0, its logits are not calibrated.
            pairs = [weights[1:3] if weights[1] > 0 else (1.0, 0.0) for weights in fusion_weights]
            scale, bias = torch.tensor(pairs).split(1, dim=1)
            calibration = {"scale": scale, "bias": bias}
        adjustment = settings.logit_adjustment
        logits = self.tag_classifier.logits(evidence, **calibration, logit_adjustment=adjustment)
        # Candidates are whole tags: constraints on single tokens cannot be applied to them.
        is_constrained = len(processors) > 0 or settings.config.do_sample
        num_candidates = 0 if is_constrained else min(settings.num_candidates, logits.shape[1])
        return ClassifierOutput(
            logits=logits,
            classes=vocabulary.class_index(),
            candidates=vocabulary.tokens_of(logits.topk(num_candidates, dim=1).indices),
            fusion_weights=fusion_weights,
        )

    def _limits(
        self, tagged_by: list[str] | None, settings: GenerationSettings, batch: int
    ) -> tuple[list[float], list[int | None]]:
        """Return the threshold and the maximum number of tags of each example."""
        if tagged_by is None:
            return [settings.thresholds[MODALITIES[0]]] * batch, [settings.max_tags] * batch
        thresholds, max_tags = [], []
        for modality in tagged_by:
            # One threshold is that of every example.
            if modality == IMAGE_WORDS and settings.by_modality:
                thresholds.append(self.min_word_tag_probability)
                max_tags.append(settings.max_tags or self.num_word_tags)
            else:
                thresholds.append(settings.thresholds.get(modality, settings.thresholds[MODALITIES[0]]))
                max_tags.append(settings.max_tags)
        return thresholds, max_tags


def _tagged_by(evidence: TagEvidence) -> list[str]:
    """Return what each example is tagged by, one of `MODALITIES` or `IMAGE_WORDS`."""
    both, image, title = MODALITIES
    rows = zip(evidence.reads_words.tolist(), evidence.uses_image.tolist(), evidence.has_title.tolist(), strict=True)
    return [
        IMAGE_WORDS if reads_words else both if uses_image and has_title else image if uses_image else title
        for reads_words, uses_image, has_title in rows
    ]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of every module afterwards.

    A frozen tower may be in evaluation mode inside a model in training mode.

    Raises:
        ValueError: The model is divided among devices in a way that it cannot be run in.
    """
    check_placement(model)
    # Usually none is in training mode, and setting the mode of every module takes milliseconds.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_placement(model: torch.nn.Module) -> None:
    """Check where the parts of a model are, if they are offloaded or on several devices.

    Raises:
        ValueError: Buffers are offloaded, or the model is divided among several accelerators.
    """
    placed = getattr(model, "hf_device_map", {})
    if not placed and not hasattr(model, "_hf_hook"):  # accelerate did not place it
        return
    accelerators = {str(device) for device in placed.values()} - {"cpu", "disk"}
    if len(accelerators) > 1:
        raise ValueError(
            f"The model is divided among the devices {sorted(accelerators)}, which is not supported. Load it with "
            'device_map={"": 0}; what does not fit can be offloaded to "cpu" or "disk".'
        )
    if offloaded := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise ValueError(
            f"The buffers {', '.join(offloaded[:3])} are offloaded. They are small, and read outside their modules; "
            "load the model with offload_buffers=False."
        )
