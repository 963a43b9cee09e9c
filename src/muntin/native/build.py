"""Compiling kernels for the machine that runs them, once: those of programs, and those of training."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PROGRAMS, TRAINING, MAPS = "kernels.cpp", "training.cpp", "maps.cpp"
HEADERS = "products.h", "operands.h", "norms.h", "attention.h", "maps.h"
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC"]
SECONDS = 120  # a compiler that takes longer has hung


def cache_folder() -> Path:
    """Where compiled kernels are kept: $MUNTIN_CACHE, $XDG_CACHE_HOME/muntin or ~/.cache/muntin."""
    if "MUNTIN_CACHE" in os.environ:
        return Path(os.environ["MUNTIN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muntin"


@lru_cache(maxsize=3)
def library(source: str = PROGRAMS) -> Any:
    """The compiled kernels, or None where MUNTIN_NATIVE=0 is set or no compiler is at hand that makes them."""
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")
    if os.environ.get("MUNTIN_NATIVE") == "0" or not compiler or os.name == "nt":
        return None
    try:
        path = _path(compiler, source)
        if not path.exists():
            _build(compiler, source, path)
        try:
            return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
        except OSError:  # a damaged file
            _build(compiler, source, path)
            return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:  # RuntimeError: no home folder
        told = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        reason = told[-1] if told else error
        warnings.warn(
            f"muntin runs slower than it could: its kernels cannot be compiled by {shlex.join(compiler)} "
            f"({reason}). CXX names another compiler, MUNTIN_CACHE another folder; MUNTIN_NATIVE=0 turns them off.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _path(compiler: list[str], source: str) -> Path:
    """Of the compiled file. It is named by all that it is made from: the source, the flags, and the macros by which the
    compiler describes itself and this machine.
    """
    parts = [(FOLDER / name).read_bytes() for name in (*HEADERS, source)]
    macros = _run(*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    key = hashlib.sha256(b"\0".join([*parts, " ".join(FLAGS).encode(), macros])).hexdigest()[:24]
    return cache_folder() / f"{Path(source).stem}-{key}.so"


def _build(compiler: list[str], source: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _run(*compiler, *FLAGS, "-c", str(FOLDER / source), "-o", str(made))
        # without a library for threads: torch's own is there already, and two would fight for the cores
        _run(*compiler, "-shared", str(made), "-o", str(linked))
        os.replace(linked, path)


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=SECONDS).stdout
