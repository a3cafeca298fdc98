"""The Triton kernels of the `triton` backend. Needs triton to import; `TRITON_INTERPRET=1` runs them on the CPU.

Codes are read in the compact form: byte c of a row holds the code of channel k = c // 32 * 64 + c % 32 in its low
nibble and that of k + 32 in its high one, so a tile of bytes makes two tiles of channels, each a whole operand of
`tl.dot`. No kernel masks rows of a weight or bytes of a row: the format makes both multiples of the tiles.

FP4 weights are those with an outer scale of the rows: their codes are e2m1, and wscales the bytes of e4m3, one for 16
channels. Both are read as the upper bits of fp16, which every GPU has and whose exponents are larger by FP4_OFFSET.

Legend: M rows, N out, K in, R rank, G = K / 64 groups (K / 16 of FP4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import guard

OPTIONS = ("num_warps", "num_stages")
DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)  # a compiled kernel takes all arguments by place
_compiled: dict[tuple, tuple[Callable[..., None], Callable[[int], int], tuple, tuple]] = {}

FP4_OFFSET = tl.constexpr(2.0 ** (14 + 8))  # of e2m1, whose exponents are offset by 1 and not 15, and of e4m3's 7


def launch(kernel: triton.runtime.JITFunction, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run a kernel, whose tensors, or None for one, come first, on the device of the first.

    On the meta device, which counts memory, there is nothing to run.

    Triton's own launch specializes and looks its arguments up anew each time, which takes the host three times as long,
    and asks the driver about every tensor, which cannot say where one lies that cudaMallocAsync allocated while a CUDA
    graph was captured. What it compiled is kept here by everything that it may depend on, and takes plain addresses."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    if first.is_meta:
        return
    device = first.get_device()
    key: list[object] = [id(kernel), device, *options.values()]
    given: list[int | None] = []
    places = 0
    for argument in arguments:
        if argument is None:
            key.append(None)
            given.append(None)
        elif isinstance(argument, Tensor):
            key.append(argument.dtype)
            place = argument.data_ptr()
            places |= place
            given.append(place)
        else:
            break
    numbers = arguments[len(given) :]
    key.append(numbers)
    if places % 16:  # Triton asks each tensor
        key += [place and place % 16 for place in given]
    known = _compiled.get(tuple(key))
    if known is not None and (not _several() or device == torch.cuda.current_device()):
        run, stream, fixed, constants = known
        run(*grid, *(1,) * (3 - len(grid)), stream(device), *fixed, *given, *numbers, *constants)
        return
    with guard(first.device):
        compiled = kernel[grid](*arguments, **options)
    if DIRECT and isinstance(compiled, triton.compiler.CompiledKernel):
        constants = tuple(value for name, value in options.items() if name not in OPTIONS)
        fixed = compiled.function, compiled.packed_metadata, None, None, None  # without hooks of launches
        _compiled[tuple(key)] = compiled.run, triton.runtime.driver.active.get_current_stream, fixed, constants


@cache
def _several() -> bool:
    """Whether there are several GPUs, so that another than a tensor's may be the current one."""
    return torch.cuda.device_count() > 1


