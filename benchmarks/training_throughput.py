r"""Measure the speed of training steps for several batch sizes and numbers of prompts.

    python benchmarks/training_throughput.py --output results/training/throughput.json

Reported are examples per second, the ratios of time in the forward and backward pass and in the matching, and the
rate of floating-point operations next to that of plain matrix products. The model has the shape of `optsg-icon-small`
and reads synthetic tower features of icon-tagging's shape, as in a training run with cached towers. A step is that of
`OPTSGTrainer`: fetching and collating, gathering candidates, forward and backward pass, clipping, the optimizer. The
first steps are not counted; times are medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, PreTrainedTokenizerBase

from modeling_optsg import (
    OPTSGConfig,
    OPTSGDataCollator,
    OPTSGFeatureProcessor,
    OPTSGForTagGeneration,
    train_tag_tokenizer,
)
from modeling_optsg import tag_alignment as alignment
from modeling_optsg.data.collator import TagTable
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.training import (
    GlobalBatches,
    SeededExamples,
    SkippingCollator,
    gather_candidates,
    global_loss_weights,
    weighted_losses,
)

ROOT = Path(__file__).resolve().parent.parent
TAGS, EXAMPLES, SKIPPED = 8000, 512, 3
CASES = ((32, 20), (64, 20), (128, 20), (64, 10), (64, 40))


def make_examples(max_title_tokens: int = 8, count: int = EXAMPLES) -> list[dict]:
    """Make examples with 16 image tokens, 3 or more title tokens and about seven tags with a long tail."""
    random = np.random.default_rng(0)
    chances = 1 / np.arange(1, TAGS + 1)
    chances /= chances.sum()
    return [
        {
            "frame_features": random.normal(size=(1, 16, 1280)).astype(np.float32),
            "title_features": random.normal(size=(random.integers(3, max_title_tokens + 1), 384)).astype(np.float32),
            "tags": [f"tag {t}" for t in random.choice(TAGS, size=random.integers(2, 12), replace=False, p=chances)],
        }
        for _ in range(count)
    ]


def matrix_rate() -> float:
    """Return the speed of bf16 matrix products of the model's width, in GFLOP/s."""
    a, b = torch.randn(2048, 256).bfloat16(), torch.randn(256, 1024).bfloat16()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048 * 256 * 1024 / statistics.median(times) / 1e9


class Timer:
    """Replacement for a function that measures its time."""

    def __init__(self, function: Callable):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the function."""
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


def make_training(num_prompts: int, tokenizer: PreTrainedTokenizerBase) -> tuple:
    """Return accelerator, model, optimizer, tag table and collator of a training run."""
    config = json.loads((ROOT / "examples/configs/optsg-icon-small.json").read_text())["config_overrides"]
    torch.manual_seed(0)
    model = OPTSGForTagGeneration(
        OPTSGConfig(
            **(config | {"num_prompts": num_prompts}),
            text_config=BertConfig(hidden_size=384, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64),
            frame_feature_size=1280,
            tag_vocab_size=len(tokenizer),
        )
    )
    names = [f"tag {tag}" for tag in range(TAGS)]
    ids = tokenizer(names, add_special_tokens=False)["input_ids"]
    model.set_label_vocabulary(ids, [1] * TAGS)
    model.set_attn_implementation("eager")
    model.model.text_tower.requires_grad_(False)
    table = TagTable(names, ids, torch.randn(TAGS, 384))
    processor = OPTSGFeatureProcessor(tokenizer, tokenizer, num_prompts=num_prompts, max_tag_tokens=16)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.free_memory()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    return accelerator, model, optimizer, table, SkippingCollator(OPTSGDataCollator(processor, table), [])


def measure(
    batch_size: int, num_prompts: int, steps: int, examples: list[dict], tokenizer: PreTrainedTokenizerBase
) -> dict:
    """Measure the steps of one case."""
    accelerator, model, optimizer, table, collate = make_training(num_prompts, tokenizer)
    order = GlobalBatches(len(examples), batch_size, steps + SKIPPED, seed=0)
    loader = iter(DataLoader(SeededExamples(examples), batch_sampler=order, collate_fn=collate))
    matching = alignment.match_prompts_to_tags = Timer(alignment.match_prompts_to_tags)
    whole, bare, matched = [], [], []
    for _ in range(steps + SKIPPED):
        start = time.perf_counter()
        batches = [next(loader).inputs]
        gather_candidates(accelerator, model.config, batches, table)
        (weights,) = global_loss_weights(accelerator, model.config, batches)
        matching.seconds, before = 0.0, time.perf_counter()
        loss = weighted_losses(model.config, model(**batches[0]), weights)["loss"]
        accelerator.backward(loss)
        bare.append(time.perf_counter() - before)
        matched.append(matching.seconds)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        whole.append(time.perf_counter() - start)
    alignment.match_prompts_to_tags = matching.function
    with FlopCounterMode(display=False) as flops:
        accelerator.backward(model(**batches[0]).loss)
    step = statistics.median(whole[SKIPPED:])
    return {
        "examples_per_second": round(batch_size / step, 1),
        "step_seconds": round(step, 4),
        "of_forward_and_backward_alone": round(statistics.median(bare[SKIPPED:]) / step, 3),
        "matching_ratio": round(statistics.median(matched[SKIPPED:]) / step, 4),
        "gflops": round(flops.get_total_flops() / step / 1e9, 1),
    }


def main() -> None:
    """Measure all cases and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    examples = make_examples()
    tokenizer = train_tag_tokenizer((tag for example in examples for tag in example["tags"]), 4000)
    found = {}
    for batch_size, num_prompts in CASES:
        name = f"batch {batch_size}, {num_prompts} prompts"
        found[name] = measure(batch_size, num_prompts, arguments.steps, examples, tokenizer)
        print(name, found[name], flush=True)
    result = {"steps": arguments.steps, "matrix_products_gflops": round(matrix_rate(), 1), "cases": found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
