"""The example workflows and the blueprints, as `make.py` writes them: nodes, links, places, groups, notes.

Wires run from left to right, and none behind a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

DEMO = "bundled demo"


class Part(NamedTuple):
    """Where a model file is, and belongs."""

    folder: str
    folder_url: str
    size: str


HUB = "https://huggingface.co/"
TURBO = "svdq-int4_r256-z-image-turbo.safetensors"
BASE = "z_image_bf16.safetensors"
QWEN = "qwen_3_4b.safetensors"
VAE = "ae.safetensors"
UNION = "Z-Image-Turbo-Fun-Controlnet-Union.safetensors"
LOTUS = "lotus-depth-d-v1-1.safetensors"
LOTUS_VAE = "vae-ft-mse-840000-ema-pruned.safetensors"
ESRGAN = "RealESRGAN_x4plus.safetensors"
COMFY = f"{HUB}Comfy-Org/z_image_turbo/resolve/main/split_files/"
PARTS = {
    TURBO: Part("diffusion_models", f"{HUB}nunchaku-ai/nunchaku-z-image-turbo/resolve/main/", "4.5 GB"),
    QWEN: Part("text_encoders", f"{COMFY}text_encoders/", "8 GB"),
    VAE: Part("vae", f"{COMFY}vae/", "335 MB"),
    BASE: Part("diffusion_models", f"{HUB}Comfy-Org/z_image/resolve/main/split_files/diffusion_models/", "12.3 GB"),
    UNION: Part("model_patches", f"{HUB}alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union/resolve/main/", "3.1 GB"),
    LOTUS: Part("diffusion_models", f"{HUB}Comfy-Org/lotus/resolve/main/", "1.7 GB"),
    LOTUS_VAE: Part("vae", f"{HUB}stabilityai/sd-vae-ft-mse-original/resolve/main/", "335 MB"),
    ESRGAN: Part("upscale_models", f"{HUB}Comfy-Org/Real-ESRGAN_repackaged/resolve/main/", "64 MB"),
}


@dataclass
class N:
    """A node: its place (column, y), and its inputs: values, or (node, output) for a link."""

    id: int
    type: str
    at: tuple[int, int]
    inputs: dict = field(default_factory=dict)
    title: str | None = None


@dataclass
class Graph:
    """A workflow: {title of a group: its nodes}, with a note to its left."""

    title: str
    note: str
    groups: dict[str, list[N]]

    @property
    def nodes(self) -> list[N]:
        return [node for nodes in self.groups.values() for node in nodes]


@dataclass
class Blueprint:
    """A subgraph: its inputs as (name, node, that node's input), and the node whose first output is its own."""

    name: str
    description: str
    groups: dict[str, list[N]]
    inputs: list[tuple[str, int, str]]
    output: int


def models(*more: N, model: str = DEMO, encoder: str = DEMO, vae: str = DEMO, **options) -> list[N]:
    """The three loaders, nodes 1 to 3."""
    return [
        N(1, "ZImageINT4ModelLoader", (0, 0), {"model_name": model, **options}),
        N(2, "ZImageTextEncoderLoader", (0, 390), {"encoder_name": encoder}),
        N(3, "ZImageVAELoader", (0, 800), {"vae_name": vae}),
        *more,
    ]


def prompt(number: int, column: int, text: str, y: int = 390) -> N:
    return N(number, "ZImagePromptEncode", (column, y), {"clip": (2, 0), "prompt": text})


def sampler(number: int, column: int, positive: int, model: tuple[int, int] = (1, 0), y: int = 0, **inputs) -> N:
    inputs = {"seed": 1, "width": 256, "height": 256, **inputs}
    return N(number, "ZImageSampler", (column, y), {"model": model, "positive": (positive, 0), **inputs})


def decoded(number: int, column: int, latent: int, y: int = 800) -> N:
    return N(number, "ZImageVAEDecode", (column, y), {"vae": (3, 0), "latent": (latent, 0)})


def saved(number: int, column: int, images: int, prefix: str, y: int = 200) -> N:
    return N(number, "SaveImage", (column, y), {"images": (images, 0), "filename_prefix": prefix})


def shape(first: int, y: int, ground: int, colour: int, edge: int, x: int, top: int, lower: int = 0) -> list[N]:
    """A coloured square on a ground of 256 x 256, nodes `first` to `first` + 2, the last of which gives it."""
    return [
        N(first, "EmptyImage", (0, y), {"width": 256, "height": 256, "color": ground}, "Ground"),
        N(first + 1, "EmptyImage", (0, y + 190), {"width": edge, "height": edge, "color": colour}, "Square"),
        N(
            first + 2,
            "ImageCompositeMasked",
            (1, y + lower),
            {"destination": (first, 0), "source": (first + 1, 0), "x": x, "y": top},
        ),
    ]


def files(*names: str) -> str:
    """Links to model files, by folder."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(PARTS[name].folder, []).append(
            f"- [{name}]({PARTS[name].folder_url}{name}) ({PARTS[name].size})"
        )
    return "\n\n".join(f"**{folder}**\n" + "\n".join(lines) for folder, lines in folders.items())


FOR_REAL = (
    "\n\nWith the demo model this runs without downloads. For real pictures choose Z-Image Turbo's files in the "
    "loaders (links in *Z-Image text to image*) and about 1024 x 1024."
)
OUTLINE = "Your picture: Load Image can take its place"

TEMPLATES = {
    "Z-Image demo": Graph(
        "Demo",
        "## Try it: no downloads\n\nPress **Run**. The small demo model that comes with the pack generates coloured "
        "shapes and letters at 256 x 256 in a few seconds, on any machine.\n\nIt knows ten shapes, twelve colours, "
        "fills, sizes, places, numbers, backgrounds, capital letters and digits, from 128 to 512 pixels, for example:"
        "\n\n- `a striped red heart on the left and a small blue crescent on the right, on a white background`\n\nFor "
        "real pictures open *Z-Image text to image* from this pack's templates.",
        {
            "Models": models(),
            "Prompt": [
                prompt(4, 1, "three small yellow stars before a horizon between blue sky and green ground"),
            ],
            "Generate": [sampler(5, 2, 4)],
            "Picture": [decoded(6, 3, 5), saved(7, 4, 6, "z-image-demo")],
        },
    ),
    "Z-Image text to image": Graph(
        "Text to image",
        "## Files\n\nPut each file into its folder under `ComfyUI/models`, then press **R**.\n\n"
        + files(TURBO, QWEN, VAE)
        + "\n\nRank 256 is the closest to the original; r128 and r32 of the same repository are smaller.\n\n"
        "*Z-Image Size* has the aspect ratios.",
        {
            "Models": models(model=TURBO, encoder=QWEN, vae=VAE),
            "Prompt": [
                prompt(
                    4,
                    1,
                    "A small wooden boat on a calm mountain lake at sunrise, mist over the water, pine forest behind, "
                    "photograph",
                )
            ],
            "Size": [N(8, "ZImageSize", (1, 100))],
            "Generate": [sampler(5, 2, 4, width=(8, 0), height=(8, 1))],
            "Picture": [decoded(6, 3, 5), saved(7, 4, 6, "z-image")],
        },
    ),
    "Z-Image base": Graph(
        "Z-Image base",
        "## Z-Image itself, not Turbo\n\nIts preset takes 30 steps and cfg 5, which diffusers calls guidance 4. What "
        "the second prompt describes is avoided; it may be empty.\n\nWith the demo model this runs without downloads. "
        "For real pictures choose this file, Turbo's encoder and VAE (*Z-Image text to image*), and about "
        "1024 x 1024:\n\n" + files(BASE),
        {
            "Models": models(),
            "Prompts": [
                prompt(4, 1, "three large yellow stars on a blue background"),
                prompt(9, 1, "small stars, green", 1110),
            ],
            "Generate": [sampler(5, 2, 4, negative=(9, 0), steps=30, cfg=5.0, preset="base")],
            "Picture": [decoded(6, 3, 5), saved(7, 4, 6, "z-image")],
        },
    ),
    "Z-Image letters": Graph(
        "Letters",
        "## Letters\n\nZ-Image writes what stands in quotes in the prompt. The demo model does it with one or two "
        'capital letters and digits: try `the letter "S"` or `the characters "7K"` in another colour.' + FOR_REAL,
        {
            "Models": models(),
            "Prompt": [prompt(4, 1, 'the orange characters "4B" on a black background')],
            "Generate": [sampler(5, 2, 4)],
            "Picture": [decoded(6, 3, 5), saved(7, 4, 6, "z-image-letters")],
        },
    ),
    "Z-Image LoRA": Graph(
        "LoRA",
        "## LoRA: no downloads\n\nPress **Run**. *Z-Image LoRA Loader* applies a LoRA beside the INT4 weights, which "
        "stay as they are. This one comes with the pack and adds a pink frame to every picture of the demo model: "
        "strength 0 is as if it were not there. `bundled demo: grey` takes the colours out.\n\nChain several of these "
        "nodes, or use *Z-Image LoRA Stack* or *Switches*; two branches of a graph can use different LoRAs. The node "
        "shows what matched.\n\nFor real pictures choose Z-Image Turbo's files in the loaders (links in *Z-Image: text "
        "to image*), about 1024 x 1024, and a LoRA that was trained for Z-Image from `ComfyUI/models/loras`.",
        {
            "Models": models(),
            "LoRA": [
                N(8, "ZImageLoraLoader", (1, 0), {"model": (1, 0), "lora_name": f"{DEMO}: frame", "strength": 1.0})
            ],
            "Prompt": [prompt(4, 1, "a large red circle on a blue background")],
            "Generate": [sampler(5, 2, 4, model=(8, 0))],
            "Picture": [decoded(6, 3, 5), saved(7, 4, 6, "z-image-lora")],
        },
    ),
    "Z-Image image to image": Graph(
        "Image to image",
        "## Image to image\n\nA picture is encoded, and generated anew from part of the way: **denoise** 1 keeps "
        "nothing of it, 0.6 its composition. The latent's size wins over width and height.\n\nTo change only a part: "
        "*Set Latent Noise Mask* between *VAE Encode* and the sampler." + FOR_REAL,
        {
            "Models": models(),
            OUTLINE: shape(8, 1120, 0x8228AA, 0xFFDC28, 120, 68, 68),
            "Prompt": [prompt(4, 1, "a large yellow star on a purple background")],
            "Encode": [N(11, "VAEEncode", (2, 1120), {"pixels": (10, 0), "vae": (3, 0)})],
            "Generate": [sampler(5, 3, 4, latent=(11, 0), denoise=0.7)],
            "Picture": [decoded(6, 4, 5), saved(7, 5, 6, "z-image-img2img")],
        },
    ),
    "Z-Image upscale": Graph(
        "Larger, with more detail",
        "## Twice as large\n\nA picture is generated, enlarged four times by an upscale model, halved, and generated "
        "anew in part: **denoise** 0.3 in 5 steps keeps what is there and sharpens it. "
        "Put the file into its folder:\n\n" + files(ESRGAN) + FOR_REAL,
        {
            "Models": models()[:2],
            "Prompt": [prompt(4, 1, "a large striped red heart on a white background")],
            "Generate": [sampler(5, 2, 4, y=-900)],
            "VAE": [N(3, "ZImageVAELoader", (2, 1300), {"vae_name": DEMO})],
            "Enlarge": [
                decoded(6, 3, 5, 900),
                N(8, "UpscaleModelLoader", (3, 1480), {"model_name": ESRGAN}),
                N(9, "ImageUpscaleWithModel", (4, 700), {"upscale_model": (8, 0), "image": (6, 0)}),
                N(10, "ImageScaleBy", (5, 600), {"image": (9, 0), "upscale_method": "lanczos", "scale_by": 0.5}),
                N(11, "VAEEncode", (6, 900), {"pixels": (10, 0), "vae": (3, 0)}),
            ],
            "Generate anew": [sampler(12, 7, 4, latent=(11, 0), denoise=0.3, steps=5)],
            "Picture": [decoded(13, 8, 12, 1600), saved(14, 9, 13, "z-image-upscale", 1600)],
        },
    ),
    "Z-Image ControlNet": Graph(
        "ControlNet",
        "## ControlNet\n\nThe picture follows **outlines**, which *Canny* finds in another picture. For a depth map or "
        "a pose put its preprocessor in the place of *Canny*. The control picture is stretched to the latent.\n\n"
        "**strength** 0.6 to 1 is usual; **start** and **end** say for which part of the way it acts."
        + FOR_REAL
        + " A "
        "ControlNet (Fun Union) belongs into `models/model_patches`.",
        {
            "Models": models(N(4, "ZImageControlNetLoader", (0, 1070), {"control_name": f"{DEMO}: outlines"})),
            OUTLINE: [
                *shape(5, 1460, 0x000000, 0xFFFFFF, 80, 130, 70),
                N(8, "Canny", (2, 1460), {"image": (7, 0), "low_threshold": 0.3, "high_threshold": 0.6}),
                N(9, "PreviewImage", (3, 1460), {"images": (8, 0)}, "Outlines"),
            ],
            "Control": [
                N(
                    11,
                    "ZImageControlNetApply",
                    (3, 0),
                    {"model": (1, 0), "control": (4, 0), "vae": (3, 0), "image": (8, 0), "strength": 1.0},
                )
            ],
            "Prompt": [prompt(10, 3, "a green square on the right, on a white background")],
            "Generate": [sampler(12, 4, 10, model=(11, 0))],
            "Picture": [decoded(13, 5, 12), saved(14, 6, 13, "z-image-controlnet")],
        },
    ),
    "Z-Image inpaint": Graph(
        "Repaint a part",
        "## Repaint a part\n\nOnly what the **mask** marks is generated anew. For your own, *Load Image* has a mask "
        "editor.\n\n*Apply Z-Image ControlNet* gives the ControlNet the picture and the mask; *Set Latent Noise Mask* "
        "keeps the rest while sampling, and *ImageCompositeMasked* puts it back exactly. Without a ControlNet the last "
        "two do it alone." + FOR_REAL + " The ControlNet has to be one of version 2.0 or later.",
        {
            "Models": models(N(4, "ZImageControlNetLoader", (0, 1070), {"control_name": f"{DEMO}: outlines"})),
            OUTLINE: shape(5, 1460, 0x1E50E1, 0xDC1E28, 110, 73, 73, lower=200),
            "Mask": [
                N(8, "SolidMask", (0, 1900), {"value": 0.0, "width": 256, "height": 256}, "Keep"),
                N(9, "SolidMask", (0, 2060), {"value": 1.0, "width": 160, "height": 160}, "Repaint"),
                N(
                    10,
                    "MaskComposite",
                    (1, 1900),
                    {"destination": (8, 0), "source": (9, 0), "x": 48, "y": 48, "operation": "add"},
                ),
            ],
            "Encode": [
                N(12, "VAEEncode", (2, 1720), {"pixels": (7, 0), "vae": (3, 0)}),
                N(13, "SetLatentNoiseMask", (3, 2010), {"samples": (12, 0), "mask": (10, 0)}),
            ],
            "Control": [
                N(
                    11,
                    "ZImageControlNetApply",
                    (3, 0),
                    {
                        "model": (1, 0),
                        "control": (4, 0),
                        "vae": (3, 0),
                        "inpaint_image": (7, 0),
                        "mask": (10, 0),
                        "strength": 1.0,
                    },
                )
            ],
            "Prompt": [prompt(14, 3, "a large yellow star on a blue background")],
            "Generate": [sampler(15, 4, 14, model=(11, 0), latent=(13, 0))],
            "Picture": [
                decoded(16, 5, 15),
                N(17, "ImageCompositeMasked", (6, 1460), {"destination": (7, 0), "source": (16, 0), "mask": (10, 0)}),
                saved(18, 7, 17, "z-image-inpaint", 800),
            ],
        },
    ),
    "Z-Image KSampler": Graph(
        "With ComfyUI's own nodes",
        "## Our loader, ComfyUI's own nodes\n\nThe INT4 model is an ordinary MODEL, so every sampler, scheduler and "
        "model patch of ComfyUI works on it. With euler, simple, cfg 1 and shift 3 the picture is the same as the "
        "*Z-Image Sampler*'s." + FOR_REAL,
        {
            "Models": models(),
            "Schedule and size": [
                N(8, "ModelSamplingAuraFlow", (1, 0), {"model": (1, 0), "shift": 3.0}),
                N(10, "EmptySD3LatentImage", (1, 150), {"width": 256, "height": 256}),
            ],
            "Prompt": [
                N(
                    4,
                    "CLIPTextEncode",
                    (1, 400),
                    {
                        "clip": (2, 0),
                        "text": "three small yellow stars before a horizon between blue sky and green ground",
                    },
                ),
                N(9, "ConditioningZeroOut", (2, 480), {"conditioning": (4, 0)}),
            ],
            "Generate": [
                N(
                    5,
                    "KSampler",
                    (3, 0),
                    {
                        "model": (8, 0),
                        "positive": (4, 0),
                        "negative": (9, 0),
                        "latent_image": (10, 0),
                        "seed": 1,
                        "steps": 8,
                        "cfg": 1.0,
                        "sampler_name": "euler",
                        "scheduler": "simple",
                    },
                )
            ],
            "Picture": [
                N(6, "VAEDecode", (4, 800), {"samples": (5, 0), "vae": (3, 0)}),
                saved(7, 5, 6, "z-image-ksampler"),
            ],
        },
    ),
    "Z-Image compare": Graph(
        "Compare models",
        "## How much does it change?\n\nTwo models generate the same prompt from the same seeds, and *Z-Image Compare* "
        "puts their pictures side by side, with PSNR and SSIM to the first column under each: higher is nearer, equal "
        "pictures have an infinite PSNR. The numbers tell how little a picture changed, not how good it is.\n\nHere it "
        "is the demo model with 16-bit and with 4-bit activations; no downloads. To judge an INT4 file, choose it in "
        "one loader and the BF16 original in the other (or stock *Load Diffusion Model*), with Z-Image Turbo's text "
        "encoder and VAE (links in *Z-Image text to image*) and 1024 x 1024. Keep both seeds the same.\n\n*Z-Image "
        "Quantize to INT4* makes such files from any BF16 Z-Image.",
        {
            "Models": models(
                N(
                    8,
                    "ZImageINT4ModelLoader",
                    (0, 1100),
                    {"model_name": DEMO, "precision": "w4a4"},
                    "4-bit activations",
                ),
                precision="w4a16",
            ),
            "Prompt": [prompt(4, 1, "a large red star on a purple background")],
            "Generate": [sampler(5, 2, 4, batch_size=2), sampler(9, 2, 4, model=(8, 0), y=1100, batch_size=2)],
            "Pictures": [
                decoded(6, 3, 5),
                decoded(10, 3, 9, 970),
                N(
                    11,
                    "ZImageCompare",
                    (4, 800),
                    {"image_a": (6, 0), "image_b": (10, 0), "label_a": "w4a16", "label_b": "w4a4"},
                ),
                saved(7, 5, 11, "z-image-compare"),
            ],
        },
    ),
}

NAMES = [("model_name", 1, "model_name"), ("encoder_name", 2, "encoder_name"), ("vae_name", 3, "vae_name")]
LOADERS = {"encoder": QWEN, "vae": VAE}
CONTROL_INPUTS = [("prompt", 10, "prompt"), ("megapixels", 7, "megapixels")]
CONTROL_INPUTS += [("strength", 11, "strength"), ("seed", 12, "seed")]
CONTROL_NAMES = [*NAMES, ("control_name", 4, "control_name")]


def scaled(number: int, y: int) -> N:
    """A picture scaled to a megapixel, its edges to multiples of 16."""
    options = {"upscale_method": "lanczos", "megapixels": 1.0, "resolution_steps": 16}
    return N(number, "ImageScaleToTotalPixels", (0, y), options)


def controlled(picture: list[N], control: int, column: int = 2) -> dict[str, list[N]]:
    """A blueprint's nodes: the scaled picture is node 7, `control` the node that gives the control picture."""
    guide = {"model": (1, 0), "control": (4, 0), "vae": (3, 0), "image": (control, 0), "strength": 1.0}
    return {
        "Models": models(N(4, "ZImageControlNetLoader", (0, 1070), {"control_name": UNION}), model=TURBO, **LOADERS),
        "Control picture": [scaled(7, 1460), *picture],
        "Control": [
            N(11, "ZImageControlNetApply", (column, 0), guide),
            N(15, "GetImageSize", (column, 1460), {"image": (7, 0)}),
        ],
        "Prompt": [prompt(10, column, "")],
        "Generate": [sampler(12, column + 1, 10, model=(11, 0), seed=0, width=(15, 0), height=(15, 1))],
        "Picture": [decoded(13, column + 2, 12)],
    }


LOTUS_NODES = [
    N(20, "UNETLoader", (0, 1660), {"unet_name": LOTUS}),
    N(21, "VAELoader", (0, 1820), {"vae_name": LOTUS_VAE}),
    N(22, "LotusConditioning", (0, 1940)),
    N(23, "VAEEncode", (1, 1460), {"pixels": (7, 0), "vae": (21, 0)}),
    N(24, "BasicScheduler", (1, 1590), {"model": (20, 0), "scheduler": "normal", "steps": 1}),
    N(25, "BasicGuider", (1, 1800), {"model": (20, 0), "conditioning": (22, 0)}),
    N(26, "DisableNoise", (2, 1940)),
    N(27, "KSamplerSelect", (2, 1800), {"sampler_name": "euler"}),
    N(28, "SetFirstSigma", (2, 1590), {"sigmas": (24, 0), "sigma": 999.0}),
    N(
        29,
        "SamplerCustomAdvanced",
        (3, 1460),
        {"noise": (26, 0), "guider": (25, 0), "sampler": (27, 0), "sigmas": (28, 0), "latent_image": (23, 0)},
    ),
    N(30, "VAEDecode", (4, 1460), {"samples": (29, 0), "vae": (21, 0)}),
    N(31, "ImageInvert", (5, 1460), {"image": (30, 0)}),
]
BLUEPRINTS = [
    Blueprint(
        "Text to image (Z-Image INT4)",
        "A picture from a prompt by Z-Image Turbo in 4 bits.",
        {
            "Models": models(model=TURBO, **LOADERS),
            "Prompt": [prompt(4, 1, "")],
            "Generate": [sampler(5, 2, 4, seed=0, width=1024, height=1024)],
            "Picture": [decoded(6, 3, 5)],
        },
        [("prompt", 4, "prompt"), *((name, 5, name) for name in ("width", "height", "seed", "steps")), *NAMES],
        6,
    ),
    Blueprint(
        "Text to image (Z-Image base)",
        "A picture from a prompt by Z-Image itself, with guidance and a negative prompt.",
        {
            "Models": models(model=BASE, **LOADERS),
            "Prompts": [prompt(4, 1, ""), prompt(9, 1, "", 1110)],
            "Generate": [
                sampler(5, 2, 4, seed=0, width=1024, height=1024, negative=(9, 0), steps=30, cfg=5.0),
            ],
            "Picture": [decoded(6, 3, 5)],
        },
        [
            ("prompt", 4, "prompt"),
            ("negative_prompt", 9, "prompt"),
            *((name, 5, name) for name in ("width", "height", "seed", "steps", "cfg")),
            *NAMES,
        ],
        6,
    ),
    Blueprint(
        "ControlNet (Z-Image INT4)",
        "A picture from a prompt and a control picture: outlines, a depth map, a pose.",
        controlled([], 7),
        [("image", 7, "image"), *CONTROL_INPUTS, *CONTROL_NAMES],
        13,
    ),
    Blueprint(
        "Pose to image (Z-Image INT4)",
        "A picture from a prompt and the picture of a pose.",
        controlled([], 7),
        [("image", 7, "image"), *CONTROL_INPUTS, *CONTROL_NAMES],
        13,
    ),
    Blueprint(
        "Canny to image (Z-Image INT4)",
        "A picture from a prompt and the outlines of another picture.",
        controlled([N(8, "Canny", (1, 1460), {"image": (7, 0), "low_threshold": 0.3, "high_threshold": 0.4})], 8),
        [
            ("image", 7, "image"),
            *CONTROL_INPUTS,
            *((name, 8, name) for name in ("low_threshold", "high_threshold")),
            *CONTROL_NAMES,
        ],
        13,
    ),
    Blueprint(
        "Depth to image (Z-Image INT4)",
        "A picture from a prompt and the depth of another picture, which Lotus estimates.",
        controlled(LOTUS_NODES, 31, 6),
        [
            ("image", 7, "image"),
            *CONTROL_INPUTS,
            *CONTROL_NAMES,
            ("depth_model", 20, "unet_name"),
            ("depth_vae", 21, "vae_name"),
        ],
        13,
    ),
    Blueprint(
        "Image upscale (Z-Image INT4)",
        "A larger picture with more detail: enlarged by an upscale model, then generated anew in part.",
        {
            "Models": models(N(8, "UpscaleModelLoader", (0, 1070), {"model_name": ESRGAN}), model=TURBO, **LOADERS),
            "Enlarge": [
                scaled(7, 1260),
                N(9, "ImageUpscaleWithModel", (1, 1260), {"upscale_model": (8, 0), "image": (7, 0)}),
                N(
                    10,
                    "ImageScaleBy",
                    (2, 1260),
                    {"image": (9, 0), "upscale_method": "lanczos", "scale_by": 0.5},
                ),
                N(11, "VAEEncode", (3, 1260), {"pixels": (10, 0), "vae": (3, 0)}),
            ],
            "Prompt": [prompt(4, 3, "masterpiece, 8k")],
            "Generate": [sampler(5, 4, 4, seed=0, latent=(11, 0), denoise=0.33, width=1024, height=1024)],
            "Picture": [decoded(6, 5, 5)],
        },
        [
            ("image", 7, "image"),
            ("prompt", 4, "prompt"),
            ("denoise", 5, "denoise"),
            ("seed", 5, "seed"),
            *NAMES,
            ("upscale_model", 8, "model_name"),
        ],
        6,
    ),
]
