"""ggml's K-quants written by plain rounding, which the `gguf` package reads and cannot write.

Each of rows (n, K), K a multiple of 256, to bytes (n, K / 256 blocks of the type's size). llama.cpp searches for better
scales; the layout is that of its ggml-quants.c.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def quantize(weight: Tensor, kind: str) -> numpy.ndarray:
    """Rows as the bytes or numbers of a ggml type by name."""
    if kind in K_QUANTS:
        return K_QUANTS[kind](weight.float()).numpy()
    import gguf

    return gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind])


def _fp16(x: Tensor) -> Tensor:
    return x.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def _scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight 6-bit scales and minima -> 12 bytes, number by number as in ggml's `get_scale_min_k4`."""
    out = torch.zeros(len(scales), 12, dtype=torch.uint8)
    for j in range(4):
        out[:, j] = scales[:, j] | (scales[:, j + 4] >> 4) << 6
        out[:, j + 4] = minima[:, j] | (minima[:, j + 4] >> 4) << 6
        out[:, j + 8] = (scales[:, j + 4] & 15) | (minima[:, j + 4] & 15) << 4
    return out


def q4_q5_k(weight: Tensor, bits: int) -> Tensor:
    """Q4_K or Q5_K by rounding: of each 32 weights a minimum and a step, both in 6 bits of the block's largest."""
    blocks = weight.float().reshape(-1, 8, 32)
    minima = -blocks.amin(-1).clamp(max=0)
    steps = (blocks.amax(-1) + minima) / (2**bits - 1)
    d, dmin = (_fp16(x.amax(-1) / 63) for x in (steps, minima))
    d32, dmin32 = (x.view(torch.float16).float() for x in (d, dmin))
    scales, lows = ((x / y).round().clamp(0, 63).to(torch.uint8) for x, y in ((steps, d32), (minima, dmin32)))
    q = ((blocks + (dmin32 * lows).unsqueeze(-1)) / (d32 * scales).unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    q = q.to(torch.uint8)
    nibbles = torch.cat([q[:, j] & 15 | (q[:, j + 1] & 15) << 4 for j in range(0, 8, 2)], -1)
    fifth = [sum((q[:, j] >> 4) << j for j in range(8)).to(torch.uint8)] if bits == 5 else []
    return torch.cat([d, dmin, _scales(scales, lows), *fifth, nibbles], -1).view(len(weight), -1)


def q6_k(weight: Tensor) -> Tensor:
    """Q6_K by rounding: of each 16 weights a step, as int8 of the block's largest."""
    blocks = weight.float().reshape(-1, 16, 16)
    steps = blocks.abs().amax(-1) / 31
    d = _fp16(steps.amax(-1) / 127)
    d32 = d.view(torch.float16).float()
    scales = (steps / d32).round().clamp(1, 127)
    q = ((blocks / (d32 * scales).unsqueeze(-1)).round().clamp(-32, 31) + 32).to(torch.uint8).view(-1, 256)
    low, high = [], []
    for half in (0, 128):
        a, b, c, e = q[:, half : half + 128].split(32, -1)
        low += [a & 15 | (c & 15) << 4, b & 15 | (e & 15) << 4]
        high += [a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6]
    return torch.cat([*low, *high, scales.to(torch.int8).view(torch.uint8), d], -1).view(len(weight), -1)


def q2_k(weight: Tensor) -> Tensor:
    """Of each 16 weights a minimum and a step, both in 4 bits of the block's largest."""
    blocks = weight.reshape(-1, 16, 16)
    minima = -blocks.amin(-1).clamp(max=0)
    steps = (blocks.amax(-1) + minima) / 3
    d, dmin = (_fp16(x.amax(-1) / 15) for x in (steps, minima))
    d32, dmin32 = (x.view(torch.float16).float() for x in (d, dmin))
    scales, lows = ((x / y).round().clamp(0, 15).to(torch.uint8) for x, y in ((steps, d32), (minima, dmin32)))
    q = ((blocks + (dmin32 * lows).unsqueeze(-1)) / (d32 * scales).unsqueeze(-1)).nan_to_num().round().clamp(0, 3)
    return torch.cat([scales | lows << 4, _pairs(q), d, dmin], -1).view(len(weight), -1)


def q3_k(weight: Tensor) -> Tensor:
    """Of each 16 weights a step, in 6 bits around 32 of the block's largest; third bits apart."""
    blocks = weight.reshape(-1, 16, 16)
    steps = blocks.abs().amax(-1) / 4
    d = _fp16(steps.amax(-1) / 31)
    d32 = d.view(torch.float16).float()
    scales = (steps / d32).round().clamp(1, 31)
    q = (blocks / (d32 * scales).unsqueeze(-1)).round().clamp(-4, 3) + 4
    codes, parts = (scales + 32).to(torch.uint8), q.view(-1, 8, 32).to(torch.uint8)
    third = sum((parts[:, j] >> 2) << j for j in range(8))
    low = codes[:, :8] & 15 | (codes[:, 8:] & 15) << 4
    high = sum((codes[:, 4 * j : 4 * j + 4] >> 4) << 2 * j for j in range(4))
    return torch.cat([third, _pairs(q), low, high, d], -1).view(len(weight), -1)


def _pairs(q: Tensor) -> Tensor:
    """The two lower bits of 256 weights as 64 bytes: of each 128 weights byte i holds i, 32 + i, 64 + i and 96 + i."""
    halves = q.reshape(-1, 2, 4, 32).to(torch.uint8) & 3
    return sum(halves[:, :, j] << 2 * j for j in range(4)).flatten(1)


K_QUANTS = {
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": lambda weight: q4_q5_k(weight, 4),
    "Q5_K": lambda weight: q4_q5_k(weight, 5),
    "Q6_K": q6_k,
}
