"""Runs the Triton kernels as they are compiled for older GPUs on a newer one, and compares with plain torch.

    python benchmarks/ptx_forward.py [75 80 86 89]

PTX runs on every later GPU. So each kernel is compiled for the older card, its PTX instead of its machine code is given
to the driver, and the package takes the card for the older one (dtypes, tiles, int8 or fp8). A kernel that needs more
shared memory than the older card has fails, as it would there. What this does not show: the older card's speed, and
its machine code.

Every card runs in a process of its own. `TRITON_INTERPRET=1 ... 75 --device cpu` tries the checks without a GPU, small
and in fp16, which Triton's interpreter rounds rightly.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from zimage_core import bench, report
from zimage_core.device import dtype_name
from zimage_core.linear.backends import Backend, fused, reference
from zimage_core.linear.backends import triton as backend
from zimage_core.linear.svdq import SVDQLinear
from zimage_core.models import ops
from zimage_core.models.config import ZImageConfig
from zimage_core.models.transformer import Block, rope_angles

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB that one block of threads may take
CARDS = (75, 80, 86, 89)
SHAPES = [(11520, 3840), (3840, 10240)]
FUSED = ops.Ops(*(getattr(fused, name) for name in ops.Ops._fields))
Check = tuple[str, float, float]  # what was computed, its error, the largest error allowed


def imitate(sm: int) -> dict[str, int]:
    """Make triton compile for a card and torch report it; returns the shared memory of each kernel as it loads."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime import driver

    target, taken = driver.active.get_current_target(), {}
    if target.arch < sm:
        raise SystemExit(f"sm_{sm}: expected a GPU that is at least as new, found sm_{target.arch}")
    initialize = compiler.CompiledKernel.__init__

    def with_ptx(kernel, *args: object) -> None:
        initialize(kernel, *args)
        kernel.kernel = kernel.asm["ptx"].encode()
        taken[kernel.name] = max(kernel.metadata.shared, taken.get(kernel.name, 0))

    compiler.CompiledKernel.__init__ = with_ptx
    compiler.max_shared_mem = lambda device: SHARED[sm] * 1024
    driver.active.get_current_target = lambda: GPUTarget("cuda", sm, target.warp_size)
    torch.cuda.get_device_capability = lambda device=None: divmod(sm, 10)
    return taken


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def steps_off(found: Tensor, exact: Tensor) -> float:
    """The largest distance of 8-bit codes from the exact values, in steps between codes."""
    exponent = exact.abs().clamp(min=2**-6).log2().floor()
    step = torch.ones_like(exact) if found.dtype is torch.int8 else 2.0 ** (exponent - 3)
    return ((found.float() - exact).abs() / step).max().item()


