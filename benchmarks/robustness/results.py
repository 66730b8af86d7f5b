"""Results of damaged inputs, and the parts that the checks of all kinds have in common."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from optsg import main

from .images import draw
from .jobs import Job, run
from .tiny_model import make_model

# Each of these ends a benchmark with an error. All other outcomes are right.
FAILURES = {
    "traceback": "a Python traceback was shown",
    "hang": "it took more than 10 s",
    "memory": "it took more than 1.5 GB",
    "crash": "the process was ended by a signal",
    "lost neighbour": "an undamaged file was not tagged",
    "not named": "an error or nothing at all, and no line names the file",
    "wrongly refused": "every viewer shows it, but it was refused",
    "wrong pixels": "it was read as other pixels",
    "lost titles": "titles were not used, and no line says so",
    "lost keywords": "what a person wrote is gone",
    "written outside": "a file outside the folder was changed",
    "not repeatable": "a second run did not leave the files as they were",
    "changed files": "a model that cannot be used changed the folder",
    "not refused": "a model that cannot be used was loaded",
    "other result": "a damaged model gave other tags, or a damaged training other weights",
    "lost log": "rows of the log are gone, and no line says so",
    "long error": "an error message is longer than 1,000 characters",
}
MAX_ERROR_CHARACTERS = 1000
GOOD_NAMES = ("0-first.png", "m-middle.jpg", "zz-last.png")


@dataclass(frozen=True)
class Result:
    """The outcome of one damaged input.

    Args:
        kind: Kind of the input, such as "images".
        seed: Its seed.
        damage: Its damage.
        outcome: A key of `FAILURES`, or what was right.
        error: The last line of the error output, if there is any.
        seconds: Time of the slowest command, as in [`Job`].
        peak_bytes: Largest memory of a command.
    """

    kind: str
    seed: int
    damage: str
    outcome: str
    error: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0


class Workplace:
    """A folder for the inputs, a tiny model, and the tags that it gives to undamaged files.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        make_model(self.model)
        self.good = folder / "good"
        self.good.mkdir()
        for number, name in enumerate(GOOD_NAMES):
            draw(random.Random(number)).save(self.good / name)
        job = self.tag("--json", self.good)
        if job.status:
            raise SystemExit(f"The undamaged files cannot be tagged: {job.errors}")
        self.tags = {Path(name).name: tags for name, tags in read_tags(job).items()}
        self.tagged = folder / "tagged"
        self.add_good_files(self.tagged)
        self.tag("--write", "json", self.tagged)

    def tag(self, *args: object, model: Path | None = None, max_seconds: float | None = None) -> Job:
        """Run `optsg tag`."""
        command = ["tag", "--model", str(model or self.model), *map(str, args)]
        return run(lambda: main(command), **({} if max_seconds is None else {"max_seconds": max_seconds}))

    def add_good_files(self, folder: Path) -> None:
        """Copy the undamaged files into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.good.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    def lost_neighbours(self, tags: Mapping[str, list[str] | None]) -> list[str]:
        """Return the undamaged files that have other tags or none.

        Args:
            tags: Tags by path, from [`read_tags`].
        """
        own = {Path(name).name: found for name, found in tags.items()}
        return [name for name in self.tags if own.get(name) != self.tags[name]]


def read_tags(job: Job) -> dict[str, list[str] | None]:
    """Read the output of `optsg tag --json`: the tags of each file, `None` where there is an error."""
    rows = [json.loads(line) for line in job.output.splitlines() if line.startswith("{")]
    return {row["file"]: [tag["tag"] for tag in row["tags"]] if "tags" in row else None for row in rows}


def has_long_error(job: Job) -> bool:
    """Return whether a line of the error output is too long to be read."""
    return any(len(line) > MAX_ERROR_CHARACTERS for line in job.errors.splitlines())


def choose(damages: Mapping[str, Callable], seed: int, weights: Mapping[str, int] | None = None) -> str:
    """Choose the damage of a seed, so that successive seeds have all damages in turn.

    Args:
        damages: Functions by name.
        seed: The seed.
        weights: How often a damage occurs in each turn; once if omitted.
    """
    names = [name for name in damages for _ in range((weights or {}).get(name, 1))]
    return names[seed % len(names)]


def result(kind: str, seed: int, damage: str, outcome: str, *jobs: Job, shown: Job | None = None) -> Result:
    """Return the result of a damaged input; failures of the jobs come before `outcome`.

    Args:
        kind: Kind of the input.
        seed: Its seed.
        damage: Its damage.
        outcome: The outcome if no job has failed by itself.
        jobs: All commands that were run on it.
        shown: The command whose error belongs to `outcome`; the first one if omitted.
    """
    failed = next((job for job in jobs if job.failure), None)
    long = next((job for job in jobs if has_long_error(job)), None)
    if failed is not None:
        outcome = failed.failure
    elif outcome not in FAILURES and long is not None:
        outcome = "long error"
    error = (failed or long or shown or jobs[0]).error[:500]
    seconds, peak_bytes = max(job.seconds for job in jobs), max(job.peak_bytes for job in jobs)
    return Result(kind, seed, damage, outcome, error, seconds, peak_bytes)
