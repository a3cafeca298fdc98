"""Nodes around quantizing: make an INT4 file, and put pictures of several models side by side."""

from __future__ import annotations

from .host import messages
from .host.files import NO_LORA, choices
from .host.messages import CELL
from .host.quantize import MAX_SIZE, check_source, compare, quantize, sources

CATEGORY = "Z-Image INT4/quantize"
RANKS = ("256", "128", "32")
SLOTS = ("a", "b", "c", "d")
CALIBRATION: dict[str, tuple] = {
    "clip": ("CLIP", {"tooltip": "To calibrate with: Z-Image Text Encoder Loader, or Load CLIP's Qwen3."}),
    "prompts": (
        "STRING",
        {
            "multiline": True,
            "default": "",
            "advanced": True,
            "tooltip": "Prompts to calibrate with, one a line; those of a fine-tune's own kind suit it "
            "best. Empty: 16 built-in ones of many kinds.",
        },
    ),
    "size": (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": MAX_SIZE,
            "step": CELL,
            "advanced": True,
            "tooltip": "Pixels of an edge of the pictures to calibrate on, a multiple of 16; 0 takes 512, "
            "or 256 on a CPU.",
        },
    ),
}


class ZImageQuantize:
    """BF16 checkpoint -> INT4 file in `diffusion_models`."""

    DESCRIPTION = (
        "Writes an SVDQuant INT4 file from a BF16 Z-Image model, such as a fine-tune, with a LoRA merged if you like. "
        "Connect a CLIP to calibrate: it takes longer, with a smaller error. An interrupted run is resumed."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "quantize", "int4", "convert", "merge lora"]
    CATEGORY = CATEGORY
    FUNCTION = "quantize"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file_name",)
    OUTPUT_TOOLTIPS = ("The file's name in models/diffusion_models; press R to see it in the model loader.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model_name": (
                    sources(),
                    {
                        "tooltip": "A Z-Image in models/diffusion_models, in BF16 or anything of 8 bits or more (fewer "
                        "are rounded twice): .safetensors, .gguf, or a folder with its shards; or the demo's BF16 file."
                    },
                ),
                "rank": (
                    list(RANKS),
                    {
                        "default": RANKS[0],
                        "tooltip": "Of the part that is kept in 16 bits: a higher one is closer to the original, and "
                        "the file is larger (4.5, 4.0 and 3.6 GB for Turbo).",
                    },
                ),
                "calibrate": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Quantize for the activations of generated pictures, block by block; needs a clip. "
                        "Off: from the weights alone, quicker and with a larger error.",
                    },
                ),
                "lora_name": (
                    [NO_LORA, *choices("loras", "lora")],
                    {"default": NO_LORA, "tooltip": "A LoRA to make part of the weights first, or none."},
                ),
                "lora_strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.01,
                        "tooltip": "How strongly the LoRA is merged: 0 not at all, negative turns it round.",
                    },
                ),
                "output_name": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "File name in models/diffusion_models. Empty: svdq-int4_rRANK-MODEL, with a number "
                        "where that exists. No file is overwritten.",
                    },
                ),
            },
            "optional": CALIBRATION,
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name):
        return messages.checked(check_source, model_name)

    def quantize(
        self,
        model_name,
        rank,
        calibrate,
        lora_name,
        lora_strength,
        output_name,
        clip=None,
        prompts="",
        size=0,
        unique_id=None,
    ):
        if calibrate and clip is None:
            raise ValueError("to calibrate it needs a text encoder: connect a CLIP, or switch calibrate off")
        stack = [(lora_name, lora_strength)]
        name = quantize(
            model_name, int(rank), output_name, clip if calibrate else None, prompts, size, stack, unique_id
        )
        return {"ui": {"text": [name]}, "result": (name,)}


class ZImageCompare:
    """Two to four IMAGE batches -> one labelled IMAGE."""

    DESCRIPTION = (
        "Puts pictures of two to four models side by side, labelled, with PSNR and SSIM to the first under each: "
        "generate them with the same seed and prompt. Works with pictures from any model."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "compare", "side by side", "psnr", "ssim", "quality", "xy plot", "grid"]
    CATEGORY = CATEGORY
    FUNCTION = "compare"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("sheet", "scores")
    OUTPUT_TOOLTIPS = (
        "A row for each picture of a batch, a column for each input.",
        "The same numbers as text, a line for each picture.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        pictures = {
            "a": "The reference, such as the BF16 model's: one picture or a batch.",
            "b": "The same seed and prompt from another model, as many and as large.",
            "c": "Likewise from a third model.",
            "d": "Likewise from a fourth model.",
        }
        inputs = {f"image_{slot}": ("IMAGE", {"tooltip": pictures[slot]}) for slot in SLOTS}
        inputs |= {
            f"label_{slot}": ("STRING", {"default": slot.upper(), "tooltip": f"The title above image_{slot}."})
            for slot in SLOTS
        }
        optional = {name: inputs.pop(name) for name in ("image_c", "image_d", "label_c", "label_d")}
        return {"required": inputs, "optional": optional, "hidden": {"unique_id": "UNIQUE_ID"}}

    def compare(
        self,
        image_a,
        image_b,
        label_a,
        label_b,
        image_c=None,
        image_d=None,
        label_c="C",
        label_d="D",
        unique_id=None,
    ):
        given = ((label_a, image_a), (label_b, image_b), (label_c, image_c), (label_d, image_d))
        labels, batches = zip(*((label, image) for label, image in given if image is not None))
        return compare(list(labels), list(batches), unique_id)
