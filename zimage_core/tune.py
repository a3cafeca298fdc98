"""How `auto` chooses: every way to run linears is tried and timed here once, and the fastest is remembered.

A way must first compute what the reference computes (`trial`). Then the ways are timed on the linears of a full-size
block for few and for many rows. The figures are kept in the user's cache folder under everything that they depend on,
so that a seed gives the same picture at every later run; `zimage tune` makes them anew.

What counts is the GPU's time: a step's launches run ahead of it, or are replayed as a CUDA graph.

Legend: M rows, N out, K in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__
from .clock import Elapsed, queued
from .linear import backends
from .linear.backends import Backend
from .models import attention, ops
from .trial import ATTENTION, FUSED, Outcome, Untried, Way, in_child, random_8bit, random_weights

WAYS: tuple[Way, ...] = (
    ("triton", "w4a16"),
    ("reference", "w4a16"),
    ("kitchen", "w4a8"),
    ("triton", "w4a8"),
    ("nunchaku", "w4a4"),
    ("kitchen", "w4a4"),
)
"""What `auto` chooses from, more precise ways first: of those that are about as fast, the first is taken."""
PRODUCTS: dict[str, tuple[Way, ...]] = {
    "float8_e4m3fn": (("triton", "fp8"),),
    "int8": (("kitchen", "int8"), ("triton", "int8")),
    "int8_convrot": (("kitchen", "int8"),),
}
"""Kind of a stored form -> ways to multiply it as it is, with activations in 8 bits; after the blank, that of codes."""
ALIKE = 1.1  # times the fastest's time, within which the order decides, so that like cards choose alike
SHAPES = {(11520, 3840): 32000 / 11520, (3840, 3840): 1.0, (3840, 10240): 1.0}
"""(N, K) of a block's linears and how often they count; w3_w1 (20480, 3840), too large for MEMORY, counts as qkv."""
RANK, HEADS = 256, (30, 128)
ROWS = {"few_ms": 1152, "many_ms": 4224}  # of pictures of 512 x 512 and 1024 x 1024 pixels
REPEATS, SLOW = 7, 3.0  # rounds of calls, but one of those that are so much slower than the fastest
LIMIT_S = 3.0  # for all calls but the first of each kind, which compile; then each is timed once
MEMORY = 2**29  # bytes of the device that timing takes at most

Record = dict[str, Any]

logger = logging.getLogger(__name__)
_known: dict[tuple[torch.device, torch.dtype, bool], Record | None] = {}
_lock = threading.Lock()


def select(backend: str = "auto", precision: str = "auto", *, device, dtype: torch.dtype, fp4: bool = False) -> Backend:
    """The backend and precision for a model's linears; "auto" is what was measured fastest on this GPU.

    ValueError as `backends.select`, and where every way that is asked for was refused by its trial."""
    chosen = backends.select(backend, precision, device=device, dtype=dtype, fp4=fp4)
    device = torch.device(device)
    if "auto" in (backend, precision):
        ways = usable(device, dtype, fp4)
        asked = [way for way in ways if backend in ("auto", way[0]) and precision in ("auto", way[1])]
        record = known(device, dtype, fp4) if any(name != "reference" for name, _ in asked) else None
        if record is not None:
            name, level = pick(record, asked)
            chosen = backends.select(name, level, device=device, dtype=dtype, fp4=fp4)
            timed = "; ".join(f"{way}: {words}" for way, words in describe(record).items())
            chosen = replace(chosen, reason=f"{name} {level} on {backends.describe(device)}, the fastest of {timed}")
    if backend == "auto":
        _log_once(logging.INFO, f"SVDQ backend: {chosen.name} {chosen.precision} on {backends.describe(device)}")
        _log_once(logging.DEBUG, f"SVDQ backend: {chosen.reason}")
    return chosen


def select_ops(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, fp4: bool = False) -> ops.Ops:
    """The functions between linears (`ops.select`): plain torch also if our kernels failed their trial."""
    chosen = ops.select(backend, device, dtype, head_dim)
    if backend == "auto" and chosen is not ops.TORCH:
        record = known(device, dtype, fp4)
        if record is not None and "refused" in record["ways"].get(" ".join(FUSED), {}):
            return ops.TORCH
    return chosen


