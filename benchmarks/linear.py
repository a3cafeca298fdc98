"""The linears of one Z-Image block: every backend that runs here against dense ones, in one run.

    python benchmarks/linear.py                   the GPU if there is one: four linears, 4224 rows (1024 x 1024)
    python benchmarks/linear.py --device cpu      one linear of 3840 x 3840, 512 rows, and the demo model's four

Medians of single calls, the GPU's cache flushed before each, as a model's weights come from memory every time. The
table is for people; the last line is JSON. Ceilings are measured in the same run: a square GEMM and a copy.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from zimage_core import backends, layout
from zimage_core.svdq import SVDQWeights

BLOCK = {"qkv": (11520, 3840), "out": (3840, 3840), "w3_w1": (20480, 3840), "w2": (3840, 10240)}
SQUARE = {"out": (3840, 3840)}
DEMO = {"qkv": (1152, 384), "out": (384, 384), "w3_w1": (2048, 384), "w2": (384, 1024)}

Runs = dict[str, Callable[[], torch.Tensor]]


def median_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call in ms, after two calls to warm up."""
    flush = torch.empty(2**28 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    times = []
    for i in range(repeats + 2):
        flush.zero_()
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begun = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - begun) * 1e3
        if i >= 2:
            times.append(elapsed)
    return statistics.median(times)


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """TFLOP/s of a square GEMM and GB/s of a copy (read + write)."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "tflops": 2 * side**3 / median_ms(lambda: a @ a, device, repeats) / 1e9,
        "gbps": 2 * size / median_ms(lambda: target.copy_(source), device, repeats) / 1e6,
    }


def random_weights(n: int, k: int, rank: int, device: torch.device, dtype: torch.dtype) -> SVDQWeights:
    """A linear whose residual and low-rank branch have about equal norms."""
    codes = (torch.randn(n, k, device=device) * 2.6).round_().clamp_(-7, 7).to(torch.int8)
    return SVDQWeights(
        layout.pack_nibbles(codes),
        torch.rand(n, k // 64, device=device) * 0.002 + 0.002,
        (torch.randn(k, device=device) * 0.3).exp_(),
        torch.randn(rank, k, device=device) * 0.1,
        torch.randn(n, rank, device=device) * 0.08 / rank**0.5,
    ).to(dtype=dtype)


def quantized_runs(weights: SVDQWeights, x: torch.Tensor) -> Runs:
    """A call for every backend and precision that runs here, and torch's own int4 kernel on a CPU."""
    runs: Runs = {}
    for name, reason, precisions in backends.report(x.device, x.dtype):
        for precision in () if reason else precisions:
            module = backends.load(name)
            prepared = module.prepare(weights, precision)
            runs[f"{name} {precision}"] = lambda m=module, t=prepared, p=precision: m.linear(x, t, p)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        runs["torch int4pack w4a16"] = int4pack_run(weights, x)
    return runs


