r"""Trains the same run with one, two and four processes, in parts, and streamed, and compares losses step by step.

    python benchmarks/processes.py --output results/training/processes.json

The global batch is the same each time. fp32 and no dropout. What is drawn for an example follows from the example's own
seed: which of its tags, more than there are prompts, and in the runs "with draws" and "streamed" its attention mask,
its empty slots, the modality that is hidden and the tokens of its memory; which tokens of the vocabulary, from the
step. Processes talk by gloo. Rates are of two cores that all processes share, so they say nothing of speed.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import small_run

sys.path.insert(0, str(small_run.TRAIN.parent))
from score import environment  # noqa: E402

PLAIN = {
    "dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0, "modality_dropout": 0.0, "parallel_ratio": 1.0,
    "pad_slot_ratio": 1.0, "num_sampled_tokens": 0,
}  # fmt: skip
# Those of the shipped presets, and a dropout of tokens.
DRAWS = {
    "parallel_ratio": 0.75, "pad_slot_ratio": 0.25, "num_sampled_tokens": 40, "modality_dropout": 0.15,
    "memory_token_dropout": 0.1,
}  # fmt: skip
# Name -> processes, and arguments; "machines" is how many launchers have an equal share of the processes.
RUNS = {
    "one": (1, {}),
    "one, in parts of 5": (1, {"per_device_train_batch_size": 5}),
    "two": (2, {}),
    "two, in parts of 3": (2, {"per_device_train_batch_size": 3}),
    "four": (4, {}),
    "four, of two machines": (4, {"machines": 2}),
    "with negatives, one": (1, {"num_negatives": 20}),
    "with negatives, two, in parts of 3": (2, {"num_negatives": 20, "per_device_train_batch_size": 3}),
    "with draws, one": (1, {"config_overrides": DRAWS}),
    "with draws, two": (2, {"config_overrides": DRAWS}),
    "with draws, two, in parts of 3": (2, {"config_overrides": DRAWS, "per_device_train_batch_size": 3}),
    "streamed, one": (1, {"config_overrides": DRAWS, "streaming": True}),
    "streamed, two": (2, {"config_overrides": DRAWS, "streaming": True}),
    "streamed, two, in parts of 3, by two workers": (
        2,
        {"config_overrides": DRAWS, "streaming": True, "per_device_train_batch_size": 3, "dataloader_num_workers": 2},
    ),
    "streamed, four": (4, {"config_overrides": DRAWS, "streaming": True}),
}
WAYS = ("streamed", "with negatives", "with draws")
# What each is compared with.
EXPECTED = {run: next((f"{way}, one" for way in WAYS if run.startswith(way)), "one") for run in RUNS}
TOLERANCE = 1e-4
CONFIGURATION = small_run.TRAIN.parent / "accelerate/ddp_2x8.yaml"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def losses(folder: Path, name: str, steps: int, batch_size: int, examples: int) -> tuple[list[dict], bool]:
    """Rows of the log, and whether the reading of a stream was divided."""
    processes, more = RUNS[name]
    more = dict(more)
    config, machines = PLAIN | more.pop("config", {}), more.pop("machines", 1)
    settings = {
        "train_batch_size": batch_size,
        "num_train_epochs": steps * batch_size / examples,
        "logging_steps": 1,
        "eval_steps": 0.99,
    }
    settings["learning_rate"] = 2e-3
    output = folder / name.replace(" ", "_")
    port = free_port()
    running = []
    for machine in range(machines):
        launcher = ()
        if processes > 1:
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGURATION]
            launcher += ["--num_processes", processes, "--num_machines", machines, "--machine_rank", machine]
            launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--mixed_precision", "no"]
        command = small_run.command(folder, output, tuple(map(str, launcher)), config, **settings, **more)
        own = small_run.environment() | {"ACCELERATE_USE_CPU": "true"}
        told = (folder / f"machine-{machine}.txt").open("w+")
        running.append((subprocess.Popen(command, env=own, stdout=told, stderr=told), told))
    texts = []
    for process, told in running:
        process.wait()
        told.seek(0)
        texts.append(told.read())
    if any(process.returncode for process, _ in running):
        raise SystemExit(f"{name}: " + "\n".join(text[-3000:] for text in texts))
    rows = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    return rows, any("Each process reads shares" in text for text in texts)


def differences(expected: list[dict], found: list[dict]) -> dict[str, float]:
    """The largest relative difference of each loss part over the steps."""
    if len(expected) != len(found):
        raise SystemExit(f"{len(found)} steps instead of {len(expected)}.")
    names = [name for name in expected[0] if name.endswith("loss")]
    return {name: max(abs(f[name] / e[name] - 1) for e, f in zip(expected, found)) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    # Sixteen examples a step and an epoch that they do not divide; the last of an epoch shares a step with the next.
    examples, batch_size = 150, 16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_run.make(folder, examples, most_tags=12)
        wanted = dict.fromkeys([*(EXPECTED[run] for run in arguments.runs), *arguments.runs])
        found = {run: losses(folder, run, arguments.steps, batch_size, examples) for run in wanted}
    rows = {run: own for run, (own, _) in found.items()}
    divided = [run for run, (_, shares) in found.items() if shares]
    found = {run: differences(rows[EXPECTED[run]], own) for run, own in rows.items() if run != EXPECTED[run]}
    result = {
        "steps": arguments.steps,
        "train_batch_size": batch_size,
        "examples": examples,
        "first_and_last_loss": {run: [own[0]["loss"], own[-1]["loss"]] for run, own in rows.items()},
        "reading_divided": divided,
        "largest_relative_difference": found,
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")
    if any(value > TOLERANCE for run in found.values() for value in run.values()):
        raise SystemExit(f"Losses differ by more than {TOLERANCE}.")


if __name__ == "__main__":
    main()