def select_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "sdpa" or "int8"; of "auto" the latter where it passed its trial and is the faster one by more than ALIKE.

    ValueError for another name, and for "int8" where it does not run."""
    if name not in ("auto", *attention.KINDS):
        raise ValueError(f"attention: expected auto, {' or '.join(attention.KINDS)}, found {name!r}")
    refusal = attention.int8_unavailable(device) if name != "sdpa" else None
    if name == "int8" and refusal:
        raise ValueError(f"attention 'int8' cannot run here: {refusal}; choose sdpa, or auto")
    if name != "auto" or refusal:
        return name if name != "auto" else "sdpa"
    return "int8" if _gain(known(device, dtype), ATTENTION) > ALIKE else "sdpa"


def select_products(
    kinds: Iterable[str], backend: str, precision: str, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Kind of a stored form -> the backend that multiplies it as it is, with activations in 8 bits.

    With precision "w8a8" the fastest that runs, with "auto" only where that is faster than in 16 bits by more than
    ALIKE, with others none. ValueError, which says why, where "w8a8" cannot run at all."""
    ways = {way for kind in kinds for way in PRODUCTS.get(kind, ()) if backend in ("auto", way[0])}
    refusals = {way: product_refusal(way, device, dtype) for way in ways} if precision in ("auto", "w8a8") else {}
    runs = [way for way, refusal in refusals.items() if refusal is None]
    if precision == "w8a8" and not runs:
        expected = f"expected linears in INT8 or FP8 (e4m3), found {', '.join(kinds) or 'none of such a form'}"
        raise ValueError("; ".join(sorted(set(filter(None, refusals.values())))) or expected)
    record = known(device, dtype) if runs and "auto" in (backend, precision) else None
    gains = {way: _gain(record, way) for way in runs}
    found = {}
    for kind in kinds:
        best = max((way for way in PRODUCTS.get(kind, ()) if way in runs), key=lambda way: gains[way], default=None)
        if best and (precision == "w8a8" or gains[best] > ALIKE):
            found[kind] = best[0]
    return found


