"""A logger for programs with several processes, of which only the first one logs."""

import logging
from collections.abc import MutableMapping

from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter


class ProcessLogger(MultiProcessAdapter):
    """The logger of `accelerate`, which names the process in messages only if there are several.

    It also works before the state of `accelerate` exists, as in a program that prepares a model without training it.
    """

    def log(self, level: int, msg: str, *args: object, **kwargs: object) -> None:
        """Log a message in the first process."""
        if PartialState._shared_state:
            super().log(level, msg, *args, **kwargs)
        else:
            self.logger.log(level, msg, *args, **kwargs)

    def process(self, msg: str, kwargs: MutableMapping) -> tuple[str, MutableMapping]:
        """Return the message as it is logged, and the keyword arguments of the logging call."""
        named, kwargs = super().process(msg, kwargs)
        return msg if PartialState().num_processes == 1 else named, kwargs


def get_logger(name: str) -> ProcessLogger:
    """Return the logger of a module. It logs messages of the level INFO and above."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    return ProcessLogger(logger, {})
