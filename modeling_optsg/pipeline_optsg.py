"""`pipeline("tag-generation")`: images and videos in, tags out, in the format of image classification."""

import base64
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import ModuleType
from typing import Any

from torch.utils.data import DataLoader, Subset
from transformers import BatchFeature, Pipeline

# The HTTP client that `load_image` uses: `httpx` or `httpx2`, depending on the version of huggingface-hub.
from transformers.image_utils import httpx
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .generation_optsg import OPTSGGenerateOutput
from .image_utils import is_url
from .image_words import decode_image_words
from .processor_inputs import MAX_PATH_LENGTH, PARTS, name_parts
from .tag_vocabulary import TagVocabularyLogitsProcessor

TASK = "tag-generation"
# Entry of a batch that is not an input of the model.
TITLES = "titles"
# Classes of `datasets` since 4.0, for one column of a dataset.
COLUMN_CLASSES = ("Column", "IterableColumn")
# The task that the Hub shows for a model. The code example on the model's page makes a pipeline with this name.
HUB_TASK = "image-classification"
# Entry of `config.json`: the pipeline's file and class, and the auto class that loads the model.
CUSTOM_PIPELINES = {
    task: {"impl": "pipeline_optsg.TagGenerationPipeline", "pt": ["AutoModel"], "type": "multimodal"}
    for task in (TASK, HUB_TASK)
}


