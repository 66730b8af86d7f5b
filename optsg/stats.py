"""`optsg stats`: how many examples and tags a tagging dataset has, beside what the paper says of it."""

import argparse
import json
import sys
from pathlib import Path

from .dataset_arguments import add_dataset_arguments, load_dataset_of


def add_command(commands):
    parser = commands.add_parser(
        "stats",
        help="examples and tags of a dataset",
        description="Counts examples and tags of a tagging dataset: Tables 1 and 3 of the paper's supplement.\n"
        "Where the paper has metrics of it, they stand beside what is counted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dataset_arguments(parser)
    common = parser.add_mutually_exclusive_group()
    common.add_argument(
        "--common", type=int, default=25, metavar="N", help="a tag of so many training examples is common"
    )
    common.add_argument(
        "--match-published",
        action="store_true",
        help="take the N whose common and rare tags come nearest to the paper's",
    )
    parser.add_argument(
        "--published",
        metavar="NAME",
        help="set the paper's metrics of this benchmark beside them (default: those of the dataset's own name)",
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="draw the tags' frequencies (Figure 1) there")
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
            raise ValueError(f"--published {args.published}: the paper has metrics of {', '.join(PUBLISHED)}")
        if args.match_published and published is None:
            raise ValueError(
                f"--match-published: the paper says nothing of {args.dataset}; name one of {', '.join(PUBLISHED)} by "
                "--published"
            )
        if args.image and not args.image.resolve().parent.is_dir():
            raise ValueError(f"--image {args.image}: there is no such folder")
        if args.image and args.image.suffix not in (".png", ".svg", ".pdf", ".jpg"):
            raise ValueError(f"--image {args.image} must end with .png, .svg, .pdf or .jpg")
        dataset = load_dataset_of(args, for_tags=True)
        counts = {split: TagCounts.of(rows) for split, rows in dataset.items()}
        common = args.common
        if args.match_published:
            if missing := {"train", "test"} - counts.keys():
                raise ValueError(f"--match-published needs the splits train and test; {sorted(missing)} missing")
            common, *_ = nearest_common_count(
                counts["train"], counts["test"], published["common_tags"], published["rare_tags"]
            )
        # A benchmark of training examples alone has no split to compare.
        metrics = tag_statistics(counts, common) if {"train", "test"} <= counts.keys() else size_statistics(counts)
    except (FileNotFoundError, ValueError, KeyError) as error:
        print(f"optsg stats: {error}", file=sys.stderr)
        return 2
    checks = identities(metrics) if "union" in metrics else []
    if args.json:
        told = {}
        for name, of in (("counted", metrics), ("published", published)):
            both = identities(of) if of and "union" in of else []
            told[name] = [{"identity": text, "holds": holds} for text, holds in both]
        print(json.dumps({"common_count": common, "counted": metrics, "published": published, "identities": told}))
    else:
        _show(args.dataset, metrics, published, common)
        for name, of in (("counted", metrics), ("published", published)):
            for text, holds in identities(of) if of and "union" in of else ():
                print(f"{name}: {text}: {'holds' if holds else 'does NOT hold'}")
        for note in NOTES.get(named, ()) if published else ():
            print(f"published: {note}")
        print("\nBeside other datasets (Table 3):")
        own = (args.dataset, "", f"{metrics['examples']:,}", metrics["unique_tags"], "")
        for name, kind, examples, tags, domain in (own, *COMPARED_DATASETS):
            print(f"  {name:<24}{kind:<12}{examples:>10}{tags:>10,}  {domain}".rstrip())
    if args.image:
        if "union" not in metrics:
            print("optsg stats: an image needs the splits train and test", file=sys.stderr)
            return 2
        try:
            from dataset_scripts.frequency_plot import tag_frequencies

            tag_frequencies(counts["train"].counts, counts["test"].counts, args.image)
        except ImportError:
            print("optsg stats: --image needs matplotlib: pip install 'optsg[compare]'", file=sys.stderr)
            return 2
    return 0 if all(holds for _, holds in checks) else 1


def _show(name: str, metrics: dict, published: dict | None, common: int) -> None:
    print(f"{name}, a tag is common from {common} training examples on:")
    print(f"  {'':<18}{'counted':>12}" + (f"{'published':>12}" if published else ""))
    for key, value in metrics.items():
        beside = f"{published[key]:>12,}" if published and key in published else ""
        print(f"  {key.replace('_', ' '):<18}{value:>12,}{beside}")
