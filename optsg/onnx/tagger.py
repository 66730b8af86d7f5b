"""Tags images and titles with an exported model."""

import json
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

from ..model_argument import EXPORT_SETTINGS as SETTINGS
from ..without_torch.image_utils import is_url
from ..without_torch.processor_inputs import MAX_PATH_LENGTH, ProcessorInputs, name_parts
from ..without_torch.tag_merging import TagCandidate, rank_candidates
from .classifier import BOTH, IMAGE_WORDS, TagClassifier, tagged_by
from .inputs import ImageReader, TitleReader
from .search import ScoreBound, SlotSearch

FORMAT = 1
ENCODER, CLASSIFIER, STEP = "encoder.onnx", "classifier.onnx", "decoding_step.onnx"
TEXT_TOKENIZER, TAG_TOKENIZER = "tokenizer.json", "tag_tokenizer.json"
# The forms of an image, other than arrays.
IMAGE_TYPES = (str, os.PathLike, bytes, Mapping, Image.Image)


class Program:
    """An exported program with named inputs and outputs.

    Args:
        path: The ONNX file.
        threads: Threads of a call; by default those that onnxruntime chooses.
    """

    def __init__(self, path: Path, threads: int | None = None):
        options = onnxruntime.SessionOptions()
        # Threads that wait do not use a core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run the program. Inputs that it does not read are ignored."""
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self.inputs}
        return dict(zip(self.outputs, self.session.run(None, arrays), strict=True))


