"""The ways to run an SVDQ linear, and the choice between them.

Each backend is a module with PRECISIONS and four functions:

    unavailable(device, dtype) -> str | None      the reason it cannot run there
    prepare(weights, precision) -> dict           the form it runs from, which replaces the stored one
    restore(prepared) -> dict                     back to the fields of SVDQWeights, exactly
    linear(x, prepared, precision) -> tensor      (M, K) -> (M, N)

and may have a fifth, so that users' low-rank adapters cost it next to nothing:

    join(prepared, rank, down, up, precision)     the tensors that change when down (r, K) and up (N, r) follow the
                                                  first `rank` of the low-rank branch, or when both are None and it
                                                  ends there; None where a branch of their own is better

or a sixth, so that the kernel in front of a linear brings its activations to 8 bits in the same pass:

    smoothing(prepared, precision)                the vector (K,) that they are divided by for that: `linear` then takes
                                                  them `Quantized`, too; None where it does not

`reference` is plain torch and defines correctness. Precisions: w4a16 leaves the activations alone and is the
closest to the file; w4a4 is the arithmetic these files were calibrated for; w4a8 lies between the two.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

# What is tried, in this order; a backend's `unavailable` knows the compute capabilities it takes. First what is
# fastest among those whose error is no larger than w4a4's: nunchaku (sm_75 to sm_89; its authors' figures), 8-bit
# activations where they are fp8 (its bare GEMM took 0.60 of bf16's on sm_90), dense 16-bit. As nothing is unavailable
# to the reference's w4a16, what follows it is taken only when it is asked for: int8 activations have not been measured
# to beat w4a16; kitchen is unmeasured where there are INT4 tensor cores and 18 times slower than bf16 where there are
# none (sm_90).
ORDER = (
    ("nunchaku", "w4a4"),
    ("triton", "w4a8"),
    ("triton", "w4a16"),
    ("reference", "w4a16"),
    ("kitchen", "w4a4"),
    ("reference", "w4a4"),
)
FP8_CAPABILITY = 89  # from here on 8-bit activations are fp8
BACKENDS = ("nunchaku", "triton", "kitchen", "reference")
PRECISIONS = ("w4a16", "w4a8", "w4a4")

logger = logging.getLogger(__name__)


class Quantized(NamedTuple):
    """Activations and what 8-bit arithmetic reads of them, both made by the kernel in front of a linear."""

    x: torch.Tensor  # (..., K) in 16 bits, for the low-rank branch
    codes: torch.Tensor  # (M, K) fp8 or int8 of x / smooth
    row_scale: torch.Tensor  # (M,) fp32

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    def reshape(self, *shape: int) -> Quantized:
        """The same rows under another shape of x."""
        return self._replace(x=self.x.reshape(shape))


@dataclass(frozen=True)
class Backend:
    """A backend module bound to a precision, and why it was chosen."""

    name: str
    precision: str
    module: ModuleType
    reason: str

    def prepare(self, weights) -> dict[str, torch.Tensor]:
        """SVDQWeights -> the tensors `linear` runs from."""
        return self.module.prepare(weights, self.precision)

    def restore(self, prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `prepare` made -> the fields of SVDQWeights."""
        return self.module.restore(prepared)

    def join(self, prepared: Mapping[str, torch.Tensor], rank: int, down, up) -> dict[str, torch.Tensor] | None:
        """The tensors of the low-rank branch with an adapter behind its first `rank`; None if it takes no adapter."""
        function = getattr(self.module, "join", None)
        return function and function(prepared, rank, down, up, self.precision)

    def smoothing(self, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """What to divide the activations by, where `linear` takes them `Quantized`."""
        function = getattr(self.module, "smoothing", None)
        return function and function(prepared, self.precision)

    def linear(self, x: torch.Tensor | Quantized, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """x (M, K) -> (M, N)."""
        return self.module.linear(x, prepared, self.precision)


def select(backend: str = "auto", precision: str = "auto", *, device, dtype: torch.dtype) -> Backend:
    """Choose what runs the SVDQ linears on a device; a named backend never falls back to another.

    ValueError for an unknown name, or with the reason of every backend if none can do what is asked."""
    name = "reference" if backend == "torch" else backend
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected auto, torch or one of {', '.join(BACKENDS)}, found {backend!r}")
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision: expected auto or one of {', '.join(PRECISIONS)}, found {precision!r}")
    device = torch.device(device)
    passed: dict[str, str] = {}
    for candidate, level in ORDER:
        if name not in ("auto", candidate) or precision not in ("auto", level) or candidate in passed:
            continue
        module = load(candidate)
        refusal = module.unavailable(device, dtype)
        if refusal is None and (precision, level) == ("auto", "w4a8") and (capability(device) or 0) < FP8_CAPABILITY:
            continue
        if refusal is None:
            reason = f"{candidate} {level} on {describe(device)}"
            if passed:
                reason += f" ({'; '.join(f'{other}: {why}' for other, why in passed.items())})"
            if name == "auto":
                _log_once(f"SVDQ backend: {reason}")
            return Backend(candidate, level, module, reason)
        passed[candidate] = refusal
    every = [f"{row[0]}: {row[1] or 'runs ' + ', '.join(row[2])}" for row in report(device, dtype)]
    asked = f"backend {backend!r} with precision {precision!r}"
    raise ValueError(f"{asked} cannot run on {describe(device)} in {dtype}: {'; '.join(every)}")


def report(device, dtype: torch.dtype) -> list[tuple[str, str | None, tuple[str, ...]]]:
    """(name, the reason it cannot run there or None, its precisions) of every backend, for `zimage doctor`."""
    device, modules = torch.device(device), {name: load(name) for name in BACKENDS}
    return [(name, module.unavailable(device, dtype), module.PRECISIONS) for name, module in modules.items()]


def load(name: str) -> ModuleType:
    """The module of a backend; importing it needs nothing but torch."""
    return importlib.import_module(f".{name}", __name__)


@cache  # torch asks the driver every time, and kernels are chosen by it in every step
def capability(device: torch.device) -> int | None:
    """Compute capability of an NVIDIA GPU as 10 * major + minor; None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def guard(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one, as kernels that are not torch's own need it."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def describe(device: torch.device) -> str:
    """A device in words."""
    sm = capability(device)
    return f"{device.type}" if sm is None else f"{torch.cuda.get_device_name(device)} (sm_{sm})"


@cache
def _log_once(message: str) -> None:
    logger.info(message)
