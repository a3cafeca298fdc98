"""Nodes that steer what is generated beside a prompt: negative prompts without guidance, variety."""

from __future__ import annotations

from . import host
from .sampling import SEED


class ZImageNAG:
    """MODEL and a negative CONDITIONING -> MODEL."""

    DESCRIPTION = (
        "A negative prompt at cfg 1 (normalized attention guidance, NAG): attention goes away from it in every layer, "
        "at the cost of a second attention, not of a second run of the model. For this pack's MODEL."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "nag", "normalized attention guidance", "negative prompt", "turbo"]
    CATEGORY = "Z-Image INT4"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with NAG, for any sampler at cfg 1.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From the Z-Image INT4 Model Loader, with LoRAs or without."}),
                "negative": ("CONDITIONING", {"tooltip": "What to avoid: Z-Image Prompt or CLIP Text Encode."}),
                "scale": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 20.0,
                        "step": 0.1,
                        "tooltip": "How far to go from it; 0 is off. 0.5 to 1 suits quantized models. ComfyUI's "
                        "NAGuidance counts 1 more.",
                    },
                ),
                "tau": (
                    "FLOAT",
                    {
                        "default": 2.5,
                        "min": 1.0,
                        "max": 10.0,
                        "step": 0.1,
                        "advanced": True,
                        "tooltip": "How many times its usual strength attention may have.",
                    },
                ),
                "alpha": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "advanced": True,
                        "tooltip": "The share of the guided attention in the result.",
                    },
                ),
            }
        }

    def apply(self, model, negative, scale, tau=2.5, alpha=0.5):
        return (host.guidance.apply_nag(model, negative, scale, tau, alpha),)


class ZImageVariety:
    """CONDITIONING -> CONDITIONING whose first steps have noise of their own."""

    DESCRIPTION = (
        "Makes pictures of different seeds differ more: the first steps follow the prompt with noise on its features, "
        "the others the prompt as it is. Works on any Z-Image MODEL."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "variety", "seed variance", "diversity", "randomize prompt"]
    CATEGORY = "Z-Image INT4"
    FUNCTION = "vary"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("For a sampler's positive.",)

    @classmethod
    def INPUT_TYPES(cls):
        part = {"min": 0.05, "max": 1.0, "step": 0.05, "advanced": True}
        return {
            "required": {
                "conditioning": ("CONDITIONING", {"tooltip": "From Z-Image Prompt or CLIP Text Encode."}),
                "strength": (
                    "FLOAT",
                    {
                        "default": 4.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.5,
                        "tooltip": "Of the noise, to each token's own size; 0 is off, 2 to 8 is usual.",
                    },
                ),
                "seed": (
                    "INT",
                    {**SEED, "tooltip": "Of the noise on the first picture; the next one has the next seed."},
                ),
                "pictures": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "As the sampler's batch_size: noise for each."},
                ),
                "share": ("FLOAT", {**part, "default": 0.5, "tooltip": "Of the features that get noise."}),
                "until": (
                    "FLOAT",
                    {
                        **part,
                        "default": 0.5,
                        "tooltip": "The part of the way in which it works: 0.5 is half of it.",
                    },
                ),
            }
        }

    def vary(self, conditioning, strength, seed, pictures, share=0.5, until=0.5):
        return (host.guidance.vary(conditioning, strength, seed, pictures, share, until),)
