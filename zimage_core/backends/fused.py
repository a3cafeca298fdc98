"""The functions of `ops` as Triton kernels, each one pass over memory. Inference only; needs triton to import.

Eager torch reads and writes the residual stream and the feed-forward activations ten to fifteen times per block;
these four kernels move the least: 0.72 GB per block at 4224 tokens, 0.2 ms of an H200's 4 TB/s. Everything is fp32
inside and rounded once, so results differ from `ops` by its intermediate roundings.

Legend: that of `ops`; M = B * L rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import guard


def norm_scale(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    """See `ops.norm_scale`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    width = x.shape[-1]
    with guard(x.device):
        _norm_scale[x.numel() // width,](
            x, weight, weight if scale is None else scale, out, x.shape[1], _stride(scale), width, eps,
            scale is not None, **_row(width),
        )  # fmt: skip
    return out


def norm_gate_add(x: Tensor, h: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Tensor:
    """See `ops.norm_gate_add`."""
    x, h = x.contiguous(), h.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    with guard(x.device):
        _norm_gate_add[x.numel() // width,](
            x, h, weight, weight if gate is None else gate, out, x.shape[1], _stride(gate), width, eps,
            gate is not None, h.dtype is torch.float16, **_row(width),
        )  # fmt: skip
    return out


def norm_rope(qkv: Tensor, norm_q: Tensor, norm_k: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """See `ops.norm_rope`; overwrites q and k where they lie."""
    batch, tokens, _, heads, width = qkv.shape
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    with guard(qkv.device):
        _norm_rope[batch * tokens, 2](
            qkv, norm_q, norm_k, cos, sin, tokens, 0 if len(cos) == 1 else tokens, heads, eps,
            triton.next_power_of_2(heads), width, num_warps=4,
        )  # fmt: skip
    return qkv.unbind(2)


def swiglu(x: Tensor) -> Tensor:
    """See `ops.swiglu`."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    with guard(x.device):
        _swiglu[out.numel() // width, triton.cdiv(width, 2048)](
            x, out, width, x.dtype is torch.float16, 2048, num_warps=4
        )
    return out


def _stride(scale: Tensor | None) -> int:
    """Elements from one picture's modulation to the next: 0 where all share it."""
    return 0 if scale is None or scale.shape[0] == 1 else scale.stride(0)


def _row(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _norm_scale(
    x, weight, scale, out, tokens, scale_stride, width, eps, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    y = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    y *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        y *= 1 + tl.load(scale + row // tokens * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gate_add(
    x, h, weight, gate, out, tokens, gate_stride, width, eps,
    GATED: tl.constexpr, SATURATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    y = tl.load(h + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if SATURATE:
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    y *= tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    y *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + row // tokens * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        y *= 1 - 2 / (tl.exp(2 * g) + 1)
    y += tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope(
    qkv, norm_q, norm_k, cos, sin, tokens, angle_tokens, heads, eps, BLOCK_H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid (M, 2): all heads of one token's q (second index 0) or k (1)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, K)
    pair = tl.arange(0, K // 2)
    inside = (head < heads)[:, None] & (column < K)[None, :]
    place = qkv + (row * 3 + tl.program_id(1)) * heads * K + head[:, None] * K + column[None, :]
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 1) / K + eps)[:, None]
    if tl.program_id(1) == 0:
        y *= tl.load(norm_q + column).to(tl.float32)[None, :]
    else:
        y *= tl.load(norm_k + column).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(y, (BLOCK_H, K // 2, 2)))
    angle = (row // tokens * angle_tokens + row % tokens) * (K // 2) + pair
    c, s = tl.load(cos + angle)[None, :], tl.load(sin + angle)[None, :]
    y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK_H, K))
    tl.store(place, y.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(
    x, out, width, SATURATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    y = value * gate / (1 + tl.exp(-gate))
    if SATURATE:
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)
