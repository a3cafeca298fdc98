"""NAG on our MODEL, ComfyUI's own NAGuidance among its patches, and prompts with noise for a part of the steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor

from ...zimage_core.models.guidance import Nag
from ...zimage_core.models.transformer import ZImageTransformer
from ...zimage_core.variety import Variety

NAG = "zimage_nag"  # the key in transformer_options: a Nag and the negative prompt's features (1, L, C)
ATTENTION_PATCH = "attn1_output_patch"
EDGE = 0.0005  # of the way: a step on the edge of two ranges is in one of them


def apply_nag(
    model: comfy.model_patcher.ModelPatcher, negative: list, scale: float, tau: float, alpha: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of our MODEL with NAG; the MODEL itself at scale 0. ValueError for another MODEL."""
    nag = Nag(scale, tau, alpha)
    if not scale:
        return model
    transformer = getattr(model.model.diffusion_model, "transformer", None)
    if not isinstance(transformer, ZImageTransformer):
        raise ValueError("Z-Image NAG works on this pack's MODEL: load it with the Z-Image INT4 Model Loader")
    wanted = transformer.config.cap_feat_dim
    if negative[0][0].shape[-1] != wanted:
        found = negative[0][0].shape[-1]
        raise ValueError(f"the negative prompt is {found} wide, this model wants {wanted}: encode both with one CLIP")
    n = model.clone()
    with torch.inference_mode(False):  # so that it can be known again, see `forward.Kept`
        n.model_options["transformer_options"][NAG] = nag, negative[0][0][:1].clone()
    n.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, NAG, _counted)
    return n


def nag_of(model: comfy.model_patcher.ModelPatcher) -> tuple[Nag, int] | None:
    """The NAG of a MODEL's clone: its numbers, and how many tokens the negative prompt has; None without."""
    found = model.model_options.get("transformer_options", {}).get(NAG)
    return found and (found[0], found[1].shape[1])


def _counted(executor, *args: Any, **kwargs: Any) -> Tensor:
    """Run with NAG's memory counted in what the model asks for."""
    patcher = executor.class_obj.model_patcher
    patcher.model.nag = nag_of(patcher)
    try:
        return executor(*args, **kwargs)
    finally:
        patcher.model.nag = None


def patched(attend: Callable, patches: list[Callable], options: dict, image: int, index: int) -> Callable:
    """`attend` of a layer with the patches of its output that ComfyUI's NAGuidance sets; as Flux calls them."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = attend(q, k, v, mask)
        for patch in patches:
            out = patch(out, {**options, "img_slice": [0, image], "block_type": "double", "block_index": index})
        return out

    return run


def join(captions: Sequence[Tensor]) -> Tensor:
    """Captions (B, L, C) of any lengths as one tensor, the shorter ones with rows of NaN behind them."""
    longest = max(caption.shape[1] for caption in captions)
    pad = functools.partial(F.pad, value=torch.nan)
    return torch.cat([pad(caption, (0, 0, 0, longest - caption.shape[1])) for caption in captions])


def parted(joined: Tensor) -> list[Tensor]:
    """The captions (L, C) of `join`."""
    return [caption[~caption[:, 0].isnan()] for caption in joined]


def vary(conditioning: list, strength: float, seed: int, pictures: int, share: float, until: float) -> list:
    """CONDITIONING with noise, a row for each picture, up to `until` of the way, and without it from there on."""
    if not strength:
        return conditioning
    variety, found = Variety(strength, share, until), []
    for cond, extra in conditioning:
        first, last = extra.get("start_percent", 0.0), extra.get("end_percent", 1.0)
        rows = [variety.vary(cond[i % len(cond)], (seed + i) % 2**64) for i in range(pictures)]
        middle = min(max(until - EDGE, first), last) if until < 1 else last
        if first < middle:
            found.append([torch.stack(rows), {**extra, "start_percent": first, "end_percent": middle}])
        if middle < last:
            found.append([cond, {**extra, "start_percent": middle, "end_percent": last}])
    return found
