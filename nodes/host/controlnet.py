"""ControlNets in ComfyUI: a file as a model of its own for memory management, applied to our MODEL or to ComfyUI's.

Its pictures are encoded once for a run, before the models are loaded for sampling. Our MODEL runs it inside its own
forward, as the core does. ComfyUI's own Z-Image calls patches after its blocks instead, in which it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ...zimage_core.formats.controlnet import control_info, load_controlnet
from ...zimage_core.models.attention import sdpa
from ...zimage_core.models.controlnet import (
    MASKED_CHANNELS,
    ControlNet,
    ControlRun,
    PreparedControl,
    control_context,
    inpainting_picture,
)
from ...zimage_core.models.transformer import Conditioning, ZImageTransformer
from ...zimage_core.sizes import readable
from . import messages
from .files import find
from .patcher import DTYPES, Adapted, StreamingPatcher

CONTROLS = "zimage_controls"  # the key of what is applied, in transformer_options, of wrappers and of models


class ControlModel(Adapted):
    """A ControlNet as ComfyUI's memory management sees it."""

    core: ControlNet

    def __init__(self, net: ControlNet):
        super().__init__(net, net.blocks, {})

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: there are no weights for other nodes."""
        return {}


class ControlPatcher(StreamingPatcher):
    """The ControlNet's patcher."""

    what = "Z-Image ControlNet"
    no_weights = "a Z-Image ControlNet cannot be {} here: its file is what there is to work with"
    share = math.inf  # bytes of the MODEL's budget, where that has one

    @property
    def net(self) -> ControlNet:
        return self.model.core

    def _place(self, device, allowance: float) -> int:
        return super()._place(device, min(allowance, self.share))


def load_control(name: str, backend: str, precision: str) -> ControlPatcher:
    """A file of `model_patches` as a model of its own, its weights on ComfyUI's offload device."""
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(device=device, supported_dtypes=DTYPES)
    options: dict[str, Any] = {"backend": backend, "precision": precision, "compute_device": device}
    net = load_controlnet(find("model_patches", name, "controlnet"), device=offload, dtype=dtype, **options)
    return ControlPatcher(ControlModel(net), device, offload)


def describe_control(name: str, patcher: ControlPatcher) -> str:
    """One line: variant, format, channels, the size of the weights."""
    info = control_info(find("model_patches", name, "controlnet"))
    form = f"INT4 r{info.rank}" if info.rank else info.dtype if info.format == "dense" else info.format.upper()
    mask = "takes masks" if info.config.channels == MASKED_CHANNELS else "no masks"
    return f"ControlNet {info.variant}, {form}, {mask}, {readable(patcher.model_size())}"


@dataclass
class Applied:
    """A ControlNet with its pictures, as one Apply node sets it; its context is made for each run's size."""

    patcher: ControlPatcher
    vae: Any
    image: Tensor | None  # (B, H, W, 3) in 0..1
    source: Tensor | None  # likewise, the picture that is repainted in part
    mask: Tensor | None  # (B, H, W), 1 where it is repainted
    strength: float
    start: float
    end: float
    context: Tensor | None = None  # (B, C, h, w)
    sigmas: tuple[float, float] = field(default=(math.inf, -1.0))  # between which it works

    def begin_run(self, model: comfy.model_patcher.ModelPatcher, height: int, width: int) -> None:
        """Encode the pictures for latents of height x width cells with this model's scale."""
        size = height, width
        sampling = model.get_model_object("model_sampling")
        first = math.inf if self.start <= 0 else float(sampling.percent_to_sigma(self.start))
        last = -1.0 if self.end >= 1 else float(sampling.percent_to_sigma(self.end))
        self.sigmas = first, last
        if self.context is not None and self.context.shape[-2:] == size:
            return
        scale = model.get_model_object("latent_format").process_in

        def resized(picture: Tensor, how: str) -> Tensor:
            return comfy.utils.common_upscale(picture, 8 * width, 8 * height, how, "disabled")

        def encode(picture: Tensor) -> Tensor:
            return scale(self.vae.encode(((picture + 1) / 2).movedim(1, -1)).float())

        def pixels(image: Tensor) -> Tensor:
            return resized(image[..., :3].movedim(-1, 1).float(), "lanczos").clamp(0, 1) * 2 - 1

        channels = self.patcher.net.config.channels
        control = None if self.image is None else encode(pixels(self.image))
        kept = mask = None
        if self.mask is not None and self.source is not None and channels == MASKED_CHANNELS:
            mask = resized(self.mask.reshape(-1, 1, *self.mask.shape[-2:]).float(), "bilinear")
            kept = encode(inpainting_picture(pixels(self.source), mask))
            mask = mask.to(kept.device)
        self.context = control_context(channels, size, control, kept, mask)

    def works(self, sigma: float) -> bool:
        return self.sigmas[1] < sigma <= self.sigmas[0]

    def rows(self, latents: Tensor, patch: int) -> Tensor:
        """The context for latents (B, 16, h, w), padded as they are; one row where it is the same for all.

        ValueError for latents of another size, such as an area of them.
        """
        assert self.context is not None
        context = comfy.ldm.common_dit.pad_to_patch_size(self.context, (patch, patch))
        if context.shape[-2:] != latents.shape[-2:]:
            raise ValueError(
                "a ControlNet does not work with areas or parts of a latent: remove the node that sets them"
            )
        return context if len(context) == 1 else comfy.utils.repeat_to_batch_size(context, len(latents))


