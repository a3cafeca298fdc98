"""The functions of `models.ops` as Triton kernels, each one pass over memory. For inference; importing needs triton.

Eager torch reads and writes the residual stream and the feed-forward activations ten to fifteen times per block.
Inside, everything is fp32 and rounded once, so results differ from `ops` by its intermediate roundings.

With a smoothing vector a kernel also writes the 8-bit codes for the w4a8 linear behind it, bit for bit those that
`triton.quantize_rows` computes from the rounded result, without reading it again. It leaves `columns` for the linear
to fill behind each row of codes, or of the result where there are none.

Legend: that of `ops`; M = B * L rows.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import operator
from . import Quantized
from .triton import LIMITS, empty_codes
from .triton_kernels import launch, smoothed, store_codes, store_scale


def norm_scale(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor | None, smooth: Tensor | None = None, columns: int = 0
) -> Tensor | Quantized:
    """See `ops.norm_scale`."""
    made = _normed_scaled(x.contiguous(), weight, eps, scale, smooth, columns)
    return made[0] if smooth is None else Quantized(*made)


def norm_gate_add(x: Tensor, h: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Tensor:
    """See `ops.norm_gate_add`."""
    return _normed_added(x.contiguous(), h.contiguous(), weight, eps, gate)


def add_norm_scale(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    eps: float,
    gate: Tensor | None,
    scale: Tensor | None,
    smooth: Tensor | None = None,
    columns: int = 0,
) -> tuple[Tensor, Tensor | Quantized]:
    """See `ops.add_norm_scale`."""
    x, *made = _added_scaled(x.contiguous(), h.contiguous(), weight, next_weight, eps, gate, scale, smooth, columns)
    return x, made[0] if smooth is None else Quantized(*made)


def norm_rope(qkv: Tensor, norm_q: Tensor, norm_k: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """See `ops.norm_rope`; overwrites q and k where they lie, in fp16 also v, whose infinities saturate."""
    qkv = qkv.contiguous()
    _turn(qkv, norm_q, norm_k, eps, cos.contiguous(), sin.contiguous())
    return qkv.unbind(2)


def swiglu(x: Tensor, smooth: Tensor | None = None, columns: int = 0) -> Tensor | Quantized:
    """See `ops.swiglu`."""
    made = _gated_values(x.contiguous(), smooth, columns)
    return made[0] if smooth is None else Quantized(*made)


def _outputs(x: Tensor, width: int, dtype: torch.dtype, coded: bool, columns: int) -> list[Tensor]:
    """Uninitialized results for x (..., any): (..., width) with codes (M, width + columns) and scales (M,) if coded,
    else (..., width + columns)."""
    out = torch.empty(*x.shape[:-1], width + (0 if coded else columns), dtype=dtype, device=x.device)
    return [out, *empty_codes(out.numel() // width, width + columns, x.device)] if coded else [out]


@operator(
    "norm_scale(Tensor x, Tensor weight, float eps, Tensor? scale, Tensor? smooth, int columns) -> Tensor[]",
    lambda x, weight, eps, scale, smooth, columns: _outputs(x, x.shape[-1], weight.dtype, smooth is not None, columns),
)
def _normed_scaled(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor | None, smooth: Tensor | None, columns: int
) -> list[Tensor]:
    width = x.shape[-1]
    made = _outputs(x, width, weight.dtype, smooth is not None, columns)
    out, codes, row_scale = made if smooth is not None else (*made, None, None)
    limit = None if codes is None else LIMITS[codes.dtype]
    launch(
        _norm_scale, (x.numel() // width,), x, weight, weight if scale is None else scale, out, smooth, codes,
        row_scale, x.shape[1], _stride(scale), width, made[0].shape[-1], width + columns, eps, scale is not None, limit,
        **_row(width),
    )  # fmt: skip
    return made


@operator(
    "norm_gate_add(Tensor x, Tensor h, Tensor weight, float eps, Tensor? gate) -> Tensor",
    lambda x, h, weight, eps, gate: torch.empty_like(x),
)
def _normed_added(x: Tensor, h: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Tensor:
    out, width = torch.empty_like(x), x.shape[-1]
    launch(
        _norm_gate_add, (x.numel() // width,), x, h, weight, weight if gate is None else gate, out, x.shape[1],
        _stride(gate), width, eps, gate is not None, h.dtype is torch.float16, **_row(width),
    )  # fmt: skip
    return out


@operator(
    "add_norm_scale(Tensor x, Tensor h, Tensor weight, Tensor next_weight, float eps, Tensor? gate, Tensor? scale,"
    " Tensor? smooth, int columns) -> Tensor[]",
    lambda x, h, weight, next_weight, eps, gate, scale, smooth, columns: [
        torch.empty_like(x),
        *_outputs(x, x.shape[-1], weight.dtype, smooth is not None, columns),
    ],
)
def _added_scaled(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    eps: float,
    gate: Tensor | None,
    scale: Tensor | None,
    smooth: Tensor | None,
    columns: int,
) -> list[Tensor]:
    total, width = torch.empty_like(x), x.shape[-1]
    made = _outputs(x, width, weight.dtype, smooth is not None, columns)
    out, codes, row_scale = made if smooth is not None else (*made, None, None)
    limit = None if codes is None else LIMITS[codes.dtype]
    launch(
        _add_norm_scale, (x.numel() // width,), x, h, weight, weight if gate is None else gate, total, next_weight,
        weight if scale is None else scale, out, smooth, codes, row_scale, x.shape[1], _stride(gate), _stride(scale),
        width, made[0].shape[-1], width + columns, eps, gate is not None, h.dtype is torch.float16, scale is not None,
        limit, **_row(width),
    )  # fmt: skip
    return [total, *made]


@operator(
    "norm_rope(Tensor(a!) qkv, Tensor norm_q, Tensor norm_k, float eps, Tensor cos, Tensor sin) -> ()",
    lambda qkv, norm_q, norm_k, eps, cos, sin: None,
)
def _turn(qkv: Tensor, norm_q: Tensor, norm_k: Tensor, eps: float, cos: Tensor, sin: Tensor) -> None:
    batch, tokens, _, heads, width = qkv.shape
    half = qkv.dtype is torch.float16
    launch(
        _norm_rope, (batch * tokens, 2 + half), qkv, norm_q, norm_k, cos, sin, tokens,
        0 if cos.shape[0] == 1 else tokens, heads, eps, half, 1 << (heads - 1).bit_length(), width, num_warps=4,
    )  # fmt: skip


@operator(
    "swiglu(Tensor x, Tensor? smooth, int columns) -> Tensor[]",
    lambda x, smooth, columns: _outputs(x, x.shape[-1] // 2, x.dtype, smooth is not None, columns),
)
def _gated_values(x: Tensor, smooth: Tensor | None, columns: int) -> list[Tensor]:
    width, saturate = x.shape[-1] // 2, x.dtype is torch.float16
    made = _outputs(x, width, x.dtype, smooth is not None, columns)
    rows = x.numel() // x.shape[-1]
    if smooth is None:
        launch(_swiglu, (rows, -(-width // 2048)), x, *made, width, width + columns, saturate, 2048, num_warps=4)
    else:
        out, codes, row_scale = made
        given = x, out, smooth, codes, row_scale, width, width + columns
        launch(_swiglu_codes, (rows,), *given, saturate, LIMITS[codes.dtype], **_head_and_tail(width))
    return made


def _stride(scale: Tensor | None) -> int:
    """Elements from one picture's modulation to the next: 0 if all share it."""
    return 0 if scale is None or scale.shape[0] == 1 else scale.stride(0)


