"""The ComfyUI node classes of Z-Image INT4. Ids are for ever: saved workflows hold them."""

from .conditioning import ZImagePromptEncode
from .controlnet import ZImageControlNetApply, ZImageControlNetLoader
from .guidance import ZImageNAG, ZImageVariety
from .host import needs, replace
from .loaders import ZImageINT4ModelLoader, ZImageTextEncoderLoader, ZImageVAELoader
from .lora import ZImageLoraLoader, ZImageLoraStack, ZImageLoraSwitches
from .quantize import ZImageCompare, ZImageQuantize
from .sampling import ZImageSampler
from .size import ZImageSize
from .vae import ZImageVAEDecode

NODES = {
    "ZImageINT4ModelLoader": ZImageINT4ModelLoader,
    "ZImageTextEncoderLoader": ZImageTextEncoderLoader,
    "ZImagePromptEncode": ZImagePromptEncode,
    "ZImageSampler": ZImageSampler,
    "ZImageLoraLoader": ZImageLoraLoader,
    "ZImageVAELoader": ZImageVAELoader,
    "ZImageVAEDecode": ZImageVAEDecode,
    "ZImageLoraStack": ZImageLoraStack,
    "ZImageQuantize": ZImageQuantize,
    "ZImageCompare": ZImageCompare,
    "ZImageControlNetLoader": ZImageControlNetLoader,
    "ZImageControlNetApply": ZImageControlNetApply,
    "ZImageLoraSwitches": ZImageLoraSwitches,
    "ZImageSize": ZImageSize,
    "ZImageNAG": ZImageNAG,
    "ZImageVariety": ZImageVariety,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "ZImageINT4ModelLoader": "Z-Image INT4 Model Loader",
    "ZImageTextEncoderLoader": "Z-Image Text Encoder Loader",
    "ZImagePromptEncode": "Z-Image Prompt",
    "ZImageSampler": "Z-Image Sampler",
    "ZImageLoraLoader": "Z-Image LoRA Loader",
    "ZImageVAELoader": "Z-Image VAE Loader",
    "ZImageVAEDecode": "Z-Image VAE Decode",
    "ZImageLoraStack": "Z-Image LoRA Stack",
    "ZImageQuantize": "Z-Image Quantize to INT4",
    "ZImageCompare": "Z-Image Compare",
    "ZImageControlNetLoader": "Z-Image ControlNet Loader",
    "ZImageControlNetApply": "Apply Z-Image ControlNet",
    "ZImageLoraSwitches": "Z-Image LoRA Switches",
    "ZImageSize": "Z-Image Size",
    "ZImageNAG": "Z-Image NAG",
    "ZImageVariety": "Z-Image Variety",
}

NODE_CLASS_MAPPINGS = needs.provided(NODES, NODE_DISPLAY_NAME_MAPPINGS)
replace.register()
