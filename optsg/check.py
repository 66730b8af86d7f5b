"""`optsg check`: look for problems in a dataset before training."""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from .dataset_arguments import add_dataset_arguments, load_dataset
from .tagger import exit_if_unusable, load_processor
from .terminal import StderrHandler, printable

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from modeling_optsg.data.data_report import DataReport


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `check` to the sub-commands of `optsg`."""
    parser = commands.add_parser(
        "check",
        help="look for problems in a dataset before training",
        description="Counts the examples and tags of a dataset, reads every image and video once, and lists\n"
        "unreadable files, duplicates, spellings of one tag, and what training leaves out.",
        epilog="exit status: 0 the dataset was checked, whatever was found; 2 the dataset or the model cannot be\n"
        "loaded.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dataset_arguments(parser)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="checkpoint to fine-tune, a folder or a name on the Hub (default: training from pretrained towers with "
        "its default arguments)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all findings")
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        with _warnings_on_stderr():
            report = _check(parser, args, load_dataset(args))
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        print(f"optsg check: {printable(str(error))}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), allow_nan=False) if args.json else "\n".join(report.lines()))
    return 0


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print warnings of the dataset's loader and of the video reader above the progress bar."""
    handler = StderrHandler("optsg check")
    loggers = [logging.getLogger(name) for name in ("dataset_scripts", "modeling_optsg")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace, splits: Mapping[str, "Dataset"]) -> "DataReport":
    from modeling_optsg import OPTSGConfig
    from modeling_optsg.data.data_check import check_data
    from modeling_optsg.training.arguments import TOWER_DEFAULTS

    progress = sys.stderr.isatty()
    if not args.model:
        tag_tokenizer = _train_tag_tokenizer(splits, TOWER_DEFAULTS["tag_vocab_size"])
        max_tag_tokens = TOWER_DEFAULTS["max_tag_tokens"]
        return check_data(splits, tag_tokenizer, max_tag_tokens, OPTSGConfig.num_prompts, progress=progress)
    with exit_if_unusable(parser, args.model):
        processor = load_processor(args.model)
    return check_data(
        splits,
        processor.tag_tokenizer,
        processor.max_tag_tokens,
        processor.num_prompts,
        text_tokenizer=processor.tokenizer,
        progress=progress,
    )


def _train_tag_tokenizer(splits: Mapping[str, "Dataset"], vocab_size: int) -> "PreTrainedTokenizerBase | None":
    """Return the tag tokenizer that a training run from pretrained towers would have, `None` without training tags."""
    from modeling_optsg import train_tag_tokenizer

    tags = [tag for own in splits["train"]["tags"] for tag in own] if "train" in splits else []
    return train_tag_tokenizer(tags, vocab_size) if tags else None
