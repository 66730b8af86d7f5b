"""`optsg index`: make a book from tagged images. `optsg tag --book` then suggests their tags for other images."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dataset_scripts.media_suffixes import METADATA_NAMES

from .argument_types import add_skip_argument, positive
from .dataset_arguments import DATASET_ARGUMENTS, add_dataset_arguments, load_dataset
from .embedded_titles import find_title
from .file_inputs import image_input, is_seen_as_video
from .media_files import MediaFile, find_media_files
from .model_argument import add_model_argument, chosen_model
from .sidecars import SidecarError, SidecarLocator
from .sidecars.files import check_writable, lock_folder
from .sidecars.locations import NAMINGS
from .sidecars.reconciliation import tag_key
from .tagger import BOOK_FOLDER, exit_if_unusable, load_model
from .terminal import plural, print_line, printable

if TYPE_CHECKING:
    from datasets import Dataset

EPILOG = """\
Keywords are read from images and videos (XMP, IPTC and EXIF data; videos and
raw files need exiftool), from XMP sidecars, and from the tags column of a
metadata.jsonl, metadata.csv (separated by |) or metadata.parquet in the folder.
Tags that optsg wrote to a sidecar are left out. The title or the caption in an
image is used if the metadata of the folder has no title.
Images and videos are never changed. To resume a stopped run, run the same
command again.

