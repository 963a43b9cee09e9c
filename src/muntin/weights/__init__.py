"""Weights from everywhere: other people's checkpoints under our names, and back."""

from muntin.weights.load import LoadReport, convert, convert_file, load_checkpoint

__all__ = ["LoadReport", "convert", "convert_file", "load_checkpoint"]