class TagGenerationPipeline(Pipeline):
    """Tags images and videos, with a probability for each tag.

    Folders from `save_pretrained` and models from `optsg push` contain the code of this pipeline. They load with
    `trust_remote_code=True`, with and without `import modeling_optsg`. For them, `pipeline("image-classification")`
    makes this pipeline too.

    The `num_workers` processes of the data loader read and prepare one batch at a time. A batch may contain images,
    videos of any length, and titles.

    Example:

        >>> import modeling_optsg
        >>> from transformers import pipeline
        >>> tagger = pipeline("tag-generation", model="checkpoints/optsg-icon-small")
        >>> tags = tagger({"image": "examples/images/tent-tree.png", "title": "tent tree"}, top_k=2)
        >>> [(tag["label"], round(tag["score"], 2), tag["novel"]) for tag in tags]
        [('tent', 0.89, False), ('camping', 0.84, False)]
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        # Set first: the base class calls `_sanitize_parameters`.
        self._last_vocabulary: tuple[list, TagVocabularyLogitsProcessor] | None = None
        self._last_book: tuple[Any, Any] | None = None
        model = kwargs.get("model", args[0] if args else None)
        placed = getattr(model, "hf_device_map", None)
        if placed is not None and kwargs.get("device") is None:
            # The library would take the first device of the map, which may be "disk".
            model.hf_device_map, kwargs["device"] = None, model.device
        try:
            super().__init__(*args, **kwargs)
        finally:
            if placed is not None:
                model.hf_device_map = placed
        if self.processor is None:
            raise ValueError("a tag-generation pipeline needs a processor; pass `processor=` with a model object")
        self.model.prepare_for_inference()

    def __call__(self, inputs: Any, **kwargs: Any) -> list[dict] | list[list[dict]] | Iterator[list[dict]]:
        """Tag one example or many.

        Args:
            inputs: An example, a list of examples, a `datasets.Dataset` or `IterableDataset`, a `torch` dataset or a
                generator. An example is an image (path, http(s) address, bytes of a file, PIL image or array), the
                path of a video (recognised by its content), or a dictionary with some of

                - `"image"`: an image; or `"video"`: path or bytes of a video; or `"frames"`: the list of a video's
                  frames; or `"frame_features"`, as [`OPTSGProcessor`] takes them;
                - `"title"`: text.

                The columns of a dataset are read by these names. A row may also have `id`, `tags`, `file_name` and
                `group`, which are ignored.
            top_k: The maximum number of tags per example; the most probable ones are kept.
            threshold: Minimum probability of a tag; by default the model's own, see `generate`.
            decoding: "parallel" or "sequential"; by default the model's own.
            tag_vocabulary: The only tags allowed, as text, in any letter case.
            book: Also use the tags of similar examples: a book as [`BookTagger`] takes it, or a [`BookTagger`] of
                this model. Needs the package `optsg`.
                `threshold` is then by default that of the book. Pass it when you make the pipeline to use it for all
                calls.
            return_image_words: Also return the image words.
            timeout: Seconds to wait for an image's address.
            batch_size: Examples per batch; 1 by default.
            num_workers: Processes that read the examples; by default 0, which is this process.
            kwargs: Further settings of the model's `generate`.

        Returns:
            Per example `[{"label": str, "score": float, "novel": bool}]`, sorted by falling score; `novel` tags occur
            in no training example. The result is one such list for a single example, a list of them for a list, and an
            iterator for a dataset or a generator. With `book`, a tag also has the `"source"` and the `"neighbours"`
            that [`BookTagger`] describes. With `return_image_words`, the list of an example is replaced by
            `{"tags": list, "image_words": [{"word": str, "score": float}]}`.

        Raises:
            ValueError: An example is malformed or cannot be read, a setting is unknown or out of range, or the book is
                damaged or was made with another model.
            FileNotFoundError: There is no such book.
            ImportError: A book is given, and the package `optsg` is not installed.
        """
        # A caller with a dataset has imported the library; other callers do not need it.
        datasets = sys.modules.get("datasets")
        if datasets is not None:
            if isinstance(inputs, datasets.DatasetDict | datasets.IterableDatasetDict):
                raise ValueError(f"the dataset has the splits {list(inputs)}; pass one of them")
            if isinstance(inputs, datasets.Dataset | datasets.IterableDataset):
                inputs = self._select_columns(inputs, datasets)
            column_classes = tuple(getattr(datasets, name) for name in COLUMN_CLASSES if hasattr(datasets, name))
            if isinstance(inputs, column_classes):
                inputs = (example for example in inputs)
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    @staticmethod
    def _select_columns(dataset: Any, datasets: ModuleType) -> Iterable[dict]:
        """Return the rows with the columns that are parts of an example; their files are not decoded."""
        names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
        columns = [part for part in PARTS if part in names]
        if not names:
            return (example for example in ())
        if not columns:
            raise ValueError(f"the dataset has the columns {names}; expected some of {list(PARTS)}")
        dataset = dataset.select_columns(columns)
        for column in columns:
            feature = (dataset.features or {}).get(column)
            inner = getattr(feature, "feature", feature)
            if isinstance(inner, datasets.Image | datasets.Video):
                undecoded = type(inner)(decode=False)
                # A video may be a list of its frames.
                dataset = dataset.cast_column(column, undecoded if inner is feature else type(feature)(undecoded))
        if isinstance(dataset, datasets.IterableDataset):
            return (example for example in dataset)
        return Subset(dataset, range(len(dataset)))

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        threshold: float | None = None,
        decoding: str | None = None,
        tag_vocabulary: Iterable[str] | None = None,
        book: Any = None,
        timeout: float | None = None,
        return_image_words: bool | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        if parts := generate_kwargs.keys() & PARTS.keys():
            raise ValueError(f'pass {", ".join(sorted(parts))} with the example, as in {{"image": ..., "title": ...}}')
        if top_k is not None:
            if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
                raise ValueError(f"top_k is {top_k!r}; expected an integer of at least 1")
            if "max_tags" in generate_kwargs:
                raise ValueError("top_k and max_tags are the same setting; pass one of them")
            generate_kwargs["max_tags"] = top_k
        if threshold is not None:
            generate_kwargs["threshold"] = threshold
        if decoding is not None:
            generate_kwargs["decoding"] = decoding
        if tag_vocabulary is not None:
            generate_kwargs["tag_vocabulary"] = self._build_vocabulary(tag_vocabulary)
        # The baselines' `generate` passes unknown settings to `forward`, which ignores them.
        known = inspect.signature(self.model.generate).parameters
        if "decoding" not in known and (unknown := generate_kwargs.keys() - known.keys()):
            raise ValueError(f"{type(self.model).__name__}.generate has no setting {sorted(unknown)}; leave it out")
        # Not a setting of `generate`.
        if book is not None:
            generate_kwargs["book"] = self._load_book(book)
        postprocess = {} if return_image_words is None else {"return_image_words": return_image_words}
        return {} if timeout is None else {"timeout": timeout}, generate_kwargs, postprocess

    def _build_vocabulary(self, tags: Iterable[str]) -> TagVocabularyLogitsProcessor:
        # The last vocabulary is kept, because building one from many thousand tags takes seconds.
        if isinstance(tags, Iterable) and not isinstance(tags, str | Mapping):
            tags = list(tags)
        # A local variable, because another thread may replace the attribute.
        last = self._last_vocabulary
        if last is None or last[0] != tags:
            last = (tags, TagVocabularyLogitsProcessor.from_tags(tags, self.processor, self.model.config))
            self._last_vocabulary = last
        return last[1]

    def _load_book(self, book: Any) -> Any:
        """Return the [`BookTagger`] of a book, and keep the last one."""
        last = self._last_book
        if last is None or last[0] != book:
            try:
                # This file also runs without the package, which an import statement would require.
                module = importlib.import_module("modeling_optsg.book")
            except ImportError as error:
                raise ImportError("a book needs the package optsg, see the README of optsg") from error
            is_tagger = isinstance(book, module.BookTagger)
            last = (book, book if is_tagger else module.BookTagger(self.model, self.processor, book))
            self._last_book = last
        return last[1]

    def preprocess(self, example: Any, timeout: float | None = None) -> dict[str, Any]:
        """Check an example and name its parts as the processor does; only web addresses are opened here."""
        given = name_parts(example)
        image = given.get("images")
        if isinstance(image, str) and is_url(image) and image.startswith(("http://", "https://", "data:")):
            try:
                # The processor decodes it like any other file. Its errors name the path.
                given["images"] = {"bytes": _load_bytes(image, timeout), "path": _shown(image)}
            except Exception as error:  # from the HTTP client or base64
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(f"{_shown(image)} cannot be loaded ({_shown(reason)})") from error
        elif isinstance(image, str) and len(image) > MAX_PATH_LENGTH:
            raise ValueError(f"{_shown(image)} is too long for a path; pass base64 as data:image/…;base64,…")
        return given

    def _collate(self, examples: list[dict]) -> BatchFeature:
        names = dict.fromkeys(name for example in examples for name in example)
        batch = self.processor(
            **{name: [example.get(name) for example in examples] for name in names}, return_tensors="pt"
        )
        # A book compares the words of the titles.
        return BatchFeature(batch | {TITLES: [example.get("titles") for example in examples]})

    def _forward(self, model_inputs: Mapping[str, Any], book: Any = None, **generate_kwargs: Any) -> dict[str, Any]:
        inputs = {name: value for name, value in model_inputs.items() if name != TITLES}
        names = ["sequences", "tag_scores", "image_words", "image_word_scores"]
        if book is None:
            outputs, tags = self.model.generate(**inputs, **generate_kwargs), {}
        else:
            if "tag_vocabulary" in generate_kwargs:
                raise ValueError("book and tag_vocabulary exclude each other; pass one of them")
            limits = {name: generate_kwargs.pop(name, None) for name in ("threshold", "max_tags")}
            outputs = self.model.generate(**inputs, **generate_kwargs | book.generate_options)
            tags = {"tags": book(outputs, model_inputs[TITLES], **limits)}
        return tags | {name: outputs[name] for name in names if outputs.get(name) is not None}

    def postprocess(
        self, model_outputs: Mapping[str, Any], return_image_words: bool = False
    ) -> list[dict] | dict[str, list[dict]]:
        """Return the tags of one example, in the format of image classification."""
        model_outputs = dict(model_outputs)
        tags = model_outputs.pop("tags", None)
        outputs = OPTSGGenerateOutput(**model_outputs)
        if tags is None:
            (tags,) = self.processor.batch_decode(outputs)
        elif tags and isinstance(tags[0], list):
            # In a batch of one example, lists are not unpacked as in larger batches.
            (tags,) = tags
        names = ("score", "novel", "source", "neighbours")
        tags = [{"label": tag["tag"]} | {name: tag[name] for name in names if name in tag} for tag in tags]
        if not return_image_words:
            return tags
        (words,) = decode_image_words(outputs, self.model.config)
        return {"tags": tags, "image_words": words}

    def get_iterator(
        self,
        inputs: Iterable,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> PipelineIterator:
        """Iterate over the tags of the inputs.

        The base class concatenates the tensors of examples that were prepared one by one. They would need the same
        parts and the same number of frames, so here the processor prepares a whole batch.
        """
        kind = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        loader = DataLoader(
            kind(inputs, self.preprocess, preprocess_params),
            num_workers=num_workers if isinstance(inputs, Sized) else min(num_workers, 1),
            batch_size=batch_size,
            collate_fn=self._collate,
        )
        batches = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(batches, self.postprocess, postprocess_params)

    def run_single(
        self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict
    ) -> list[dict]:
        """Return the tags of one example."""
        iterator = self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params)
        return next(iter(iterator))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the model, its code and the processor, which the base class does not save."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _load_bytes(address: str, timeout: float | None) -> bytes:
    """Return the file at a web address, or in the base64 of a `data:` address."""
    if address.startswith("data:"):
        content = base64.b64decode(address.partition(",")[2])
    else:
        content = httpx.get(address, timeout=timeout, follow_redirects=True).raise_for_status().content
    if not content:
        raise ValueError("it is empty")
    return content


def _shown(text: str) -> str:
    """Shorten a text that may be a whole file for an error message."""
    return text if len(text) <= 200 else f"{text[:100]}… ({len(text):,} characters)"
