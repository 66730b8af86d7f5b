"""`optsg tag`: tags for pictures, clips and folders of them."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from .media_files import MediaFile, find_media_files
from .terminal import ReportHandler, TagTable, printable, say

DEFAULT_MODEL = Path("checkpoints", "optsg-icon-small")
LIBRARY_WARNINGS = ReportHandler("optsg tag")
EPILOG = """\
A folder's titles come from a metadata.jsonl, metadata.csv or metadata.parquet
in it, with the columns file_name and title.

exit status: 0 every file is tagged; 1 some are not, each is named on standard
error; 2 the command line or the model cannot be used; 130 interrupted.
"""


def add_command(commands):
    parser = commands.add_parser(
        "tag",
        help="tags for pictures, clips and folders",
        description="Writes the tags of pictures and clips, each with its probability.\n"
        "A tag that was not among the training tags is marked novel.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="picture, clip, or folder searched to its depth")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"checkpoint folder or Hub name (default: {DEFAULT_MODEL}, if it is there)",
    )
    titles = parser.add_mutually_exclusive_group()
    titles.add_argument("--title", metavar="TEXT", help="title of the one picture or clip given")
    titles.add_argument("--title-from-name", action="store_true", help="take the file names as titles")
    parser.add_argument("--threshold", type=_probability, metavar="P", help="leave out tags less probable than this")
    parser.add_argument("--max-tags", type=_positive, metavar="N", help="at most this many tags a file")
    parser.add_argument("--decoding", choices=("parallel", "sequential"), help="write all tags at once or in turn")
    parser.add_argument("--frames", type=_positive, metavar="N", help="look at this many frames of each clip")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="files at a time (default: 16)")
    parser.add_argument("--json", action="store_true", help="one JSON object a file and line, instead of a table")
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


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.title is not None and (len(args.files) > 1 or Path(args.files[0]).is_dir()):
        parser.error("--title is for one picture or clip; titles of several come from --title-from-name or metadata")
    name = args.model or _default_model()
    if name is None:
        parser.error(f"--model is needed: there is no {DEFAULT_MODEL} here")

    found = find_media_files(args.files, args.title or None, args.title_from_name)
    report = _Report([file.path for file in found.files], args.json)
    for note in found.notes:
        report.note(note)
    for path, reason in found.failures:
        report.failure(path, None, reason)
    if found.files:
        logging.getLogger("modeling_optsg").addHandler(LIBRARY_WARNINGS)
        try:
            model, processor = _load(name, args.frames)
        except Exception as error:  # the libraries raise anything from KeyError to SafetensorError on a damaged folder
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            parser.exit(2, printable(f"{parser.prog}: model {name} cannot be loaded: {reason}") + "\n")
        settings = {"threshold": args.threshold, "max_tags": args.max_tags, "decoding": args.decoding}
        settings = {setting: value for setting, value in settings.items() if value is not None}
        several = len(found.files) > args.batch_size
        with tqdm(total=len(found.files), unit="file", disable=None if several else True) as progress:
            for batch in _batches(found.files, args.batch_size):
                for file, outcome in zip(batch, _tag(model, processor, batch, settings), strict=True):
                    report.outcome(file, outcome)
                progress.update(len(batch))
    return report.close()


def _default_model() -> str | None:
    checkout = Path(__file__).parents[2]
    return next((str(path) for path in (DEFAULT_MODEL, checkout / DEFAULT_MODEL) if path.is_dir()), None)


def _load(name: str, num_frames: int | None):
    import torch
    import transformers
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor

    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise FileNotFoundError("there is no such folder, and a Hub name has the form org/name") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_type = OPTSGConfig.get_config_dict(name)[0].get("model_type")
    if model_type != OPTSGConfig.model_type:
        raise ValueError(f"its model_type is {model_type!r}, expected {OPTSGConfig.model_type!r}")
    processor = OPTSGProcessor.from_pretrained(name)
    model, loading = OPTSGForTagGeneration.from_pretrained(name, output_loading_info=True)
    if missing := loading["missing_keys"]:
        raise ValueError(f"{len(missing)} of its weights are missing, {sorted(missing)[0]} among them")
    if num_frames is not None:
        if num_frames > model.config.max_frames:
            raise ValueError(f"it looks at no more than {model.config.max_frames} frames, --frames is {num_frames}")
        processor.num_frames = num_frames
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, processor


def _batches(files: list[MediaFile], size: int) -> Iterator[list[MediaFile]]:
    # Pictures and clips apart: beside a clip, a picture would be padded to the clip's frames and cost as much.
    for _, run in groupby(files, key=lambda file: file.is_clip):
        run = list(run)
        yield from (run[start : start + size] for start in range(0, len(run), size))


def _tag(model, processor, batch: list[MediaFile], settings: dict) -> list[list[dict] | Exception]:
    """One outcome a file, in order: its tags, or why it has none."""
    try:
        inputs = processor(
            images=[None if file.is_clip else file.path for file in batch],
            videos=[file.path if file.is_clip else None for file in batch],
            titles=[file.title for file in batch],
            return_tensors="pt",
        )
    except (ValueError, OSError, ImportError) as error:
        if len(batch) == 1:
            return [error]
        # Halves, so that a bad file costs its neighbours neither their tags nor their company in a batch.
        half = len(batch) // 2
        return [o for part in (batch[:half], batch[half:]) for o in _tag(model, processor, part, settings)]
    outputs = model.generate(**inputs.to(model.device), **settings)
    return processor.batch_decode(outputs)


class _Report:
    """Tags on standard output, as a table or as JSON lines; everything else on standard error."""

    def __init__(self, files: list[str], as_json: bool):
        self.table = None if as_json else TagTable(files)
        self.tagged = self.failed = 0

    def outcome(self, file: MediaFile, outcome: list[dict] | Exception):
        if isinstance(outcome, Exception):
            self.failure(file.path, file.title, str(outcome))
            return
        if self.table is None:
            self._json(file=file.path, title=file.title, tags=outcome)
        else:
            if self.tagged == 0:
                say(self.table.header())
            say(self.table.rows(file.path, outcome))
        self.tagged += 1

    def failure(self, path: str, title: str | None, reason: str):
        self.failed += 1
        self.note(reason if path in reason else f"{path}: {reason}")
        if self.table is None:
            self._json(file=path, title=title, error=reason)

    def note(self, text: str):
        say(f"optsg tag: {printable(text)}", file=sys.stderr)

    def close(self) -> int:
        if self.failed:
            self.note(f"{self.failed} could not be used, {self.tagged} tagged")
        return 1 if self.failed else 0

    def _json(self, **line):
        # ASCII, whatever the terminal's encoding: an escape that a stream put in for itself would not be JSON.
        say(json.dumps(line))
