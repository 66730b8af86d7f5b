"""`pipeline("tag-generation")`: images and videos in, tags out, in the shape of image classification."""

import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import DataLoader, Subset
from transformers import Pipeline
from transformers.image_utils import load_image
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .generation_optsg import OPTSGGenerateOutput, TagVocabularyLogitsProcessor
from .video_utils import is_video_file

TASK = "tag-generation"
# An example's parts -> what the processor calls them.
PARTS = {
    "image": "images",
    "video": "videos",
    "frames": "videos",
    "frame_features": "frame_features",
    "title": "titles",
}
# What else a row of a tagging dataset has.
OF_A_ROW = ("id", "tags", "file_name")
# Of `datasets` since 4.0: one column of a dataset.
COLUMNS = ("Column", "IterableColumn")
# Of Linux; elsewhere they are shorter.
MAX_PATH_LENGTH = 4096
# As `config.json` names it: a file beside it and a class in it, and the class that loads the model.
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_optsg.TagGenerationPipeline", "pt": ["AutoModel"], "type": "multimodal"}}


class TagGenerationPipeline(Pipeline):
    """Tags for images and videos, each with its probability.

        tagger = pipeline("tag-generation", model="checkpoints/optsg-icon-small", trust_remote_code=True)
        tagger("photo.jpg", top_k=5)
        tagger({"video": "video.mp4", "title": "a walk along the harbour"})

    Reading and preparing is done by the data loader's `num_workers` processes, for a whole batch at a time: the examples
    of a batch may be images, videos of any length and titles in any mixture.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        # The base class looks at the settings it is made with.
        self._last_vocabulary: tuple[list, TagVocabularyLogitsProcessor] | None = None
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("a tag-generation pipeline needs a processor; give `processor=` beside a model object")

    def __call__(self, inputs: Any, **kwargs: Any) -> list[dict] | list[list[dict]] | Iterator[list[dict]]:
        """Tags an example, or many.

        Args:
            inputs: an example, a list of examples, a `datasets.Dataset` or `IterableDataset`, a `torch` dataset or a
                generator. An example is an image (path, http(s) address, bytes of a file, PIL image or array), the
                path of a video (by its suffix), or a dictionary of some of

                - `"image"`: an image; or `"video"`: path or bytes of a video; or `"frames"`: the list of a video's
                  frames; or `"frame_features"`, as [`OPTSGProcessor`] takes them;
                - `"title"`: text.

                Of a dataset's columns, those are read which are called so; a row of one may have its `id`, `tags` and
                `file_name` with it, which are not looked at.
            top_k: at most so many tags an example, the most probable ones.
            threshold: tags with a smaller probability are left out; the model's own if not given.
            decoding: "parallel" or "sequential"; the model's own if not given.
            tag_vocabulary: the only tags allowed, as text, in any letter case.
            timeout: seconds to wait for an image's address.
            batch_size, num_workers: examples at a time (1), and processes that read them (0, in this process).
            kwargs: other settings of the model's `generate`.

        Returns:
            Per example `[{"label": str, "score": float, "novel": bool}]` by falling score, `novel` where no training example
            has the tag. Of one example its tags, of a list a list; of a dataset or generator an iterator.

        Raises:
            ValueError: an example cannot be read, or is not an example; or an unknown or impossible setting.
        """
        # Whoever has a dataset has imported the library; the others need not have it.
        datasets = sys.modules.get("datasets")
        if datasets is not None:
            if isinstance(inputs, datasets.DatasetDict | datasets.IterableDatasetDict):
                raise ValueError(f"the dataset has the splits {list(inputs)}; give one of them")
            if isinstance(inputs, datasets.Dataset | datasets.IterableDataset):
                inputs = self._readable(inputs, datasets)
            elif isinstance(inputs, tuple(getattr(datasets, kind) for kind in COLUMNS if hasattr(datasets, kind))):
                inputs = (example for example in inputs)
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    @staticmethod
    def _readable(dataset, datasets):
        """A dataset's columns that are parts of an example, files in them undecoded, as the base class takes datasets."""
        names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
        columns = [part for part in PARTS if part in names]
        if not names:
            return (example for example in ())
        if not columns:
            raise ValueError(f"the dataset has the columns {names}; expected some of {list(PARTS)}")
        dataset = dataset.select_columns(columns)
        for column in columns:
            feature = (dataset.features or {}).get(column)
            if isinstance(feature, datasets.Image | datasets.Video):
                dataset = dataset.cast_column(column, type(feature)(decode=False))
        if isinstance(dataset, datasets.IterableDataset):
            return (example for example in dataset)
        return Subset(dataset, range(len(dataset)))

    def _sanitize_parameters(
        self, top_k=None, threshold=None, decoding=None, tag_vocabulary=None, timeout=None, **generate_kwargs
    ):
        if top_k is not None:
            if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
                raise ValueError(f"top_k is {top_k!r}; expected a whole number of at least 1")
            if "max_tags" in generate_kwargs:
                raise ValueError("top_k and max_tags are the same; give one of them")
            generate_kwargs["max_tags"] = top_k
        if threshold is not None:
            generate_kwargs["threshold"] = threshold
        if decoding is not None:
            generate_kwargs["decoding"] = decoding
        if tag_vocabulary is not None:
            generate_kwargs["tag_vocabulary"] = self._vocabulary(tag_vocabulary)
        # The other systems' `generate` would hand what it does not know to `forward`, which ignores it.
        taken = inspect.signature(self.model.generate).parameters
        if "decoding" not in taken and (unknown := generate_kwargs.keys() - taken.keys()):
            raise ValueError(f"{type(self.model).__name__} has no {sorted(unknown)}; leave them out")
        return {} if timeout is None else {"timeout": timeout}, generate_kwargs, {}

    def _vocabulary(self, tags) -> TagVocabularyLogitsProcessor:
        # The last one is kept: of many thousand tags it takes seconds to make.
        if isinstance(tags, Iterable) and not isinstance(tags, str | Mapping):
            tags = list(tags)
        # One that another thread replaces meanwhile stays this one's.
        last = self._last_vocabulary
        if last is None or last[0] != tags:
            last = (tags, TagVocabularyLogitsProcessor.of_tags(tags, self.processor, self.model.config))
            self._last_vocabulary = last
        return last[1]

    def preprocess(self, example, timeout: float | None = None) -> dict:
        """An example's parts by the processor's names for them; nothing is opened yet but addresses."""
        if not isinstance(example, Mapping):
            is_video = isinstance(example, (str, os.PathLike)) and is_video_file(example)
            example = {"video" if is_video else "image": example}
        elif "bytes" in example and example.keys() <= {"bytes", "path"}:
            example = {"image": example}
        given = {part: value for part, value in example.items() if part in PARTS and value is not None}
        if unknown := example.keys() - PARTS.keys() - set(OF_A_ROW):
            raise ValueError(f"an example has {sorted(map(str, unknown))}; expected some of {list(PARTS)}")
        if {"video", "frames"} <= given.keys():
            raise ValueError("an example has both a video and frames; expected one of them")
        if isinstance(image := given.get("image"), str) and image.startswith(("http://", "https://", "data:")):
            try:
                given["image"] = load_image(image, timeout=timeout)
            except Exception as error:  # those of the client, of base64 and of Pillow
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(f"{_shown(image)} cannot be loaded ({_shown(reason)})") from error
        elif isinstance(image, str) and len(image) > MAX_PATH_LENGTH:
            raise ValueError(f"{_shown(image)} is too long for a path; give base64 as data:image/…;base64,…")
        return {PARTS[part]: value for part, value in given.items()}

    def _collate(self, examples: list[dict]):
        names = dict.fromkeys(name for example in examples for name in example)
        return self.processor(
            **{name: [example.get(name) for example in examples] for name in names}, return_tensors="pt"
        )

    def _forward(self, model_inputs, **generate_kwargs) -> dict:
        outputs = self.model.generate(**model_inputs, **generate_kwargs)
        return {"sequences": outputs.sequences, "tag_scores": outputs.tag_scores}

    def postprocess(self, model_outputs) -> list[dict]:
        (tags,) = self.processor.batch_decode(OPTSGGenerateOutput(**model_outputs))
        return [{"label": tag["tag"], "score": tag["score"], "novel": tag["novel"]} for tag in tags]

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        # The base class would join the tensors of examples prepared one by one, which must then have the same parts and
        # equally many frames.
        kind = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        loader = DataLoader(
            kind(inputs, self.preprocess, preprocess_params),
            num_workers=num_workers if isinstance(inputs, Sized) else min(num_workers, 1),
            batch_size=batch_size,
            collate_fn=self._collate,
        )
        batches = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(batches, self.postprocess, postprocess_params)

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        iterator = self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params)
        return next(iter(iterator))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any):
        """Saves the model, this code and, which the base class leaves out, the processor."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _shown(text: str) -> str:
    """A text that may be a whole file, short enough for a message."""
    return text if len(text) <= 200 else f"{text[:100]}… ({len(text):,} characters)"
