r"""Measure what `--group_by_length` saves in training time, and how it changes the validation metrics.

    python benchmarks/length_groups.py --output results/training/length_groups.json

Step times are measured on synthetic examples with short titles, like those of icons, and with long ones, like those of
videos. Grouped and random steps take turns, with the model of `training_throughput.py`. The metrics come from
`examples/train.py` on a quarter of icon-tagging. The runs with and without groups share the machine, a thread each.
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

from modeling_optsg import train_tag_tokenizer
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.training import GlobalBatches, gather_candidates, global_loss_weights, weighted_losses

ROOT = Path(__file__).resolve().parent.parent
# Maximum length of titles like those of icons, and like those of videos.
TITLE_TOKENS = (8, 64)
EXAMPLES, BATCH, SKIPPED = 4096, 64, 3
METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")


def step_times(max_title_tokens: int) -> dict:
    """Measure the steps of an epoch in each order."""
    examples = training_throughput.make_examples(max_title_tokens, EXAMPLES)
    tokenizer = train_tag_tokenizer((tag for example in examples for tag in example["tags"]), 4000)
    accelerator, model, optimizer, table, collate = training_throughput.make_training(20, tokenizer)
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
            batch = collate([{**examples[i], "example_index": i, "example_seed": i} for i in chosen]).inputs
            gather_candidates(accelerator, model.config, [batch], table)
            (weights,) = global_loss_weights(accelerator, model.config, [batch])
            accelerator.backward(weighted_losses(model.config, model(**batch), weights)["loss"])
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


def train(folder: Path, seed: int, arguments: list[str]) -> dict:
    """Train with and without groups; return validation metrics and training times."""
    runs = {}
    for name, grouped in (("random", False), ("grouped", True)):
        command = [sys.executable, str(ROOT / "examples/train.py"), "--seed", str(seed), *arguments]
        command += ["--group_by_length", str(grouped), "--output_dir", str(folder / f"{name}-{seed}")]
        output = (folder / f"{name}-{seed}.txt").open("w")
        own = os.environ | {"OMP_NUM_THREADS": "1"}
        runs[name] = subprocess.Popen(command, env=own, stdout=output, stderr=output)
    found = {}
    for name, run in runs.items():
        if run.wait():
            raise SystemExit(f"{name}, seed {seed}: {(folder / f'{name}-{seed}.txt').read_text()[-3000:]}")
        summary = json.loads((folder / f"{name}-{seed}" / "training_summary.json").read_text(encoding="utf-8"))
        metrics = next(iter(summary["fits"].values()))["validation"]
        found[name] = {metric: metrics[metric] for metric in METRICS}
        found[name]["training_seconds"] = summary["training_seconds"]
    return found


def main() -> None:
    """Measure the steps, train with each seed and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--config", default=str(ROOT / "examples/configs/optsg-icon-small.json"))
    parser.add_argument("--train_ratio", default="0.25")
    parser.add_argument("--num_train_epochs", default="10")
    arguments = parser.parse_args()
    train_arguments = [
        "--config",
        arguments.config,
        "--train_ratio",
        arguments.train_ratio,
        "--num_train_epochs",
        arguments.num_train_epochs,
    ]
    torch.set_num_threads(1)
    times = {}
    for max_tokens in TITLE_TOKENS:
        times[f"titles of 3 to {max_tokens} tokens"] = step_times(max_tokens)
        print(times, flush=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            found[f"seed {seed}"] = train(Path(folder), seed, train_arguments)
            print(found, flush=True)
    result = {
        "examples": EXAMPLES,
        "batch_size": BATCH,
        "steps": times,
        "train_ratio": float(arguments.train_ratio),
    }
    result |= {"num_train_epochs": float(arguments.num_train_epochs), "validation": found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
