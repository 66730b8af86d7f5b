"""`optsg stats`: count the examples and tags of a dataset and compare them with published statistics."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .dataset_arguments import add_dataset_arguments, load_dataset
from .terminal import error_line

if TYPE_CHECKING:
    from dataset_scripts.tag_counts import TagCounts

Statistics = Mapping[str, int | float]

PLOT_SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `stats` to the sub-commands of `optsg`."""
    parser = commands.add_parser(
        "stats",
        help="count the examples and tags of a dataset",
        description="Counts the examples and tags of a dataset without loading images or videos, as in Tables 1 to 3\n"
        "of the paper's supplement. For a benchmark, the published statistics are printed as well.",
        epilog="exit status: 0 the counts are consistent; 1 they are not; 2 the dataset cannot be counted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dataset_arguments(parser)
    common = parser.add_mutually_exclusive_group()
    common.add_argument(
        "--common",
        type=int,
        default=25,
        metavar="N",
        help="minimum number of training examples of a common tag (default: %(default)s)",
    )
    common.add_argument(
        "--match-published",
        action="store_true",
        help="choose N so that the numbers of common and rare tags are closest to the published ones",
    )
    parser.add_argument(
        "--published",
        metavar="NAME",
        help="benchmark to compare with (default: the benchmark with the name of the dataset)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="file for a plot of the tag frequencies (Figure 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import pyarrow as pa

    from dataset_scripts.published_statistics import check_identities

    # The default pool is faster, but keeps hundreds of megabytes of freed batches.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        benchmark, published = _published(args)
        _check_arguments(args, published)
        counts = _count(args)
        common_count = _common_count(args, counts, published)
        statistics = _statistics(counts, common_count)
        if args.plot:
            _plot(counts, args.plot)
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        print(f"optsg stats: {error_line(error)}", file=sys.stderr)
        return 2
    identities = {
        name: check_identities(table) if table and "union" in table else []
        for name, table in (("counted", statistics), ("published", published))
    }
    if args.json:
        checks = {
            name: [{"identity": text, "holds": holds} for text, holds in checks] for name, checks in identities.items()
        }
        found = {"common_count": common_count, "counted": statistics, "published": published, "identities": checks}
        print(json.dumps(found, allow_nan=False))
    else:
        _print_statistics(args.dataset, statistics, published, common_count)
        _print_checks(identities, benchmark if published else None)
        if published:
            _print_other_datasets(args.dataset, statistics)
    return 0 if all(holds for _, holds in identities["counted"]) else 1


def _published(args: argparse.Namespace) -> tuple[str, Statistics | None]:
    """Return the benchmark to compare with, and its published statistics if there are any."""
    from dataset_scripts.published_statistics import PUBLISHED

    benchmark = (args.published or Path(args.dataset).name).replace("-", "_")
    # Published statistics are those of a benchmark's main configuration.
    is_main = args.config_name in (None, "create_210k")
    return benchmark, PUBLISHED.get(benchmark) if args.published or is_main else None


def _check_arguments(args: argparse.Namespace, published: Statistics | None) -> None:
    from dataset_scripts.published_statistics import PUBLISHED

    if args.common < 1:
        raise ValueError(f"--common {args.common} must be at least 1")
    if args.published and published is None:
        raise ValueError(f"--published {args.published} must be one of {', '.join(PUBLISHED)}")
    if args.match_published and published is None:
        raise ValueError(
            f"--match-published: the paper has no statistics of {args.dataset}; give --published with one of "
            f"{', '.join(PUBLISHED)}"
        )
    if args.plot and not args.plot.resolve().parent.is_dir():
        raise ValueError(f"--plot {args.plot}: the folder does not exist")
    if args.plot and args.plot.suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--plot {args.plot} must end with one of {', '.join(PLOT_SUFFIXES)}")


def _count(args: argparse.Namespace) -> dict[str, "TagCounts"]:
    from dataset_scripts.tag_counts import TagCounts

    counts = {split: TagCounts.from_rows(rows) for split, rows in load_dataset(args, tags_only=True).items()}
    needs_both = {"--match-published": args.match_published, "--plot": args.plot}
    for option in (option for option, value in needs_both.items() if value):
        if missing := {"train", "test"} - counts.keys():
            raise ValueError(f"{option} needs the splits train and test; {sorted(missing)} missing")
    return counts


def _common_count(args: argparse.Namespace, counts: Mapping[str, "TagCounts"], published: Statistics | None) -> int:
    from dataset_scripts.tag_counts import nearest_common_count

    if not args.match_published:
        return args.common
    return nearest_common_count(counts["train"], counts["test"], published["common_tags"], published["rare_tags"])[0]


def _statistics(counts: Mapping[str, "TagCounts"], common_count: int) -> Statistics:
    from dataset_scripts.tag_counts import size_statistics, tag_statistics

    # Pretraining data have no test split.
    return tag_statistics(counts, common_count) if {"train", "test"} <= counts.keys() else size_statistics(counts)


def _plot(counts: Mapping[str, "TagCounts"], path: Path) -> None:
    try:
        from dataset_scripts.frequency_plot import plot_tag_frequencies
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'optsg[experiments]'") from None
    plot_tag_frequencies(counts["train"].counts, counts["test"].counts, path)


def _print_statistics(name: str, statistics: Statistics, published: Statistics | None, common_count: int) -> None:
    print(f"{name} (tags with at least {common_count} training examples are common):")
    print(f"  {'':<18}{'counted':>12}" + (f"{'published':>12}" if published else ""))
    for key, value in statistics.items():
        other = f"{published[key]:>12,}" if published and key in published else ""
        print(f"  {key.replace('_', ' '):<18}{value:>12,}{other}")


def _print_checks(identities: Mapping[str, list[tuple[str, bool]]], benchmark: str | None) -> None:
    from dataset_scripts.published_statistics import DISCREPANCIES

    for name, checks in identities.items():
        for text, holds in checks:
            print(f"{name}: {text}: {'holds' if holds else 'does NOT hold'}")
    for discrepancy in DISCREPANCIES.get(benchmark, ()):
        print(f"published: {discrepancy}")


def _print_other_datasets(name: str, statistics: Statistics) -> None:
    from dataset_scripts.published_statistics import COMPARED_DATASETS

    print("\nOther datasets (Table 3):")
    own = (name, "", f"{statistics['examples']:,}", statistics["unique_tags"], "")
    for dataset, kind, examples, tags, domain in (own, *COMPARED_DATASETS):
        print(f"  {dataset:<24}{kind:<12}{examples:>10}{tags:>10,}  {domain}".rstrip())
