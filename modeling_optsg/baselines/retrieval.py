"""The book: which training examples are like this one, and what their tags are."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset

from modeling_optsg.baselines.pooling import pool_examples, pool_frames
from modeling_optsg.data.collator import encode_book
from modeling_optsg.layers import pool_tokens


class TagBook:
    """The tags of training examples, to be found by the examples' similarity: a `datasets` table with a FAISS index.

    Likeness is `title similarity + image_weight * image similarity`, cosine similarities of pooled tower features,
    images centred on the training mean: that of [`KNNForTagVote`].

    Args:
        titles: each training example's title.
        tags: each one's tags.
        images, title_features: `[examples, width]` each, from [`pool_examples`]; zero for what an example does not have.
        image_weight: how much the images' similarity counts beside the titles'.

    Raises:
        ImportError: `faiss` is not installed (`pip install "optsg[book]"`).
        ValueError: there are not as many of one as of the others.
    """

    column = "embedding"

    def __init__(
        self,
        titles: Sequence[str],
        tags: Sequence[Sequence[str]],
        images: torch.Tensor,
        title_features: torch.Tensor,
        image_weight: float = 0.4,
    ):
        if len({len(titles), len(tags), len(images), len(title_features)}) > 1:
            raise ValueError(
                f"{len(titles)} titles, {len(tags)} tag sets, {len(images)} images and {len(title_features)} "
                "title features: a book needs as many of each."
            )
        seen = images.any(dim=1)
        self.image_mean = images[seen].mean(dim=0) if seen.any() else torch.zeros(images.shape[1])
        self.image_weight = image_weight
        table = Dataset.from_dict({"title": list(titles), "tags": [list(t) for t in tags]})
        self.table = table.add_column(self.column, list(self._embed(images, title_features)))
        self._index()

    @classmethod
    def of_examples(cls, titles, tags, examples, config, image_weight: float = 0.4) -> "TagBook":
        """The book of training examples whose tower features are known; see [`pool_examples`]."""
        return cls(titles, tags, *pool_examples(examples, config), image_weight)

    def _index(self) -> None:
        import faiss

        self.table.add_faiss_index(self.column, metric_type=faiss.METRIC_INNER_PRODUCT)
        self._tags = self.table.with_format(None)["tags"][:]
        self._concepts = [concept(title) for title in self.table["title"]]

    def __len__(self) -> int:
        return len(self.table)

    def _embed(self, images: torch.Tensor, title_features: torch.Tensor):
        """One vector an example, whose inner products are the similarity."""
        centred = (images - self.image_mean) * images.any(dim=1, keepdim=True)
        images = self.image_weight**0.5 * F.normalize(centred, dim=-1)
        return torch.cat([F.normalize(title_features, dim=-1), images], dim=1).float().numpy()

    def retrieve(
        self,
        images: torch.Tensor,
        title_features: torch.Tensor,
        neighbours: int,
        own_titles: Sequence[str] | None = None,
    ) -> list[list[list[str]]]:
        """The tags of each query's nearest examples, nearest first.

        Args:
            images, title_features: `[queries, width]` each, pooled; zero for what a query does not have.
            neighbours: how many examples a query gets.
            own_titles: in training, the queries' titles. An example is never its own neighbour, nor is one whose title
                has the same words: in the test set there is none, and a model that had them in training would copy
                blindly.

        Returns:
            For each query a list of `neighbours` tag lists; fewer where the book has no more.
        """
        queries = self._embed(images, title_features)
        wanted = min(neighbours if own_titles is None else 4 * neighbours + 16, len(self.table))
        _, rows = self.table.search_batch(self.column, queries, k=wanted)
        found = []
        for query, near in enumerate(rows.tolist()):
            near = [row for row in near if row >= 0]
            if own_titles is not None:
                own = concept(own_titles[query])
                near = [row for row in near if self._concepts[row] != own]
            found.append([self._tags[row] for row in near[:neighbours]])
        return found

    def open(self, model, processor, **inputs) -> dict[str, torch.Tensor]:
        """What an [`OpenBookForTagGeneration`] needs beside the examples.

        Args:
            model, processor: of the checkpoint.
            inputs: what `processor` made of the examples, or their features.

        Returns:
            The arguments of `generate`: the examples, read by the towers once, and their book.
        """
        names = ("pixel_values", "frame_features", "frame_mask", "input_ids", "title_features", "attention_mask")
        if unknown := set(inputs) - set(names):
            raise ValueError(f"{sorted(unknown)} are no inputs of the towers; expected some of {list(names)}.")
        pixels, frames, frame_mask, input_ids, titles, title_mask = (inputs.get(name) for name in names)
        with torch.no_grad():
            frames, titles = model.model.read(pixels, frames, frame_mask, input_ids, titles, title_mask)
        if frames is None and titles is None:
            raise ValueError("Nothing to look at: give pixel_values, frame_features, input_ids or title_features.")
        count, config = len(frames if frames is not None else titles), model.config
        pooled = [
            torch.zeros(count, width) if features is None else features.cpu()
            for features, width in (
                (pool_frames(frames, frame_mask), config.frame_feature_size),
                (pool_tokens(titles, title_mask), config.text_config.hidden_size),
            )
        ]
        book = encode_book(
            self.retrieve(*pooled, config.num_book_examples), processor.tag_tokenizer, config.max_book_tokens
        )
        read = {"frame_features": frames, "frame_mask": frame_mask, "title_features": titles}
        read |= {"attention_mask": title_mask} | {name: tensor.to(model.device) for name, tensor in book.items()}
        return {name: tensor for name, tensor in read.items() if tensor is not None}

    def save(self, folder: str | os.PathLike) -> None:
        """Keeps titles, tags and embeddings in a folder; the index is built again when it is loaded."""
        # A table with an index cannot be saved.
        self.table.drop_index(self.column)
        try:
            self.table.save_to_disk(folder)
        finally:
            self._index()
        settings = {"image_weight": self.image_weight, "image_mean": self.image_mean.tolist()}
        (Path(folder) / "similarity.json").write_text(json.dumps(settings), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "TagBook":
        """
        Raises:
            FileNotFoundError: the folder is not one that `save` made.
        """
        book = cls.__new__(cls)
        settings = json.loads((Path(folder) / "similarity.json").read_text(encoding="utf-8"))
        book.image_weight = settings["image_weight"]
        book.image_mean = torch.tensor(settings["image_mean"])
        book.table = load_from_disk(str(folder))
        book._index()
        return book


class ExamplesWithBook(TorchDataset):
    """Examples with the tags of their neighbours beside them, as `book_tags`.

    Args:
        examples: rows with `frame_features` and `title_features`.
        book: a [`TagBook`].
        config: an [`OpenBookConfig`].
        own_titles: the examples' titles if the book was made of them; see [`TagBook.retrieve`].
    """

    def __init__(self, examples: Sequence[Mapping], book: TagBook, config, own_titles: Sequence[str] | None = None):
        self.examples = examples
        self.book_tags = book.retrieve(*pool_examples(examples, config), config.num_book_examples, own_titles)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return {**self.examples[index], "book_tags": self.book_tags[index]}


def concept(title: str) -> tuple[str, ...]:
    """The words of a title, in no order and any case: what two drawings of one thing have in common."""
    return tuple(sorted(set(re.findall(r"\w+", title.lower()))))
