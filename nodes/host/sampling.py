"""Sampling: the core's schedule through ComfyUI's guider, as the sampler node does it."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...zimage_core.failures import check_finite
from ...zimage_core.sampler import SHIFT, get_sigmas
from . import messages
from .files import LATENT_CHANNELS
from .model import ZImagePatcher, describe_plan

MAX_SIZE = 4096  # pixels


def schedule(model: comfy.model_patcher.ModelPatcher, steps: int, denoise: float) -> Tensor:
    """(steps + 1,) sigmas: the core's, or ComfyUI's "simple" where the model's sampling is patched or another's."""
    total = steps if denoise >= 1 else max(steps, int(steps / denoise))
    sampling = model.get_model_object("model_sampling")
    if "model_sampling" not in model.object_patches and getattr(sampling, "shift", None) == SHIFT:
        return get_sigmas(steps, start=steps / total)
    return comfy.samplers.calculate_sigmas(sampling, "simple", total)[-(steps + 1) :].cpu()


def empty_latent(width: int, height: int, batch: int, denoise: float) -> dict:
    """A LATENT to generate pictures of a size in pixels from; ValueError for a wrong size and for denoise below 1."""
    if denoise < 1:
        raise ValueError(f"denoise {denoise} needs a latent to start from: connect one (VAE Encode), or set it to 1")
    messages.check_pixels("width", width, MAX_SIZE)
    messages.check_pixels("height", height, MAX_SIZE)
    shape = (batch, LATENT_CHANNELS, height // 8, width // 8)
    return {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}


def sample(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    seed: int,
    steps: int,
    width: int,
    height: int,
    batch: int,
    latent: dict | None,
    denoise: float,
    node_id: str | None,
) -> dict:
    """LATENT of Euler over `schedule` through ComfyUI's guider, as KSampler (euler, simple, cfg 1) gives it.

    Without a latent it starts from noise of `batch` pictures of width x height. The node shows the plan first.
    """
    if latent is None:
        latent = empty_latent(width, height, batch, denoise)
    import latent_preview

    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))
    channels = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise ValueError(
            f"the latent has {samples.shape[1]} channels, this model's have {channels}: encode the picture with the "
            "Z-Image VAE Loader's VAE"
        )
    if isinstance(model, ZImagePatcher):
        model.set_adapters(model.patches)  # before the plan, which counts their bytes
        messages.say(describe_plan(model, 8 * samples.shape[-1], 8 * samples.shape[-2], samples.shape[0]), node_id)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    negative = [[torch.zeros_like(cond), extra] for cond, extra in positive]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(1.0)
    samples = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object("euler"),
        schedule(model, steps, denoise),
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    check_finite(samples, "Z-Image, denoising", "a damaged model file, or a LoRA or its strength can cause this")
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**out, "samples": samples.to(comfy.model_management.intermediate_device())}
