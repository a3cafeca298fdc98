"""ComfyUI's rotated weights (ConvRot), dequantized by comfy-kitchen where it is installed.

A form is named by its kind and its sizes: "int8_convrot 256" (the group that is rotated together), "convrot_w4a4 256",
"asym_w4a8_int8 16 256" (the group of a scale, the group that is rotated).

Parts, n rows of K: codes int8 (n, K), or packed (n, K / 2) and for six bits (n, 3 K / 4); scale (n, 1) fp32;
block_scale FP8 bytes (n, K / group); codebook (n, 16) fp32, the same in every row.
Source: comfy/ops.py of ComfyUI@v0.33.0; comfy-kitchen 0.2.40 (tensor/int8.py, convrot_w4a4.py, w4a8_int8.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

KINDS = ("int8_convrot", "convrot_w4a4", "asym_w4a8_int8")
ROTATIONS = (4, 16, 64, 256, 1024, 4096)  # the sizes that regular Hadamard matrices have


def knows(form: str) -> bool:
    """Whether a form is one of these."""
    return form.split(" ")[0] in KINDS


def missing() -> str | None:
    """Why the forms cannot be read here, or None."""
    try:
        import comfy_kitchen  # noqa: F401
    except (ImportError, OSError) as error:
        return f"needs comfy-kitchen, which cannot be imported ({error}); pip install comfy-kitchen"
    return None


def dequantize(form: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Rows of parts -> rows (n, K) of the weight, fp32."""
    kind, *sizes = form.split(" ")
    groups = [int(size) for size in sizes]
    codes = parts["codes"]
    if codes.is_meta:
        if kind == "asym_w4a8_int8":
            columns = parts["block_scale"].shape[1] * groups[0]
        else:
            columns = codes.shape[1] * (2 if kind == "convrot_w4a4" else 1)
        return torch.empty(len(codes), columns, device="meta")
    import comfy_kitchen

    scale = parts["scale"].float()
    if kind == "int8_convrot":
        return torch.ops.comfy_kitchen.dequantize_int8_convrot_weight(codes, scale, groups[0])
    if kind == "convrot_w4a4":
        return comfy_kitchen.dequantize_convrot_w4a4_weight(
            codes, scale.flatten(), groups[0], output_dtype=torch.float32
        )
    return comfy_kitchen.dequantize_w4a8_int8_weight(
        codes,
        parts["block_scale"].view(torch.float8_e4m3fn),
        scale.flatten(),
        parts["codebook"][0].contiguous() if "codebook" in parts else None,
        group_size=groups[0],
        convrot_groupsize=groups[1],
        output_dtype=torch.float32,
    )
