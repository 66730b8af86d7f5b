"""`optsg stats`: how many items and tags a tagging dataset has, beside what the paper says of it."""

import argparse
import json
import sys
from pathlib import Path

from .dataset_arguments import add_dataset_arguments, load_dataset_of


def add_command(commands):
    parser = commands.add_parser(
        "stats",
        help="items and tags of a dataset",
        description="Counts items and tags of a tagging dataset: Tables 1 and 3 of the paper's supplement.\n"
        "Where the paper has figures of it, they stand beside what is counted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dataset_arguments(parser)
    common = parser.add_mutually_exclusive_group()
    common.add_argument(
        "--common", type=int, default=25, metavar="N", help="a tag of so many training items is common"
    )
    common.add_argument(
        "--match-published",
        action="store_true",
        help="take the N whose common and rare tags come nearest to the paper's",
    )
    parser.add_argument(
        "--published",
        metavar="NAME",
        help="set the paper's figures of this benchmark beside them (default: those of the dataset's own name)",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the tags' frequencies (Figure 1) there")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(run=_run)


def _run(args) -> int:
    import pyarrow as pa

    from dataset_scripts.published_statistics import COMPARED_DATASETS, NOTES, PUBLISHED, identities
    from dataset_scripts.tag_statistics import TagCounts, nearest_common_count, size_statistics, tag_statistics

    # The pool that is faster for others keeps what batches have left, hundreds of megabytes of it.
    pa.set_memory_pool(pa.system_memory_pool())
    # The paper counts one configuration; the others of a benchmark are something else.
    named = (args.published or Path(args.dataset).name).replace("-", "_")
    published = PUBLISHED.get(named) if args.published or args.config_name in (None, "create_210k") else None
    try:
        if args.common < 1:
            raise ValueError(f"--common {args.common} must be at least 1")
        if args.published and published is None:
            raise ValueError(f"--published {args.published}: the paper has figures of {', '.join(PUBLISHED)}")
        if args.match_published and published is None:
            raise ValueError(
                f"--match-published: the paper says nothing of {args.dataset}; name one of {', '.join(PUBLISHED)} by "
                "--published"
            )
        if args.picture and not args.picture.resolve().parent.is_dir():
            raise ValueError(f"--picture {args.picture}: there is no such folder")
        if args.picture and args.picture.suffix not in (".png", ".svg", ".pdf", ".jpg"):
            raise ValueError(f"--picture {args.picture} must end with .png, .svg, .pdf or .jpg")
        dataset = load_dataset_of(args, for_tags=True)
        counts = {split: TagCounts.of(rows) for split, rows in dataset.items()}
        common = args.common
        if args.match_published:
            if missing := {"train", "test"} - counts.keys():
                raise ValueError(f"--match-published needs the splits train and test; {sorted(missing)} missing")
            common, *_ = nearest_common_count(
                counts["train"], counts["test"], published["common_tags"], published["rare_tags"]
            )
        # A benchmark of training items alone has no split to compare.
        figures = tag_statistics(counts, common) if {"train", "test"} <= counts.keys() else size_statistics(counts)
    except (FileNotFoundError, ValueError, KeyError) as error:
        print(f"optsg stats: {error}", file=sys.stderr)
        return 2
    checks = identities(figures) if "union" in figures else []
    if args.json:
        told = {}
        for name, of in (("counted", figures), ("published", published)):
            both = identities(of) if of and "union" in of else []
            told[name] = [{"identity": text, "holds": holds} for text, holds in both]
        print(json.dumps({"common_count": common, "counted": figures, "published": published, "identities": told}))
    else:
        _show(args.dataset, figures, published, common)
        for name, of in (("counted", figures), ("published", published)):
            for text, holds in identities(of) if of and "union" in of else ():
                print(f"{name}: {text}: {'holds' if holds else 'does NOT hold'}")
        for note in NOTES.get(named, ()) if published else ():
            print(f"published: {note}")
        print("\nBeside other datasets (Table 3):")
        own = (args.dataset, "", f"{figures['items']:,}", figures["unique_tags"], "")
        for name, kind, items, tags, domain in (own, *COMPARED_DATASETS):
            print(f"  {name:<24}{kind:<12}{items:>10}{tags:>10,}  {domain}".rstrip())
    if args.picture:
        if "union" not in figures:
            print("optsg stats: a picture needs the splits train and test", file=sys.stderr)
            return 2
        try:
            from dataset_scripts.frequency_plot import tag_frequencies

            tag_frequencies(counts["train"].counts, counts["test"].counts, args.picture)
        except ImportError:
            print("optsg stats: --picture needs matplotlib: pip install 'optsg[compare]'", file=sys.stderr)
            return 2
    return 0 if all(holds for _, holds in checks) else 1


def _show(name: str, figures: dict, published: dict | None, common: int) -> None:
    print(f"{name}, a tag is common from {common} training items on:")
    print(f"  {'':<18}{'counted':>12}" + (f"{'published':>12}" if published else ""))
    for key, value in figures.items():
        beside = f"{published[key]:>12,}" if published and key in published else ""
        print(f"  {key.replace('_', ' '):<18}{value:>12,}{beside}")
