"""The ControlNet nodes: a loader, and what applies it to a MODEL."""

from __future__ import annotations

from . import host
from .host import messages
from .host.files import check_control, choices
from .loaders import BACKENDS, CATEGORY, PRECISIONS


class ZImageControlNetLoader:
    """Loads a Fun ControlNet for Z-Image."""

    DESCRIPTION = (
        "Loads a ControlNet for Z-Image (Fun Union, Tile or lite, version 1 to 2.1), in BF16 or in 4 bits as "
        "`zimage quantize` writes it. The version is told from the file."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "controlnet", "union", "tile", "inpaint", "canny", "pose", "model patch"]
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("ZIMAGE_CONTROL",)
    RETURN_NAMES = ("control",)
    OUTPUT_TOOLTIPS = ("The ControlNet, for Apply Z-Image ControlNet.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "control_name": (
                    choices("model_patches", "controlnet"),
                    {"tooltip": "A .safetensors file in models/model_patches, or the demo's own ControlNet."},
                ),
                "backend": (
                    list(BACKENDS),
                    {"default": "auto", "tooltip": "What multiplies 4-bit weights, as in the model loader."},
                ),
                "precision": (
                    list(PRECISIONS),
                    {"default": "auto", "tooltip": "Bits of weights and activations, as in the model loader."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, control_name):
        return messages.checked(check_control, control_name)

    def load(self, control_name, backend, precision, unique_id=None):
        control = host.controlnet.load_control(control_name, BACKENDS[backend], precision)
        messages.say(host.controlnet.describe_control(control_name, control), unique_id)
        return (control,)


class ZImageControlNetApply:
    """MODEL -> MODEL with a ControlNet and its pictures."""

    DESCRIPTION = (
        "Has a ControlNet guide the model by a control picture (outlines, depth, a pose), or repaint a masked part of "
        "a picture. Works on the Z-Image INT4 Model Loader's MODEL and on Load Diffusion Model's. Chain several of "
        "these nodes for several ControlNets."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "controlnet", "apply controlnet", "inpaint", "union", "tile"]
    CATEGORY = "Z-Image INT4"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the ControlNet; the one that came in stays without it.",)

    @classmethod
    def INPUT_TYPES(cls):
        part = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A Z-Image MODEL, this pack's or ComfyUI's own."}),
                "control": ("ZIMAGE_CONTROL", {"tooltip": "From the Z-Image ControlNet Loader."}),
                "vae": ("VAE", {"tooltip": "Encodes the pictures; the one that decodes the result."}),
                "strength": (
                    "FLOAT",
                    {
                        "default": 0.8,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.01,
                        "tooltip": "How strongly it acts: 0 not at all; 0.6 to 1 is usual.",
                    },
                ),
                "start": ("FLOAT", {**part, "default": 0.0, "tooltip": "From which part of the way on it acts."}),
                "end": ("FLOAT", {**part, "default": 1.0, "tooltip": "Until which part of the way it acts."}),
            },
            "optional": {
                "image": (
                    "IMAGE",
                    {"tooltip": "The control picture, from Canny or another preprocessor; stretched to the latent."},
                ),
                "inpaint_image": ("IMAGE", {"tooltip": "The picture of which a part is repainted; needs a mask."}),
                "mask": ("MASK", {"tooltip": "White where inpaint_image is repainted."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def apply(
        self,
        model,
        control,
        vae,
        strength,
        start,
        end,
        image=None,
        inpaint_image=None,
        mask=None,
        unique_id=None,
    ):
        args = (image, inpaint_image, mask, strength, start, end, unique_id)
        return (host.controlnet.apply_control(model, control, vae, *args),)
