"""Muntin: efficient hierarchical vision transformers."""

from muntin.errors import UserError
from muntin.models import create_backbone, create_model, list_models

__version__ = "0.1.0"
__all__ = ["UserError", "create_backbone", "create_model", "list_models"]
