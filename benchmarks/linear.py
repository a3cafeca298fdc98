"""The linears of one Z-Image block: every backend that runs here against dense ones, in one run.

    python benchmarks/linear.py                   the GPU if there is one: four linears, 4224 rows (1024 x 1024)
    python benchmarks/linear.py --device cpu      one linear of 3840 x 3840, 512 rows, and the demo model's four

Beside the ways of `zimage bench`: the triton backend's kernels by themselves, and torch's own int4 kernel on a CPU.
Method: `zimage_core/bench.py`. The table is for people; the last line is JSON.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from zimage_core import bench, report
from zimage_core.bench import Call
from zimage_core.device import choose_device, choose_dtype
from zimage_core.linear import backends, layout
from zimage_core.linear.svdq import SVDQWeights
from zimage_core.models.config import ZImageConfig

SQUARE = {"out": (3840, 3840)}
DEMO_ROWS = 96


def extras(weights: SVDQWeights, x: Tensor) -> dict[str, tuple[Call, tuple[Tensor, ...]]]:
    """Further calls beside the backends', and what they read."""
    found = part_calls(weights, x)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        found["torch int4pack w4a16"] = int4pack_call(weights, x), (*weights.tensors().values(), x)
    return found


def int4pack_call(weights: SVDQWeights, x: Tensor) -> Call:
    """The same linear on torch's `_weight_int4pack_mm_for_cpu`, whose codes are 0 to 15 with 8 for zero."""
    codes = layout.unpack_nibbles(weights.qweight).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = weights.wscales.t()
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()

    def run() -> Tensor:
        smoothed = x / weights.smooth_factor
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(smoothed, packed, layout.GROUP, scales_and_zeros)
        return torch.addmm(y, x @ weights.proj_down.T, weights.proj_up.T)

    return run


def part_calls(weights: SVDQWeights, x: Tensor) -> dict[str, tuple[Call, tuple[Tensor, ...]]]:
    """The kernels of the triton backend by themselves, where it runs."""
    module = backends.load("triton")
    if module.unavailable(x.device, x.dtype):
        return {}
    prepared = module.prepare(weights, "w4a8")
    eight = module.eight_bit(x.device)
    codes = (weights.qweight, weights.wscales)
    branch = (weights.proj_down, weights.proj_up)

    def int8() -> Tensor:
        """w4a8 as on cards without fp8."""
        rows, row_scale = module.quantize_rows(x, prepared["smooth_factor"], torch.int8)
        weight, to_code = module.requantize(prepared, torch.int8), module.to_code(torch.int8)
        scales = row_scale, weight, prepared["channel_scale"], to_code, x.dtype
        return module.multiply_int8(rows, *scales, x @ weights.proj_down.T, weights.proj_up)

    return {
        " int8 w4a8": (int8, (*codes, *branch, x)),
        " dequantize": (lambda: module.dequantize(prepared), (*codes, weights.smooth_factor, *branch)),
        " requantize": (lambda: module.requantize(prepared, eight), codes),
        " quantize rows": (lambda: module.quantize_rows(x, prepared["smooth_factor"], eight)[0], (x,)),
        " low rank": (lambda: (x @ weights.proj_down.T) @ weights.proj_up.T, (x, *branch)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: a GPU if torch sees one")
    parser.add_argument("--rows", type=int, help="rows of x (default 4224 on a GPU, 512 on a CPU)")
    parser.add_argument("--rank", type=int, default=bench.RANK)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = choose_device(args.device)
    dtype, gpu = choose_dtype(None, device), device.type == "cuda"
    rows = args.rows or (4224 if gpu else 512)
    machine, peak = report.machine(device, dtype), bench.ceilings(device, dtype, args.repeats)
    report.print_machine(machine, peak)
    shapes = bench.block_linears(ZImageConfig()) if gpu else SQUARE
    found = {"linears": bench.bench_linears(shapes, rows, args.rank, device, dtype, args.repeats, peak, extras)}
    bench.show_linears(f"{rows} rows, rank {args.rank}", found["linears"])
    if not gpu:
        demo, rank = bench.block_linears(bench.DEMO), bench.DEMO_RANK
        found["demo"] = bench.bench_linears(demo, DEMO_ROWS, rank, device, dtype, args.repeats, peak, extras)
        bench.show_linears(f"the demo model, {DEMO_ROWS} rows, rank {rank}", found["demo"])
    report.print_json("linear", machine, peak=peak, totals=bench.totals(found["linears"]), **found)


if __name__ == "__main__":
    main()
