"""Measures a book of 3,000,000 synthetic examples: time, memory, and how often the search finds the nearest examples.

    python benchmarks/book_scale.py --output results/book/scale.json

Each example belongs to one of many concepts, which decides its vectors, up to noise, its title and most of its tags.
The vectors have the widths of `optsg-icon-small`. They are drawn at random, so the time of the towers is not included.
Recall@20 is the ratio of the 20 most similar vectors, by exact comparison in 32 bits, that the search finds.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F

from modeling_optsg.book import BookQueries, TagBook, load_book, save_book
from modeling_optsg.book.tag_book import NUM_NEIGHBOURS
from modeling_optsg.book.votes import VECTOR_SOURCES
from modeling_optsg.evaluation.reporting import environment

WIDTHS = {"image": 256, "title": 384, "joint": 256}
# Independent directions in which the vectors of a source vary.
LATENT_SIZE = 48
EXAMPLES_PER_CONCEPT = 60
NUM_WORDS, NUM_TAGS = 100_000, 100_000
CONCEPT_WORDS, CONCEPT_TAGS, OTHER_TAGS = 2, 5, 2
# Words in many titles, such as "outline".
COMMON_WORDS = ("outline", "filled", "round", "sharp", "small", "large", "left", "right", "alt", "new")
BLOCK = 50_000
NUM_QUERIES = 500


class SyntheticExamples:
    """Draws examples.

    Args:
        num_concepts: Number of concepts.
        seed: Seed of the random numbers.
    """

    def __init__(self, num_concepts: int, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_concepts = num_concepts
        self.latents = {name: torch.randn(num_concepts, LATENT_SIZE, generator=self.generator) for name in WIDTHS}
        self.projections = {
            name: torch.randn(LATENT_SIZE, width, generator=self.generator) / LATENT_SIZE**0.5
            for name, width in WIDTHS.items()
        }
        self.words = self._zipf(NUM_WORDS, (num_concepts, CONCEPT_WORDS))
        self.tags = self._zipf(NUM_TAGS, (num_concepts, CONCEPT_TAGS))

    def draw(self, number: int, prefix: str) -> tuple[Dataset, BookQueries]:
        """Draw examples, and their vectors and titles."""
        concepts = self.random.integers(0, self.num_concepts, number)
        vectors = {name: torch.empty(number, width, dtype=torch.half) for name, width in WIDTHS.items()}
        for name, rows in vectors.items():
            for start in range(0, number, BLOCK):
                latents = self.latents[name][concepts[start : start + BLOCK]]
                latents = latents + 0.6 * torch.randn(latents.shape, generator=self.generator)
                block = latents @ self.projections[name]
                block += 0.3 * torch.randn(block.shape, generator=self.generator)
                rows[start : start + BLOCK] = F.normalize(block, dim=-1)
        common = self.random.integers(0, len(COMMON_WORDS), number)
        words = zip(self.words[concepts].tolist(), common.tolist(), strict=True)
        titles = [" ".join([*(f"word{word}" for word in own), COMMON_WORDS[other]]) for own, other in words]
        tags = np.concatenate([self.tags[concepts], self._zipf(NUM_TAGS, (number, OTHER_TAGS))], axis=1)
        columns = {
            "id": [f"{prefix}{row}" for row in range(number)],
            "title": titles,
            "tags": [[f"tag{tag}" for tag in own] for own in tags.tolist()],
            "group": list(map(str, concepts.tolist())),
        }
        return Dataset.from_dict(columns), BookQueries(vectors, titles)

    def _zipf(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """Draw numbers below `number`, where the probability of n is proportional to 1 / (n + 1)."""
        return (np.exp(self.random.random(shape) * np.log(number + 1)) - 1).astype(np.int64).clip(0, number - 1)


def exact_neighbours(vectors: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return the similarities of the most similar vectors, `[queries, NUM_NEIGHBOURS]`, the largest first."""
    best = torch.full((len(queries), NUM_NEIGHBOURS), -torch.inf)
    for block in vectors.split(BLOCK):
        best = torch.cat([best, queries @ block.float().T], dim=1).topk(NUM_NEIGHBOURS, dim=1).values
    return best


def measure_recall(book: TagBook, queries: BookQueries) -> dict[str, float]:
    """Return the recall@20 of each source, in percent."""
    no_groups = torch.full((len(queries),), -1)
    recall = {}
    for name, vectors in book.normalize(queries).items():
        vectors = vectors.float()
        # Equally similar vectors count as the same.
        smallest = exact_neighbours(book.vectors[name], vectors)[:, -1] - 1e-6
        found = book._searches[name](vectors, NUM_NEIGHBOURS, no_groups, book._groups)
        hits = [
            int((book.vectors[name][rows].float() @ query >= limit).sum())
            for rows, query, limit in zip(found, vectors, smallest, strict=True)
        ]
        recall[name] = 100 * sum(hits) / (NUM_NEIGHBOURS * len(queries))
    return recall


def measure_latency(book: TagBook, queries: BookQueries) -> dict[str, float]:
    """Return the milliseconds of a whole look-up with one example, and for each of a batch of 50."""
    singles = [queries.select([row]) for row in range(len(queries))]
    book.look_up(singles[0])
    seconds = [timed(lambda: book.look_up(single))[0] for single in singles]  # noqa: B023
    batch = queries.select(range(50))
    batch_seconds = [timed(lambda: book.look_up(batch))[0] / 50 for _ in range(5)]
    return {
        "milliseconds": 1000 * float(np.median(seconds)),
        "milliseconds_95th_percentile": 1000 * float(np.percentile(seconds, 95)),
        "milliseconds_in_batches": 1000 * float(np.median(batch_seconds)),
    }


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Call a function, and return the seconds that it took and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def memory_gigabytes() -> float:
    """Return the memory that this process uses now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 1e9


def main() -> None:
    """Build, search, save and load the book, and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=3_000_000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    synthetic = SyntheticExamples(max(1, arguments.examples // EXAMPLES_PER_CONCEPT))
    examples, vectors = synthetic.draw(arguments.examples, "book")
    _, queries = synthetic.draw(NUM_QUERIES, "query")
    result: dict[str, Any] = {"examples": arguments.examples}
    seconds = {}
    started = time.perf_counter()
    book = TagBook(examples, vectors, "synthetic")
    seconds["normalise the vectors"] = time.perf_counter() - started
    del vectors, examples
    seconds["compute the clusters"], _ = timed(book.make_clusters)
    # The first look-up makes the FAISS indices and the index of the title words.
    seconds["first look-up"], _ = timed(lambda: book.look_up(queries.select([0])))
    result |= measure_latency(book, queries)
    result["recall_at_20_percent"] = measure_recall(book, queries)
    result["memory_gigabytes"] = memory_gigabytes()
    result["peak_memory_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    result["clusters"] = {name: len(clusters.centroids) for name, clusters in book.clusters.items()}
    with tempfile.TemporaryDirectory() as folder:
        seconds["save"], _ = timed(lambda: save_book(book, folder))
        result["files_gigabytes"] = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e9
        tags = [found.tags for found in book.look_up(queries)]
        del book
        seconds["load"], book = timed(lambda: load_book(folder))
        seconds["first look-up after loading"], _ = timed(lambda: book.look_up(queries.select([0])))
        result["same_tags_after_loading"] = tags == [found.tags for found in book.look_up(queries)]
    result |= {"seconds": {name: round(value, 1) for name, value in seconds.items()}, "seed": 0}
    result |= {"sources": list(VECTOR_SOURCES), "num_neighbours": NUM_NEIGHBOURS} | environment()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
