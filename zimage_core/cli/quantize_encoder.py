"""`zimage quantize-encoder`: a smaller text encoder file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .options import Commands, Parser
from .output import Progress

logger = logging.getLogger(__name__)


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("quantize-encoder", help="write a smaller text encoder file from a BF16 one")
    p.add_argument("src", type=Path, help="BF16 text encoder: safetensors file or folder, or GGUF file")
    p.add_argument("dst", type=Path, help="safetensors file to write")
    p.add_argument("--bits", type=int, choices=(8, 4), default=8, help="8 (quanto INT8, default) or 4 (NVFP4)")
    p.add_argument("--device", default="cpu", help="where to compute (default cpu)")
    return p


def run(args: argparse.Namespace) -> int:
    """Write the file and print its path."""
    from ..device import choose_device
    from ..quantize.encoder import quantize_encoder

    device = choose_device(args.device)
    progress = Progress()
    progress.start("quantize-encoder", 1)
    try:
        quantize_encoder(args.src, args.dst, bits=args.bits, device=device, progress=progress.step)
    finally:
        progress.finish()
    print(args.dst)
    if note := tokenizer_note(args.src, args.dst):
        logger.warning(note)
    return 0


def tokenizer_note(src: Path, dst: Path) -> str | None:
    """What is to be done for the tokenizer of a new file; None where it will be found."""
    from ..models.tokenizer import find_tokenizer

    try:
        find_tokenizer(dst)
        return None
    except ValueError as none:
        try:
            return f"its tokenizer is in {find_tokenizer(src)}: copy it beside {dst}, or name it with --tokenizer"
        except ValueError:
            return str(none)
