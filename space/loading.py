"""Loads a model and its processor with the `Auto` classes."""

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

logger = logging.getLogger(__name__)

PACKAGE = "modeling_optsg"
# Folder of the book inside a checkpoint.
INDEX_FOLDER = "index"


def load_model(model: str) -> PreTrainedModel:
    """Load a model for inference.

    Args:
        model: Folder of the model or its name on the Hub.

    Raises:
        ImportError: The folder holds no code and the package is not installed.
    """
    return AutoModel.from_pretrained(model, trust_remote_code=_needs_remote_code(model)).prepare_for_inference()


def load_processor(model: str) -> ProcessorMixin:
    """Load the processor of a model.

    Args:
        model: Folder of the model or its name on the Hub.

    Raises:
        ImportError: The folder holds no code and the package is not installed.
    """
    return AutoProcessor.from_pretrained(model, trust_remote_code=_needs_remote_code(model))


def load_book(model: str, loaded: PreTrainedModel, processor: ProcessorMixin, book: str | None) -> Any:
    """Load a `BookTagger` of the installed package.

    Args:
        model: Folder of the model or its name on the Hub.
        loaded: The model.
        processor: Its processor.
        book: Folder or Hub name of a checkpoint with a book, or folder of a book. `None` stands for the book in the
            folder of the model.

    Returns:
        The `BookTagger`, `None` without a book. If the book in the folder of the model cannot be used, a warning is
        logged.

    Raises:
        ImportError: `book` is given, and the package or `faiss` is not installed.
        FileNotFoundError: There is no such book.
        ValueError: The book is damaged or was made with another model.
    """
    if book is None and not Path(model, INDEX_FOLDER).is_dir():
        return None
    try:
        if importlib.util.find_spec(PACKAGE) is None:
            raise ImportError("A book needs the package optsg. Add it to requirements.txt.")
        tagger = importlib.import_module(f"{PACKAGE}.book").BookTagger(loaded, processor, book or model)
        # Two visitors at the same time would make the indices twice.
        tagger.book.prepare()
    except (ImportError, OSError, ValueError) as error:
        if book is not None:
            raise
        logger.warning(f"The book of {model} is not used: {error}")
        return None
    return tagger


def _needs_remote_code(model: str) -> bool:
    """Register the classes of the installed package, or report that the code must come with the model.

    A clone of the repository has the package. A Space on the Hub has only `requirements.txt`; models pushed to the Hub
    hold their code.
    """
    if importlib.util.find_spec(PACKAGE) is not None:
        # The import registers the classes with the `Auto` classes.
        importlib.import_module(PACKAGE)
        return False
    if Path(model).is_dir() and not any(Path(model).glob("*.py")):
        raise ImportError(
            f"{model} holds no code, and the package {PACKAGE} is not installed. Run `pip install .` in the clone of "
            "the repository, or set OPTSG_MODEL to a model on the Hub."
        )
    return True
