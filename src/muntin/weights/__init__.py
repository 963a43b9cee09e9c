"""Weights from everywhere: other people's checkpoints under our names, and back."""

from muntin.weights.load import LoadReport, convert, load_checkpoint

__all__ = ["LoadReport", "convert", "load_checkpoint"]
