r"""Run distributed strategies and precisions that `accelerate` reserves for GPUs on a CPU, and compare the losses.

    python benchmarks/distributed_strategies_on_cpu.py --output results/training/distributed_strategies_on_cpu.json

"fsdp, …" is `examples/train.py` under FSDP2 on gloo, launched with `examples/accelerate/fsdp_8.yaml` and two processes
instead of eight; "deepspeed, …" is the same under `deepspeed_zero2_8.yaml`, left out where DeepSpeed is not installed.
"bf16, …" and "fp16, …" use torch's autocast, "fp16, …" also the gradient scaler; all other runs are in fp32.
"overflowing" starts with a scale that is too large and lets it grow into overflows again and again. `accelerate` is
patched to allow this on a CPU (`patch_accelerate`); nothing else is changed. There is no dropout. Runs "resumed" are
stopped by SIGTERM and resumed with the same command.
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

from modeling_optsg.evaluation.reporting import environment

CONFIGURATIONS = small_run.TRAIN.parent / "accelerate"
FSDP, ZERO = "fsdp_8.yaml", "deepspeed_zero2_8.yaml"
# Maximum relative difference of the loss in 16 bits from that in 32.
HALF_TOLERANCE = 0.03
HALF, BRAIN = {"mixed_precision": "fp16"}, {"mixed_precision": "bf16"}
# Settings of the scaler: a scale that fits the gradient, and one that is too large and soon grows again.
SCALER, TOO_LARGE = {"init_scale": 2.0**10}, {"init_scale": 2.0**24, "growth_interval": 5}
# Name -> configuration of accelerate, arguments, and whether the run is interrupted.
RUNS = {
    "one": (None, {}, False),
    "fp16, one": (None, HALF, False),
    "fp16, one, in parts of 5": (None, HALF | {"per_device_train_batch_size": 5}, False),
    "fp16, overflowing": (None, HALF, False),
    "fp16, overflowing, resumed": (None, HALF, True),
    "fsdp, two": (FSDP, {}, False),
    "fsdp, two, in parts of 3": (FSDP, {"per_device_train_batch_size": 3}, False),
    "fsdp, two, resumed": (FSDP, {}, True),
    "fp16, overflowing, fsdp, two": (FSDP, HALF, False),
    "fp16, fsdp, two": (FSDP, HALF, False),
    "bf16, one": (None, BRAIN, False),
    "bf16, fsdp, two": (FSDP, BRAIN, False),
    "bf16, deepspeed, two": (ZERO, BRAIN, False),
    "deepspeed, two": (ZERO, {}, False),
    "deepspeed, two, in parts of 3": (ZERO, {"per_device_train_batch_size": 3}, False),
    "deepspeed, two, resumed": (ZERO, {}, True),
}
# Run -> the run it is compared with.
EXPECTED = {run: "fp16, overflowing" if run.startswith("fp16, overflowing, ") else "one" for run in RUNS}
EXAMPLES, BATCH_SIZE = 150, 16


def patch_accelerate() -> None:
    """Make accelerate treat processes on a CPU like processes on GPUs."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if (scaler := os.environ.get("SCALER")) is not None:
        initialize = Accelerator.__init__

        def with_scaler(self: Accelerator, *args: object, **kwargs: object) -> None:
            initialize(self, *args, **kwargs)
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", **json.loads(scaler))

        Accelerator.__init__ = with_scaler

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.NO)
        return
    initialize_state = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: object, fsdp_plugin: object = None, **kwargs: object) -> None:
        initialize_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def run(folder: Path, name: str, steps: int) -> tuple[list[dict], int | None]:
    """Train a run; return the rows of its log, and the step after which it was resumed, if it was."""
    configuration, more, is_interrupted = RUNS[name]
    own, launcher = small_run.environment(), ()
    if more.get("mixed_precision") == "fp16":
        own |= {"SCALER": json.dumps(TOO_LARGE if "overflowing" in name else SCALER, allow_nan=False)}
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
        "eval_steps": steps,
    }
    output = folder / name.replace(" ", "_")
    command = small_run.command(folder, output, launcher, PLAIN, **settings, learning_rate=2e-3, **more)
    log, after = output / "training_log.jsonl", None
    with (folder / "output.txt").open("w+") as output_file:
        for stop in (True, False) if is_interrupted else (False,):
            process = subprocess.Popen(
                command, env=own, stdout=output_file, stderr=output_file, start_new_session=True
            )
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
    """Train all runs, write the result file and compare."""
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
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        small_run.make(folder, EXAMPLES, max_tags=12)
        rows, after, weights = {}, {}, {}
        for name in wanted:
            rows[name], after[name] = run(folder, name, arguments.steps)
            weights[name] = load_file(folder / name.replace(" ", "_") / "model.safetensors")
    compared = {name: EXPECTED[name] for name in rows if name in arguments.runs and EXPECTED[name] != name}
    result = {
        "steps": arguments.steps,
        "batch_size": BATCH_SIZE,
        "examples": EXAMPLES,
        "first_and_last_loss": {name: [own[0]["loss"], own[-1]["loss"]] for name, own in rows.items()},
        "resumed_after_step": {name: step for name, step in after.items() if step is not None},
        "largest_relative_difference": {name: differences(rows[one], rows[name]) for name, one in compared.items()},
        "largest_difference_of_a_weight": {
            name: max((weights[one][key] - tensor).abs().max().item() for key, tensor in weights[name].items())
            for name, one in compared.items()
        },
    }
    print(json.dumps(result, indent=1, allow_nan=False))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        described = environment()
        described["versions"] |= versions
        arguments.output.write_text(json.dumps(result | described, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, found in result["largest_relative_difference"].items():
        # A run that overflows skips steps, so only its resumption can be compared.
        if name == "fp16, overflowing":
            continue
        if name.startswith(("fp16", "bf16")) and not RUNS[name][2]:
            found, tolerance = {"loss": found["loss"]}, HALF_TOLERANCE
        else:
            tolerance = TOLERANCE
        if max(found.values()) > tolerance:
            raise SystemExit(f"{name}: losses differ by more than {tolerance}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--under_accelerate"]:
        patch_accelerate()
        sys.argv = sys.argv[2:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
