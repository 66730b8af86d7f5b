r"""Fifty requests at once to the Space, round after round, and whether it answers all of them and stays in its memory.

    python benchmarks/space_load.py --output results/space/load.json

Images, videos, and files that are none of these, each with a title or without, by the Space's API on loopback. Every
answer is compared with the one the same request gets when nothing else is asked; a file that is not taken must be
refused in the same words. Memory is that of the server and of the processes that read files for it, after each round.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
from gradio_client import Client, handle_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from score import environment  # noqa: E402

IMAGES = ROOT / "examples" / "images"
START_SECONDS, ANSWER_SECONDS = 120, 600


@contextmanager
def running_space(folder: Path = ROOT / "space", **variables: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The Space on a free port of loopback, as anybody would start it: its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(folder / "app.py")]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | own | variables, stdout=log, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}/"
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    urllib.request.urlopen(address, timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise RuntimeError(f"the Space has not started:\n{log.read().decode()[-2000:]}") from None
                    time.sleep(0.2)
            yield address, process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def megabytes(process: subprocess.Popen) -> float:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 1e6


def requests(folder: Path, count: int) -> list[dict]:
    """Mixed: of ten, five images, three videos, two that are neither."""
    broken, text = folder / "broken.png", folder / "notes.jpg"
    broken.write_bytes((IMAGES / "bus.png").read_bytes()[:900])
    text.write_text("this is not an image")
    images = sorted(IMAGES.glob("*.png"))
    files = []
    for number in range(count):
        kind = number % 10
        if kind < 5:
            file = images[number % len(images)]
        elif kind < 8:
            file = IMAGES / "ship-wheel.mp4"
        else:
            file = (broken, text)[number % 2]
        title = "" if number % 3 == 0 else file.stem.replace("-", " ")
        files.append({"file": file, "title": title, "decoding": ("parallel", "sequential")[number % 2]})
    return files


def ask(client: Client, request: dict) -> tuple[float, object]:
    """How long it took, and the tags or why there are none."""
    before = time.perf_counter()
    try:
        answer = client.predict(
            handle_file(request["file"]), title=request["title"], decoding=request["decoding"], api_name="/tag"
        )
        found = [(tag["tag"], round(tag["score"], 3), tag["mark"]) for tag in answer["tags"]]
    except Exception as error:
        # What is lost must be counted, whatever the client calls it; a refusal is an answer.
        found = f"{type(error).__name__}: {error}"
    return time.perf_counter() - before, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=50, help="at once")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    rounds = []
    try:
        with running_space() as (address, process):
            asked = requests(folder, arguments.requests)
            client = Client(address, verbose=False)
            alone = [ask(client, request) for request in asked]
            settled = megabytes(process)
            for _ in range(arguments.rounds):
                clients = [Client(address, verbose=False) for _ in asked]
                before = time.perf_counter()
                with ThreadPoolExecutor(len(asked)) as pool:
                    futures = [pool.submit(ask, *pair) for pair in zip(clients, asked)]
                    answers = [future.result(timeout=ANSWER_SECONDS) for future in futures]
                seconds = sorted(answer[0] for answer in answers)
                rounds.append(
                    {
                        "seconds": round(time.perf_counter() - before, 1),
                        "as_alone": sum(own == other for (_, own), (_, other) in zip(answers, alone)),
                        "tagged": sum(isinstance(found, list) for _, found in answers),
                        "latency_median": round(statistics.median(seconds), 2),
                        "latency_95": round(seconds[int(0.95 * (len(seconds) - 1))], 2),
                        "latency_max": round(seconds[-1], 2),
                        "megabytes": round(megabytes(process)),
                    }
                )
                print(json.dumps(rounds[-1]), flush=True)
    finally:
        shutil.rmtree(folder)
    result = {
        "requests_at_once": len(asked),
        "of_them": {"refused_as_no_image_or_video": sum(isinstance(found, str) for _, found in alone)},
        "refusals": sorted({found for _, found in alone if isinstance(found, str)}),
        "alone": {"latency_median": round(statistics.median(t for t, _ in alone), 2), "megabytes": round(settled)},
        "rounds": rounds,
        "lost": sum(len(asked) - one["as_alone"] for one in rounds),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
