"""The `optsg` command line."""

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run `optsg` and return its exit status; see [`command_line.main`]."""
    # Imported here, because `optsg.onnx` needs no commands.
    from .command_line import main

    return main(argv)