def product_refusal(way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a way of PRODUCTS does not run on a device, or None."""
    for name in dict.fromkeys(("triton", way[0])):
        if refusal := backends.load(name).unavailable(device, dtype, precision="w4a8"):
            return refusal
    too_old = way[1] == "fp8" and (backends.capability(device) or 0) < 89
    return "FP8 products need sm_89 or later" if too_old else None


def _gain(record: Record | None, way: Way) -> float:
    """The speed-up of 8 bits over 16; 0 if it was not measured or failed its trial."""
    facts = record["ways"].get(" ".join(way), {}) if record else {}
    return facts["w16_ms"] / facts["w8_ms"] if "w8_ms" in facts else 0.0


def usable(device: torch.device, dtype: torch.dtype, fp4: bool = False) -> list[Way]:
    """The ways that `auto` may choose on a device; without a GPU only the first."""
    if device.type != "cuda":
        return [("reference", "w4a16")]
    modules = {name: backends.load(name) for name in backends.BACKENDS}
    ways = [way for way in WAYS if not fp4 or way[1] in getattr(modules[way[0]], "FP4", ())]
    return [way for way in ways if modules[way[0]].unavailable(device, dtype, fp4, way[1]) is None]


def known(device: torch.device, dtype: torch.dtype, fp4: bool = False, *, anew: bool = False) -> Record | None:
    """The figures of a device, dtype and weights: this process's, the cache's, else measured; None if that fails."""
    with _lock:
        if anew or (device, dtype, fp4) not in _known:
            key = cache_key(device, dtype, fp4)
            path = cache_folder() / f"ways-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
            record = None if anew else read(path, key)
            if record is None:
                logger.info("trying and timing the ways to run linears on this GPU, once; about fifteen seconds")
                try:
                    record = {"key": key, **measure(device, dtype, usable(device, dtype, fp4), fp4)}
                except (Untried, torch.cuda.OutOfMemoryError) as error:
                    logger.warning("ways to run linears: could not be timed (%s); one is taken untimed", error)
                else:
                    record = keep(path, record, anew)
            _known[device, dtype, fp4] = record
        return _known[device, dtype, fp4]


def measure(
    device: torch.device,
    dtype: torch.dtype,
    ways: Sequence[Way],
    fp4: bool = False,
    *,
    shapes: Mapping[tuple[int, int], float] = SHAPES,
    elapsed: Elapsed | None = None,
    tried: Callable[..., dict[Way, Outcome]] = in_child,
) -> Record:
    """Try and time ways; "ways" maps "backend precision" to its error and times in ms of a block, or its refusal.

    Beside them what may run in 8 bits instead of 16: attention, and linears that are stored in 8 bits.

    Untried and OutOfMemoryError where the device is too full."""
    outcomes = {way: Outcome() for way in ways if way[0] == "reference"}
    eight_bit = [ATTENTION] if attention.int8_unavailable(device) is None else []
    products = dict.fromkeys(way for found in PRODUCTS.values() for way in found)
    eight_bit += [way for way in products if product_refusal(way, device, dtype) is None]
    beside = [FUSED] if any(name == "triton" for name, _ in ways) else []
    compiled = [way for way in (*ways, *beside, *eight_bit) if way[0] != "reference"]
    for library in dict.fromkeys(name for name, _ in compiled):
        outcomes |= tried([way for way in compiled if way[0] == library], device, dtype, fp4)
    found: dict[Way, dict[str, Any]]
    found = {way: {"error": o.error} if o.refused is None else {"refused": o.refused} for way, o in outcomes.items()}
    passed = [way for way in ways if "refused" not in found[way]]
    elapsed = elapsed or queued(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        times, seconds = time_ways(device, dtype, passed, fp4, shapes, elapsed)
        for way in eight_bit:
            if "refused" not in found[way]:
                found[way] |= time_8_bits(way, device, dtype, elapsed)
    del elapsed
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for way in passed:
        found[way] |= times[way]
    return {"ways": {" ".join(way): facts for way, facts in found.items()}, "seconds": round(seconds, 2)}


def time_ways(
    device: torch.device,
    dtype: torch.dtype,
    ways: Sequence[Way],
    fp4: bool,
    shapes: Mapping[tuple[int, int], float],
    elapsed: Elapsed,
) -> tuple[dict[Way, dict[str, float]], float]:
    """Each way's milliseconds for a block's linears, with few and many rows; and the seconds spent on timing."""
    torch.manual_seed(0)
    totals = {way: dict.fromkeys(ROWS, 0.0) for way in ways}
    begun, compiling = time.perf_counter(), 0.0
    for (n, k), count in shapes.items():
        weights = random_weights(n, k, min(RANK, k), device, dtype, fp4)
        prepared = {way: backends.load(way[0]).prepare(weights, way[1]) for way in ways}
        for name, rows in ROWS.items():
            x = torch.randn(rows, k, device=device, dtype=dtype)
            calls = {way: _call(way, prepared[way], x, coded=n != k) for way in ways}
            warming = time.perf_counter()
            for call in calls.values():
                elapsed(call, device)
            compiling += time.perf_counter() - warming
            late = time.perf_counter() - begun - compiling > LIMIT_S
            least = rounds(calls, device, elapsed, 1 if late else REPEATS)
            for way in ways:
                totals[way][name] += count * least[way]
        del weights, prepared, x, calls
    seconds = time.perf_counter() - begun - compiling
    return {way: {name: round(ms, 4) for name, ms in found.items()} for way, found in totals.items()}, seconds


def _call(way: Way, prepared: Mapping[str, torch.Tensor], x: torch.Tensor, coded: bool) -> Callable[[], torch.Tensor]:
    """A call of a linear as a block makes it. coded: x comes from a kernel of ours, as the linear asks for it."""
    module = backends.load(way[0])
    smooth, columns = backends.Backend(*way, module, "").smoothing(prepared, len(x)) if coded else (None, 0)
    if smooth is None:
        return partial(module.linear, F.pad(x, (0, columns)), prepared, way[1])
    quantized = backends.Quantized(x, *module.quantize_rows(x, smooth, module.eight_bit(x.device), columns))
    return partial(module.linear, quantized, prepared, way[1])


def rounds(calls: Mapping[Way, Callable[[], object]], device: torch.device, elapsed: Elapsed, count: int) -> dict:
    """The shortest time of each call in ms, in turns; what is SLOW times slower than the fastest runs only once."""
    least = {way: elapsed(call, device) for way, call in calls.items()}
    for _ in range(count - 1):
        for way, call in calls.items():
            if least[way] <= SLOW * min(least.values()):
                least[way] = min(least[way], elapsed(call, device))
    return least


def time_8_bits(way: Way, device: torch.device, dtype: torch.dtype, elapsed: Elapsed) -> dict[str, float]:
    """The ms of ATTENTION or of a linear that is stored in 8 bits, for many rows, and of the same in 16 bits."""
    calls = _attention_calls(device, dtype) if way == ATTENTION else _product_calls(way, device, dtype)
    for call in calls.values():
        elapsed(call, device)
    return {name: round(ms, 4) for name, ms in rounds(calls, device, elapsed, REPEATS).items()}


def _attention_calls(device: torch.device, dtype: torch.dtype) -> dict[Any, Callable[[], object]]:
    q, k, v = (torch.randn(1, ROWS["many_ms"], *HEADS, device=device, dtype=dtype) for _ in range(3))
    return {
        name: partial(attention.KINDS[kind], q, k, v, None) for name, kind in (("w8_ms", "int8"), ("w16_ms", "sdpa"))
    }


def _product_calls(way: Way, device: torch.device, dtype: torch.dtype) -> dict[Any, Callable[[], object]]:
    name, kind = way
    n, k = next(iter(SHAPES))
    codes, scale = random_8bit(kind, n, k, device)
    form = "int8" if kind == "int8" else "float8_e4m3fn"
    parts = {"codes": codes if kind == "int8" else codes.view(torch.uint8), "scale": scale}
    x = torch.randn(ROWS["many_ms"], k, device=device, dtype=dtype)

    def dequantized() -> Tensor:
        weight = torch.empty(n, k, device=device, dtype=dtype)
        backends.load("dense").dequantize(form, parts, weight)
        return F.linear(x, weight)

    stored = partial(backends.load(name).multiply_8bit, x, codes, scale.flatten(), None)
    return {"w8_ms": stored, "w16_ms": dequantized}


def pick(record: Record, asked: Iterable[Way]) -> Way:
    """The backend and precision, "w4a16+w4a8" say, that are fastest for few and for many rows among those asked for.

    For few rows only another precision of the same backend, faster by more than ALIKE. ValueError if none is left."""
    ways = [way for way in asked if "many_ms" in record["ways"].get(" ".join(way), {})]
    if not ways:
        facts = {way: record["ways"].get(way, {}) for way in map(" ".join, asked)}
        reasons = "; ".join(f"{way}: {found.get('refused', 'not timed')}" for way, found in facts.items())
        raise ValueError(f"no way to run the linears is left: {reasons}; choose backend and precision auto")

    def fastest(ways: Sequence[Way], rows: str) -> Way:
        times = {way: record["ways"][" ".join(way)][rows] for way in ways}
        return next(way for way in ways if times[way] <= ALIKE * min(times.values()))

    name, many = fastest(ways, "many_ms")
    mixed = getattr(backends.load(name), "MIXED", ())
    others = [way for way in ways if way[0] == name and many in mixed and way[1] in mixed and way[1] != many]
    _, few = fastest([(name, many), *others], "few_ms")
    return name, many if few == many else f"{few}+{many}"


def describe(record: Record) -> dict[str, str]:
    """How each way did, in words, by "backend precision"."""
    found = {}
    for way, facts in record["ways"].items():
        error = "" if facts.get("error") is None else f", error {facts['error']:.3f}"
        if "many_ms" in facts:
            few, many = ROWS.values()
            found[way] = f"{facts['few_ms']:.2f} ms for {few} rows, {facts['many_ms']:.2f} ms for {many}{error}"
        elif "w8_ms" in facts:
            found[way] = f"{facts['w8_ms']:.2f} ms, in 16 bits {facts['w16_ms']:.2f} ms{error}"
        else:
            found[way] = facts.get("refused") or f"runs{error}"
    return found


def cache_folder() -> Path:
    """Where figures are kept: the user's cache folder on this system."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zimage-int4"


def cache_key(device: torch.device, dtype: torch.dtype, fp4: bool) -> dict[str, str]:
    """Everything that the figures depend on."""
    key = {"device": backends.describe(device), "driver": driver(), "dtype": str(dtype), "zimage": __version__}
    key["weights"] = "FP4" if fp4 else "INT4"
    for package in ("torch", "triton", "triton-windows", "comfy-kitchen", "nunchaku"):
        with suppress(importlib.metadata.PackageNotFoundError):
            key[package] = importlib.metadata.version(package)
    return key | {"torch": torch.__version__, "system": platform.system()}


def driver() -> str:
    """The GPU driver's version, where the system says it, else the CUDA version that it supports."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with suppress(OSError):
            return Path(path).read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(version()) if version and torch.cuda.is_available() else ""


def read(path: Path, key: Mapping[str, str]) -> Record | None:
    """The figures in a file; None if there are none, or of something else."""
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("key") == key and _whole(record.get("ways")):
            return record
    return None


def _whole(ways: object) -> bool:
    """Whether figures have the form that `measure` gives them."""
    return isinstance(ways, dict) and all(
        isinstance(facts, dict)
        and ("refused" in facts) + ("few_ms" in facts) < 2
        and ("few_ms" in facts) == ("many_ms" in facts)
        and ("w8_ms" in facts) == ("w16_ms" in facts)
        and all(_figure(name, found) for name, found in facts.items())
        for facts in ways.values()
    )


def _figure(name: str, found: object) -> bool:
    """Whether a figure is valid: a sentence for a refusal, else None or a finite number, above 0 for a time."""
    if name == "refused":
        return isinstance(found, str)
    number = isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found < math.inf
    return (name == "error" and found is None) or (number and (name == "error" or bool(found)))


def keep(path: Path, record: Record, anew: bool) -> Record:
    """Write figures to a file, and return the file's: another process may have been first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(record, file, indent=1)
        if not anew and (there := read(path, record["key"])):
            os.unlink(file.name)
            return there
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next run times the ways to run linears again", path, error)
    return record


@cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)
