"""Names of tensors, from every published style to the models' own: transformer, text encoder, VAE, LoRAs. No torch.

A source module either is a module of the model (`attention.to_out.0` -> `attention.to_out`) or one part of a
fused one (`attention.to_q` -> rows "q" of `attention.to_qkv`). Checkpoints and LoRA files share the table.

Styles of the transformer: huggingface/diffusers `transformer_z_image.py@v0.42.1` (official Tongyi-MAI names), ComfyUI
`comfy/ldm/lumina/model.py@v0.33.0`, and nunchaku's SVDQuant files
(nunchaku-ai/nunchaku `models/transformers/transformer_zimage.py`). Of the VAE: diffusers and ComfyUI
`comfy/ldm/modules/diffusionmodules/model.py@v0.33.0`. Of GGUF: llama.cpp's by way of gguf 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = re.compile(r"^(?:model\.diffusion_model\.|diffusion_model\.|transformer\.)")

_WRAPPER = re.compile(r"\b(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Left in names by torch.compile, DDP, FSDP and activation checkpointing."""

_SAVED_ENCODER = re.compile(r"^(?:qwen3_4b\.)?transformer\.(?=model\.)")
"""Before the names in a file that ComfyUI's CLIPSave wrote."""

_LEAF = re.compile(r"(.+?)\.(weight\..+|[^.]+)")
"""A tensor's name -> module and leaf, where a quantized weight's parts are one leaf (`weight._data`)."""

LONGEST = 512
"""Characters of a name; longer ones match nothing, as the patterns' time grows faster than a name."""

CONTROL = "control_"  # begins every key of a ControlNet, whose blocks are named as the base's

FUSED_PARTS = {"attention.to_qkv": ("q", "k", "v"), "feed_forward.w3_w1": ("w3", "w1")}
"""Row order of the fused linears; w3 (values) comes before w1 (gates)."""

UNUSED = ("norm_final.weight", "scaled_fp8")
"""A norm left in some ComfyUI conversions from Lumina 2, which Z-Image has not, and a mark of older FP8 files."""

