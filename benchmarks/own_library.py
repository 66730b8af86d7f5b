"""Measures how well a book suggests personal keywords, on 300 synthetic images.

    python benchmarks/own_library.py --output results/book/own_library.json

Every image shows one place, up to two subjects and sometimes an occasion. Each place, subject and occasion has a
personal keyword, such as "Grandma's garden", and is drawn with random variation in position and colour. The keywords
are saved in XMP sidecars. `optsg index` makes a book from 240 images, and `optsg tag --book` suggests keywords for the
other 60.
"""

import argparse
import contextlib
import io
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw

from modeling_optsg.evaluation.reporting import environment
from optsg import main as optsg

SIZE = 256
NUM_IMAGES, NUM_HELD_OUT = 300, 60
Colour = tuple[int, int, int]
SIDECAR = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:subject><rdf:Bag>{}</rdf:Bag></dc:subject>
</rdf:Description></rdf:RDF></x:xmpmeta>"""


class Scene:
    """Draws one image; all sizes are relative to its width."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.image = Image.new("RGB", (SIZE, SIZE))
        self.draw = ImageDraw.Draw(self.image)

    def colour(self, colour: Colour) -> Colour:
        """Return a similar colour."""
        return tuple(max(0, min(255, value + self.rng.randint(-18, 18))) for value in colour)

    def box(self, x: float, y: float, width: float, height: float) -> list[float]:
        """Return the corners of a box with the centre `x`, `y`."""
        return [SIZE * (x - width / 2), SIZE * (y - height / 2), SIZE * (x + width / 2), SIZE * (y + height / 2)]

    def background(self, sky: Colour, ground: Colour, horizon: float = 0.6) -> None:
        """Draw sky and ground."""
        horizon = SIZE * (horizon + self.rng.uniform(-0.06, 0.06))
        self.draw.rectangle([0, 0, SIZE, horizon], fill=self.colour(sky))
        self.draw.rectangle([0, horizon, SIZE, SIZE], fill=self.colour(ground))

    def ellipse(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Draw a filled ellipse."""
        self.draw.ellipse(self.box(x, y, width, height), fill=self.colour(colour))

    def rectangle(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Draw a filled rectangle."""
        self.draw.rectangle(self.box(x, y, width, height), fill=self.colour(colour))

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """Draw a filled polygon."""
        self.draw.polygon([(SIZE * x, SIZE * y) for x, y in points], fill=self.colour(colour))

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float = 0.02) -> None:
        """Draw a line."""
        self.draw.line([(SIZE * x, SIZE * y) for x, y in points], fill=self.colour(colour), width=int(SIZE * width))

    def scatter(self, number: int, top: float, bottom: float) -> list[tuple[float, float]]:
        """Return random positions."""
        return [(self.rng.random(), self.rng.uniform(top, bottom)) for _ in range(number)]


def garden(scene: Scene) -> None:
    """Draw flowers in a meadow."""
    scene.background((150, 205, 245), (70, 150, 60), 0.4)
    for x, y in scene.scatter(22, 0.5, 0.97):
        scene.ellipse(x, y, 0.06, 0.06, scene.rng.choice([(235, 60, 90), (250, 200, 40), (200, 90, 220)]))


def lake(scene: Scene) -> None:
    """Draw a lake with mountains."""
    scene.background((180, 215, 240), (40, 105, 170), 0.5)
    for x in (0.2, 0.55, 0.9):
        scene.polygon([(x - 0.3, 0.52), (x, 0.15 + scene.rng.random() * 0.1), (x + 0.3, 0.52)], (105, 115, 130))


def town(scene: Scene) -> None:
    """Draw houses."""
    scene.background((225, 220, 210), (150, 135, 120), 0.75)
    for x in (0.12, 0.37, 0.62, 0.88):
        height = scene.rng.uniform(0.3, 0.55)
        scene.rectangle(x, 0.75 - height / 2, 0.2, height, (190, 110, 80))
        scene.polygon([(x - 0.13, 0.75 - height), (x, 0.62 - height), (x + 0.13, 0.75 - height)], (130, 50, 40))


