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
from ...zimage_core.formats.identify import likely_variant
from ...zimage_core.sampler import SHIFT, get_sigmas
from . import messages
from .files import LATENT_CHANNELS
from .model import ZImagePatcher, describe_plan

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


def schedule(model: comfy.model_patcher.ModelPatcher, steps: int, denoise: float, scheduler: str = "simple") -> Tensor:
    """Sigmas of one of ComfyUI's schedulers; instead of "simple" the core's, unless the model's sampling is patched."""
    total = steps if denoise >= 1 else max(steps, int(steps / denoise))
    sampling = model.get_model_object("model_sampling")
    own = "model_sampling" not in model.object_patches and getattr(sampling, "shift", None) == SHIFT
    if scheduler == "simple" and own:
        return get_sigmas(steps, start=steps / total)
    return comfy.samplers.calculate_sigmas(sampling, scheduler, total)[-(steps + 1) :].cpu()


def empty_latent(width: int, height: int, batch: int, denoise: float) -> dict:
    """A LATENT to generate pictures of a size in pixels from; ValueError for a wrong size and for denoise below 1."""
    if denoise < 1:
        raise ValueError(f"denoise {denoise} needs a latent to start from: connect one (VAE Encode), or set it to 1")
    messages.check_pixels("width", width, messages.MAX_SIZE)
    messages.check_pixels("height", height, messages.MAX_SIZE)
    shape = (batch, LATENT_CHANNELS, height // 8, width // 8)
    return {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}


def advice(model: ZImagePatcher, cfg: float, negative: list | None) -> list[str]:
    """Hints for the node: the file seems made for the other preset, the negative prompt has no effect."""
    if negative is not None and cfg == 1 and not model.model_options.get("disable_cfg1_optimization"):
        lines = ["negative prompt: has no effect at cfg 1; set cfg above 1, or use Z-Image NAG"]
    else:
        lines = []
    info = model.model.diffusion_model.transformer.checkpoint
    variant = info.metadata.get("variant") or likely_variant(info.path)
    if (variant, cfg > 1) == ("base", False):
        lines.append(f"{info.path.name} seems to be Z-Image, not Turbo: preset base, with a negative prompt, suits it")
    return lines


def sample(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    negative: list | None,
    cfg: float,
    seed: int,
    steps: int,
    size: tuple[int, int, int],
    latent: dict | None,
    denoise: float,
    node_id: str | None,
    sampler: str = "euler",
    scheduler: str = "simple",
) -> dict:
    """LATENT of a sampler over `schedule` through ComfyUI's guider, as KSampler gives it.

    Without a latent it starts from noise of `size`: width, height, pictures. The node shows the plan first. ValueError
    for guidance (cfg above 1) without a negative prompt.
    """
    if cfg > 1 and negative is None:
        raise ValueError(f"cfg {cfg:g} needs a negative prompt: connect one, which may be empty, or set cfg to 1")
    if latent is None:
        latent = empty_latent(*size, denoise)
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
        pictures = len(samples) * (2 if cfg > 1 else 1)
        plan = describe_plan(model, 8 * samples.shape[-1], 8 * samples.shape[-2], pictures)
        messages.say("\n".join([plan, *advice(model, cfg, negative)]), node_id)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    if negative is None:
        negative = [[torch.zeros_like(cond), extra] for cond, extra in positive]
    sigmas = schedule(model, steps, denoise, scheduler)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    samples = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    check_finite(samples, "Z-Image, denoising", "a damaged model file, or a LoRA or its strength can cause this")
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**out, "samples": samples.to(comfy.model_management.intermediate_device())}
