"""The LoRA nodes: one LoRA, or several."""

from __future__ import annotations

from . import host
from .host import messages
from .host.files import NO_LORA, check_lora, choices

SLOTS = (1, 2, 3, 4)
SWITCHES = 10
NO_SWITCHED = "None"  # as in the stacks of nunchaku's packs, whose workflows bring it
MODEL = ("MODEL", {"tooltip": "From the Z-Image INT4 Model Loader or another LoRA loader."})
STRENGTH = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}


class ZImageLoraLoader:
    """MODEL -> MODEL with a LoRA."""

    DESCRIPTION = (
        "Applies a LoRA to the model beside its INT4 weights, which stay as they are. Chain several of these nodes to "
        "stack LoRAs; what did not match is shown on the node."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "lora", "load lora", "nunchaku lora", "style", "lokr", "loha"]
    CATEGORY = "Z-Image INT4/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the LoRA; the one that came in stays without it.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": MODEL,
                "lora_name": (
                    choices("loras", "lora"),
                    {"tooltip": "A .safetensors file in models/loras that was trained for Z-Image."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        **STRENGTH,
                        "tooltip": "How strongly it acts: 0 is as if it were not there, negative turns it round.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name):
        return messages.checked(check_lora, lora_name)

    def load(self, model, lora_name, strength, unique_id=None):
        return (host.model.add_loras(model, [(lora_name, strength)], unique_id),)


class ZImageLoraStack:
    """MODEL -> MODEL with up to four LoRAs."""

    DESCRIPTION = (
        "Applies up to four LoRAs to the model, each with its own strength: the same as a chain of Z-Image LoRA "
        "Loaders. What did not match is shown on the node."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "lora", "lora stack", "multi lora", "load lora", "nunchaku lora", "style"]
    CATEGORY = "Z-Image INT4/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the LoRAs; the one that came in stays without them.",)

    @classmethod
    def INPUT_TYPES(cls):
        names = [NO_LORA, *choices("loras", "lora")]
        inputs: dict[str, tuple] = {"model": MODEL}
        for i in SLOTS:
            inputs[f"lora_{i}"] = (
                names,
                {
                    "default": NO_LORA,
                    "tooltip": "A .safetensors file in models/loras that was trained for Z-Image; none leaves the "
                    "slot empty.",
                },
            )
            inputs[f"strength_{i}"] = (
                "FLOAT",
                {**STRENGTH, "tooltip": f"How strongly lora_{i} acts: 0 not at all, negative turns it round."},
            )
        return {"required": inputs, "hidden": {"unique_id": "UNIQUE_ID"}}

    def load(
        self, model, lora_1, strength_1, lora_2, strength_2, lora_3, strength_3, lora_4, strength_4, unique_id=None
    ):
        stack = [(lora_1, strength_1), (lora_2, strength_2), (lora_3, strength_3), (lora_4, strength_4)]
        return (host.model.add_loras(model, stack, unique_id),)


class ZImageLoraSwitches:
    """MODEL -> MODEL with up to ten LoRAs, each with a switch; a CLIP passes through."""

    DESCRIPTION = (
        "Applies up to ten LoRAs to the model, each with a strength and a switch of its own. Workflows with nunchaku's "
        "Z-Image LoRA stacks use this node in their place; a CLIP passes through unchanged."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "lora", "lora stack", "power lora loader", "nunchaku lora", "load lora"]
    CATEGORY = "Z-Image INT4/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP")
    RETURN_NAMES = ("model", "clip")
    OUTPUT_TOOLTIPS = ("The model with the LoRAs; the one that came in stays without them.", "The CLIP that came in.")

    @classmethod
    def INPUT_TYPES(cls):
        names = [NO_SWITCHED, *choices("loras", "lora")]
        optional: dict[str, tuple] = {"clip": ("CLIP", {"tooltip": "Passed through unchanged; may stay unconnected."})}
        for i in range(1, SWITCHES + 1):
            optional[f"enabled_{i}"] = ("BOOLEAN", {"default": True, "tooltip": f"Whether lora_name_{i} is applied."})
            optional[f"lora_name_{i}"] = (
                names,
                {
                    "default": NO_SWITCHED,
                    "tooltip": "A .safetensors file in models/loras that was trained for Z-Image; None leaves the "
                    "slot empty.",
                },
            )
            optional[f"lora_strength_{i}"] = (
                "FLOAT",
                {
                    **STRENGTH,
                    "min": -100.0,
                    "max": 100.0,
                    "tooltip": f"How strongly lora_name_{i} acts: 0 not at all, negative turns it round.",
                },
            )
        return {
            "required": {
                "model": MODEL,
                "lora_count": (
                    "INT",
                    {
                        "default": 3,
                        "min": 1,
                        "max": SWITCHES,
                        "tooltip": "How many slots are used and shown.",
                    },
                ),
            },
            "optional": optional,
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def load(self, model, lora_count, clip=None, unique_id=None, **slots):
        stack = [
            (slots.get(f"lora_name_{i}", NO_SWITCHED), slots.get(f"lora_strength_{i}", 1.0))
            for i in range(1, lora_count + 1)
            if slots.get(f"enabled_{i}", True)
        ]
        return host.model.add_loras(model, [slot for slot in stack if slot[0] != NO_SWITCHED], unique_id), clip
