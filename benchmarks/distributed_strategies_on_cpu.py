r"""Runs what `accelerate` keeps for GPUs on a CPU, and compares losses step by step: the model divided between two
processes, and fp16.

    python benchmarks/distributed_strategies_on_cpu.py --output results/training/distributed_strategies_on_cpu.json

"fsdp, …" is `examples/train.py` under FSDP2 on gloo, launched with `examples/accelerate/fsdp_8.yaml` and two processes
instead of eight; "deepspeed, …" is the same under `deepspeed_zero2_8.yaml`, left out where DeepSpeed is not installed.
"bf16, …" is torch's autocast, and "fp16, …" too, with its gradient scaler: "overflowing" with a scale so large that it
must be lowered, and that grows into overflows again and again; others are in fp32. `accelerate` is told that it may
(`tell_accelerate`); nothing else is changed. There is no dropout. Runs "gone on" are stopped by SIGTERM on the way and
started again with the same command.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import small_run
import torch
from processes import PLAIN, TOLERANCE, differences
from safetensors.torch import load_file

sys.path.insert(0, str(small_run.TRAIN.parent))
from score import environment  # noqa: E402

CONFIGURATIONS = small_run.TRAIN.parent / "accelerate"
FSDP, ZERO = "fsdp_8.yaml", "deepspeed_zero2_8.yaml"
# How far the loss in 16 bits may be from that in 32.
HALF_TOLERANCE = 0.03
HALF, BRAIN = {"mixed_precision": "fp16"}, {"mixed_precision": "bf16"}
# The scaler's first scale, one that the gradient bears or one that is too large, and steps until it grows.
SCALER, TOO_LARGE = {"init_scale": 2.0**10}, {"init_scale": 2.0**24, "growth_interval": 5}
# Name -> configuration of accelerate, arguments, and whether it is stopped on the way.
RUNS = {
    "one": (None, {}, False),
    "fp16, one": (None, HALF, False),
    "fp16, one, in parts of 5": (None, HALF | {"per_device_train_batch_size": 5}, False),
    "fp16, overflowing": (None, HALF, False),
    "fp16, overflowing, gone on": (None, HALF, True),
    "fsdp, two": (FSDP, {}, False),
    "fsdp, two, in parts of 3": (FSDP, {"per_device_train_batch_size": 3}, False),
    "fsdp, two, gone on": (FSDP, {}, True),
    "fp16, overflowing, fsdp, two": (FSDP, HALF, False),
    "fp16, fsdp, two": (FSDP, HALF, False),
    "bf16, one": (None, BRAIN, False),
    "bf16, fsdp, two": (FSDP, BRAIN, False),
    "bf16, deepspeed, two": (ZERO, BRAIN, False),
    "deepspeed, two": (ZERO, {}, False),
    "deepspeed, two, in parts of 3": (ZERO, {"per_device_train_batch_size": 3}, False),
    "deepspeed, two, gone on": (ZERO, {}, True),
}
# What each is compared with.
EXPECTED = {run: "fp16, overflowing" if run.startswith("fp16, overflowing, ") else "one" for run in RUNS}
EXAMPLES, BATCH_SIZE = 150, 16


def tell_accelerate() -> None:
    """Processes on a CPU are to `accelerate` what they would be on GPUs."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if (scaler := os.environ.get("SCALER")) is not None:
        begin = Accelerator.__init__

        def scaled(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", **json.loads(scaler))

        Accelerator.__init__ = scaled

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.NO)
        return
    prepare = AcceleratorState.__init__

    def divided(self, *args, fsdp_plugin=None, **kwargs):
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = divided


