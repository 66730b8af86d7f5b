r"""Kills a training again and again, and compares what it ends with to that of one that was left alone.

    python benchmarks/kill_training.py --kills 20 --streamed_kills 8 --output results/training/kills.json

SIGKILL comes at a random moment after the training has begun; every fourth one as soon as a state is being written.
The same command is started again each time. In the end the weights, the log's losses and the fitted settings must be
those of the run that was not killed, bit for bit. The streamed run, killed after the other, reads its examples by two
workers.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import small_run

sys.path.insert(0, str(small_run.TRAIN.parent))
from score import environment  # noqa: E402

STEPS_A_STATE = 5


def ended_with(output: Path) -> dict:
    rows = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    losses = [[row["step"], row["loss"]] for row in rows]
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    fits = json.loads((output / "training_summary.json").read_text())["fits"]
    return {"weights": digest, "losses": losses, "fits": fits}


def killed_run(command: list[str], output: Path, kills: int, longest: float, log) -> list[dict]:
    """Kills the command so many times, then lets it end."""
    state, chance, found = output / "state", random.Random(0), []
    while True:
        status = state / "status.json"
        # What the run before has left there.
        status.unlink(missing_ok=True)
        process = subprocess.Popen(
            command, env=small_run.environment(), stdout=log, stderr=log, start_new_session=True
        )
        if len(found) == kills:
            if process.wait():
                raise SystemExit(f"The run that was let go ended with {process.returncode}.")
            return found
        # What is before the first step is not what is to be tested.
        while process.poll() is None and not (status.exists() and "running" in status.read_text()):
            time.sleep(0.01)
        wait_for_state = len(found) % 4 == 3
        deadline = time.monotonic() + (30 if wait_for_state else chance.uniform(0, longest))
        while process.poll() is None and time.monotonic() < deadline:
            if wait_for_state and list(state.glob("*.partial")):
                time.sleep(chance.uniform(0, 0.01))
                break
            time.sleep(0.0005)
        if process.poll() is not None:
            raise SystemExit(f"The run ended by itself ({process.returncode}) before its {len(found) + 1}th kill.")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        states = sorted(path.name for path in state.glob("step-*"))
        found.append({"states": states, "while_writing": any(name.endswith(".partial") for name in states)})
        print(len(found), found[-1], flush=True)


def compare(folder: Path, kills: int, longest: float, settings: dict) -> dict:
    """A killed run beside one that was left alone."""
    alone = small_run.command(folder, folder / "alone", **settings)
    done = subprocess.run(alone, env=small_run.environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    with (folder / "log.txt").open("w") as log:
        command = small_run.command(folder, folder / "killed", **settings)
        found = killed_run(command, folder / "killed", kills, longest, log)
    expected, ended = ended_with(folder / "alone"), ended_with(folder / "killed")
    complete = [any(not name.endswith(".partial") for name in kill["states"]) for kill in found]
    return {
        "kills": len(found),
        "while_a_state_was_written": sum(kill["while_writing"] for kill in found),
        "without_a_complete_state": complete.count(False),
        "steps": expected["losses"][-1][0],
        "steps_a_state": STEPS_A_STATE,
        "equal": {name: expected[name] == ended[name] for name in expected},
        "left_in_state_folder": sorted(path.name for path in (folder / "killed/state").iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streamed_kills", type=int, default=0)
    parser.add_argument("--num_train_epochs", type=float, default=60)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds between the first step and a kill")
    arguments = parser.parse_args()
    plain = {"num_train_epochs": arguments.epochs, "save_steps": STEPS_A_STATE, "logging_steps": 1}
    streamed = {"streaming": True, "num_workers": 2, "shuffle_buffer_size": 60}
    cases = {"map-style": (arguments.kills, plain), "streamed": (arguments.streamed_kills, plain | streamed)}
    result = {}
    for name, (kills, settings) in cases.items():
        if kills:
            with tempfile.TemporaryDirectory() as folder:
                small_run.make(Path(folder))
                result[name] = compare(Path(folder), kills, arguments.longest, settings)
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")
    if not all(equal for case in result.values() for equal in case["equal"].values()):
        raise SystemExit("The killed run did not end as the one that was left alone.")


if __name__ == "__main__":
    main()
