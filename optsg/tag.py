"""`optsg tag`: tag images, videos and folders."""

import argparse
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

from .argument_types import add_skip_argument, positive, probability
from .file_tagger import FileTagger, TagSettings
from .media_files import MediaFile, find_media_files
from .model_argument import add_model_argument, chosen_model, is_export
from .sidecars import FORMATS, SidecarError, SidecarLocator, TagWriter, make_writer
from .sidecars.locations import NAMINGS
from .tag_report import TagReport
from .tagger import Fingerprinter, Tagger, exit_if_unusable, without_garbage_collection
from .terminal import StderrHandler, printable

LIBRARY_WARNINGS = StderrHandler("optsg tag")
TERMINATED = 143  # 128 + SIGTERM, as a shell reports it
EPILOG = """\
Titles are read from a metadata.jsonl, metadata.csv or metadata.parquet in the
folder, with the columns file_name and title (or caption, text, description).
Thumbnails and deleted files of NAS boxes and photo programs are skipped.

--write never changes an image or a video. Your own tags are kept. Tags from an
earlier run are removed if the model no longer predicts them. Tags that you
deleted are not added again. A new XMP sidecar starts with the keywords, rating,
title and description inside the image. A file without tags gets no sidecar. To
resume a stopped run, run the same command.

exit status: 0 all files were tagged; 1 some files failed, with the reason on
standard error; 2 the arguments are invalid, or the model or the book cannot be
used; 130 interrupted; 143 terminated.
"""