def run(folder: Path, name: str, steps: int) -> tuple[list[dict], int | None]:
    """The log of a run, and the step after which it went on; its checkpoint stays in the folder."""
    configuration, more, stopped = RUNS[name]
    own, launcher = small_run.environment(), ()
    if more.get("mixed_precision") == "fp16":
        own |= {"SCALER": json.dumps(TOO_LARGE if "overflowing" in name else SCALER)}
        launcher = (sys.executable, __file__, "--under_accelerate")
    if configuration is not None:
        launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
        launcher += (str(CONFIGURATIONS / configuration), "--num_processes", "2", "--mixed_precision", "no")
        launcher += ("--main_process_port", "0", __file__, "--under_accelerate")
        own |= {"ACCELERATE_USE_CPU": "true"} if configuration == FSDP else {"DS_ACCELERATOR": "cpu"}
    settings = {
        "train_batch_size": BATCH_SIZE,
        "num_train_epochs": steps * BATCH_SIZE / EXAMPLES,
        "logging_steps": 1,
        "eval_steps": 0.99,
    }
    output = folder / name.replace(" ", "_")
    command = small_run.command(folder, output, launcher, PLAIN, **settings, learning_rate=2e-3, **more)
    log, after = output / "training_log.jsonl", None
    with (folder / "output.txt").open("w+") as told:
        for stop in (True, False) if stopped else (False,):
            process = subprocess.Popen(command, env=own, stdout=told, stderr=told, start_new_session=True)
            while stop and process.poll() is None:
                if log.exists() and len(log.read_bytes().splitlines()) >= steps // 4:
                    os.killpg(process.pid, signal.SIGTERM)
                    break
                time.sleep(0.002)
            failed = process.wait()
            status = json.loads((output / "state/status.json").read_text())
            if stop and status["status"] == "interrupted":
                after = status["step"]
            elif stop or failed:
                raise SystemExit(f"{name}: {status} {(folder / 'output.txt').read_text()[-3000:]}")
    return [json.loads(line) for line in log.read_text().splitlines()], after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    versions = {"accelerate": importlib.metadata.version("accelerate")}
    wanted = dict.fromkeys([*(EXPECTED[run] for run in arguments.runs), *arguments.runs])
    if importlib.util.find_spec("deepspeed") is None:
        wanted = [name for name in wanted if RUNS[name][0] != ZERO]
    else:
        versions["deepspeed"] = importlib.metadata.version("deepspeed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_run.make(folder, EXAMPLES, most_tags=12)
        rows, after, weights = {}, {}, {}
        for way in wanted:
            rows[way], after[way] = run(folder, way, arguments.steps)
            weights[way] = load_file(folder / way.replace(" ", "_") / "model.safetensors")
    compared = {way: EXPECTED[way] for way in rows if way in arguments.runs and EXPECTED[way] != way}
    result = {
        "steps": arguments.steps,
        "train_batch_size": BATCH_SIZE,
        "examples": EXAMPLES,
        "first_and_last_loss": {way: [own[0]["loss"], own[-1]["loss"]] for way, own in rows.items()},
        "gone_on_after_step": {way: step for way, step in after.items() if step is not None},
        "largest_relative_difference": {way: differences(rows[one], rows[way]) for way, one in compared.items()},
        "largest_difference_of_a_weight": {
            way: max((weights[one][name] - tensor).abs().max().item() for name, tensor in weights[way].items())
            for way, one in compared.items()
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        told = environment()
        told["versions"] |= versions
        arguments.output.write_text(json.dumps(result | told, indent=1) + "\n", encoding="utf-8")
    for way, found in result["largest_relative_difference"].items():
        # A run that overflows passes over steps, and has its own way; exact is how it goes on.
        if way == "fp16, overflowing":
            continue
        if way.startswith(("fp16", "bf16")) and not RUNS[way][2]:
            found, tolerance = {"loss": found["loss"]}, HALF_TOLERANCE
        else:
            tolerance = TOLERANCE
        if max(found.values()) > tolerance:
            raise SystemExit(f"{way}: losses differ by more than {tolerance}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--under_accelerate"]:
        tell_accelerate()
        sys.argv = sys.argv[2:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
