"""Packing and unpacking of nunchaku's INT4 and FP4 tensors, and the compact form of the codes that is kept in memory.

A file stores all six tensors of an SVDQuant linear permuted for the fragments of nunchaku's `mma.m16n8k64`. Each
permutation is a reshape and a permute: exact, without index tables, on any device.

FP4 files differ in their scales alone: e4m3 of 16 channels in another order, times `wtscale` or `wcscales`.

Legend: N out, K in, R rank, G = K / 64 groups; N % 128 = K % 128 = R % 16 = 0.
Source: deepcompressor/backend/nunchaku/utils.py@69f3473 and nunchaku/src/kernels/zgemm/gemm_w4a4.cuh@92e4695.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

GROUP = 64  # input channels that share one scale
MICRO_GROUP = 16  # of FP4


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


def unpack_micro_scales(wscales: torch.Tensor) -> torch.Tensor:
    """Stored e4m3 scales of FP4 (K/16, N) -> (N, K/16), their bytes. ValueError if N % 128 or K % 64 is not 0."""
    g, n = wscales.shape
    _require_tiles("wscales", wscales, n % 128 or g % 4, "(K/16, N) with N a multiple of 128 and K of 64")
    tiles = wscales.view(torch.uint8).reshape(n // 128, g // 4, 8, 4, 4, 4)  # n/128, g/4, n%8, n/8%4, n/32%4, g%4
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(n, g)


def pack_micro_scales(scales: torch.Tensor) -> torch.Tensor:
    """Bytes (N, K/16) -> stored e4m3 (K/16, N). ValueError if N % 128 or K % 64 is not 0."""
    n, g = scales.shape
    _require_tiles("wscales", scales, n % 128 or g % 4, "(N, K/16) with N a multiple of 128 and K of 64")
    tiles = scales.reshape(n // 128, 4, 4, 8, g // 4, 4).permute(0, 4, 3, 2, 1, 5)
    return tiles.reshape(g, n).view(torch.float8_e4m3fn)


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


def e2m1(device: torch.device) -> torch.Tensor:
    """The values (16,) of 4-bit floats by their codes: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same negated.

    Computed on the device, because a CUDA graph cannot capture a copy from the host.
    """
    code = torch.arange(8, device=device)
    magnitudes = torch.where(code < 2, code / 2, (2 + code % 2) * torch.exp2(code // 2 - 2.0))
    return torch.cat((magnitudes, -magnitudes))


def pack_linear(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plain tensors of one linear by name -> as stored. ValueError as in the functions above.

    Of FP4, `outer_scale` becomes `wcscales`.
    """
    if "outer_scale" not in tensors:
        return {name: _CODECS[name][0](tensor) for name, tensor in tensors.items()}
    found = {name: _CODECS[name][0](t) for name, t in tensors.items() if name in _CODECS and name != "wscales"}
    return found | {
        "wscales": pack_micro_scales(tensors["wscales"]),
        "wcscales": pack_vector(tensors["outer_scale"]),
    }


def unpack_linear(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors of one linear by name -> plain, codes compact. ValueError as in the functions above.

    FP4 is told by its scales of one byte; `wtscale` and `wcscales` become `outer_scale` (N,).
    """
    if tensors["wscales"].element_size() > 1:
        return {name: _CODECS[name][1](tensor) for name, tensor in tensors.items()}
    found = {name: _CODECS[name][1](t) for name, t in tensors.items() if name in _CODECS and name != "wscales"}
    outer = torch.ones(len(tensors["qweight"]), device=tensors["qweight"].device)
    if (vector := tensors.get("wcscales")) is not None:
        outer = outer * unpack_vector(vector.flatten()).float()
    if (scale := tensors.get("wtscale")) is not None:
        outer = outer * scale.flatten().float()
    return found | {"wscales": unpack_micro_scales(tensors["wscales"]), "outer_scale": outer}


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
