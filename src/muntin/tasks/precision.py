"""Which precision a training uses."""

import platform

import torch


def choose_precision() -> tuple[str, str]:
    """`precision=auto`: what is used, and why.

    Decided by rule, not by timing, so that runs can be repeated: bfloat16 where the hardware multiplies it natively.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU multiplies bfloat16 natively"
        return "32", "this GPU has no native bfloat16"
    if torch.backends.mps.is_available():
        return "32", "bfloat16 is untested on this device"
    if not _cpu_multiplies_bf16():
        return "32", f"this {platform.machine()} CPU is not known to multiply bfloat16 natively"
    return "bf16", "this CPU multiplies bfloat16 natively"


def _cpu_multiplies_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return torch.cpu._is_avx512_bf16_supported()  # torch 2.10
