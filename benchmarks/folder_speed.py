r"""Measures how fast `optsg tag` tags a whole folder, and where the time goes.

    python -m benchmarks.folder_speed --output results/speed/folder_speed.json

Each measurement is a process of its own, with one thread and with one thread for each core in turn. The folders have
5,000 images of 224 pixels and 500 of 12 megapixels; images are hard links to a hundred and to ten different ones.
Images per second include the start, which is also measured by itself on one image. Shares are those of the processor
time that is left without the start, with one thread: reading files, the vision and text towers, and the rest of the
model, `decoding`. `other` is the processor time outside them, such as preparing batches and printing tags.

With `--before`, the working tree of an earlier revision takes turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from benchmarks.folder_reading import CHECKPOINT, HEIGHT, ROOT, WIDTH, in_tree, photograph, revision, save

SMALL, ONE = 224, "1 thread"
# Name of a folder -> number of files, number of different ones, width and height.
FOLDERS = {
    "one image": (1, 1, SMALL, SMALL),
    "224 pixels": (5000, 100, SMALL, SMALL),
    "12 megapixels": (500, 10, WIDTH, HEIGHT),
}


def make_folder(folder: Path, files: int, different: int, width: int, height: int) -> None:
    """Write images, and links to them."""
    folder.mkdir()
    for number in range(files):
        if number < different:
            photograph(number, width, height).save(folder / f"{number:04}.jpg", quality=90)
        else:
            os.link(folder / f"{number % different:04}.jpg", folder / f"{number:04}.jpg")


def tag(words: list[str]) -> None:
    """Run `optsg tag` in this process, and print the processor time of each part on the last line."""
    seconds, lock = dict.fromkeys(("reading", "towers", "generate"), 0.0), threading.Lock()

    def timed(part: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                with lock:
                    seconds[part] += time.thread_time() - start

        return call

    from optsg import main, tagger

    # As when it loads a model.
    with tagger.without_garbage_collection():
        from modeling_optsg import OPTSGForTagGeneration
        from modeling_optsg.towers import TowerMixin

    tagger.Tagger._read = timed("reading", tagger.Tagger._read)
    OPTSGForTagGeneration.generate = timed("generate", OPTSGForTagGeneration.generate)
    TowerMixin.encode_inputs = timed("towers", TowerMixin.encode_inputs)
    status = main(["tag", "--json", "--model", str(CHECKPOINT), *words])
    print(json.dumps(seconds, allow_nan=False))
    sys.exit(status)


def run(tree: Path, folder: Path, threads: int | None) -> dict[str, float]:
    """Tag a folder in a process of its own, and return its wall time, CPU time and the time of each part."""
    command = [sys.executable, "-m", "optsg", "tag", "--json", "--model", str(CHECKPOINT), str(folder)]
    if threads is not None:
        command = [sys.executable, "-m", "benchmarks.folder_speed", "--tag", "--threads", str(threads), str(folder)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, **in_tree(tree))
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors.read()}")
        output.seek(0)
        parts = json.loads(output.readlines()[-1]) if threads is not None else {}
    return {"wall": seconds, "cpu": used.ru_utime + used.ru_stime, "megabytes": used.ru_maxrss / 1024} | parts


def summarize(runs: list[dict[str, float]], start: dict[str, float], files: int, with_shares: bool) -> dict:
    """Return medians of the runs of a folder; `start` is those of one image."""
    own = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
    found = {
        "images_per_second": round(files / own["wall"], 1),
        "cpu_ms_per_image": round(1000 * (own["cpu"] - start["cpu"]) / (files - 1), 1),
        "peak_megabytes": round(own["megabytes"]),
    }
    if with_shares:
        whole = own["cpu"] - start["cpu"]
        parts = {name: own[name] - start[name] for name in ("reading", "towers", "generate")}
        parts = parts | {"decoding": parts["generate"] - parts["towers"], "other": whole - parts["reading"]}
        parts["other"] -= parts.pop("generate")
        found["shares"] = {name: round(seconds / whole, 3) for name, seconds in parts.items()}
    return found


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--tag"]:
        tag(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="working tree of an earlier revision")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    sides: dict[str, tuple[Path, int | None]] = {ONE: (ROOT, 1)}
    if cores > 1:
        sides[f"{cores} threads"] = (ROOT, cores)
    if arguments.before:
        sides["before"] = (arguments.before.resolve(), None)
    runs: dict[str, dict[str, list]] = {name: {side: [] for side in sides} for name in FOLDERS}
    with tempfile.TemporaryDirectory() as root:
        for name, sizes in FOLDERS.items():
            make_folder(Path(root, name), *sizes)
            for _ in range(arguments.rounds + 1 if name == "one image" else arguments.rounds):
                for side, (tree, threads) in sides.items():
                    runs[name][side].append(run(tree, Path(root, name), threads))
                    print(
                        name, side, {key: round(value, 2) for key, value in runs[name][side][-1].items()}, flush=True
                    )
            result = _result(runs, cores, arguments.rounds)
            save(result | ({"before": revision(arguments.before)} if arguments.before else {}), arguments.output)


def _result(runs: dict[str, dict[str, list]], cores: int, rounds: int) -> dict:
    """Return the result of the folders that were tagged so far."""
    starts = {
        side: {name: statistics.median(one[name] for one in own) for name in own[0]}
        for side, own in runs["one image"].items()
    }
    result: dict = {"cores": cores, "rounds": rounds, "checkpoint": CHECKPOINT.name}
    result["one image"] = {
        side: {"wall_seconds": round(own["wall"], 2), "cpu_seconds": round(own["cpu"], 2)}
        for side, own in starts.items()
    }
    for name, (files, *_) in FOLDERS.items():
        if name != "one image":
            result[name] = {"images": files} | {
                side: summarize(own, starts[side], files, with_shares=side == ONE)
                for side, own in runs[name].items()
                if own
            }
    return result


if __name__ == "__main__":
    main()
