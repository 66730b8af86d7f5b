"""`optsg export`: any tagging dataset as Parquet files with a card, and from there to the Hub."""

import argparse
import sys
from pathlib import Path

from .dataset_arguments import add_dataset_arguments, load_dataset_of


def add_command(commands):
    parser = commands.add_parser(
        "export",
        help="a dataset as Parquet",
        description="Writes a tagging dataset as Parquet files with a dataset card: images and features inside,\n"
        "videos as files beside. `datasets.load_dataset` gives it back where this package is not installed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dataset_arguments(parser)
    parser.add_argument("output", type=Path, metavar="DIR", help="folder to write, made if it is not there")
    parser.add_argument("--max-shard-size", default="500MB", metavar="SIZE", help="of a Parquet file (default: 500MB)")
    parser.add_argument("--license", metavar="ID", help="licence in the card, such as cc-by-4.0")
    parser.add_argument("--language", nargs="+", metavar="ID", help="languages in the card, such as en or zh")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="then upload the folder as this dataset")
    parser.add_argument("--private", action="store_true", help="make a new dataset on the Hub private")
    parser.set_defaults(run=_run)


def _run(args) -> int:
    from huggingface_hub import DatasetCard

    from dataset_scripts import benchmark_card
    from dataset_scripts.parquet_export import new_card, push_folder, write_parquet
    from modeling_optsg.hub.commits import PublishingError, check_repo_id

    try:
        if args.push_to_hub:
            check_repo_id(args.push_to_hub)
        dataset = load_dataset_of(args)
        if (path := benchmark_card(args.dataset)) is not None:
            card = DatasetCard.load(path)
            if args.license:
                card.data.license = args.license
                # These are for a licence that has no identifier.
                for detail in ("license_name", "license_link"):
                    card.data.pop(detail, None)
            card.data.language = args.language or card.data.language
        else:
            name = args.push_to_hub or args.output.resolve().name
            card = new_card(name, dataset, args.license, args.language)
        statistics = write_parquet(dataset, args.output, card, args.max_shard_size)
    except (OSError, ValueError, KeyError) as error:
        print(f"optsg export: {error}", file=sys.stderr)
        return 2
    for name, value in statistics.items():
        print(f"{name.replace('_', ' '):<18}{value:>12,}")
    if args.push_to_hub:
        try:
            published = push_folder(args.output, args.push_to_hub, args.private)
        except (PublishingError, ValueError) as error:
            print(f"optsg export: {args.output} is written, but not published: {error}", file=sys.stderr)
            return 1
        if not published.changed:
            print("optsg export: nothing to change: the Hub has all of it", file=sys.stderr)
        print(published.url)
    return 0
