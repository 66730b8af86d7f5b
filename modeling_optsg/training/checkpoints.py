"""Saving the checkpoint that a training produces."""

import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.retrieval import BOOK_FOLDER
from modeling_optsg.data.atomic_files import PARTIAL, cannot_be_written, sync, sync_all
from modeling_optsg.data.training_summary import SUMMARY
from modeling_optsg.processing_optsg import OPTSGProcessor

from .lora import ADAPTER_FOLDER, AdapterStates, save_adapters

# Tables with a row per token or tag, the first layers of wide inputs, and the feed-forward layers of the text tower
# tolerate a coarser rounding than 16 bits.
EIGHT_BIT_WEIGHTS = re.compile(
    "|".join(
        (
            r"tag_decoder\.token_embeddings\.weight",
            r"tag_classifier\.class_embeddings\.weight",
            r"model\.text_tower\.embeddings\.word_embeddings\.weight",
            r"model\.image_words\.classifier\.weight",
            r"model\.multimodal_encoder\.evidence_pooler\.image_inner\.weight",
            r"model\.multimodal_encoder\.prompt_pooler\.inner\.weight",
            r"model\.text_tower\.encoder\.layer\.\d+\.(intermediate|output)\.dense\.weight",
        )
    )
)


def save_checkpoint(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    folder: Path,
    half_precision: bool = False,
    adapters: AdapterStates | None = None,
) -> None:
    """Save a model and its processor so that each file is replaced as a whole.

    Args:
        model: The model.
        processor: Its processor.
        folder: Folder of the checkpoint.
        half_precision: Save 16-bit weights and 8-bit `EIGHT_BIT_WEIGHTS`. They load as 32-bit.
        adapters: Adapters to save as well, from [`adapter_states`].

    Raises:
        OSError: The folder cannot be written to. The previous checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{PARTIAL}-*"):
        shutil.rmtree(left_over)
    with TemporaryDirectory(dir=folder, prefix=f"{PARTIAL}-") as partial:
        try:
            model.save_pretrained(partial, state_dict=_half_precision_state(model) if half_precision else None)
            _use_registered_pipeline(Path(partial, "config.json"))
            processor.save_pretrained(partial)
            save_adapters(adapters or {}, Path(partial))
            # safetensors makes its files readable by their owner alone.
            for weights in Path(partial).rglob("*.safetensors"):
                shutil.copymode(Path(partial, "config.json"), weights)
            sync_all(Path(partial))
        except Exception as error:
            raise cannot_be_written("the checkpoint", folder, error) from error
        for path in (path for path in Path(partial).rglob("*") if path.is_file()):
            final = folder / path.relative_to(partial)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)
        sync(folder)


def delete_extra_files(folder: Path) -> None:
    """Delete the adapters, the book and the summary of an earlier run, which the new checkpoint may not have.

    A folder without a checkpoint or a summary is not changed: folders of these names are not from a training run.
    """
    if not any((folder / name).is_file() for name in ("config.json", SUMMARY)):
        return
    for name in (ADAPTER_FOLDER, BOOK_FOLDER):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    (folder / SUMMARY).unlink(missing_ok=True)


def _use_registered_pipeline(config: Path) -> None:
    """Remove `custom_pipelines`, so that `pipeline` uses the registered class without `trust_remote_code`.

    `optsg push` adds the field again.
    """
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("custom_pipelines", None)
    config.write_text(json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def is_eight_bit(name: str) -> bool:
    """Return whether a weight is saved in 8 bits with `half_precision`."""
    return EIGHT_BIT_WEIGHTS.fullmatch(name) is not None


def _half_precision_state(model: OPTSGPreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state with rounded weights; `dtype` in config.json stays float32, so they load as such."""
    # Vectors among the buffers keep 32 bits: 16 bits would lose small variances of batch norms.
    buffers = {name for name, buffer in model.named_buffers() if buffer.dim() < 2}
    tied = set(model.all_tied_weights_keys)
    return {
        name: tensor.to(torch.float8_e4m3fn if is_eight_bit(name) else torch.float16)
        if tensor.is_floating_point() and name not in buffers
        else tensor
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
