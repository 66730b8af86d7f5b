r"""Measure time and memory to build, export, count and stream a dataset of the size of CREATE-3M.

    python benchmarks/create_scale.py --examples 3000000 --output results/create_tagging/scale.json

The examples are synthetic and have CREATE's format. Their tags follow a Zipf distribution over 57,297 tags, the number
in CREATE-3M (Table 3 of the paper's supplement). Each step runs in its own process, to measure its peak memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNIQUE_TAGS = 57_297
TAGS_PER_EXAMPLE = 5


def make(folder: Path, examples: int) -> int:
    """Write the annotation file."""
    import numpy as np

    random = np.random.default_rng(0)
    chances = 1 / np.arange(1, UNIQUE_TAGS + 1)
    tags = [f"标签{number}" for number in range(UNIQUE_TAGS)]
    with (folder / "create_3m_pretrain.json").open("w", encoding="utf-8") as file:
        for start in range(0, examples, 50_000):
            rows = random.choice(
                UNIQUE_TAGS, size=(min(50_000, examples - start), TAGS_PER_EXAMPLE), p=chances / chances.sum()
            )
            for number, row in enumerate(rows.tolist(), start):
                own = {
                    "vid": f"v{number:08d}",
                    "raw_title": f"夏日凉面教程 {number}",
                    "tag": [tags[p] for p in set(row)],
                }
                file.write(("[" if number == 0 else ",\n") + json.dumps(own, ensure_ascii=False, allow_nan=False))
        file.write("]")
    return examples


def read(folder: Path, examples: int) -> int:
    """Read the annotation file."""
    from dataset_scripts.annotation_files import read_annotations

    return sum(1 for _ in read_annotations(folder / "create_3m_pretrain.json"))


def build(folder: Path, examples: int) -> int:
    """Build the dataset."""
    from dataset_scripts import load_tagging_dataset

    settings = {"config_name": "create_3m", "data_dir": str(folder), "cache_dir": str(folder / "cache")}
    return len(load_tagging_dataset("create_tagging", split="train", **settings))


def export(folder: Path, examples: int) -> int:
    """Export the dataset as Parquet files."""
    from optsg import main as optsg

    arguments = ["--config-name", "create_3m", "--data-dir", folder, "--dataset-dir", folder / "cache"]
    if optsg(["export", "create_tagging", str(folder / "parquet"), *map(str, arguments)]):
        raise SystemExit("export failed")
    return examples


def stats(folder: Path, examples: int) -> int:
    """Count examples and tags of the Parquet files."""
    from optsg import main as optsg

    if optsg(["stats", str(folder / "parquet"), "--dataset-dir", str(folder / "stats_cache")]):
        raise SystemExit("stats failed")
    return examples


def iterate(folder: Path, examples: int) -> int:
    """Stream the rows of the Parquet files."""
    from dataset_scripts import load_tagging_dataset

    return sum(1 for _ in load_tagging_dataset(folder / "parquet", split="train", streaming=True))


STEPS = {step.__name__: step for step in (make, read, build, export, stats, iterate)}


def main() -> None:
    """Run all steps and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=3_000_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        started = time.perf_counter()
        done = STEPS[arguments.step](arguments.folder, arguments.examples)
        seconds = time.perf_counter() - started
        # Kilobytes on Linux.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            json.dumps({"examples": done, "seconds": round(seconds, 1), "memory_mib": round(memory)}, allow_nan=False)
        )
        return
    found = {"examples": arguments.examples, "unique_tags": UNIQUE_TAGS, "steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            command = [
                sys.executable,
                __file__,
                "--step",
                step,
                "--folder",
                folder,
                "--examples",
                str(arguments.examples),
            ]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(run.stdout.splitlines()[-1])
            if row["examples"] != arguments.examples:
                raise SystemExit(f"{step} gave {row['examples']} examples of {arguments.examples}.")
            row["examples_per_second"] = round(row.pop("examples") / max(row["seconds"], 0.1))
            found["steps"][step] = row
            print(step, row, flush=True)
    seconds = found["steps"]["build"]["seconds"] + found["steps"]["export"]["seconds"]
    found["json_to_parquet_examples_per_second"] = round(arguments.examples / seconds)
    if arguments.output:
        # Not imported earlier: a process inherits the peak memory of its parent.
        from modeling_optsg.evaluation.reporting import environment

        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps(found | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