def int4pack_run(weights: SVDQWeights, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same linear on torch's `_weight_int4pack_mm_for_cpu`, whose codes are 0 to 15 with 8 for zero."""
    codes = layout.unpack_nibbles(weights.qweight).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = weights.wscales.t()
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()

    def run() -> torch.Tensor:
        smoothed = x / weights.smooth_factor
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(smoothed, packed, layout.GROUP, scales_and_zeros)
        return torch.addmm(y, x @ weights.proj_down.T, weights.proj_up.T)

    return run


def part_runs(weights: SVDQWeights, x: torch.Tensor) -> Runs:
    """The kernels of the triton backend by themselves, where it runs."""
    module = backends.load("triton")
    if module.unavailable(x.device, x.dtype):
        return {}
    prepared = module.prepare(weights, "w4a8")
    eight = module.eight_bit(x.device)
    return {
        "  dequantize": lambda: module.dequantize(prepared),
        "  requantize": lambda: module.requantize(prepared, eight),
        "  quantize rows": lambda: module.quantize_rows(x, prepared["smooth_factor"], eight)[0],
        "  low rank": lambda: (x @ weights.proj_down.T) @ weights.proj_up.T,
    }


def bench(shapes: dict[str, tuple[int, int]], rows: int, rank: int, device, dtype, repeats: int) -> list[dict]:
    """A row for every linear and every way to run it: ms, TFLOP/s, GB/s, error."""
    results = []
    for layer, (n, k) in shapes.items():
        weights = random_weights(n, k, rank, device, dtype)
        x = (torch.randn(rows, k, device=device) * weights.smooth_factor).to(dtype)
        dense = weights.dequantize()
        exact = x[:64].float() @ dense.T
        full = dense.to(dtype)
        runs: Runs = {str(dtype).removeprefix("torch."): lambda w=full, x=x: F.linear(x, w)}
        if device.type == "cpu":
            wide = x.float()
            runs["float32"] = lambda w=dense, x=wide: F.linear(x, w)
        parts = part_runs(weights, x)
        for name, run in (runs | quantized_runs(weights, x) | parts).items():
            result, slow = run(), name in ("reference w4a4", "kitchen w4a4")
            ms = median_ms(run, device, min(3, repeats) if slow else repeats)
            row = {"layer": layer, "n": n, "k": k, "rows": rows, "what": name, "ms": ms}
            row["gbps"] = bytes_moved(name, weights, x, result, full) / ms / 1e6
            if name not in parts:
                row["tflops"] = 2 * rows * n * k / ms / 1e9
                row["error"] = ((result[:64].float() - exact).norm() / exact.norm()).item()
            results.append(row)
    return results


def bytes_moved(name: str, weights: SVDQWeights, x: torch.Tensor, result: torch.Tensor, dense: torch.Tensor) -> int:
    """Bytes that must be read and written at least: operands as they are stored, and the result."""
    if name in ("bfloat16", "float16", "float32"):
        read = [dense, x]
    elif name == "  requantize":
        read = [weights.qweight, weights.wscales]
    elif name == "  quantize rows":
        read = [x]
    elif name == "  low rank":
        read = [x, weights.proj_down, weights.proj_up]
    else:
        read = [*weights.tensors().values(), *([] if name == "  dequantize" else [x])]
    return sum(t.numel() * t.element_size() for t in (*read, result))


def totals(results: list[dict]) -> dict[str, float]:
    """ms of all linears together, for every way that ran them."""
    summed: dict[str, float] = {}
    for row in results:
        summed[row["what"]] = summed.get(row["what"], 0.0) + row["ms"]
    return summed


def show(title: str, results: list[dict], base: str, peak: dict[str, float]) -> None:
    """Print a table; ratios are to the base's time."""
    print(f"\n{title}")
    print(
        f"{'':6} {'':22} {'ms':>9} {'ratio':>6} {'TFLOP/s':>8} {'of peak':>8} {'GB/s':>7} {'of peak':>8} {'error':>8}"
    )
    bases = {row["layer"]: row["ms"] for row in results if row["what"] == base}
    for row in results:
        rate = f"{row['tflops']:8.1f} {row['tflops'] / peak['tflops']:8.0%}" if "tflops" in row else " " * 17
        error = f"{row['error']:8.4f}" if "error" in row else ""
        ratio = row["ms"] / bases[row["layer"]]
        share = row["gbps"] / peak["gbps"]
        speed = f"{row['ms']:9.3f} {ratio:6.2f} {rate} {row['gbps']:7.1f} {share:8.0%}"
        print(f"{row['layer']:6} {row['what']:22} {speed} {error}")
    summed = totals(results)
    for name, ms in summed.items():
        print(f"{'all':6} {name:22} {ms:9.3f} {ms / summed[base]:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="rows of x (default 4224 on a GPU, 512 on a CPU)")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    dtype = torch.float16 if gpu and torch.cuda.get_device_capability(device) < (8, 0) else torch.bfloat16
    base, rows = str(dtype).removeprefix("torch."), args.rows or (4224 if gpu else 512)
    peak = ceilings(device, dtype, args.repeats)
    machine = backends.describe(device) if gpu else f"{platform.processor() or platform.machine()}"
    threads = "" if gpu else f", {torch.get_num_threads()} threads"
    print(f"{machine}{threads}, torch {torch.__version__}: {peak['tflops']:.2f} TFLOP/s, {peak['gbps']:.0f} GB/s")
    for name, reason, _ in backends.report(device, dtype):
        if reason:
            print(f"{name}: {reason}")
    shapes = BLOCK if gpu else SQUARE
    results = bench(shapes, rows, args.rank, device, dtype, args.repeats)
    show(f"{rows} rows, rank {args.rank}", results, base, peak)
    line = {"device": machine, "torch": torch.__version__, "peak": peak, "linears": results, "totals": totals(results)}
    if not gpu:
        line["threads"] = torch.get_num_threads()
        demo = bench(DEMO, 96, 16, device, dtype, args.repeats)
        show("the demo model, 96 rows, rank 16", demo, base, peak)
        line["demo"] = demo
    print(json.dumps(line))


if __name__ == "__main__":
    main()
