"""The LoRA node."""

from __future__ import annotations

from . import host


class ZImageLoraLoader:
    """MODEL -> MODEL with a LoRA."""

    DESCRIPTION = (
        "Applies a LoRA to the model beside its INT4 weights, which stay as they are. Chain several of these nodes to "
        "stack LoRAs; what did not match is shown on the node."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "lora", "load lora", "style", "lokr", "loha"]
    CATEGORY = "Z-Image INT4/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the LoRA; the one that came in stays without it.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From the Z-Image INT4 Model Loader or another LoRA loader."}),
                "lora_name": (
                    host.choices("loras", "lora"),
                    {"tooltip": "A .safetensors file in models/loras that was trained for Z-Image."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.01,
                        "tooltip": "How strongly it acts: 0 is as if it were not there, negative turns it round.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name):
        return host.checked(host.check_lora, lora_name)

    def load(self, model, lora_name, strength, unique_id=None):
        return (host.add_lora(model, lora_name, strength, unique_id),)
