"""Running models elsewhere and faster: export with verification, engines behind one call."""

from muntin.runtime.engines import Engine, load
from muntin.runtime.export import Check, ExportError, ExportReport, export

__all__ = ["Check", "Engine", "ExportError", "ExportReport", "export", "load"]
