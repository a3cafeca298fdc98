"""ggml's blocks of quantized weights: rows of bytes -> rows of fp32.

Source: ggml-quants.c of ggml-org/llama.cpp by way of gguf 0.19 (quants.py).
Legend: n rows, S blocks of a row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def _halves(blocks: Tensor) -> Tensor:
    """The fp16 numbers in bytes (n, S, 2 j) -> fp32 (n, S, j)."""
    return blocks.contiguous().view(torch.float16).float()


def q8_0(codes: Tensor) -> Tensor:
    """Blocks of 32: fp16 scale, 32 int8."""
    blocks = codes.unflatten(1, (-1, 34))
    return (blocks[..., 2:].contiguous().view(torch.int8).float() * _halves(blocks[..., :2])).flatten(1)


def _legacy(codes: Tensor, minimum: bool, fifth: bool) -> Tensor:
    """Blocks of 32: fp16 scale, fp16 minimum if any, 4 bytes of fifth bits if any, 16 bytes of nibbles, low ones first.

    Without a minimum the numbers lie around 8 or, with fifth bits, 16.
    """
    start = 4 if minimum else 2
    blocks = codes.unflatten(1, (-1, start + 4 * fifth + 16))
    nibbles = blocks[..., -16:]
    q = torch.cat((nibbles & 15, nibbles >> 4), -1)
    if fifth:
        shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
        q = q | ((blocks[..., start : start + 4, None] >> shifts) & 1).flatten(-2) << 4
    if not minimum:
        return (_halves(blocks[..., :2]) * (q.float() - (16 if fifth else 8))).flatten(1)
    d, m = _halves(blocks[..., :4]).split(1, -1)
    return (d * q.float() + m).flatten(1)


q4_0 = functools.partial(_legacy, minimum=False, fifth=False)
q4_1 = functools.partial(_legacy, minimum=True, fifth=False)
q5_0 = functools.partial(_legacy, minimum=False, fifth=True)
q5_1 = functools.partial(_legacy, minimum=True, fifth=True)


def q2_k(codes: Tensor) -> Tensor:
    """Blocks of 256: 16 bytes of 4-bit scales and minima, 64 bytes of pairs of bits, fp16 scales of both."""
    scales, pairs, d, dmin = codes.unflatten(1, (-1, 84)).split((16, 64, 2, 2), -1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    q = (pairs.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-3).unflatten(-1, (16, 16)).float()
    step, low = _halves(d) * (scales & 15).float(), _halves(dmin) * (scales >> 4).float()
    return (step.unsqueeze(-1) * q - low.unsqueeze(-1)).flatten(1)


def q3_k(codes: Tensor) -> Tensor:
    """Blocks of 256: 32 bytes of third bits (clear: less 4), 64 of pairs of bits, 12 of 6-bit scales, fp16 scale."""
    third, pairs, packed, d = codes.unflatten(1, (-1, 110)).split((32, 64, 12, 2), -1)
    low = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), -1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    high = (packed[..., 8:].unsqueeze(-2) >> shifts & 3).flatten(-2)
    scales = _halves(d) * ((low | high << 4).float() - 32)
    bits = torch.arange(8, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    clear = ((third.unsqueeze(-2) >> bits & 1) ^ 1).flatten(-2)  # (n, S, 256)
    q = (pairs.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-3).float() - 4 * clear.float()
    return (scales.unsqueeze(-1) * q.unflatten(-1, (16, 16))).flatten(1)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K: 12 bytes (n, S, 12) -> two of fp32 (n, S, 8, 1)."""
    low, mid, high = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((low & 63, (high & 15) | (low >> 2 & 48)), -1)
    minima = torch.cat((mid & 63, (high >> 4) | (mid >> 2 & 48)), -1)
    return scales.float().unsqueeze(-1), minima.float().unsqueeze(-1)


def _nibbles(packed: Tensor, width: int) -> Tensor:
    """Bytes (n, S, j) -> 4-bit numbers (n, S, 2 j / width, width): of every `width` bytes, low nibbles come first."""
    runs = packed.unflatten(-1, (-1, width))
    return torch.stack((runs & 15, runs >> 4), -2).flatten(2, 3)


def q4_k(codes: Tensor) -> Tensor:
    """Blocks of 256: fp16 scale of scales, of minima, 12 bytes of both, 128 bytes of nibbles."""
    blocks = codes.unflatten(1, (-1, 144))
    d, dmin = _halves(blocks[..., :4]).unsqueeze(-1).split(1, -2)  # (n, S, 1, 1)
    scales, minima = _k_scales(blocks[..., 4:16])
    return (d * scales * _nibbles(blocks[..., 16:], 32).float() - dmin * minima).flatten(1)


def q5_k(codes: Tensor) -> Tensor:
    """Q4_K with 32 bytes of fifth bits before the nibbles."""
    blocks = codes.unflatten(1, (-1, 176))
    d, dmin = _halves(blocks[..., :4]).unsqueeze(-1).split(1, -2)
    scales, minima = _k_scales(blocks[..., 4:16])
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    fifth = (blocks[..., 16:48].unsqueeze(-2) >> shifts) & 1  # (n, S, 8, 32)
    q = _nibbles(blocks[..., 48:], 32) | fifth << 4
    return (d * scales * q.float() - dmin * minima).flatten(1)


def q6_k(codes: Tensor) -> Tensor:
    """Blocks of 256: 128 bytes of low nibbles, 64 of upper bit pairs, 16 int8 scales, fp16 scale of scales."""
    blocks = codes.unflatten(1, (-1, 210))
    low, pairs, scales, d = blocks.split((128, 64, 16, 2), -1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    high = (pairs.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(2)  # (n, S, 256)
    q = (_nibbles(low, 64).flatten(2) | high << 4).float() - 32
    scales = _halves(d) * scales.contiguous().view(torch.int8).float()  # (n, S, 16)
    return (scales.unsqueeze(-1) * q.unflatten(-1, (16, 16))).flatten(1)
