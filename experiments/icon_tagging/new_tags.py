r"""Measures whether a book makes tags usable that the model was not trained on.

    python -m experiments.icon_tagging.new_tags --output experiments/icon_tagging/results/new_tags.json

200 random tags of the test split are new. Training examples with one of them are left out. A model and a book reader
are trained on the others, and their book is fitted on the validation split, without the new tags. Then the examples
that were left out are added to the book; nothing is trained or fitted again. F1 on the test split:

- `new_tags`: the mean over the new tags;
- `other_tags`: the mean over all other evaluated tags.

Both are measured `before` the examples are added, when they are added `with new tags only`, and `after` they are added
with all their tags. The examples also improve their other tags, so `with new tags only` shows what new tags cost.

The training is shorter than in the comparison. Checkpoints that are already in `--work_dir` are not trained
again.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from dataset_scripts import load_tagging_dataset
from experiments.icon_tagging.recipe import BF16, CONFIG, FIRST_PHASE, SECOND_PHASE, in_fast_precision, run_folder
from experiments.icon_tagging.runs import Benchmark, Run, make_parser, train, write_result
from experiments.icon_tagging.tag_book import OPERATING_POINTS, BookExperiment, book_examples
from modeling_optsg import TagEvaluator
from modeling_optsg.book import TagBook, embed_examples
from modeling_optsg.evaluation.reporting import environment

NUM_NEW_TAGS = 200
# The number of training examples of a new tag. Leaving out frequent tags would leave few training examples.
MIN_COUNT, MAX_COUNT = 5, 50
# The images of other drawings have the new tags, too.
ARGUMENTS = {"extra_images": "none", "image_warmup_epochs": 2, "num_train_epochs": 6} | BF16
SECOND_ARGUMENTS = {"model_type": "op-tsg"} | SECOND_PHASE | {"num_train_epochs": 5}


def choose_new_tags(train_tags: Sequence[Sequence[str]], test_tags: Sequence[Sequence[str]], seed: int) -> list[str]:
    """Choose random tags that the test split has and `MIN_COUNT` to `MAX_COUNT` training examples have."""
    counts = Counter(tag for tags in train_tags for tag in set(tags))
    in_test = {tag for tags in test_tags for tag in tags}
    tags = sorted(tag for tag in in_test if MIN_COUNT <= counts[tag] <= MAX_COUNT)
    return sorted(np.random.default_rng(seed).choice(tags, NUM_NEW_TAGS, replace=False).tolist())


def write_dataset(splits: dict[str, Dataset], new_tags: set[str], folder: Path) -> Dataset:
    """Write the splits without the new tags as Parquet, and return the training examples that have one.

    The test split keeps the new tags.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_new = np.array([bool(new_tags & set(tags)) for tags in splits["train"]["tags"]])
    validation = splits["validation"].map(lambda row: {"tags": [tag for tag in row["tags"] if tag not in new_tags]})
    validation = validation.select([row for row, tags in enumerate(validation["tags"]) if tags])
    parts = {"train": splits["train"].select(np.flatnonzero(~has_new)), "validation": validation}
    for name, rows in (parts | {"test": splits["test"]}).items():
        if not (path := folder / f"{name}.parquet").exists():
            rows.to_parquet(f"{path}.partial")
            os.replace(f"{path}.partial", path)
    return splits["train"].select(np.flatnonzero(has_new))


def train_model(folder: Path, work_dir: Path, cache_dir: Path, seed: int) -> Run:
    """Train the tag classifier and then the model on a folder, and return the model."""
    first, second = run_folder(FIRST_PHASE, work_dir, seed), run_folder("op-tsg", work_dir, seed)
    phases = {
        first: {"model_type": FIRST_PHASE},
        second: SECOND_ARGUMENTS | {"classifier_checkpoint": first},
    }
    for output, arguments in phases.items():
        if not (output / "training_summary.json").exists():
            arguments = {"dataset": folder, "seed": seed} | in_fast_precision(ARGUMENTS) | arguments
            words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
            train(["--config", CONFIG, *words], output, cache_dir)
    return Run.load(second)


def score(experiment: BookExperiment, book: TagBook, evaluators: dict[str, TagEvaluator], with_reader: bool) -> dict:
    """Return the mean F1 of each group of tags, and the micro F1 over all tags."""
    kept = experiment.predict_test(book, with_reader=with_reader)
    scores = {name: evaluator.score(kept) for name, evaluator in evaluators.items()}
    return {name: own["full_f1"] for name, own in scores.items()} | {"micro_f1": scores["other_tags"]["micro_f1"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Train the model, score it with both books, and write the result file."""
    parser = make_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/new_tags"), help="folder of the checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new tags and of the training runs")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    splits = load_tagging_dataset(arguments.dataset)
    references = splits["test"]["tags"][:]
    new_tags = choose_new_tags(splits["train"]["tags"][:], references, arguments.seed)
    folder = arguments.work_dir / f"data-seed{arguments.seed}"
    left_out = write_dataset(splits, set(new_tags), folder)
    run = train_model(folder, arguments.work_dir, arguments.cache_dir, arguments.seed)
    experiment = BookExperiment(run, Benchmark(str(folder), arguments.cache_dir))
    counts = Benchmark(arguments.dataset, arguments.cache_dir).train_counts
    groups = {
        "new_tags": {tag: counts[tag] for tag in new_tags},
        "other_tags": {tag: count for tag, count in counts.items() if tag not in set(new_tags)},
    }
    evaluators = {name: TagEvaluator(references, group) for name, group in groups.items()}
    added = book_examples(left_out)
    only_new = added.map(lambda row: {"tags": [tag for tag in row["tags"] if tag in groups["new_tags"]]})
    queries = embed_examples(run.model, run.processor, experiment.features(left_out))
    result = {"new_tags": new_tags, "seed": arguments.seed, "reader": experiment.train_reader(), "scores": {}}
    result |= {"examples": {"train": len(experiment.examples), "added": len(left_out)}}
    for metric in OPERATING_POINTS:
        for row, with_reader in (("model and book", False), ("op-tsg-open-book", True)):
            book, validation = experiment.fit_book(metric, experiment.queries, with_reader=with_reader)
            scores = {"validation": validation, "before": score(experiment, book, evaluators, with_reader)}
            for name, examples in (("with new tags only", only_new), ("after", added)):
                book.add_examples(examples, queries)
                scores[name] = score(experiment, book, evaluators, with_reader)
                book.remove_examples(examples["id"][:])
            result["scores"].setdefault(metric, {})[row] = scores
            print(metric, row, json.dumps(scores, allow_nan=False), flush=True)
    write_result(result | environment(), arguments.output)


if __name__ == "__main__":
    main()
