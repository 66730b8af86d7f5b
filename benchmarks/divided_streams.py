r"""Measure how fast a process reads its examples from its own stream shards, and from the whole stream.

    python benchmarks/divided_streams.py --output results/training/divided_streams.json

The examples are synthetic: a title, seven tags and as many random bytes as a small image or the features of a video
have, in local Parquet files. Nothing is decoded. Rates are medians over rounds in which both cases take turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from dataset_scripts import load_tagging_dataset
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.training import StreamBatches, TaggedStream, open_stream_shards

FILES, EXAMPLES, BYTES, TAGS = 32, 16_000, 20_000, 5000
BATCH, ROUNDS = 512, 3
PROCESSES = (2, 4, 8, 16)
FEATURES = {
    "id": Value("string"),
    "title": Value("string"),
    "tags": List(Value("string")),
    "image": Image(decode=False),
}


def make(folder: Path) -> None:
    """Write the examples to Parquet files."""
    random, many = np.random.default_rng(0), EXAMPLES // FILES
    for file in range(FILES):
        rows = [
            {
                "id": f"v{file * many + row}",
                "title": f"title {row}",
                "tags": [f"tag {tag}" for tag in random.integers(TAGS, size=7)],
                "image": {"bytes": random.bytes(BYTES), "path": None},
            }
            for row in range(many)
        ]
        path = folder / f"train-{file:05d}-of-{FILES:05d}.parquet"
        Dataset.from_list(rows, features=Features(FEATURES)).to_parquet(path, batch_size=100)


def rate(stream: TaggedStream, processes: int, shards: list[int] | None) -> float:
    """Return how many of its own examples the first process reads per second, over an epoch.

    Args:
        stream: The stream.
        processes: Number of processes.
        shards: Stream shards of the process; `None` to read the whole stream.
    """
    steps = len(stream) // BATCH
    batches = StreamBatches(stream, BATCH, steps, 0, num_processes=processes, stream_shards=shards)
    began = time.perf_counter()
    examples = sum(len(batch) for batch in batches)
    return examples / (time.perf_counter() - began)


def main() -> None:
    """Measure both cases for each number of processes and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        began = time.perf_counter()
        rows, texts = (
            load_tagging_dataset(folder, split="train", streaming=True, texts_only=only) for only in (False, True)
        )
        shards, known = open_stream_shards(rows, texts, 16, str(folder))
        seconds = time.perf_counter() - began
        count = Counter(known["stream_shard"])
        tags = {tag for own in known["tags"] for tag in own}
        stream = TaggedStream(shards, tags, [count[shard] for shard in range(len(shards))])
        found = {}
        for processes in PROCESSES:
            assigned, _, _ = stream.assign_shards(BATCH, processes, None)
            cases = {"divided": assigned[0], "whole": None}
            rates = {case: [] for case in cases}
            for _ in range(ROUNDS):
                for case, own in cases.items():
                    rates[case].append(rate(stream, processes, own))
            rates = {case: round(statistics.median(own)) for case, own in rates.items()}
            found[f"{processes} processes"] = rates | {"ratio": round(rates["divided"] / rates["whole"], 2)}
            print(found, flush=True)
    result = {
        "examples": EXAMPLES,
        "bytes_per_example": BYTES,
        "files": FILES,
        "seconds_until_texts_are_read": round(seconds, 2),
    }
    result |= {"examples_per_second_of_a_process": found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
