"""Measures the Space under load and under attack: its answers, latency and memory.

    python benchmarks/space_load.py --output results/space_load.json

Each round sends many concurrent requests to the API on loopback: images, videos and other files, with and without a
title. Each answer is compared with the answer to the same request sent alone; a refusal must have the same message.
The memory after each round is that of the server and the process that reads files.

Then connections send requests whose end is unclear or never comes; see `ATTACKS`. While they send, the Space must
answer other requests, and its memory must not grow. At last the Space gets SIGTERM while it tags files.
"""

import argparse
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
from gradio_client import Client, handle_file

from modeling_optsg.evaluation.reporting import environment

ROOT = Path(__file__).resolve().parent.parent

IMAGES = ROOT / "examples" / "images"
START_SECONDS, ANSWER_SECONDS = 240, 900
ATTACK_BYTES, ATTACK_SECONDS = 150_000_000, 60
CHUNK = b"10000\r\n" + b"0" * 0x10000 + b"\r\n"
# Each attack: path, headers, what is sent again and again, and the seconds between.
ATTACKS = {
    "both headers, JSON": ("/gradio_api/queue/join", "Content-Length: 10\r\nTransfer-Encoding: chunked", CHUNK, 0),
    "both headers, upload": ("/gradio_api/upload", "Content-Length: 10\r\nTransfer-Encoding: chunked", CHUNK, 0),
    "chunks without end": ("/gradio_api/queue/join", "Transfer-Encoding: chunked", CHUNK, 0),
    "two lengths": ("/gradio_api/upload", "Content-Length: 10\r\nContent-Length: 99000000", b"0" * 65536, 0),
    "a body byte by byte": ("/gradio_api/queue/join", "Content-Length: 400000", b"0", 0.5),
    "headers without end": ("/gradio_api/queue/join", "", b"X-Header: 0\r\n" * 100, 0),
}


@contextmanager
def running_space(folder: Path = ROOT / "space", **variables: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run the Space on a free port of loopback.

    Args:
        folder: Folder of the Space.
        variables: Additional environment variables.

    Yields:
        The address and the process of the Space.

    Raises:
        RuntimeError: The Space has not started within `START_SECONDS`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(folder / "app.py")]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | settings | variables, stdout=log, stderr=subprocess.STDOUT
        )
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
                        raise RuntimeError(f"The Space did not start:\n{log.read().decode()[-2000:]}") from None
                    time.sleep(0.2)
            yield address, process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def patient_client(address: str) -> Client:
    """Make a client that waits as long as it must: with fewer cores than clients, uploads wait too."""
    return Client(address, verbose=False, httpx_kwargs={"timeout": ANSWER_SECONDS})


def megabytes(process: subprocess.Popen) -> float:
    """Measure the memory of a process and its children."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 1e6


def mixed_requests(folder: Path, count: int) -> list[dict]:
    """Make requests for images (50 %), videos (30 %) and files that are neither (20 %).

    Args:
        folder: Folder for the files that are neither.
        count: Number of requests.
    """
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


def send(client: Client, request: dict) -> tuple[float, list | str]:
    """Send a request.

    Returns:
        The seconds it took, and the tags or the error message.
    """
    start = time.perf_counter()
    try:
        answer = client.predict(
            handle_file(request["file"]), title=request["title"], decoding=request["decoding"], api_name="/tag"
        )
        result = [(tag["tag"], round(tag["score"], 3), tag["mark"]) for tag in answer["tags"]]
    except Exception as error:
        # A refused file raises here too. Every other error differs from the answer of the request sent alone.
        result = f"{type(error).__name__}: {error}"
    return time.perf_counter() - start, result


def run_round(requests: list[dict], alone: list, clients: list[Client], process: subprocess.Popen) -> dict[str, float]:
    """Send all requests at the same time, each from its own client.

    Args:
        requests: The requests.
        alone: For each request, what [`send`] returned for it alone.
        clients: A client for each request.
        process: Process of the Space.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = [pool.submit(send, *pair) for pair in zip(clients, requests)]
        answers = [future.result(timeout=ANSWER_SECONDS) for future in futures]
    seconds = time.perf_counter() - start
    latencies = sorted(latency for latency, _ in answers)
    return {
        "seconds": round(seconds, 1),
        "same_as_alone": sum(result == expected for (_, result), (_, expected) in zip(answers, alone)),
        "tagged": sum(isinstance(result, list) for _, result in answers),
        "other_answers": Counter(
            str(result)[:200] for (_, result), expected in zip(answers, alone) if result != expected[1]
        ),
        "latency_median": round(statistics.median(latencies), 2),
        "latency_95": round(latencies[int(0.95 * (len(latencies) - 1))], 2),
        "latency_max": round(latencies[-1], 2),
        "megabytes": round(megabytes(process)),
    }


