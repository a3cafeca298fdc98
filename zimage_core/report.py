"""What benchmarks and `zimage verify` say of the machine, and their figures as a table and as a line of JSON."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import __version__
from .clock import cpu_clock
from .device import dtype_name
from .linear import backends
from .sizes import GIB
from .tune import select


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Date, versions, device, what `auto` takes there, and the backends that are unavailable and why."""
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "zimage": __version__,
        "device": backends.describe(device) if device.type == "cuda" else _processor(),
        "dtype": dtype_name(dtype),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        facts |= {"gib": round(torch.cuda.get_device_properties(device).total_memory / GIB, 1)}
    else:
        facts |= {"threads": torch.get_num_threads(), "clock": cpu_clock()[0]}
    auto = select(device=device, dtype=dtype)
    facts["auto"] = f"{auto.name} {auto.precision}"
    return facts | {"unavailable": {name: why for name, why, _ in backends.report(device, dtype) if why}}


def _processor() -> str:
    """The processor's name, or its architecture if the system does not report one."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table with aligned columns; `columns` maps a key to its heading and format ("ms|.1f")."""
    cells = [[heading.partition("|")[0] for heading in columns.values()]]
    for row in rows:
        cells.append([_cell(row.get(key), heading.partition("|")[2]) for key, heading in columns.items()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [any(isinstance(row.get(key), (int, float)) for row in rows) for key in columns]
    padded = [
        [text.rjust(width) if right else text.ljust(width) for text, width, right in zip(line, widths, numeric)]
        for line in cells
    ]
    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))


def _cell(value: object, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if isinstance(value, (int, float)) else str(value)


def print_machine(facts: Mapping[str, Any], peak: Mapping[str, float]) -> None:
    """Print a benchmark's heading: machine, ceilings, and unavailable backends."""
    size = f", {facts['gib']} GiB" if "gib" in facts else f", threads: {facts['threads']} (measured: {facts['clock']})"
    print(f"{facts['device']}{size}, torch {facts['torch']}, {facts['dtype']}, {facts['date']}")
    print(f"measured ceilings: {peak['tflops']:.2f} TFLOP/s (square GEMM), {peak['gbps']:.0f} GB/s (copy)")
    print(f"auto: {facts['auto']}")
    for name, reason in facts["unavailable"].items():
        print(f"not here: {name}: {reason}")


def print_json(name: str, facts: Mapping[str, object], **found: object) -> None:
    """Print the last line of every benchmark: its results as JSON."""
    print("\n" + json.dumps({"bench": name, "machine": facts, **found}))
