"""The sampler node."""

from __future__ import annotations

from .host.messages import CELL
from .host.sampling import MAX_SIZE, sample

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


class ZImageSampler:
    """MODEL and CONDITIONING -> LATENT."""

    DESCRIPTION = (
        "Generates a picture in 8 steps: Z-Image Turbo's own schedule and no guidance, so there is no negative prompt. "
        "The same as KSampler with euler, simple, cfg 1. Connect a latent for image to image."
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
                        "default": 0,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "control_after_generate": True,
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
            "optional": IMAGE_TO_IMAGE,
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def sample(self, model, positive, seed, steps, width, height, batch_size, latent=None, denoise=1.0, unique_id=None):
        args = (model, positive, seed, steps, width, height, batch_size, latent, denoise)
        return (sample(*args, unique_id),)
