r"""Measures how much a book of the training examples, and a book reader, improve trained models.

    python -m experiments.icon_tagging.tag_book --checkpoints checkpoints/optsg-icon-small \
        --output experiments/icon_tagging/results/tag_book.json

For each checkpoint, a book is made from the training examples, and a book reader is trained on them. The fusion of
both with the model is fitted on the validation split, for each metric of `--metrics`. The test split is scored with
these settings. Rows:

- `model`: the model without a book. Only its threshold is fitted.
- `book`: the book without the model.
- `model and book`: late fusion of both, without a reader.
- `op-tsg-open-book`: the same with the pointers of the reader.
- `op-tsg-open-book, sequential`: the same with sequential decoding. All other rows have parallel decoding.
- `op-tsg-open-book, RATIO of the book`: the same with a random part of the book. Nothing is fitted again.

With `--ablations`, only the validation split is scored, and the rows are `model`, `model and book`, `op-tsg-open-book`
and:

- `model and book, only SOURCE`;
- `op-tsg-open-book, N neighbours`;
- `reader without evidence`: a reader that is trained without the evidence of the candidates.

Checkpoints are not changed. Checkpoints that are already in the output file are skipped.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from dataset_scripts.icon_tagging.splits import split_key
from experiments.icon_tagging.runs import F1_METRICS, Benchmark, Run, make_parser, write_result
from modeling_optsg.book import (
    BookQueries,
    ModelTagReader,
    ModelTags,
    TagBook,
    embed_examples,
    encoder_fingerprint,
)
from modeling_optsg.book.votes import SOURCES, VECTOR_SOURCES
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.reporting import environment, novel_hits
from modeling_optsg.training.book_reader_training import train_book_reader

METRICS = (*F1_METRICS, "tags_per_example")
OPERATING_POINTS = ("full_f1@micro_f1>=52", "full_f1+micro_f1")
NUM_NEIGHBOURS, NUM_CANDIDATES = 40, 100
OTHER_NEIGHBOURS = (5, 10, 20)
BOOK_RATIOS = (0.5, 0.1)
SPLITS = ("train", "validation", "test")
# The fit that the temperatures of the votes come from. They do not depend on the metric.
TEMPERATURE_METRIC = "micro_f1"


class BookExperiment:
    """A run, the book of its training examples, and the tags of its model for the other splits.

    Args:
        run: The trained run.
        benchmark: The dataset.
        splits: The splits to read.
    """

    def __init__(self, run: Run, benchmark: Benchmark, splits: Sequence[str] = SPLITS):
        self.run, self.benchmark = run, benchmark
        model, processor = run.model, run.processor
        self.read_outputs = ModelTagReader(model, processor)
        self.queries, self.model_tags = {}, {}
        for split in splits:
            rows = benchmark.splits[split]
            features = self.features(rows)
            if split == "train":
                self.train_features = features
                self.queries[split] = embed_examples(model, processor, features)
                continue
            self.queries[split], self.model_tags[split] = self.read(features, rows, "parallel")
        self.examples = book_examples(benchmark.splits["train"])
        self.fingerprint = encoder_fingerprint(model, processor)

    def features(self, rows: Dataset) -> CachedFeatures:
        """Return rows with the tower features of the model."""
        cache = self.benchmark.cache_dir / "features"
        return CachedFeatures(cache_tower_features(rows, self.run.model.model, self.run.processor, cache))

    def read(self, features: CachedFeatures, rows: Dataset, decoding: str) -> tuple[BookQueries, list[ModelTags]]:
        """Return the queries of rows and the model's tags."""
        return self.read_outputs.read_examples(features, rows["title"][:], progress=False, decoding=decoding)

    def score_sequential(self, metrics: Sequence[str]) -> dict[str, dict]:
        """Return the metrics with sequential decoding at each operating point."""
        parallel = self.model_tags
        try:
            splits = {split: self.benchmark.splits[split] for split in parallel}
            self.model_tags = {
                split: self.read(self.features(rows), rows, "sequential")[1] for split, rows in splits.items()
            }
            return {metric: self._score_book(metric) for metric in metrics}
        finally:
            self.model_tags = parallel

    def train_reader(self, with_evidence: bool = True) -> dict:
        """Train a new book reader, and return what [`train_book_reader`] does."""
        book, _ = self.fit_book(TEMPERATURE_METRIC, self.queries, with_reader=False)
        seed = self.run.arguments["seed"]
        model, processor, queries = self.run.model, self.run.processor, self.queries["train"]
        return train_book_reader(
            model, processor, book, queries, self.train_features, seed=seed, with_evidence=with_evidence
        )

    def score(self, metric: str) -> dict[str, dict]:
        """Return the metrics of the rows with the current reader at one operating point."""
        model = {"validation": self._fit_threshold(metric)}
        threshold = model["validation"].pop("threshold")
        kept = [[tag for tag in own.tags if tag["score"] >= threshold] for own in self.model_tags["test"]]
        rows = {"model": model | self._score_on_test(kept)}
        rows["book"] = self._score_book(metric, with_model=False, with_reader=False)
        rows["model and book"] = self._score_book(metric, with_reader=False)
        rows["op-tsg-open-book"] = self._score_book(metric)
        return rows | self._score_parts(metric)

    def score_ablations(self, metric: str) -> dict[str, dict]:
        """Return the validation metrics with each source alone and with other numbers of neighbours."""
        model = self._fit_threshold(metric)
        del model["threshold"]
        rows = {"model": {"validation": model}}
        for name, with_reader in (("model and book", False), ("op-tsg-open-book", True)):
            rows[name] = {"validation": self.fit_book(metric, self.queries, with_reader=with_reader)[1]}
        for name in SOURCES:
            queries = {split: only(name, queries) for split, queries in self.queries.items()}
            fitted = self.fit_book(metric, queries, with_reader=False)[1]
            rows[f"model and book, only {name}"] = {"validation": fitted}
        for number in OTHER_NEIGHBOURS:
            fitted = self.fit_book(metric, self.queries, num_neighbours=number)[1]
            rows[f"op-tsg-open-book, {number} neighbours"] = {"validation": fitted}
        return rows

    def score_without_evidence(self, metrics: Sequence[str]) -> dict[str, dict]:
        """Train a reader without evidence, and return its validation metrics at each operating point."""
        self.train_reader(with_evidence=False)
        return {metric: {"validation": self.fit_book(metric, self.queries)[1]} for metric in metrics}

    def _fit_threshold(self, metric: str) -> dict:
        threshold, metrics = self.benchmark.evaluator("validation").best_threshold(
            [own.tags for own in self.model_tags["validation"]], metric
        )
        return {"threshold": threshold} | _select(metrics)

    def fit_book(
        self,
        metric: str,
        queries: dict[str, BookQueries],
        with_model: bool = True,
        with_reader: bool = True,
        num_neighbours: int = NUM_NEIGHBOURS,
    ) -> tuple[TagBook, dict]:
        """Make a book of the training examples and fit it on the validation split.

        Args:
            metric: The metric to maximise.
            queries: Queries of all splits.
            with_model: Whether to fuse the book with the tags of the model.
            with_reader: Whether to read the pointers of the model's reader.
            num_neighbours: Number of similar examples per source.

        Returns:
            The book, and its metrics on the validation split.
        """
        book = TagBook(self.examples, queries["train"], self.fingerprint, num_neighbours, NUM_CANDIDATES)
        references = self.benchmark.splits["validation"]["tags"][:]
        model_tags = self.model_tags["validation"] if with_model else None
        reader = self.read_outputs if with_reader else None
        metrics = book.fit(queries["validation"], references, model_tags, reader=reader, metric=metric)
        return book, _select(metrics)

    def _score_book(self, metric: str, with_model: bool = True, with_reader: bool = True) -> dict[str, dict]:
        book, validation = self.fit_book(metric, self.queries, with_model, with_reader)
        kept = self.predict_test(book, with_model, with_reader)
        settings = {"temperatures": book.temperatures, "threshold": book.threshold, "score": book.score.to_dict()}
        scores = self._score_on_test(kept)
        if not with_model:
            # Without a model, no tag has a class.
            del scores["novel"]
        return {"settings": settings, "validation": validation} | scores

    def predict_test(self, book: TagBook, with_model: bool = True, with_reader: bool = True) -> list[list[dict]]:
        """Return the tags of the test examples above the threshold of a book. See [`fit_book`]."""
        found = book.look_up(self.queries["test"])
        model_tags = self.model_tags["test"] if with_model else [ModelTags()] * len(found)
        if with_reader:
            self.read_outputs.point(model_tags, found)
        fused = [book.predict(tags, own) for tags, own in zip(model_tags, found, strict=True)]
        return [[tag for tag in tags if tag["score"] >= book.threshold] for tags in fused]

    def _score_parts(self, metric: str) -> dict[str, dict]:
        """Return the metrics with random parts of the book, and the settings of the whole book."""
        book, _ = self.fit_book(metric, self.queries)
        ids = np.random.default_rng(0).permutation(book.examples["id"][:]).tolist()
        rows = {}
        for ratio in BOOK_RATIOS:
            kept = round(ratio * len(ids))
            book.remove_examples(ids[kept : len(book)])
            rows[f"op-tsg-open-book, {ratio} of the book"] = self._score_on_test(self.predict_test(book))
        return rows

    def _score_on_test(self, kept: Sequence[Sequence[dict]]) -> dict[str, dict]:
        references = self.benchmark.splits["test"]["tags"]
        return {
            "test": _select(self.benchmark.evaluator("test").score(kept)),
            "novel": novel_hits(kept, references),
        }


