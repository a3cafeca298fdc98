"""Timing calls: by the GPU's time alone, or a CPU's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PAUSE_CYCLES, MOST_CYCLES = 2 * 10**6, 10**8  # of a GPU, 1 to 60 ms, in which the host launches a call
FLUSH_BYTES = 96 * 2**20  # more than a GPU's cache holds
Elapsed = Callable[[Callable[[], object], torch.device], float]


def queued(device: torch.device) -> Elapsed:
    """A timer of a GPU's time: a call waits there behind a pause, longer than its launches take, and a flush.

    On a CPU `elapsed_ms`."""
    if device.type != "cuda":
        return elapsed_ms
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def timed(call: Callable[[], object], device: torch.device) -> float:
        cycles = PAUSE_CYCLES
        while True:
            before, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            begun = time.perf_counter()
            with torch.cuda.device(device):
                before.record()
                torch.cuda._sleep(cycles)
                flushed.zero_()
                start.record()
                call()
                end.record()
            host = (time.perf_counter() - begun) * 1e3
            end.synchronize()
            if host < before.elapsed_time(start) or cycles >= MOST_CYCLES:
                return start.elapsed_time(end)
            cycles *= 4

    return timed


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that a call takes: of the GPU, or by `cpu_clock`."""
    if device.type != "cuda":
        clock = cpu_clock()[1]
        begun = clock()
        call()
        return (clock() - begun) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cpu_clock() -> tuple[str, Callable[[], float]]:
    """Name and function of a CPU's clock: with one thread the process's processor time, else the time of day."""
    return ("processor time", time.process_time) if torch.get_num_threads() == 1 else ("time", time.perf_counter)
