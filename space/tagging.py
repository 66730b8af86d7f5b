"""Tags one file and explains each slot: the tags it proposes and where its order prompt looked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from file_reading import FileReader
from limits import InputError, Limits, clean_title
from loading import load_book, load_model, load_processor
from transformers.utils import ModelOutput

# The same limit as in the benchmark: a tag with fewer training examples is rare.
RARE_BELOW = 25
DECODINGS = ("parallel", "sequential")
MODALITIES = ("image+title", "image", "title")
# A slot is shown as empty if its best tag is less probable than this.
EMPTY_BELOW = 0.02


@dataclass
class Slot:
    """One slot of the tag sequence.

    Args:
        number: Index of the slot and its order prompt, from 0.
        candidates: `(tag, probability)` of the tags that the slot proposes, most probable first. The probabilities are
            the slot's own, before they are fused with those of the tag classifier.
        patches: `[frames, rows, columns]`, the attention weight of each image patch; `None` if the model's frames have
            no grid.
        words: `(word, attention weight)` of the title's words.
        frames: The attention weight of all frames together.
    """

    number: int
    candidates: list[tuple[str, float]]
    patches: np.ndarray | None
    words: list[tuple[str, float]]
    frames: float

    @property
    def is_empty(self) -> bool:
        """Whether the slot almost certainly holds [PAD]."""
        return not self.candidates or self.candidates[0][1] < EMPTY_BELOW


@dataclass
class TaggedFile:
    """The tags of one file and their explanation.

    Args:
        name: The visitor's name for the file.
        title: Title of the image or video, `""` if it has none.
        kind: `"image"` or `"video"`.
        decoding: `"parallel"` or `"sequential"`.
        tags: All candidates, most probable first: `{"tag", "score", "mark", "train_count", "slot"}`. `slot` is the
            index of the slot that generated the tag, `None` if no slot did. With a book, a tag also has `"source"` and
            `"neighbours"`, as `BookTagger` returns them.
        default_threshold: The fitted threshold, that of the book, or the one that leaves five tags if the file is
            tagged by its image words.
        slots: All slots.
        frames: `[frames, height, width, 3]`, uint8: the frames as the model sees them.
    """

    name: str
    title: str
    kind: str
    decoding: str
    tags: list[dict]
    default_threshold: float
    slots: list[Slot]
    frames: np.ndarray

    def tags_above(self, threshold: float) -> list[dict]:
        """Return the tags whose probability reaches the threshold."""
        return [tag for tag in self.tags if tag["score"] >= threshold]


class Tagger:
    """A model, its processor and the process that reads files.

    Args:
        model: Folder of the model or its name on the Hub.
        limits: The limits of this Space.
        book: Folder or Hub name of a checkpoint with a book, or folder of a book. By default, the book of the model if
            it is a folder with one.
    """

    def __init__(self, model: str, limits: Limits, book: str | None = None):
        self.name, self.limits = Path(model).name if Path(model).is_dir() else model, limits
        self.processor = load_processor(model)
        self.model = load_model(model)
        self.book = load_book(model, self.model, self.processor, book)
        self._counts = {tag.casefold(): count for tag, count in self.processor.label_vocabulary.items()}
        self.reader = FileReader(model, limits)

    def fitted_threshold(self, decoding: str, title: object = None) -> float:
        """Return the threshold that was fitted for a file with this title or without one, or that of the book."""
        return self._threshold(decoding, "image+title" if str(title or "").strip() else "image")

    def _threshold(self, decoding: str, modality: str) -> float:
        if self.book is not None:
            return float(self.book.book.threshold)
        threshold = self.model.generation_config.threshold
        # A mapping by decoding, by modality, or both.
        if isinstance(threshold, dict) and not threshold.keys() & set(MODALITIES):
            threshold = threshold.get(decoding)
        if isinstance(threshold, dict):
            threshold = threshold.get(modality, threshold.get(MODALITIES[0]))
        return float(threshold or 0.0)

    def check_settings(self, decoding: object, threshold: object) -> tuple[str, float | None]:
        """Check the settings of a request and fill in defaults.

        Args:
            decoding: One of `DECODINGS`; `None` for parallel.
            threshold: Minimum probability of a tag; `None` for the fitted threshold of each file.

        Raises:
            InputError: The decoding is unknown, or the threshold is not a number between 0 and 1.
        """
        decoding = "parallel" if decoding is None else decoding
        if decoding not in DECODINGS:
            raise InputError(f"decoding is {str(decoding)[:40]!r}; expected one of {', '.join(DECODINGS)}.")
        if threshold is None:
            return decoding, None
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise InputError(f"threshold is {str(threshold)[:40]!r}; expected a number between 0 and 1.")
        return decoding, float(threshold)

    def tag(
        self, path: str, name: str, title: object = "", decoding: str = "parallel", client: str = ""
    ) -> TaggedFile:
        """Tag one file.

        Args:
            path: Path of the file, which must have been uploaded to this Space.
            name: The visitor's name for the file.
            title: Title of the image or video.
            decoding: `"parallel"` or `"sequential"`.
            client: Address of the visitor, whose time for reading files is limited.

        Raises:
            InputError: The file or the title is not accepted.
        """
        title = clean_title(title, self.limits)
        kind, arrays = self.reader.read(path, name, title, client)
        inputs = {key: torch.as_tensor(value) for key, value in arrays.items()}
        options = {"threshold": 0.0} if self.book is None else self.book.generate_options
        outputs = self.model.generate(
            **inputs, decoding=decoding, output_slots=True, output_attentions=True, **options
        )
        tags, tagged_by = self._tags(outputs, title), (outputs.tagged_by or ["image+title"])[0]
        if tagged_by == "image words" and self.book is None:
            default_threshold = min([tag["score"] for tag in tags[: self.model.num_word_tags]], default=0.0)
            default_threshold = max(default_threshold, self.model.min_word_tag_probability)
        else:
            default_threshold = self._threshold(decoding, tagged_by)
        return TaggedFile(
            name=name,
            title=title,
            kind=kind,
            decoding=decoding,
            tags=tags,
            default_threshold=default_threshold,
            slots=self._slots(outputs, title),
            frames=self._frames(inputs["pixel_values"][0]),
        )

    def train_count(self, tag: str) -> int:
        """Return the number of training examples with a tag."""
        counts = self.processor.label_vocabulary
        if self.book is None or tag in counts:
            return counts.get(tag, 0)
        # A book may spell a tag in another letter case.
        return self._counts.get(tag.casefold(), 0)

    def mark(self, tag: str) -> str:
        """Return `"common"`, `"rare"` or `"novel"`, by the tag's number of training examples."""
        count = self.train_count(tag)
        return "novel" if not count else "rare" if count < RARE_BELOW else "common"

    def _tags(self, outputs: ModelOutput, title: str) -> list[dict]:
        generated = self.processor.tag_tokenizer.batch_decode(outputs.sequences[0], skip_special_tokens=True)
        slots = {}
        for tag, slot in zip(generated, outputs.slots[0].tolist()):
            slots.setdefault(tag, slot if slot >= 0 else None)
        folded = {} if self.book is None else {tag.casefold(): slot for tag, slot in slots.items()}
        if self.book is None:
            [tags] = self.processor.batch_decode(outputs)
        else:
            [tags] = self.book(outputs, [title], threshold=0.0)
        return [
            {
                "tag": row["tag"],
                "score": row["score"],
                "mark": self.mark(row["tag"]),
                "train_count": self.train_count(row["tag"]),
                "slot": slots.get(row["tag"], folded.get(row["tag"].casefold())),
            }
            | {name: row[name] for name in ("source", "neighbours") if name in row}
            for row in tags
        ]

    def _slots(self, outputs: ModelOutput, title: str) -> list[Slot]:
        # Averaged over layers and heads: [num_prompts, memory length].
        attention = torch.stack(outputs.prompt_attentions)[:, 0].float().mean(dim=(0, 1))
        patches, _, tokens = outputs.memory_layout.split(attention)
        frames = attention.sum(dim=-1) - tokens.sum(dim=-1)
        return [
            Slot(
                number=number,
                candidates=self._candidates(token_ids, log_probs.exp().tolist()),
                patches=None if patches is None else patches[number].numpy(),
                words=self._words(title, tokens[number].tolist()),
                frames=float(frames[number]),
            )
            for number, (token_ids, log_probs) in enumerate(zip(outputs.slot_tokens[0], outputs.slot_log_probs[0]))
        ]

    def _candidates(self, token_ids: torch.Tensor, probabilities: list[float]) -> list[tuple[str, float]]:
        candidates = {}
        tags = self.processor.tag_tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        for tag, probability in zip(tags, probabilities):
            if tag.strip() and probability > 0:
                # Different token sequences may spell the same tag.
                candidates[tag] = candidates.get(tag, 0.0) + probability
        return sorted(candidates.items(), key=lambda pair: -pair[1])

    def _words(self, title: str, weights: list[float]) -> list[tuple[str, float]]:
        """Add up the attention weights of the tokens of each word of the title; special tokens are words too."""
        if not title:
            return []
        tokenizer = self.processor.tokenizer
        encoded = tokenizer(title, truncation=True, max_length=len(weights), split_special_tokens=True)
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        if not encoded.is_fast:
            return list(zip(tokens, weights))
        words, previous = [], None
        for token, word, weight in zip(tokens, encoded.word_ids(), weights):
            if word is not None and word == previous:
                words[-1][1] += weight
            else:
                name = token if word is None else title[slice(*encoded.word_to_chars(word))]
                words.append([name, weight])
            previous = word
        return [(word, weight) for word, weight in words]

    def _frames(self, pixel_values: torch.Tensor) -> np.ndarray:
        """Undo the normalisation of `[frames, 3, height, width]` pixel values."""
        image_processor = self.processor.image_processor
        mean, std = (
            torch.tensor(getattr(image_processor, name))[:, None, None] for name in ("image_mean", "image_std")
        )
        return ((pixel_values * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
