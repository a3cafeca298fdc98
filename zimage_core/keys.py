"""Names of the Z-Image transformer's tensors: from every published style to the model's own. No torch here.

A source module either is a module of the model (`attention.to_out.0` -> `attention.to_out`) or one part of a
fused one (`attention.to_q` -> rows "q" of `attention.to_qkv`). Checkpoints and LoRA files share the table.

Styles: huggingface/diffusers `transformer_z_image.py@v0.42.1` (official Tongyi-MAI names), ComfyUI
`comfy/ldm/lumina/model.py@v0.33.0`, and nunchaku's SVDQuant files
(nunchaku-ai/nunchaku `models/transformers/transformer_zimage.py`).
"""

from __future__ import annotations

import re

PREFIX = re.compile(r"^(?:model\.diffusion_model\.|diffusion_model\.|transformer\.)")

FUSED_PARTS = {"attention.to_qkv": ("q", "k", "v"), "feed_forward.w3_w1": ("w3", "w1")}
"""Row order of the fused linears; w3 (values) comes before w1 (gates)."""

SVDQ_LEAVES = ("qweight", "wscales", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up")

UNUSED = ("norm_final.weight",)
"""Left in some ComfyUI conversions from Lumina 2; Z-Image has no such norm and no loader reads it."""

_BLOCK = r"((?:layers|noise_refiner|context_refiner)\.\d+)\."
_MODULES: tuple[tuple[re.Pattern[str], str, str | None], ...] = tuple(
    (re.compile(f"^{pattern}$"), replacement, part)
    for pattern, replacement, part in (
        (_BLOCK + r"attention\.(?:to_)?qkv", r"\1.attention.to_qkv", None),
        (_BLOCK + r"attention\.to_q", r"\1.attention.to_qkv", "q"),
        (_BLOCK + r"attention\.to_k", r"\1.attention.to_qkv", "k"),
        (_BLOCK + r"attention\.to_v", r"\1.attention.to_qkv", "v"),
        (_BLOCK + r"attention\.(?:to_out\.0|to_out|out)", r"\1.attention.to_out", None),
        (_BLOCK + r"attention\.(?:norm_q|q_norm)", r"\1.attention.norm_q", None),
        (_BLOCK + r"attention\.(?:norm_k|k_norm)", r"\1.attention.norm_k", None),
        (_BLOCK + r"feed_forward\.(?:net\.0\.proj|w13|w3_w1)", r"\1.feed_forward.w3_w1", None),
        (_BLOCK + r"feed_forward\.w3", r"\1.feed_forward.w3_w1", "w3"),
        (_BLOCK + r"feed_forward\.w1", r"\1.feed_forward.w3_w1", "w1"),
        (_BLOCK + r"feed_forward\.(?:net\.2|w2)", r"\1.feed_forward.w2", None),
        (_BLOCK + r"(attention_norm[12]|ffn_norm[12]|adaLN_modulation\.0)", r"\1.\2", None),
        (r"(?:all_x_embedder\.2-1|x_embedder)", "x_embedder", None),
        (r"(?:all_final_layer\.2-1|final_layer)\.(linear|adaLN_modulation\.1)", r"final_layer.\1", None),
        (r"(cap_embedder\.[01]|t_embedder\.mlp\.[02])", r"\1", None),
    )
)
_TOKENS = ("x_pad_token", "cap_pad_token")


def canonical_module(name: str) -> tuple[str, str | None] | None:
    """A module's name in any style -> (the model's module, part or None); None where nothing matches."""
    name = PREFIX.sub("", name)
    for pattern, replacement, part in _MODULES:
        if pattern.match(name):
            return pattern.sub(replacement, name), part
    return None


def canonical_tensor(key: str) -> tuple[str, str | None] | None:
    """A tensor's key in any style -> (the model's tensor, part or None); None where nothing matches."""
    key = PREFIX.sub("", key)
    if key in _TOKENS:
        return key, None
    module, _, leaf = key.rpartition(".")
    found = canonical_module(module)
    return found and (f"{found[0]}.{leaf}", found[1])


def diffusers_svdq_module(name: str) -> str:
    """The model's module name -> its name in nunchaku's SVDQuant files, which follow diffusers."""
    for ours, theirs in (
        ("attention.to_out", "attention.to_out.0"),
        ("feed_forward.w3_w1", "feed_forward.net.0.proj"),
        ("feed_forward.w2", "feed_forward.net.2"),
    ):
        if name.endswith(ours):
            return name[: -len(ours)] + theirs
    if name == "x_embedder":
        return "all_x_embedder.2-1"
    if name.startswith("final_layer."):
        return "all_final_layer.2-1" + name[len("final_layer") :]
    return name