def office(scene: Scene) -> None:
    """Draw a wall of windows."""
    scene.background((205, 210, 215), (120, 125, 130), 0.8)
    for x in (0.15, 0.38, 0.62, 0.85):
        for y in (0.15, 0.35, 0.55):
            scene.rectangle(x, y, 0.15, 0.13, (90, 140, 190))


def ski(scene: Scene) -> None:
    """Draw a snowy slope with firs."""
    scene.background((130, 180, 235), (245, 248, 252), 0.35)
    scene.polygon([(0, 0.35), (0, 1), (1, 1), (1, scene.rng.uniform(0.5, 0.8))], (235, 240, 250))
    for x, y in scene.scatter(6, 0.45, 0.9):
        scene.polygon([(x - 0.04, y), (x, y - 0.14), (x + 0.04, y)], (30, 90, 60))


def rooftop(scene: Scene) -> None:
    """Draw a night sky."""
    scene.background((15, 20, 50), (60, 55, 60), 0.8)
    for x, y in scene.scatter(30, 0.02, 0.7):
        scene.ellipse(x, y, 0.015, 0.015, (250, 245, 210))


def beach(scene: Scene) -> None:
    """Draw a beach with sun and sea."""
    scene.background((120, 200, 240), (235, 215, 160), 0.65)
    scene.rectangle(0.5, 0.55, 1, 0.2, (50, 150, 190))
    scene.ellipse(scene.rng.random(), 0.15, 0.16, 0.16, (255, 225, 80))


def forest(scene: Scene) -> None:
    """Draw trees."""
    scene.background((170, 200, 160), (80, 65, 40), 0.8)
    for x in [index / 8 for index in range(9)]:
        scene.rectangle(x, 0.55, 0.035, 0.6, (75, 50, 30))
        scene.ellipse(x, scene.rng.uniform(0.15, 0.3), 0.17, 0.35, (25, 85, 35))


def kitchen(scene: Scene) -> None:
    """Draw cupboards and a worktop."""
    scene.background((250, 240, 215), (170, 120, 75), 0.7)
    scene.rectangle(0.5, 0.75, 1, 0.1, (230, 230, 230))
    for x in (0.2, 0.5, 0.8):
        scene.rectangle(x, 0.22, 0.22, 0.26, (200, 150, 95))


def stadium(scene: Scene) -> None:
    """Draw a pitch with spectators."""
    scene.background((60, 60, 75), (40, 140, 50), 0.5)
    for x, y in scene.scatter(60, 0.05, 0.42):
        scene.ellipse(x, y, 0.03, 0.03, scene.rng.choice([(230, 40, 40), (240, 240, 240)]))
    scene.line([(0, 0.75), (1, 0.75)], (250, 250, 250), 0.015)


def desert(scene: Scene) -> None:
    """Draw a desert with cacti."""
    scene.background((250, 190, 120), (215, 140, 70), 0.55)
    for x, y in scene.scatter(3, 0.55, 0.8):
        scene.rectangle(x, y, 0.05, 0.25, (60, 120, 60))
        scene.rectangle(x + 0.05, y - 0.03, 0.1, 0.04, (60, 120, 60))


def church(scene: Scene) -> None:
    """Draw a church."""
    scene.background((190, 215, 240), (110, 160, 90), 0.75)
    x = scene.rng.uniform(0.35, 0.65)
    scene.rectangle(x, 0.6, 0.35, 0.32, (235, 230, 220))
    scene.rectangle(x - 0.14, 0.45, 0.13, 0.6, (225, 220, 210))
    scene.polygon([(x - 0.22, 0.18), (x - 0.14, 0.02), (x - 0.06, 0.18)], (70, 75, 95))


