r"""Fine-tunes a checkpoint with `TagTrainer` in one process, in two, and from a stream, and as `optsg train` does.

    python -m benchmarks.trainer_launchers --output results/trainer_launchers.json

The training images are 200 drawn scenes, and the validation images are 100 others: with fewer, luck decides which
checkpoint and threshold are chosen. All runs have the same global batches, steps, learning rates and weights at the
start, those of `optsg train`. Two processes communicate by gloo, and each has half of every batch. The stream is read
by two processes as well. The towers are frozen, and their features are computed once. The best model has the highest
Full F1 of the tags that it generates for the validation images. Its settings are fitted on them, and it is scored on
300 other scenes.

So that the losses can be equal, nothing is random but the choices that follow from the seed of an example: dropout is
0, and the softmax is over all tokens. Two processes add up in another order, so rounding differs, and training makes
every difference grow. The launchers are therefore compared in double precision. Adam's epsilon is 1e-5 there: with the
default of 1e-8, weights with nearly no gradient move by the direction of a rounding error. `optsg train` and one
process are compared in single precision with the default, with three seeds. Runs that are in the output file already
are skipped.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from benchmarks.own_data import draw_scenes
from modeling_optsg import (
    OPTSGDataCollator,
    OPTSGForTagGeneration,
    OPTSGProcessor,
    OPTSGTrainer,
    OPTSGTrainingArguments,
    TagEvaluator,
    TagMetrics,
    TagTrainer,
    fit_generation_config,
    predict_tags,
    prepare_for_fine_tuning,
)
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.training.sampling import GlobalBatches


@dataclasses.dataclass(frozen=True)
class Run:
    """How to train: `TagTrainer` in a number of processes, or else as `optsg train` does."""

    seed: int = 0
    num_processes: int | None = None
    is_streamed: bool = False
    is_double: bool = False


SEEDS = 3
LAUNCHERS = {
    "one process": Run(num_processes=1, is_double=True),
    "two processes": Run(num_processes=2, is_double=True),
    "streamed, two processes": Run(num_processes=2, is_streamed=True, is_double=True),
}
RUNS = (
    LAUNCHERS
    | {f"optsg train, seed {seed}": Run(seed) for seed in range(SEEDS)}
    | {f"TagTrainer, seed {seed}": Run(seed, num_processes=1) for seed in range(SEEDS)}
)
FIXED = {
    "dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0, "modality_dropout": 0.0,
    "num_sampled_tokens": 0,
}  # fmt: skip
NUM_TRAIN, NUM_VALIDATION, NUM_TEST, BATCH_SIZE = 200, 100, 300, 16
LOSSES = "losses.json"
TOLERANCE = 1e-4


class OrderedExamples(MapDataset):
    """The examples of all steps, in the order and with the seeds of `optsg train`."""

    def __init__(self, rows: CachedFeatures, steps: int, seed: int):
        self.rows = rows
        self.order = [pair for batch in GlobalBatches(len(rows), BATCH_SIZE, steps, seed) for pair in batch]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict:
        index, seed = self.order[position]
        return self.rows[index] | {"example_seed": seed}


class StreamedExamples(IterableDataset):
    """The same examples as a stream."""

    def __init__(self, examples: OrderedExamples):
        self.examples = examples

    def __iter__(self) -> Iterator[dict]:
        return (self.examples[position] for position in range(len(self.examples)))


def draw_splits() -> tuple[Dataset, Dataset, Dataset]:
    """Return training, validation and test images."""
    return draw_scenes(NUM_TRAIN, "train 0"), draw_scenes(NUM_VALIDATION, "validation"), draw_scenes(NUM_TEST, "test")


def encode(rows: Dataset, model: OPTSGForTagGeneration, processor: OPTSGProcessor, folder: Path) -> CachedFeatures:
    """Return the features of images, computed once for all runs."""
    return CachedFeatures(cache_tower_features(rows, model.model, processor, folder / "features"))


def train(name: str, checkpoint: str, folder: Path, steps: int, rows: tuple[Dataset, Dataset]) -> None:
    """Fine-tune a checkpoint in this process, one of those of the run.

    Args:
        name: One of `RUNS`.
        checkpoint: The checkpoint.
        folder: Gets the best model with its fitted settings, and the loss of each step.
        steps: Number of steps.
        rows: Training and validation examples.
    """
    run = RUNS[name]
    model = OPTSGForTagGeneration.from_pretrained(checkpoint, **FIXED)
    processor = OPTSGProcessor.from_pretrained(checkpoint)
    training, validation = (encode(own, model, processor, folder.parent) for own in rows)
    set_seed(run.seed)
    tag_table = prepare_for_fine_tuning(model, processor, rows[0]["tags"], training)
    if run.is_double:
        model.double()
        torch.set_default_dtype(torch.float64)
        # Losses are computed in single precision, also in half precision.
        torch.Tensor.float = torch.Tensor.double
    examples = OrderedExamples(training, steps, run.seed)
    args = TrainingArguments(
        str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH_SIZE // run.num_processes,
        learning_rate=6e-4, lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.05, adam_beta2=0.98,
        adam_epsilon=1e-5 if run.is_double else 1e-8, train_sampling_strategy="sequential", eval_strategy="steps",
        save_strategy="steps", eval_steps=0.2, save_steps=0.2, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="full_f1", logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
        seed=run.seed,
    )  # fmt: skip
    trainer = TagTrainer(
        model, args, data_collator=OPTSGDataCollator(processor, tag_table, num_negatives=2000),
        train_dataset=StreamedExamples(examples) if run.is_streamed else examples, eval_dataset=validation,
        compute_metrics=TagMetrics(processor), generate_kwargs={"pad_bias": -1.0},
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        evaluator = TagEvaluator(rows[1]["tags"], processor.label_vocabulary)
        fit_generation_config(model, processor, validation, evaluator, decoding="parallel", progress=False)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (folder / LOSSES).write_text(json.dumps(losses, allow_nan=False), encoding="utf-8")


def train_in_processes(name: str, checkpoint: str, folder: Path, steps: int) -> list[float]:
    """Call [`train`] in the processes of a run."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(RUNS[name].num_processes),
    ]
    command += ["-m", "benchmarks.trainer_launchers", "--launched", name, "--checkpoint", checkpoint]
    command += ["--steps", str(steps), "--output", str(folder)]
    subprocess.run(command, check=True)
    return json.loads((folder / LOSSES).read_text(encoding="utf-8"))


