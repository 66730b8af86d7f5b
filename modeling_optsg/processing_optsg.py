"""The processor: images, videos, titles and tags to tensors, and generated token ids to tags."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import ModelOutput, cached_file

from .image_utils import read_image, unwrap_file
from .processor_inputs import PIXEL_INPUTS, ProcessorInputs, check_unicode
from .video_utils import evenly_spaced, read_frames

LABEL_VOCABULARY_NAME = "label_vocabulary.json"
# A tokenizer without a length limit has a larger `model_max_length`.
NO_MAX_LENGTH = 1_000_000
# Large files are decoded at a fraction of their size, but not smaller than this many times the result.
SIZE_BEFORE_RESIZE = 4


class OPTSGProcessor(ProcessorMixin):
    """Prepares inputs for [`OPTSGForTagGeneration`] and decodes the tags that it generates.

    Args:
        image_processor: The image processor of the vision tower; it must resize all images to one size. See
            [`OPTSGFeatureProcessor`] for models with precomputed frame features.
        tokenizer: The tokenizer of the text tower, for titles and for the text of tags. Longer texts are truncated to
            its `model_max_length`.
        tag_tokenizer: The tag tokenizer, from `train_tag_tokenizer`.
        num_frames: Maximum number of frames of a video. Longer videos are sampled at the centres of `num_frames` equal
            segments.
        num_prompts: Number of order prompts, which is the maximum number of tags of an example.
        max_tag_tokens: Maximum number of tokens of a tag, without [SEP].
        label_vocabulary: The training tags and their numbers of training examples. A generated tag outside the label
            vocabulary is novel; without a label vocabulary all tags are novel.

    Raises:
        TypeError: A component has the wrong type.
        ValueError: A setting is not a positive integer, or `tag_tokenizer` is not a tag tokenizer.

    Example:

        >>> from modeling_optsg import OPTSGProcessor
        >>> processor = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> inputs = processor(images="examples/images/bus.png", titles="bus", tags=["bus", "vehicle"])
        >>> {name: tuple(tensor.shape) for name, tensor in inputs.items() if name in ("pixel_values", "labels")}
        {'pixel_values': (1, 1, 3, 160, 160), 'labels': (1, 2, 16)}
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None,
        tokenizer: PreTrainedTokenizerBase,
        tag_tokenizer: PreTrainedTokenizerBase,
        num_frames: int = 8,
        num_prompts: int = 20,
        max_tag_tokens: int = 16,
        label_vocabulary: Mapping[str, int] | None = None,
    ) -> None:
        components = {"image_processor": image_processor, "tokenizer": tokenizer, "tag_tokenizer": tag_tokenizer}
        super().__init__(**{name: components[name] for name in self.get_attributes()})
        settings = {"num_frames": num_frames, "num_prompts": num_prompts, "max_tag_tokens": max_tag_tokens}
        for name, value in settings.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive integer")
            setattr(self, name, value)
        if (tag_tokenizer.pad_token_id, tag_tokenizer.sep_token_id) != (0, 1):
            raise ValueError(
                f"tag_tokenizer has [PAD] = {tag_tokenizer.pad_token_id} and [SEP] = {tag_tokenizer.sep_token_id}; "
                "expected 0 and 1, as train_tag_tokenizer sets them. Is it the tokenizer of the text tower?"
            )
        self.label_vocabulary = dict(label_vocabulary or {})

    def __call__(
        self,
        images: Any = None,
        videos: Any = None,
        titles: str | list[str | None] | None = None,
        tags: list[str] | list[list[str]] | None = None,
        frame_features: Any = None,
        pixel_values: Any = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Convert one example or a batch of examples to the inputs of the model.

        Every argument has one entry per example, `None` if the example does not have this input. An example has an
        image, a video, frame features or none of these, and a title or none; it must have at least one input.

        Args:
            images: Paths, bytes of files, PIL images, `uint8` arrays (`[height, width, channels]`,
                `[channels, height, width]` or `[height, width]`), or values of `datasets.Image(decode=False)`. Images
                are turned upright according to their EXIF data, and transparent pixels are blended with white.
            videos: Paths, bytes of files, values of `datasets.Video(decode=False)`, or lists of frames, each frame in
                any form that an image can have.
            titles: Titles. A blank title is a missing title.
            tags: Lists of ground-truth tags, for training. Repeated tags of an example are merged.
            frame_features: Precomputed features `[frames, width]` or `[frames, tokens, width]`. All visual inputs of a
                batch must be features, or none.
            pixel_values: Images and videos from [`~OPTSGProcessor.read_pixels`], `[frames, 3, height, width]`.
            return_tensors: `"pt"` or `"np"`.

        Returns:
            A `BatchFeature` for B examples with up to T frames and M tags each:

            - `pixel_values` `[B, T, 3, height, width]` or `frame_features` `[B, T, …]`, zero for padding. Absent if no
              example has a visual input.
            - `frame_mask` `[B, T]`, 1 for frames, 0 for padding. Absent if no example has a visual input.
            - `input_ids` and `attention_mask` `[B, length]`, the titles. The mask of a missing title is 0 everywhere.
              Absent if no example has a title.
            - with `tags`: the output of [`~OPTSGProcessor.encode_tag_sets`].

        Raises:
            ValueError: An example has no input; a file, video or array cannot be read; its tags are missing, blank,
                not text, too long or too many; or the arguments differ in length. The message names the example.
            ImportError: PyAV, which videos need, is not installed.
        """
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}; expected 'pt' or 'np'")
        batch = ProcessorInputs(images, videos, titles, tags, frame_features, pixel_values)
        data = {}
        if batch.has("frame_features"):
            data |= _pad_frames("frame_features", self._sample_features(batch.frame_features))
        elif any(batch.has(name) for name in PIXEL_INPUTS):
            data |= _pad_frames("pixel_values", [self._get_pixels(batch, i) for i in range(batch.size)])
        if batch.has("titles"):
            data |= self._encode_titles(batch.titles)
        if tags is not None:
            data |= self.encode_tag_sets(batch.tags)
        return BatchFeature({name: value.numpy() for name, value in data.items()} if return_tensors == "np" else data)

    def match_vocabulary_case(self, tags: Iterable[str]) -> list[str]:
        """Give tags the letter case of the label vocabulary, in which the model generates them.

        If several training tags differ only in case, the most frequent one is used. Other tags are unchanged.

        Args:
            tags: Tags in any letter case.

        Returns:
            The tags in the same order, each once.
        """
        by_frequency = sorted(self.label_vocabulary, key=self.label_vocabulary.get)
        # Of several spellings the last one is kept, which is the most frequent.
        spelling = {tag.casefold(): tag for tag in by_frequency}
        matched = (tag if tag in self.label_vocabulary else spelling.get(tag.casefold(), tag) for tag in tags)
        return list(dict.fromkeys(matched))

    def encode_tags(self, tags: list[str]) -> dict[str, torch.Tensor]:
        """Encode tags for the tag decoder and for the text tower.

        Args:
            tags: N tags.

        Returns:
            `tag_input_ids` `[N, max length]`, token ids of the tag tokenizer without [SEP], padded with 0;
            `tag_lengths` `[N]`; `tag_text_input_ids` and `tag_text_attention_mask` `[N, length]`, the same tags for
            the text tower.

        Raises:
            ValueError: A tag is blank, not text, or longer than `max_tag_tokens` tokens.
        """
        for tag in tags:
            if not isinstance(tag, str):
                raise ValueError(f"tag {tag!r} is of type {type(tag).__name__}; expected str")
            if not tag.strip():
                raise ValueError(f"tag {tag!r} is blank; leave it out")
            check_unicode(tag, f"tag {tag!r}")
        if not tags:
            raise ValueError("there are no tags to encode")
        encoded = self.tag_tokenizer(list(tags), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for tag, ids in zip(tags, encoded, strict=True):
            if len(ids) > self.max_tag_tokens:
                raise ValueError(
                    f"tag {tag!r} has {len(ids)} tokens, more than max_tag_tokens = {self.max_tag_tokens}; "
                    "shorten it, leave it out, or train with a larger max_tag_tokens"
                )
        text = self._encode_text(tags)
        return {
            "tag_input_ids": torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in encoded], batch_first=True),
            "tag_lengths": torch.tensor([len(ids) for ids in encoded]),
            "tag_text_input_ids": text["input_ids"],
            "tag_text_attention_mask": text["attention_mask"],
        }

    def decode(self, token_ids: torch.Tensor | list[int], **kwargs: Any) -> str:
        """Decode the tokens `[length]` of one tag, padded with 0 or -100."""
        tokens = torch.as_tensor(token_ids).clamp(min=0)
        return self.tag_tokenizer.decode(tokens, **{"skip_special_tokens": True} | kwargs)

    def batch_decode(
        self, outputs: ModelOutput | torch.Tensor, return_sources: bool = False
    ) -> list[list[dict[str, Any]]]:
        """Decode the tags that `generate` returned.

        Args:
            outputs: Output of `generate`, with `sequences` `[batch, tags, length]` (token ids of the tag tokenizer,
                padded with 0 or -100) and `tag_scores` `[batch, tags]`; or the sequences alone, for tags without
                scores, for example `labels`.
            return_sources: Whether to say where each tag comes from. Needs `slots` in the output.

        Returns:
            For each example its tags as `{"tag": str, "score": float, "novel": bool}`, best first; `score` is `None`
            without scores. A tag that occurs twice is listed once, with the larger score. Blank tags are dropped. With
            `return_sources`, a tag also has `"source"`: "generated" by a slot, or "classified" if it is only a
            candidate of the tag classifier; and, for a model with a tag classifier, `"slot_score"`, the probability
            that a slot generates it.

        Raises:
            ValueError: The sequences or the scores have a wrong shape.
        """
        sequences = torch.as_tensor(getattr(outputs, "sequences", outputs)).clamp(min=0)
        scores = getattr(outputs, "tag_scores", None)
        if sequences.ndim != 3:
            raise ValueError(f"sequences have shape {tuple(sequences.shape)}; expected [batch, tags, length]")
        if scores is None:
            scores = [[None] * sequences.shape[1]] * sequences.shape[0]
        elif tuple(scores.shape) != tuple(sequences.shape[:2]):
            raise ValueError(
                f"tag_scores have shape {tuple(scores.shape)}; expected {tuple(sequences.shape[:2])}, as the sequences"
            )
        else:
            scores = scores.tolist()
        sources: list[dict[str, list]] = [{}] * len(scores)
        if return_sources:
            slots, slot_scores = outputs.slots.tolist(), getattr(outputs, "slot_scores", None)
            sources = [{"source": ["classified" if slot < 0 else "generated" for slot in row]} for row in slots]
            if slot_scores is not None:
                sources = [own | {"slot_score": row} for own, row in zip(sources, slot_scores.tolist(), strict=True)]
        return [
            self._rank(self.tag_tokenizer.batch_decode(rows, skip_special_tokens=True) if rows else [], *columns)
            for rows, *columns in zip(sequences.tolist(), scores, sources, strict=True)
        ]

    def _rank(self, tags: list[str], scores: list[float | None], sources: dict[str, list]) -> list[dict[str, Any]]:
        """Merge and sort the tags of one example."""
        best: dict[str, dict[str, Any]] = {}
        for index, (tag, score) in enumerate(zip(tags, scores, strict=True)):
            if tag.strip() and (tag not in best or (score is not None and score > best[tag]["score"])):
                best[tag] = {"tag": tag, "score": score, "novel": tag not in self.label_vocabulary}
                best[tag] |= {name: column[index] for name, column in sources.items()}
        return sorted(best.values(), key=lambda entry: 0 if entry["score"] is None else -entry["score"])

    @property
    def model_input_names(self) -> list[str]:
        """The names of the inputs for generation."""
        return ["pixel_values", "frame_features", "frame_mask", "input_ids", "attention_mask"]

    def _sample_features(self, features: list) -> list[torch.Tensor | None]:
        """Check precomputed frame features, and sample at most `num_frames` frames."""
        tensors = []
        for i, value in enumerate(features):
            if value is not None:
                value = torch.as_tensor(value, dtype=torch.float32)
                if value.ndim not in (2, 3) or 0 in value.shape:
                    raise ValueError(
                        f"frame_features[{i}] has shape {list(value.shape)}; expected [frames, width] or "
                        "[frames, tokens, width], without empty dimensions"
                    )
                value = value[evenly_spaced(len(value), self.num_frames)]
            tensors.append(value)
        return tensors

    def _get_pixels(self, batch: ProcessorInputs, i: int) -> torch.Tensor | None:
        if batch.pixel_values[i] is not None:
            return torch.as_tensor(batch.pixel_values[i])
        if batch.videos[i] is not None:
            return self.read_pixels(video=batch.videos[i], name=f"videos[{i}]")
        return None if batch.images[i] is None else self.read_pixels(batch.images[i], name=f"images[{i}]")

    def read_pixels(self, image: Any = None, video: Any = None, name: str = "the example") -> torch.Tensor:
        """Read an image or a video, for the argument `pixel_values` of a call.

        Several threads may read at once. A large file is decoded at a fraction of its size, still about
        `SIZE_BEFORE_RESIZE` times as large as the result, so that the result is almost the same.

        Args:
            image: An image, in any form that [`~OPTSGProcessor.__call__`] takes.
            video: A video instead, in any form that [`~OPTSGProcessor.__call__`] takes.
            name: Name of the file in error messages, if it has no path.

        Returns:
            Its frames `[frames, 3, height, width]`; an image has one.

        Raises:
            ValueError: The file cannot be read, this processor has no image processor, or its frames have different
                sizes.
            ImportError: PyAV, which videos need, is not installed.
        """
        if self.image_processor is None:
            raise ValueError(f"{name} is an image or a video, but this processor takes frame features only")
        if (image is None) == (video is None):
            given = "neither an image nor a video" if image is None else "both an image and a video"
            raise ValueError(f"{name} has {given}; give one of them")
        min_side = self._min_side()
        images = [read_image(image, name, min_side)] if video is None else self.read_video(video, name, min_side)
        pixels = self.image_processor(images=images)["pixel_values"]
        # Some image processors reverse the channels without copying them, which torch cannot read.
        pixels = [torch.as_tensor(np.ascontiguousarray(p)) for p in pixels]
        if len({p.shape for p in pixels}) > 1 or pixels[0].ndim != 3:
            shapes = sorted({tuple(p.shape) for p in pixels})
            raise ValueError(
                f"{type(self.image_processor).__name__} gave the frames of {name} the shapes {shapes}; expected "
                "[3, height, width] of one size. Set a fixed size or a centre crop"
            )
        return torch.stack(pixels)

    def _min_side(self) -> int | None:
        """Return the minimum side of images before the image processor resizes them; `None` if it does not."""
        size = getattr(self.image_processor, "size", None)
        lengths = [length for length in dict(size or {}).values() if isinstance(length, int)]
        if not getattr(self.image_processor, "do_resize", False) or not lengths:
            return None
        return SIZE_BEFORE_RESIZE * max(lengths)

    def read_video(self, video: Any, name: str, min_side: int | None = None) -> list[Image.Image]:
        """Read at most `num_frames` frames of a video: a path, bytes, an undecoded file, or a list of frames.

        `min_side` is that of `read_image`.

        Raises:
            ValueError: The video cannot be read, or has no frames. The message contains its path or `name`.
        """
        video, name = unwrap_file(video, name)
        if isinstance(video, (str, os.PathLike, bytes)):
            frames = read_frames(video, self.num_frames, name, min_side)
        elif isinstance(video, Image.Image) or getattr(video, "ndim", 4) != 4 or not isinstance(video, Iterable):
            raise ValueError(
                f"{name} is one {type(video).__name__}; expected a path, the bytes of a file, or the list of the "
                "video's frames. Give the frames of one video as videos=[[frame, frame, …]]"
            )
        else:
            frames = list(video)
        if not frames:
            raise ValueError(f"{name} has no frames")
        return [read_image(frames[j], f"{name}[{j}]", min_side) for j in evenly_spaced(len(frames), self.num_frames)]

    def _encode_text(self, texts: list[str]) -> BatchFeature:
        return self.tokenizer(
            list(texts),
            padding=True,
            truncation=self.tokenizer.model_max_length < NO_MAX_LENGTH,
            # A title that contains "[MASK]" is ordinary text.
            split_special_tokens=True,
            return_token_type_ids=False,
            return_attention_mask=True,
            return_tensors="pt",
        )

    def _encode_titles(self, titles: list[str | None]) -> dict[str, torch.Tensor]:
        encoded = self._encode_text([title or "" for title in titles])
        missing = torch.tensor([title is None for title in titles])[:, None]
        return {
            "input_ids": encoded["input_ids"].masked_fill(missing, self.tokenizer.pad_token_id),
            "attention_mask": encoded["attention_mask"].masked_fill(missing, 0),
        }

    def encode_tag_sets(self, tag_sets: list[list[str]]) -> dict[str, torch.Tensor]:
        """Encode the tags of each example. Repeated tags of an example are merged.

        Args:
            tag_sets: B lists of up to M tags.

        Returns:
            `labels` `[B, M, max_tag_tokens]`, token ids of the tag tokenizer without [SEP], padded with -100;
            `tag_text_input_ids` and `tag_text_attention_mask` `[B, M, length]`, the same tags for the text tower.

        Raises:
            ValueError: An example has no tags or too many, or an error of [`~OPTSGProcessor.encode_tags`].
        """
        index, labels = {}, []
        for i, tag_set in enumerate(tag_sets):
            if isinstance(tag_set, (str, bytes)) or not isinstance(tag_set, Iterable):
                raise ValueError(f"tags[{i}] is {tag_set!r}; expected the list of that example's tags")
            tag_set = list(tag_set)
            if not tag_set:
                raise ValueError(f"tags[{i}] is empty; an example without tags cannot be trained on, leave it out")
            for tag in tag_set:
                if not isinstance(tag, str):
                    raise ValueError(f"tags[{i}] holds {tag!r} of type {type(tag).__name__}; expected str")
            unique = list(dict.fromkeys(tag_set))
            if len(unique) > self.num_prompts:
                raise ValueError(
                    f"tags[{i}] holds {len(unique)} tags, more than num_prompts = {self.num_prompts}; "
                    "give a sample of them, as the training collator does"
                )
            labels.append(torch.tensor([index.setdefault(tag, len(index)) for tag in unique]))
        rows = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=len(index))
        encoded = self.encode_tags(list(index))
        tokens = torch.full((len(index) + 1, self.max_tag_tokens), -100)
        length = encoded["tag_input_ids"].shape[1]
        is_token = torch.arange(length) < encoded["tag_lengths"][:, None]
        tokens[:-1, :length] = encoded["tag_input_ids"].masked_fill(~is_token, -100)
        # The last row is padding.
        padded = {"tag_text_input_ids": self.tokenizer.pad_token_id, "tag_text_attention_mask": 0}
        text = {
            name: torch.cat([encoded[name], encoded[name].new_full((1, encoded[name].shape[1]), value)])[rows]
            for name, value in padded.items()
        }
        return {"labels": tokens[rows], **text}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings without the label vocabulary, which has a separate file."""
        output = super().to_dict()
        output.pop("label_vocabulary", None)
        return output

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save the processor, with its label vocabulary in `label_vocabulary.json`."""
        files = super().save_pretrained(save_directory)
        path = Path(save_directory, LABEL_VOCABULARY_NAME)
        text = json.dumps(self.label_vocabulary, ensure_ascii=False, indent=0, allow_nan=False) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [*files, str(path)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "OPTSGProcessor":
        """Load a processor; one without an image processor is loaded as an [`OPTSGFeatureProcessor`]."""
        if cls is OPTSGProcessor:
            saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
            if saved.get("processor_class") == OPTSGFeatureProcessor.__name__:
                return OPTSGFeatureProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the settings and the label vocabulary of a saved processor."""
        processor_dict, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "label_vocabulary" not in kwargs:
            names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
            path = cached_file(
                pretrained_model_name_or_path, LABEL_VOCABULARY_NAME, **{k: kwargs[k] for k in names if k in kwargs}
            )
            processor_dict["label_vocabulary"] = json.loads(Path(path).read_text(encoding="utf-8"))
        return processor_dict, unused


class OPTSGFeatureProcessor(OPTSGProcessor):
    """An [`OPTSGProcessor`] without an image processor, for models with precomputed frame features.

    Example:

        >>> import numpy as np
        >>> from modeling_optsg import OPTSGFeatureProcessor, OPTSGProcessor
        >>> saved = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> processor = OPTSGFeatureProcessor(saved.tokenizer, saved.tag_tokenizer)
        >>> processor(frame_features=np.zeros((1, 3, 512)), titles="a walk")["frame_features"].shape
        torch.Size([1, 3, 512])
    """

    image_processor = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tag_tokenizer: PreTrainedTokenizerBase,
        num_frames: int = 8,
        num_prompts: int = 20,
        max_tag_tokens: int = 16,
        label_vocabulary: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(None, tokenizer, tag_tokenizer, num_frames, num_prompts, max_tag_tokens, label_vocabulary)


def _pad_frames(name: str, examples: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Pad frames `[frames, …]` of examples to `[B, T, …]` and make the `frame_mask` `[B, T]`."""
    shapes = {tuple(example.shape[1:]) for example in examples if example is not None}
    if len(shapes) > 1:
        raise ValueError(f"the {name} of a batch have different shapes {sorted(shapes)}; expected one size")
    lengths = torch.tensor([0 if example is None else len(example) for example in examples])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    frames = torch.cat([example for example in examples if example is not None])
    padded = frames.new_zeros(*mask.shape, *frames.shape[1:])
    padded[mask] = frames
    return {name: padded, "frame_mask": mask.long()}


OPTSGProcessor.register_for_auto_class()
OPTSGFeatureProcessor.register_for_auto_class()