def dog(scene: Scene, x: float) -> None:
    """Draw a brown dog."""
    scene.ellipse(x, 0.78, 0.26, 0.14, (120, 75, 35))
    scene.ellipse(x + 0.14, 0.7, 0.12, 0.12, (120, 75, 35))
    for leg in (-0.08, 0.08):
        scene.rectangle(x + leg, 0.88, 0.035, 0.14, (105, 65, 30))


def boat(scene: Scene, x: float) -> None:
    """Draw a sailing boat."""
    scene.polygon([(x - 0.18, 0.8), (x + 0.18, 0.8), (x + 0.11, 0.9), (x - 0.11, 0.9)], (160, 30, 30))
    scene.polygon([(x, 0.78), (x, 0.45), (x + 0.16, 0.75)], (250, 250, 245))


def bicycle(scene: Scene, x: float) -> None:
    """Draw a bicycle with a red frame."""
    for wheel in (-0.12, 0.12):
        scene.draw.ellipse(scene.box(x + wheel, 0.85, 0.18, 0.18), outline=scene.colour((20, 20, 20)), width=6)
    scene.line([(x - 0.12, 0.85), (x, 0.7), (x + 0.12, 0.85), (x - 0.02, 0.85), (x, 0.7)], (230, 40, 40))


def person(hair: Colour, dress: Colour) -> Callable[[Scene, float], None]:
    """Return a function that draws a person."""

    def draw(scene: Scene, x: float) -> None:
        scene.polygon([(x - 0.1, 0.95), (x, 0.62), (x + 0.1, 0.95)], dress)
        scene.ellipse(x, 0.54, 0.16, 0.17, hair)
        scene.ellipse(x, 0.57, 0.11, 0.12, (245, 205, 175))

    return draw


def cat(scene: Scene, x: float) -> None:
    """Draw a black cat."""
    scene.ellipse(x, 0.82, 0.16, 0.22, (40, 40, 45))
    scene.ellipse(x, 0.68, 0.12, 0.11, (40, 40, 45))
    for ear in (-0.04, 0.04):
        scene.polygon([(x + ear - 0.025, 0.65), (x + ear, 0.58), (x + ear + 0.025, 0.65)], (40, 40, 45))


def car(scene: Scene, x: float) -> None:
    """Draw a yellow car."""
    scene.rectangle(x, 0.83, 0.36, 0.1, (245, 205, 40))
    scene.rectangle(x, 0.75, 0.2, 0.1, (245, 205, 40))
    for wheel in (-0.1, 0.1):
        scene.ellipse(x + wheel, 0.89, 0.09, 0.09, (25, 25, 25))


def balloons(scene: Scene) -> None:
    """Draw balloons."""
    for index in range(5):
        x, y = 0.1 + 0.2 * index, scene.rng.uniform(0.1, 0.25)
        scene.line([(x, y), (x, y + 0.25)], (230, 230, 230), 0.006)
        scene.ellipse(x, y, 0.11, 0.14, [(235, 50, 60), (60, 120, 235), (250, 205, 50)][index % 3])


def candles(scene: Scene) -> None:
    """Draw four candles."""
    for index in range(4):
        x = 0.2 + 0.2 * index
        scene.rectangle(x, 0.2, 0.03, 0.16, (150, 25, 45))
        scene.ellipse(x, 0.1, 0.03, 0.06, (255, 190, 40))


def fireworks(scene: Scene) -> None:
    """Draw fireworks."""
    for x, y in scene.scatter(3, 0.1, 0.35):
        colour = scene.rng.choice([(255, 90, 200), (90, 255, 180), (255, 220, 60)])
        for index in range(10):
            angle = index * math.pi / 5
            scene.line([(x, y), (x + 0.12 * math.cos(angle), y + 0.12 * math.sin(angle))], colour, 0.01)


