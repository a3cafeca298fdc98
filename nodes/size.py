"""The size node: width and height of an aspect ratio."""

from __future__ import annotations

from .host import messages
from .host.messages import CELL

ASPECTS = ("1:1", "5:4", "4:3", "3:2", "16:9", "21:9", "4:5", "3:4", "2:3", "9:16", "9:21")
MEGAPIXEL = 2**20  # that of 1024 x 1024


class ZImageSize:
    """Aspect ratio and megapixels -> width and height."""

    DESCRIPTION = (
        "Width and height of a picture by its aspect ratio and megapixels, in the multiples of 16 that Z-Image takes: "
        "1 megapixel is 1024 x 1024, which Turbo was made for."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "size", "aspect ratio", "resolution", "width height", "preset", "megapixels"]
    CATEGORY = "Z-Image INT4"
    FUNCTION = "size"
    RETURN_TYPES = ("INT", "INT")
    RETURN_NAMES = ("width", "height")
    OUTPUT_TOOLTIPS = ("Pixels, for the Z-Image Sampler or an empty latent.", "Likewise.")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "aspect_ratio": (
                    list(ASPECTS),
                    {"default": ASPECTS[0], "tooltip": "Width to height: 16:9 lies, 9:16 stands."},
                ),
                "megapixels": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.01,
                        "max": 4.0,
                        "step": 0.01,
                        "round": 0.0001,
                        "tooltip": "Millions of pixels, of 1024 x 1024: 1 is usual, up to 2 works. The demo model "
                        "takes up to 0.25.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def size(self, aspect_ratio, megapixels, unique_id=None):
        across, down = map(int, aspect_ratio.split(":"))
        edge = (megapixels * MEGAPIXEL / (across * down)) ** 0.5
        width, height = (max(CELL, round(edge * part / CELL) * CELL) for part in (across, down))
        messages.say(f"{width} x {height}", unique_id)
        return width, height
