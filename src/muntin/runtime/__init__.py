"""Running models elsewhere and faster: export with verification, engines behind one call."""

from muntin.runtime.compile import Compiled, compile
from muntin.runtime.dense_engine import DenseEngine, dense_engine
from muntin.runtime.engines import Engine, load
from muntin.runtime.export import Check, ExportError, ExportReport, export
from muntin.runtime.optimize import fold, optimize

__all__ = [
    "Check",
    "Compiled",
    "DenseEngine",
    "Engine",
    "ExportError",
    "ExportReport",
    "compile",
    "dense_engine",
    "export",
    "fold",
    "load",
    "optimize",
]
