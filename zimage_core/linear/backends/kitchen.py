"""comfy-kitchen's SVDQuant W4A4 operators, and 8-bit activations by its int8 linear; on the CPU their eager forms.

Which of its kernels run on a GPU is for its own registry to say: CUDA, or HIP on AMD's RDNA cards.

w4a4 divides by a group's scale and accumulates in fp32, where nunchaku multiplies by the reciprocal and accumulates in
16 bits: equal to `reference` w4a4 up to that rounding. w4a8 requantizes the weights at every call, as `triton` does:
int8 with a scale per output channel, activations x / smooth in int8 with a scale per row, the low-rank branch in 16
bits.

Legend: M rows, N out, K in, R rank, G = K / 64 groups.
Source: comfy_kitchen/{registry.py,backends/{cuda/__init__.py,eager/svdquant.py,eager/quantization.py}}, version 0.2.40.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .. import layout
from . import allocate_w4a4, amd_architecture, capability, guard, reference, triton
from .reference import CHUNK, FIELDS, add_low_rank, low_rank

if TYPE_CHECKING:
    from ..svdq import SVDQWeights

PRECISIONS = ("w4a4", "w4a8")
OPERATORS = {"w4a4": "quantize_svdquant_w4a4", "w4a8": "int8_linear"}
INT4_TENSOR_CORES = (80, 86, 87, 89, 120, 121)  # elsewhere W4A4 is emulated, on a Hopper at eighteen times bf16


def unavailable(
    device: torch.device, dtype: torch.dtype, fp4: bool = False, precision: str | None = None
) -> str | None:
    """Why it cannot run there: not installed, too old, or what its registry says of the GPU and the dtype."""
    try:
        import comfy_kitchen
    except (ImportError, OSError) as error:
        return f"comfy-kitchen cannot be imported ({error}); install it with pip install comfy-kitchen"
    if not all(hasattr(comfy_kitchen, name) for name in ("scaled_mm_svdquant_w4a4", "int8_linear", "registry")):
        return "this comfy-kitchen has no SVDQuant operators; update it with pip install -U comfy-kitchen"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16, asked for {dtype}"
    if device.type not in ("cpu", "cuda"):
        return f"needs an NVIDIA or AMD GPU, the device is {device.type}"
    refusals = [_refusal(level, device) for level in ([precision] if precision else PRECISIONS)]
    return None if None in refusals else refusals[0]


def _refusal(precision: str, device: torch.device) -> str | None:
    """Why the registry has no kernels for a precision on a CPU or GPU."""
    import comfy_kitchen

    sm = capability(device)
    form = "eager" if device.type == "cpu" else "cuda" if amd_architecture(device) is None else "hip"
    state = comfy_kitchen.list_backends().get(form, {"available": False, "unavailable_reason": "not built"})
    if not state["available"]:
        return f"its {form} kernels are unavailable: {state['unavailable_reason']}"
    rules = comfy_kitchen.registry.get_constraints(form, OPERATORS[precision])
    if rules is None:
        return f"its {form} kernels have no {OPERATORS[precision]} for this GPU"
    least = rules.min_compute_capability
    if sm is not None and least is not None and sm < 10 * least[0] + least[1]:
        return f"its {OPERATORS[precision]} needs sm_{least[0]}{least[1]} or later, the GPU is sm_{sm}"
    if precision == "w4a4" and sm is not None and sm not in INT4_TENSOR_CORES:
        return f"w4a4 needs INT4 tensor cores (sm_80 to sm_89, sm_120), the GPU is sm_{sm}"
    return None


def prepare(weights: SVDQWeights, precision: str) -> dict[str, torch.Tensor]:
    """For w4a4 qweight (N, K/2) int8 in pairs of channels, wscales (G, N), proj_down (K, R), the others unchanged.

    For w4a8 the weights' tensors and their `channel_scale`."""
    if precision == "w4a8":
        return weights.tensors() | {"channel_scale": triton.channel_scale(weights)}
    pairs = layout.unpack_nibbles(weights.qweight).view(weights.out_features, -1, 2)
    return weights.tensors() | {
        "qweight": layout.pack_pairs(pairs),
        "wscales": weights.wscales.t().contiguous(),
        "proj_down": weights.proj_down.t().contiguous(),
    }


