"""Loads a model and its processor with the `Auto` classes."""

import importlib
import importlib.util
from pathlib import Path

from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

PACKAGE = "modeling_optsg"


def load_model(model: str) -> PreTrainedModel:
    """Load a model for inference.

    Args:
        model: Folder of the model or its name on the Hub.

    Raises:
        ImportError: The folder holds no code and the package is not installed.
    """
    return AutoModel.from_pretrained(model, trust_remote_code=_needs_remote_code(model)).eval()


def load_processor(model: str) -> ProcessorMixin:
    """Load the processor of a model.

    Args:
        model: Folder of the model or its name on the Hub.

    Raises:
        ImportError: The folder holds no code and the package is not installed.
    """
    return AutoProcessor.from_pretrained(model, trust_remote_code=_needs_remote_code(model))


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
