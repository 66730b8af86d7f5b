"""The checkpoint that a training is for."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from modeling_optsg.data.atomic_files import PARTIAL, cannot_be_written, sync, sync_all

# The widest tables, a row a token or a tag, bear a coarser rounding than 16 bits.
EIGHT_BIT_TABLES = (
    "tag_decoder.token_embeddings.weight",
    "tag_classifier.classifier.class_embeddings.weight",
    "model.text_tower.embeddings.word_embeddings.weight",
)


def save_checkpoint(model, processor, folder: Path, half: bool = False) -> None:
    """Saves a model and its processor, file by file, each there as a whole: only the weights differ from one
    checkpoint of a run to the next.

    Args:
        half: 16-bit weights, tables of tokens and tags 8-bit; they are used in 32 bits.

    Raises:
        OSError: the disk is full or not to be written on; the checkpoint of before stays.
    """
    state_dict = None
    if half:
        # Buffers are batch-norm statistics, whose small variances 16 bits lose; `dtype` in config.json stays float32,
        # so that the weights are used in 32 bits.
        buffers = {name for name, _ in model.named_buffers()}
        tied = set(model.all_tied_weights_keys)
        state_dict = {
            name: tensor.to(torch.float8_e4m3fn if name in EIGHT_BIT_TABLES else torch.float16)
            if tensor.is_floating_point() and name not in buffers
            else tensor
            for name, tensor in model.state_dict().items()
            if name not in tied
        }
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{PARTIAL}-*"):
        shutil.rmtree(left)
    with TemporaryDirectory(dir=folder, prefix=f"{PARTIAL}-") as partial:
        try:
            model.save_pretrained(partial, state_dict=state_dict)
            processor.save_pretrained(partial)
            # safetensors lets nobody else read what it writes.
            for weights in Path(partial).glob("*.safetensors"):
                shutil.copymode(Path(partial, "config.json"), weights)
            sync_all(Path(partial))
        except Exception as error:
            raise cannot_be_written("the checkpoint", folder, error) from error
        for path in (path for path in Path(partial).rglob("*") if path.is_file()):
            final = folder / path.relative_to(partial)
            final.parent.mkdir(exist_ok=True)
            os.replace(path, final)
        sync(folder)
