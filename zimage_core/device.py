"""Which device and dtype to compute with, where the user names none, and what is wrong with those that are named."""

from __future__ import annotations

import torch


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, else the first kind that is there of CUDA (or ROCm), Intel's XPU, Apple's MPS and the CPU.

    A CUDA device always has its index, which some functions of torch.cuda ask for. ValueError if it is not there."""
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    if device is None:
        device = next((kind for kind, module in kinds.items() if module.is_available()), "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is no torch device; use cpu, cuda, cuda:0, xpu or mps") from None
    if device.type in ("xpu", "mps") and not kinds[device.type].is_available():
        raise ValueError(f"device {device} is not there: torch {torch.__version__} sees none; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "`zimage doctor` tells more, --device cpu works anywhere"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named dtype, else bf16, or fp16 on GPUs and Macs older than bf16. Raises ValueError for any other type."""
    if dtype is None and device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    if dtype is None:
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        return torch.float16 if old and torch.version.hip is None else torch.bfloat16
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype {dtype!r}: use bfloat16, float16 or float32")
    return chosen
