"""The parser class, and options that several commands have."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn, TypeAlias

EXIT_INPUT = 2
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What a command's parser is added to."""


class Parser(argparse.ArgumentParser):
    """argparse with complaints of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def lora_option(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH -> (file, strength); what follows the last colon counts only if it is a number."""
    path, colon, number = text.rpartition(":")
    try:
        return (path, float(number)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def add_models(parser: Parser) -> None:
    """The files of a pipeline."""
    parser.add_argument(
        "--model", help="transformer file or folder, or a whole diffusers folder (default: bundled demo)"
    )
    parser.add_argument("--text-encoder", help="Qwen3-4B folder or safetensors file")
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder (default: beside the text encoder)")
    parser.add_argument("--vae", help="VAE file or folder")


def add_budget(parser: Parser) -> None:
    """--vram-budget."""
    parser.add_argument(
        "--vram-budget",
        default="auto",
        metavar="SIZE",
        help="GPU memory to use, 4GiB say; what does not fit is streamed from the host (default auto: what is free)",
    )


_CONTROL = re.compile(
    r"(?P<file>.+?)(?::(?P<strength>-?(?:\d+\.?\d*|\.\d+)|nan|inf)(?::(?P<start>\d*\.?\d+)-(?P<end>\d*\.?\d+))?)?"
)


def control_option(text: str) -> tuple[str, float, float, float]:
    """FILE, FILE:STRENGTH or FILE:STRENGTH:START-END -> (file, strength, start, end)."""
    match = _CONTROL.fullmatch(text)
    if match is None:
        return text, 1.0, 0.0, 1.0
    return match["file"], float(match["strength"] or 1), float(match["start"] or 0), float(match["end"] or 1)


def pad_option(text: str) -> tuple[int, int, int, int]:
    """PIXELS or LEFT,TOP,RIGHT,BOTTOM -> the four borders."""
    try:
        borders = [int(number) for number in text.split(",")]
    except ValueError:
        borders = []
    if len(borders) not in (1, 4):
        raise argparse.ArgumentTypeError(f"expected PIXELS or LEFT,TOP,RIGHT,BOTTOM, found {text!r}")
    left, top, right, bottom = borders * (4 // len(borders))
    return left, top, right, bottom


def add_device(parser: Parser) -> None:
    """--device of the commands that generate pictures or time them."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if torch sees one)")


def add_runtime(parser: Parser) -> None:
    """--device, --dtype and --backend of the commands that generate pictures."""
    add_device(parser)
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default bfloat16; float16 on GPUs without it)")
    parser.add_argument("--backend", default="auto", help="auto, reference, or one that `zimage doctor` lists")
