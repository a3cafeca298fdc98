"""The Triton kernels of the `triton` backend. Needs triton to import; `TRITON_INTERPRET=1` runs them on the CPU.

Codes are read in the compact form: byte c of a row holds the code of channel k = c // 32 * 64 + c % 32 in its low
nibble and that of k + 32 in its high one; a kernel reads each byte twice, at once, for either channel. No kernel masks
rows or channels of a compact weight: the format makes both multiples of the tiles.

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
def _codes(qweight, wscales, outer_scale, rows, tile, k, BLOCK_K: tl.constexpr):
    """Of some rows and a tile of channels: words of eight codes each, and scales in fp32, one for a group."""
    places = tile * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    words = tl.load(qweight.to(tl.pointer_type(tl.int32)) + rows[:, None] * (k // 8) + places[None, :])
    if outer_scale is None:
        groups = tile * (BLOCK_K // 64) + tl.arange(0, BLOCK_K // 64)
        scale = tl.load(wscales + rows[:, None] * (k // 64) + groups[None, :]).to(tl.float32)
    else:
        groups = tile * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
        byte = tl.load(wscales + rows[:, None] * (k // 16) + groups[None, :]).to(tl.int32)
        outer = tl.load(outer_scale + rows).to(tl.float32) * FP4_OFFSET
        scale = half((byte & 128) << 8 | (byte & 127) << 7) * outer[:, None]
    return words, scale


@triton.jit
def _residual(words, scale):
    """q and s in fp32 (rows, channels) of what `_codes` returns."""
    rows: tl.constexpr = words.shape[0]
    channels: tl.constexpr = words.shape[1] * 8
    groups: tl.constexpr = scale.shape[1]
    shift = 28 - tl.arange(0, 2)[:, None, None] * 4 - tl.arange(0, 4)[None, None, :] * 8  # a nibble, a word, a byte
    top = words.reshape(rows, channels // 64, 1, 8, 1) << shift[None, None, :, :, :]
    q = (top >> 28).to(tl.float32) if channels // groups == 64 else half(top >> 16 & 0x8000 | top >> 19 & 0xE00)
    s = tl.broadcast_to(scale[:, :, None], rows, groups, channels // groups)
    return q.reshape(rows, channels), s.reshape(rows, channels)


@triton.jit
def half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dequantize(
    qweight, wscales, outer_scale, smooth_factor, proj_down, proj_up, weight, k, r, stride,
    PRODUCT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight (N, K), its rows `stride` apart, = q * s / smooth, and with PRODUCT + up @ down, rounded once.

    r is not a constexpr, so that a LoRA in the branch needs no new compilation.
    Grid (K / BLOCK_K, N / BLOCK_N); with one more of the first, up is copied behind K."""
    tile, rows = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile * BLOCK_K < k:
        channels = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        words, scale = _codes(qweight, wscales, outer_scale, rows, tile, k, BLOCK_K)
        smooth = tl.load(smooth_factor + channels).to(tl.float32)
        q, s = _residual(words, scale)
        # A reduction, so that no thread takes others' reciprocals again:
        total = q * s * tl.max((1 / smooth)[None, :], 0)[None, :]
        if PRODUCT:
            for start in range(0, r, BLOCK_R):
                ranks = start + tl.arange(0, BLOCK_R)
                up = tl.load(proj_up + rows[:, None] * r + ranks[None, :])
                total = tl.dot(up, tl.load(proj_down + ranks[:, None] * k + channels[None, :]), total)
        tl.store(weight + rows[:, None] * stride + channels[None, :], total.to(weight.dtype.element_ty))
    elif not PRODUCT:
        for start in range(0, r, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)[None, :]
            up = tl.load(proj_up + rows[:, None] * r + ranks, mask=ranks < r)
            tl.store(weight + rows[:, None] * stride + k + ranks, up, mask=ranks < r)


@triton.jit
def requantize(
    qweight, wscales, outer_scale, channel_scale, weight, proj_up, rank_scale, k, stride, r, part,
    TO_CODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight (N, K) fp8 or int8, its rows `stride` apart, = q * s / (channel_scale * TO_CODE).

    With proj_up (N, R) in fp8 also the columns of `_store_branch` behind K.
    Grid (K / BLOCK_K, with proj_up one more, N / BLOCK_N)."""
    tile, rows = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(channel_scale + rows)
    if tile * BLOCK_K < k:
        channels = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        q, s = _residual(*_codes(qweight, wscales, outer_scale, rows, tile, k, BLOCK_K))
        coded = _to_8bit(q * (s * (1 / (scale * TO_CODE))[:, None]), weight.dtype.element_ty)
        tl.store(weight + rows[:, None] * stride + channels[None, :], coded)
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
def multiply_int8(
    codes, row_scale, weight, channel_scale, rank, up, bias, y, m, n, k, r, TO_CODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y (M, N) = codes (M, K) @ weight (N, K).T * row_scale * channel_scale * TO_CODE + rank @ up.T + bias.

    rank (M, R) and up (N, R) of 16 bits unless BLOCK_R is 0, bias (N,) or None. BLOCK_K divides K, BLOCK_R R.
    Grid (M / BLOCK_M * N / BLOCK_N, both rounded up): columns of GROUP tiles, which share what L2 holds."""
    tiles_m, wide = tl.cdiv(m, BLOCK_M), GROUP * tl.cdiv(n, BLOCK_N)
    tile, first = tl.program_id(0) % wide, tl.program_id(0) // wide * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    rows = (first + tile % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile // height * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = (rows % m).to(tl.int64), (columns % n).to(tl.int64)  # beyond the edges others again, not stored
    a = codes + row[:, None] * k + tl.arange(0, BLOCK_K)[None, :]
    b = weight + column[None, :] * k + tl.arange(0, BLOCK_K)[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, k, BLOCK_K):
        products = tl.dot(tl.load(a), tl.load(b), products, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K
    scale = tl.load(row_scale + row)[:, None] * (tl.load(channel_scale + column) * TO_CODE)[None, :]
    total = products.to(tl.float32) * scale
    if BLOCK_R > 0:
        a = rank + row[:, None] * r + tl.arange(0, BLOCK_R)[None, :]
        b = up + column[None, :] * r + tl.arange(0, BLOCK_R)[:, None]
        for _ in range(0, r, BLOCK_R):
            total = tl.dot(tl.load(a), tl.load(b), total)
            a += BLOCK_R
            b += BLOCK_R
    if bias is not None:
        total += tl.load(bias + column)[None, :].to(tl.float32)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(y + rows[:, None].to(tl.int64) * n + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


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
