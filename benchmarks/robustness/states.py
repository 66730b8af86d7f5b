"""Checks that a training with damaged files ends with the weights of an undamaged one, or names the damaged file."""

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks import small_run
from modeling_optsg.training import RunState
from modeling_optsg.training.trainer import run_command as train

from .byte_damage import BYTE_DAMAGES
from .jobs import Job, run
from .results import Result, Workplace, choose, result

STEPS, STOPPED_AFTER, SAVE_STEPS = 12, 8, 4
TRAINING_SECONDS = 60.0
WEIGHTS, LOG = "model.safetensors", "training_log.jsonl"


class _Training:
    """A finished training, and one that was stopped, on the same data.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        small_run.make(folder, examples=96)
        for name in ("finished", "stopped"):
            job = self.run(folder / name, stop=name == "stopped")
            if job.status:
                raise SystemExit(f"The undamaged training has failed: {job.errors}")
        self.weights = (folder / "finished" / WEIGHTS).read_bytes()
        self.steps = _steps(folder / "finished" / LOG)
        self.newest = max(path.name for path in (folder / "stopped/state").glob("step-*"))

    def run(self, output: Path, stop: bool = False) -> Job:
        """Start or resume a training in an output folder, with a cache of its own; it may stop after a saved state."""
        settings = {"num_train_epochs": 2, "save_steps": SAVE_STEPS, "logging_steps": 1, "eval_steps": 100}
        command = small_run.command(self.folder, output, **settings, cache_dir=output / "cache")
        return run(lambda: _train(command[2:], stop), TRAINING_SECONDS)


@functools.cache
def _undamaged_training(folder: Path) -> _Training:
    folder.mkdir()
    return _Training(folder)


def _train(arguments: list[str], stop: bool) -> int:
    """Train in this process; with `stop`, it ends when a state is saved."""
    if stop:
        save = RunState.save

        def save_and_stop(self: RunState, step: int, *args: object) -> None:
            save(self, step, *args)
            if step == STOPPED_AFTER:
                os._exit(0)

        RunState.save = save_and_stop
    return train(arguments)


def _steps(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]


def _damage_file(path: Path, rng: random.Random) -> str:
    damage = rng.choice(("bits flipped", "cut", "empty", "part zeroed", "missing", "random bytes"))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(BYTE_DAMAGES[damage](path.read_bytes(), rng))
    return f"{path.name} {damage}"


def state_file(output: Path, newest: str, rng: random.Random) -> str:
    """Damage a file of the newest state."""
    files = sorted(path for path in (output / "state" / newest).rglob("*") if path.is_file())
    return _damage_file(rng.choice(files), rng)


def random_states(output: Path, newest: str, rng: random.Random) -> str:
    """Damage the random states of the newest state."""
    return _damage_file(next((output / "state" / newest).glob("random_states*")), rng)


def progress(output: Path, newest: str, rng: random.Random) -> str:
    """Change a value of the progress of the newest state."""
    path = output / "state" / newest / "progress.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    key = rng.choice(sorted(content))
    content[key] = rng.choice((None, -1, "text", [], {}, 10**9))
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    return f"progress.json {key}={content[key]!r}"


def all_states(output: Path, newest: str, rng: random.Random) -> str:
    """Damage the weights of all states."""
    return [_damage_file(path, rng) for path in sorted((output / "state").glob("step-*/*.bin"))][-1]


def training_log(output: Path, newest: str, rng: random.Random) -> str:
    """Damage the log."""
    return _damage_file(output / LOG, rng)


def status(output: Path, newest: str, rng: random.Random) -> str:
    """Damage the status, or write other JSON into it."""
    path = output / "state" / "status.json"
    if rng.random() < 0.5:
        return _damage_file(path, rng)
    path.write_text(rng.choice(("[]", "null", "5", '{"status": 5}', "{}", '{"status": "running", "pid": "x"}')))
    return f"status.json {path.read_text()}"


def feature_cache(output: Path, newest: str, rng: random.Random) -> str:
    """Damage a block of the feature cache."""
    return _damage_file(rng.choice(sorted((output / "cache").rglob("*.arrow"))), rng)


DAMAGES: dict[str, Callable[[Path, str, random.Random], str]] = {
    "file of the newest state": state_file,
    "random states": random_states,
    "progress": progress,
    "files of all states": all_states,
    "log": training_log,
    "status": status,
    "feature cache": feature_cache,
}
# More files than others, and a flipped bit of the weights is the hardest to find.
DAMAGE_WEIGHTS = {"file of the newest state": 3, "feature cache": 2}


def check_state(workplace: Workplace, seed: int) -> Result:
    """Resume a training with the damaged file of a seed."""
    training, damage = _undamaged_training(workplace.folder / "training"), choose(DAMAGES, seed, DAMAGE_WEIGHTS)
    output = workplace.folder / f"state-{seed}"
    shutil.copytree(training.folder / "stopped", output)
    detail = DAMAGES[damage](output, training.newest, random.Random(f"states {seed}"))
    job = training.run(output)
    name = detail.split()[0]
    is_named = name in job.errors or (damage != "log" and training.newest in job.errors)
    if job.status != 0:
        outcome = "refused" if is_named else "not named"
    elif (output / WEIGHTS).read_bytes() != training.weights:
        outcome = "other result"
    elif f"Resuming after step {STOPPED_AFTER} of" not in job.errors:
        outcome = "an earlier state is used" if is_named else "not named"
    elif damage == "log" and _steps(output / LOG) != training.steps:
        outcome = "named" if is_named else "lost log"
    else:
        outcome = "same weights"
    shutil.rmtree(output)
    return result("states", seed, f"{damage}: {detail}", outcome, job)
