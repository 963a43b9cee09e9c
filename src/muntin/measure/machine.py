"""What was measured on: processor, versions, commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from muntin.errors import UserError

PACKAGES = ("muntin", "torch", "torchvision", "timm", "transformers", "onnxruntime", "openvino", "numpy")
FLAGS = ("amx_tile", "amx_bf16", "amx_int8", "avx512f", "avx512_bf16", "avx512_vnni", "avx2", "fma", "sve", "asimd")


def _cpu() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((found.get("flags") or found.get("Features") or "").split())
    return found.get("model name", platform.machine()), [flag for flag in FLAGS if flag in flags]


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    model, flags = _cpu()
    described: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "flags": flags,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if hasattr(os, "getloadavg"):
        described["load_before"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def threads_in_words(count: int) -> str:
    return f"{count} thread" + "s" * (count != 1)


def device_of(name: str | None) -> torch.device:
    """cpu or cuda by name, by default the GPU where there is one. UserError for another, or one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is unknown; valid are cpu and cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {name!r} is not there; this machine offers cpu")
    return torch.device(name)


def versions() -> dict[str, str]:
    """Python and those of the packages measured here that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this source, "-dirty" with changes in it; None where it is not in a repository."""

    def git(*arguments: str) -> str:
        here = Path(__file__)
        run = subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie in another repository
        changed = git("status", "--porcelain", "--untracked-files=no", ":/src")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
