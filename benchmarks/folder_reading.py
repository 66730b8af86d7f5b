r"""Measures `optsg tag` over folders before and after a change: photographs, Live Photos, and a repeated run.

    git worktree add ../before REVISION
    python benchmarks/folder_reading.py --before ../before --output results/folder_reading.json

Each measurement runs `python -m optsg tag --write json` as a whole process, in the earlier and in this working tree
in turn, so that both meet the same load of the machine. `photographs` are JPEGs of 12 megapixels, in rounds of 100;
`cpu_seconds_per_file` leaves out the CPU time of a run with one file, which loads the model. `live_photos` are pairs
of a photograph and a video of three seconds. `rerun` starts again on 20,000 files that are all tagged. Files are hard
links to a few different ones. Peak memory below that of this program, about 700 MB, cannot be measured, so `rerun` has
none.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from modeling_optsg.evaluation.reporting import environment

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
WIDTH, HEIGHT = 4000, 3000
DIFFERENT = 10
ROUNDS, FILES_PER_ROUND = 5, 100
PAIRS, RERUN_FILES = 128, 20_000
VIDEO_WIDTH, VIDEO_HEIGHT, RATE, SECONDS = 1440, 1080, 30, 3
BEFORE, AFTER = "before", "after"


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Draw an image with details of every size and the noise of a camera."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, contrast in ((4, 90), (16, 50), (64, 30), (256, 18), (1000, 10)):
        for channel in range(3):
            coarse = Image.fromarray(random.normal(0, contrast, (cells * 3 // 4, cells)).astype(np.float32))
            pixels[..., channel] += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels += random.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_video(path: Path) -> None:
    """Write a video in which a photograph moves."""
    image = np.asarray(photograph(0, VIDEO_WIDTH, VIDEO_HEIGHT))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = VIDEO_WIDTH, VIDEO_HEIGHT, "yuv420p"
        for number in range(RATE * SECONDS):
            frame = np.ascontiguousarray(np.roll(image, 4 * number, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def revision(tree: Path) -> str:
    """Return the git revision of a working tree."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()


def in_tree(tree: Path) -> dict[str, Any]:
    """Return the arguments of `subprocess` for a program that imports the packages of a working tree."""
    return {"cwd": tree, "env": {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}}


def run(tree: Path, folder: Path, *options: str) -> dict[str, float]:
    """Tag a folder in a process of its own, and return its wall time, CPU time and peak memory."""
    command = [sys.executable, "-m", "optsg", "tag", "--write", "json", "--model", str(CHECKPOINT), *options]
    start = time.perf_counter()
    process = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, **in_tree(tree))
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - start
    return {"wall": seconds, "cpu": used.ru_utime + used.ru_stime, "megabytes": used.ru_maxrss / 1024}


def compare(trees: dict[str, Path], folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Tag a folder in both working trees in turn; the sidecars of each run are deleted."""
    runs: dict[str, list] = {name: [] for name in trees}
    for _ in range(rounds):
        for name, tree in trees.items():
            with tempfile.TemporaryDirectory() as output:
                runs[name].append(run(tree, folder, "--output", output))
            print(folder.name, name, {key: round(value, 2) for key, value in runs[name][-1].items()}, flush=True)
    return runs


def summarize(runs: dict[str, list[dict[str, float]]], loading: dict[str, float], num_files: int) -> dict:
    """Return medians and ratios; `loading` is the CPU time of a run with one file."""
    found = {}
    for name, own in runs.items():
        cpu = statistics.median(one["cpu"] for one in own)
        found[name] = {
            "cpu_seconds_per_file": round((cpu - loading[name]) / (num_files - 1), 4),
            "wall_seconds": round(statistics.median(one["wall"] for one in own), 2),
            "peak_megabytes": round(max(one["megabytes"] for one in own)),
        }
    keys = ("cpu_seconds_per_file", "wall_seconds", "peak_megabytes")
    return {**found, "ratio": {key: round(found[AFTER][key] / found[BEFORE][key], 3) for key in keys}}


def measure_rerun(trees: dict[str, Path], folder: Path, rounds: int) -> dict:
    """Tag one file, copy its sidecar for 20,000 links to it, which have the same fingerprint, and tag them again."""
    found = {}
    for name, tree in trees.items():
        library = folder / f"rerun-{name}"
        library.mkdir()
        photograph(0, 64, 48).save(library / "00000.png")
        run(tree, library)
        sidecar = (library / "00000.png.optsg.json").read_bytes()
        for number in range(1, RERUN_FILES):
            os.link(library / "00000.png", library / f"{number:05}.png")
            (library / f"{number:05}.png.optsg.json").write_bytes(sidecar)
    for _ in range(rounds):
        for name, tree in trees.items():
            found.setdefault(name, []).append(run(tree, folder / f"rerun-{name}"))
    return {
        name: {
            "wall_seconds": round(statistics.median(one["wall"] for one in own), 2),
            "cpu_seconds": round(statistics.median(one["cpu"] for one in own), 2),
        }
        for name, own in found.items()
    }


def make_folders(folder: Path) -> tuple[Path, Path, Path]:
    """Make the folders with one photograph, with many, and with Live Photos."""
    one, photographs, live = (folder / name for name in ("one", "photographs", "live"))
    for made in (one, photographs, live):
        made.mkdir()
    for number in range(DIFFERENT):
        photograph(number, WIDTH, HEIGHT).save(folder / f"{number}.jpg", quality=90)
    write_video(folder / "video.mov")
    os.link(folder / "0.jpg", one / "0.jpg")
    for number in range(FILES_PER_ROUND):
        os.link(folder / f"{number % DIFFERENT}.jpg", photographs / f"{number:03}.jpg")
    for number in range(PAIRS):
        os.link(folder / f"{number % DIFFERENT}.jpg", live / f"{number:03}.jpg")
        os.link(folder / "video.mov", live / f"{number:03}.mov")
    return one, photographs, live


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="working tree of the earlier revision")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--folder", type=Path, help="folder for the generated files (default: a temporary one)")
    arguments = parser.parse_args()
    trees = {BEFORE: arguments.before.resolve(), AFTER: ROOT}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        one, photographs, live = make_folders(Path(folder))
        loading = {
            name: statistics.median(own["cpu"] for own in runs) for name, runs in compare(trees, one, 3).items()
        }
        result = {
            "revisions": {name: revision(tree) for name, tree in trees.items()},
            "cores": len(os.sched_getaffinity(0)),
            "loading_cpu_seconds": {name: round(seconds, 2) for name, seconds in loading.items()},
            "photographs": {"files": ROUNDS * FILES_PER_ROUND, "rounds": ROUNDS, "size": [WIDTH, HEIGHT]}
            | summarize(compare(trees, photographs, ROUNDS), loading, FILES_PER_ROUND),
        }
        save(result, arguments.output)
        result["live_photos"] = {"pairs": PAIRS} | summarize(compare(trees, live, 1), loading, 2 * PAIRS)
        save(result, arguments.output)
        result["rerun"] = {"files": RERUN_FILES} | measure_rerun(trees, Path(folder), 3)
        save(result, arguments.output)
    print(json.dumps(result, indent=1, allow_nan=False))


def save(result: dict, output: Path) -> None:
    """Write the result, after each part because the benchmark takes long."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
