"""What can go wrong while computing: out of memory, and numbers that are NaN or infinite. Without torch."""

from __future__ import annotations

import errno
import operator
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NO_MEMORY = re.compile(
    "out ?of ?memory|not enough memory|can(no|')t allocate memory|_ALLOC_FAILED|unable to find an engine", re.IGNORECASE
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host is out of memory.

    In the words of CUDA's and ROCm's allocators, of torch's for the CPU on Linux ("can't allocate memory") and Windows
    ("not enough memory"), of Apple's, of cuBLAS and cuDNN, which find no engine either, and of the system.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def check_finite(found: Tensor, stage: str, remedy: str) -> None:
    """ValueError, naming the stage that made them, where numbers are NaN or infinite; meta tensors have none."""
    if not found.is_meta and not found.isfinite().all():
        raise ValueError(f"{stage}: expected finite numbers, found NaN or infinity; {remedy}")


def integer(name: str, found: object) -> int:
    """An integer. ValueError, under its name, for anything else."""
    try:
        return operator.index(found)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}: expected an integer, found {found!r:.100}") from None


def number(name: str, found: object) -> float:
    """A finite number. ValueError, under its name, for anything else."""
    if not isinstance(found, int | float) or not -1e308 <= found <= 1e308:
        raise ValueError(f"{name}: expected a number, found {found!r:.100}")
    return found


def within(name: str, found: object, low: float, high: float, remedy: str = "", above: bool = False) -> float:
    """A number from low, or above it, to high. ValueError, under its name and with the remedy, for anything else."""
    value = number(name, found)
    if not low <= value <= high or (above and value == low):
        expected = f"above {low:g} and up to {high:g}" if above else f"{low:g} to {high:g}"
        raise ValueError(f"{name}: expected {expected}, found {found}{remedy and '; '}{remedy}")
    return value


def one_of(name: str, found: object, names: Iterable[str]) -> str:
    """One of these names. ValueError, under its own, for anything else."""
    if not isinstance(found, str) or found not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}, found {found!r:.100}")
    return found
