"""The tags of a model, as a book reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.book_reader import log_missed_by_all
from modeling_optsg.evaluation.calibration import NO_TAG_LIMIT
from modeling_optsg.evaluation.metrics import normalize_tag
from modeling_optsg.evaluation.prediction import generate_batches
from modeling_optsg.generation_optsg import evaluation_mode
from modeling_optsg.processing_optsg import OPTSGProcessor

from .queries import BookQueries
from .votes import NO_EVIDENCE

if TYPE_CHECKING:
    from .tag_book import BookCandidates

NO_CLASSIFIER = "A book needs a model with a tag classifier and slots, such as OP-TSG."
# Examples that the book reader reads together.
POINTER_BATCH = 64

# Arguments of `generate` for a book, which needs all tags of the model and applies its own threshold.
GENERATE_OPTIONS = {"threshold": 0.0, "max_tags": NO_TAG_LIMIT, "output_evidence": True}


@dataclass
class ModelTags:
    """The tags of the model for one example.

    Args:
        tags: All tags as `{"tag", "score", "novel", "source", "slot_score"}`, including those below the threshold of
            the model. The score is used before a book is fitted, the slot score afterwards.
        class_logits: `[classes]`, the tag classifier's logits. `None` without a model.
        classes: The class of each tag, and of each normalised tag.
        order_prompts: `[num_prompts, hidden_size]`, for the book reader.
        memory: `[memory length, hidden_size]`, for the book reader.
    """

    tags: Sequence[Mapping] = ()
    class_logits: np.ndarray | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    order_prompts: torch.Tensor | None = None
    memory: torch.Tensor | None = None

    def has_class(self, tags: Sequence[str]) -> np.ndarray:
        """Return whether each tag has a class, `[tags]`."""
        return self._classes_of(tags) >= 0

    def logits_of(self, tags: Sequence[str], default: float) -> np.ndarray:
        """Return the classifier logit of each tag, `default` for tags without a class."""
        if self.class_logits is None:
            return np.full(len(tags), default)
        classes = self._classes_of(tags)
        return np.where(classes >= 0, self.class_logits[classes], default)

    def _classes_of(self, tags: Sequence[str]) -> np.ndarray:
        """Return the class of each tag, -1 for none."""
        classes = [self.classes.get(tag, self.classes.get(normalize_tag(tag), -1)) for tag in tags]
        return np.array(classes, dtype=np.int64)


class ModelTagReader:
    """Reads the output of `generate` for a book, and the candidates of a book for the model.

    Args:
        model: A model with a tag classifier.
        processor: Its processor.

    Raises:
        ValueError: The model has no tag classifier or no slots.
    """

    def __init__(self, model: OPTSGPreTrainedModel, processor: OPTSGProcessor):
        check_has_classifier(model)
        self.model, self.processor = model, processor
        tokens = model.tag_classifier.label_vocabulary.tokens.tolist()
        tags = processor.tag_tokenizer.batch_decode(tokens, skip_special_tokens=True)
        by_tag = {tag: number for number, tag in enumerate(tags)}
        self.classes = {normalize_tag(tag): number for tag, number in by_tag.items()} | by_tag

    @torch.no_grad()
    def __call__(self, outputs: ModelOutput, titles: Sequence[str | None]) -> tuple[BookQueries, list[ModelTags]]:
        """Return the queries of a batch and the model's tags.

        Args:
            outputs: Output of `generate` with `GENERATE_OPTIONS`.
            titles: Title of each example.
        """
        # In half precision and main memory: there may be many examples.
        logits = self.model.tag_classifier.logits(outputs.evidence).half().cpu().numpy()
        decoded = self.processor.batch_decode(outputs, return_sources=True)
        memory, masks = outputs.memory.half().cpu(), outputs.memory_mask.cpu()
        memories = [tokens[mask] for tokens, mask in zip(memory, masks, strict=True)]
        rows = zip(decoded, logits, outputs.order_prompts.half().cpu(), memories, strict=True)
        tags = [ModelTags(own, row, self.classes, prompts, memory) for own, row, prompts, memory in rows]
        return BookQueries.from_evidence(outputs.evidence, titles), tags

    def read_examples(
        self, examples: Sequence[Mapping], titles: Sequence[str | None], **options: Any
    ) -> tuple[BookQueries, list[ModelTags]]:
        """Return the queries of examples and the model's tags.

        Args:
            examples: Rows as [`OPTSGDataCollator`] reads them. Each has an image, a video or a title.
            titles: Title of each example. They are not searched for if the option `modalities` hides titles.
            options: Other arguments of [`generate_batches`] and of `generate`.

        Raises:
            ValueError: An example has no input.
        """
        if "title" not in options.get("modalities", ("title",)):
            titles = [None] * len(titles)
        parts, model_tags = [], []
        for rows, outputs in generate_batches(self.model, self.processor, examples, **GENERATE_OPTIONS, **options):
            queries, tags = self(outputs, [titles[row] for row in rows])
            parts.append(queries)
            model_tags += tags
        if len(model_tags) != len(examples):
            raise ValueError(f"{len(examples) - len(model_tags)} examples have neither an image nor a title.")
        return BookQueries.concatenate(parts), model_tags

    @torch.no_grad()
    def point(self, model_tags: Sequence[ModelTags], candidates: Sequence["BookCandidates"]) -> None:
        """Set the `pointers` of each example's candidates. Does nothing if the model has no book reader.

        Args:
            model_tags: Tags of the model for each example.
            candidates: The candidates of each example.
        """
        if self.model.book_reader is None:
            return
        with evaluation_mode(self.model.book_reader):
            for start in range(0, len(candidates), POINTER_BATCH):
                found = candidates[start : start + POINTER_BATCH]
                if not any(own.tags for own in found):
                    continue
                batch = candidate_tensors(found, self.processor)
                batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
                rows = model_tags[start : start + POINTER_BATCH]
                memory = pad_sequence([own.memory for own in rows], batch_first=True).to(self.model.device)
                lengths = torch.tensor([len(own.memory) for own in rows], device=memory.device)
                mask = torch.arange(memory.shape[1], device=memory.device) < lengths[:, None]
                prompts = torch.stack([own.order_prompts for own in rows]).to(self.model.device)
                missed = log_missed_by_all(self.model.read_book(prompts, memory, mask, **batch))
                for own, row in zip(found, (-torch.expm1(missed)).cpu().numpy(), strict=True):
                    own.pointers = row[: len(own.tags)]


def check_has_classifier(model: OPTSGPreTrainedModel) -> None:
    """Check that a model can have a book.

    Raises:
        ValueError: The model has no tag classifier or no slots.
    """
    # ASY has a tag classifier, but no slots.
    if getattr(model, "tag_classifier", None) is None or getattr(model, "tag_decoder", None) is None:
        raise ValueError(NO_CLASSIFIER)


def candidate_tensors(candidates: Sequence["BookCandidates"], processor: OPTSGProcessor) -> dict[str, torch.Tensor]:
    """Return the candidates of a batch as arguments of [`OPTSGForTagGeneration.read_book`].

    A tag with more tokens than a slot has is cut for the reader, and stays a candidate.
    """
    tags = list(dict.fromkeys(tag for own in candidates for tag in own.tags))
    encoded = []
    if tags:
        encoded = processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokens = {tag: ids[: processor.max_tag_tokens] for tag, ids in zip(tags, encoded, strict=True)}
    length, number = max(map(len, tokens.values()), default=1), max(len(own.tags) for own in candidates)
    pad = processor.tag_tokenizer.pad_token_id
    input_ids = np.full((len(candidates), number, length), pad, dtype=np.int64)
    evidence = np.zeros((len(candidates), number, len(NO_EVIDENCE)), dtype=np.float32)
    for row, own in enumerate(candidates):
        evidence[row, : len(own.tags)] = own.evidence
        for column, tag in enumerate(own.tags):
            input_ids[row, column, : len(tokens[tag])] = tokens[tag]
    return {
        "candidate_input_ids": torch.from_numpy(input_ids),
        "evidence": torch.from_numpy(evidence),
    }
