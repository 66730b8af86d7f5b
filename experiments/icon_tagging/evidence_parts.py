r"""Measures what each part of the evidence is worth when a trained checkpoint tags images.

    python -m experiments.icon_tagging.evidence_parts --checkpoint checkpoints/optsg-icon-small \
        --output experiments/icon_tagging/results/evidence_parts.json

Each part is switched off in turn. The settings of the checkpoint stay, and nothing is trained or fitted again. The
examples are the validation split, and the configuration `unseen` with drawings in styles that no training example has.
They are tagged with image and title, with the image alone, and with the image of another example, which the title
alone is compared with. Images are read from files, because image words need the pixels.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from dataset_scripts import load_tagging_dataset
from experiments.icon_tagging.runs import F1_METRICS, write_result
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.evaluation.prediction import MODALITY_COLUMNS, predict_tags
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.image_words import VisionFeatures

SPLITS = {"unseen": {"config_name": "unseen", "split": "test"}, "validation": {"split": "validation"}}
METRICS = (*F1_METRICS, "tags_per_example")
BOTH, IMAGE, WRONG_IMAGE, TITLE = "image and title", "image alone", "wrong image and title", "title alone"
INPUTS = (BOTH, IMAGE, WRONG_IMAGE, TITLE)
ALL_PARTS, MATCHING, FAMILIAR = "all parts", "match probability 1", "familiarity 1"
NO_STYLE, NO_WORDS = "no style vector", "no image words"
# The inputs that each part changes. Titles alone use none of them, and an image alone needs no gate.
PARTS = {
    ALL_PARTS: INPUTS,
    MATCHING: (BOTH, WRONG_IMAGE),
    FAMILIAR: (BOTH, IMAGE, WRONG_IMAGE),
    NO_STYLE: (BOTH, IMAGE, WRONG_IMAGE),
    NO_WORDS: (IMAGE,),
}


@contextmanager
def without(model: OPTSGForTagGeneration, part: str) -> Iterator[None]:
    """Switch off a part of the evidence.

    Args:
        model: A model with a tag classifier.
        part: One of `PARTS`.

    Raises:
        ValueError: The model does not have this part.
    """
    towers, pooler = model.model, model.model.multimodal_encoder.evidence_pooler
    words, distance = towers.image_words, pooler.standardizer.half_familiar_distance
    if {NO_STYLE: pooler.style, NO_WORDS: words}.get(part, pooler) is None:
        raise ValueError(f"{part}: the checkpoint does not have this part. Give one that has it.")
    fitted = distance.clone()
    with ExitStack() as stack:
        if part == MATCHING:
            stack.enter_context(pooler.gate_outer.register_forward_hook(_return_full(torch.inf)))
        elif part == FAMILIAR:
            # As before the distances are fitted.
            stack.callback(distance.copy_, fitted)
            distance.zero_()
        elif part == NO_STYLE:
            stack.enter_context(pooler.style.register_forward_hook(_return_full(0.0)))
        elif part == NO_WORDS:
            stack.callback(setattr, towers, "image_words", words)
            towers.image_words = None
        yield


def _return_full(value: float) -> Callable:
    return lambda module, arguments, output: torch.full_like(output, value)


def encode_images_once(model: OPTSGForTagGeneration) -> None:
    """Let the vision tower run only once for each image, because no part that is switched off changes its output."""
    encode, known = model.model.encode_frames, {}

    def encode_once(pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None) -> VisionFeatures:
        keys = [hashlib.sha256(pixels.contiguous().numpy()).digest() for pixels in pixel_values]
        if new := [index for index, key in enumerate(keys) if key not in known]:
            features = encode(pixel_values[new], None if frame_mask is None else frame_mask[new])
            parts = [getattr(features, field.name) for field in fields(features)]
            for row, index in enumerate(new):
                known[keys[index]] = [None if part is None else part[row] for part in parts]
        columns = zip(*(known[key] for key in keys), strict=True)
        return VisionFeatures(*(None if column[0] is None else torch.stack(column) for column in columns))

    model.model.encode_frames = encode_once


class WrongImages(torch.utils.data.Dataset):
    """Examples of which each has the image of another one, by a random permutation."""

    def __init__(self, examples: Sequence[Mapping], seed: int = 0):
        self.examples = examples
        order = np.random.default_rng(seed).permutation(len(examples))
        self.image_of = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        other = self.examples[self.image_of[index]]
        images = {name: other[name] for name in MODALITY_COLUMNS["image"] if name in other}
        return {**self.examples[index], **images}


def score_part(
    model: OPTSGForTagGeneration,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    evaluator: TagEvaluator,
    part: str,
) -> dict[str, dict[str, float]]:
    """Score examples without a part of the evidence.

    Args:
        model: A model with a tag classifier.
        processor: Its processor.
        examples: The examples, with images.
        evaluator: Made from their ground truth.
        part: One of `PARTS`.

    Returns:
        The metrics for each of the inputs that the part changes.
    """
    modalities = {IMAGE: ("image",), TITLE: ("title",)}
    scores = {}
    with without(model, part):
        for name in PARTS[part]:
            seen = modalities.get(name, tuple(MODALITY_COLUMNS))
            rows = WrongImages(examples) if name == WRONG_IMAGE else examples
            metrics = evaluator.score(predict_tags(model, processor, rows, modalities=seen))
            scores[name] = {metric: metrics[metric] for metric in METRICS}
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    """Score the checkpoint without each part, and write the result file after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/optsg-icon-small")
    parser.add_argument("--num_examples", type=int, help="evenly spaced examples of each split; by default all")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint).prepare_for_inference()
    encode_images_once(model)
    processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
    result = {}
    for name, options in SPLITS.items():
        rows = load_tagging_dataset("icon_tagging", **options)
        if arguments.num_examples is not None and arguments.num_examples < len(rows):
            rows = rows.select(np.linspace(0, len(rows) - 1, arguments.num_examples).astype(int))
        evaluator = TagEvaluator(rows["tags"], processor.label_vocabulary)
        result[name] = {"examples": len(rows), "evaluated_tags": len(evaluator.evaluated_tags)}
        for part in PARTS:
            scores = score_part(model, processor, rows, evaluator, part)
            # A part changes nothing for the other inputs.
            result[name][part] = result[name].get(ALL_PARTS, {}) | scores
            print(name, part, {own: metrics["full_f1"] for own, metrics in scores.items()}, flush=True)
            write_result(result | environment(), arguments.output)


if __name__ == "__main__":
    main()
