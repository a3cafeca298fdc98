"""The bundled small model: same architecture as Z-Image Turbo, trained from nothing on generated shapes and letters.

It generates coloured shapes and letters at 128 to 512 pixels, so that the package works and is tested without a
download. How it was made and what it can do: `demo_training/README.md` in the repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LATENT_RGB = (
    (0.0312, 0.1545, 0.1147),
    (0.0098, -0.1560, 0.1179),
    (0.0280, -0.0879, -0.0784),
    (-0.1374, 0.0198, -0.1339),
    (0.1125, 0.0442, -0.0188),
    (0.2492, -0.0098, -0.0896),
    (-0.1050, -0.1136, -0.0298),
    (0.1148, 0.0838, 0.1405),
    (-0.0059, 0.0859, 0.0868),
    (-0.1251, -0.0062, 0.0440),
    (-0.0028, 0.0191, 0.1264),
    (0.0724, -0.0342, -0.0475),
    (0.0238, 0.0194, 0.0167),
    (0.0099, 0.0329, -0.1380),
    (-0.0093, 0.1272, -0.0428),
    (-0.0322, 0.0373, 0.0638),
    (0.0701, -0.0008, -0.0052),
)
"""Colour (red, green, blue; -1..1) that each of the 16 latent channels adds to a preview; the last row is the bias."""

SIZES = 128, 512
"""Pixels of the shortest and of the longest edge that it was trained on; one edge is at most twice the other."""
WORDS = (
    "circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring", "crescent", "arrow", "shape",
    "letter", "digit", "character", "number", "text",
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "cyan", "gray", "white", "black",
    "striped", "dotted", "spotted", "checked", "checkered", "shaded",
    "background", "backdrop", "gradient", "horizon", "sky",
)  # fmt: skip
"""What it learned to show, plurals left out; a picture has nothing to do with a prompt that has none of these words."""


def advice(prompts: Iterable[str], height: int, width: int) -> list[str]:
    """A sentence for each prompt without any word that the model knows, and for a size that it was not trained on."""
    said = []
    for prompt in prompts:
        words = re.findall(r"[a-z]+", prompt.lower())
        known = any({word, word.removesuffix("s"), word.removesuffix("es")} & set(WORDS) for word in words)
        if prompt and not known:
            said.append(
                f"{prompt!r}: the bundled demo knows no word of this prompt, so the picture has nothing to do with it; "
                f"the words it knows are {', '.join(WORDS)}"
            )
    shorter, longer = sorted((height, width))
    if shorter < SIZES[0] or longer > SIZES[1] or longer > 2 * shorter:
        said.append(
            f"{width} x {height}: the bundled demo was trained on edges of {SIZES[0]} to {SIZES[1]} pixels and up to "
            "2:1; expect noise or wrong shapes"
        )
    return said


def demo_files() -> dict[str, Path]:
    """Paths of the bundled transformer, text encoder (a folder), tokenizer (a folder) and VAE."""
    return {
        "model": FOLDER / "svdq-int4_r16-z-image-demo.safetensors",
        "text_encoder": FOLDER / "text_encoder",
        "tokenizer": FOLDER / "tokenizer",
        "vae": FOLDER / "vae.safetensors",
    }


def demo_loras() -> dict[str, Path]:
    """Paths of the bundled LoRAs: `frame` (a LoRA: a pink frame) and `grey` (a LoKr: no colours)."""
    return {name: FOLDER / "loras" / f"{name}.safetensors" for name in ("frame", "grey")}


def demo_controlnet() -> Path:
    """Path of the bundled ControlNet, which follows outlines and repaints what a mask marks."""
    return FOLDER / "controlnet.safetensors"
