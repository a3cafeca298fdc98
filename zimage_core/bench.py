"""`zimage bench`: linears and whole steps, every backend against dense ones, in one run. Shared with `benchmarks/`.

Weights are random and made on the device, layer by layer, so that no file is needed. Times are medians of single calls
(CUDA events on a GPU). What is compared takes turns, call by call, so that a drifting clock or another process affects
all alike: read the ratios, not the milliseconds.

Legend: M rows, N out, K in, R rank.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clock import elapsed_ms
from .device import choose_device, choose_dtype, dtype_name
from .formats.identify import model_info
from .formats.load import load_transformer
from .linear import backends
from .linear.adapters import Linear
from .linear.backends import Backend
from .linear.svdq import SVDQLinear, SVDQWeights
from .memory.graphs import Graphs
from .memory.offload import BlockStreamer
from .memory.placement import weights
from .models import ops
from .models.config import ZImageConfig
from .models.transformer import ZImageTransformer
from .report import machine, print_json, print_machine, table
from .sampler import draw_noise
from .sizes import GIB
from .trial import random_weights

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Call = Callable[[], Tensor]
Step = Callable[[int, int], Call]  # (pixels, batch) -> one step

DEMO = ZImageConfig(384, 5, 1, 6, cap_feat_dim=128, axes_dims=(16, 24, 24))
DEMO_RANK, RANK = 16, 256
BUSY = 1.25  # of ceilings before and after a run, and of a linear to the largest GEMM
CAPTION_TOKENS = 128
CELL = 16  # edge of a token in pixels
LARGE_ON_CPU = 1024  # width above which a CPU runs everything only once
FLUSH_BYTES = 2**28  # more than any GPU's cache
WARM_UP, LIMIT_S, SLOW = 2, 4.0, 3.0
LAUNCHES = 5


def medians_ms(
    calls: Mapping[str, Call], device: torch.device, repeats: int, warm_up: int = WARM_UP, flush: bool = True
) -> dict[str, float]:
    """Median time of each call in ms; a GPU's cache is flushed before each, as a model's weights come from memory.

    Calls take turns in a new random order each round, as caches hold what ran before. Those SLOW times slower than the
    fastest follow one by one. After LIMIT_S no further round is begun."""
    cache = torch.empty(FLUSH_BYTES if flush and device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def once(name: str) -> float:
        cache.zero_()
        return elapsed_ms(calls[name], device)

    first = {name: min((once(name) for _ in range(warm_up)), default=0.0) for name in calls}
    quick = [name for name in calls if first[name] <= SLOW * min(first.values())]
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for group in (quick, *([name] for name in calls if name not in quick)):
        begun = time.perf_counter()
        for i in range(repeats):
            if i and time.perf_counter() - begun > LIMIT_S:
                break
            for name in order.sample(list(group), len(group)):
                times[name].append(once(name))
    return {name: statistics.median(found) for name, found in times.items()}


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """TFLOP/s of a square GEMM and GB/s of a copy (read + write), as upper bounds for the rest."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = medians_ms({"gemm": lambda: a @ a, "copy": lambda: target.copy_(source)}, device, repeats)
    return {"tflops": 2 * side**3 / found["gemm"] / 1e9, "gbps": 2 * size / found["copy"] / 1e6}


