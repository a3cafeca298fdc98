"""Nodes that load files: the INT4 model, the text encoder, the VAE."""

from __future__ import annotations

from . import host
from .host import messages
from .host.files import DEMO, check_encoder, check_model, check_vae, choices

BACKENDS = {"auto": "auto", "nunchaku": "nunchaku", "comfy-kitchen": "kitchen", "triton": "triton", "torch": "torch"}
PRECISIONS = ("auto", "w4a16", "w4a8", "w4a4", "w8a8")
CATEGORY = "Z-Image INT4/loaders"


class ZImageINT4ModelLoader:
    """Loads a Z-Image transformer as MODEL."""

    DESCRIPTION = (
        "Loads a Z-Image Turbo model quantized to 4 bits (SVDQuant INT4, any rank), or in BF16, as a MODEL for any "
        "sampler. The bundled demo needs no download."
    )
    SEARCH_ALIASES = [
        "z-image",
        "zimage",
        "int4",
        "svdquant",
        "svdq",
        "nunchaku",
        "awq",
        "gguf",
        "dit loader",
        "turbo",
        "load diffusion model",
        "unet",
    ]
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for the Z-Image Sampler, KSampler and every other node that takes a MODEL.",)

    @classmethod
    def INPUT_TYPES(cls):
        names = choices("diffusion_models", "model")
        return {
            "required": {
                "model_name": (
                    names,
                    {
                        "default": next((name for name in names if "svdq" in name.lower()), DEMO),
                        "tooltip": "A .safetensors file in models/diffusion_models: svdq-int4_r256-z-image-turbo "
                        "(or r32, r128) or a BF16 Z-Image; or the small demo model that comes with the pack.",
                    },
                ),
                "backend": (
                    list(BACKENDS),
                    {
                        "default": "auto",
                        "tooltip": "What multiplies the 4-bit weights. auto takes the fastest that runs here; a named "
                        "one fails with its reason where it cannot run; torch runs everywhere.",
                    },
                ),
                "precision": (
                    list(PRECISIONS),
                    {
                        "default": "auto",
                        "tooltip": "Bits of weights and activations. w4a16 is closest to the file, w4a8 and w4a4 can "
                        "be faster; auto never takes one with a larger error than w4a4. w8a8: FP8 and INT8 files "
                        "in 8 bits, as auto takes them where that is faster.",
                    },
                ),
            },
            "optional": {
                "vram_budget": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1024.0,
                        "step": 0.1,
                        "round": 0.01,
                        "advanced": True,
                        "tooltip": "GiB of GPU memory that the model may take, weights and activations "
                        "together: blocks that do not fit wait in RAM, the picture stays the same. 0 takes what "
                        "ComfyUI gives.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name):
        return messages.checked(check_model, model_name)

    def load(self, model_name, backend, precision, vram_budget=0.0, unique_id=None):
        model = host.model.load_model(model_name, BACKENDS[backend], precision, vram_budget)
        messages.say(f"{host.model.describe_model(model)}\n{host.model.try_plan(model, 1024, 1024)}", unique_id)
        return (model,)


class ZImageTextEncoderLoader:
    """Loads Qwen3 as CLIP."""

    DESCRIPTION = (
        "Loads Z-Image's text encoder (Qwen3-4B) as a CLIP: one .safetensors file, or a Hugging Face folder, or the "
        "demo's own small encoder."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "qwen3", "qwen", "clip", "text encoder", "load clip", "gguf"]
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("CLIP",)
    RETURN_NAMES = ("clip",)
    OUTPUT_TOOLTIPS = ("The text encoder, for Z-Image Prompt or CLIP Text Encode.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "encoder_name": (
                    choices("text_encoders", "text_encoder", folders_too=True),
                    {
                        "tooltip": "qwen_3_4b.safetensors in models/text_encoders, or a folder there with config.json "
                        "and its shards; the demo model needs the bundled demo encoder."
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, encoder_name):
        return messages.checked(check_encoder, encoder_name)

    def load(self, encoder_name, unique_id=None):
        clip = host.clip.load_clip(encoder_name)
        messages.say(host.clip.describe_encoder(clip), unique_id)
        return (clip,)


class ZImageVAELoader:
    """Loads an autoencoder as VAE."""

    DESCRIPTION = "Loads the VAE of Z-Image (the same as Flux's) in either key style, or the demo's own small one."
    SEARCH_ALIASES = ["z-image", "zimage", "vae", "ae", "autoencoder", "load vae"]
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The VAE, for Z-Image VAE Decode, VAE Decode and VAE Encode.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "vae_name": (
                    choices("vae", "vae"),
                    {
                        "tooltip": "ae.safetensors or a diffusers VAE in models/vae; the demo model needs the bundled "
                        "demo VAE."
                    },
                ),
                "dtype": (
                    ["auto", "bf16", "fp32"],
                    {
                        "default": "auto",
                        "tooltip": "auto is ComfyUI's own choice for this machine. There is no fp16: it gives black "
                        "pictures with this VAE.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name):
        return messages.checked(check_vae, vae_name)

    def load(self, vae_name, dtype, unique_id=None):
        vae = host.vae.load_vae(vae_name, dtype)
        messages.say(host.vae.describe_vae(vae, 1024, 1024), unique_id)
        return (vae,)
