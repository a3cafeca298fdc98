"""Which device and dtype to compute with, where the user names none, and what is wrong with those that are named."""

from __future__ import annotations

import torch


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, else the current CUDA (or ROCm) device, else the CPU; a GPU always with its index, which some
    functions of torch.cuda ask for. Raises ValueError if it is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is no torch device; use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "`zimage doctor` tells more, --device cpu works anywhere"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named dtype, else bf16, or fp16 on GPUs older than bf16. Raises ValueError for any other type."""
    if dtype is None:
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        return torch.float16 if old and torch.version.hip is None else torch.bfloat16
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype {dtype!r}: use bfloat16, float16 or float32")
    return chosen