def restore(prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The fields of SVDQWeights."""
    if "channel_scale" in prepared:
        return reference.restore(prepared)
    return {name: prepared[name] for name in FIELDS if name in prepared} | {
        "qweight": layout.pack_nibbles(layout.unpack_pairs(prepared["qweight"]).flatten(1)),
        "wscales": prepared["wscales"].t().contiguous(),
        "proj_down": prepared["proj_down"].t().contiguous(),
    }


def join(
    prepared: Mapping[str, torch.Tensor], rank: int, pair: tuple[torch.Tensor, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """The low-rank branch with a pair behind its first `rank`, or without."""
    if "channel_scale" in prepared:
        return reference.join(prepared, rank, pair)
    own_down, own_up = prepared["proj_down"][:, :rank], prepared["proj_up"][:, :rank]
    if pair is None:
        return {"proj_down": own_down.contiguous(), "proj_up": own_up.contiguous()}
    down, up = pair
    return {"proj_down": torch.cat((own_down, down.T), 1), "proj_up": torch.cat((own_up, up), 1)}


def linear(x: torch.Tensor, prepared: Mapping[str, torch.Tensor], precision: str) -> torch.Tensor:
    """x (M, K) -> (M, N)."""
    with guard(x.device):
        return _w4a8(x, prepared) if precision == "w4a8" else _w4a4(x, prepared)


def _w4a4(x: torch.Tensor, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if x.is_meta:
        return allocate_w4a4(x, prepared["proj_down"].shape[1], len(prepared["qweight"]))
    import comfy_kitchen

    codes, ascales, rank = comfy_kitchen.quantize_svdquant_w4a4(
        x.contiguous(), prepared["smooth_factor"], prepared["proj_down"]
    )  # rows padded to a multiple of 256
    return comfy_kitchen.scaled_mm_svdquant_w4a4(
        codes, prepared["qweight"], ascales, prepared["wscales"], rank, prepared["proj_up"], prepared.get("bias")
    )[: len(x)]


def _w4a8(x: torch.Tensor, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    weight = prepared["codes"] if "codes" in prepared else codes(prepared)
    scale = prepared["channel_scale"] * triton.to_code(torch.int8)
    y = multiply_8bit(x / prepared["smooth_factor"], weight, scale, prepared.get("bias"))
    return add_low_rank(y, low_rank(x, prepared["proj_down"]), prepared["proj_up"])


def multiply_8bit(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, group: int = 0
) -> torch.Tensor:
    """x (M, K), rounded to int8 row by row, times weights that are stored in it -> (M, N).

    weight (N, K), scale (N,) fp32; group: of how many columns that were rotated together (ConvRot), as x then is, too.
    """
    if x.is_meta:
        _ = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), len(weight), dtype=torch.int32)
        return x.new_empty(len(x), len(weight))
    import comfy_kitchen

    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    with guard(x.device):
        return comfy_kitchen.int8_linear(x, weight, scale, bias, x.dtype, **rotation)


def codes(prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """q * s (N, K) in int8, by Triton where it runs."""
    qweight, wscales = prepared["qweight"], prepared["wscales"]
    if triton.unavailable(qweight.device, wscales.dtype) is None:
        return triton.requantize(prepared, torch.int8)
    n, half = qweight.shape
    weight = torch.empty(n, 2 * half, dtype=torch.int8, device=qweight.device)
    rows = max(1, CHUNK // (2 * half))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        scale = wscales[part].float() / (prepared["channel_scale"][part, None] * triton.to_code(torch.int8))
        codes = layout.unpack_nibbles(qweight[part]).view(*scale.shape, layout.GROUP)
        weight[part] = (codes * scale[:, :, None]).round_().flatten(1)
    return weight
