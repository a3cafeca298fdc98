"""`zimage download`: model, text encoder, VAE and tokenizer from the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, Parser


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("download", help="fetch model, text encoder, VAE and tokenizer from the Hugging Face hub")
    p.add_argument(
        "model",
        help="int4-r256 (closest to the original), int4-r128, int4-r32 (smallest), fp4-r128, fp4-r32, bf16, fp8, int8, "
        "nvfp4, q8_0, q4_0, or base-bf16 (Z-Image itself)",
    )
    p.add_argument("--text-encoder", default="fp8", help="fp8 (default), bf16, q8_0, q4_k_m, or none")
    p.add_argument("--comfyui", type=Path, help="ComfyUI folder to put them into (default: the hub's cache)")
    return p


def run(args: argparse.Namespace) -> int:
    """Fetch the files and print the options that name them."""
    from ..hub import download

    paths = download(args.model, args.text_encoder, comfyui=args.comfyui)
    for name, path in paths.items():
        print(f"--{name.replace('_', '-')}={path}")
    return 0
