"""The book of the open-book baseline: finds similar training examples and their tags."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerFast

from modeling_optsg.baselines.configuration import OpenBookConfig
from modeling_optsg.baselines.open_book import OpenBookForTagGeneration
from modeling_optsg.baselines.pooling import ImageScaling, pool_examples
from modeling_optsg.book.nearest import import_faiss
from modeling_optsg.data.collator import pad_rows
from modeling_optsg.evaluation.prediction import MODALITY_COLUMNS
from modeling_optsg.generation_settings import INPUT_NAMES
from modeling_optsg.layers import pool_tokens
from modeling_optsg.processing_optsg import OPTSGProcessor

SETTINGS_NAME = "similarity.json"
# Folder of the examples that an open-book model reads, in that of the checkpoint.
BOOK_FOLDER = "book"


class ExampleRetriever:
    """The tags of training examples, in a `datasets` table with a FAISS index.

    The similarity is that of [`KNNForTagVote`].

    Args:
        groups: The group of each training example. Examples of one group may show the same thing.
        tags: The tags of each training example.
        images: `[examples, width]`, from [`pool_examples`], zero for a missing image.
        title_features: `[examples, width]`, from [`pool_examples`], zero for a missing title.
        image_weight: Weight of the image similarity.

    Raises:
        ImportError: `faiss` is not installed (`pip install "optsg[book]"`).
        ValueError: The lengths differ.
    """

    column = "embedding"

    def __init__(
        self,
        groups: Sequence[str],
        tags: Sequence[Sequence[str]],
        images: torch.Tensor,
        title_features: torch.Tensor,
        image_weight: float = 0.4,
    ):
        if len({len(groups), len(tags), len(images), len(title_features)}) > 1:
            raise ValueError(
                f"{len(groups)} groups, {len(tags)} tag sets, {len(images)} images and {len(title_features)} title "
                "features; a book needs the same number of each."
            )
        self.image_scaling, self.image_weight = ImageScaling(images.shape[1]), image_weight
        self.image_scaling.fit(images)
        table = Dataset.from_dict({"group": list(groups), "tags": [list(t) for t in tags]})
        self.table = table.add_column(self.column, list(self._embed(images, title_features)))
        self._index()

    @classmethod
    def from_examples(
        cls,
        groups: Sequence[str],
        tags: Sequence[Sequence[str]],
        examples: Sequence[Mapping],
        config: OpenBookConfig,
        image_weight: float = 0.4,
    ) -> "ExampleRetriever":
        """Make the book of training examples with precomputed tower features; see [`pool_examples`]."""
        return cls(groups, tags, *pool_examples(examples, config), image_weight)

    def _index(self) -> None:
        faiss = import_faiss()
        self.table.add_faiss_index(self.column, metric_type=faiss.METRIC_INNER_PRODUCT)
        self._tags = self.table.with_format(None)["tags"][:]
        self._groups = self.table["group"][:]
        self._max_group_size = max(Counter(self._groups).values())

    def __len__(self) -> int:
        return len(self.table)

    def _embed(self, images: torch.Tensor, title_features: torch.Tensor) -> np.ndarray:
        """Return one vector per example; inner products are similarities."""
        images = self.image_weight**0.5 * F.normalize(self.image_scaling(images), dim=-1)
        return torch.cat([F.normalize(title_features, dim=-1), images], dim=1).float().numpy()

    def retrieve(
        self,
        images: torch.Tensor,
        title_features: torch.Tensor,
        neighbours: int,
        own_groups: Sequence[str] | None = None,
    ) -> list[list[list[str]]]:
        """Retrieve the tags of each query's nearest examples, nearest first.

        Args:
            images: `[queries, width]`, pooled, zero for a missing image.
            title_features: `[queries, width]`, pooled, zero for a missing title.
            neighbours: Number of examples per query.
            own_groups: In training, the queries' groups. Examples of the same group are left out, the query itself
                among them: the test split has no such neighbours, and a model that had them in training would copy
                blindly.

        Returns:
            For each query at most `neighbours` tag lists.
        """
        queries = self._embed(images, title_features)
        # The nearest examples may all be of the query's group.
        wanted = min(neighbours if own_groups is None else neighbours + self._max_group_size, len(self.table))
        _, rows = self.table.search_batch(self.column, queries, k=wanted)
        retrieved = []
        for query, nearest in enumerate(rows.tolist()):
            nearest = [row for row in nearest if row >= 0]
            if own_groups is not None:
                nearest = [row for row in nearest if self._groups[row] != own_groups[query]]
            retrieved.append([self._tags[row] for row in nearest[:neighbours]])
        return retrieved

    def look_up(
        self, model: OpenBookForTagGeneration, processor: OPTSGProcessor, **inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Run the towers and retrieve the book of a batch.

        Args:
            model: The model that will generate.
            processor: Its processor.
            inputs: Inputs of the towers, from the processor, or precomputed features.

        Returns:
            The arguments of `generate`: tower features and the retrieved tags' tokens.

        Raises:
            ValueError: An input is unknown, or the batch has neither images nor titles.
        """
        if unknown := set(inputs) - set(INPUT_NAMES):
            raise ValueError(f"{sorted(unknown)} are not inputs of the towers; expected some of {list(INPUT_NAMES)}.")
        with torch.no_grad():
            vision, titles = model.model.encode_inputs(**{name: inputs.get(name) for name in INPUT_NAMES})
        if vision is None and titles is None:
            raise ValueError("Nothing to encode: pass pixel_values, frame_features, input_ids or title_features.")
        frame_mask, title_mask = inputs.get("frame_mask"), inputs.get("attention_mask")
        batch, config = len(titles if vision is None else vision.frame_features), model.config
        title_features = pool_tokens(titles, title_mask)
        images = torch.zeros(batch, config.image_feature_size) if vision is None else vision.image_features.cpu()
        if title_features is None:
            title_features = torch.zeros(batch, config.text_config.hidden_size)
        retrieved = self.retrieve(images, title_features.cpu(), config.num_book_examples)
        rows = encode_book(retrieved, processor.tag_tokenizer, config.max_book_tokens)
        arguments = {"frame_mask": frame_mask}
        if vision is not None:
            arguments |= {"frame_features": vision.frame_features, "image_features": vision.image_features}
        arguments |= {"title_features": titles, "attention_mask": title_mask}
        arguments |= {
            "book_input_ids": pad_rows(rows, processor.tag_tokenizer.pad_token_id).to(model.device),
            "book_mask": pad_rows([[1] * len(row) for row in rows], 0).bool().to(model.device),
        }
        return {name: tensor for name, tensor in arguments.items() if tensor is not None}

    def save(self, folder: str | os.PathLike) -> None:
        """Save groups, tags and embeddings; the index is rebuilt when the book is loaded."""
        # A table with an index cannot be saved.
        self.table.drop_index(self.column)
        try:
            self.table.save_to_disk(folder)
        finally:
            self._index()
        settings = {"image_weight": self.image_weight}
        settings |= {f"image_{name}": values.tolist() for name, values in self.image_scaling.state_dict().items()}
        (Path(folder) / SETTINGS_NAME).write_text(json.dumps(settings, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ExampleRetriever":
        """Load a saved book.

        Raises:
            FileNotFoundError: `folder` was not made by [`save`].
            ValueError: An earlier version made the book, without groups.
        """
        book = cls.__new__(cls)
        settings = json.loads((Path(folder) / SETTINGS_NAME).read_text(encoding="utf-8"))
        book.image_weight = settings["image_weight"]
        book.image_scaling = ImageScaling(len(settings["image_mean"]))
        book.image_scaling.load_state_dict(
            {name: torch.tensor(settings[f"image_{name}"]) for name in ("mean", "scale")}
        )
        book.table = load_from_disk(str(folder))
        if "group" not in book.table.column_names:
            raise ValueError(f"{folder} was made by an earlier version and has no groups; train the model again.")
        book._index()
        return book


class ExamplesWithBook(TorchDataset):
    """Examples with the tokens of their neighbours' tags as `book_input_ids`.

    Args:
        examples: Rows with `frame_features` and `title_features`.
        book: The book of the training examples.
        config: The model's configuration.
        tag_tokenizer: The tag tokenizer of the model.
        own_groups: The examples' groups, if they are in the book; see [`ExampleRetriever.retrieve`].
        modalities: The inputs that neighbours are found by: "image", "title" or both.
    """

    def __init__(
        self,
        examples: Sequence[Mapping],
        book: ExampleRetriever,
        config: OpenBookConfig,
        tag_tokenizer: PreTrainedTokenizerFast,
        own_groups: Sequence[str] | None = None,
        modalities: Sequence[str] = tuple(MODALITY_COLUMNS),
    ):
        self.examples, self.modalities = examples, modalities
        self._arguments = (book, config, tag_tokenizer, own_groups)
        columns = {column for modality in modalities for column in MODALITY_COLUMNS[modality]}
        visible = ({name: value for name, value in row.items() if name in columns} for row in examples)
        retrieved = book.retrieve(*pool_examples(visible, config), config.num_book_examples, own_groups)
        self.book_input_ids = encode_book(retrieved, tag_tokenizer, config.max_book_tokens)

    def with_modalities(self, modalities: Sequence[str]) -> "ExamplesWithBook":
        """Return the same examples with the tags of the neighbours that are found by some inputs only.

        Args:
            modalities: The inputs, as in the constructor.
        """
        if set(modalities) == set(self.modalities):
            return self
        return ExamplesWithBook(self.examples, *self._arguments, modalities)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return {**self.examples[index], "book_input_ids": self.book_input_ids[index]}


def encode_book(
    retrieved: Sequence[Sequence[Sequence[str]]], tag_tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> list[list[int]]:
    """Tokenise retrieved tags, nearest neighbour first, each tag followed by [SEP].

    A tag of several neighbours occurs several times: the pointer adds up the probabilities of its copies, so that each
    copy is a vote. Tags beyond `max_tokens` are dropped, starting with those of the farthest neighbour.

    Args:
        retrieved: For each example the tag lists of its neighbours.
        tag_tokenizer: The tag tokenizer of the model.
        max_tokens: Maximum number of tokens per example.

    Returns:
        For each example its token ids.
    """
    tags = list({tag: None for neighbours in retrieved for tags in neighbours for tag in tags})
    encoded = tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"] if tags else []
    tokens = {tag: [*ids, tag_tokenizer.sep_token_id] for tag, ids in zip(tags, encoded, strict=True)}
    rows = []
    for neighbours in retrieved:
        row = []
        for tag_tokens in (tokens[tag] for tags in neighbours for tag in tags):
            if len(row) + len(tag_tokens) > max_tokens:
                break
            row += tag_tokens
        rows.append(row)
    return rows
