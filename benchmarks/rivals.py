"""ComfyUI's small forms of a linear as comfy-kitchen computes them, for `quality.py`.

Source: comfy/quant_ops.py of ComfyUI@v0.33.0; comfy_kitchen/tensor, version 0.2.40.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

ACTIVATIONS = {
    "convrot_w4a4": "w4a4",
    "asym_w4a8_int8": "w4a8",
    "int8_tensorwise": "w4a8",
    "int8_tensorwise, ConvRot": "w4a8",
}
"""Name -> our precision whose activations have as many bits."""
BITS = {"convrot_w4a4": 4.0, "asym_w4a8_int8": 4.5, "int8_tensorwise": 8.0, "int8_tensorwise, ConvRot": 8.0}
"""Of a weight, but for scales of rows."""


def rivals() -> tuple[str, ...]:
    """The forms, where comfy-kitchen is installed."""
    return tuple(ACTIVATIONS) if importlib.util.find_spec("comfy_kitchen") else ()


def linear(form: str, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The linear of a weight (N, K) in a form: x (M, K) -> (M, N)."""
    import comfy_kitchen as kitchen

    group = next(size for size in (256, 64, 16) if weight.shape[1] % size == 0)
    if form == "convrot_w4a4":
        codes, scales = kitchen.quantize_convrot_w4a4_weight(weight, group)
        return partial(kitchen.convrot_w4a4_linear, qweight=codes, wscales=scales, convrot_groupsize=group)
    if form == "asym_w4a8_int8":
        codes, relative, channel, correction, codebook = kitchen.quantize_w4a8_int8_weight(
            weight, convrot_groupsize=group
        )
        parts = {
            "qdata": codes,
            "s_rel": relative,
            "s_channel": channel,
            "codebook": codebook,
            "correction": correction,
        }
        return partial(kitchen.w4a8_int8_linear, **parts, convrot_groupsize=group, out_dtype=weight.dtype)
    rotated = "ConvRot" in form
    if rotated:
        codes, scale = torch.ops.comfy_kitchen.quantize_int8_convrot_weight(weight, group)
    else:
        codes, scale = kitchen.quantize_int8_rowwise(weight)
    options = {"out_dtype": weight.dtype, "convrot": rotated, "convrot_groupsize": group}
    return partial(kitchen.int8_linear, weight=codes, weight_scale=scale, **options)


def replace_linears(model: nn.Module, form: str) -> float:
    """Have every linear of the blocks compute in a form; returns the bytes that this saves of 16 bits a weight."""
    saved = 0.0
    for name, module in model.named_modules():
        if name.endswith(("to_qkv", "to_out", "w3_w1", "w2")):
            n, k = module.weight.shape
            run = linear(form, module.weight.data)
            module.forward = lambda x, run=run, n=n, k=k: run(x.reshape(-1, k)).view(*x.shape[:-1], n)
            saved += n * k * (16 - BITS[form]) / 8
    return saved
