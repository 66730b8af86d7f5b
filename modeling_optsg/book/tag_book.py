"""The tag book: tagged examples whose tags are suggested for similar examples."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from scipy.special import logit

from modeling_optsg.evaluation.metrics import TagEvaluator, metric_rank, normalize_tag

from . import fusion, nearest
from .example_rows import check_examples, with_state
from .nearest import Clusters, ClusterSearch, ExactSearch
from .normalization import VectorNormalizer
from .predictions import ModelTagReader, ModelTags
from .queries import BookQueries
from .tables import GroupTable, TagTable
from .title_words import TitleWordIndex, title_words
from .votes import NO_EVIDENCE, SOURCES, VECTOR_SOURCES, Neighbours, TagVotes

NUM_NEIGHBOURS = 20
NUM_CANDIDATES = 50
# Vote temperatures to try, for similarities of at most 1.
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 1.0)
# Strengths of the logit adjustment to try.
ADJUSTMENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
# The slots' probabilities are clamped so that their logits are finite.
MIN_PROBABILITY = 1e-3
# Classifier logit of a novel tag.
NO_CLASS = -8.0
# The last feature of a tag is its log frequency in the book.
NUM_FEATURES = fusion.EVIDENCE + len(NO_EVIDENCE) + 1
# With fewer examples, the fit would overfit.
MIN_FIT_EXAMPLES = 20
# The fit also sees what a random part of the book finds for one in `PART_STEP` examples.
PART_RATIO, PART_STEP = 0.1, 2


@dataclass
class BookCandidates:
    """Tags of a query's neighbours, sorted by decreasing mean vote.

    Args:
        tags: The tags.
        evidence: `[tags, len(NO_EVIDENCE)]`, see [`TagVotes.evidence`].
        neighbours: For each tag, the examples that have it, as `{"id", "title", "score"}`, sorted by decreasing score.
            The score is the mean vote.
        pointers: `[tags]`, the probability that a slot points at each tag; see [`ModelTagReader.point`]. `None`
            without a book reader.
    """

    tags: list[str]
    evidence: np.ndarray
    neighbours: list[list[dict]]
    pointers: np.ndarray | None = None

    @property
    def mean_votes(self) -> np.ndarray:
        """The mean vote of each tag over the sources."""
        return np.exp(self.evidence[:, -1]) - fusion.MIN_VOTE


class TagBook:
    """Tagged examples whose tags are suggested for similar examples.

    Args:
        examples: Rows with the columns `id` (unique), `title`, `tags` and `group`. When a book is fitted to its own
            examples, the neighbours of an example come from other groups.
        queries: Vectors and titles of the examples.
        fingerprint: Fingerprint of the model that computed the vectors.
        num_neighbours: Number of similar examples per source.
        num_candidates: Maximum number of their tags per query.

    Attributes:
        own_tags_only: Whether only tags of the book are predicted. Set it before [`fit`].
        temperatures, score, threshold: The fitted settings.
        normalize: Makes the vectors of queries comparable with those of the book.

    Raises:
        ValueError: A column is missing, there are no examples, the lengths differ, or an `id` occurs twice.
    """

    def __init__(
        self,
        examples: Dataset,
        queries: BookQueries,
        fingerprint: str,
        num_neighbours: int = NUM_NEIGHBOURS,
        num_candidates: int = NUM_CANDIDATES,
    ):
        check_examples(examples, len(queries))
        self.num_neighbours, self.num_candidates = num_neighbours, num_candidates
        self.examples, self.fingerprint = with_state(examples), fingerprint
        self.own_tags_only = False
        self.reset_fit()
        self.normalize = VectorNormalizer.from_images(queries.vectors["image"])
        self.vectors = self.normalize(queries)
        self.clusters: dict[str, Clusters] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def reset_fit(self) -> None:
        """Set the temperatures, the score and the threshold to what they are before [`fit`]."""
        self.temperatures, self.threshold = dict.fromkeys(SOURCES, 0.05), 0.1
        self.score = fusion.BookScore(NUM_FEATURES)

    @cached_property
    def tag_counts(self) -> Counter:
        """Number of examples with each tag."""
        return Counter(dict(zip(self.tags, self._tag_table.counts.tolist(), strict=True)))

    @property
    def tags(self) -> list[str]:
        """All tags of the examples, most frequent first."""
        return self._tag_table.tags

    @cached_property
    def _spelling(self) -> dict[str, str]:
        """The most frequent spelling of each tag, keyed by the normalised tag."""
        return {normalize_tag(tag): tag for tag in reversed(self.tags)}

    @cached_property
    def _tag_table(self) -> TagTable:
        return TagTable(self.examples)

    @cached_property
    def _groups(self) -> GroupTable:
        return GroupTable(self.examples)

    @cached_property
    def _searches(self) -> dict[str, ExactSearch | ClusterSearch]:
        """The search in the vectors of each source."""
        self.make_clusters()
        searches: dict[str, ExactSearch | ClusterSearch] = {}
        for name, vectors in self.vectors.items():
            is_large = name in self.clusters
            searches[name] = ClusterSearch(vectors, self.clusters[name]) if is_large else ExactSearch(vectors)
        return searches

    def make_clusters(self) -> None:
        """Compute the clusters by which sources with many vectors are searched. A small book needs none.

        Raises:
            ImportError: The book is large, and `faiss` is not installed.
        """
        for name, vectors in self.vectors.items():
            is_large = len(self) > nearest.MAX_EXACT and int(vectors.any(dim=1).sum()) > nearest.MAX_EXACT
            if not is_large:
                self.clusters.pop(name, None)
            elif name not in self.clusters or self.clusters[name].is_outdated:
                self.clusters[name] = Clusters.from_vectors(vectors)

    def prepare(self) -> None:
        """Make what the first search would make: the indices of the vectors, the title words and the tags.

        Raises:
            ImportError: As in [`make_clusters`].
        """
        _ = self._searches, self._words, self._tag_table, self._groups

    @cached_property
    def _titles(self) -> list[str]:
        return [title or "" for title in self.examples["title"]]

    @cached_property
    def _ids(self) -> list[str]:
        return self.examples["id"][:]

    @cached_property
    def _group_by_id(self) -> dict[str, str]:
        return dict(zip(self._ids, self.examples["group"]))

    @cached_property
    def _words(self) -> TitleWordIndex | None:
        return TitleWordIndex(self._titles) if any(map(title_words, self._titles)) else None

    def _name(self, row: int) -> dict[str, str]:
        return {"id": self._ids[row], "title": self._titles[row]}

    def look_up(self, queries: BookQueries, own_ids: Sequence[str | None] | None = None) -> list[BookCandidates]:
        """Return the tags of each query's nearest examples.

        Args:
            queries: The examples to look up.
            own_ids: For each query, its id if it may be in the book itself. Its own group is then left out.
        """
        groups = None
        if own_ids is not None:
            groups = [self._group_by_id.get(own_id) for own_id in own_ids]
        return self.candidates(self.search(queries, excluded_groups=groups))

    def predict(self, model_tags: ModelTags, candidates: BookCandidates) -> list[dict]:
        """Fuse the model's tags with the neighbours' tags.

        Before [`fit`], the score is `1 - (1 - p)(1 - q)`: the probability that the model or the neighbours are right.
        p is the model's probability. q has the mean vote as its odds.

        Args:
            model_tags: Tags of the model for the example. Empty if there is no model.
            candidates: Tags of the neighbours of the same example.

        Returns:
            Tags as `{"tag", "score", "novel", "neighbours"}`, the most probable first. Tags without a class are novel.
            A tag of the model keeps its `"source"`. After [`fit`], the source is "pointed" if slots point at the tag
            with a larger probability than they generate it and than the tag classifier gives it. With `own_tags_only`,
            tags that the book does not have are left out, and the others are spelled as in the book. Tags are compared
            with [`normalize_tag`].
        """
        tags, features = self._features(model_tags, candidates)
        by_model, is_pointed = self._by_name(model_tags), np.zeros(len(tags), dtype=bool)
        if self.score.is_fitted:
            scores = self.score(features)
            by_itself = features[:, [fusion.SLOT_LOGIT, fusion.CLASSIFIER_LOGIT]].max(axis=1)
            is_pointed = features[:, fusion.POINTER_LOGIT] > by_itself
        else:
            votes = dict(zip(candidates.tags, candidates.mean_votes, strict=True))
            odds = np.array([votes.get(tag, 0.0) for tag in tags])
            generated = np.array([by_model[tag]["score"] if tag in by_model else 0.0 for tag in tags])
            scores = 1 - (1 - generated) / (1 + odds)
        neighbours = dict(zip(candidates.tags, candidates.neighbours, strict=True))
        predicted = []
        for row in np.argsort(-scores, kind="stable"):
            tag = {"tag": tags[row], "score": float(scores[row]), "novel": bool(features[row, fusion.IS_NOVEL])}
            tag |= {name: value for name, value in by_model.get(tags[row], {}).items() if name == "source"}
            tag |= {"source": "pointed"} if is_pointed[row] else {}
            predicted.append(tag | {"neighbours": neighbours.get(tags[row], [])})
        return predicted

    def _by_name(self, model_tags: ModelTags) -> dict[str, Mapping]:
        """Return the model's tags by name, spelled as in the book and only those of the book if `own_tags_only`."""
        found: dict[str, Mapping] = {}
        for tag in model_tags.tags:
            name = self._spelling.get(normalize_tag(tag["tag"])) if self.own_tags_only else tag["tag"]
            if name is not None and (name not in found or tag["score"] > found[name]["score"]):
                found[name] = tag
        return found

    def _features(self, model_tags: ModelTags, candidates: BookCandidates) -> tuple[list[str], np.ndarray]:
        """Return the tags of the model and of the neighbours, and the features of each, `[tags, NUM_FEATURES]`."""
        by_model, number = self._by_name(model_tags), len(candidates.tags)
        tags = list(dict.fromkeys([*candidates.tags, *by_model]))
        features = np.zeros((len(tags), NUM_FEATURES))
        generated = np.array([by_model[tag]["slot_score"] if tag in by_model else 0.0 for tag in tags])
        features[:, fusion.IS_NOVEL] = ~model_tags.has_class(tags)
        features[:, fusion.IS_GENERATED] = generated > 0
        features[:, fusion.SLOT_LOGIT] = logit(np.clip(generated, MIN_PROBABILITY, 1 - MIN_PROBABILITY))
        features[:, fusion.CLASSIFIER_LOGIT] = model_tags.logits_of(tags, NO_CLASS)
        pointers = np.zeros(len(tags))
        if candidates.pointers is not None:
            pointers[:number] = candidates.pointers
        features[:, fusion.POINTER_LOGIT] = logit(np.clip(pointers, MIN_PROBABILITY, 1 - MIN_PROBABILITY))
        features[:number, fusion.IN_BOOK] = 1.0
        features[:, fusion.EVIDENCE : -1] = NO_EVIDENCE
        features[:number, fusion.EVIDENCE : -1] = candidates.evidence
        features[:, -1] = np.log([max(self.tag_counts[tag], 1) for tag in tags])
        return tags, features

    def search(
        self,
        queries: BookQueries,
        num_neighbours: int | None = None,
        excluded_groups: Sequence[str] | None = None,
    ) -> Neighbours:
        """Find the nearest examples of each query by each source, and compare them by all sources.

        Args:
            queries: The examples to look up.
            num_neighbours: Number of examples per source; by default that of the book.
            excluded_groups: For each query, the group whose examples are left out.
        """
        num_neighbours = self.num_neighbours if num_neighbours is None else num_neighbours
        queries.check_widths(self.vectors, len(self.normalize.image_mean))
        vectors = {name: rows.float() for name, rows in self.normalize(queries).items()}
        excluded = torch.full((len(queries),), -1)
        if excluded_groups is not None:
            excluded = torch.tensor([self._groups.number_of(group) for group in excluded_groups])
        by_source = [
            self._searches[name](vectors[name], num_neighbours, excluded, self._groups) for name in VECTOR_SOURCES
        ]
        by_words = self._search_words(queries.titles, num_neighbours, excluded)
        by_source.append([list(found) for found in by_words])
        rows = [dict.fromkeys(row for found in by_source for row in found[query]) for query in range(len(queries))]
        padded = np.full((len(queries), max(1, *map(len, rows))), -1)
        for query, found in enumerate(rows):
            padded[query, : len(found)] = list(found)
        return self._compare(vectors, padded, by_words)

    def _search_words(self, titles: Sequence[str], wanted: int, excluded: torch.Tensor) -> list[dict[int, float]]:
        """Return the rows of the titles most similar to each title, with their similarities."""
        if self._words is None:
            return [{} for _ in titles]
        groups = excluded.tolist()
        hidden = [None if group < 0 else (self._groups.numbers == group).numpy() for group in groups]
        return [self._words.search(title, wanted, rows) for title, rows in zip(titles, hidden, strict=True)]

    def candidates(self, neighbours: Neighbours) -> list[BookCandidates]:
        """For each query, return the neighbours' tags with the largest mean votes."""
        votes = TagVotes(self._tag_table, neighbours)
        evidence = votes.evidence(neighbours.votes(self.temperatures), neighbours.similarities)
        found = []
        for query, rows in enumerate(neighbours.rows.tolist()):
            entries = votes.most_voted(query, self.num_candidates)
            with_tag = [
                [self._name(rows[column]) | {"score": vote} for column, vote in votes.neighbours_with_tag(entry)]
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
        model_tags: Sequence[ModelTags] | None = None,
        *,
        excluded_groups: Sequence[str] | None = None,
        reader: ModelTagReader | None = None,
        metric: str = "micro_f1",
    ) -> dict[str, float] | None:
        """Fit the temperatures of the votes, the fusion with the model, its logit adjustment and the threshold.

        Args:
            queries: Validation examples, or examples of the book itself with `excluded_groups`.
            references: Their tags.
            model_tags: Tags of the model for them. Without them, the book is fitted alone.
            excluded_groups: See [`search`].
            reader: Reader of the model, if the model reads the candidates.
            metric: The metric to maximise, as in [`parse_metric`].

        Returns:
            The metrics with the fitted settings. `None` if there are fewer than `MIN_FIT_EXAMPLES` examples, or if no
            or every tag of the neighbours is correct; the score and the threshold are then unchanged.
        """
        if model_tags is None:
            model_tags, reader = [ModelTags()] * len(references), None
        neighbours = self.search(queries, excluded_groups=excluded_groups)
        if len(queries) < MIN_FIT_EXAMPLES or not self._fit_temperatures(neighbours, references):
            return None
        found, features, is_correct = self._fit_rows(model_tags, self.candidates(neighbours), references, reader)
        if is_correct.all() or is_correct[features[:, fusion.IN_BOOK].astype(bool)].all():
            return None
        score, parts = fusion.BookScore(NUM_FEATURES), [(features, is_correct)]
        if any(tags.tags for tags in model_tags) and len(self) >= MIN_FIT_EXAMPLES / PART_RATIO:
            # Without such examples, the score of a tag without neighbours would depend on the size of the book.
            some = range(0, len(queries), PART_STEP)
            groups = None if excluded_groups is None else [excluded_groups[row] for row in some]
            part = self._random_part(PART_RATIO)
            candidates = part.candidates(part.search(queries.select(some), excluded_groups=groups))
            own = [model_tags[row] for row in some]
            parts.append(part._fit_rows(own, candidates, [references[row] for row in some], reader)[1:])
        features, is_correct = map(np.concatenate, zip(*parts, strict=True))
        score.fit(features, is_correct)
        evaluator = TagEvaluator(references, self.tag_counts)
        fits = []
        for adjustment in ADJUSTMENTS:
            adjusted = score.adjusted(features, is_correct, adjustment)
            scored = [[{"tag": t, "score": s} for t, s in zip(tags, adjusted(rows).tolist())] for tags, rows in found]
            threshold, metrics = evaluator.best_threshold(scored, metric)
            fits.append((metric_rank(metrics, metric), adjusted, threshold, metrics))
        _, self.score, self.threshold, metrics = max(fits, key=lambda fit: fit[0])
        return metrics

    def _fit_rows(
        self,
        model_tags: Sequence[ModelTags],
        candidates: Sequence[BookCandidates],
        references: Sequence[Sequence[str]],
        reader: ModelTagReader | None,
    ) -> tuple[list[tuple[list[str], np.ndarray]], np.ndarray, np.ndarray]:
        """Return tags and features of each example, and features and correctness of all their tags."""
        if reader is not None:
            reader.point(model_tags, candidates)
        found = [self._features(tags, own) for tags, own in zip(model_tags, candidates, strict=True)]
        wanted = list(map(set, references))
        is_correct = [tag in own for (tags, _), own in zip(found, wanted, strict=True) for tag in tags]
        return found, np.concatenate([rows for _, rows in found]), np.array(is_correct)

    def _random_part(self, ratio: float) -> "TagBook":
        """Return a book with some of the examples and the same settings."""
        rows = np.sort(np.random.default_rng(0).permutation(len(self))[: round(ratio * len(self))])
        part = copy.copy(self)
        part.replace_examples(self.examples.select(rows), {name: own[rows] for name, own in self.vectors.items()})
        return part

    def _fit_temperatures(self, neighbours: Neighbours, references: Sequence[Sequence[str]]) -> bool:
        """Choose temperatures by maximum likelihood, and return whether any neighbour has a correct tag."""
        votes = TagVotes(self._tag_table, neighbours)
        wanted = [set(tags) for tags in references]
        is_correct = np.array([self.tags[tag] in wanted[query] for query, tag in zip(votes.query, votes.tag)])
        if not is_correct.any():
            return False
        for index, name in enumerate(SOURCES):
            losses = {}
            for temperature in TEMPERATURES:
                of_source = neighbours.votes({**self.temperatures, name: temperature})[..., index]
                losses[temperature] = -np.log(votes.totals(of_source)[is_correct] + fusion.MIN_VOTE).mean()
            self.temperatures[name] = min(losses, key=losses.get)
        return True

    def replace_examples(self, examples: Dataset, vectors: Mapping[str, torch.Tensor]) -> None:
        """Replace all examples, and keep the reduction of image features.

        Args:
            examples: Rows with `COLUMNS`.
            vectors: Their vectors, from `normalize` or from `vectors`.

        Raises:
            ValueError: As in the constructor. The book is then unchanged.
        """
        check_examples(examples, len(vectors[VECTOR_SOURCES[0]]))
        self.vectors, self.clusters = dict(vectors), {}
        self._replace_examples(with_state(examples))

    def fit_to_itself(
        self,
        queries: BookQueries,
        rows: Sequence[int],
        model_tags: Sequence[ModelTags] | None = None,
        reader: ModelTagReader | None = None,
    ) -> dict[str, float] | None:
        """Fit the book to some of its own examples, with neighbours only from other groups. See [`fit`].

        Args:
            queries: Vectors and titles of the examples to fit to.
            rows: Their rows in the book.
            model_tags: Tags of the model for them.
            reader: See [`fit`].
        """
        chosen = self.examples.select(rows)
        return self.fit(queries, chosen["tags"][:], model_tags, excluded_groups=chosen["group"][:], reader=reader)

    def add_examples(self, examples: Dataset, queries: BookQueries) -> None:
        """Add examples. Their tags can be suggested immediately.

        Args:
            examples: Rows with `COLUMNS`.
            queries: Their vectors and titles.

        Raises:
            ValueError: As in the constructor, or the vectors are of another model. The book is then unchanged.
        """
        check_examples(examples, len(queries))
        queries.check_widths(self.vectors, len(self.normalize.image_mean))
        merged = concatenate_datasets([self.examples, with_state(examples)])
        check_examples(merged, len(self) + len(queries))
        added = self.normalize(queries)
        self.vectors = {name: torch.cat([self.vectors[name], added[name]]) for name in VECTOR_SOURCES}
        self.clusters = {name: clusters.extended(added[name]) for name, clusters in self.clusters.items()}
        self._replace_examples(merged)

    def remove_examples(self, ids: Sequence[str]) -> None:
        """Remove examples.

        Raises:
            ValueError: An id is not in the book, or no example would be left. The book is then unchanged.
        """
        if isinstance(ids, str):
            raise ValueError(f"The ids must be a list; got the text {ids!r}.")
        removed = set(ids)
        if unknown := removed - set(self._ids):
            raise ValueError(f"The id {sorted(unknown)[0]!r} is not in the book.")
        kept = [row for row, name in enumerate(self._ids) if name not in removed]
        if not kept:
            raise ValueError("All examples would be removed; a book needs at least one.")
        self.vectors = {name: vectors[kept] for name, vectors in self.vectors.items()}
        self.clusters = {name: clusters.select(kept) for name, clusters in self.clusters.items()}
        self._replace_examples(self.examples.select(kept))

    def _compare(
        self, vectors: Mapping[str, torch.Tensor], rows: np.ndarray, by_words: Sequence[Mapping[int, float]]
    ) -> Neighbours:
        # NumPy is faster than PyTorch for few vectors.
        similarities = np.zeros((*rows.shape, len(SOURCES)), dtype=np.float32)
        is_comparable = np.zeros(similarities.shape, dtype=bool)
        for index, name in enumerate(VECTOR_SOURCES):
            own, wanted = self.vectors[name].numpy()[rows.clip(min=0)], vectors[name].numpy()
            similarities[..., index] = (own.astype(np.float32) @ wanted[..., None])[..., 0]
            is_comparable[..., index] = own.any(axis=-1) & wanted.any(axis=-1)[:, None]
        for query, found in enumerate(by_words):
            if found:
                similarities[query, :, -1] = [found.get(row, 0.0) for row in rows[query].tolist()]
                is_comparable[query, :, -1] = True
        is_comparable &= (rows >= 0)[..., None]
        return Neighbours(rows, similarities * is_comparable, is_comparable)

    def _replace_examples(self, examples: Dataset) -> None:
        self.examples = examples
        # Cached properties are in `__dict__`.
        for name, member in vars(type(self)).items():
            if isinstance(member, cached_property):
                self.__dict__.pop(name, None)
