r"""Says where a checkpoint loses: which tags it misses and why, and what oracles would reach.

    python examples/diagnose.py --checkpoint checkpoints/optsg-icon-small \
        --output results/icon_tagging/recipe/diagnosis.json

All metrics are of the validation examples (losses of training examples too), in parallel decoding. An image of the misses
is written beside the JSON.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from score import environment
from tqdm.auto import tqdm

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGDataCollator, OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.data.feature_cache import CachedFeatures, build_tag_table, cache_tower_features
from modeling_optsg.tag_alignment import match_prompts_to_tags

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# What became of a ground-truth tag, the first that holds.
FATES = {
    "found": "written, above the threshold",
    "novel": "of no training example",
    "too unlikely": "a candidate, below the threshold",
    "another was written": "some slot's alignment has it first, and the slot wrote another tag",
    "[PAD] won": "some slot's alignment has it first but for [PAD]",
    "no slot": "no slot's alignment has it first",
}
COUNTS = (0, 1, 2, 3, 5, 10, 25, 100)
METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dataset", default="icon_tagging")
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser())
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--train_examples", type=int, default=1024, help="training examples whose loss is looked at")
    return parser.parse_args()


def batches(examples, collate, size: int, columns: tuple[str, ...], tag_sets: list[list[str]]):
    for start in tqdm(range(0, len(examples), size), leave=False):
        rows = range(start, min(start + size, len(examples)))
        batch = [{name: examples[row][name] for name in columns} | {"tags": tag_sets[row]} for row in rows]
        yield rows, collate(batch)


def losses(model, examples, tag_sets, table, processor, size: int) -> dict[str, float]:
    """Mean generation and alignment loss without dropout; tags that are in no training example are left out."""
    known = [[tag for tag in tags if tag in table.index] for tags in tag_sets]
    rows = [row for row, tags in enumerate(known) if tags]
    collate = OPTSGDataCollator(processor, table)
    subset, own = torch.utils.data.Subset(examples, rows), [known[row] for row in rows]
    sums = Counter()
    for part, batch in batches(subset, collate, size, ("frame_features", "title_features"), own):
        outputs = model(**batch)
        for name in ("generation_loss", "alignment_loss", "classifier_loss"):
            if outputs.get(name) is not None:
                sums[name] += outputs[name].item() * len(part)
    return {name: round(total / len(rows), 4) for name, total in sums.items()}


class Slots:
    """What the slots of every validation example wrote, proposed and were aligned to."""

    def __init__(self, model, processor, examples, table, size: int):
        self.candidates, self.written, self.aligned, self.aligned_but_for_pad, self.similarity = [], [], [], [], []
        collate = OPTSGDataCollator(processor)
        tag_features = table.features.float()
        for start in tqdm(range(0, len(examples), size), leave=False):
            rows = range(start, min(start + size, len(examples)))
            names = ("frame_features", "title_features")
            batch = collate([{name: examples[row][name] for name in names} for row in rows])
            outputs = model.generate(**batch, threshold=0.0, output_slots=True)
            for tags in processor.batch_decode(outputs):
                self.candidates.append({tag["tag"]: tag["score"] for tag in tags})
            first = outputs.slot_tokens[:, :, 0]
            empty = outputs.pad_margins <= 0
            for example, example_empty in zip(first, empty.tolist()):
                texts = processor.tag_tokenizer.batch_decode(example, skip_special_tokens=True)
                self.written.append([None if e or not t else t for t, e in zip(texts, example_empty)])
            logits = model.tag_alignment.similarity(model(**batch).order_prompts, tag_features)
            self.similarity.append(logits.half())
            best = logits[..., :-1].argmax(dim=-1)
            wins = logits[..., :-1].amax(dim=-1) > logits[..., -1]
            for example_best, example_wins in zip(best.tolist(), wins.tolist()):
                tags = [table.tags[index] for index in example_best]
                self.aligned.append([tag if won else None for tag, won in zip(tags, example_wins)])
                self.aligned_but_for_pad.append(tags)
        self.similarity = torch.cat(self.similarity)


def fate(slots: Slots, example: int, tag: str, threshold: float, counts: Counter) -> str:
    score = slots.candidates[example].get(tag)
    if score is not None and score >= threshold:
        return "found"
    if not counts[tag]:
        return "novel"
    if score is not None:
        return "too unlikely"
    if tag in slots.aligned[example]:
        return "another was written"
    return "[PAD] won" if tag in slots.aligned_but_for_pad[example] else "no slot"


def best_at(evaluator: TagEvaluator, predictions: list[dict[str, float]], threshold: float = 0.0) -> dict[str, float]:
    rows = [[{"tag": tag, "score": score} for tag, score in row.items()] for row in predictions]
    metrics = evaluator.score(rows, threshold)
    return {name: metrics[name] for name in METRICS}


def matched_oracle(slots: Slots, references, table) -> list[dict[str, float]]:
    """Each example's tags of which the matching finds a slot that has the tag first in its alignment, but for [PAD] and
    for tags matched to other slots: what decoding would write if every slot wrote the tag it is aligned to."""
    found = []
    for example, tags in enumerate(references):
        labels = torch.tensor([[table.index[tag] for tag in tags if tag in table.index]])
        similarity = slots.similarity[example : example + 1].float()
        labels = labels[:, : similarity.shape[1]]
        own = {}
        if labels.numel():
            for slot, label in enumerate(match_prompts_to_tags(similarity, labels)[0].tolist()):
                if label >= 0 and similarity[0, slot, :-1].argmax().item() == label:
                    own[table.tags[label]] = 1.0
        found.append(own)
    return found


def diagnose(arguments) -> dict:
    dataset = load_tagging_dataset(arguments.dataset)
    model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint).eval()
    processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
    cached = arguments.cache_dir / "features"
    chosen = np.random.default_rng(0).permutation(len(dataset["train"]))[: arguments.train_examples]
    some_of_train = dataset["train"].select(chosen)
    train, validation = (
        CachedFeatures(cache_tower_features(split, model.model, processor, cached))
        for split in (some_of_train, dataset["validation"])
    )
    counts = Counter(tag for tags in dataset["train"]["tags"] for tag in set(tags))
    encoded = processor.tag_tokenizer(sorted(counts), add_special_tokens=False)["input_ids"]
    known = [tag for tag, ids in zip(sorted(counts), encoded) if len(ids) <= processor.max_tag_tokens]
    table = build_tag_table(known, model.model, processor, cached)
    references = [list(dict.fromkeys(tags)) for tags in dataset["validation"]["tags"]]
    evaluator = TagEvaluator(references, counts)
    settings = model.generation_config.threshold
    threshold = settings["parallel"] if isinstance(settings, dict) else settings or 0.0
    slots = Slots(model, processor, validation, table, arguments.batch_size)

    tags = sorted({tag for row in references for tag in row})
    lengths = dict(
        zip(tags, (len(ids) for ids in processor.tag_tokenizer(tags, add_special_tokens=False)["input_ids"]))
    )
    by_count, by_length, total = {}, {}, Counter()
    for example, row in enumerate(references):
        for tag in row:
            what = fate(slots, example, tag, threshold, counts)
            total[what] += 1
            group = max(start for start in COUNTS if counts[tag] >= start)
            by_count.setdefault(group, Counter())[what] += 1
            by_length.setdefault(min(lengths[tag], 5), Counter())[what] += 1
    same = [len(own) - len(set(own)) for own in ([tag for tag in row if tag is not None] for row in slots.written)]
    written = sum(tag is not None for row in slots.written for tag in row)
    decoded = processor.tag_tokenizer.batch_decode(
        processor.tag_tokenizer(tags, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )
    as_many = [
        dict(sorted(row.items(), key=lambda pair: -pair[1])[: len(own)])
        for row, own in zip(slots.candidates, references)
    ]
    right = [{t: s for t, s in row.items() if t in set(own)} for row, own in zip(slots.candidates, references)]
    every = [{tag: 1.0 for tag in row if counts[tag]} for row in references]
    aligned = [{tag: 1.0 for tag in row if tag is not None} for row in slots.aligned]
    return {
        "checkpoint": arguments.checkpoint,
        "threshold": threshold,
        "fates": FATES,
        "tags": dict(total),
        "by_training_count": {str(start): dict(by_count[start]) for start in sorted(by_count)},
        "by_tokens": {str(length): dict(by_length[length]) for length in sorted(by_length)},
        "slots_that_repeat_another": {"written": written, "repeats": sum(same)},
        "lost_to_the_tag_tokenizer": sum(tag != text for tag, text in zip(tags, decoded)),
        "validation": {
            "as it is": best_at(evaluator, slots.candidates, threshold),
            "slots write what they are aligned to": best_at(evaluator, aligned),
            "oracle: as many tags as there are": best_at(evaluator, as_many),
            "oracle: each matched slot that is aligned to its tag writes it": best_at(
                evaluator, matched_oracle(slots, references, table)
            ),
            "oracle: all candidates that are right": best_at(evaluator, right),
            "oracle: every tag of the training examples": best_at(evaluator, every),
        },
        "losses": {
            "training examples": losses(model, train, some_of_train["tags"], table, processor, arguments.batch_size),
            "validation examples": losses(model, validation, references, table, processor, arguments.batch_size),
        },
    } | environment()


def draw(found: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    titles = {
        "by_training_count": "training examples of the tag, at least",
        "by_tokens": "tokens of the tag (5: or more)",
    }
    for axis, (key, title) in zip(axes, titles.items()):
        groups = found[key]
        bottom = np.zeros(len(groups))
        for name in FATES:
            heights = np.array([100 * g.get(name, 0) / sum(g.values()) for g in groups.values()])
            axis.bar(list(groups), heights, bottom=bottom, label=name)
            bottom += heights
        axis.set(xlabel=title)
    axes[0].set(ylabel="% of the ground-truth tags")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_arguments()
    with torch.no_grad():
        found = diagnose(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, arguments.output.with_suffix(".png"))
    print(json.dumps({name: found[name] for name in ("tags", "validation", "losses")}, indent=1))


if __name__ == "__main__":
    main()
