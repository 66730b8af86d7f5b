"""`optsg export`: write a tagging dataset as Parquet with a card, and publish it on the Hub."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .dataset_arguments import add_dataset_arguments, load_dataset
from .terminal import error_line

if TYPE_CHECKING:
    from datasets import DatasetDict
    from huggingface_hub import DatasetCard


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `export` to the sub-commands of `optsg`."""
    parser = commands.add_parser(
        "export",
        help="write a dataset as Parquet",
        description="Writes a tagging dataset as Parquet files with a dataset card. Images and features are stored\n"
        "in the Parquet files, and videos as separate files. `datasets.load_dataset` loads the\n"
        "folder without this package.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dataset_arguments(parser)
    parser.add_argument("output", type=Path, metavar="DIR", help="output folder, created if necessary")
    parser.add_argument(
        "--max-shard-size",
        default="500MB",
        metavar="SIZE",
        help="maximum size of a Parquet file (default: %(default)s)",
    )
    parser.add_argument("--license", metavar="ID", help="licence of the dataset, such as cc-by-4.0")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="languages of the dataset, such as en or zh")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="Hub dataset to publish the folder as")
    parser.add_argument("--private", action="store_true", help="create the Hub dataset as private")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from dataset_scripts.benchmarks import benchmark_notice
    from dataset_scripts.parquet_export import write_parquet

    try:
        if args.push_to_hub:
            from modeling_optsg.hub.commits import check_repo_id

            check_repo_id(args.push_to_hub)
        dataset = load_dataset(args)
        statistics = write_parquet(
            dataset, args.output, _card(args, dataset), args.max_shard_size, benchmark_notice(args.dataset)
        )
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        print(f"optsg export: {error_line(error)}", file=sys.stderr)
        return 2
    for name, value in statistics.items():
        print(f"{name.replace('_', ' '):<18}{value:>12,}")
    return _push(args) if args.push_to_hub else 0


def _card(args: argparse.Namespace, dataset: "DatasetDict") -> "DatasetCard":
    """Return the benchmark's card or a new one, with the licence and the languages of the arguments."""
    from huggingface_hub import DatasetCard

    from dataset_scripts import benchmark_card
    from dataset_scripts.export_card import new_card

    path = benchmark_card(args.dataset)
    if path is None:
        return new_card(args.push_to_hub or args.output.resolve().name, dataset, args.license, args.language)
    card = DatasetCard.load(path)
    card.data.language = args.language or card.data.language
    if args.license:
        card.data.license = args.license
        # These fields describe a licence without an identifier.
        for detail in ("license_name", "license_link"):
            card.data.pop(detail, None)
    return card


def _push(args: argparse.Namespace) -> int:
    from modeling_optsg.hub.commits import PublishingError
    from modeling_optsg.hub.push_dataset import push_dataset

    try:
        result = push_dataset(args.output, args.push_to_hub, args.private)
    except (PublishingError, ValueError) as error:
        print(f"optsg export: {args.output} is written, but not published: {error_line(error)}", file=sys.stderr)
        return 1
    if not result.changed:
        print("optsg export: nothing to change: the Hub has the same files", file=sys.stderr)
    print(result.url)
    return 0