def attack(address: str, name: str) -> dict[str, int | float | None]:
    """Send one of the `ATTACKS` until the server closes the connection.

    Args:
        address: Address of the Space.
        name: Name of the attack.

    Returns:
        The status of the answer, `None` without one, the bytes that were sent and the seconds until the end. The bytes
        include those in the buffers of the system, which the server has not read.
    """
    path, headers, repeated, pause = ATTACKS[name]
    host, port = address.removeprefix("http://").strip("/").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    if headers:
        head += f"{headers}\r\n\r\n"
    start, sent, answer = time.monotonic(), 0, b""
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        try:
            connection.sendall(head.encode())
            while sent < ATTACK_BYTES and time.monotonic() - start < ATTACK_SECONDS:
                if select.select([connection], [], [], pause)[0]:
                    break
                connection.sendall(repeated)
                sent += len(repeated)
            answer = connection.recv(100)
        except OSError:
            # The server has closed the connection, and the system may have dropped its answer.
            pass
    status = int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None
    return {"status": status, "sent_bytes": sent, "seconds": round(time.monotonic() - start, 1)}


def run_attacks(address: str, process: subprocess.Popen, connections: int = 8) -> dict[str, dict]:
    """Run each attack on several connections at the same time, and tag an image meanwhile.

    Args:
        address: Address of the Space.
        process: Process of the Space.
        connections: Number of connections of each attack.
    """
    results = {}
    client = patient_client(address)
    image = {"file": IMAGES / "bus.png", "title": "bus", "decoding": "parallel"}
    for name in ATTACKS:
        before, peak = megabytes(process), 0.0
        with ThreadPoolExecutor(connections) as pool:
            futures = [pool.submit(attack, address, name) for _ in range(connections)]
            seconds, tags = send(client, image)
            while not all(future.done() for future in futures):
                peak = max(peak, megabytes(process))
                time.sleep(0.05)
        found = [future.result() for future in futures]
        results[name] = {
            "connections": connections,
            "statuses": sorted({str(one["status"]) for one in found}),
            "most_bytes_sent": max(one["sent_bytes"] for one in found),
            "seconds": max(one["seconds"] for one in found),
            "tagged_meanwhile": isinstance(tags, list),
            "seconds_to_tag_meanwhile": round(seconds, 2),
            "more_megabytes": round(max(peak, megabytes(process)) - before),
        }
        print(json.dumps({name: results[name]}, allow_nan=False), flush=True)
    return results


def stop(clients: list[Client], requests: list[dict], process: subprocess.Popen) -> float:
    """Send SIGTERM while requests are answered, and return the seconds until the Space has ended."""
    pool = ThreadPoolExecutor(len(requests))
    futures = [pool.submit(send, *pair) for pair in zip(clients, requests)]
    time.sleep(1)
    start = time.monotonic()
    process.terminate()
    process.wait(60)
    seconds = time.monotonic() - start
    for future in futures:
        future.cancel()
    pool.shutdown(wait=False)
    return round(seconds, 2)


def main() -> None:
    """Run all rounds and attacks, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--requests", type=int, default=250, help="number of concurrent requests")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder, running_space() as (address, process):
        requests = mixed_requests(Path(folder), arguments.requests)
        clients = [patient_client(address) for _ in requests]
        different = {str(request): request for request in requests}
        answers = {name: send(clients[0], request) for name, request in different.items()}
        alone = [answers[str(request)] for request in requests]
        megabytes_alone = megabytes(process)
        for _ in range(arguments.rounds):
            rounds.append(run_round(requests, alone, clients, process))
            print(json.dumps(rounds[-1], allow_nan=False), flush=True)
        attacks = run_attacks(address, process)
        stop_seconds = stop(clients[:16], requests[:16], process)
    refusals = [result for _, result in alone if isinstance(result, str)]
    result = {
        "concurrent_requests": len(requests),
        "refused": len(refusals),
        "refusals": sorted(set(refusals)),
        "alone": {
            "latency_median": round(statistics.median(latency for latency, _ in alone), 2),
            "megabytes": round(megabytes_alone),
        },
        "rounds": rounds,
        "lost": sum(len(requests) - one["same_as_alone"] for one in rounds),
        "attacks": attacks,
        "seconds_from_sigterm_to_end": stop_seconds,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    # Threads of cancelled requests may wait for the stopped Space.
    os._exit(0)


if __name__ == "__main__":
    main()
