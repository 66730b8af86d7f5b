"""Fits a checkpoint's `pad_bias` and `threshold` on validation examples, for both decodings, and saves them in it.

    python examples/fit.py --checkpoint runs/mine --dataset my_images --num_return_sequences 3

`examples/train.py` does this at its end; this program does it again, on other examples, for another figure, or with
several num_return_sequences a slot (beam search inside each slot, whose best tags are all candidates).
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.calibration import PAD_BIASES, fit_generation_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dataset", default="icon_tagging")
    parser.add_argument("--dataset_dir", default=None)
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser())
    parser.add_argument("--objective", default="full_f1", help="a figure, or the mean of several: a+b")
    parser.add_argument("--num_return_sequences", type=int, default=1, help="tags a slot may contribute")
    parser.add_argument(
        "--num_candidates", type=int, default=50, help="train tags that suit an example, candidates too"
    )
    parser.add_argument("--pad_biases", type=float, nargs="+", default=PAD_BIASES)
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()

    dataset = load_tagging_dataset(arguments.dataset, cache_dir=arguments.dataset_dir)
    model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint)
    processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
    examples = CachedFeatures(
        cache_tower_features(dataset["validation"], model.model, processor, arguments.cache_dir / "features")
    )
    train_counts = Counter(tag for tags in dataset["train"]["tags"] for tag in set(tags))
    evaluator = TagEvaluator(dataset["validation"]["tags"], train_counts)

    MODEL_TYPES["op-tsg"].set_search(model, arguments.num_return_sequences, arguments.num_candidates)
    fits = {}
    for decoding in ("parallel", "sequential"):
        fits[decoding] = fit_generation_config(
            model,
            processor,
            examples,
            evaluator,
            decoding=decoding,
            objective=arguments.objective,
            grid={"pad_bias": arguments.pad_biases},
            batch_size=arguments.batch_size,
        )
        print(decoding, json.dumps({name: value for name, value in fits[decoding].items() if name != "tried"}))
    model.generation_config.save_pretrained(arguments.checkpoint)

    summary_path = arguments.checkpoint / "training_summary.json"
    summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.exists() else {}
    summary["fits"] = fits
    shown = ("objective", "num_return_sequences", "num_candidates", "pad_biases", "dataset")
    summary["fitted_with"] = {name: value for name, value in vars(arguments).items() if name in shown}
    summary_path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