@contextlib.contextmanager
def host_memory() -> Iterator[dict[str, float]]:
    """Measures its body: `peak_gib` and `kept_gib` of anonymous host memory, which excludes mapped files.

    The dictionary stays empty if the system does not report it."""

    def anonymous() -> float | None:
        with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) / 2**20
        return None

    found: dict[str, float] = {}
    gc.collect()
    first = anonymous()
    if first is None:
        yield found
        return
    highest, done = [first], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest.append(max(highest.pop(), anonymous() or 0.0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
    gc.collect()
    found |= {"peak_gib": highest[0] - first, "kept_gib": (anonymous() or 0.0) - first}


def every_way(device: torch.device, dtype: torch.dtype) -> dict[str, Backend]:
    """Every backend and precision that runs here, by "name precision"."""
    return {
        f"{name} {precision}": backends.select(name, precision, device=device, dtype=dtype)
        for name, reason, precisions in backends.report(device, dtype)
        for precision in (() if reason else precisions)
    }


def random_model(
    config: ZImageConfig, device: torch.device, dtype: torch.dtype, backend: Backend | None, rank: int = RANK
) -> ZImageTransformer:
    """A model of random weights on the device, quantized for the backend, or dense if it is None."""
    with torch.device("meta"):
        model = ZImageTransformer(config, partial(SVDQLinear, rank=rank) if backend else Linear)
    model.backend = backend
    model.use(ops.select(backend.name if backend else "auto", device, dtype, config.head_dim))
    for module in model.modules():
        if backend and isinstance(module, SVDQLinear):
            module.load(random_weights(module.out_features, module.in_features, rank, device, dtype), backend)
    return randomize(model, device, dtype)


def randomize(model: AnyModule, device: torch.device, dtype: torch.dtype) -> AnyModule:
    """Replace every parameter of a model, which may be on the meta device, by values that keep activations near 1."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.ndim > 1:
                value.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                value.fill_(0.0 if name == "bias" else 1.0)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.eval()


def step_of(model: ZImageTransformer, device: torch.device, dtype: torch.dtype, codes: bool = False) -> Step:
    """Steps of this project's transformer as the pipeline runs them, with CUDA graphs where it uses them.

    `prepare`, which runs once per prompt, is not included. codes: keep 8-bit codes."""
    streamer = BlockStreamer(model.blocks, model)
    streamer.place(device, math.inf if codes else weights(model.blocks, model).total)

    def at(size: int, batch: int) -> Call:
        graphs = Graphs(model, streamer)
        caption = torch.randn(CAPTION_TOKENS, model.config.cap_feat_dim, device=device, dtype=dtype)
        cond = model.prepare([caption], size, size)
        latents = draw_noise(0, batch, size, size).to(device)
        t = torch.full((batch,), 0.4, device=device)
        return partial(graphs.run, model, latents, t, cond) if graphs.possible else partial(model, latents, t, cond)

    return at


def own_sides(
    config: ZImageConfig, rank: int, device: torch.device, dtype: torch.dtype, model: Path | None = None
) -> dict[str, Callable[[], Step]]:
    """Functions by name that build steps of our own model: dense, and for every backend and precision that runs here.

    Weights are random, or a file's if `model` is given."""

    def made(backend: Backend | None, codes: bool = False) -> Step:
        if model and backend:
            ways = {"backend": backend.name, "precision": backend.precision}
            return step_of(load_transformer(model, device=device, dtype=dtype, **ways), device, dtype, codes)
        return step_of(random_model(config, device, dtype, backend, rank), device, dtype, codes)

    sides: dict[str, Callable[[], Step]] = {f"dense {dtype_name(dtype)}": partial(made, None)}
    for name, way in every_way(device, dtype).items() if rank else ():
        sides[name] = partial(made, way)
        if way.precision == "w4a8":
            sides[f"{name}, codes kept"] = partial(made, way, codes=True)
    return sides


@torch.inference_mode()
def bench_steps(
    sides: Mapping[str, Callable[[], Step]],
    sizes: Sequence[int],
    batches: Sequence[int],
    device: torch.device,
    repeats: int,
    warm_up: int = WARM_UP,
    together: bool = False,
) -> list[dict]:
    """A row for every side, size and batch: ms of one step, and on a GPU ms to launch one without a graph and peak GiB.

    Models are built and measured one after the other, or all `together`, taking turns. After an out-of-memory error a
    side's row has no time."""
    rows = []
    on_gpu = device.type == "cuda"
    for group in [sides] if together else [{name: build} for name, build in sides.items()]:
        steps = None
        for size in sizes:
            for batch in batches:
                row: dict[str, object] = {"size": size, "batch": batch}
                host: dict[str, float] = {}
                try:
                    steps = steps or {name: build() for name, build in group.items()}
                    if on_gpu:
                        torch.cuda.reset_peak_memory_stats(device)
                    calls = {name: at(size, batch) for name, at in steps.items()}
                    host = {name: launch_ms(eager(call), device) for name, call in calls.items()} if on_gpu else {}
                    found: Mapping[str, float | None] = medians_ms(calls, device, repeats, warm_up, flush=False)
                    del calls
                except torch.cuda.OutOfMemoryError:
                    found = dict.fromkeys(group)
                for name, ms in found.items():
                    peak = torch.cuda.max_memory_allocated(device) / GIB if on_gpu and ms else None
                    rows.append({"what": name, **row, "ms": ms, "host_ms": host.get(name), "peak_gib": peak})
        del steps
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
    return sorted(rows, key=lambda row: (row["batch"], row["size"]))


def eager(call: Call) -> Call:
    """A step of `step_of` without its graph; any other call as it is."""
    replayed = isinstance(call, partial) and isinstance(getattr(call.func, "__self__", None), Graphs)
    return partial(*call.args) if replayed else call  # type: ignore[attr-defined]


def launch_ms(call: Call, device: torch.device) -> float:
    """Milliseconds that the host takes for a call, the least of LAUNCHES after one that warms up."""
    found = []
    for _ in range(1 + LAUNCHES):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found[1:]) * 1e3


def add_ratios(rows: list[dict], bases: Mapping[str, str], same: Sequence[str]) -> None:
    """Add to every row its time relative to each base (key -> the base's name), among rows equal in the `same` keys."""
    for key, base in bases.items():
        times = {tuple(row[k] for k in same): row["ms"] for row in rows if row["what"] == base}
        for row in rows:
            theirs = times.get(tuple(row[k] for k in same))
            row[key] = row["ms"] / theirs if row["ms"] and theirs else None


def block_linears(config: ZImageConfig) -> dict[str, tuple[int, int]]:
    """The four linears of a block: qkv, out, w3_w1, w2 -> (N, K)."""
    return {name.rpartition(".")[2].removeprefix("to_"): shape for name, shape in config.linears.items()}


Extras = Callable[[SVDQWeights, Tensor], Mapping[str, tuple[Call, Sequence[Tensor]]]]


@torch.inference_mode()
def bench_linears(
    shapes: Mapping[str, tuple[int, int]],
    rows: int,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    peak: Mapping[str, float],
    extras: Extras = lambda weights, x: {},
) -> list[dict]:
    """A row for every linear and every backend: ms, TFLOP/s and GB/s and their shares of `ceilings`, error.

    The dense linear in dtype comes first and is the base of the ratios; on the CPU one in fp32 follows. `extras`
    returns further calls and the tensors that they read; a name that begins with a blank is a part of another call and
    has no FLOPs and error. TFLOP/s count the dense product alone, GB/s the operands as stored and the result; the
    error is relative to fp32."""
    results = []
    for layer, (n, k) in shapes.items():
        weights = random_weights(n, k, rank, device, dtype)
        x = (torch.randn(rows, k, device=device) * weights.smooth_factor).to(dtype)
        dense = weights.dequantize()
        exact = x[:64].float() @ dense.T
        stored = (*weights.tensors().values(), x)
        calls: dict[str, tuple[Call, Sequence[Tensor]]] = {}
        for kind in dict.fromkeys((dtype, torch.float32) if device.type == "cpu" else (dtype,)):
            operands = (x.to(kind), dense.to(kind))
            calls[dtype_name(kind)] = partial(F.linear, *operands), operands
        for name, way in every_way(device, dtype).items():
            calls[name] = partial(way.linear, x, way.prepare(weights)), stored
        calls |= extras(weights, x)
        times = medians_ms({name: call for name, (call, _) in calls.items()}, device, repeats, warm_up=1)
        for name, (call, read) in calls.items():
            y, ms = call(), times[name]
            gbps = sum(t.numel() * t.element_size() for t in (*read, y)) / ms / 1e6
            row = {"layer": layer, "what": name, "n": n, "k": k, "rows": rows, "ms": ms}
            row |= {"gbps": gbps, "of_copy": gbps / peak["gbps"]}
            if not name.startswith(" "):
                tflops = 2 * rows * n * k / ms / 1e9
                row |= {"tflops": tflops, "of_gemm": tflops / peak["tflops"]}
                row["error"] = ((y[:64].float() - exact).norm() / exact.norm()).item()
            results.append(row)
    add_ratios(results, {"ratio": dtype_name(dtype)}, ["layer"])
    return results


def totals(rows: Sequence[Mapping]) -> list[dict]:
    """One row per backend: the sum over its linears, and its ratio to the first."""
    sums: dict[str, float] = {}
    for row in rows:
        sums[row["what"]] = sums.get(row["what"], 0.0) + row["ms"]
    base = sums[rows[0]["what"]]
    return [{"layer": "all", "what": name, "ms": ms, "ratio": ms / base} for name, ms in sums.items()]


LINEAR_COLUMNS = {
    "layer": "linear",
    "what": "way",
    "ms": "ms|.3f",
    "ratio": "ratio|.2f",
    "tflops": "TFLOP/s|.2f",
    "of_gemm": "of GEMM|.0%",
    "gbps": "GB/s|.1f",
    "of_copy": "of copy|.0%",
    "error": "error|.4f",
}
STEP_COLUMNS = {
    "batch": "batch",
    "size": "pixels",
    "what": "way",
    "ms": "ms|.1f",
    "vs_dense": "vs dense|.2f",
    "vs_comfyui": "vs ComfyUI|.2f",
    "host_ms": "host ms|.1f",
    "peak_gib": "peak GiB|.2f",
}


def show_linears(title: str, rows: list[dict]) -> None:
    """Print the table of linears and their sums."""
    print(f"\n{title}\n\n{table(rows + totals(rows), LINEAR_COLUMNS)}", flush=True)


def show_steps(title: str, rows: list[dict], dtype: torch.dtype, peer: str | None = None) -> None:
    """Add the ratios to the dense model and to a peer, and print the table."""
    bases = {"vs_dense": f"dense {dtype_name(dtype)}"} | ({"vs_comfyui": peer} if peer else {})
    add_ratios(rows, bases, ["size", "batch"])
    columns = {key: value for key, value in STEP_COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    print(f"\n{title}\n\n{table(rows, columns)}", flush=True)


def bench(model: str | None = None, device: str | None = None, size: int | None = None) -> None:
    """Benchmark this machine: prints tables, and a last line of JSON with the same.

    On a GPU the four linears of a full-size block at 4224 rows and a step at 1024 x 1024 pixels, with random weights;
    on a CPU the demo's sizes at 256 x 256. With `model`, a transformer file, its sizes and its steps. ValueError for
    another kind of file, a device that does not exist or a size that is no multiple of 16.
    """
    info = model_info(model) if model else None
    where = choose_device(device)
    dtype, on_gpu = choose_dtype(None, where), where.type == "cuda"
    config = info.config if info else ZImageConfig() if on_gpu else DEMO
    rank = info.rank if info else RANK if on_gpu else DEMO_RANK
    size = size or (1024 if on_gpu else 256)
    if size < CELL or size % CELL:
        raise ValueError(f"size: expected a multiple of {CELL} pixels, found {size}")
    long = not on_gpu and config.dim > LARGE_ON_CPU
    repeats, warm_up = (1, 1) if long else (15, WARM_UP)
    torch.manual_seed(0)
    facts, peak = machine(where, dtype), ceilings(where, dtype, 15)
    print_machine(facts, peak)
    rows = (size // CELL) ** 2 + CAPTION_TOKENS
    linears = bench_linears(block_linears(config), rows, rank or DEMO_RANK, where, dtype, repeats, peak)
    show_linears(f"The linears of one block, {rows} rows, rank {rank or DEMO_RANK}", linears)
    sides = own_sides(config, rank, where, dtype, Path(model) if model else None)
    steps = bench_steps(sides, [size], [1], where, repeats, warm_up, together=not on_gpu and not long)
    weights = Path(model).name if model else "random weights"
    show_steps(f"One step, {weights}, width {config.dim}, {config.n_layers} layers, rank {rank}", steps, dtype)
    if busy := disturbed(peak, ceilings(where, dtype, 15), linears):
        print(f"\n{busy}")
    found = {"peak": peak, "linears": linears, "totals": totals(linears), "model": weights, "steps": steps}
    print_json("zimage bench", facts, **found, busy=bool(busy))


def disturbed(before: Mapping[str, float], after: Mapping[str, float], rows: Iterable[Mapping]) -> str | None:
    """A sentence where the ceilings moved during a run, or a linear went beyond them; None on a quiet machine."""
    moved = max(max(before[name], after[name]) / min(before[name], after[name]) for name in before)
    beyond = max((row.get("of_gemm", 0.0) for row in rows), default=0.0)
    if max(moved, beyond) <= BUSY:
        return None
    signs = [f"its ceilings moved by {moved - 1:.0%} during the run"] if moved > BUSY else []
    signs += [f"a linear reached {beyond:.0%} of the largest GEMM"] if beyond > BUSY else []
    return (
        f"This machine was busy ({', '.join(signs)}): do not compare these figures; run it again when nothing else runs"
    )