# The model's own name of a module in a block, or outside of blocks -> its names in files, diffusers' first and
# ComfyUI's last.
_IN_BLOCK = {
    "attention.to_qkv": ("attention.to_qkv", "attention.qkv"),
    "attention.to_out": ("attention.to_out.0", "attention.to_out", "attention.out"),
    "attention.norm_q": ("attention.norm_q", "attention.q_norm"),
    "attention.norm_k": ("attention.norm_k", "attention.k_norm"),
    "feed_forward.w3_w1": ("feed_forward.net.0.proj", "feed_forward.w13", "feed_forward.w3_w1"),
    "feed_forward.w2": ("feed_forward.net.2", "feed_forward.w2"),
    "adaLN_modulation.0": ("adaLN_modulation.0",),
    **{name: (name,) for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
}
_OUTSIDE = {
    "x_embedder": ("all_x_embedder.2-1", "x_embedder"),
    "final_layer.linear": ("all_final_layer.2-1.linear", "final_layer.linear"),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
    **{name: (name,) for name in ("cap_embedder.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
}
Module = tuple[str, "str | None"]
"""A module of the model, and the part of it (`FUSED_PARTS`) or None."""
BLOCK_NAMES: dict[str, Module] = {
    **{name: (own, None) for own, names in _IN_BLOCK.items() for name in names},
    **{f"attention.to_{part}": ("attention.to_qkv", part) for part in ("q", "k", "v")},
    **{f"feed_forward.{part}": ("feed_forward.w3_w1", part) for part in ("w3", "w1")},
}
OTHER_NAMES: dict[str, Module] = {name: (own, None) for own, names in _OUTSIDE.items() for name in names}
_HINTS: dict[str, Module] = {name: (name, None) for name in ("before_proj", "after_proj")}
_IN_CONTROL_BLOCK = BLOCK_NAMES | _HINTS
_TOKENS = ("x_pad_token", "cap_pad_token")
_BLOCK = re.compile(r"((?:layers|noise_refiner|context_refiner)\.\d{1,4}\.)?(.*)")

_GGUF_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_OTHERS = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_BFL_ROWS = (
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (r"^(encoder|decoder)\.mid\.attn_1\.(q|k|v)\.", r"\1.mid_block.attentions.0.to_\2."),
    (r"^(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"^(.*(?:up|down)_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"^(.*(?:up|down)_blocks\.\d+)\.(upsample|downsample)\.", r"\1.\2rs.0."),
    (r"^(.*\.resnets\.\d+)\.nin_shortcut\.", r"\1.conv_shortcut."),
)
"""Black Forest Labs' names -> diffusers', applied in turn."""

_LORA_PREFIX = re.compile(
    r"^(?:base_model\.model\.|(?:diffusion_model|transformer|model|dit|unet)[._]|lora_(?:unet|transformer)__?|lycoris_)+"
)
_FLAT_BLOCK = re.compile(r"^(layers|noise_refiner|context_refiner)_(\d{1,4})_(.+)$")
_ENCODER = re.compile(r"^(?:.*_)?layers_(\d{1,4})_(self_attn|mlp)_((?:[qkvo]|gate|up|down)_proj)$")

# The end of a LoRA file's key -> what the tensor is; an adapter's name may stand inside (PEFT's "default").
_LORA_LEAVES = tuple(
    (re.compile(f"(?:{pattern})$"), leaf)
    for leaf, pattern in (
        ("down", r"\.lora_A(?:\.\w+)?(?:\.weight)?|[._]lora[._](?:linear_layer\.)?down(?:\.\w+)?\.weight"),
        ("up_bias", r"\.lora_B(?:\.\w+)?\.bias|[._]lora[._]up\.bias"),
        ("up", r"\.lora_B(?:\.\w+)?(?:\.weight)?|[._]lora[._](?:linear_layer\.)?up(?:\.\w+)?\.weight"),
        ("magnitude", r"\.dora_scale|\.magnitude|\.lora_magnitude_vector(?:\.\w+)*"),
        ("alpha", r"\.alpha"),
        ("diff", r"\.(?:diff|w_norm)"),
        ("diff_b", r"\.(?:diff_b|b_norm)"),
        (r"\1", r"\.(hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)(?:\.\w+)?"),
        (r"\1", r"\.(oft_blocks|rescale)"),
    )
)
_LORA_REFUSED = tuple(
    (re.compile(f"(.+)(?:{pattern})$"), name)
    for name, pattern in (
        ("a convolution in Tucker form", r"\.(?:hada_t[12]|lokr_t2|lora_mid)(?:\.\w+)*"),
        ("OFT in PEFT's form (oft_R), which does not say how it was made,", r"\.oft_R(?:\.\w+)*"),
        ("BOFT", r"\.(?:oft_diag|boft_\w+)(?:\.\w+)*"),
        ("GLoRA", r"\.[ab][12]\.weight"),
        ("IA3", r"\.on_input|\.ia3_l(?:\.\w+)*"),
        ("VeRA", r"\.vera_lambda_[bd](?:\.\w+)*"),
        ("weights that replace the model's", r"\.(?:reshape_weight|set_weight)"),
    )
)


def unwrapped(key: str) -> str:
    """A tensor's key without what wrappers of modules left in it."""
    return _WRAPPER.sub("", key)


def canonical_module(name: str) -> Module | None:
    """A module's name in any style -> (the model's module, part or None); None where nothing matches."""
    if match := _BLOCK.fullmatch(PREFIX.sub("", _WRAPPER.sub("", name))):
        block, inner = match.groups(default="")
        if found := (_IN_CONTROL_BLOCK if block else OTHER_NAMES).get(inner):
            return block + found[0], found[1]
    return None


def canonical_tensor(key: str) -> tuple[str, str | None] | None:
    """A tensor's key in any style -> (the model's tensor, part or None); None where nothing matches."""
    if len(key) > LONGEST:
        return None
    if (token := PREFIX.sub("", _WRAPPER.sub("", key))) in _TOKENS:
        return token, None
    match = _LEAF.fullmatch(key)
    found = match and canonical_module(match[1])
    return (f"{found[0]}.{match[2]}", found[1]) if match and found else None


def control_tensor(key: str) -> tuple[str, str | None] | None:
    """A ControlNet's key in any style -> (the tensor in `ControlNet`, part or None); None where nothing matches."""
    key = PREFIX.sub("", key)
    return canonical_tensor(key.removeprefix(CONTROL)) if key.startswith(CONTROL) else None


def diffusers_svdq_module(name: str) -> str:
    """The model's module name -> its name in nunchaku's SVDQuant files, which follow diffusers."""
    return _in_style(name, 0)


def comfy_module(name: str) -> str:
    """The model's module name -> ComfyUI's; `w3_w1` is two linears there."""
    return _in_style(name, -1)


def _in_style(name: str, style: int) -> str:
    block, inner = _BLOCK.match(name).groups(default="")  # type: ignore[union-attr]
    return block + (_IN_BLOCK | _OUTSIDE).get(inner, (inner,))[style]


def encoder_tensor(key: str) -> tuple[str, None]:
    """A text encoder tensor's key in transformers' or GGUF's style -> transformers' name without `model.`."""
    key = _SAVED_ENCODER.sub("", unwrapped(key))
    stem, _, leaf = key.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        return f"layers.{match[1]}.{_GGUF_LAYERS.get(match[2], match[2])}.{leaf}", None
    return f"{_GGUF_OTHERS[stem]}.{leaf}" if stem in _GGUF_OTHERS else key.removeprefix("model."), None


def vae_tensor(key: str, levels: int) -> tuple[str, None]:
    """A VAE tensor's key in Black Forest Labs' or diffusers' style -> diffusers' name.

    levels: the resolutions, which the former count from the finest in the decoder and the latter from the coarsest.
    """
    if len(key) > LONGEST:
        return key, None
    key = unwrapped(key)
    if match := re.match(r"decoder\.up\.(\d{1,2})\.", key):
        key = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{key[match.end() :]}"
    for pattern, replacement in _BFL_ROWS:
        key = re.sub(pattern, replacement, key)
    return key, None


def lora_target(name: str) -> tuple[str, str, str | None] | None:
    """A module's name in a LoRA file -> ("transformer" or "text_encoder", the model's module, part or None).

    Dots and underscores are the same here, as kohya's and other trainers' files write the one for the other.
    """
    flat = re.sub(r"[.-]", "_", _LORA_PREFIX.sub("", _WRAPPER.sub("", name)))
    if flat in _TOKENS:
        return "transformer", flat, None
    if found := _FLAT_OTHERS.get(flat):
        return "transformer", *found
    if (match := _FLAT_BLOCK.match(flat)) and (found := _FLAT_BLOCKS.get(match[3])):
        return "transformer", f"{match[1]}.{match[2]}.{found[0]}", found[1]
    if match := _ENCODER.match(flat):
        return "text_encoder", f"layers.{match[1]}.{match[2]}.{match[3]}", None
    return None


def lora_leaf(key: str) -> tuple[str, str] | None:
    """A LoRA file's key -> (module as the file names it, what the tensor is); None for any other tensor.

    What it is: down, up, up_bias, alpha, magnitude, diff, diff_b, hada_*, lokr_*, oft_blocks or rescale.
    """
    for pattern, leaf in _LORA_LEAVES if len(key) <= LONGEST else ():
        if match := pattern.search(key):
            return key[: match.start()], match.expand(leaf)
    return None


def lora_refused(key: str) -> str | None:
    """The name of the format that a key belongs to, if it is an adapter to Z-Image in one that is not read."""
    for pattern, name in _LORA_REFUSED if len(key) <= LONGEST else ():
        if (match := pattern.match(key)) and lora_target(match[1]):
            return name
    return None


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these tensors is a LoRA of any kind."""
    found = ((key, lora_leaf(key)) for key in keys)
    return any(leaf[1] not in ("alpha", "rescale") if leaf else lora_refused(key) for key, leaf in found)


_FLAT_BLOCKS = {name.replace(".", "_"): found for name, found in BLOCK_NAMES.items()}
_FLAT_OTHERS = {re.sub(r"[.-]", "_", name): found for name, found in OTHER_NAMES.items()}