def book_examples(rows: Dataset) -> Dataset:
    """Return the columns of a book for rows of the dataset."""
    titles = rows["title"][:]
    columns = {"id": rows["id"][:], "title": titles, "tags": rows["tags"][:]}
    return Dataset.from_dict(columns | {"group": list(map(split_key, titles))})


def only(source: str, queries: BookQueries) -> BookQueries:
    """Return queries with only one source."""
    vectors = {
        name: queries.vectors[name] if name == source else torch.zeros_like(queries.vectors[name])
        for name in VECTOR_SOURCES
    }
    return BookQueries(vectors, queries.titles if source == "words" else [""] * len(queries))


def _select(metrics: dict) -> dict:
    return {name: metrics[name] for name in METRICS}


def main(argv: Sequence[str] | None = None) -> None:
    """Score the given checkpoints and add the results to the output file."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--checkpoints", type=Path, nargs="+", required=True, help="output folders of examples/train.py"
    )
    parser.add_argument("--metrics", nargs="+", default=OPERATING_POINTS, help="validation metrics to maximise")
    parser.add_argument("--ablations", action="store_true", help="measure the ablations instead")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    benchmark = Benchmark(arguments.dataset, arguments.cache_dir)
    output = arguments.output
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if output.exists() else {}
    for folder in arguments.checkpoints:
        if folder.name in runs:
            continue
        splits = SPLITS[:2] if arguments.ablations else SPLITS
        experiment = BookExperiment(Run.load(folder), benchmark, splits)
        run = {"reader": experiment.train_reader()}
        if arguments.ablations:
            run |= {metric: experiment.score_ablations(metric) for metric in arguments.metrics}
            name, rows = "reader without evidence", experiment.score_without_evidence(arguments.metrics)
        else:
            run |= {metric: experiment.score(metric) for metric in arguments.metrics}
            name, rows = "op-tsg-open-book, sequential", experiment.score_sequential(arguments.metrics)
        for metric, row in rows.items():
            run[metric][name] = row
        runs[folder.name] = run
        write_result({"runs": runs} | environment(), output)
        for metric in arguments.metrics:
            for name, row in run[metric].items():
                print(
                    folder.name,
                    metric,
                    name,
                    json.dumps(row["test"] if "test" in row else row["validation"], allow_nan=False),
                )


if __name__ == "__main__":
    main()
