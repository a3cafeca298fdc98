"""The bundled small model: same architecture as Z-Image Turbo, trained from nothing on drawn shapes.

It draws coloured shapes on a coloured background at 128 to 256 pixels, so that the package works and is tested
without a download. How it was made and what it can do: `demo_training/README.md` in the repository.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LATENT_RGB = (
    (0.1687, 0.0314, 0.0379),
    (0.1730, 0.0022, 0.0811),
    (-0.1274, -0.1359, 0.0037),
    (-0.0507, 0.1406, 0.0230),
    (0.0566, -0.0353, -0.0341),
    (-0.0150, -0.1072, 0.0497),
    (-0.1543, -0.1945, -0.1442),
    (-0.0376, -0.0021, 0.1294),
    (-0.0043, -0.0457, -0.0273),
    (-0.1070, 0.1141, -0.0364),
    (-0.0492, 0.0049, 0.0807),
    (0.0206, 0.0611, -0.1768),
    (0.0200, 0.0033, -0.0256),
    (-0.0890, 0.0130, 0.2042),
    (-0.1202, -0.0189, 0.0656),
    (0.0464, -0.0094, -0.0888),
    (0.1103, 0.0263, -0.0313),
)
"""Colour (red, green, blue; -1..1) that each of the 16 latent channels adds to a preview; the last row is the bias."""


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
