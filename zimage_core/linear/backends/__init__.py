"""The backends that run an SVDQ linear, and the choice between them.

Each backend is a module with PRECISIONS, FP4 (those in which it takes FP4 weights, if any), MIXED (those that take the
same weights in memory, if any) and five functions:

    unavailable(device, dtype, fp4, precision)    why it cannot run INT4 or FP4 weights there, or None; without a
                                                  precision, what keeps all of its precisions from running
    prepare(weights, precision) -> dict           the tensors that `linear` takes, which replace the stored ones
    restore(prepared) -> dict                     the inverse of `prepare`, exact
    join(prepared, rank, pair) -> dict | None     the low-rank branch cut to its first `rank`, and an adapter's pair of
                                                  down (r, K) and up (N, r) appended if there is one; None if the
                                                  pair has to run beside the linear
    linear(x, prepared, precision) -> tensor      (M, K) -> (M, N)

A backend with 8-bit activations also has:

    smoothing(prepared, precision, rows)          the smoothing vector (K,) for quantizing inside the preceding kernel,
                                                  whose result `linear` takes as `Quantized`, or None to stay in 16
                                                  bits; and the columns that `linear` takes beside K and may fill
    codes(prepared) -> tensor                     the weight in 8 bits; `linear` takes it as prepared["codes"], and
                                                  makes it in every call where there is none

On the meta device `prepare` and `linear` allocate what they allocate on the real one, in the same order, so that a plan
can count the memory of a picture.

`reference` is plain torch and defines correctness. Precisions: w4a16 keeps activations in 16 bits and is closest to
the file; w4a4 is the arithmetic that the files were calibrated for; w4a8 lies between the two. "w4a16+w4a8" is the
first for up to FEW_ROWS rows and the second for more.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...sizes import round_up
from ..operators import operator

if TYPE_CHECKING:
    from ..svdq import SVDQWeights

# What `auto` takes where nothing is measured (`tune`): the first that is available. The reference's w4a16 always is, so
# the entries after it are taken only by name.
ORDER = (
    ("nunchaku", "w4a4"),
    ("triton", "w4a8"),
    ("triton", "w4a16"),
    ("reference", "w4a16"),
    ("kitchen", "w4a8"),
    ("kitchen", "w4a4"),
    ("reference", "w4a4"),
)
FEW_ROWS = 2048  # pictures of 512 x 512 have 1,152, of 1024 x 1024 4,224
BACKENDS = ("nunchaku", "triton", "kitchen", "reference")
PRECISIONS = ("w4a16", "w4a8", "w4a4")


Smoothing = tuple["torch.Tensor | None", int]  # a vector (K,), and how many columns rows have beside K
NO_SMOOTHING: Smoothing = (None, 0)  # activations stay in 16 bits


class Quantized(NamedTuple):
    """Activations in 16 and in 8 bits, both written by the kernel in front of a linear."""

    x: torch.Tensor  # (..., K) in 16 bits, for the low-rank branch
    codes: torch.Tensor  # (M, K + columns) fp8 or int8 of x / smooth; the columns are for `linear` to fill
    row_scale: torch.Tensor  # (M,) fp32

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    def reshape(self, *shape: int) -> Quantized:
        """The same rows under another shape of x."""
        return Quantized(self.x.reshape(shape), self.codes, self.row_scale)


@dataclass(frozen=True)
class Backend:
    """A backend module bound to a precision, and why it was chosen."""

    name: str
    precision: str
    module: ModuleType
    reason: str

    @cached_property
    def levels(self) -> tuple[str, str]:
        """The precisions for few rows and for many."""
        few, _, many = self.precision.rpartition("+")
        return few or many, many

    def level(self, rows: int) -> str:
        """The precision for a number of rows."""
        few, many = self.levels
        return many if few == many or rows > FEW_ROWS else few

    def prepare(self, weights: SVDQWeights) -> dict[str, torch.Tensor]:
        """The tensors that `linear` takes."""
        prepared: dict[str, torch.Tensor] = {}
        for level in dict.fromkeys(self.levels):
            prepared |= self.module.prepare(weights, level)
        return prepared

    def restore(self, prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The fields of SVDQWeights, from what `prepare` made."""
        return self.module.restore(prepared)

    def join(
        self, prepared: Mapping[str, torch.Tensor], rank: int, pair: tuple[torch.Tensor, torch.Tensor] | None
    ) -> dict[str, torch.Tensor] | None:
        """proj_down and proj_up of the first `rank` and a pair behind them, if given; None if it cannot join."""
        return self.module.join(prepared, rank, pair)

    def smoothing(self, prepared: Mapping[str, torch.Tensor], rows: int) -> Smoothing:
        """What a linear of so many rows asks of the preceding kernel."""
        function = getattr(self.module, "smoothing", None)
        return function(prepared, self.level(rows), rows) if function else NO_SMOOTHING

    def codes(self, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The weight in 8 bits, if the backend multiplies that."""
        return self.module.codes(prepared) if "w4a8" in self.levels else None

    def linear(self, x: torch.Tensor | Quantized, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """x (M, K) -> (M, N)."""
        rows, codes, row_scale = x if isinstance(x, Quantized) else (x, None, None)
        level = self.level(rows.shape[0])
        if torch.compiler.is_compiling():
            return _linear(rows, codes, row_scale, list(prepared.values()), " ".join(prepared), self.name, level)
        return self.module.linear(x, prepared, level)


def _fake_linear(
    x: torch.Tensor,
    codes: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    held: Sequence[torch.Tensor],
    names: str,
    backend: str,
    precision: str,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], held[names.split().index("qweight")].shape[0])


@operator(
    "linear(Tensor x, Tensor? codes, Tensor? row_scale, Tensor[] held, str names, str backend, str precision)"
    " -> Tensor",
    _fake_linear,
)
def _linear(
    x: torch.Tensor,
    codes: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    held: Sequence[torch.Tensor],
    names: str,
    backend: str,
    precision: str,
) -> torch.Tensor:
    """A backend's `linear` with the tensors of `prepared` and of `Quantized` one by one."""
    rows = x if codes is None or row_scale is None else Quantized(x, codes, row_scale)
    return load(backend).linear(rows, dict(zip(names.split(), held)), precision)


def select(backend: str = "auto", precision: str = "auto", *, device, dtype: torch.dtype, fp4: bool = False) -> Backend:
    """The first of ORDER that is asked for and runs there with INT4 or FP4 weights; a named backend never falls back.

    ValueError for an unknown name, or with every backend's reason if none can run what is asked for."""
    name = "reference" if backend == "torch" else backend
    few, _, many = precision.rpartition("+")
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected auto, torch or one of {', '.join(BACKENDS)}, found {backend!r}")
    if many not in ("auto", *PRECISIONS) or few not in ("", *PRECISIONS):
        raise ValueError(f"precision: expected auto or one of {', '.join(PRECISIONS)}, found {precision!r}")
    device = torch.device(device)
    passed: dict[str, str] = {}
    for candidate, level in ORDER:
        if name not in ("auto", candidate) or many not in ("auto", level):
            continue
        module = load(candidate)
        refusal = module.unavailable(device, dtype, fp4, level)
        if refusal is None and fp4 and level not in getattr(module, "FP4", ()):
            refusal = f"has no {level} for FP4 weights"
        if refusal is None and few and not {few, level} <= {*getattr(module, "MIXED", ())}:
            refusal = f"has no {precision}"
        if refusal is None:
            level = precision if few else level
            reason = f"{candidate} {level}{' of FP4 weights' if fp4 else ''} on {describe(device)}"
            if passed:
                reason += f" ({'; '.join(f'{other}: {why}' for other, why in passed.items())})"
            return Backend(candidate, level, module, reason)
        passed.setdefault(candidate, refusal)
    rows = [row for row in report(device, dtype) if name in ("auto", row[0])]
    reasons = "; ".join(f"{row[0]}: {passed.get(row[0]) or row[1] or 'runs ' + ', '.join(row[2])}" for row in rows)
    asked = f"backend {backend!r} with precision {precision!r} cannot run on {describe(device)} in {dtype}"
    remedy = "precision auto" if name == "auto" else "backend auto, which takes the fastest that runs"
    raise ValueError(f"{asked}: {reasons}; choose {remedy}")


def report(device, dtype: torch.dtype) -> list[tuple[str, str | None, tuple[str, ...]]]:
    """(name, why it cannot run there or None, the precisions that run) of every backend, for `zimage doctor`."""
    device, rows = torch.device(device), []
    for name in BACKENDS:
        module = load(name)
        refusals = {level: module.unavailable(device, dtype, precision=level) for level in module.PRECISIONS}
        runs = tuple(level for level, refusal in refusals.items() if refusal is None)
        rows.append((name, None if runs else next(iter(refusals.values())), runs))
    return rows


def load(name: str) -> ModuleType:
    """The module of a backend; importing it needs nothing but torch."""
    return importlib.import_module(f".{name}", __name__)


@cache  # torch queries the driver every time, and every linear of a step asks
def capability(device: torch.device) -> int | None:
    """Compute capability of an NVIDIA GPU as 10 * major + minor; None for any other device.

    The meta device stands for the first GPU where there is one.
    """
    if device.type == "meta":
        device = torch.device("cuda", 0)
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def amd_architecture(device: torch.device) -> str | None:
    """Architecture of an AMD GPU, such as gfx1100; None for any other device."""
    if device.type != "cuda" or torch.version.hip is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def allocate_w4a4(x: torch.Tensor, rank: int, n: int, fp4: bool = False) -> torch.Tensor:
    """What 4-bit kernels allocate for x (M, K), their result (M, N) last: codes, scales, the low-rank product."""
    m, k = x.shape
    m = round_up(m, 256)
    _ = (
        x.new_empty(m, k // 2, dtype=torch.uint8),
        x.new_empty(k // 16, m, dtype=torch.uint8) if fp4 else x.new_empty(k // 64, m),
        x.new_empty(m, rank, dtype=torch.float32),
    )
    return x.new_empty(len(x), n)


def guard(device: torch.device) -> AbstractContextManager:
    """Makes a GPU current, which kernels outside torch require."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def describe(device: torch.device) -> str:
    """A GPU's name, with its compute capability or AMD's architecture; another device's type."""
    sm, amd = capability(device), amd_architecture(device)
    if sm is None and amd is None:
        return device.type
    return f"{torch.cuda.get_device_name(device)} ({amd or f'sm_{sm}'})"
