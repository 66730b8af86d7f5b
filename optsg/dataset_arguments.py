"""Arguments of the sub-commands that read a dataset."""


def add_dataset_arguments(parser) -> None:
    parser.add_argument("dataset", metavar="NAME", help="a benchmark, a folder, or a dataset on the Hub")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of a benchmark's own files")
    parser.add_argument("--config-name", metavar="NAME", help="which configuration of the benchmark")
    parser.add_argument("--title", metavar="NAME", help="which title of the benchmark, such as raw")
    parser.add_argument("--visual", metavar="NAME", help="what of a benchmark is looked at: video, image, …, or none")
    parser.add_argument("--missing", metavar="WHAT", help="examples of a benchmark without their file: skip or keep")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache of the datasets library")


def load_dataset_of(args, for_tags: bool = False):
    """All splits of what the arguments name.

    Args:
        for_tags: whether only tags are wanted: nothing is copied into a cache that is not there yet, and of a
            benchmark no image or video is looked for.

    Raises:
        ValueError, FileNotFoundError: see [`load_tagging_dataset`].
    """
    from dataset_scripts import benchmark_card, load_tagging_dataset

    choices = ("data_dir", "config_name", "title", "visual", "missing")
    given = {name: getattr(args, name) for name in choices}
    given = {name: value for name, value in given.items() if value is not None}
    if for_tags and "data_dir" in given:
        given.setdefault("visual", "none")
    elif for_tags and benchmark_card(args.dataset) is None:
        given["streaming"] = True
    return load_tagging_dataset(args.dataset, cache_dir=args.cache_dir, **given)