class OnnxTagger:
    """Tags images with an exported model, as `pipeline("tag-generation")` does.

    It needs numpy, onnxruntime, Pillow and tokenizers, but not torch and transformers. It decodes in parallel, with
    the settings of the checkpoint.

    Args:
        folder: Folder from `optsg export-onnx`.
        threads: Threads of a call; by default those that onnxruntime chooses.

    Raises:
        FileNotFoundError: A file of the folder is missing.
        ValueError: The folder was written by another version.

    Example:

        >>> from optsg.onnx import OnnxTagger
        >>> tagger = OnnxTagger.from_pretrained("runs/onnx")  # doctest: +SKIP
        >>> tags = tagger({"image": "examples/images/tent-tree.png", "title": "tent tree"}, top_k=2)  # doctest: +SKIP
        >>> [(tag["label"], round(tag["score"], 2), tag["novel"]) for tag in tags]  # doctest: +SKIP
        [('tent', 0.89, False), ('camping', 0.84, False)]
    """

    def __init__(self, folder: str | os.PathLike, threads: int | None = None):
        folder = Path(folder)
        if not (folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} has no {SETTINGS}; write the folder with: optsg export-onnx CHECKPOINT")
        self.settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if self.settings.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {self.settings.get('format')!r}, not {FORMAT}; export it again")
        self.label_vocabulary = self.settings["label_vocabulary"]
        self.read_image = ImageReader(self.settings["image"])
        self.read_titles = TitleReader(folder / TEXT_TOKENIZER)
        self.tag_tokenizer = Tokenizer.from_file(str(folder / TAG_TOKENIZER))
        self.encoder, self.step = (Program(folder / name, threads) for name in (ENCODER, STEP))
        self.classifier = None
        if "classes" in self.settings:
            self.classifier = TagClassifier(Program(folder / CLASSIFIER, threads), self.settings)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, threads: int | None = None) -> "OnnxTagger":
        """Load an exported model; see [`OnnxTagger`]."""
        return cls(folder, threads)

    def __call__(
        self, inputs: Any, top_k: int | None = None, threshold: float | None = None, batch_size: int = 8
    ) -> list[dict] | list[list[dict]]:
        """Tag one example or many.

        Args:
            inputs: An example or a list of examples. An example is an image (path, bytes of a file, PIL image or
                `uint8` array), or a dictionary with `"image"`, `"title"` or both, as for the pipeline.
            top_k: Maximum number of tags of an example; the most probable ones are kept.
            threshold: Minimum probability of a tag; by default the model's own.
            batch_size: Examples that are tagged at once.

        Returns:
            Per example `[{"label": str, "score": float, "novel": bool}]`, sorted by falling score. The result is one
            such list for a single example, and a list of them for a list.

        Raises:
            ValueError: An example is malformed, cannot be read or is not an image, or a setting is out of range.
        """
        _check_settings(top_k, threshold, batch_size)
        is_batch = isinstance(inputs, (list, tuple))
        if is_batch and not inputs:
            return []
        examples = [_image_and_title(example) for example in (inputs if is_batch else [inputs])]
        images, titles = zip(*examples, strict=True)
        titles = ProcessorInputs(images, None, titles, None, None, None).titles
        tags = []
        for start in range(0, len(examples), batch_size):
            pixels = [
                None if image is None else self.read_image(image, f"inputs[{start + index}]")
                for index, image in enumerate(images[start : start + batch_size])
            ]
            arrays = self.prepare(pixels, titles[start : start + batch_size])
            candidates = self.generate(**arrays, max_tags=top_k, threshold=threshold)
            tags += [self.decode(found) for found in candidates]
        return tags if is_batch else tags[0]

    def prepare(self, pixels: list[np.ndarray | None], titles: list[str | None]) -> dict[str, np.ndarray]:
        """Return images that `read_image` has read, and titles, as the inputs of [`generate`]."""
        pixel_values = np.zeros((len(pixels), 1, 3, *self.read_image.shape), np.float32)
        for row, image in zip(pixel_values, pixels, strict=True):
            if image is not None:
                row[0] = image
        input_ids, attention_mask = self.read_titles(titles)
        return {
            "pixel_values": pixel_values,
            "frame_mask": np.array([[image is not None] for image in pixels], np.int64),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }

    def generate(
        self,
        pixel_values: np.ndarray,
        frame_mask: np.ndarray,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        max_tags: int | None = None,
        threshold: float | None = None,
    ) -> list[list[TagCandidate]]:
        """Generate the tags of each example, as `generate` of the model does.

        Args:
            pixel_values: `[batch, frames, 3, height, width]`, `float32`.
            frame_mask: `[batch, frames]`, 1 for frames; 0 for padding, and for an example without an image.
            input_ids, attention_mask: `[batch, length]`, `int64`; a mask of zeros for an example without a title.
            max_tags: Maximum number of tags of an example.
            threshold: Minimum probability of a tag; by default the model's own.

        Returns:
            For each example its tags, best first, with their token ids `tag` and their probability `score`.
        """
        inputs = {
            "pixel_values": pixel_values,
            "frame_mask": frame_mask,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }
        ranked, limits = self.rank(inputs, max_tags, threshold)
        return [tags[:limit] for tags, limit in zip(ranked, limits, strict=True)]

    def rank(
        self, inputs: dict[str, np.ndarray], max_tags: int | None = None, threshold: float | None = None
    ) -> tuple[list[list[TagCandidate]], list[int | None]]:
        """Return the tags of each example that reach its threshold, and its maximum number of tags.

        The arguments are those of [`generate`], which cuts the tags to this number.
        """
        encoded = self.encoder(**inputs)
        output = None if self.classifier is None else self.classifier(encoded)
        thresholds, limits = self._limits(encoded, max_tags, threshold)
        bound = None
        if any(thresholds):
            bound = ScoreBound(thresholds, output, self.classifier and self.classifier.sorted_tags)
        tokens, log_probs = SlotSearch(self.step, self.settings, encoded, bound).run()
        number = self.settings["generation"]["num_return_sequences"]
        tokens, log_probs = tokens[:, :, :number], log_probs[:, :, :number]
        pad = self.settings["pad_token_id"]
        ranked = []
        for index, (rows, probs) in enumerate(zip(tokens, log_probs)):
            rows, probs = rows.reshape(-1, rows.shape[-1]).tolist(), probs.reshape(-1).tolist()
            ranked.append(rank_candidates(rows, probs, number, pad, thresholds[index], output, index))
        return ranked, limits

    def _limits(
        self, encoded: dict[str, np.ndarray], max_tags: int | None, threshold: float | None
    ) -> tuple[list[float], list[int | None]]:
        """Return the threshold and the maximum number of tags of each example."""
        generation = self.settings["generation"]
        max_tags = generation["max_tags"] if max_tags is None else max_tags
        names = [BOTH] * len(encoded["order_prompts"]) if self.classifier is None else tagged_by(encoded)
        if threshold is not None:
            return [threshold] * len(names), [max_tags] * len(names)
        thresholds, limits, own = [], [], generation["thresholds"]
        for name in names:
            # One threshold is that of every example.
            by_words = name == IMAGE_WORDS and generation["by_modality"]
            thresholds.append(generation["min_word_tag_probability"] if by_words else own.get(name, own[BOTH]))
            limits.append(max_tags or (generation["num_word_tags"] if by_words else None))
        return thresholds, limits

    def decode(self, candidates: list[TagCandidate], return_sources: bool = False) -> list[dict]:
        """Decode the tags of an example. Blank tags are dropped; of two with the same text, the best stays.

        Args:
            candidates: From [`generate`].
            return_sources: Add `"source"`: "generated" by a slot, or "classified" if it is only a candidate of the tag
                classifier.
        """
        tags: dict[str, dict] = {}
        texts = self.tag_tokenizer.decode_batch([list(candidate.tag) for candidate in candidates])
        for text, candidate in zip(texts, candidates, strict=True):
            if text.strip() and text not in tags:
                tags[text] = {"label": text, "score": candidate.score, "novel": text not in self.label_vocabulary}
                if return_sources:
                    tags[text]["source"] = "classified" if candidate.slot < 0 else "generated"
        return list(tags.values())


def _image_and_title(example: Any) -> tuple[Any, Any]:
    """Return image and title of an example of the pipeline; `None` for a missing one."""
    parts = name_parts(example)
    if others := parts.keys() - {"images", "titles"}:
        video = parts.get("videos")
        name = f"{video} is" if isinstance(video, (str, os.PathLike)) else "the example has"
        kind = "a video or an animated image" if "videos" in others else "frame features"
        raise ValueError(f"{name} {kind}; an exported model tags only images, so use the pipeline with the checkpoint")
    image = parts.get("images")
    if isinstance(image, str) and (is_url(image) or len(image) > MAX_PATH_LENGTH):
        raise ValueError(f"{image[:100]!r} is an address or base64; give the path or the bytes of a file")
    if image is not None and not isinstance(image, IMAGE_TYPES) and not hasattr(image, "__array__"):
        raise ValueError(
            f"an example of type {type(image).__name__}; expected an image, a dictionary or a list of them"
        )
    return image, parts.get("titles")


def _check_settings(top_k: int | None, threshold: float | None, batch_size: int) -> None:
    for name, value in {"top_k": top_k, "batch_size": batch_size}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
    if threshold is not None and not (isinstance(threshold, Real) and 0 <= threshold <= 1):
        raise ValueError(f"threshold={threshold!r} is a probability and must lie between 0 and 1")
