r"""Fit the decoding settings of a checkpoint on the validation split again, and save them in the checkpoint.

    python examples/fit.py --checkpoint runs/mine --dataset my_images --metric_for_best_model micro_f1

`examples/train.py` fits these settings at the end of training. This program fits `pad_bias`, `fusion_weights`,
`logit_adjustment` and `threshold` of both decodings for other examples, another metric, or another number of tags per
slot.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dataset_scripts import load_tagging_dataset
from dataset_scripts.column_names import add_column_arguments, column_arguments
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagEvaluator
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.calibration import PAD_BIASES, fit_generation_config

FIT_ARGUMENTS = ("metric_for_best_model", "num_return_sequences", "num_candidates", "pad_biases", "dataset")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="folder of the checkpoint, whose settings are replaced"
    )
    parser.add_argument("--dataset", default="icon_tagging", help="benchmark, folder or Hub name of the dataset")
    add_column_arguments(parser)
    parser.add_argument("--dataset_dir", help="cache folder of the datasets library")
    parser.add_argument(
        "--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser(), help="cache folder for tower features"
    )
    parser.add_argument(
        "--metric_for_best_model",
        default="full_f1",
        help="metric to maximise; a+b is the mean of two metrics, and a@b>=c is metric a with metric b of at least c",
    )
    parser.add_argument("--num_return_sequences", type=int, default=1, help="maximum number of tags per slot")
    parser.add_argument("--num_candidates", type=int, default=50, help="number of classifier candidates")
    parser.add_argument("--pad_biases", type=float, nargs="+", default=PAD_BIASES, help="values of pad_bias to try")
    parser.add_argument("--batch_size", type=int, default=64, help="number of examples per batch")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the settings of a checkpoint and save them in it."""
    arguments = parse_arguments(argv)
    options = {"cache_dir": arguments.dataset_dir, **column_arguments(arguments)}
    dataset = load_tagging_dataset(arguments.dataset, **options)
    model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint)
    processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
    features = cache_tower_features(dataset["validation"], model.model, processor, arguments.cache_dir / "features")
    train_counts = Counter(tag for tags in dataset["train"]["tags"] for tag in set(tags))
    evaluator = TagEvaluator(dataset["validation"]["tags"], train_counts)

    MODEL_TYPES["op-tsg"].set_search(model, arguments.num_return_sequences, arguments.num_candidates)
    fits = {}
    for decoding in ("parallel", "sequential"):
        fits[decoding] = fit_generation_config(
            model,
            processor,
            CachedFeatures(features),
            evaluator,
            decoding=decoding,
            metric_for_best_model=arguments.metric_for_best_model,
            grid={"pad_bias": arguments.pad_biases},
            batch_size=arguments.batch_size,
        )
        print(
            decoding,
            json.dumps({name: value for name, value in fits[decoding].items() if name != "tried"}, allow_nan=False),
        )
    model.generation_config.save_pretrained(arguments.checkpoint)

    # The model card reads the settings from the summary.
    summary_path = arguments.checkpoint / "training_summary.json"
    summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.exists() else {}
    summary["fits"] = fits
    summary["fitted_with"] = {name: getattr(arguments, name) for name in FIT_ARGUMENTS}
    summary_path.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
