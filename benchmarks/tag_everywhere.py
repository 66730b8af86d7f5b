r"""Tags the same examples with one process, two processes and two workers of Ray, and with kills on the way, and compares
the files.

    python benchmarks/tag_everywhere.py --output results/training/tagging.json

Two of the examples cannot be read. The killed runs lose all their processes (accelerate), and one worker (Ray), after
some of the shards are there; the first is started again with the same command, the second goes on by itself.
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

sys.path.insert(0, str(small_run.TRAIN.parent))
from score import environment  # noqa: E402

PROGRAM = small_run.TRAIN.with_name("tag_dataset.py")
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines")
LAUNCH += ("1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def prepare(folder: Path, examples: int) -> None:
    """A checkpoint of a short training, and examples two of which have features of another shape."""
    small_run.make(folder, 120)
    command = small_run.command(folder, folder / "run", num_train_epochs=4, eval_steps=0.99)
    subprocess.run(command, env=small_run.environment(), check=True, capture_output=True)
    small_run.make(folder / "many", examples, seed=1)
    path = folder / "many/data/train-00000-of-00001.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder / "hf"))
    broken = {examples // 3, examples // 2}
    rows = rows.map(
        lambda row, number: {"frame_features": [[0.0] * 3] if number in broken else row["frame_features"]},
        with_indices=True,
    )
    rows.to_parquet(str(path))


def start(folder: Path, name: str, launcher: tuple[str, ...], *more: str) -> subprocess.Popen:
    command = [*launcher, PROGRAM, "--checkpoint", folder / "run", "--dataset", folder / "many/data"]
    command += ["--dataset_dir", folder / "hf", "--output", folder / name, "--shard_size", 100, "--batch_size", 50]
    log = (folder / f"{name}.log").open("a")
    own = small_run.environment() | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen([*map(str, command), *more], env=own, stdout=log, stderr=log, start_new_session=True)


def finish(folder: Path, name: str, process: subprocess.Popen) -> None:
    if process.wait():
        raise SystemExit(f"{name}: {(folder / f'{name}.log').read_text()[-3000:]}")


def shards(folder: Path, name: str) -> list[Path]:
    return sorted((folder / name).glob("tags-*.parquet"))


def wait_for(folder: Path, name: str, count: int, process: subprocess.Popen) -> None:
    while len(shards(folder, name)) < count:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended before it was killed: {(folder / f'{name}.log').read_text()[-2000:]}")
        time.sleep(0.005)


def ray_workers(leader: int) -> list[int]:
    """Processes of a session that are Ray's workers with the model in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode(errors="replace")
            session = int((path / "stat").read_text().rsplit(")", 1)[1].split()[3])
        except (OSError, ValueError):
            continue
        if command.startswith("ray::") and "ShardTagger" in command and session == leader:
            found.append(int(path.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--without_ray", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, seconds, killed = Path(name), {}, {}
        prepare(folder, arguments.examples)
        ways = {"one process": ((sys.executable,), ()), "two processes": (LAUNCH, ())}
        if not arguments.without_ray:
            ways["two workers of Ray"] = ((sys.executable,), ("--ray", "2"))
        for way, (launcher, more) in ways.items():
            began = time.perf_counter()
            finish(folder, way, start(folder, way, launcher, *more))
            seconds[way] = round(time.perf_counter() - began, 1)

        process = start(folder, "killed", LAUNCH)
        wait_for(folder, "killed", 5, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed["two processes, killed and started again"] = len(shards(folder, "killed"))
        finish(folder, "killed", start(folder, "killed", LAUNCH))
        names = {**{way: way for way in ways}, "two processes, killed and started again": "killed"}
        if not arguments.without_ray:
            process = start(folder, "killed worker", (sys.executable,), "--ray", "2")
            wait_for(folder, "killed worker", 3, process)
            workers = ray_workers(process.pid)
            if workers:
                os.kill(workers[0], signal.SIGKILL)
            killed["two workers of Ray, one killed"] = len(shards(folder, "killed worker")) if workers else None
            finish(folder, "killed worker", process)
            names["two workers of Ray, one killed"] = "killed worker"

        tables = {way: [pq.read_table(path) for path in shards(folder, own)] for way, own in names.items()}
        expected = tables["one process"]
        ids = [row for table in expected for row in table["id"].to_pylist()]
        result = {
            "examples": len(ids),
            "different_ids": len(set(ids)),
            "could_not_be_read": sum(len(table) - table["error"].null_count for table in expected),
            "shards": len(expected),
            "shards_there_at_the_kill": killed,
            "equal_to_one_process": {way: own == expected for way, own in tables.items()},
            "seconds": seconds,
        }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")
    if not all(result["equal_to_one_process"].values()) or len(ids) != arguments.examples:
        raise SystemExit("The ways of tagging do not give the same.")


if __name__ == "__main__":
    main()
