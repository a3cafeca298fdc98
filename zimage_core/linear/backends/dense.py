"""Weights as files store them (FP8, INT8, NVFP4, MXFP8, ggml's blocks) -> dense ones, each in one launch of Triton.

Bit for bit what `formats.stored` computes in plain torch, which takes a dozen launches for every slice of a weight. The
products that something is added to are exact in fp32, so it does not matter whether a compiler fuses the two.

Forms have the names of `formats.stored.FORMS`, parts are as described there. FP8 and e2m1 are read as the upper bits of
fp16, which every GPU has and whose exponents are larger by a constant.

Legend: N out, K in, n some of the N rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from .triton_kernels import half, launch

ROWS = ("int8", "float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8")  # codes and scales in rows
BLOCKS = {  # bytes of a ggml block; of 32 weights where its name ends in a digit, else of 256
    "Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24,
    "Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210,
}  # fmt: skip
TILE = 2048  # weights that one program writes


def knows(form: str) -> bool:
    """Whether a form has a kernel here."""
    return form in ROWS or form in BLOCKS


def dequantize(form: str, parts: Mapping[str, Tensor], weight: Tensor) -> None:
    """Write the rows of a stored form into weight (n, K), bf16, fp16 or fp32, without gaps between its rows."""
    codes, (n, k) = parts["codes"], weight.shape
    if form in BLOCKS:
        groups, tile = n * k // 32, TILE // 32
        launch(_blocks, (-(-groups // tile),), codes, weight, groups, int(form[1]), form[3], BLOCKS[form], tile)
    else:
        scales = parts.get("scale"), parts.get("block_scale")
        launch(_rows, (n, -(-k // TILE)), codes, *scales, weight, k, form, TILE)


@triton.jit
def _rows(codes, scale, block_scale, weight, k, FORM: tl.constexpr, TILE: tl.constexpr):
    """Grid (n, K / TILE rounded up)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < k
    if FORM == "nvfp4":  # the earlier of two columns in the high nibble, a scale for 16
        byte = tl.load(codes + row * (k // 2) + columns // 2, mask=inside, other=0).to(tl.int32)
        code = byte >> (1 - columns % 2) * 4
        q = half((code & 8) << 12 | (code & 7) << 9) * 2.0**14
        s = _e4m3(tl.load(block_scale + row * (k // 16) + columns // 16, mask=inside, other=0))
        value = q * (s * tl.load(scale + row).to(tl.float32))
    else:
        code = tl.load(codes + row * k + columns, mask=inside, other=0)
        if FORM == "mxfp8":  # exponents, one for 32
            e = tl.load(block_scale + row * (k // 32) + columns // 32, mask=inside, other=0).to(tl.int32)
            value = _e4m3(code) * tl.where(e == 0, 1 << 22, e << 23).to(tl.float32, bitcast=True)
        else:
            if FORM == "float8_e4m3fn":
                q = _e4m3(code)
            elif FORM == "float8_e5m2":
                q = half(code.to(tl.int32) << 8)
            else:
                q = code.to(tl.float32)
            value = q * tl.load(scale + row).to(tl.float32)
    tl.store(weight + row * k + columns, value.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _blocks(
    codes, weight, groups, BITS: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """TILE of a weight's groups of 32 weights, which lie in its blocks of SIZE bytes one after the other.

    Grid (groups / TILE rounded up,); the last program's surplus writes the last group again.
    """
    group = tl.minimum(tl.program_id(0) * TILE + tl.arange(0, TILE), groups - 1).to(tl.int64)[:, None]
    i = tl.arange(0, 32)[None, :]
    if KIND != "K":
        value = _small_block(codes + group * SIZE, i, BITS, KIND == "1")
    else:
        block, part = codes + group // 8 * SIZE, (group % 8).to(tl.int32)
        if BITS == 2 or BITS == 3 or BITS == 6:
            value = _pairs_block(block, part, i, BITS)
        else:
            value = _nibbles_block(block, part, i, BITS)
    tl.store(weight + group * 32 + i, value.to(weight.dtype.element_ty))


@triton.jit
def _small_block(block, i, BITS: tl.constexpr, MINIMUM: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: weights i of blocks of 32."""
    d, codes = half(_pair(block)), block + 2
    if MINIMUM:
        codes += 2
    if BITS == 8:
        return d * tl.load(codes + i).to(tl.int8, bitcast=True).to(tl.float32)
    if BITS == 5:
        fifth = _byte(codes + i // 8) >> i % 8 & 1
        codes += 4
    q = _byte(codes + i % 16) >> i // 16 * 4 & 15
    if BITS == 5:
        q |= fifth << 4
    if MINIMUM:
        return d * q.to(tl.float32) + half(_pair(block + 2))
    return d * (q - (1 << BITS - 1)).to(tl.float32)


@triton.jit
def _nibbles_block(block, part, i, BITS: tl.constexpr):
    """Q4_K, Q5_K: weights i of the 32 of a part (0 to 7) of blocks of 256."""
    low, mid, high = _byte(block + 4 + part % 4), _byte(block + 8 + part % 4), _byte(block + 12 + part % 4)
    step = tl.where(part < 4, low & 63, high & 15 | low >> 2 & 48)
    least = tl.where(part < 4, mid & 63, high >> 4 | mid >> 2 & 48)
    q = _byte(block + (16 if BITS == 4 else 48) + part // 2 * 32 + i) >> part % 2 * 4 & 15
    if BITS == 5:
        q |= (_byte(block + 16 + i) >> part & 1) << 4
    d, dmin = half(_pair(block)), half(_pair(block + 2))
    return d * step.to(tl.float32) * q.to(tl.float32) - dmin * least.to(tl.float32)


@triton.jit
def _pairs_block(block, part, i, BITS: tl.constexpr):
    """Q2_K, Q3_K, Q6_K: likewise; of a weight two bits are in a byte of four, and 16 share a scale."""
    upper, shift, scale = part // 4, part % 4 * 2, part * 2 + i // 16
    if BITS == 2:
        s = _byte(block + scale)
        q = _byte(block + 16 + upper * 32 + i) >> shift & 3
        step, least = (
            half(_pair(block + 80)) * (s & 15).to(tl.float32),
            half(_pair(block + 82)) * (s >> 4).to(tl.float32),
        )
        return step * q.to(tl.float32) - least
    if BITS == 3:
        low = _byte(block + 96 + scale % 8) >> scale // 8 * 4 & 15
        high = _byte(block + 104 + scale % 4) >> scale // 4 * 2 & 3
        third = _byte(block + i) >> part & 1
        q = (_byte(block + 32 + upper * 32 + i) >> shift & 3) - 4 + 4 * third
        return half(_pair(block + 108)) * ((low | high << 4) - 32).to(tl.float32) * q.to(tl.float32)
    s = tl.load(block + 192 + scale).to(tl.int8, bitcast=True).to(tl.float32)
    low = _byte(block + upper * 64 + part % 2 * 32 + i) >> part % 4 // 2 * 4 & 15
    high = _byte(block + 128 + upper * 32 + i) >> shift & 3
    return half(_pair(block + 208)) * s * ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def _byte(place):
    return tl.load(place).to(tl.int32)


@triton.jit
def _pair(place):
    """Two bytes, which need not be aligned, as the bits of a number."""
    return _byte(place) | _byte(place + 1) << 8


@triton.jit
def _e4m3(byte):
    byte = byte.to(tl.int32)
    value = half((byte & 128) << 8 | (byte & 127) << 7) * 2.0**8
    return tl.where((byte & 127) == 127, float("nan"), value)
