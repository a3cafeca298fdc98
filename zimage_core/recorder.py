"""What the stages of a call took: seconds, and peak memory on the device and of this process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

OnStage = Callable[[str, int], object]


@dataclass(frozen=True)
class StageRecord:
    """What one stage took: seconds, and peak bytes on the device and resident in the host's memory while it ran.

    device_peak counts tensors, device_reserved all that torch's allocator held for them; both are None on a CPU.
    host_peak is None where the system does not count a stage's own (it does on Linux).
    """

    name: str
    seconds: float
    device_peak: int | None
    device_reserved: int | None
    host_peak: int | None


class Recorder:
    """Announces the stages of one call by on_stage(name, steps), and keeps what each took in `stages`."""

    def __init__(self, device: torch.device, on_stage: OnStage | None = None):
        self.stages: list[StageRecord] = []
        self._device = device
        self._on_stage = on_stage

    @contextlib.contextmanager
    def __call__(self, name: str, steps: int = 1) -> Iterator[None]:
        """Measure a stage while it runs; one that raises is not recorded."""
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        counted = reset_host_peak()
        if self._on_stage:
            self._on_stage(name, steps)
        start = time.perf_counter()
        yield
        if on_cuda:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self._device) if on_cuda else None
        reserved = torch.cuda.max_memory_reserved(self._device) if on_cuda else None
        self.stages.append(StageRecord(name, seconds, peak, reserved, host_peak() if counted else None))


def reset_host_peak() -> bool:
    """Let the system count this process's peak of resident memory from now on; False where it cannot (proc(5))."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        return False
    return True


def host_peak() -> int:
    """Peak resident bytes of this process since `reset_host_peak`, files that it has mapped included."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
