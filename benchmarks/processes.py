r"""Train the same run with one, two and four processes, with micro-batches and streamed, and compare the losses.

    python benchmarks/processes.py --output results/training/processes.json

The global batch is the same in all runs, in fp32 and without dropout. Random choices for an example follow from its
own seed: which of its tags are used if there are more than prompts, and in the runs "with draws" and "streamed" its
attention mask, its empty slots, the hidden modality and the dropped memory tokens. Sampled tokens of the vocabulary
follow from the step. The processes communicate by gloo. They share the cores, so the runs say nothing about speed.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import small_run

from modeling_optsg.evaluation.reporting import environment

PLAIN = {
    "dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0, "modality_dropout": 0.0,
    "parallel_ratio": 1.0, "pad_slot_ratio": 1.0, "num_sampled_tokens": 0,
}  # fmt: skip
# Those of the shipped configurations, and dropout of memory tokens.
DRAWS = {
    "parallel_ratio": 0.75, "pad_slot_ratio": 0.25, "num_sampled_tokens": 40, "modality_dropout": 0.15,
    "memory_token_dropout": 0.1,
}  # fmt: skip
# Name -> number of processes, and arguments ("machines": the number of launchers).
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
GROUPS = ("streamed", "with negatives", "with draws")
# Run -> the run it is compared with.
EXPECTED = {run: next((f"{group}, one" for group in GROUPS if run.startswith(group)), "one") for run in RUNS}
TOLERANCE = 1e-4
CONFIGURATION = small_run.TRAIN.parent / "accelerate/ddp_2x8.yaml"


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def train(folder: Path, name: str, steps: int, batch_size: int, examples: int) -> tuple[list[dict], bool]:
    """Train a run; return the rows of its log, and whether its processes divided the reading of a stream."""
    processes, more = RUNS[name]
    more = dict(more)
    config, machines = PLAIN | more.pop("config_overrides", {}), more.pop("machines", 1)
    settings = {
        "train_batch_size": batch_size,
        "num_train_epochs": steps * batch_size / examples,
        "logging_steps": 1,
        "eval_steps": steps,
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
        output_file = (folder / f"machine-{machine}.txt").open("w+")
        running.append((subprocess.Popen(command, env=own, stdout=output_file, stderr=output_file), output_file))
    texts = []
    for process, output_file in running:
        process.wait()
        output_file.seek(0)
        texts.append(output_file.read())
    if any(process.returncode for process, _ in running):
        raise SystemExit(f"{name}: " + "\n".join(text[-3000:] for text in texts))
    rows = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    return rows, any("Each process reads stream shards of its own" in text for text in texts)


def differences(expected: list[dict], found: list[dict]) -> dict[str, float]:
    """Return the largest relative difference of each loss over the steps."""
    if len(expected) != len(found):
        raise SystemExit(f"{len(found)} steps instead of {len(expected)}.")
    names = [name for name in expected[0] if name.endswith("loss")]
    return {name: max(abs(f[name] / e[name] - 1) for e, f in zip(expected, found)) for name in names}


def main() -> None:
    """Train all runs, write the result file and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    # The batch size does not divide the epoch: the last examples of an epoch share a step with the next one.
    examples, batch_size = 150, 16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_run.make(folder, examples, max_tags=12)
        wanted = dict.fromkeys([*(EXPECTED[run] for run in arguments.runs), *arguments.runs])
        found = {run: train(folder, run, arguments.steps, batch_size, examples) for run in wanted}
    rows = {run: own for run, (own, _) in found.items()}
    divided = [run for run, (_, is_divided) in found.items() if is_divided]
    found = {run: differences(rows[EXPECTED[run]], own) for run, own in rows.items() if run != EXPECTED[run]}
    result = {
        "steps": arguments.steps,
        "batch_size": batch_size,
        "examples": examples,
        "first_and_last_loss": {run: [own[0]["loss"], own[-1]["loss"]] for run, own in rows.items()},
        "reading_divided": divided,
        "largest_relative_difference": found,
    }
    print(json.dumps(result, indent=1, allow_nan=False))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    if any(value > TOLERANCE for run in found.values() for value in run.values()):
        raise SystemExit(f"Losses differ by more than {TOLERANCE}.")


if __name__ == "__main__":
    main()
