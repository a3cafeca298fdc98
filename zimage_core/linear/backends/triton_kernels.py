"""The Triton kernels of the `triton` backend. Needs triton to import; `TRITON_INTERPRET=1` runs them on the CPU.

Codes are read in the compact form: byte c of a row holds the code of channel k = c // 32 * 64 + c % 32 in its low
nibble and that of k + 32 in its high one, so a tile of bytes makes two tiles of channels, each a whole operand of
`tl.dot`. No kernel masks rows of a weight or bytes of a row: the format makes both multiples of the tiles.

Legend: M rows, N out, K in, R rank, G = K / 64 groups.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes(qweight, rows, columns, half):
    packed = tl.load(qweight + rows[:, None] * half + columns[None, :]).to(tl.int32)
    return ((((packed & 15) ^ 8) - 8).to(tl.float32), (((packed >> 4) ^ 8) - 8).to(tl.float32))


@triton.jit
def _scales(wscales, rows, tile, k, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    groups = tile * (BLOCK_C // 32) + tl.arange(0, BLOCK_C // 32)
    scale = tl.load(wscales + rows[:, None] * (k // 64) + groups[None, :]).to(tl.float32)
    return tl.broadcast_to(scale[:, :, None], BLOCK_N, BLOCK_C // 32, 32).reshape(BLOCK_N, BLOCK_C)


@triton.jit
def dequantize(
    qweight, wscales, smooth_factor, proj_down, proj_up, weight, k, r, stride,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight (N, K), its rows `stride` apart, = q * s / smooth + up @ down, rounded once.

    BLOCK_R = 0 leaves up @ down out. r is not a constexpr, so that a LoRA in the branch needs no new compilation.
    Grid (N / BLOCK_N, K / 2 / BLOCK_C)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = columns // 32 * 64 + columns % 32
    low = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    high = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if BLOCK_R > 0:
        for start in range(0, r, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            up = tl.load(proj_up + rows[:, None] * r + ranks[None, :])
            down = proj_down + ranks[:, None] * k + channels[None, :]
            low = tl.dot(up, tl.load(down), low)
            high = tl.dot(up, tl.load(down + 32), high)
    q_low, q_high = _codes(qweight, rows, columns, k // 2)
    scale = _scales(wscales, rows, tl.program_id(1), k, BLOCK_N, BLOCK_C)
    low += q_low * scale * (1 / tl.load(smooth_factor + channels).to(tl.float32))[None, :]
    high += q_high * scale * (1 / tl.load(smooth_factor + channels + 32).to(tl.float32))[None, :]
    out = weight + rows[:, None] * stride + channels[None, :]
    tl.store(out, low.to(weight.dtype.element_ty))
    tl.store(out + 32, high.to(weight.dtype.element_ty))


@triton.jit
def requantize(
    qweight, wscales, channel_scale, weight, k, TO_CODE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """weight (N, K) fp8 or int8 = q * s / (channel_scale * TO_CODE). Grid (N / BLOCK_N, K / 2 / BLOCK_C)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    q_low, q_high = _codes(qweight, rows, columns, k // 2)
    scale = _scales(wscales, rows, tl.program_id(1), k, BLOCK_N, BLOCK_C)
    scale *= (1 / (tl.load(channel_scale + rows) * TO_CODE))[:, None]
    out = weight + rows[:, None] * k + (columns // 32 * 64 + columns % 32)[None, :]
    tl.store(out, _to_8bit(q_low * scale, weight.dtype.element_ty))
    tl.store(out + 32, _to_8bit(q_high * scale, weight.dtype.element_ty))


@triton.jit
def quantize_rows(
    x, smooth_factor, codes, row_scale, k, LIMIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """codes (M, K) fp8 or int8 and row_scale (M,) fp32 of x / smooth; LIMIT is the largest code. Grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < k
    values = smoothed(tl.load(x + row * k + columns, mask=inside, other=0.0), smooth_factor, columns, inside)
    factor = store_scale(row_scale + row, tl.max(tl.abs(values)), LIMIT)
    store_codes(codes + row * k + columns, values, factor, inside)


@triton.jit
def smoothed(x, smooth_factor, columns, inside):
    """x / smooth in fp32 for 16-bit x at some columns of a row."""
    smooth = tl.load(smooth_factor + columns, mask=inside, other=1.0)
    return x.to(tl.float32) / smooth.to(tl.float32)


@triton.jit
def store_scale(place, largest, LIMIT: tl.constexpr):
    """Store a row's scale, from its largest smoothed value, and return its reciprocal."""
    scale = tl.maximum(largest, 1e-12) / LIMIT
    tl.store(place, scale)
    return 1 / scale


@triton.jit
def store_codes(places, values, factor, inside):
    """Store the codes of smoothed values."""
    tl.store(places, _to_8bit(values * factor, places.dtype.element_ty), mask=inside)


@triton.jit
def rescale_add(
    products, row_scale, channel_scale, y, n, TO_CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (M, N) += products int32 * row_scale * channel_scale * TO_CODE. Grid (M, N / BLOCK rounded up)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    scale = tl.load(channel_scale + columns, mask=inside) * (tl.load(row_scale + row) * TO_CODE)
    product = tl.load(products + row * n + columns, mask=inside).to(tl.float32) * scale
    total = product + tl.load(y + row * n + columns, mask=inside).to(tl.float32)
    tl.store(y + row * n + columns, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _to_8bit(values, dtype: tl.constexpr):
    if dtype == tl.int8:
        return tl.floor(values + 0.5).to(tl.int8)
    else:
        return values.to(dtype)
