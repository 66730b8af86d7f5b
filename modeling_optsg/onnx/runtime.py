"""Runs the exported programs of a model with onnxruntime, under the `generate` of the model."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from modeling_optsg.model_outputs import OPTSGModelOutput
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.tag_classifier import LabelVocabulary
from modeling_optsg.tag_decoder import SlotRows

from .export import ENCODER, STEP


class Session:
    """A program with named inputs and outputs as tensors in main memory."""

    def __init__(self, path: Path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the program. Inputs that it does not read are ignored."""
        arrays = {name: np.ascontiguousarray(inputs[name].numpy()) for name in self.inputs}
        return dict(zip(self.outputs, map(torch.from_numpy, self.session.run(None, arrays)), strict=True))


@dataclass
class OnnxEvidence:
    """What an encoder program says about a batch; see [`EncoderProgram.forward`]."""

    classifier_logits: torch.Tensor
    has_title: torch.Tensor
    uses_image: torch.Tensor
    uses_words: torch.Tensor
    reads_words: torch.Tensor


class OnnxEncoder(nn.Module):
    """In place of the [`OPTSGModel`] of a model."""

    def __init__(self, path: Path):
        super().__init__()
        self.session = Session(path)
        self.size = self.session.inputs["pixel_values"].shape[-2:]

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **others: object,
    ) -> OPTSGModelOutput:
        """Encode a batch. The memory is that of all layers, `[2, layers, ...]`; see [`EncoderProgram.forward`]."""
        given = [name for name, value in others.items() if isinstance(value, torch.Tensor)]
        if given := given + ["output_attentions"] * bool(others.get("output_attentions")):
            raise ValueError(f"An exported model has no input {', '.join(given)}; pass pixel_values and input_ids.")
        batch = len(input_ids if pixel_values is None else pixel_values)
        if pixel_values is None:
            pixel_values, frame_mask = torch.zeros(batch, 1, 3, *self.size), torch.zeros(batch, 1)
        if input_ids is None:
            input_ids = attention_mask = torch.zeros(batch, 1)
        frame_mask = torch.ones(pixel_values.shape[:2]) if frame_mask is None else frame_mask
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found = self.session(
            pixel_values=pixel_values.float(),
            frame_mask=frame_mask.long(),
            input_ids=input_ids.long(),
            attention_mask=attention_mask.long(),
        )
        keys, values = found.pop("memory_keys"), found.pop("memory_values")
        order_prompts, memory_mask = found.pop("order_prompts"), found.pop("memory_mask")
        evidence = OnnxEvidence(**found) if found else None
        return OPTSGModelOutput(
            order_prompts=order_prompts,
            memory=torch.stack([keys, values]),
            memory_mask=memory_mask,
            evidence=evidence,
        )


class OnnxTagClassifier(nn.Module):
    """In place of the [`TagClassifier`] of a model: its logits are outputs of the encoder program."""

    def __init__(self, label_vocabulary: LabelVocabulary):
        super().__init__()
        self.label_vocabulary = label_vocabulary

    def logits(
        self,
        evidence: OnnxEvidence,
        scale: torch.Tensor | float = 1.0,
        bias: torch.Tensor | float = 0.0,
        logit_adjustment: float = 0.0,
    ) -> torch.Tensor:
        """Return the logits `[batch, num_tag_classes]`; see [`TagClassifier.logits`].

        Raises:
            ValueError: An image without a title has image words, which are averaged after the calibration.
        """
        if evidence.uses_words.any():
            raise ValueError("An exported model with image words needs a title for every image.")
        return self.label_vocabulary.adjust_logits(evidence.classifier_logits, logit_adjustment)


class OnnxTagDecoder(nn.Module):
    """In place of the [`TagDecoder`] of a model. Its hidden states are logits."""

    def __init__(self, path: Path, config: object):
        super().__init__()
        self.config, self.session = config, Session(path)

    def cache_memory(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the keys and values of the memory, which are outputs of the encoder program."""
        return memory

    def embed(
        self, prompts: torch.Tensor, position: torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the program embeds. The position follows from the cache."""
        return prompts, input_ids

    def step(
        self,
        embedded: tuple[torch.Tensor, torch.Tensor],
        cache: DynamicCache,
        cache_mask: torch.Tensor | None,
        rows: SlotRows,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Decode one more position; see [`TagDecoder.step`].

        Raises:
            ValueError: Decoding is sequential.
        """
        if cache_mask is not None:
            raise ValueError('An exported model decodes in parallel; pass decoding="parallel".')
        prompts, input_ids = embedded
        layers, heads, size = memory.shape[1], memory.shape[3], memory.shape[5]
        length = cache.get_seq_length()
        shape = (len(input_ids), heads, length, size)
        states = [
            torch.stack([rows.by_example(getattr(layer, name).flatten(1)) for layer in cache.layers])
            if length
            else torch.zeros(layers, rows.batch, rows.max_slots, 0)
            for name in ("keys", "values")
        ]
        keys, values = (part.unflatten(3, shape[1:]) for part in states)
        found = self.session(
            prompts=rows.by_example(prompts),
            position=torch.tensor([length]),
            input_ids=rows.by_example(input_ids[:, None])[..., 0],
            keys=keys,
            values=values,
            memory_keys=memory[0],
            memory_values=memory[1],
            memory_mask=memory_mask,
        )
        for index in range(layers):
            last = (found[name][index, :, :, :, -1:].flatten(2) for name in ("next_keys", "next_values"))
            key, value = (rows.by_slot(part).unflatten(1, (heads, 1, size)) for part in last)
            cache.update(key, value, index)
        return rows.by_slot(found["logits"])


def load_onnx(model: OPTSGForTagGeneration, folder: Path) -> OPTSGForTagGeneration:
    """Return a copy of a model whose weights are those of the exported programs in a folder.

    Args:
        model: The model that was exported, for its settings and its label vocabulary.
        folder: Folder that [`export_onnx`] wrote to.

    Raises:
        ImportError: `onnxruntime` is not installed.
    """
    exported = copy.copy(model)
    exported._modules = dict(model._modules)
    exported.model = OnnxEncoder(Path(folder, ENCODER))
    exported.tag_decoder = OnnxTagDecoder(Path(folder, STEP), model.config)
    exported.lm_head = nn.Identity()
    if model.tag_classifier is not None:
        exported.tag_classifier = OnnxTagClassifier(model.tag_classifier.label_vocabulary)
    return exported
