"""The sampler node."""

from __future__ import annotations

from ..zimage_core.models.config import PRESETS
from . import host
from .host.messages import CELL, MAX_SIZE

SEED = {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}
IMAGE_TO_IMAGE: dict[str, tuple] = {
    "latent": (
        "LATENT",
        {
            "tooltip": "A picture to start from (VAE Encode), with a mask if only part of it is to change "
            "(Set Latent Noise Mask), or an empty latent. Its size wins over width and height."
        },
    ),
    "denoise": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.01,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "How much of the connected latent is generated anew: 1 all, 0.5 keeps the composition. "
            "Leave at 1 without a latent.",
        },
    ),
}
GUIDANCE: dict[str, tuple] = {
    "negative": (
        "CONDITIONING",
        {"tooltip": "What to avoid, where cfg is above 1: Z-Image Prompt or CLIP Text Encode, the text may be empty."},
    ),
    "cfg": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 1.0,
            "max": 30.0,
            "step": 0.1,
            "tooltip": "1 is no guidance, what Turbo was made for. In diffusers' terms guidance is 1 less: "
            "Z-Image's guidance 4 is 5 here. Above 1 costs twice the time.",
        },
    ),
    "preset": (
        ["as set", *PRESETS],
        {
            "default": "as set",
            "tooltip": "turbo: 8 steps, cfg 1. base (Z-Image): 30 steps, cfg 5. Both replace the widgets' values.",
        },
    ),
}


def sampling() -> dict[str, tuple]:
    """The inputs for ComfyUI's own samplers and schedulers, those that other packs have added among them."""
    about = "ComfyUI's own: euler is what Turbo was made for, res_multistep what ComfyUI's template has."
    spaced = "How the steps are spaced; simple is Turbo's own."
    return {
        "sampler_name": (host.sampling.SAMPLERS, {"default": "euler", "advanced": True, "tooltip": about}),
        "scheduler": (host.sampling.SCHEDULERS, {"default": "simple", "advanced": True, "tooltip": spaced}),
    }


class ZImageSampler:
    """MODEL and CONDITIONING -> LATENT."""

    DESCRIPTION = (
        "Generates a picture: Z-Image Turbo's own schedule of 8 steps and no guidance, or Z-Image's 30 with a negative "
        "prompt. The same as KSampler with euler, simple. Connect a latent for image to image."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "ksampler", "sampler", "img2img", "turbo", "generate"]
    CATEGORY = "Z-Image INT4"
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The finished latent, for Z-Image VAE Decode.",)

    @classmethod
    def INPUT_TYPES(cls):
        size = {"default": 1024, "min": CELL, "max": MAX_SIZE, "step": CELL}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From the Z-Image INT4 Model Loader, or any other Z-Image MODEL."}),
                "positive": ("CONDITIONING", {"tooltip": "From Z-Image Prompt or CLIP Text Encode."}),
                "seed": (
                    "INT",
                    {
                        **SEED,
                        "tooltip": "The starting noise. The same seed, size and settings give the same picture.",
                    },
                ),
                "steps": (
                    "INT",
                    {
                        "default": 8,
                        "min": 1,
                        "max": 100,
                        "tooltip": "How many times the model runs. 8 is what Turbo was made for.",
                    },
                ),
                "width": (
                    "INT",
                    {**size, "tooltip": "Pixels, a multiple of 16. Ignored where a latent is connected."},
                ),
                "height": (
                    "INT",
                    {**size, "tooltip": "Pixels, a multiple of 16. Ignored where a latent is connected."},
                ),
                "batch_size": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 64,
                        "tooltip": "Pictures at a time. Ignored where a latent is connected.",
                    },
                ),
            },
            "optional": IMAGE_TO_IMAGE | GUIDANCE | sampling(),
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def sample(
        self,
        model,
        positive,
        seed,
        steps,
        width,
        height,
        batch_size,
        latent=None,
        denoise=1.0,
        negative=None,
        cfg=1.0,
        preset="as set",
        sampler_name="euler",
        scheduler="simple",
        unique_id=None,
    ):
        if preset in PRESETS:
            steps, guidance = PRESETS[preset]
            cfg = guidance + 1
        size, how = (width, height, batch_size), (sampler_name, scheduler)
        sizes = (size, latent, denoise, unique_id, *how)
        return (host.sampling.sample(model, positive, negative, cfg, seed, steps, *sizes),)
