"""Publish checkpoints and datasets on the Hub."""

from .model_card import write_model_card

__all__ = ["write_model_card"]
