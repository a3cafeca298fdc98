"""The prompt node."""

from __future__ import annotations

from ..zimage_core.models.tokenizer import MAX_TOKENS
from . import host


class ZImagePromptEncode:
    """Prompt -> CONDITIONING."""

    DESCRIPTION = (
        "Turns a prompt into conditioning, in the chat template that Z-Image was made for. Plain sentences of up to "
        "512 tokens work best. The encoder leaves the GPU afterwards."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "prompt", "clip text encode", "text"]
    CATEGORY = "Z-Image INT4"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The prompt, for the sampler.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "From the Z-Image Text Encoder Loader, or Load CLIP with Qwen3-4B."}),
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "What to show, in words. Weights such as (red:1.2) mean nothing to Z-Image.",
                    },
                ),
            },
            "optional": {
                "max_tokens": (
                    "INT",
                    {
                        "default": MAX_TOKENS,
                        "min": 16,
                        "max": 1536,
                        "advanced": True,
                        "tooltip": "Where a prompt is cut; 512 is what Z-Image was trained with. CLIP Text Encode cuts "
                        "nothing.",
                    },
                ),
            },
        }

    def encode(self, clip, prompt, max_tokens=MAX_TOKENS):
        return (host.clip.encode_prompt(clip, prompt, max_tokens),)