def check_linears(n: int, k: int, rank: int, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Weights, codes and results of one linear; half of the rank could be a LoRA's."""
    weights = bench.random_weights(n, k, rank, device, dtype)
    exact, eight, shape = weights.dequantize(), backend.eight_bit(device), f"{n} x {k}, rank {rank}"
    one, two = (3e-4, 6e-4) if dtype is torch.float16 else (1.8e-3, 2.6e-3)  # of rounding once, and twice
    yield f"dequantize {shape}", error(backend.dequantize(weights.tensors()), exact), two
    x = (torch.randn(2, k, device=device) * weights.smooth_factor).to(dtype).repeat(backend.FEW_ROWS // 2 + 1, 1)
    prepared = backend.prepare(weights, "w4a16")
    for rows in (3, len(x)):
        _, columns = backend.smoothing(prepared, "w4a16", rows)
        y = backend.linear(F.pad(x[:rows], (0, columns)), prepared, "w4a16")
        yield f"w4a16 {shape}, {rows} rows", error(y, x[:rows].float() @ exact.T), one + two
    prepared = backend.prepare(weights, "w4a8")
    # A driver that translates sm_89's PTX for Hopper converts to fp8 by way of fp16, cut off: 2**-7 of a step more.
    rounding = 0.509 if backend.capability(device) == 89 else 0.501
    codes = backend.requantize(prepared, eight)[:, :k]
    residual = reference.dequantize_codes(weights.qweight, weights.wscales.float())
    scale = prepared["wide_scale" if eight.is_floating_point else "channel_scale"] * backend.to_code(eight)
    yield f"requantize {shape}", steps_off(codes, residual / scale[:, None]), rounding
    codes, _ = backend.quantize_rows(x, weights.smooth_factor, eight)
    smoothed = x.float() / weights.smooth_factor.float()
    largest = smoothed.abs().amax(1, keepdim=True)
    yield f"quantize_rows {shape}", steps_off(codes, smoothed / largest * backend.LIMITS[eight]), rounding
    w4a4 = error(reference.linear(x[:8], weights.tensors(), "w4a4"), x[:8].float() @ exact.T)
    y = backend.linear(x[:40], prepared, "w4a8")
    yield f"w4a8 {shape}", error(y, x[:40].float() @ exact.T), 0.4 * w4a4  # the limit of the unit tests
    codes, scale = backend.requantize(prepared, torch.int8), prepared["channel_scale"] * backend.to_code(torch.int8)
    x = smoothed[:40].to(dtype)
    y = backend.multiply_8bit(x, codes, scale, None)
    yield f"w8a8 {shape}", error(y, x.float() @ (codes.float() * scale[:, None]).T), 0.01  # likewise


def check_ops(config: ZImageConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """The operations between the linears against plain torch in fp32; codes against those of `quantize_rows`."""
    d, f, stream = config.dim, config.ffn_dim, torch.float32 if dtype is torch.float16 else dtype
    one = 3e-4 if dtype is torch.float16 else 1.8e-3  # of rounding once
    random = functools.partial(torch.randn, device=device)
    x, h, weight, scale = random(2, 9, d).to(stream), random(2, 9, d).to(dtype), random(d).to(dtype), random(1, 1, d)
    gates, heads, scale = random(2, 9, 2 * f).to(dtype), random(config.head_dim).to(dtype), scale.to(dtype)
    qkv = random(2, 9, 3, config.n_heads, config.head_dim).to(dtype)
    angles = [y.to(device) for y in rope_angles(torch.arange(27.0).view(1, 9, 3), config)]
    calls = {
        "norm_scale": (x, weight, 1e-5, scale),
        "norm_gate_add": (x, h, weight, 1e-5, scale),
        "add_norm_scale": (x, h, weight, weight, 1e-5, scale, scale),
        "norm_rope": (qkv, heads, heads, 1e-5, *angles),
        "swiglu": (gates,),
    }
    for name, args in calls.items():
        plain = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        found, expected = getattr(fused, name)(*args), getattr(ops, name)(*plain)
        if isinstance(expected, tuple):
            found, expected = torch.stack(tuple(found)), torch.stack(expected)
        yield name, error(found, expected), 2 * one if name == "add_norm_scale" else one  # its sum is rounded before
    for name, width in (("norm_scale", d), ("swiglu", f)):
        smooth = (random(width) * 0.3).exp().to(dtype)
        made = getattr(fused, name)(*calls[name], smooth=smooth)
        codes, row_scale = backend.quantize_rows(made.x.flatten(0, 1), smooth, made.codes.dtype)
        off = (codes.float() != made.codes.float()).sum() + (row_scale != made.row_scale).sum()
        yield f"codes of {name}, different", off.item(), 0


def check_block(config: ZImageConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """A whole block, kernels against plain torch over the same w4a8 and w4a16 linears."""
    stream = torch.float32 if dtype is torch.float16 else dtype
    for precision, limit in (("w4a8", 0.05), ("w4a16", 0.01)):  # roundings between the linears change codes
        block = Block(config, functools.partial(SVDQLinear, rank=64), True)
        bench.randomize(block, device, dtype)
        for linear in block.modules():
            if isinstance(linear, SVDQLinear):
                weights = bench.random_weights(linear.out_features, linear.in_features, 64, device, dtype)
                linear.load(weights, Backend("triton", precision, backend, ""))
        x, t_emb = torch.randn(2, 9, config.dim, device=device, dtype=stream), torch.randn(2, 256, device=device)
        angles = [y.to(device) for y in rope_angles(torch.arange(27.0).view(1, 9, 3), config)]
        results = []
        for chosen in (FUSED, ops.TORCH):
            for module in (block, block.attention, block.feed_forward):
                module.ops = chosen
            results.append(block(x, *angles, None, t_emb.to(dtype)))
        yield f"block, {precision}", error(*results), limit


@torch.inference_mode()
def run(sm: int, device: torch.device) -> bool:
    """Print one card's table; whether every error is within its limit."""
    taken = {} if device.type == "cpu" else imitate(sm)
    torch.manual_seed(0)
    dtype = torch.float16 if sm < 80 else torch.bfloat16
    config, shapes, ranks = ZImageConfig(), SHAPES, (16, 256, 272)
    if device.type == "cpu":
        config, shapes, ranks = ZImageConfig(384, n_heads=3), [(128, 384)], (16,)
    checks: list[Check] = []
    for (n, k), rank in [(shape, rank) for shape in shapes for rank in ranks]:
        checks += check_linears(n, k, rank, device, dtype)
    checks += [*check_ops(config, device, dtype), *check_block(config, device, dtype)]
    rows = [{"what": what, "error": off, "limit": limit, "good": str(off <= limit)} for what, off, limit in checks]
    title = f"as sm_{sm}, {dtype_name(dtype)}"
    columns = {"what": title, "error": "error|.5f", "limit": "limit|.5f", "good": ""}
    print(report.table(rows, columns))
    for name, count in sorted(taken.items()):
        print(f"{name}: {count / 1024:.1f} of {SHARED[sm]} KiB of shared memory")
    return all(off <= limit for _, off, limit in checks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", type=int, nargs="*", metavar="SM", help="compute capabilities, default 75 80 86 89")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    cards, device = args.cards or CARDS, torch.device(args.device)
    if len(cards) == 1:
        sys.exit(not run(cards[0], device))
    command = [sys.executable, __file__, "--device", args.device]
    failed = {sm: subprocess.run([*command, str(sm)], env=os.environ).returncode for sm in cards}
    report.print_json("ptx_forward", {"device": str(device)}, passed={f"sm_{sm}": not rc for sm, rc in failed.items()})
    sys.exit(any(failed.values()))


if __name__ == "__main__":
    main()
