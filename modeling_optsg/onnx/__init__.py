"""OP-TSG as two traced programs, for `torch.export`, `torch.compile` and ONNX."""

from .export import export_onnx
from .programs import DecodingStep, EncoderProgram
from .runtime import load_onnx

__all__ = ["DecodingStep", "EncoderProgram", "export_onnx", "load_onnx"]
