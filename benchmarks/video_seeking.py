r"""Measures how much faster 8 frames of a two-minute video are read by seeking than by decoding all frames.

    python benchmarks/video_seeking.py --output results/video/seeking.json

The videos are generated: a moving image, encoded as H.264, with key frames as often as phones (1 s), streaming (2 s)
and x264's default (250 frames) have them, and with a single key frame. The two ways of reading alternate, and seconds
are medians. `max_error_in_frames` is the largest distance between the time of a frame that was read and the centre of
its segment, one of eight.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.video_utils import evenly_spaced, read_frames

SECONDS, RATE, WIDTH, HEIGHT, FRAMES = 120, 25, 640, 360, 8
BITS = 12
KEY_FRAMES = {
    "one key frame per second": 25,
    "one key frame per two seconds": 50,
    "x264's default, one per 250 frames": 250,
    "a single key frame": 10_000,
}
SEEKING, DECODING = "seeking", "decoding all frames"


def draw_frame(number: int, background: np.ndarray) -> np.ndarray:
    """Draw a moving background, with the number of the frame as black and white bars in its top rows."""
    frame = np.roll(background, (number % HEIGHT, 2 * number % WIDTH), axis=(0, 1)).copy()
    for bit in range(BITS):
        frame[:32, bit * 32 : bit * 32 + 32] = 255 * (number >> bit & 1)
    return frame


def read_number(image: Image.Image) -> int:
    """Read the number of a frame from its bars."""
    grey = np.asarray(image.convert("L"))
    return sum(int(grey[16, bit * 32 + 16] > 127) << bit for bit in range(BITS))


def write_video(path: Path, key_frame_distance: int) -> None:
    """Write a video with a photograph-like background."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3)).repeat(20, 0).repeat(20, 1)
    background = np.clip(coarse + random.normal(0, 12, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        options = {"g": str(key_frame_distance), "preset": "veryfast", "sc_threshold": "0", "bf": "3"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(SECONDS * RATE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_frame(number, background), format="rgb24")))
        container.mux(stream.encode())


def decode_all(path: Path) -> list[Image.Image]:
    """Decode all frames once, with their number from the container, and convert the wanted ones to images."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        wanted = set(evenly_spaced(stream.frames, FRAMES))
        return [frame.to_image() for number, frame in enumerate(container.decode(stream)) if number in wanted]


def measure(path: Path, rounds: int) -> dict:
    """Read a video in both ways, in turn."""
    readers = {SEEKING: lambda path: read_frames(path, FRAMES), DECODING: decode_all}
    centres = [(2 * segment + 1) * SECONDS * RATE / (2 * FRAMES) for segment in range(FRAMES)]
    times, errors = {name: [] for name in readers}, {}
    for _ in range(rounds):
        for name, read in readers.items():
            start = time.perf_counter()
            frames = read(path)
            times[name].append(time.perf_counter() - start)
            # A frame is shown from its number to the next one.
            middles = [read_number(frame) + 0.5 for frame in frames]
            errors[name] = max(abs(middle - centre) for middle, centre in zip(middles, centres, strict=True))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "speedup": round(medians[DECODING] / medians[SEEKING], 1),
        "max_error_in_frames": errors,
        "bytes": path.stat().st_size,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="number of times that each video is read in each way")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, distance in KEY_FRAMES.items():
            path = Path(folder, f"{distance}.mp4")
            write_video(path, distance)
            found[name] = measure(path, arguments.rounds)
            print(name, json.dumps(found[name], allow_nan=False))
    result = {
        "video": {"seconds": SECONDS, "frames_per_second": RATE, "size": [WIDTH, HEIGHT], "frames_read": FRAMES},
        "rounds": arguments.rounds,
        "key_frames": found,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
