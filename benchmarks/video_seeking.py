r"""Measures reading 8 frames of a two-minute video by seeking, against decoding it from end to end.

    python benchmarks/video_seeking.py --output results/video/seeking.json

The videos are made here: a moving image, H.264, with key frames as far apart as a phone (1 s), streaming (2 s) and
x264's default (250 frames) have them, and with one key frame alone. Both ways are run in turn; times are medians. The
naive way decodes all frames and turns those wanted into images. `largest_error` is the distance, in frames, of a
frame's time from the time asked for, the centre of its eighth of the video.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from score import environment  # noqa: E402

from modeling_optsg.video_utils import evenly_spaced, read_frames

SECONDS, RATE, WIDTH, HEIGHT, FRAMES = 120, 25, 640, 360, 8
BITS = 12
KEY_FRAMES = {
    "a key frame every second": 25,
    "every two seconds": 50,
    "x264's default, every 250 frames": 250,
    "one key frame alone": 10_000,
}


def drawn(number: int, ground: np.ndarray) -> np.ndarray:
    """A photograph-like ground that moves, with the frame's number as bars on top."""
    frame = np.roll(ground, (number % HEIGHT, 2 * number % WIDTH), axis=(0, 1)).copy()
    for bit in range(BITS):
        frame[:32, bit * 32 : bit * 32 + 32] = 255 * (number >> bit & 1)
    return frame


def number_of(image) -> int:
    grey = np.asarray(image.convert("L"))
    return sum(int(grey[16, bit * 32 + 16] > 127) << bit for bit in range(BITS))


def make(path: Path, distance: int) -> None:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3)).repeat(20, 0).repeat(20, 1)
    ground = np.clip(coarse + random.normal(0, 12, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        options = {"g": str(distance), "preset": "veryfast", "sc_threshold": "0", "bf": "3"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(SECONDS * RATE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(number, ground), format="rgb24")))
        container.mux(stream.encode())


def naive(path: Path) -> list:
    """Decodes everything, twice as fast as twice: the number of frames is taken from the container."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        wanted = set(evenly_spaced(stream.frames, FRAMES))
        return [frame.to_image() for number, frame in enumerate(container.decode(stream)) if number in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ways = {"seeking": lambda path: read_frames(path, FRAMES), "naive": naive}
    centres = [(2 * part + 1) * SECONDS * RATE / (2 * FRAMES) for part in range(FRAMES)]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, distance in KEY_FRAMES.items():
            path = Path(folder, f"{distance}.mp4")
            make(path, distance)
            times, error = {way: [] for way in ways}, {}
            for _ in range(arguments.rounds):
                for way, read in ways.items():
                    start = time.perf_counter()
                    frames = read(path)
                    times[way].append(time.perf_counter() - start)
                    # A frame lasts from its number to the next; its middle is what stands for it.
                    middles = [number_of(frame) + 0.5 for frame in frames]
                    error[way] = max(abs(own - asked) for own, asked in zip(middles, centres, strict=True))
            medians = {way: statistics.median(own) for way, own in times.items()}
            found[name] = {
                "seconds": {way: round(value, 4) for way, value in medians.items()},
                "times_faster": round(medians["naive"] / medians["seeking"], 1),
                "largest_error": error,
                "bytes": path.stat().st_size,
            }
            print(name, json.dumps(found[name]))
    result = {
        "video": {"seconds": SECONDS, "frames_a_second": RATE, "size": [WIDTH, HEIGHT], "frames_read": FRAMES},
        "rounds": arguments.rounds,
        "key_frames": found,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
