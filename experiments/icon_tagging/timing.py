r"""Measures how long trained models take to tag an example, on one CPU thread in batches of 8.

    python -m experiments.icon_tagging.timing --output experiments/icon_tagging/results/timing.json \
        --checkpoints runs/recipe/op-tsg-seed0 runs/recipe/asy-seed0 runs/recipe/model-f-seed0

The batch size is that of section 4 of the supplement. The models take turns batch by batch, so that other work on the
machine slows all of them, and the median over all batches and rounds counts. Opening and scaling images and tokenising
titles are the same for all models and not timed. Each model is timed twice: with its towers, from pixels and title
tokens to tags, and without them, from tower features to tags. With towers, the time of an open-book model includes
retrieval. With `--image_sizes`, the vision tower of the first model is also timed alone.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from experiments.icon_tagging.runs import Benchmark, Run, make_parser, write_result
from modeling_optsg import OPTSGDataCollator
from modeling_optsg.data.feature_cache import FEATURE_COLUMNS
from modeling_optsg.evaluation.reporting import environment

BATCH_SIZE = 8
INPUT_COLUMNS = (*FEATURE_COLUMNS, "book_input_ids")
WITH_TOWERS, WITHOUT_TOWERS = "seconds_per_example", "seconds_per_example_without_towers"


def time_runs(runs: Iterable[Run], benchmark: Benchmark, num_batches: int = 8, num_rounds: int = 5) -> dict:
    """Measure the time per example of several models on the test split.

    Args:
        runs: The trained runs, no two with the same model type.
        benchmark: Dataset with the test examples.
        num_batches: Number of batches of test examples; the same ones in every round.
        num_rounds: Number of timed rounds, after one warm-up round.

    Returns:
        `batch_size`, `batches`, `rounds`, and `rows`: for each model and decoding the name of its run as `checkpoint`,
        its number of `parameters` and the two median times in seconds.

    Raises:
        ValueError: There are too few test examples, or two runs of the same model type.
    """
    if len(benchmark.splits["test"]) < BATCH_SIZE * num_batches:
        raise ValueError(
            f"{len(benchmark.splits['test'])} test examples are fewer than {num_batches} batches of {BATCH_SIZE}; "
            "give fewer batches."
        )
    rows, calls = {}, {}
    for run in runs:
        examples = benchmark.with_features(benchmark.splits["test"].select(range(BATCH_SIZE * num_batches)), run)
        for row, settings in run.rows().items():
            if row in rows:
                raise ValueError(f"{rows[row]['checkpoint']} and {run.name} are both a {row}; give one of them.")
            rows[row] = {"checkpoint": run.name, "parameters": run.summary["parameters"]}
            for index in range(num_batches):
                batch = range(BATCH_SIZE * index, BATCH_SIZE * (index + 1))
                inputs = _image_inputs(benchmark, run, batch)
                calls.setdefault((row, WITH_TOWERS), []).append(_call_with_towers(run, inputs, settings))
                inputs = _feature_inputs(run, [examples[i] for i in batch])
                calls.setdefault((row, WITHOUT_TOWERS), []).append(_call(run, inputs, settings))
    for (row, name), seconds in _measure(calls, num_rounds).items():
        rows[row][name] = round(statistics.median(seconds) / BATCH_SIZE, 5)
    return {"batch_size": BATCH_SIZE, "batches": num_batches, "rounds": num_rounds, "rows": rows}


def time_vision_tower(run: Run, image_sizes: Sequence[int], num_rounds: int = 5) -> dict[int, float]:
    """Measure the time of a vision tower for several image sizes.

    Args:
        run: The trained run.
        image_sizes: Widths of square images, in pixels.
        num_rounds: Number of timed rounds, after one warm-up round.

    Returns:
        For each size in pixels the median time in seconds per image.
    """
    encode = torch.no_grad()(run.model.model.encode_frames)
    calls = {size: [partial(encode, torch.rand(BATCH_SIZE, 1, 3, size, size))] for size in image_sizes}
    return {
        size: round(statistics.median(seconds) / BATCH_SIZE, 5)
        for size, seconds in _measure(calls, num_rounds).items()
    }


def _image_inputs(benchmark: Benchmark, run: Run, batch: Sequence[int]) -> dict[str, torch.Tensor]:
    rows = benchmark.splits["test"].select(batch)
    column = "image" if "image" in rows.column_names else "video"
    return run.processor(**{f"{column}s": rows[column][:]}, titles=rows["title"][:])


def _feature_inputs(run: Run, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    collate = OPTSGDataCollator(run.processor)
    return collate([{name: row[name] for name in INPUT_COLUMNS if name in row} for row in examples])


def _call(run: Run, inputs: dict[str, torch.Tensor], settings: dict) -> Callable[[], object]:
    return lambda: run.model.generate(**inputs, **settings)


def _call_with_towers(run: Run, inputs: dict[str, torch.Tensor], settings: dict) -> Callable[[], object]:
    if run.book is None:
        return _call(run, inputs, settings)
    return lambda: run.model.generate(**run.book.look_up(run.model, run.processor, **inputs), **settings)


def _measure(calls: dict[object, list[Callable[[], object]]], num_rounds: int) -> dict[object, list[float]]:
    """Time every call once per round, all models with one batch before any with the next."""
    num_batches = len(next(iter(calls.values())))
    seconds = {key: [] for key in calls}
    for round_number in tqdm(range(num_rounds + 1), desc="Timing", leave=False):
        warms_up = round_number == 0
        for index in range(1 if warms_up else num_batches):
            for key, batches in calls.items():
                started = time.perf_counter()
                batches[index]()
                if not warms_up:
                    seconds[key].append(time.perf_counter() - started)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Time the checkpoints of the command line and write the result file."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="folders of examples/train.py")
    parser.add_argument("--num_batches", type=int, default=8, help="batches of 8 test examples")
    parser.add_argument("--num_rounds", type=int, default=5, help="times that every batch is tagged")
    parser.add_argument("--image_sizes", type=int, nargs="+", help="widths of square images for the vision tower")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    benchmark = Benchmark(arguments.dataset, arguments.cache_dir)
    runs = [Run.load(folder) for folder in arguments.checkpoints]
    timing = time_runs(runs, benchmark, arguments.num_batches, arguments.num_rounds)
    if arguments.image_sizes:
        timing["vision_tower"] = time_vision_tower(runs[0], arguments.image_sizes, arguments.num_rounds)
    write_result(timing | environment(), arguments.output)
    for row, entry in timing["rows"].items():
        print(f"{row}: {1000 * entry[WITH_TOWERS]:.1f} ms, {1000 * entry[WITHOUT_TOWERS]:.1f} ms without towers")


if __name__ == "__main__":
    main()