class Terminated(SystemExit):
    """The process received SIGTERM."""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `tag` to the sub-commands of `optsg`."""
    parser = commands.add_parser(
        "tag",
        help="tag images, videos and folders",
        description="Tags images and videos, and prints the probability of each tag.\n"
        "Tags that are not in the label vocabulary are marked as novel.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="image, video, or folder to search recursively")
    add_skip_argument(parser)
    _add_generation_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per file instead of a table")
    parser.add_argument(
        "--show-image-words",
        action="store_true",
        help="also print the image words, the classes that the vision tower predicts; they replace a missing title if "
        "the image is unlike the training images",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also print where each tag comes from: the model's slots or tag classifier, its book reader, or similar "
        "examples of --book",
    )
    _add_write_arguments(parser.add_argument_group("sidecars and tables"))
    parser.set_defaults(run=partial(_run, parser))


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(
        parser,
        "checkpoint folder or name on the Hub, or folder from `optsg export-onnx`, which tags images without PyTorch",
    )
    titles = parser.add_mutually_exclusive_group()
    titles.add_argument("--title", metavar="TEXT", help="title of the image or video, if there is only one")
    titles.add_argument("--title-from-name", action="store_true", help="use the file names as titles")
    parser.add_argument(
        "--threshold",
        "--min-score",
        type=probability,
        metavar="P",
        help="minimum probability of a tag (default: the thresholds of the model; photographs without a title get "
        "their five most probable tags; with --book, the threshold of the book)",
    )
    parser.add_argument("--max-tags", type=positive, metavar="N", help="maximum number of tags per file")
    parser.add_argument("--exclude", action="append", default=[], metavar="TAG", help="tag to exclude (repeatable)")
    parser.add_argument(
        "--exclude-file",
        type=_read_tags,
        action="append",
        default=[],
        metavar="FILE",
        help="file with tags to exclude, one per line (repeatable)",
    )
    parser.add_argument(
        "--vocabulary", type=_read_tags, metavar="FILE", help="file with the only tags to generate, one per line"
    )
    parser.add_argument(
        "--decoding",
        choices=("parallel", "sequential"),
        help="generate all tags in parallel or one after the other (default: the setting of the model)",
    )
    parser.add_argument(
        "--book",
        metavar="NAME",
        help="also use the tags of similar examples in a book: the folder that `optsg index` was given, the folder of "
        "a book, or the folder or Hub name of a checkpoint with one. With a book from `optsg index`, only its tags "
        "are suggested.",
    )
    parser.add_argument("--frames", type=positive, metavar="N", help="number of frames to read from each video")
    parser.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="number of files per batch (default: 16)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="number of threads for the model, and of threads that read files (default: one for each core)",
    )


def _add_write_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--write",
        action="append",
        choices=FORMATS,
        default=[],
        metavar="FORMAT",
        help="xmp, json or txt: write a sidecar for each file; csv or parquet: write one table (repeatable)",
    )
    group.add_argument(
        "--output", metavar="DIR", help="output folder with the same sub-folders (default: next to the images)"
    )
    group.add_argument(
        "--sidecar-names",
        choices=NAMINGS,
        default="full",
        help="full: photo.jpg.xmp for darktable, digiKam, Immich (default); stem: photo.xmp for Lightroom",
    )
    group.add_argument("--dry-run", action="store_true", help="print the changes without writing any files")
    group.add_argument("--redo", action="store_true", help="also tag files that are already tagged")


def _read_tags(name: str) -> frozenset[str]:
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read as UTF-8 text: {error}") from error
    if not (tags := frozenset(line.strip() for line in lines if line.strip())):
        raise argparse.ArgumentTypeError(f"{name} contains no tags; expected one per line")
    return tags


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    _check(parser, args)
    model = chosen_model(parser, args)
    if is_export(model):
        _check_export(parser, args, model)
    settings = TagSettings(
        threshold=args.threshold,
        max_tags=args.max_tags,
        decoding=args.decoding,
        frames=args.frames,
        exclude=frozenset(args.exclude).union(*args.exclude_file),
        vocabulary=args.vocabulary or frozenset(),
        book=args.book,
    )
    found = find_media_files(args.files, args.title or None, args.title_from_name, read_raw=True, skip=args.skip)
    with _sigterm_as_exception() if args.write else contextlib.nullcontext():
        writers = _make_writers(parser, args, model, settings) if found.files else []
        paths = [file.path for file in found.files]
        report = TagReport(paths, args.json, writers, args.dry_run, args.show_image_words, args.explain)
        try:
            for message in found.messages:
                report.add_message(message)
            for path, reason in found.failures:
                report.add_failure(path, None, reason)
            if pending := report.select_pending(found.files, args.redo):
                with exit_if_unusable(parser, model):
                    tagger = _load_tagger(model, settings, args.threads)
                _tag_files(tagger, pending, args.batch_size, report)
            return report.finish()
        except (KeyboardInterrupt, Terminated):
            report.report_stop()
            raise


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.title is not None and (len(args.files) > 1 or Path(args.files[0]).is_dir()):
        parser.error("--title needs exactly one image or video; for several, use --title-from-name or metadata")
    if args.book and args.vocabulary:
        parser.error("--book and --vocabulary exclude each other")
    for option in ("output", "dry_run", "redo"):
        if getattr(args, option) and not args.write:
            parser.error(f"--{option.replace('_', '-')} needs --write")


def _check_export(parser: argparse.ArgumentParser, args: argparse.Namespace, model: str) -> None:
    """Exit with a one-line message if an option needs PyTorch."""
    needs_torch = {name: getattr(args, name) for name in ("vocabulary", "book", "frames", "show_image_words")}
    needs_torch["decoding sequential"] = args.decoding == "sequential"
    for name, is_given in needs_torch.items():
        if is_given:
            option = f"--{name.replace('_', '-')}"
            reason = f"{option} needs a checkpoint, but {model} is an ONNX export; omit it, or give --model CHECKPOINT"
            parser.exit(2, printable(f"{parser.prog}: {reason}") + "\n")


def _make_writers(
    parser: argparse.ArgumentParser, args: argparse.Namespace, model: str, settings: TagSettings
) -> list[TagWriter]:
    if not args.write:
        return []
    with exit_if_unusable(parser, model):
        fingerprint = Fingerprinter(model, settings)
    locator = SidecarLocator(args.output, args.sidecar_names)
    model_name = Path(model).resolve().name if Path(model).is_dir() else model
    try:
        return [
            make_writer(file_format, locator, fingerprint, model_name, args.dry_run)
            for file_format in dict.fromkeys(args.write)
        ]
    except SidecarError as error:
        parser.error(printable(str(error)))


def _load_tagger(model: str, settings: TagSettings, num_threads: int | None) -> FileTagger:
    if is_export(model):
        with without_garbage_collection():
            try:
                from .onnx.files import OnnxFileTagger
            except ImportError as error:
                raise ImportError(f"{error}; an ONNX export needs: pip install onnxruntime tokenizers") from error
            return OnnxFileTagger(model, settings, num_threads)
    logging.getLogger("modeling_optsg").addHandler(LIBRARY_WARNINGS)
    # Before torch is loaded. Its threads would otherwise wait for work in a loop, on the cores that read files.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # When several threads end, MKL may otherwise release their memory in an endless loop.
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
    return Tagger(model, settings, num_threads)


def _tag_files(
    tagger: FileTagger, pending: list[tuple[MediaFile, list[TagWriter]]], batch_size: int, report: TagReport
) -> None:
    from tqdm import tqdm

    writers = {file.path: own for file, own in pending}
    with_metadata = {file.path for file, own in pending if any(writer.needs_metadata(file) for writer in own)}
    # None: the bar is shown if standard error is a terminal.
    hide_bar = None if len(pending) > batch_size else True
    with tqdm(total=len(pending), unit="file", disable=hide_bar) as progress:
        for file, result in tagger([file for file, _ in pending], batch_size, with_metadata):
            report.add_result(file, result, writers[file.path])
            progress.update()


@contextlib.contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, so that the program cleans up as it does on Ctrl-C."""

    def terminate(*_: object) -> NoReturn:
        raise Terminated(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
