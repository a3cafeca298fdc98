"""Packing and unpacking of nunchaku's INT4 tensors, and the compact form of the codes that is kept in memory.

A file stores all six tensors of an SVDQuant linear permuted for the fragments of nunchaku's `mma.m16n8k64`. Each
permutation is a reshape and a permute: exact, without index tables, on any device.

Legend: N out, K in, R rank, G = K / 64 groups; N % 128 = K % 128 = R % 16 = 0.
Source: deepcompressor/backend/nunchaku/utils.py@69f3473 and nunchaku/src/kernels/zgemm/gemm_w4a4.cuh@92e4695.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

GROUP = 64  # input channels that share one scale


def pack_qweight(codes: torch.Tensor) -> torch.Tensor:
    """Codes (N, K) int8 in -8..7 -> stored (N, K/2) int8. ValueError if N or K is not a multiple of 128."""
    n, k = codes.shape
    _require_tiles("codes", codes, n % 128 or k % 128, "N and K multiples of 128")
    tiles = codes.reshape(n // 128, 8, 2, 8, k // GROUP, 2, 4, 4, 2).permute(0, 4, 1, 3, 6, 2, 5, 7, 8)
    return pack_pairs(tiles).reshape(n, k // 2)


def compact_qweight(qweight: torch.Tensor) -> torch.Tensor:
    """Stored (N, K/2) int8 -> compact (N, K/2) uint8. ValueError if N or K is not a multiple of 128."""
    low, high = _fragments(qweight).view(torch.uint8).unbind(6)  # channels 0..31 and 32..63 of each group
    pairs = torch.stack([(low & 15) | (high << 4), (low >> 4) | (high & 240)], -1)
    return pairs.permute(0, 2, 5, 3, 1, 4, 6, 7).reshape(qweight.shape)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes (N, K) int8 -> compact (N, K/2) uint8: byte j of a group holds codes j (low half) and j + 32."""
    n, k = codes.shape
    low, high = codes.reshape(n, k // GROUP, 2, GROUP // 2).view(torch.uint8).unbind(2)
    return ((low & 15) | (high << 4)).view(n, k // 2)


def unpack_nibbles(compact: torch.Tensor) -> torch.Tensor:
    """Compact (N, K/2) uint8 -> codes (N, K) int8 in -8..7."""
    n, half = compact.shape
    groups = compact.view(torch.int8).view(n, half // 32, 32)
    return torch.stack([(groups << 4) >> 4, groups >> 4], 2).view(n, 2 * half)


def unpack_wscales(wscales: torch.Tensor) -> torch.Tensor:
    """Stored (G, N) -> (N, G). ValueError if N is not a multiple of 128."""
    g, n = wscales.shape
    _require_tiles("wscales", wscales, n % 128, "(K/64, N) with N a multiple of 128")
    return wscales.reshape(n // 128, g, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, g)


def pack_wscales(wscales: torch.Tensor) -> torch.Tensor:
    """(N, G) -> stored (G, N). ValueError if N is not a multiple of 128."""
    n, g = wscales.shape
    _require_tiles("wscales", wscales, n % 128, "(N, K/64) with N a multiple of 128")
    return wscales.reshape(n // 128, 8, 2, 4, 2, g).permute(0, 5, 1, 3, 2, 4).reshape(g, n)


def unpack_vector(vector: torch.Tensor) -> torch.Tensor:
    """Stored smoothing vector or bias (C,) -> (C,). ValueError if C is not a multiple of 128."""
    return unpack_wscales(vector[None]).view(-1)


def pack_vector(vector: torch.Tensor) -> torch.Tensor:
    """Smoothing vector or bias (C,) -> stored (C,). ValueError if C is not a multiple of 128."""
    return pack_wscales(vector[:, None]).view(-1)


def unpack_proj_down(proj_down: torch.Tensor) -> torch.Tensor:
    """Stored (K, R) -> (R, K). ValueError if K or R is not a multiple of 16."""
    k, r = proj_down.shape
    _require_tiles("proj_down", proj_down, k % 16 or r % 16, "(K, R), both multiples of 16")
    return proj_down.reshape(k // 16, r // 16, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6).reshape(r, k)


def pack_proj_down(proj_down: torch.Tensor) -> torch.Tensor:
    """(R, K) -> stored (K, R). ValueError if K or R is not a multiple of 16."""
    r, k = proj_down.shape
    _require_tiles("proj_down", proj_down, k % 16 or r % 16, "(R, K), both multiples of 16")
    return proj_down.reshape(r // 16, 2, 8, k // 16, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6).reshape(k, r)


def unpack_proj_up(proj_up: torch.Tensor) -> torch.Tensor:
    """Stored (N, R) -> (N, R). ValueError if N or R is not a multiple of 16."""
    n, r = proj_up.shape
    _require_tiles("proj_up", proj_up, n % 16 or r % 16, "(N, R), both multiples of 16")
    return proj_up.reshape(n // 16, r // 16, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6).reshape(n, r)


def pack_proj_up(proj_up: torch.Tensor) -> torch.Tensor:
    """(N, R) -> stored (N, R). ValueError if N or R is not a multiple of 16."""
    n, r = proj_up.shape
    _require_tiles("proj_up", proj_up, n % 16 or r % 16, "(N, R), both multiples of 16")
    return proj_up.reshape(n // 16, 2, 8, r // 16, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6).reshape(n, r)


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """(..., C, 2) int8 in -8..7 -> (..., C) bytes as int8, the first of a pair in the low nibble."""
    return (codes[..., 0] & 15) | (codes[..., 1] << 4)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """(..., C) bytes -> (..., C, 2) int8 in -8..7, the low nibble first."""
    packed = packed.view(torch.int8)
    return torch.stack([(packed << 4) >> 4, packed >> 4], -1)


def pack_linear(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plain tensors of one linear by name -> as stored. ValueError as in the functions above."""
    return {name: _CODECS[name][0](tensor) for name, tensor in tensors.items()}


def unpack_linear(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors of one linear by name -> plain, codes compact. ValueError as in the functions above."""
    return {name: _CODECS[name][1](tensor) for name, tensor in tensors.items()}


def _fragments(qweight: torch.Tensor) -> torch.Tensor:
    """View stored (N, K/2) bytes as (N/128, G, 8 n/16, 8 n%8, 4 k/8, 2 n/8, 2 k/32, 4 bytes of k%8)."""
    n, half = qweight.shape
    _require_tiles("qweight", qweight, n % 128 or half % 64, "(N, K/2) with N and K multiples of 128")
    return qweight.reshape(n // 128, half // 32, 8, 8, 4, 2, 2, 4)


def _require_tiles(name: str, tensor: torch.Tensor, remainder: int, expected: str) -> None:
    if remainder:
        raise ValueError(f"{name}: expected {expected}, found {tuple(tensor.shape)}; no nunchaku linear")


_CODECS = {
    "qweight": (lambda compact: pack_qweight(unpack_nibbles(compact)), compact_qweight),
    "wscales": (pack_wscales, unpack_wscales),
    "smooth_factor": (pack_vector, unpack_vector),
    "proj_down": (pack_proj_down, unpack_proj_down),
    "proj_up": (pack_proj_up, unpack_proj_up),
    "bias": (pack_vector, unpack_vector),
}