def apply_control(
    model: comfy.model_patcher.ModelPatcher,
    patcher: ControlPatcher,
    vae: Any,
    image: Tensor | None,
    source: Tensor | None,
    mask: Tensor | None,
    strength: float,
    start: float,
    end: float,
    node_id: str | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL with a ControlNet. ValueError for what does not fit together."""
    if not math.isfinite(strength):
        raise ValueError(f"strength: expected a finite number, found {strength}; 0.6 to 1 are usual")
    if not 0 <= start < end <= 1:
        raise ValueError(f"start {start}, end {end}: expected 0 <= start < end <= 1")
    masked = patcher.net.config.channels == MASKED_CHANNELS
    if (source is None) != (mask is None):
        raise ValueError("inpaint_image and mask belong together: connect both, or neither")
    if image is None and not (masked and mask is not None):
        raise ValueError(f"a control image is needed{', or inpaint_image and mask' if masked else ''}: connect one")
    if strength == 0:
        return model
    ours = isinstance(getattr(model.model.diffusion_model, "transformer", None), ZImageTransformer)
    check_fit(patcher.net, model.model.diffusion_model, ours)
    n = model.clone()
    applied = Applied(patcher, vae, image, source, mask, strength, start, end)
    options = n.model_options["transformer_options"]
    options[CONTROLS] = [*options.get(CONTROLS, ()), applied]
    n.set_additional_models(CONTROLS, [*n.get_additional_models_with_key(CONTROLS), patcher])
    n.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, CONTROLS, Encoding(applied))
    if not ours:
        patch = StockPatch(applied, model.model.diffusion_model)
        n.set_model_patch(patch, "noise_refiner")
        n.set_model_patch(patch, "double_block")
    text = "only the masked part can change; keep the rest with a latent noise mask" if mask is not None else "applied"
    ignored = (
        ", the mask is not for this ControlNet, which has no channel for it" if mask is not None and not masked else ""
    )
    messages.say(text + ignored, node_id)
    return n


def check_fit(net: ControlNet, module: Any, ours: bool) -> None:
    """ValueError for a MODEL that a ControlNet was not made for, our own or ComfyUI's."""
    if ours:
        return net.check(module.transformer)
    base = net.config.base
    if getattr(module, "dim", None) != base.dim or len(getattr(module, "layers", ())) != base.n_layers:
        raise ValueError(
            f"this ControlNet is for Z-Image, width {base.dim} with {base.n_layers} layers; the MODEL is another: "
            "connect a Z-Image MODEL"
        )


def set_beside(model: comfy.model_patcher.ModelPatcher, patchers: list[ControlPatcher], shape: Sequence[int]) -> None:
    """Register the ControlNets that run beside our MODEL: their activations count, and they share its budget."""
    if not isinstance(getattr(model.model, "beside", None), tuple):
        return
    base = model.model
    base.beside, base.shared = tuple(patcher.net for patcher in patchers), 0.0
    budget = getattr(model, "budget", None)
    whole = model.model_size() + sum(patcher.model_size() for patcher in patchers)
    for patcher in patchers:
        patcher.share = math.inf
        if budget is not None:
            patcher.share = max(budget - base.activations(shape), 0) * patcher.model_size() / whole
            base.shared += patcher.share


class Encoding:
    """Encodes a ControlNet's pictures before a run loads its models; a wrapper of ComfyUI's."""

    def __init__(self, applied: Applied):
        self.applied = applied

    def __call__(self, executor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        model = executor.class_obj.model_patcher
        self.applied.begin_run(model, *noise.shape[-2:])
        found = model.model_options["transformer_options"].get(CONTROLS, ())
        set_beside(model, [applied.patcher for applied in found], noise.shape)
        try:
            return executor(noise, *args, **kwargs)
        finally:
            set_beside(model, [], noise.shape)


def with_controls(
    run: Callable[..., Tensor], cond: Conditioning, base: ZImageTransformer, options: dict, x: Tensor, timesteps: Tensor
) -> tuple[Callable[..., Tensor], Conditioning]:
    """The function that runs our MODEL's blocks, and its conditioning, with the ControlNets of this step."""
    found = options.get(CONTROLS, ())
    if any(math.isfinite(applied.sigmas[0]) or applied.sigmas[1] >= 0 for applied in found):
        sigma = float(timesteps.flatten()[0])
        found = [applied for applied in found if applied.works(sigma)]
    if not found:
        return run, cond
    rows = [applied.rows(x, base.config.patch_size) for applied in found]
    prepared = (one.patcher.net.prepare(row, base, cond, one.strength) for one, row in zip(found, rows))
    streamers = {id(block): one.patcher.module.streamer for one in found for block in one.patcher.net.blocks}

    def run_either(stage: str, index: int, block, x: Tensor, *args: object) -> Any:
        if id(block) not in streamers:
            return run(stage, index, block, x, *args)
        comfy.model_management.throw_exception_if_processing_interrupted()
        return streamers[id(block)].run_block(stage, index, block, x, *args)

    return run_either, replace(cond, controls=tuple(prepared))


class StockPatch:
    """Runs a ControlNet beside ComfyUI's own Z-Image, whose patches are called after each block."""

    run: ControlRun
    caption: Tensor  # (1 or B, Lc, D) refined, as before the layers

    def __init__(self, applied: Applied, module: Any):
        self.applied, self.module, self.works = applied, module, False

    def models(self) -> list[ControlPatcher]:
        """What ComfyUI loads with the model."""
        return [self.applied.patcher]

    def __call__(self, given: dict) -> dict:
        """Add the hint of one block to its result; `given` as ComfyUI's Lumina 2 passes it to patches."""
        x, index, refiner = given["img_input"], given["block_index"], given.get("block_type") == "noise_refiner"
        tokens = x.shape[1]
        if index == 0 and refiner:
            sigmas = given["transformer_options"].get("sigmas")
            self.works = sigmas is None or self.applied.works(float(sigmas.flatten()[0]))
        if not self.works:
            return given
        if index == 0 and refiner:
            self.caption = given["txt"]
            self._begin(x, given["x"])
            cos, sin = (angles[:, :tokens] for angles in self._angles(given))
            self.run.enter_refiner(x, (cos, sin, None, given["vec"], sdpa))
        elif index == 0:
            whole = torch.cat((x, self.caption.expand(len(x), -1, -1).to(x.dtype)), dim=1)
            self.run.enter_layers(whole, (*self._angles(given), None, given["vec"], sdpa))
        hint = self.run.hint(index)
        if hint is not None:
            given["img"] = torch.add(given["img"], hint[:, :tokens], alpha=self.applied.strength)
            if not refiner:
                given["txt"] = torch.add(given["txt"], hint[:, tokens:], alpha=self.applied.strength)
        return given

    def _begin(self, x: Tensor, latents: Tensor) -> None:
        net = self.applied.patcher.net
        tokens = net.embed(self.applied.rows(latents, net.config.base.patch_size), self.module.x_pad_token, x.shape[1])
        self.run = PreparedControl(net, tokens, self.applied.strength).begin(
            self.applied.patcher.module.streamer.run_block
        )

    def _angles(self, given: dict) -> tuple[Tensor, Tensor]:
        """Rotary angles of [image, caption] tokens."""
        config, caption = self.applied.patcher.net.config.base, self.caption.shape[1]
        h, w = (cells // config.patch_size for cells in given["x"].shape[-2:])
        cos, sin = ZImageTransformer._angles((caption,), (h, w), given["img_input"].shape[1], None, config)
        return cos.to(given["img"].device), sin.to(given["img"].device)
