r"""Measures what it saves that processes divide the reading of a stream among them: examples a second that one of so many
processes gets, of shards of its own and of the whole stream, of which it keeps its share.

    python benchmarks/divided_streams.py --output results/training/divided_streams.json

Examples are made up: a title, seven tags and so many random bytes, as those of a small image or a video's features, in
Parquet files on this disk. Nothing is decoded. Rates are medians over turns in which both ways follow one another.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from score import environment  # noqa: E402

from dataset_scripts import load_tagging_dataset
from modeling_optsg.training import StreamBatches, TaggedStream, open_shards

FILES, EXAMPLES, BYTES, TAGS = 32, 16_000, 20_000, 5000
BATCH, TURNS = 512, 3
PROCESSES = (2, 4, 8, 16)
FEATURES = {
    "id": Value("string"),
    "title": Value("string"),
    "tags": List(Value("string")),
    "image": Image(decode=False),
}


def make(folder: Path) -> None:
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


def rate(stream: TaggedStream, process: int, processes: int, shards: list[int] | None) -> float:
    """Examples a second of its own that a process gets, from the first on, in an epoch."""
    steps = len(stream) // BATCH
    batches = StreamBatches(stream, BATCH, steps, 0, process=process, num_processes=processes, shards=shards)
    began = time.perf_counter()
    examples = sum(len(batch) for batch in batches)
    return examples / (time.perf_counter() - began)


def main() -> None:
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
        shards, known = open_shards(rows, texts, 16, str(folder))
        seconds = time.perf_counter() - began
        count = Counter(known["shard"])
        tags = {tag for own in known["tags"] for tag in own}
        stream = TaggedStream(shards, tags, [count[shard] for shard in range(len(shards))])
        found = {}
        for processes in PROCESSES:
            shares, _, _ = stream.divide(BATCH, processes, None)
            ways = {"divided": shares[0], "whole": None}
            rates = {way: [] for way in ways}
            for _ in range(TURNS):
                for way, own in ways.items():
                    rates[way].append(rate(stream, 0, processes, own))
            rates = {way: round(statistics.median(own)) for way, own in rates.items()}
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
    arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
