"""Attention: torch's, and comfy-kitchen's in 8 bits, which runs on NVIDIA GPUs from sm_75 and AMD's from RDNA3 on.

Legend: B batch, L tokens, H heads, K head width, D = H * K.
Source: comfy_kitchen/sage_attention.py, version 0.2.40.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q, k, v (B, L, H, K), mask (B, 1, 1, L) bool -> (B, L, D)."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def int8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`sdpa` with q, k, v and the probabilities in 8 bits: a relative error of about 0.02."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    if q.is_meta:
        _ = [torch.empty_like(y, dtype=torch.int8) for y in (q, k, v)]
        return torch.empty_like(q).transpose(1, 2).flatten(2)
    import comfy_kitchen

    return comfy_kitchen.int8_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


KINDS: dict[str, Attend] = {"sdpa": sdpa, "int8": int8}


def int8_unavailable(device: torch.device) -> str | None:
    """Why `int8` cannot run on a device, or None."""
    try:
        import comfy_kitchen
    except (ImportError, OSError) as error:
        return f"comfy-kitchen cannot be imported ({error}); install it with pip install comfy-kitchen"
    if not hasattr(comfy_kitchen, "int8_attention_is_available"):
        return "this comfy-kitchen has no int8 attention; update it with pip install -U comfy-kitchen"
    if not comfy_kitchen.int8_attention_is_available(device):
        return f"comfy-kitchen has no int8 attention for {device.type} here; it needs sm_75 or RDNA3 at least"
    return None
