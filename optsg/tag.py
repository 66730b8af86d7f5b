"""`optsg tag`: tags for images, videos and folders of them."""

import argparse
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .media_files import MediaFile, find_media_files
from .sidecars import KINDS, SidecarError, SidecarPlaces, make_writer
from .sidecars.places import NAMES
from .tag_report import TagReport
from .tagger import Stamps, Tagger, TagSettings, batches
from .terminal import ReportHandler, printable

DEFAULT_MODEL = Path("checkpoints", "optsg-icon-small")
LIBRARY_WARNINGS = ReportHandler("optsg tag")
TERMINATED = 143  # 128 + SIGTERM, as a shell reports it
EPILOG = """\
A folder's titles come from a metadata.jsonl, metadata.csv or metadata.parquet
in it, with the columns file_name and title.

--write never changes an image. A person's tags stay; tags of an earlier run
that are not given any more are removed; a tag that a person deleted does not
come back. Given again after it was stopped, the same command goes on.

exit status: 0 every file is tagged; 1 some are not, each is named on standard
error; 2 the command line or the model cannot be used; 130 interrupted; 143
terminated.
"""


class Terminated(SystemExit):
    """SIGTERM came."""


def add_command(commands):
    parser = commands.add_parser(
        "tag",
        help="tags for images, videos and folders",
        description="Writes the tags of images and videos, each with its probability.\n"
        "A tag that was not among the training tags is marked novel.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="image, video, or folder searched to its depth")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"checkpoint folder or Hub name (default: {DEFAULT_MODEL}, if it is there)",
    )
    titles = parser.add_mutually_exclusive_group()
    titles.add_argument("--title", metavar="TEXT", help="title of the one image or video given")
    titles.add_argument("--title-from-name", action="store_true", help="take the file names as titles")
    parser.add_argument(
        "--threshold",
        "--min-score",
        type=_probability,
        metavar="P",
        help="leave out tags less probable than this (default: the model's own threshold)",
    )
    parser.add_argument("--max-tags", type=_positive, metavar="N", help="at most this many tags a file")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="TAG", help="never give this tag (repeatable)"
    )
    parser.add_argument(
        "--exclude-file", type=_tags_of_file, action="append", default=[], metavar="FILE", help="nor these, one a line"
    )
    parser.add_argument(
        "--vocabulary", type=_tags_of_file, metavar="FILE", help="give no other tags than these, one a line"
    )
    parser.add_argument("--decoding", choices=("parallel", "sequential"), help="write all tags at once or in turn")
    parser.add_argument("--frames", type=_positive, metavar="N", help="look at this many frames of each video")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="files at a time (default: 16)")
    parser.add_argument("--json", action="store_true", help="one JSON object a file and line, instead of a table")
    files = parser.add_argument_group("writing files")
    files.add_argument(
        "--write",
        action="append",
        choices=KINDS,
        default=[],
        metavar="KIND",
        help="xmp, json or txt: a sidecar of each file; csv or parquet: one table, tags.csv (repeatable)",
    )
    files.add_argument("--output", metavar="DIR", help="write into a tree like the images' here, not beside them")
    files.add_argument(
        "--sidecar-names",
        choices=NAMES,
        default="full",
        help="full: photo.jpg.xmp, for darktable, digiKam, Immich (default); stem: photo.xmp, for Lightroom",
    )
    files.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    files.add_argument("--redo", action="store_true", help="tag files again that have their tags already")
    parser.set_defaults(run=partial(_run, parser))


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _tags_of_file(name: str) -> frozenset[str]:
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read as UTF-8 text: {error}") from error
    if not (tags := frozenset(line.strip() for line in lines if line.strip())):
        raise argparse.ArgumentTypeError(f"{name} holds no tags, one a line")
    return tags


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.title is not None and (len(args.files) > 1 or Path(args.files[0]).is_dir()):
        parser.error("--title is for one image or video; titles of several come from --title-from-name or metadata")
    for option in ("output", "dry_run", "redo"):
        if getattr(args, option) and not args.write:
            parser.error(f"--{option.replace('_', '-')} is about the files of --write, which is not given")
    name = args.model or _default_model()
    if name is None:
        parser.error(f"--model is needed: there is no {DEFAULT_MODEL} here")
    settings = TagSettings(
        threshold=args.threshold,
        max_tags=args.max_tags,
        decoding=args.decoding,
        frames=args.frames,
        exclude=frozenset(args.exclude).union(*args.exclude_file),
        vocabulary=args.vocabulary or frozenset(),
    )

    found = find_media_files(args.files, args.title or None, args.title_from_name)
    with _terminable() if args.write else contextlib.nullcontext():
        writers = _writers(parser, args, name, settings) if found.files else []
        report = TagReport([file.path for file in found.files], args.json, writers, args.dry_run)
        try:
            for note in found.notes:
                report.note(note)
            for path, reason in found.failures:
                report.failure(path, None, reason)
            todo = report.pending(found.files, args.redo)
            if todo:
                _tag(parser, args, name, settings, todo, report)
            return report.close()
        except (KeyboardInterrupt, Terminated):
            report.interrupted()
            raise


def _writers(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, settings: TagSettings) -> list:
    if not args.write:
        return []
    with _usable(parser, name):
        fingerprints = Stamps(name, settings)
    places = SidecarPlaces(args.output, args.sidecar_names)
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    try:
        return [make_writer(kind, places, fingerprints, shown, args.dry_run) for kind in dict.fromkeys(args.write)]
    except SidecarError as error:
        parser.error(printable(str(error)))


def _tag(parser, args, name: str, settings: TagSettings, todo: list[tuple[MediaFile, list]], report: TagReport):
    logging.getLogger("modeling_optsg").addHandler(LIBRARY_WARNINGS)
    with _usable(parser, name):
        tagger = Tagger(name, settings)
    several = len(todo) > args.batch_size
    with tqdm(total=len(todo), unit="file", disable=None if several else True) as progress:
        wanting = iter(todo)
        for batch in batches([file for file, _ in todo], args.batch_size):
            for outcome, (file, writers) in zip(tagger(batch), wanting):
                report.outcome(file, outcome, writers)
            progress.update(len(batch))


@contextlib.contextmanager
def _usable(parser: argparse.ArgumentParser, name: str) -> Iterator[None]:
    """Ends the program with one line if a model cannot be used."""
    try:
        yield
    except Exception as error:  # the libraries raise anything from KeyError to SafetensorError on a damaged folder
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        parser.exit(2, printable(f"{parser.prog}: model {name} cannot be loaded: {reason}") + "\n")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the program in order, as Ctrl-C does."""

    def end(*_):
        raise Terminated(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _default_model() -> str | None:
    checkout = Path(__file__).parents[2]
    return next((str(path) for path in (DEFAULT_MODEL, checkout / DEFAULT_MODEL) if path.is_dir()), None)
