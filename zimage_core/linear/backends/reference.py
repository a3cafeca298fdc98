"""Plain torch on any device, which defines correctness: w4a16, and w4a4 in the order of nunchaku's kernels.

w4a16 dequantizes a bounded number of rows at a time in a few whole-tensor operations, then multiplies once. Small
weights, such as the demo's, take longer to dequantize than to multiply, so their dense form is kept beside the codes.

Legend: M rows, N out, K in, R rank, G = K / 64 groups (K / 16 of FP4, which has w4a16 only). H is the 16-bit dtype of
x (or fp32: no rounding).
Source of the w4a4 order: nunchaku/src/kernels/zgemm/{gemm_w4a4.cuh,lora.cuh}@92e4695.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .. import layout

if TYPE_CHECKING:
    from ..svdq import SVDQWeights

PRECISIONS = ("w4a16", "w4a4")
FP4 = ("w4a16",)
FIELDS = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "bias", "outer_scale")
CHUNK = 2**24  # elements unpacked at a time: 16 MiB of codes
FP16_PART = 2**-8
DENSE = 2**20  # elements up to which a weight's dense form is kept: 2 MiB in bf16


def unavailable(
    device: torch.device, dtype: torch.dtype, fp4: bool = False, precision: str | None = None
) -> str | None:
    """None: it runs everywhere."""
    return None


def prepare(weights: SVDQWeights, precision: str) -> dict[str, torch.Tensor]:
    """The weights' tensors by name; with w4a16 a small weight's `dense` form (N, K) beside them."""
    prepared = weights.tensors()
    if precision == "w4a16" and 2 * weights.qweight.numel() <= DENSE:
        prepared["dense"] = weights.dequantize().to(weights.smooth_factor.dtype)
    return prepared


def restore(prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The fields of SVDQWeights."""
    return {name: prepared[name] for name in FIELDS if name in prepared}


def linear(x: torch.Tensor, prepared: Mapping[str, torch.Tensor], precision: str) -> torch.Tensor:
    """x (M, K) -> (M, N)."""
    return _w4a4(x, prepared) if precision == "w4a4" else _w4a16(x, prepared)


def join(
    prepared: Mapping[str, torch.Tensor], rank: int, pair: tuple[torch.Tensor, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """The low-rank branch with a pair behind its first `rank`; None if the branch is part of a dense weight."""
    own = {"proj_down": prepared["proj_down"][:rank], "proj_up": prepared["proj_up"][:, :rank].contiguous()}
    if pair is None:
        return own
    if "dense" in prepared:
        return None
    down, up = pair
    return {"proj_down": torch.cat((own["proj_down"], down)), "proj_up": torch.cat((own["proj_up"], up), 1)}


def dequantize_codes(qweight: torch.Tensor, wscales: torch.Tensor) -> torch.Tensor:
    """Compact codes (N, K/2) and scales (N, G) -> q * s (N, K) in the dtype of the scales."""
    (n, half), groups = qweight.shape, wscales.shape[1]
    dense = torch.empty(n, 2 * half, dtype=wscales.dtype, device=qweight.device)
    rows = max(1, CHUNK // (2 * half))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        codes = qweight[part].view(torch.int8).view(-1, groups, 32)
        halves = dense[part].view(-1, groups, 2, 32)
        halves[:, :, 0] = (codes << 4) >> 4
        halves[:, :, 1] = codes >> 4
        halves.view(-1, groups, layout.GROUP).mul_(wscales[part, :, None])
    return dense


def dequantize_fp4(
    qweight: torch.Tensor, wscales: torch.Tensor, outer_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Compact codes (N, K/2), the bytes of e4m3 scales (N, K/16) and row scales (N,) -> q * s (N, K), rounded once."""
    n, half = qweight.shape
    dense = torch.empty(n, 2 * half, dtype=dtype, device=qweight.device)
    values = layout.e2m1(qweight.device)
    rows = max(1, CHUNK // (2 * half))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        codes = layout.unpack_nibbles(qweight[part]).int() & 15
        scales = wscales[part].view(torch.float8_e4m3fn).float() * outer_scale[part, None].float()
        exact = values[codes].view(*scales.shape, layout.MICRO_GROUP) * scales[:, :, None]
        dense[part] = exact.flatten(1)
    return dense


def low_rank(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x @ down.T (M, R); in fp16, which it overflows, a FP16_PART of it."""
    if x.dtype is not torch.float16:
        return x @ down.T
    return torch.addmm(x.new_zeros(()), x, down.T, beta=0, alpha=FP16_PART)


def add_low_rank(y: torch.Tensor, rank: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y + rank @ up.T (M, N) for what `low_rank` returned."""
    return torch.addmm(y, rank, up.T, alpha=1 / FP16_PART if y.dtype is torch.float16 else 1)


def quantize_activations(x: torch.Tensor, smooth_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) -> codes (M, K) int8 in -8..7 and the unrounded scales (M, G) fp32, one per row and group of 64."""
    smoothed = (x / smooth_factor).float().view(len(x), -1, layout.GROUP)
    scale = smoothed.abs().amax(-1) * torch.tensor(1 / 7, dtype=torch.float32)
    reciprocal = torch.where(scale > 0, 1 / scale, 0)
    codes = (smoothed * reciprocal[:, :, None]).round().clamp(-8, 7)
    return codes.to(torch.int8).view_as(x), scale


def _w4a16(x: torch.Tensor, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    bias = prepared.get("bias")
    if "dense" in prepared:
        return F.linear(x, prepared["dense"], bias)
    if "outer_scale" in prepared:
        weight = dequantize_fp4(prepared["qweight"], prepared["wscales"], prepared["outer_scale"], x.dtype)
    else:
        weight = dequantize_codes(prepared["qweight"], prepared["wscales"])
    y = F.linear(x / prepared["smooth_factor"], weight, bias)
    return add_low_rank(y, low_rank(x, prepared["proj_down"]), prepared["proj_up"])


def _w4a4(x: torch.Tensor, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    (m, k), n, bias = x.shape, len(prepared["qweight"]), prepared.get("bias")
    codes, scale = quantize_activations(x, prepared["smooth_factor"])
    low_rank = F.linear(x.float(), prepared["proj_down"].float()).to(x.dtype).float()
    codes = codes.to(x.dtype).view(m, -1, layout.GROUP).transpose(0, 1)  # (G, M, 64)
    ascales = scale.to(x.dtype).t()[:, :, None]  # (G, M, 1)
    y = x.new_empty(m, n)
    rows = max(128, CHUNK // max(m, k))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        weight = layout.unpack_nibbles(prepared["qweight"][part]).to(x.dtype)
        weight = weight.view(-1, k // layout.GROUP, layout.GROUP).permute(1, 2, 0)  # (G, 64, N)
        acc = x.new_zeros(m, weight.shape[2])
        for activation, ascale, group, wscale in zip(codes, ascales, weight, prepared["wscales"][part].t()):
            dot = activation @ group  # at most 4096 in size: exact in fp32, rounded once to H
            acc = torch.addcmul(acc.float(), dot.float(), (ascale * wscale).float()).to(x.dtype)
        if bias is not None:
            acc = acc + bias[part]
        y[:, part] = torch.addmm(acc.float(), low_rank, prepared["proj_up"][part].float().t()).to(x.dtype)
    return y
