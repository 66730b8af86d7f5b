"""OP-TSG as traced programs, for `torch.export`, `torch.compile` and ONNX. `optsg.onnx` runs the exported files."""

from .export import check_output_folder, export_onnx
from .programs import ClassifierProgram, DecodingStep, EncoderProgram

__all__ = ["ClassifierProgram", "DecodingStep", "EncoderProgram", "check_output_folder", "export_onnx"]
