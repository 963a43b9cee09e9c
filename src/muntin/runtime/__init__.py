"""Running models elsewhere and faster: export with verification, engines behind one call."""

from muntin.runtime.compile import Compiled, compile
from muntin.runtime.engines import Engine, load
from muntin.runtime.export import Check, ExportError, ExportReport, export
from muntin.runtime.optimize import fold, optimize

__all__ = [
    "Check",
    "Compiled",
    "Engine",
    "ExportError",
    "ExportReport",
    "compile",
    "export",
    "fold",
    "load",
    "optimize",
]