def train_with_own_trainer(
    seed: int, checkpoint: str, folder: Path, steps: int, rows: tuple[Dataset, Dataset]
) -> None:
    """Fine-tune a checkpoint as `optsg train` does, for the same number of steps."""
    args = OPTSGTrainingArguments(
        str(folder), checkpoint=checkpoint, cache_dir=str(folder.parent), train_batch_size=BATCH_SIZE,
        num_train_epochs=steps * BATCH_SIZE / len(rows[0]), config_overrides=json.dumps(FIXED, allow_nan=False),
        seed=seed,
    )  # fmt: skip
    OPTSGTrainer(args=args, train_dataset=rows[0], eval_dataset=rows[1]).train()


def score(folder: Path, test: Dataset) -> dict[str, float]:
    """Return the test metrics of a model with its fitted settings."""
    model, processor = (part.from_pretrained(folder) for part in (OPTSGForTagGeneration, OPTSGProcessor))
    metrics = TagEvaluator(test["tags"], processor.label_vocabulary).score(
        predict_tags(
            model, processor, encode(test, model, processor, folder.parent), decoding="parallel", progress=False
        )
    )
    return {name: metrics[name] for name in ("full_f1", "micro_f1", "tags_per_example")}


def compare(expected: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Return the largest difference of two loss curves, and the number of steps until a difference above 1e-4."""
    differences = [abs(own - wanted) for wanted, own in zip(expected, found, strict=True)]
    equal_steps = next((step for step, difference in enumerate(differences) if difference > TOLERANCE), len(expected))
    return {"equal_steps": equal_steps, "largest_difference": float(f"{max(differences):.1e}")}


def main(argv: Sequence[str] | None = None) -> None:
    """Train all runs, or one of the processes of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/optsg-icon-small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--launched", choices=RUNS, help="train this run in the processes of the launcher")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    splits = draw_splits()
    if arguments.launched:
        train(arguments.launched, arguments.checkpoint, arguments.output, arguments.steps, splits[:2])
        return
    output = arguments.output
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if output.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        for run, settings in RUNS.items():
            if run in runs:
                continue
            folder, start = Path(name, run.replace(" ", "-")), time.perf_counter()
            folder.mkdir()
            if settings.num_processes:
                curve = {"losses": train_in_processes(run, arguments.checkpoint, folder, arguments.steps)}
            else:
                train_with_own_trainer(settings.seed, arguments.checkpoint, folder, arguments.steps, splits[:2])
                curve = {}
            seconds = round(time.perf_counter() - start, 1)
            runs[run] = {"seconds": seconds, **score(folder, splits[2])} | curve
            print(run, json.dumps(runs[run], allow_nan=False), flush=True)
            _write(arguments, runs)
    _write(arguments, runs)


def _write(arguments: argparse.Namespace, runs: dict[str, dict]) -> None:
    """Write the runs so far, and their differences."""
    expected = runs.get("one process", {}).get("losses")
    for run, found in runs.items():
        if expected and run in LAUNCHERS and run != "one process":
            found |= compare(expected, found["losses"])
    result = {"checkpoint": arguments.checkpoint, "steps": arguments.steps, "batch_size": BATCH_SIZE, "runs": runs}
    for trainer in ("optsg train", "TagTrainer"):
        scores = [found["full_f1"] for run, found in runs.items() if run.startswith(f"{trainer}, seed")]
        if len(scores) == SEEDS:
            result[f"{trainer}, mean full_f1"] = round(statistics.mean(scores), 2)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
