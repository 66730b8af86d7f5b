"""The `optsg` command, which dispatches to one module per sub-command.

The module of a sub-command has `add_command(commands)`, which describes its arguments and sets `run`. It imports
torch, transformers, datasets and `modeling_optsg` only inside the functions that need them, so that `optsg --help` is
fast.
"""

import argparse
import errno
import importlib.metadata
import io
import os
import sys
import warnings

from . import check, evaluate, export, export_onnx, index, push, stats, tag, train

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as a shell reports them


def main(argv: list[str] | None = None) -> int:
    """Run `optsg` and return its exit status.

    Args:
        argv: Arguments of the command; those of the process if omitted.
    """
    parser, commands = _build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # The message of argparse itself would show the usage of `optsg`, not of the command.
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # Of damaged metadata and many pixels; files that cannot be read are reported.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("optsg: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if not _is_closed_pipe(error):
            raise
        # The interpreter flushes what is still buffered when it exits, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _is_closed_pipe(error: OSError) -> bool:
    """Return whether the reader of the output has ended. Windows reports an invalid argument, without a file name."""
    is_windows = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or is_windows


def _build_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    parser = argparse.ArgumentParser(
        prog="optsg", description="Image and video tagging with Order-Prompted Tag Sequence Generation."
    )
    parser.add_argument("--version", action="version", version=f"optsg {_installed_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (tag, index, check, train, evaluate, stats, export, export_onnx, push):
        command.add_command(commands)
    return parser, commands


def _installed_version() -> str:
    try:
        return importlib.metadata.version("optsg")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
