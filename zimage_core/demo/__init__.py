"""The bundled small model: same architecture as Z-Image Turbo, trained from nothing on drawn shapes.

It draws coloured shapes on a coloured background at 128 to 256 pixels, so that the package works and is tested
without a download. How it was made and what it can do: `demo_training/README.md` in the repository.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


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