@triton.jit
def _residual(
    nibbles, wscales, outer_scale, rows, tile, k,
    HIGH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q and s in fp32 of the low or high nibbles of a tile of bytes."""
    if outer_scale is None:
        groups = tile * (BLOCK_C // 32) + tl.arange(0, BLOCK_C // 32)
        scale = tl.load(wscales + rows[:, None] * (k // 64) + groups[None, :]).to(tl.float32)
        s = tl.broadcast_to(scale[:, :, None], BLOCK_N, BLOCK_C // 32, 32).reshape(BLOCK_N, BLOCK_C)
        q = ((nibbles ^ 8) - 8).to(tl.float32)
    else:
        halves = tile * (BLOCK_C // 16) + tl.arange(0, BLOCK_C // 16)  # of 32 bytes
        groups = halves // 2 * 4 + halves % 2 + 2 * HIGH
        byte = tl.load(wscales + rows[:, None] * (k // 16) + groups[None, :]).to(tl.int32)
        outer = tl.load(outer_scale + rows).to(tl.float32) * FP4_OFFSET
        scale = half((byte & 128) << 8 | (byte & 127) << 7) * outer[:, None]
        s = tl.broadcast_to(scale[:, :, None], BLOCK_N, BLOCK_C // 16, 16).reshape(BLOCK_N, BLOCK_C)
        q = half((nibbles & 8) << 12 | (nibbles & 7) << 9)
    return q, s


@triton.jit
def half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dequantize(
    qweight, wscales, outer_scale, smooth_factor, proj_down, proj_up, weight, k, r, stride,
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
    packed = tl.load(qweight + rows[:, None] * (k // 2) + columns[None, :]).to(tl.int32)
    q, s = _residual(packed & 15, wscales, outer_scale, rows, tl.program_id(1), k, 0, BLOCK_N, BLOCK_C)
    low += q * s * (1 / tl.load(smooth_factor + channels).to(tl.float32))[None, :]
    q, s = _residual(packed >> 4, wscales, outer_scale, rows, tl.program_id(1), k, 1, BLOCK_N, BLOCK_C)
    high += q * s * (1 / tl.load(smooth_factor + channels + 32).to(tl.float32))[None, :]
    out = weight + rows[:, None] * stride + channels[None, :]
    tl.store(out, low.to(weight.dtype.element_ty))
    tl.store(out + 32, high.to(weight.dtype.element_ty))


@triton.jit
def requantize(
    qweight, wscales, outer_scale, channel_scale, weight, proj_up, rank_scale, k, stride, r, part,
    TO_CODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight (N, K) fp8 or int8, its rows `stride` apart, = q * s / (channel_scale * TO_CODE).

    With proj_up (N, R) in fp8 also the columns of `_store_branch` behind K.
    Grid (N / BLOCK_N, K / 2 / BLOCK_C), with proj_up one more of the latter."""
    rows, tile = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    scale = tl.load(channel_scale + rows)
    if tile * BLOCK_C * 2 < k:
        columns = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        packed = tl.load(qweight + rows[:, None] * (k // 2) + columns[None, :]).to(tl.int32)
        to_code = (1 / (scale * TO_CODE))[:, None]
        out = weight + rows[:, None] * stride + (columns // 32 * 64 + columns % 32)[None, :]
        q, s = _residual(packed & 15, wscales, outer_scale, rows, tile, k, 0, BLOCK_N, BLOCK_C)
        low = _to_8bit(q * (s * to_code), weight.dtype.element_ty)
        q, s = _residual(packed >> 4, wscales, outer_scale, rows, tile, k, 1, BLOCK_N, BLOCK_C)
        tl.store(out, low)
        tl.store(out + 32, _to_8bit(q * (s * to_code), weight.dtype.element_ty))
    elif proj_up is not None:
        for start in range(0, part, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)[None, :]
            up = tl.load(proj_up + rows[:, None] * r + ranks, mask=ranks < r, other=0.0).to(tl.float32)
            value = up / scale[:, None] * tl.load(rank_scale + ranks, mask=ranks < r, other=1.0)
            _store_branch(value, weight + rows[:, None] * stride + k + ranks, part, ranks < part, True)


@triton.jit
def code_branch(
    values, rank_scale, row_scale, codes, k, r, part, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The columns of `_store_branch` behind K of fp8 codes (M, K + 3 part) for values (M, R), x @ down.T. Grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    inside = ranks < r
    x = tl.load(values + row * r + ranks, mask=inside, other=0.0).to(tl.float32) / tl.load(row_scale + row)
    x /= tl.load(rank_scale + ranks, mask=inside, other=1.0)
    _store_branch(x, codes + row * (k + 3 * part) + k + ranks, part, ranks < part, False)


@triton.jit
def code_down(
    x, down, rank_scale, row_scale, codes, m, k, r, part,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`code_branch` with x (M, K) @ down.T in it, rounded once. Grid (M / BLOCK_M, part / BLOCK_R), rounded up."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row, rank, inner = rows % m, ranks % r, tl.arange(0, BLOCK_K)
    left = x + row[:, None].to(tl.int64) * k + inner[None, :]
    right = down + rank[None, :] * k + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for _ in range(0, k, BLOCK_K):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += BLOCK_K
        right += BLOCK_K
    total = total / tl.load(row_scale + row)[:, None] / tl.load(rank_scale + rank)[None, :]
    places = codes + rows[:, None].to(tl.int64) * (k + 3 * part) + k + ranks[None, :]
    inside = (rows < m)[:, None] & (ranks < part)[None, :]
    _store_branch(tl.where((ranks < r)[None, :], total, 0.0), places, part, inside, False)


@triton.jit
def _store_branch(values, places, part, inside, UP: tl.constexpr):
    """Store fp32 values of the low-rank branch as fp8 hi + lo in three parts, of R columns and zeros each.

    x @ down.T gets hi, lo, hi, and up gets hi, hi, lo: together all of the product but lo * lo."""
    rounded = _to_e4m3(values)
    high, low = rounded.to(places.dtype.element_ty), (values - rounded).to(places.dtype.element_ty)
    tl.store(places, high, mask=inside)
    tl.store(places + part, high if UP else low, mask=inside)
    tl.store(places + 2 * part, low if UP else high, mask=inside)


@triton.jit
def _to_e4m3(x):
    """fp32 rounded to the nearest e4m3, in fp32: ptxas of CUDA 12.8 converts another register than the e4m3 back."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 bits of the mantissa stay, ties to even
    subnormal = (x + 24576.0) - 24576.0  # whose last bit is 2**-9
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal.to(tl.float32, bitcast=True))


@triton.jit
def quantize_rows(
    x, smooth_factor, codes, row_scale, k, code_stride, LIMIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """codes (M, K) fp8 or int8, rows code_stride apart, and row_scale (M,) fp32 of x / smooth; LIMIT: the largest code.

    Grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < k
    values = smoothed(tl.load(x + row * k + columns, mask=inside, other=0.0), smooth_factor, columns, inside)
    factor = store_scale(row_scale + row, tl.max(tl.abs(values)), LIMIT)
    store_codes(codes + row * code_stride + columns, values, factor, inside)


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
