"""The decoder node."""

from __future__ import annotations

from . import host


class ZImageVAEDecode:
    """LATENT -> IMAGE."""

    DESCRIPTION = "Turns a latent into pictures. Works with the Z-Image VAE Loader's VAE and with Load VAE's."
    SEARCH_ALIASES = ["z-image", "zimage", "vae decode", "decode", "latent to image"]
    CATEGORY = "Z-Image INT4"
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The pictures, for Save Image or Preview Image.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "vae": ("VAE", {"tooltip": "From the Z-Image VAE Loader or Load VAE."}),
                "latent": ("LATENT", {"tooltip": "From the Z-Image Sampler or any other sampler."}),
                "tiling": (
                    ["auto", "on", "off"],
                    {
                        "default": "auto",
                        "tooltip": "Decode in overlapping tiles: on saves memory on large pictures; auto does it where "
                        "the picture cannot fit; off leaves it to ComfyUI, which tiles after running out of memory.",
                    },
                ),
            }
        }

    def decode(self, vae, latent, tiling):
        return (host.vae.decode(vae, latent, tiling),)
