"""Runs exported models with onnxruntime, without torch and transformers."""

from .tagger import OnnxTagger

__all__ = ["OnnxTagger"]
