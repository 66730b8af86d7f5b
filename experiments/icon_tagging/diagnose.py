r"""Finds where a checkpoint misses tags, and what oracles would reach.

    python -m experiments.icon_tagging.diagnose --checkpoint checkpoints/optsg-icon-small \
        --output experiments/icon_tagging/results/diagnosis.json

All metrics are those of the validation split with parallel decoding; losses are those of training examples too. A
plot of the missed tags is written next to the result file. Without `--checkpoint` the program only draws the plot of
an existing file again.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel

from experiments.icon_tagging.runs import F1_METRICS, Benchmark, Run, make_parser, write_result
from modeling_optsg import OPTSGDataCollator, TagEvaluator
from modeling_optsg.base_models import OPTSGTowers
from modeling_optsg.data.collator import TagTable
from modeling_optsg.data.feature_cache import FEATURE_COLUMNS, build_tag_table
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.generation_settings import MODALITIES
from modeling_optsg.tag_alignment import match_prompts_to_tags
from modeling_optsg.training.pretrained_towers import tower_folder

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

# What happened to a tag of the ground truth; the first one that applies counts.
FATES = {
    "found": "predicted",
    "novel": "missed, and not a training tag",
    "below the threshold": "a candidate that is too improbable",
    "another generated": "most similar to some slot, which generated another tag",
    "[PAD] preferred": "most similar to some slot after [PAD]",
    "no slot": "not most similar to any slot",
}
TRAINING_COUNTS = (0, 1, 2, 3, 5, 10, 25, 100)
MAX_TOKENS = 5
LOSSES = ("generation_loss", "alignment_loss", "classifier_loss")


@dataclass
class Slots:
    """What the slots of all validation examples generated, and which tags they are most similar to.

    Args:
        candidates: For each example the probability of every candidate tag.
        generated: For each example the tag of each slot, `None` for [PAD].
        nearest: For each example the training tag that each slot is most similar to.
        prefers_pad: For each example whether each slot is more similar to [PAD] than to any tag.
        similarity: `[examples, num_prompts, training tags + 1]`, half precision; the last column is [PAD].
    """

    candidates: list[dict[str, float]] = field(default_factory=list)
    generated: list[list[str | None]] = field(default_factory=list)
    nearest: list[list[str]] = field(default_factory=list)
    prefers_pad: list[list[bool]] = field(default_factory=list)
    similarity: torch.Tensor | None = None

    def aligned(self, example: int) -> list[str]:
        """Return the tags that the slots of an example are aligned to, without those aligned to [PAD]."""
        return [tag for tag, is_pad in zip(self.nearest[example], self.prefers_pad[example]) if not is_pad]

    def fate(self, example: int, tag: str, threshold: float, train_counts: Mapping[str, int]) -> str:
        """Return which of `FATES` a tag of the ground truth has."""
        score = self.candidates[example].get(tag)
        if score is not None and score >= threshold:
            return "found"
        if not train_counts.get(tag):
            return "novel"
        if score is not None:
            return "below the threshold"
        if tag in self.aligned(example):
            return "another generated"
        return "[PAD] preferred" if tag in self.nearest[example] else "no slot"


def batches(run: Run, examples: Sequence[Mapping], batch_size: int, **collator: object) -> Iterator[dict]:
    """Yield collated batches of examples with tower features."""
    collate = OPTSGDataCollator(run.processor, **collator)
    for start in tqdm(range(0, len(examples), batch_size), leave=False):
        rows = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        yield collate([{name: row[name] for name in (*FEATURE_COLUMNS, "tags") if name in row} for row in rows])


@torch.no_grad()
def read_slots(run: Run, examples: Sequence[Mapping], table: TagTable, batch_size: int) -> Slots:
    """Generate with the slots of all examples, and compare their prompts with all training tags."""
    slots, similarities, tag_features = Slots(), [], table.features.float()
    inputs = [{name: example[name] for name in FEATURE_COLUMNS} for example in examples]
    for batch in batches(run, inputs, batch_size):
        outputs = run.model.generate(**batch, decoding="parallel", threshold=0.0, output_slots=True)
        for tags in run.processor.batch_decode(outputs):
            slots.candidates.append({tag["tag"]: tag["score"] for tag in tags})
        for tokens, is_pad in zip(outputs.slot_tokens[:, :, 0], (outputs.pad_margins <= 0).tolist()):
            texts = run.processor.tag_tokenizer.batch_decode(tokens, skip_special_tokens=True)
            slots.generated.append([None if pad or not text else text for text, pad in zip(texts, is_pad)])
        similarity = run.model.tag_alignment.similarity(run.model(**batch).order_prompts, tag_features)
        best, nearest = similarity[..., :-1].max(dim=-1)
        slots.nearest += [[table.tags[index] for index in example] for example in nearest.tolist()]
        slots.prefers_pad += (best <= similarity[..., -1]).tolist()
        similarities.append(similarity.half())
    slots.similarity = torch.cat(similarities)
    return slots


@torch.no_grad()
def mean_losses(run: Run, examples: Sequence[Mapping], table: TagTable, batch_size: int) -> dict[str, float]:
    """Return the mean losses without dropout. Tags that are not training tags are left out."""
    known = [{**example, "tags": [tag for tag in example["tags"] if tag in table.index]} for example in examples]
    known = [example for example in known if example["tags"]]
    sums = Counter()
    for batch in batches(run, known, batch_size, tag_table=table):
        outputs = run.model(**batch)
        for name in LOSSES:
            if outputs.get(name) is not None:
                sums[name] += outputs[name].item() * len(batch["labels"])
    return {name: round(total / len(known), 4) for name, total in sums.items()}


def matched_tags(slots: Slots, references: Sequence[Sequence[str]], table: TagTable) -> list[dict[str, float]]:
    """Return the tags that are most similar to the very slot that the matching assigns to them.

    Decoding would predict them if each slot generated the tag that it is most similar to.
    """
    found = []
    for example, tags in enumerate(references):
        similarity = slots.similarity[example : example + 1].float()
        labels = torch.tensor([[table.index[tag] for tag in tags if tag in table.index]])
        labels = labels[:, : similarity.shape[1]]
        matched = match_prompts_to_tags(similarity, labels)[0].tolist() if labels.numel() else []
        nearest = slots.nearest[example]
        found.append({table.tags[label]: 1.0 for tag, label in zip(nearest, matched) if table.index[tag] == label})
    return found


def score_oracles(
    slots: Slots, references: Sequence[Sequence[str]], evaluator: TagEvaluator, table: TagTable, threshold: float
) -> dict[str, dict[str, float]]:
    """Return the metrics of the predictions and of what would be predicted if a part made no mistakes."""

    def score(predictions: Sequence[Mapping[str, float]], threshold: float = 0.0) -> dict[str, float]:
        rows = [[{"tag": tag, "score": score} for tag, score in row.items()] for row in predictions]
        metrics = evaluator.score(rows, threshold)
        return {name: metrics[name] for name in F1_METRICS}

    pairs = list(zip(slots.candidates, references))
    best = [dict(sorted(row.items(), key=lambda pair: -pair[1])[: len(tags)]) for row, tags in pairs]
    correct = [{tag: score for tag, score in row.items() if tag in set(tags)} for row, tags in pairs]
    known = [{tag: 1.0 for tag in tags if evaluator.train_counts.get(tag)} for tags in references]
    aligned = [dict.fromkeys(slots.aligned(example), 1.0) for example in range(len(references))]
    return {
        "predictions": score(slots.candidates, threshold),
        "every slot predicts the tag it is aligned to": score(aligned),
        "oracle: the right number of tags": score(best),
        "oracle: tags of the slots matched and aligned to them": score(matched_tags(slots, references, table)),
        "oracle: every correct candidate": score(correct),
        "oracle: every training tag": score(known),
    }


def count_fates(
    run: Run, slots: Slots, references: Sequence[Sequence[str]], train_counts: Mapping[str, int], threshold: float
) -> dict:
    """Count what happened to the tags of the ground truth: in all, by training count and by number of tokens."""
    tags = sorted({tag for row in references for tag in row})
    encoded = run.processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    num_tokens = {tag: min(len(ids), MAX_TOKENS) for tag, ids in zip(tags, encoded)}
    total, by_count, by_tokens = Counter(), {}, {}
    for example, row in enumerate(references):
        for tag in row:
            fate = slots.fate(example, tag, threshold, train_counts)
            group = max(count for count in TRAINING_COUNTS if train_counts.get(tag, 0) >= count)
            total[fate] += 1
            by_count.setdefault(group, Counter())[fate] += 1
            by_tokens.setdefault(num_tokens[tag], Counter())[fate] += 1
    decoded = run.processor.tag_tokenizer.batch_decode(encoded)
    generated = [[tag for tag in row if tag is not None] for row in slots.generated]
    return {
        "tags": dict(total),
        "by_training_count": {str(group): dict(by_count[group]) for group in sorted(by_count)},
        "by_tokens": {str(length): dict(by_tokens[length]) for length in sorted(by_tokens)},
        "slots": {
            "generated": sum(map(len, generated)),
            "repeated": sum(len(row) - len(set(row)) for row in generated),
        },
        "not_restored_by_the_tag_tokenizer": sum(tag != text for tag, text in zip(tags, decoded)),
    }


def diagnose(run: Run, benchmark: Benchmark, checkpoint: str, batch_size: int, num_train_examples: int) -> dict:
    """Return the diagnosis of a run, as it is written to the result file."""
    train, validation = benchmark.splits["train"], benchmark.splits["validation"]
    train = train.select(np.random.default_rng(0).permutation(len(train))[:num_train_examples])
    train_examples = list(benchmark.with_features(train, run))
    validation_examples = list(benchmark.with_features(validation, run))
    counts, tags = benchmark.train_counts, sorted(benchmark.train_counts)
    encoded = run.processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"]
    tags = [tag for tag, ids in zip(tags, encoded) if len(ids) <= run.processor.max_tag_tokens]
    # In training, the features of tags are those of the pretrained text tower.
    towers = OPTSGTowers(run.model.config)
    towers.text_tower = AutoModel.from_pretrained(
        tower_folder(run.arguments["text_tower"], benchmark.cache_dir / "towers")
    )
    table = build_tag_table(tags, towers, run.processor, benchmark.cache_dir / "features")
    threshold = run.model.generation_config.threshold
    if isinstance(threshold, dict):
        threshold = threshold["parallel"]
    if isinstance(threshold, dict):
        threshold = threshold[MODALITIES[0]]
    slots = read_slots(run, validation_examples, table, batch_size)
    references = [list(dict.fromkeys(row)) for row in validation["tags"]]
    evaluator = benchmark.evaluator("validation")
    return {
        "checkpoint": checkpoint,
        "threshold": threshold,
        "fates": FATES,
        **count_fates(run, slots, references, counts, threshold),
        "validation": score_oracles(slots, references, evaluator, table, threshold),
        "losses": {
            "training examples": mean_losses(run, train_examples, table, batch_size),
            "validation examples": mean_losses(run, validation_examples, table, batch_size),
        },
    } | environment()


def plot(diagnosis: Mapping, path: Path) -> None:
    """Plot what happened to tags, by their training count and by their number of tokens."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
    labels = {
        "by_training_count": "training examples of the tag (lower end of each group)",
        "by_tokens": f"tokens of the tag ({MAX_TOKENS}: or more)",
    }
    for axes, (key, label) in zip(panels, labels.items()):
        groups = diagnosis[key]
        bottom = np.zeros(len(groups))
        for fate in FATES:
            heights = np.array([100 * group.get(fate, 0) / sum(group.values()) for group in groups.values()])
            axes.bar(list(groups), heights, bottom=bottom, label=fate)
            bottom += heights
        axes.set(xlabel=label)
    panels[0].set(ylabel="% of the ground-truth tags")
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Diagnose the checkpoint of the command line, and write the result file and its plot."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_train_examples", type=int, default=1024, help="training examples for the losses")
    arguments = parser.parse_args(argv)
    if arguments.checkpoint is None:
        diagnosis = json.loads(arguments.output.read_text(encoding="utf-8"))
    else:
        run = Run.load(arguments.checkpoint)
        benchmark = Benchmark(arguments.dataset, arguments.cache_dir)
        limits = (arguments.batch_size, arguments.num_train_examples)
        diagnosis = diagnose(run, benchmark, arguments.checkpoint.as_posix(), *limits)
        write_result(diagnosis, arguments.output)
        print(
            json.dumps({name: diagnosis[name] for name in ("tags", "validation", "losses")}, indent=1, allow_nan=False)
        )
    plot(diagnosis, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