exit status: 0 all files with keywords were read; 1 some files failed, or the
book could not be saved, with the reason on standard error; 2 the arguments are
invalid, the model cannot be used, or no file has keywords; 130 interrupted.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `index` to the sub-commands of `optsg`."""
    parser = commands.add_parser(
        "index",
        help="make a book from your own images and their keywords",
        description="Makes a book from the images and videos in a folder that have keywords. Then\n"
        "`optsg tag --book FOLDER` suggests these keywords for other images. The model is not trained.\n"
        "A book can also be made from the training examples of a dataset.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dataset_arguments(parser)
    parser.add_argument(
        "--output", metavar="DIR", help=f"folder to save the book in (default: {BOOK_FOLDER} in the folder)"
    )
    add_skip_argument(parser)
    add_model_argument(parser)
    parser.add_argument("--title-from-name", action="store_true", help="use the file names as titles")
    parser.add_argument(
        "--sidecar-names",
        choices=NAMINGS,
        default="full",
        help="sidecar to read if an image has both: full (photo.jpg.xmp, default) or stem (photo.xmp)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="number of files per batch (default: 16)"
    )
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    model_name = chosen_model(parser, args)
    failures: list[tuple[str, str]] = []
    is_library = _is_library(args.dataset)
    _check(parser, args, is_library)
    output = Path(args.output or Path(args.dataset, BOOK_FOLDER))
    _check_output(parser, output)
    try:
        examples = _read_library(args, failures) if is_library else _read_dataset(args)
    except (ImportError, OSError, ValueError) as error:
        _report(str(error))
        return 2
    if examples is None:
        _report_failures(failures)
        _report(f"{args.dataset}: no image or video has keywords, so there is nothing to suggest")
        return 2
    with exit_if_unusable(parser, model_name):
        model, processor = load_model(model_name)
    if model.tag_classifier is None:
        parser.error(f"a book needs a model with a tag classifier; {model_name} has none")
    try:
        with lock_folder(str(output)):
            is_inside = os.path.realpath(output) == os.path.realpath(Path(args.dataset, BOOK_FOLDER))
            library = args.dataset if is_library and not is_inside else None
            num_kept, num_tags = _build(model, processor, examples, output, library, args.batch_size, failures)
    except (OSError, ValueError, ImportError, SidecarError) as error:
        failures.append((str(output), f"cannot make the book: {error}"))
    else:
        print_line(
            printable(f"saved a book of {plural(num_kept, 'file')} and {plural(num_tags, 'keyword')} in {output}")
        )
    _report_failures(failures)
    return 1 if failures else 0


def _is_library(name: str) -> bool:
    """Return whether a name is that of a folder of images, rather than of a dataset."""
    own = {*METADATA_NAMES, "tags.parquet"}
    tables = [path.name.lower() for path in Path(name).glob("*") if path.suffix.lower() == ".parquet"]
    return os.path.isdir(name) and own.issuperset(tables)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace, is_library: bool) -> None:
    if not is_library and not args.output:
        parser.error(f"there is no folder {args.dataset}; a book from a dataset needs --output")
    for option in DATASET_ARGUMENTS if is_library else ("title_from_name", "skip"):
        if getattr(args, option):
            kind = "dataset" if is_library else "folder of images"
            parser.error(f"--{option.replace('_', '-')} needs a {kind}")


def _check_output(parser: argparse.ArgumentParser, output: Path) -> None:
    from modeling_optsg.book.book_files import check_replaceable

    try:
        check_writable(str(output))
        check_replaceable(output)
    except (SidecarError, ValueError) as error:
        parser.error(printable(f"--output: {error}"))


def _read_library(args: argparse.Namespace, failures: list[tuple[str, str]]) -> "Dataset | None":
    """Return the images and videos of a folder that have keywords, or `None` if there are none."""
    from datasets import Dataset, Features, List, Value

    found = find_media_files([args.dataset], None, args.title_from_name, read_tags=True, read_raw=True, skip=args.skip)
    failures += found.failures
    for message in found.messages:
        _report(message)
    unreadable: list[tuple[str, str]] = []
    remarks: Counter[str] = Counter()
    examples = list(_with_keywords(found.files, SidecarLocator(naming=args.sidecar_names), unreadable, remarks))
    failures += unreadable
    for remark, count in remarks.items():
        _report(f"{plural(count, 'file')}: {remark}")
    _merge_spellings(examples)
    named = {path for path, _ in unreadable} | {example["image"] or example["video"] for example in examples}
    if skipped := sum(file.path not in named for file in found.files):
        _report(f"skipped {plural(skipped, 'file')} without keywords")
    text = Value("string")
    features = Features({"id": text, "title": text, "tags": List(text), "image": text, "video": text})
    return Dataset.from_list(examples, features=features) if examples else None


def _read_dataset(args: argparse.Namespace) -> "Dataset":
    """Return the training examples of a dataset that have tags, with undecoded images and videos."""
    from dataset_scripts import example_groups, undecoded

    splits = load_dataset(args)
    if "train" not in splits:
        raise ValueError(f"{args.dataset} has no train split")
    rows = undecoded(splits["train"])
    if "group" not in rows.column_names:
        rows = rows.add_column("group", example_groups(rows, args.dataset))
    return rows.filter(lambda tags: len(tags) > 0, input_columns="tags")


def _build(
    model: object,
    processor: object,
    examples: "Dataset",
    output: Path,
    library: str | None,
    batch_size: int,
    failures: list,
) -> tuple[int, int]:
    """Make the book, and return its numbers of examples and of tags."""
    from modeling_optsg.book import build_book

    book, unreadable = build_book(
        model,
        processor,
        examples,
        output,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
        open_image=image_input,
        library=library,
    )
    failures += unreadable.items()
    return len(book), len(book.tags)


def _with_keywords(
    files: Sequence[MediaFile], locator: SidecarLocator, failures: list[tuple[str, str]], remarks: Counter[str]
) -> Iterable[dict]:
    """Yield an example for each file with keywords; add unreadable files to `failures`, and count remarks."""
    from tqdm import tqdm

    from .sidecars.embedded import read_embedded
    from .sidecars.keywords import read_keywords, unique_keywords

    # `delay`: reading the metadata of a small folder takes no time.
    for file in tqdm(files, "metadata", unit="file", disable=None, leave=False, delay=2):
        embedded = read_embedded(file)
        if embedded.remark:
            remarks[embedded.remark] += 1
        try:
            own, problem = read_keywords(file, locator, embedded)
            tags = unique_keywords([*file.tags, *own])
            title = file.title or ("" if file.is_video else find_title(embedded) or "")
            "".join((file.path, title, *tags)).encode()
        except SidecarError as error:
            failures.append((file.path, str(error)))
        except UnicodeEncodeError:
            failures.append((file.path, "its name, title or keywords are not valid Unicode text"))
        else:
            if problem:
                failures.append((file.path, problem))
            if tags:
                is_video = is_seen_as_video(file)
                yield {
                    "id": os.path.relpath(file.path, file.root),
                    "title": title,
                    "tags": tags,
                    "image": None if is_video else file.path,
                    "video": file.path if is_video else None,
                }


def _merge_spellings(examples: list[dict]) -> None:
    """Give each keyword the spelling that most images have."""
    counts = Counter(tag for example in examples for tag in example["tags"])
    spelling = {tag_key(tag): tag for tag, _ in reversed(counts.most_common())}
    for example in examples:
        example["tags"] = list(dict.fromkeys(spelling[tag_key(tag)] for tag in example["tags"]))


def _report_failures(failures: Sequence[tuple[str, str]]) -> None:
    for path, reason in failures:
        _report(reason if path in reason else f"{path}: {reason}")


def _report(text: str) -> None:
    print_line(f"optsg index: {printable(text)}", file=sys.stderr)
