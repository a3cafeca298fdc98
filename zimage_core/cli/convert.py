"""`zimage convert`: a SVDQuant INT4 file in another layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, Parser
from .output import Progress


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("convert", help="write a SVDQuant INT4 file in nunchaku's or comfy-kitchen's layout")
    p.add_argument("src", type=Path, help="SVDQuant INT4 transformer, file or folder, in any layout")
    p.add_argument("dst", type=Path, help="safetensors file to write")
    layouts = ("nunchaku", "kitchen", "kitchen-tiles")
    words = "nunchaku's; comfy-kitchen's svdquant_w4a4 in rows (kitchen) or, as comfy-quants writes it, in tiles"
    p.add_argument("--to", choices=layouts, required=True, help=words)
    return p


def run(args: argparse.Namespace) -> int:
    """Write the file and print its path."""
    from ..quantize.convert import convert

    progress = Progress()
    progress.start("convert", 1)
    try:
        convert(args.src, args.dst, args.to, progress.step)
    finally:
        progress.finish()
    print(args.dst)
    return 0
