r"""Scores a checkpoint on drawings in a style that no training example has, with image, title or both.

    python -m experiments.icon_tagging.unseen --checkpoint checkpoints/optsg-icon-small \
        --output experiments/icon_tagging/results/unseen.json

The images are Noto emoji in the current and the former style (the configuration `unseen` of icon-tagging). Their
concepts do not occur in the training split. The settings of the checkpoint are used unchanged. Images are read from
files, not from the feature cache, because image words need the pixels.
"""

import argparse
from pathlib import Path

from dataset_scripts import load_tagging_dataset
from experiments.icon_tagging.runs import F1_METRICS, write_result
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.evaluation.reporting import environment, score_modalities

METRICS = (*F1_METRICS, "tags_per_example", "expected_calibration_error")


def main() -> None:
    """Score the checkpoint and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/optsg-icon-small")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint)
    processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
    examples = load_tagging_dataset("icon_tagging", config_name="unseen", split="test")
    evaluator = TagEvaluator(examples["tags"], processor.label_vocabulary)
    result = {"examples": len(examples), "evaluated_tags": len(evaluator.evaluated_tags)}
    for name, metrics in score_modalities(model, processor, examples, evaluator).items():
        result[name] = {metric: metrics[metric] for metric in METRICS}
        print(name, result[name])
    write_result(result | environment(), arguments.output)


if __name__ == "__main__":
    main()
