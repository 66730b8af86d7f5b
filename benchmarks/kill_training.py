r"""Kill a training many times, and compare its result with that of an uninterrupted one.

    python benchmarks/kill_training.py --kills 20 --streamed_kills 8 --output results/training/kills.json

SIGKILL is sent at a random moment after training has begun; every fourth time while a state is being saved. The same
command is then started again. The final weights, the losses in the log and the fitted settings must be equal to those
of the uninterrupted run, bit for bit. The second run streams its examples with two workers.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TextIO

import small_run

from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.training.run_lock import LOCK_NAME

SAVE_STEPS = 5


def result_of(output: Path) -> dict:
    """Return a hash of the weights, the losses of all steps and the fitted settings of a finished run."""
    rows = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    losses = [[row["step"], row["loss"]] for row in rows]
    fingerprint = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    fits = json.loads((output / "training_summary.json").read_text())["fits"]
    return {"weights": fingerprint, "losses": losses, "fits": fits}


def kill_run(command: list[str], output: Path, kills: int, max_seconds: float, log: TextIO) -> list[dict]:
    """Kill a command `kills` times, then let it finish.

    Args:
        command: The command.
        output: Output folder of the run.
        kills: Number of kills.
        max_seconds: Maximum time between the first step and a kill.
        log: File for the output of the command.

    Returns:
        For each kill the folders of states that were left, and whether one was incomplete.
    """
    state, generator, found = output / "state", random.Random(0), []
    while True:
        status = state / "status.json"
        # Left by the previous run.
        status.unlink(missing_ok=True)
        process = subprocess.Popen(
            command, env=small_run.environment(), stdout=log, stderr=log, start_new_session=True
        )
        if len(found) == kills:
            if process.wait():
                raise SystemExit(f"The last run ended with {process.returncode}.")
            return found
        # Before the first step there is nothing to resume.
        while process.poll() is None and not (status.exists() and "running" in status.read_text()):
            time.sleep(0.01)
        wait_for_state = len(found) % 4 == 3
        deadline = time.monotonic() + (30 if wait_for_state else generator.uniform(0, max_seconds))
        while process.poll() is None and time.monotonic() < deadline:
            if wait_for_state and list(state.glob("*.partial")):
                time.sleep(generator.uniform(0, 0.01))
                break
            time.sleep(0.0005)
        if process.poll() is not None:
            raise SystemExit(f"The run ended with {process.returncode} before kill {len(found) + 1}.")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        states = sorted(path.name for path in state.glob("step-*"))
        found.append({"states": states, "while_writing": any(name.endswith(".partial") for name in states)})
        print(len(found), found[-1], flush=True)


def compare(folder: Path, kills: int, max_seconds: float, settings: dict) -> dict:
    """Compare a killed run with an uninterrupted one."""
    uninterrupted = small_run.command(folder, folder / "uninterrupted", **settings)
    done = subprocess.run(uninterrupted, env=small_run.environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    with (folder / "log.txt").open("w") as log:
        command = small_run.command(folder, folder / "killed", **settings)
        found = kill_run(command, folder / "killed", kills, max_seconds, log)
    expected, killed = result_of(folder / "uninterrupted"), result_of(folder / "killed")
    complete = [any(not name.endswith(".partial") for name in kill["states"]) for kill in found]
    return {
        "kills": len(found),
        "while_a_state_was_written": sum(kill["while_writing"] for kill in found),
        "without_a_complete_state": complete.count(False),
        "steps": expected["losses"][-1][0],
        "steps_a_state": SAVE_STEPS,
        "equal": {name: expected[name] == killed[name] for name in expected},
        "left_in_state_folder": sorted(
            path.name for path in (folder / "killed/state").iterdir() if path.name != LOCK_NAME
        ),
    }


def main() -> None:
    """Run both cases and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streamed_kills", type=int, default=0)
    parser.add_argument("--num_train_epochs", type=float, default=60)
    parser.add_argument("--max_seconds", type=float, default=2.0, help="maximum time between first step and kill")
    arguments = parser.parse_args()
    plain = {"num_train_epochs": arguments.num_train_epochs, "save_steps": SAVE_STEPS, "logging_steps": 1}
    streamed = {"streaming": True, "dataloader_num_workers": 2, "shuffle_buffer_size": 60}
    cases = {"map-style": (arguments.kills, plain), "streamed": (arguments.streamed_kills, plain | streamed)}
    result = {}
    for name, (kills, settings) in cases.items():
        if kills:
            with tempfile.TemporaryDirectory() as folder:
                small_run.make(Path(folder))
                result[name] = compare(Path(folder), kills, arguments.max_seconds, settings)
    print(json.dumps(result, indent=1, allow_nan=False))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    if not all(equal for case in result.values() for equal in case["equal"].values()):
        raise SystemExit("The killed run and the uninterrupted run have different results.")


if __name__ == "__main__":
    main()
