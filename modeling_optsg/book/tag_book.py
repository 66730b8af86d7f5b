"""The tag book: tagged examples whose tags are suggested for similar examples."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable
from safetensors.numpy import load_file, save_file
from scipy.special import expit, logit
from torch.nn import functional as F

from modeling_optsg.evaluation.metrics import TagEvaluator, metric_value
from modeling_optsg.tag_evidence import TagEvidence

from .fusion import MIN_VOTE, FusedScore
from .title_words import TitleWordIndex, title_words
from .votes import NO_EVIDENCE, SOURCES, VECTOR_SOURCES, Neighbours, TagVotes

NUM_NEIGHBOURS = 20
NUM_CANDIDATES = 50
# Number of principal components to which image features, with thousands of dimensions, are reduced.
MAX_IMAGE_SIZE = 256
MAX_PCA_IMAGES = 4000
# Vote temperatures to try, for similarities of at most 1.
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
# Strengths of the logit adjustment to try.
ADJUSTMENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
# Model probabilities are clamped so that their logits are finite.
MIN_PROBABILITY = 1e-3
MIN_LOGIT = float(logit(MIN_PROBABILITY))
# Features of a tag: logit of the model's probability, whether it is novel, whether a neighbour has it, the evidence,
# and its log frequency in the book.
NUM_FEATURES = len(NO_EVIDENCE) + 4
# With fewer examples, the fit would overfit.
MIN_FIT_EXAMPLES = 20
VERSION = 1
SETTINGS_NAME, EXAMPLES_NAME, VECTORS_NAME = "book.json", "examples.parquet", "vectors.safetensors"
# Columns of the examples. Examples in the same group may show the same thing.
COLUMNS = ("id", "title", "tags", "group")


@dataclass
class BookQueries:
    """Examples to look up.

    Args:
        vectors: Vectors `[examples, width]` of each source in `VECTOR_SOURCES`; zeros for a missing modality.
        titles: Title of each example; an empty string if it has none.
    """

    vectors: dict[str, torch.Tensor]
    titles: list[str]

    @classmethod
    def from_evidence(cls, evidence: TagEvidence, titles: Sequence[str | None]) -> "BookQueries":
        """Make the queries of a batch from its evidence and its titles."""
        vectors = {"image": evidence.image_features, "title": evidence.title_features, "joint": evidence.vectors}
        vectors = {name: vector.detach().float().cpu() for name, vector in vectors.items()}
        return cls(vectors, [title or "" for title in titles])

    @classmethod
    def concatenate(cls, parts: Sequence["BookQueries"]) -> "BookQueries":
        """Concatenate the queries of several batches."""
        vectors = {name: torch.cat([part.vectors[name] for part in parts]) for name in VECTOR_SOURCES}
        return cls(vectors, [title for part in parts for title in part.titles])

    def select(self, rows: Sequence[int]) -> "BookQueries":
        """Return the queries of some rows."""
        vectors = {name: vectors[list(rows)] for name, vectors in self.vectors.items()}
        return BookQueries(vectors, [self.titles[row] for row in rows])

    def __len__(self) -> int:
        return len(self.titles)


@dataclass
class BookCandidates:
    """Tags of a query's neighbours, sorted by decreasing mean vote.

    Args:
        tags: The tags.
        evidence: `[tags, len(NO_EVIDENCE)]`, see [`TagVotes.evidence`].
        neighbours: For each tag, the examples that have it, as `{"id", "score"}`, sorted by decreasing score. The
            score is the mean vote.
    """

    tags: list[str]
    evidence: np.ndarray
    neighbours: list[list[dict]]

    @property
    def mean_votes(self) -> np.ndarray:
        """The mean vote of each tag over the sources."""
        return np.exp(self.evidence[:, -1]) - MIN_VOTE


class TagBook:
    """Tagged examples whose tags are suggested for similar examples.

    Args:
        examples: Rows with the columns `id` (unique), `title`, `tags` and `group`. When a book is fitted to its own
            examples, the neighbours of an example come from other groups.
        queries: Vectors and titles of the examples.
        fingerprint: Fingerprint of the model that computed the vectors.

    Raises:
        ValueError: A column is missing, there are no examples, the lengths differ, or an `id` occurs twice.
    """

    def __init__(self, examples: Dataset, queries: BookQueries, fingerprint: str):
        _check_examples(examples, len(queries))
        self.examples, self.fingerprint = examples.select_columns(list(COLUMNS)), fingerprint
        self.temperatures, self.threshold = dict.fromkeys(SOURCES, 0.05), 0.1
        self.score = FusedScore(NUM_FEATURES)
        images = queries.vectors["image"]
        present = images[images.any(dim=1)]
        self.image_mean = present.mean(dim=0) if len(present) else images.new_zeros(images.shape[1])
        self.image_components = _principal_components(present - self.image_mean)
        self.vectors = {name: vectors.half() for name, vectors in self._normalize(queries).items()}

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def tag_counts(self) -> Counter:
        """Number of examples with each tag."""
        return Counter(tag for tags in self.examples["tags"] for tag in set(tags))

    @cached_property
    def tags(self) -> list[str]:
        """All tags of the examples, most frequent first."""
        return [tag for tag, _ in self.tag_counts.most_common()]

    @cached_property
    def _spelling(self) -> dict[str, str]:
        """The most frequent spelling of each tag, keyed by the lower-case tag."""
        return {tag.casefold(): tag for tag in reversed(self.tags)}

    @cached_property
    def _tag_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The concatenated tag indices of all examples, and the offset of each example."""
        index = {tag: number for number, tag in enumerate(self.tags)}
        rows = [sorted({index[tag] for tag in tags}) for tags in self.examples["tags"]]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        return np.array([tag for row in rows for tag in row], dtype=np.int64), starts

    @cached_property
    def _groups(self) -> list[str]:
        return self.examples["group"][:]

    @cached_property
    def _ids(self) -> list[str]:
        return self.examples["id"][:]

    @cached_property
    def _words(self) -> TitleWordIndex | None:
        titles = self.examples["title"][:]
        return TitleWordIndex(titles) if any(map(title_words, titles)) else None

    def look_up(self, queries: BookQueries) -> list[BookCandidates]:
        """Return the tags of each query's nearest examples."""
        return self.candidates(self.search(queries))

    def predict(
        self, predictions: Sequence[Mapping], candidates: BookCandidates, own_tags_only: bool = False
    ) -> list[dict]:
        """Fuse the model's predictions with the neighbours' tags.

        Before [`fit`], the score is `1 - (1 - p)(1 - q)`: the probability that the model or the neighbours are right.
        p is the model's probability. q has the mean vote as its odds.

        Args:
            predictions: All tags of the model as `{"tag", "score", "novel"}`, including those below its threshold.
                Empty if there is no model.
            candidates: Tags of the neighbours of the same example.
            own_tags_only: Leave out tags that the book does not have, and spell the others as in the book.

        Returns:
            Tags as `{"tag", "score", "novel", "neighbours"}`, the most probable first. Tags that the model does not
            predict are novel. A `"source"` of a prediction is kept.
        """
        tags, features = self._features(predictions, candidates, own_tags_only)
        if self.score.is_fitted:
            scores = self.score(features)
        else:
            votes = dict(zip(candidates.tags, candidates.mean_votes, strict=True))
            odds = np.array([votes.get(tag, 0.0) for tag in tags])
            generated = np.where(features[:, 0] > MIN_LOGIT, expit(features[:, 0]), 0.0)
            scores = 1 - (1 - generated) / (1 + odds)
        neighbours = dict(zip(candidates.tags, candidates.neighbours, strict=True))
        by_model = self._by_name(predictions, own_tags_only)
        predicted = []
        for row in np.argsort(-scores, kind="stable"):
            tag = {"tag": tags[row], "score": float(scores[row]), "novel": bool(features[row, 1])}
            tag |= {name: value for name, value in by_model.get(tags[row], {}).items() if name == "source"}
            predicted.append(tag | {"neighbours": neighbours.get(tags[row], [])})
        return predicted

    def _by_name(self, predictions: Sequence[Mapping], own_tags_only: bool) -> dict[str, Mapping]:
        """Return the predictions by tag, spelled as in the book and only those of the book if `own_tags_only`."""
        found: dict[str, Mapping] = {}
        for tag in predictions:
            name = self._spelling.get(tag["tag"].casefold()) if own_tags_only else tag["tag"]
            if name is not None and (name not in found or tag["score"] > found[name]["score"]):
                found[name] = tag
        return found

    def _features(
        self, predictions: Sequence[Mapping], candidates: BookCandidates, own_tags_only: bool
    ) -> tuple[list[str], np.ndarray]:
        """Return the tags of the model and of the neighbours, and the features of each, `[tags, NUM_FEATURES]`."""
        by_model = self._by_name(predictions, own_tags_only)
        tags = list(dict.fromkeys([*candidates.tags, *by_model]))
        features = np.zeros((len(tags), NUM_FEATURES))
        features[:, 3:-1] = NO_EVIDENCE
        features[: len(candidates.tags), 3:-1] = candidates.evidence
        features[: len(candidates.tags), 2] = 1.0
        absent = {"score": 0.0, "novel": True}
        scores = [by_model.get(tag, absent)["score"] for tag in tags]
        features[:, 0] = logit(np.clip(scores, MIN_PROBABILITY, 1 - MIN_PROBABILITY))
        features[:, 1] = [by_model.get(tag, absent)["novel"] for tag in tags]
        features[:, -1] = np.log([max(self.tag_counts[tag], 1) for tag in tags])
        return tags, features

    def search(
        self,
        queries: BookQueries,
        num_neighbours: int = NUM_NEIGHBOURS,
        excluded_groups: Sequence[str] | None = None,
    ) -> Neighbours:
        """Find the nearest examples of each query by each source, and compare them by all sources.

        Args:
            queries: The examples to look up.
            num_neighbours: Number of examples per source.
            excluded_groups: For each query, the group whose examples are left out.
        """
        vectors = self._normalize(queries)
        # Groups are small, so enough neighbours remain.
        wanted = min(num_neighbours if excluded_groups is None else 2 * num_neighbours + 16, len(self))
        by_source = [_nearest(vectors[name], self.vectors[name], wanted) for name in VECTOR_SOURCES]
        by_words = [{} if self._words is None else self._words.search(title, wanted) for title in queries.titles]
        by_source.append([list(found) for found in by_words])
        rows = []
        for index in range(len(queries)):
            found = [source[index] for source in by_source]
            if excluded_groups is not None:
                own = excluded_groups[index]
                found = [[row for row in nearest if self._groups[row] != own] for nearest in found]
            rows.append(
                torch.tensor(list(dict.fromkeys(row for nearest in found for row in nearest[:num_neighbours])))
            )
        rows = torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True, padding_value=-1)
        return self._compare(vectors, rows, by_words)

    def candidates(self, neighbours: Neighbours, max_candidates: int = NUM_CANDIDATES) -> list[BookCandidates]:
        """For each query, return the neighbours' tags with the largest mean votes."""
        votes = TagVotes(*self._tag_rows, len(self.tags), neighbours)
        evidence = votes.evidence(neighbours.votes(self.temperatures), neighbours.similarities.numpy())
        found = []
        for query, rows in enumerate(neighbours.rows.tolist()):
            entries = votes.most_voted(query, max_candidates)
            with_tag = [
                [{"id": self._ids[rows[column]], "score": vote} for column, vote in votes.neighbours_with_tag(entry)]
                for entry in entries
            ]
            found.append(
                BookCandidates([self.tags[votes.tag[entry]] for entry in entries], evidence[entries], with_tag)
            )
        return found

    def fit(
        self,
        queries: BookQueries,
        references: Sequence[Sequence[str]],
        predictions: Sequence[Sequence[Mapping]] | None = None,
        *,
        excluded_groups: Sequence[str] | None = None,
        num_neighbours: int = NUM_NEIGHBOURS,
        metric: str = "micro_f1",
        own_tags_only: bool = False,
    ) -> dict[str, float] | None:
        """Fit the temperatures of the votes, the fusion with the model, its logit adjustment and the threshold.

        Args:
            queries: Validation examples, or examples of the book itself with `excluded_groups`.
            references: Their tags.
            predictions: Predictions of the model for them, as in [`predict`]. Without them, the book is fitted alone.
            excluded_groups, num_neighbours: See [`search`].
            metric: The metric to maximise, as in [`metric_value`].
            own_tags_only: See [`predict`].

        Returns:
            The metrics with the fitted settings. `None` if there are fewer than `MIN_FIT_EXAMPLES` examples or no
            neighbour has a correct tag; the book is then unchanged.
        """
        predictions = [[] for _ in references] if predictions is None else predictions
        neighbours = self.search(queries, num_neighbours, excluded_groups)
        if len(queries) < MIN_FIT_EXAMPLES or not self._fit_temperatures(neighbours, references):
            return None
        pairs = zip(predictions, self.candidates(neighbours), strict=True)
        found = [self._features(tags, candidates, own_tags_only) for tags, candidates in pairs]
        features = np.concatenate([rows for _, rows in found])
        is_correct = np.array([tag in set(own) for (tags, _), own in zip(found, references) for tag in tags])
        score = FusedScore(NUM_FEATURES)
        score.fit(features, is_correct)
        evaluator = TagEvaluator(references, self.tag_counts)
        fits = []
        for adjustment in ADJUSTMENTS:
            adjusted = score.adjusted(features, is_correct, adjustment)
            scored = [[{"tag": t, "score": s} for t, s in zip(tags, adjusted(rows).tolist())] for tags, rows in found]
            threshold, metrics = evaluator.best_threshold(scored, metric)
            fits.append((metric_value(metrics, metric), adjusted, threshold, metrics))
        _, self.score, self.threshold, metrics = max(fits, key=lambda fit: fit[0])
        return metrics

    def _fit_temperatures(self, neighbours: Neighbours, references: Sequence[Sequence[str]]) -> bool:
        """Choose temperatures by maximum likelihood, and return whether any neighbour has a correct tag."""
        votes = TagVotes(*self._tag_rows, len(self.tags), neighbours)
        wanted = [set(tags) for tags in references]
        is_correct = np.array([self.tags[tag] in wanted[query] for query, tag in zip(votes.query, votes.tag)])
        if not is_correct.any():
            return False
        for index, name in enumerate(SOURCES):
            losses = {}
            for temperature in TEMPERATURES:
                of_source = neighbours.votes({**self.temperatures, name: temperature})[..., index]
                losses[temperature] = -np.log(votes.totals(of_source)[is_correct] + MIN_VOTE).mean()
            self.temperatures[name] = min(losses, key=losses.get)
        return True

    def fit_to_itself(
        self, queries: BookQueries, rows: Sequence[int], predictions: Sequence[Sequence[Mapping]] | None = None
    ) -> dict[str, float] | None:
        """Fit the book to some of its own examples, with neighbours only from other groups. See [`fit`].

        Args:
            queries: The examples of the book, as given to the constructor.
            rows: Rows of the examples to fit to.
            predictions: Predictions of the model for them.
        """
        chosen = self.examples.select(rows)
        options = {"excluded_groups": chosen["group"][:], "own_tags_only": True}
        return self.fit(queries.select(rows), chosen["tags"][:], predictions, **options)

    def add_examples(self, examples: Dataset, queries: BookQueries) -> None:
        """Add examples. Their tags can be suggested immediately.

        Args:
            examples: Rows with `COLUMNS`.
            queries: Their vectors and titles.

        Raises:
            ValueError: As in the constructor. The book is then unchanged.
        """
        _check_examples(examples, len(queries))
        merged = concatenate_datasets([self.examples, examples.select_columns(list(COLUMNS))])
        _check_examples(merged, len(self) + len(queries))
        added = self._normalize(queries)
        self.vectors = {name: torch.cat([self.vectors[name], added[name].half()]) for name in VECTOR_SOURCES}
        self._replace_examples(merged)

    def remove_examples(self, ids: Sequence[str]) -> None:
        """Remove examples.

        Raises:
            ValueError: An id is not in the book, or no example would be left. The book is then unchanged.
        """
        removed = set(ids)
        if unknown := removed - set(self._ids):
            raise ValueError(f"The id {sorted(unknown)[0]!r} is not in the book.")
        kept = [row for row, name in enumerate(self._ids) if name not in removed]
        if not kept:
            raise ValueError("All examples would be removed; a book needs at least one.")
        self.vectors = {name: vectors[kept] for name, vectors in self.vectors.items()}
        self._replace_examples(self.examples.select(kept))

    def save(self, folder: str | os.PathLike) -> None:
        """Save the book in a folder: the examples, their vectors and the settings."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The settings are deleted first and written last, so that a partly saved book cannot be loaded.
        (folder / SETTINGS_NAME).unlink(missing_ok=True)
        pq.write_table(self.examples.with_format("arrow")[:], folder / EXAMPLES_NAME)
        tensors = {name: vectors.numpy() for name, vectors in self.vectors.items()}
        tensors |= {"image_mean": self.image_mean.numpy(), "image_components": self.image_components.numpy()}
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / VECTORS_NAME)
        settings = {"version": VERSION, "fingerprint": self.fingerprint, "examples": len(self)}
        settings |= {"temperatures": self.temperatures, "threshold": self.threshold, "score": self.score.to_dict()}
        (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike, fingerprint: str | None = None) -> "TagBook":
        """Load a saved book.

        Args:
            folder: Its folder.
            fingerprint: Fingerprint of the model that will use the book. By default, it is not checked.

        Raises:
            FileNotFoundError: The folder does not contain a book.
            ValueError: A file is damaged, or the book was made with another model.
        """
        folder = Path(folder)
        if not (folder / SETTINGS_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} does not contain a book ({SETTINGS_NAME} is missing). Make one with optsg index."
            )
        book = cls.__new__(cls)
        try:
            settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
            tensors = {name: torch.from_numpy(array) for name, array in load_file(folder / VECTORS_NAME).items()}
            table = pq.read_table(folder / EXAMPLES_NAME, columns=list(COLUMNS))
            book.examples = Dataset(InMemoryTable(table))
            book.vectors = {name: tensors[name] for name in VECTOR_SOURCES}
            book.image_mean, book.image_components = tensors["image_mean"], tensors["image_components"]
            book.fingerprint, book.threshold = settings["fingerprint"], settings["threshold"]
            book.temperatures = {name: settings["temperatures"][name] for name in SOURCES}
            book.score = FusedScore.from_dict(settings["score"])
            lengths = {settings["examples"], len(book), *map(len, book.vectors.values())}
        except Exception as error:  # json, pyarrow and safetensors raise errors of many types
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"The book in {folder} is damaged ({reason}). Run optsg index again.") from error
        if len(lengths) > 1:
            counts = ", ".join(map(str, sorted(lengths)))
            raise ValueError(
                f"The book in {folder} is damaged: its files disagree on the number of examples ({counts}). Run optsg "
                "index again."
            )
        if fingerprint is not None and fingerprint != book.fingerprint:
            raise ValueError(
                f"The book in {folder} was made with another model. Run optsg index again with this model."
            )
        return book

    def _normalize(self, queries: BookQueries) -> dict[str, torch.Tensor]:
        """Return unit vectors, whose dot products are similarities. A missing modality stays zero."""
        images = queries.vectors["image"]
        reduced = (images - self.image_mean) @ self.image_components.T * images.any(dim=1, keepdim=True)
        return {name: F.normalize({**queries.vectors, "image": reduced}[name], dim=-1) for name in VECTOR_SOURCES}

    def _compare(
        self, vectors: Mapping[str, torch.Tensor], rows: torch.Tensor, by_words: Sequence[Mapping[int, float]]
    ) -> Neighbours:
        similarities = torch.zeros(*rows.shape, len(SOURCES))
        is_comparable = torch.zeros(*rows.shape, len(SOURCES), dtype=torch.bool)
        for index, name in enumerate(VECTOR_SOURCES):
            own = self.vectors[name][rows.clamp(min=0)].float()
            similarities[..., index] = torch.einsum("qnw,qw->qn", own, vectors[name])
            is_comparable[..., index] = own.any(dim=-1) & vectors[name].any(dim=-1)[:, None]
        for query, found in enumerate(by_words):
            if found:
                similarities[query, :, -1] = torch.tensor([found.get(row, 0.0) for row in rows[query].tolist()])
                is_comparable[query, :, -1] = True
        is_comparable &= (rows >= 0)[..., None]
        return Neighbours(rows, similarities * is_comparable, is_comparable)

    def _replace_examples(self, examples: Dataset) -> None:
        self.examples = examples
        for name in ("tag_counts", "tags", "_spelling", "_tag_rows", "_groups", "_ids", "_words"):
            self.__dict__.pop(name, None)


def _nearest(queries: torch.Tensor, vectors: torch.Tensor, wanted: int) -> list[list[int]]:
    """Return the rows of the vectors most similar to each query, or no rows for a zero query."""
    found, vectors = [], vectors.float()
    for block in queries.split(256):
        rows = (block @ vectors.T).topk(wanted, dim=1).indices.tolist()
        found += [row if present else [] for row, present in zip(rows, block.any(dim=1).tolist())]
    return found


def _check_examples(examples: Dataset, num_queries: int) -> None:
    if missing := set(COLUMNS) - set(examples.column_names):
        raise ValueError(
            f"The examples of a book need the columns {', '.join(COLUMNS)}; missing: {', '.join(sorted(missing))}."
        )
    if not len(examples):
        raise ValueError("There are no examples; a book needs at least one.")
    if len(examples) != num_queries:
        raise ValueError(f"Got {len(examples)} examples but vectors for {num_queries}.")
    id_, count = Counter(examples["id"]).most_common(1)[0]
    if count > 1:
        raise ValueError(f"The id {id_!r} occurs {count} times; ids must be unique.")


def _principal_components(centered: torch.Tensor) -> torch.Tensor:
    """Return the first principal components `[components, width]` of centred vectors `[vectors, width]`."""
    number = min(MAX_IMAGE_SIZE, *centered.shape)
    if not number:
        return centered.new_zeros(1, centered.shape[1])
    # More vectors hardly change the components.
    sample = centered[:: -(-len(centered) // MAX_PCA_IMAGES)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.pca_lowrank(sample, q=min(number, len(sample)), center=False)[2].T.contiguous()
