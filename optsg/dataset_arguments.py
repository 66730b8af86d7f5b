"""Arguments of the sub-commands that read a dataset."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dataset_scripts.column_names import COLUMN_ARGUMENTS, add_column_arguments, column_arguments

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDER_ARGUMENTS = ("data_dir", "config_name", "title", "visual", "missing")
DATASET_ARGUMENTS = (*BUILDER_ARGUMENTS, *COLUMN_ARGUMENTS)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that [`load_dataset`] uses."""
    parser.add_argument("dataset", metavar="NAME", help="benchmark, folder, or dataset on the Hub")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the files of a benchmark")
    parser.add_argument("--config-name", metavar="NAME", help="configuration of a benchmark, such as create_3m")
    parser.add_argument("--title", metavar="NAME", help="kind of title in a benchmark, such as raw")
    parser.add_argument("--visual", metavar="NAME", help="visual input: video, image, frame_features or none")
    parser.add_argument("--missing", metavar="POLICY", help="skip or keep examples whose file cannot be used")
    add_column_arguments(parser, hyphens=True)
    parser.add_argument("--dataset-dir", metavar="DIR", help="cache folder of the datasets library")


def load_dataset(args: argparse.Namespace, tags_only: bool = False) -> Mapping[str, "Dataset | IterableDataset"]:
    """Load all splits of the dataset.

    Args:
        args: Parsed arguments of [`add_dataset_arguments`].
        tags_only: Whether to read only the tags. Parquet and Hub datasets are then streamed instead of copied to the
            cache, and the images and videos of a benchmark are not read.

    Raises:
        ValueError, FileNotFoundError: See [`load_tagging_dataset`].
    """
    from dataset_scripts import benchmark_card, load_tagging_dataset

    options = {name: value for name in BUILDER_ARGUMENTS if (value := getattr(args, name)) is not None}
    if tags_only and "data_dir" in options:
        options.setdefault("visual", "none")
    elif tags_only and benchmark_card(args.dataset) is None:
        options["streaming"] = True
    return load_tagging_dataset(args.dataset, cache_dir=args.dataset_dir, **options, **column_arguments(args))
