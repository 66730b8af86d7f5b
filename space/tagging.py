"""From a file and a title to tags, what each slot proposes, and where its prompt looked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from file_reading import FileReader
from limits import Limits, Refused, checked_title
from transformers import AutoModel, AutoProcessor

# As in the benchmark: a tag with fewer training examples is rare.
RARE_BELOW = 25
DECODINGS = ("parallel", "sequential")
# Below this a slot says [PAD] for every practical purpose.
SPOKEN = 0.02


@dataclass
class Slot:
    """
    Args:
        number: place of its order prompt, from 0.
        num_candidates: what it would write, `(tag, probability)`, most probable first; probabilities are the slot's own,
            before the example as a whole is asked.
        patches: `[frames, rows, columns]`, share of its attention on each patch, `None` where the model's frames have
            no grid.
        words: share of its attention on each word of the title.
        frames: share of its attention on all frames together.
    """

    number: int
    num_candidates: list[tuple[str, float]]
    patches: np.ndarray | None
    words: list[tuple[str, float]]
    frames: float

    @property
    def silent(self) -> bool:
        return not self.num_candidates or self.num_candidates[0][1] < SPOKEN


@dataclass
class Tagged:
    """
    Args:
        tags: every candidate, best first: `{"tag", "score", "mark", "train_count", "slot"}`; `slot` is the number of
            the slot that wrote it, `None` where the example as a whole proposed it.
        slots: all K of them.
        frames: `[frames, height, width, 3]`, uint8: what the model sees.
    """

    name: str
    title: str
    kind: str
    decoding: str
    tags: list[dict]
    slots: list[Slot]
    frames: np.ndarray

    def at(self, threshold: float) -> list[dict]:
        return [tag for tag in self.tags if tag["score"] >= threshold]


class Tagger:
    """A model, its processor and the process that reads files.

    Args:
        model: folder or Hub name, loaded by the `Auto` classes alone.
    """

    def __init__(self, model: str, limits: Limits):
        self.name, self.limits = Path(model).name if Path(model).is_dir() else model, limits
        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(model, trust_remote_code=True).eval()
        self.reader = FileReader(model, limits)

    def fitted_threshold(self, decoding: str) -> float:
        """The threshold that was fitted on validation examples when the model was trained."""
        threshold = self.model.generation_config.threshold
        return float(threshold.get(decoding, 0.0) if isinstance(threshold, dict) else threshold or 0.0)

    def settings(self, decoding, threshold) -> tuple[str, float]:
        """What was asked for, checked; without a threshold the fitted one.

        Raises:
            Refused: there is no such decoding, or the threshold is no probability.
        """
        decoding = "parallel" if decoding is None else decoding
        if decoding not in DECODINGS:
            raise Refused(f"decoding is {str(decoding)[:40]!r}; expected one of {', '.join(DECODINGS)}.")
        if threshold is None:
            return decoding, self.fitted_threshold(decoding)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise Refused(f"threshold is {str(threshold)[:40]!r}; expected a number between 0 and 1.")
        return decoding, float(threshold)

    def tag(self, path: str, name: str, title: str = "", decoding: str = "parallel") -> Tagged:
        """
        Raises:
            Refused: the file or the title is not taken.
        """
        title = checked_title(title, self.limits)
        kind, arrays = self.reader.read(path, name, title)
        inputs = {key: torch.as_tensor(value) for key, value in arrays.items()}
        outputs = self.model.generate(
            **inputs, decoding=decoding, threshold=0.0, output_slots=True, output_attentions=True
        )
        return Tagged(
            name=name,
            title=title,
            kind=kind,
            decoding=decoding,
            tags=self._tags(outputs),
            slots=self._slots(outputs, title),
            frames=self._frames(inputs["pixel_values"][0]),
        )

    def mark(self, tag: str) -> str:
        count = self.processor.label_vocabulary.get(tag, 0)
        return "novel" if not count else "rare" if count < RARE_BELOW else "common"

    def _tags(self, outputs) -> list[dict]:
        slot_of = {}
        written = self.processor.tag_tokenizer.batch_decode(outputs.sequences[0], skip_special_tokens=True)
        for tag, slot in zip(written, outputs.slots[0].tolist()):
            slot_of.setdefault(tag, slot if slot >= 0 else None)
        [tags] = self.processor.batch_decode(outputs)
        return [
            {
                "tag": row["tag"],
                "score": row["score"],
                "mark": self.mark(row["tag"]),
                "train_count": self.processor.label_vocabulary.get(row["tag"], 0),
                "slot": slot_of[row["tag"]],
            }
            for row in tags
        ]

    def _slots(self, outputs, title: str) -> list[Slot]:
        # The mean over layers and heads: [num_prompts, memory length].
        attention = torch.stack(outputs.prompt_attentions)[:, 0].float().mean(dim=(0, 1))
        patches, others, tokens = outputs.memory_layout.split(attention)
        frames = attention.sum(dim=-1) - tokens.sum(dim=-1)
        slots = []
        for number, (rows, log_probs) in enumerate(zip(outputs.slot_tokens[0], outputs.slot_log_probs[0])):
            decoded = self.processor.tag_tokenizer.batch_decode(rows, skip_special_tokens=True)
            num_candidates = {}
            for tag, probability in zip(decoded, log_probs.exp().tolist()):
                if tag.strip() and probability > 0:
                    # Different tokens may write one tag.
                    num_candidates[tag] = num_candidates.get(tag, 0.0) + probability
            slots.append(
                Slot(
                    number=number,
                    num_candidates=sorted(num_candidates.items(), key=lambda pair: -pair[1]),
                    patches=None if patches is None else patches[number].numpy(),
                    words=self._words(title, tokens[number].tolist()),
                    frames=float(frames[number]),
                )
            )
        return slots

    def _words(self, title: str, weights: list[float]) -> list[tuple[str, float]]:
        """The title's words, each with the attention of its pieces; the marks at its ends by their own names."""
        if not title:
            return []
        tokenizer = self.processor.tokenizer
        encoded = tokenizer(title, truncation=True, max_length=len(weights), split_special_tokens=True)
        pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        if not encoded.is_fast:
            return list(zip(pieces, weights))
        words, previous = [], None
        for piece, word, weight in zip(pieces, encoded.word_ids(), weights):
            if word is not None and word == previous:
                words[-1][1] += weight
            else:
                name = piece if word is None else title[slice(*encoded.word_to_chars(word))]
                words.append([name, weight])
            previous = word
        return [(word, weight) for word, weight in words]

    def _frames(self, pixel_values: torch.Tensor) -> np.ndarray:
        image_processor = self.processor.image_processor
        mean, std = (
            torch.tensor(getattr(image_processor, name))[:, None, None] for name in ("image_mean", "image_std")
        )
        return ((pixel_values * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
