"""Builds icon-tagging, writes it as Parquet, and pushes it to the Hub if asked to."""

import argparse
import sys
from pathlib import Path

from ..icon_tagging import IconTagging
from ..parquet_export import push_folder, write_parquet


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m dataset_scripts.icon_tagging", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the Parquet files")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="then upload the folder as this dataset")
    parser.add_argument("--private", action="store_true", help="make a new dataset on the Hub private")
    parser.add_argument("--data-dir", metavar="DIR", help="installed node_modules folder (default: npm installs it)")
    parser.add_argument("--work-dir", metavar="DIR", help="where npm packages and drawn images are kept")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache of the datasets library")
    parser.add_argument("--num-proc", type=int, metavar="N", help="processes that draw (default: all cores)")
    args = parser.parse_args(arguments)
    try:
        builder = IconTagging(
            data_dir=args.data_dir,
            work_dir=args.work_dir,
            cache_dir=args.cache_dir,
            num_render_proc=args.num_proc,
        )
        builder.download_and_prepare()
        card = Path(__file__).with_name("README.md")
        statistics = write_parquet(builder.as_dataset(), args.output, card)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name, value in statistics.items():
        print(f"{name.replace('_', ' '):15} {value:>9,}")
    if args.push_to_hub:
        try:
            print(push_folder(args.output, args.push_to_hub, args.private).url)
        except (RuntimeError, ValueError) as error:
            sys.exit(f"error: {args.output} is written, but not published: {error}")


if __name__ == "__main__":
    main()
