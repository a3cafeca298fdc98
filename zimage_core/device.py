"""Choosing the device and dtype to compute with, and checking those that the user names."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, else the first kind that is there of CUDA (or ROCm), Intel's XPU, Apple's MPS and the CPU.

    A CUDA device always has its index, which some functions of torch.cuda ask for. ValueError if it is not there."""
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    if device is None:
        device = next((kind for kind, module in kinds.items() if module.is_available()), "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r} is no torch device; use cpu, cuda, cuda:0, xpu or mps") from None
    if device.type not in ("cpu", *kinds):
        raise ValueError(f"device {device}: expected cpu, cuda, xpu or mps, found {device.type}; nothing runs there")
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


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module: "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def host_memory() -> int | None:
    """Bytes of memory and swap that this process may take at most; None where the system does not say."""
    limits = []
    with suppress(OSError, ValueError, IndexError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}
        limits.append(sizes["MemTotal"] + sizes["SwapTotal"])
    with suppress(OSError, ValueError):  # of a container; "max" where it has none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    with suppress(ImportError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [soft] if soft != resource.RLIM_INFINITY else []
    if sys.platform == "win32":
        limits.append(_windows_memory())
    elif not limits and hasattr(os, "sysconf"):
        with suppress(OSError, ValueError):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(filter(None, limits), default=None)


def _windows_memory() -> int | None:
    """Bytes of memory and page file on Windows, None where it does not say.

    Source: Microsoft's `MEMORYSTATUSEX`: two 32-bit numbers, its length first, then seven of 64 bits.
    """
    import ctypes

    status = (ctypes.c_uint64 * 8)()
    ctypes.memmove(status, ctypes.sizeof(status).to_bytes(4, "little"), 4)
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  # only Windows' ctypes has it
    return status[3] if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None  # ullTotalPageFile
