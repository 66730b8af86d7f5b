r"""Compares the tags of `examples/tag_dataset.py` run with one process, two processes, two Ray workers, and kills.

    python benchmarks/tag_everywhere.py --output results/training/tagging.json

Two of the examples are unreadable. After some shards are finished, all accelerate processes of one run and one Ray
worker of another are killed. The accelerate run is restarted with the same command; Ray replaces its worker.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import small_run
from datasets import load_dataset

from modeling_optsg.evaluation.reporting import environment

PROGRAM = Path(__file__).resolve().parent.parent / "examples" / "tag_dataset.py"
PYTHON = (sys.executable,)
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines")
LAUNCH += ("1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
RAY = ("--ray", "2")
RESTARTED = "two processes, killed and restarted"
WORKER_KILLED = "two Ray workers, one killed"


def prepare(folder: Path, num_examples: int) -> None:
    """Train a small checkpoint and make examples, two of which have features of the wrong width."""
    small_run.make(folder, 120)
    command = small_run.command(folder, folder / "run", num_train_epochs=4, eval_steps=0.99)
    subprocess.run(command, env=small_run.environment(), check=True, capture_output=True)
    small_run.make(folder / "many", num_examples, seed=1)
    path = folder / "many/data/train-00000-of-00001.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder / "hf"))
    unreadable = {num_examples // 3, num_examples // 2}
    rows = rows.map(
        lambda row, index: {"frame_features": [[0.0] * 3] if index in unreadable else row["frame_features"]},
        with_indices=True,
    )
    rows.to_parquet(str(path))


def start(folder: Path, name: str, launcher: tuple[str, ...], *options: str) -> subprocess.Popen:
    """Start the program in a session of its own, so that all its processes can be killed together."""
    command = [*launcher, PROGRAM, "--checkpoint", folder / "run", "--dataset", folder / "many/data"]
    command += ["--dataset_dir", folder / "hf", "--output", folder / name, "--shard_size", 100, "--batch_size", 50]
    log = (folder / f"{name}.log").open("a")
    variables = small_run.environment() | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*map(str, command), *options], env=variables, stdout=log, stderr=log, start_new_session=True
    )


def finish(folder: Path, name: str, process: subprocess.Popen) -> None:
    """Wait for a run, and stop with its log if it failed."""
    if process.wait():
        raise SystemExit(f"{name}: {(folder / f'{name}.log').read_text()[-3000:]}")


def shards(folder: Path, name: str) -> list[Path]:
    """Return the files of a run."""
    return sorted((folder / name).glob("tags-*.parquet"))


def wait_for_shards(folder: Path, name: str, count: int, process: subprocess.Popen) -> None:
    """Wait until a run has finished some shards."""
    while len(shards(folder, name)) < count:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended before it was killed: {(folder / f'{name}.log').read_text()[-2000:]}")
        time.sleep(0.005)


def ray_workers(session: int) -> list[int]:
    """Return the processes of a session that are Ray workers with a model."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode(errors="replace")
            process_session = int((path / "stat").read_text().rsplit(")", 1)[1].split()[3])
        except (OSError, ValueError):
            continue
        if command.startswith("ray::") and "ShardTagger" in command and process_session == session:
            found.append(int(path.name))
    return found


def run_and_kill(folder: Path, with_ray: bool) -> tuple[dict[str, str], dict[str, int | None]]:
    """Kills runs after some shards and lets them finish.

    Returns:
        The folders of the runs by name, and how many shards were finished before the kill.
    """
    folders, finished = {RESTARTED: "killed"}, {}
    process = start(folder, "killed", LAUNCH)
    wait_for_shards(folder, "killed", 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished[RESTARTED] = len(shards(folder, "killed"))
    finish(folder, "killed", start(folder, "killed", LAUNCH))
    if with_ray:
        folders[WORKER_KILLED] = "killed worker"
        process = start(folder, "killed worker", PYTHON, *RAY)
        wait_for_shards(folder, "killed worker", 3, process)
        workers = ray_workers(process.pid)
        if workers:
            os.kill(workers[0], signal.SIGKILL)
        finished[WORKER_KILLED] = len(shards(folder, "killed worker")) if workers else None
        finish(folder, "killed worker", process)
    return folders, finished


def measure(folder: Path, num_examples: int, with_ray: bool) -> dict:
    """Run the program in all ways and compare the files."""
    prepare(folder, num_examples)
    runs = {"one process": (PYTHON, ()), "two processes": (LAUNCH, ())}
    if with_ray:
        runs["two Ray workers"] = (PYTHON, RAY)
    seconds = {}
    for name, (launcher, options) in runs.items():
        began = time.perf_counter()
        finish(folder, name, start(folder, name, launcher, *options))
        seconds[name] = round(time.perf_counter() - began, 1)
    killed, finished = run_and_kill(folder, with_ray)
    folders = {name: name for name in runs} | killed
    tables = {name: [pq.read_table(path) for path in shards(folder, own)] for name, own in folders.items()}
    expected = tables["one process"]
    ids = [row for table in expected for row in table["id"].to_pylist()]
    return {
        "examples": len(ids),
        "distinct_ids": len(set(ids)),
        "unreadable": sum(len(table) - table["error"].null_count for table in expected),
        "shards": len(expected),
        "shards_finished_before_kill": finished,
        "equal_to_one_process": {name: table == expected for name, table in tables.items()},
        "seconds": seconds,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--examples", type=int, default=2000, help="number of examples")
    parser.add_argument("--without_ray", action="store_true", help="skip the runs with Ray")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), arguments.examples, not arguments.without_ray)
    print(json.dumps(result, indent=1, allow_nan=False))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    if not all(result["equal_to_one_process"].values()) or result["examples"] != arguments.examples:
        raise SystemExit("The runs gave different tags.")


if __name__ == "__main__":
    main()
