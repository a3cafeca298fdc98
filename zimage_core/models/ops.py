"""The operations between a block's linears: norms with modulation, gates, rotary positions, SwiGLU. Plain torch.

`backends.fused` has the same five functions as Triton kernels; `ZImageTransformer.use` sets which of the two `Ops` a
model runs. Three of them take what a following linear with 8-bit activations asks for (`svdq.smoothing`): the kernels
then return `backends.Quantized`; plain torch ignores it.

Formulas: huggingface/diffusers `transformer_z_image.py@v0.42.1`.

Legend: B batch, L tokens, D width, H heads, K head width, F feed-forward width. "1 or B" broadcasts over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import backends

FP16_MAX = 65504.0


class Ops(NamedTuple):
    """One implementation of the five functions that a block calls."""

    norm_scale: Callable[..., Tensor | backends.Quantized]
    norm_gate_add: Callable[..., Tensor]
    add_norm_scale: Callable[..., tuple[Tensor, Tensor | backends.Quantized]]
    norm_rope: Callable[..., tuple[Tensor, ...]]
    swiglu: Callable[..., Tensor | backends.Quantized]


def finite(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x within what fp16 holds, if that is its or the given dtype: these models overflow it, and a norm makes NaN."""
    return x.clamp(-FP16_MAX, FP16_MAX) if (dtype or x.dtype) is torch.float16 else x


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm over the last axis, computed in fp32, returned in `dtype`."""
    if x.dtype == weight.dtype == dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)


def norm_scale(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor | None, smooth: Tensor | None = None, columns: int = 0
) -> Tensor:
    """norm(x) * (1 + scale): x (B, L, D), scale (1 or B, 1, D) or None -> (B, L, D) in the weight's dtype."""
    y = rms_norm(x, weight, eps, weight.dtype)
    return y if scale is None else y * (1 + scale)


def norm_gate_add(x: Tensor, h: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Tensor:
    """x + tanh(gate) * norm(h): x, h (B, L, D), gate (1 or B, 1, D) or None -> (B, L, D) in x's dtype."""
    y = rms_norm(finite(h), weight, eps, x.dtype)
    return x + (y if gate is None else gate.tanh() * y)


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
) -> tuple[Tensor, Tensor]:
    """`norm_gate_add`, and `norm_scale` of its result with another norm's weight."""
    x = norm_gate_add(x, h, weight, eps, gate)
    return x, norm_scale(x, next_weight, eps, scale, smooth, columns)


def norm_rope(qkv: Tensor, norm_q: Tensor, norm_k: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """q and k normalized per head and rotated by their positions; v unchanged.

    qkv (B, L, 3, H, K), cos, sin (1 or B, L, 1, K/2) fp32 -> three of (B, L, H, K). May overwrite qkv.
    """
    q, k, v = finite(qkv).unbind(2)
    q, k = (rope(rms_norm(y, w, eps, w.dtype), cos, sin) for y, w in ((q, norm_q), (k, norm_k)))
    return q, k, v


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (B, L, H, K) by the angles (1 or B, L, 1, K/2), in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def swiglu(x: Tensor, smooth: Tensor | None = None, columns: int = 0) -> Tensor:
    """[values, gates] (..., 2F) -> values * silu(gates) (..., F)."""
    value, gate = x.chunk(2, dim=-1)
    return finite(finite(value) * F.silu(finite(gate)))


TORCH = Ops(norm_scale, norm_gate_add, add_norm_scale, norm_rope, swiglu)


def select(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Ops:
    """The Triton kernels if they run there and the backend asked for is not plain torch; else `TORCH`."""
    refused = backends.load("triton").unavailable(device, dtype)
    if backend in ("reference", "torch") or head_dim & (head_dim - 1) or refused:
        return TORCH
    fused = backends.load("fused")
    return Ops(*(getattr(fused, name) for name in Ops._fields))
