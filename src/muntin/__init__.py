"""Muntin: efficient hierarchical vision transformers."""

__version__ = "0.1.0"

from muntin.errors import UserError
from muntin.heads import create_dense
from muntin.models import create_backbone, create_model, list_models
from muntin.runtime import compile, export, optimize
from muntin.weights import LoadReport, load_checkpoint

__all__ = [
    "LoadReport",
    "UserError",
    "compile",
    "create_backbone",
    "create_dense",
    "create_model",
    "export",
    "list_models",
    "load_checkpoint",
    "optimize",
]
