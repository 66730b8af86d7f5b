r"""Whether steps of examples with titles of like length (`--group_by_length`) pay: the time they save, and what the model
is worth after them.

    python benchmarks/length_groups.py --output results/training/length_groups.json

Times are of steps on made-up examples, of an icon's short titles and of a video's long ones: each grouped step follows a
random one, with the model of [`training_throughput.py`]. The trainings are `examples/train.py` on a quarter of
icon-tagging, two at a time on a thread each, one with groups and one without.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import training_throughput

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from score import environment  # noqa: E402

from modeling_optsg import train_tag_tokenizer
from modeling_optsg.training import GlobalBatches, gather_candidates, global_loss_weights, weighted_losses

ROOT = Path(__file__).resolve().parent.parent
# Of an icon's name, and of a video's description.
TITLE_TOKENS = (8, 64)
EXAMPLES, BATCH, SKIPPED = 4096, 64, 3
METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")


def step_times(max_title_tokens: int) -> dict:
    """Of an epoch in each order."""
    examples = training_throughput.make_examples(max_title_tokens, EXAMPLES)
    tokenizer = train_tag_tokenizer((tag for example in examples for tag in example["tags"]), 4000)
    accelerator, model, optimizer, table, collate = training_throughput.trained(20, tokenizer)
    lengths = [len(example["title_features"]) for example in examples]
    steps = EXAMPLES // BATCH
    orders = {
        name: iter(GlobalBatches(EXAMPLES, BATCH, steps, seed=0, lengths=own))
        for name, own in (("random", None), ("grouped", lengths))
    }
    times, tokens = {name: [] for name in orders}, dict.fromkeys(orders, 0)
    for step in range(steps):
        for name, order in orders.items():
            chosen = [example for example, _ in next(order)]
            began = time.perf_counter()
            batch = collate([{**examples[i], "example_index": i, "example_seed": i} for i in chosen]).batch
            gather_candidates(accelerator, model.config, [batch], table)
            (shares,) = global_loss_weights(accelerator, model.config, [batch])
            accelerator.backward(weighted_losses(model.config, model(**batch), shares)["loss"])
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step >= SKIPPED:
                times[name].append(time.perf_counter() - began)
                tokens[name] += max(lengths[i] for i in chosen) * BATCH
    return {
        "title_padding_saved": round(1 - tokens["grouped"] / tokens["random"], 3),
        "step_seconds": {name: round(statistics.mean(own), 4) for name, own in times.items()},
        "time_saved": round(1 - sum(times["grouped"]) / sum(times["random"]), 3),
    }


def trained(folder: Path, seed: int, others: list[str]) -> dict:
    """Validation metrics and training time with groups and without."""
    runs = {}
    for name, grouped in (("random", False), ("grouped", True)):
        command = [sys.executable, str(ROOT / "examples/train.py"), "--seed", str(seed), *others]
        command += ["--group_by_length", str(grouped), "--output_dir", str(folder / f"{name}-{seed}")]
        told = (folder / f"{name}-{seed}.txt").open("w")
        own = os.environ | {"OMP_NUM_THREADS": "1"}
        runs[name] = subprocess.Popen(command, env=own, stdout=told, stderr=told)
    found = {}
    for name, run in runs.items():
        if run.wait():
            raise SystemExit(f"{name}, seed {seed}: {(folder / f'{name}-{seed}.txt').read_text()[-3000:]}")
        summary = json.loads((folder / f"{name}-{seed}" / "training_summary.json").read_text(encoding="utf-8"))
        metrics = next(iter(summary["fits"].values()))["validation"]
        found[name] = {figure: metrics[figure] for figure in METRICS}
        found[name]["training_seconds"] = summary["training_seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--config", default=str(ROOT / "examples/configs/optsg-icon-small.json"))
    parser.add_argument("--train_ratio", default="0.25")
    parser.add_argument("--num_train_epochs", default="10")
    arguments = parser.parse_args()
    others = [
        "--config",
        arguments.preset,
        "--train_ratio",
        arguments.train_ratio,
        "--num_train_epochs",
        arguments.epochs,
    ]
    torch.set_num_threads(1)
    times = {}
    for most in TITLE_TOKENS:
        times[f"titles of 3 to {most} tokens"] = step_times(most)
        print(times, flush=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            found[f"seed {seed}"] = trained(Path(folder), seed, others)
            print(found, flush=True)
    result = {
        "examples": EXAMPLES,
        "train_batch_size": BATCH,
        "steps": times,
        "train_ratio": float(arguments.train_ratio),
    }
    result |= {"num_train_epochs": float(arguments.epochs), "validation": found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
