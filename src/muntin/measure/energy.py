"""Energy, where the machine tells it: Intel's and AMD's counters of the processor package, NVIDIA's of the board."""

from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """A counter of joules. `least` is how many seconds must pass for its steps to matter little."""

    def __init__(self, read: Callable[[], float], least: float) -> None:
        self.least = least
        self._read = read

    def joules(self) -> float:
        """Since some fixed moment."""
        return self._read()


class Unwound:
    """A counter that starts again from zero at `wrap`, as one that does not."""

    def __init__(self, read: Callable[[], float], wrap: float) -> None:
        self.read, self.wrap = read, wrap
        self.last, self.passed = read(), 0.0

    def __call__(self) -> float:
        now = self.read()
        if now < self.last:
            self.passed += self.wrap
        self.last = now
        return self.passed + now


def meter(device: torch.device, powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """The counter for a device, or None; and where it comes from, or why there is none."""
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


def _rapl(powercap: Path) -> tuple[Meter | None, str]:
    """The sum over the processor packages; their parts (core, uncore, dram) are in them or stand beside them."""
    try:
        zones = [z for z in sorted(powercap.glob("*rapl:*")) if z.name.count(":") == 1 and "mmio" not in z.name]
        packages = [z for z in zones if (z / "name").read_text().startswith("package")]
        counters = [Unwound(_microjoules(z / "energy_uj"), _microjoules(z / "max_energy_range_uj")()) for z in packages]
    except PermissionError as error:
        return None, f"energy: {error.filename} may only be read by root, so there is no figure"
    except (OSError, ValueError) as error:
        return None, f"energy: {powercap} cannot be read ({error}), so there is no figure"
    if not counters:
        return None, f"energy: this machine tells none (no RAPL package under {powercap})"
    return Meter(lambda: sum(c() for c in counters), least=0.02), "energy: RAPL, processor packages"


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6


def _nvml(device: torch.device) -> tuple[Meter | None, str]:
    """The board's total since the driver was loaded, in steps of some 20 to 100 ms."""
    try:
        import pynvml
    except ImportError:
        return None, "energy: needs the package nvidia-ml-py; install it with: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return None, f"energy: NVML does not tell it ({error})"
    read: Callable[[], float] = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # noqa: E731
    return Meter(read, least=0.25), "energy: NVML, board"