PLACES = {
    "Grandma's garden": garden,
    "Lake house": lake,
    "Old town": town,
    "Office 4B": office,
    "Ski week": ski,
    "Our rooftop": rooftop,
    "Cala Blanca": beach,
    "Behind the mill": forest,
    "Aunt Vera's kitchen": kitchen,
    "Away game": stadium,
    "Road trip": desert,
    "St. Anna": church,
}
SUBJECTS = {
    "Bruno": dog,
    "Uncle Joe's boat": boat,
    "the red bike": bicycle,
    "Mia": person((240, 205, 80), (230, 70, 140)),
    "Dad": person((60, 40, 30), (40, 70, 150)),
    "Minka": cat,
    "Herbie": car,
}
OCCASIONS = {"birthday 2021": balloons, "Advent": candles, "New Year's Eve": fireworks}


def draw_example(rng: random.Random) -> tuple[Image.Image, list[str]]:
    """Draw a random image and return it with its keywords."""
    scene, place = Scene(rng), rng.choice(sorted(PLACES))
    PLACES[place](scene)
    subjects = rng.sample(sorted(SUBJECTS), rng.choice([0, 1, 1, 2]))
    for x, name in zip((rng.uniform(0.2, 0.4), rng.uniform(0.6, 0.8)), subjects):
        SUBJECTS[name](scene, x)
    occasion = rng.choice([None, None, *sorted(OCCASIONS)])
    if occasion is not None:
        OCCASIONS[occasion](scene)
    return scene.image, [place, *subjects, *([occasion] if occasion else [])]


def measure(model: str, folder: Path, num_images: int, num_held_out: int) -> dict:
    """Draw the library, make a book from part of it, and suggest keywords for the rest."""
    rng, references = random.Random(0), {}
    counts = Counter()
    for index in range(num_images):
        image, keywords = draw_example(rng)
        own = folder / ("held_out" if index < num_held_out else "library")
        own.mkdir(exist_ok=True)
        image.save(own / f"{index:03}.jpg", quality=90)
        if index < num_held_out:
            references[str(own / f"{index:03}.jpg")] = keywords
        else:
            entries = "".join(f"<rdf:li>{escape(keyword)}</rdf:li>" for keyword in keywords)
            (own / f"{index:03}.jpg.xmp").write_text(SIDECAR.format(entries), encoding="utf-8")
            counts.update(keywords)
    start = time.perf_counter()
    run("index", folder / "library", "--model", model)
    seconds = time.perf_counter() - start
    lines = run(
        "tag",
        "--model",
        model,
        "--book",
        folder / "library",
        "--threshold",
        0,
        "--max-tags",
        5,
        "--json",
        folder / "held_out",
    )
    suggested = {row["file"]: [tag["tag"] for tag in row["tags"]] for row in map(json.loads, lines.splitlines())}
    frequent = [keyword for keyword, _ in counts.most_common(5)]
    total = sum(map(len, references.values()))
    hits = sum(keyword in suggested[path] for path, keywords in references.items() for keyword in keywords)
    by_frequency = sum(keyword in frequent for keywords in references.values() for keyword in keywords)
    return {
        "images": num_images - num_held_out,
        "keywords": len(counts),
        "held_out_images": num_held_out,
        "held_out_keywords": total,
        "among_first_five": hits,
        "among_first_five_percent": round(100 * hits / total, 1),
        "five_most_frequent_percent": round(100 * by_frequency / total, 1),
        "index_seconds": round(seconds, 1),
    }


def run(*words: object) -> str:
    """Run `optsg` and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = optsg([str(word) for word in words])
    if status:
        raise RuntimeError(f"optsg {words[0]} exited with status {status}.")
    return output.getvalue()


def main() -> None:
    """Write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/optsg-icon-small", help="folder or Hub name of the model")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.model, Path(folder), NUM_IMAGES, NUM_HELD_OUT)
    result |= {"model": Path(args.model).name} | environment()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