@cache
def _row(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@cache
def _head_and_tail(width: int) -> dict[str, int]:
    """A row as two powers of two: of one block of 16384 for 10240 columns, three eighths would be idle."""
    head = triton.next_power_of_2(width) // 2
    return {"HEAD": head, "TAIL": triton.next_power_of_2(width - head), "num_warps": min(16, max(1, head // 512))}


@triton.jit
def _norm_scale(
    x, weight, scale, out, smooth, codes, row_scale, tokens, scale_stride, width, out_stride, code_stride, eps,
    SCALED: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LIMIT is the largest code, or None without codes."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.max_contiguous(tl.arange(0, BLOCK), 8)  # per thread; 16 would suit codes, but change the sum
    y = tl.load(x + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    scale += row // tokens * scale_stride
    _store_scaled(
        y, weight, scale, out, smooth, codes, row_scale, row, columns, width, out_stride, code_stride, eps,
        SCALED, LIMIT,
    )  # fmt: skip


@triton.jit
def _norm_gate_add(
    x, h, weight, gate, out, tokens, gate_stride, width, eps,
    GATED: tl.constexpr, SATURATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    y = _added(x, h, weight, gate + row // tokens * gate_stride, row, columns, width, eps, GATED, SATURATE)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _add_norm_scale(
    x, h, weight, gate, total, next_weight, scale, out, smooth, codes, row_scale,
    tokens, gate_stride, scale_stride, width, out_stride, code_stride, eps,
    GATED: tl.constexpr, SATURATE: tl.constexpr, SCALED: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.max_contiguous(tl.arange(0, BLOCK), 8)
    y = _added(x, h, weight, gate + row // tokens * gate_stride, row, columns, width, eps, GATED, SATURATE)
    y = y.to(total.dtype.element_ty)
    tl.store(total + row * width + columns, y, mask=columns < width)
    y, scale = y.to(tl.float32), scale + row // tokens * scale_stride
    _store_scaled(
        y, next_weight, scale, out, smooth, codes, row_scale, row, columns, width, out_stride, code_stride, eps,
        SCALED, LIMIT,
    )  # fmt: skip


@triton.jit
def _added(x, h, weight, gate, row, columns, width, eps, GATED: tl.constexpr, SATURATE: tl.constexpr):
    """x + tanh(gate) * norm(h) of a row in fp32, 0 beyond its width."""
    inside = columns < width
    y = tl.load(h + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if SATURATE:
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    y *= tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    y *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)
        y *= 1 - 2 / (tl.exp(2 * g) + 1)
    return y + tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_scaled(
    y, weight, scale, out, smooth, codes, row_scale, row, columns, width, out_stride, code_stride, eps,
    SCALED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Store norm(y) * (1 + scale) of a row y in fp32, and its codes."""
    inside = columns < width
    y *= tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    y *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        y *= 1 + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, y, mask=inside)
    if LIMIT is not None:
        values = smoothed(y, smooth, columns, inside)
        factor = store_scale(row_scale + row, tl.max(tl.abs(values)), LIMIT)
        store_codes(codes + row * code_stride + columns, values, factor, inside)


@triton.jit
def _norm_rope(
    qkv, norm_q, norm_k, cos, sin, tokens, angle_tokens, heads, eps,
    SATURATE: tl.constexpr, BLOCK_H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid (M, 2): all heads of one token's q (second index 0) or k (1); with SATURATE also v (2), without its norm."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, K)
    pair = tl.arange(0, K // 2)
    inside = (head < heads)[:, None] & (column < K)[None, :]
    place = qkv + (row * 3 + tl.program_id(1)) * heads * K + head[:, None] * K + column[None, :]
    loaded = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if SATURATE:
        loaded = tl.minimum(tl.maximum(loaded, -65504.0), 65504.0)
    y = loaded * tl.rsqrt(tl.sum(loaded * loaded, 1) / K + eps)[:, None]
    if tl.program_id(1) == 0:
        y *= tl.load(norm_q + column).to(tl.float32)[None, :]
    else:
        y *= tl.load(norm_k + column).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(y, (BLOCK_H, K // 2, 2)))
    angle = (row // tokens * angle_tokens + row % tokens) * (K // 2) + pair
    c, s = tl.load(cos + angle)[None, :], tl.load(sin + angle)[None, :]
    y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK_H, K))
    if SATURATE:
        y = tl.where(tl.program_id(1) == 2, loaded, y)
    tl.store(place, y.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x, row, width, columns, inside, SATURATE: tl.constexpr):
    value = tl.load(x + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    if SATURATE:  # infinity times zero is no number
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
        gate = tl.minimum(tl.maximum(gate, -65504.0), 65504.0)
    y = value * gate / (1 + tl.exp(-gate))
    if SATURATE:
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    return y.to(x.dtype.element_ty)


@triton.jit
def _swiglu(
    x, out, width, out_stride, SATURATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    tl.store(out + row * out_stride + columns, _gated(x, row, width, columns, inside, SATURATE), mask=inside)


@triton.jit
def _swiglu_codes(
    x, out, smooth, codes, row_scale, width, code_stride,
    SATURATE: tl.constexpr, LIMIT: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Grid (M,): the scale needs the whole row, which is HEAD columns and at most TAIL more."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.max_contiguous(tl.arange(0, HEAD), 8)  # per thread; 16 would suit codes, but shuffle `out`
    tail = tl.max_contiguous(HEAD + tl.arange(0, TAIL), 8)
    first = _gated_smoothed(x, out, smooth, row, width, head, SATURATE)
    second = _gated_smoothed(x, out, smooth, row, width, tail, SATURATE)
    largest = tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))
    factor = store_scale(row_scale + row, largest, LIMIT)
    store_codes(codes + row * code_stride + head, first, factor, head < width)
    store_codes(codes + row * code_stride + tail, second, factor, tail < width)


@triton.jit
def _gated_smoothed(x, out, smooth, row, width, columns, SATURATE: tl.constexpr):
    inside = columns < width
    y = _gated(x, row, width, columns, inside, SATURATE)
    tl.store(out + row * width + columns, y, mask=inside)
    return smoothed(y, smooth, columns, inside)
