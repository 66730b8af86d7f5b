"""The `optsg` command: one module a sub-command.

A sub-command's module has `add_command(commands)`, which describes its arguments and sets `run`, and imports torch and
transformers only inside it, so that `optsg --help` answers at once.
"""

import argparse
import importlib.metadata
import io
import os
import sys

from . import export, push, stats, tag

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as a shell reports them


def main(argv: list[str] | None = None) -> int:
    """Runs `optsg` on `argv` (the process's own arguments when left out) and returns its exit status."""
    try:
        version = importlib.metadata.version("optsg")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    parser = argparse.ArgumentParser(prog="optsg", description="Order-prompted tag generation.")
    parser.add_argument("--version", action="version", version=f"optsg {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    tag.add_command(commands)
    stats.add_command(commands)
    export.add_command(commands)
    push.add_command(commands)
    args = parser.parse_args(argv)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("optsg: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whatever is still buffered would raise again when the interpreter flushes it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


if __name__ == "__main__":
    sys.exit(main())
