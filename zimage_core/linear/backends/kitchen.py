"""comfy-kitchen's SVDQuant W4A4 operators, on GPUs with INT4 tensor cores; on the CPU their eager form.

They divide by a group's scale and accumulate in fp32, where nunchaku multiplies by the reciprocal and accumulates in
16 bits: equal to `reference` w4a4 up to that rounding.

Legend: M rows, N out, K in, R rank, G = K / 64 groups.
Source: comfy_kitchen/backends/{cuda/__init__.py,eager/svdquant.py}, version 0.2.40.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .. import layout
from . import allocate_w4a4, capability
from .reference import FIELDS

if TYPE_CHECKING:
    from ..svdq import SVDQWeights

PRECISIONS = ("w4a4",)
INT4_TENSOR_CORES = (80, 86, 87, 89, 120, 121)


def unavailable(device: torch.device, dtype: torch.dtype, fp4: bool = False) -> str | None:
    """Why it cannot run there: not installed, too old, no INT4 tensor cores, no 16-bit dtype."""
    try:
        import comfy_kitchen
    except (ImportError, OSError) as error:
        return f"comfy-kitchen cannot be imported ({error}); install it with pip install comfy-kitchen"
    if not hasattr(comfy_kitchen, "scaled_mm_svdquant_w4a4"):
        return "this comfy-kitchen has no SVDQuant operators; update it with pip install -U comfy-kitchen"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16, asked for {dtype}"
    if device.type == "cpu":
        return None
    sm = capability(device)
    if sm not in INT4_TENSOR_CORES:
        return f"needs INT4 tensor cores (sm_80 to sm_89, sm_120), the device is {device.type} sm_{sm}"
    kernels = comfy_kitchen.list_backends().get("cuda", {"available": False, "unavailable_reason": "not built"})
    return None if kernels["available"] else f"its CUDA kernels are unavailable: {kernels['unavailable_reason']}"


def prepare(weights: SVDQWeights, precision: str) -> dict[str, torch.Tensor]:
    """qweight (N, K/2) int8 in pairs of channels, wscales (G, N), proj_down (K, R), the other tensors unchanged."""
    pairs = layout.unpack_nibbles(weights.qweight).view(weights.out_features, -1, 2)
    return weights.tensors() | {
        "qweight": layout.pack_pairs(pairs),
        "wscales": weights.wscales.t().contiguous(),
        "proj_down": weights.proj_down.t().contiguous(),
    }


def restore(prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The fields of SVDQWeights."""
    return {name: prepared[name] for name in FIELDS if name in prepared} | {
        "qweight": layout.pack_nibbles(layout.unpack_pairs(prepared["qweight"]).flatten(1)),
        "wscales": prepared["wscales"].t().contiguous(),
        "proj_down": prepared["proj_down"].t().contiguous(),
    }


def join(
    prepared: Mapping[str, torch.Tensor], rank: int, pair: tuple[torch.Tensor, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """The low-rank branch with a pair behind its first `rank`, or without."""
    own_down, own_up = prepared["proj_down"][:, :rank], prepared["proj_up"][:, :rank]
    if pair is None:
        return {"proj_down": own_down.contiguous(), "proj_up": own_up.contiguous()}
    down, up = pair
    return {"proj_down": torch.cat((own_down, down.T), 1), "proj_up": torch.cat((own_up, up), 1)}


def linear(x: torch.Tensor, prepared: Mapping[str, torch.Tensor], precision: str) -> torch.Tensor:
    """x (M, K) -> (M, N)."""
    if x.is_meta:
        return allocate_w4a4(x, prepared["proj_down"].shape[1], len(prepared["qweight"]))
    import comfy_kitchen

    codes, ascales, rank = comfy_kitchen.quantize_svdquant_w4a4(
        x.contiguous(), prepared["smooth_factor"], prepared["proj_down"]
    )  # rows padded to a multiple of 256
    return comfy_kitchen.scaled_mm_svdquant_w4a4(
        codes, prepared["qweight"], ascales, prepared["wscales"], rank, prepared["proj_up"], prepared.get("bias")
    )[: len(x)]
