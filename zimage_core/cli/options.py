"""The parser class, and options that several commands have."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import NoReturn, TypeAlias, TypeVar

from .output import printable

EXIT_INPUT = 2
DASHED = re.compile(r"-[\d.]")  # begins a value, not an option
T = TypeVar("T")
SIDE = "pixels, 16 to 16384, a multiple of 16 (default 1024; 256 with the bundled demo)"
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What a command's parser is added to."""


class Parser(argparse.ArgumentParser):
    """argparse with complaints of one line."""

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message and (dashed := next(filter(DASHED.match, sys.argv[1:]), None)):
            message += f", found what looks like an option ({dashed}); write NAME={dashed} if it is the value"
        self.exit(EXIT_INPUT, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


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


def option(read: Callable[[str], T]) -> Callable[[str], T]:
    """A function of `notation` as an option's type."""

    def convert(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def add_device(parser: Parser) -> None:
    """--device of the commands that generate pictures or time them."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, xpu, mps ... (default: a GPU if torch sees one)")


def add_runtime(parser: Parser) -> None:
    """--device, --dtype, --attention and --backend of the commands that generate pictures."""
    add_device(parser)
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default bfloat16; float16 on GPUs without it)")
    parser.add_argument(
        "--attention",
        default="sdpa",
        help="sdpa (default), int8 (comfy-kitchen's), or auto, the faster of the two here",
    )
    parser.add_argument(
        "--backend", default="auto", help="auto (default), reference, or one that `zimage doctor` lists"
    )
