"""The parser class, and options that several commands have."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

from ..models.config import PRESETS
from .output import printable

EXIT_INPUT = 2
DASHED = re.compile(r"-[\d.]")  # begins a value, not an option
T = TypeVar("T")
PIPELINE = (
    *("model", "text_encoder", "vae", "tokenizer"),
    *("device", "dtype", "backend", "precision", "attention", "vram_budget"),
)
"""Arguments of `load_pipeline` that are options."""
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


def add_size(parser: Parser) -> None:
    """--width and --height."""
    for side in ("--width", "--height"):
        parser.add_argument(
            side, type=int, help="pixels, 16 to 16384, a multiple of 16 (default 1024; 256 with the bundled demo)"
        )


def add_preset(parser: Parser) -> None:
    """--preset and --steps; `take_preset` fills in what is not given."""
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="what steps and guidance are unless given: turbo (default) 8 and 0, base (Z-Image) 30 and 4",
    )
    parser.add_argument("--steps", type=int, help="1 to 100 (default as --preset)")


def take_preset(args: argparse.Namespace) -> None:
    """Fill in the steps and guidance that were not given."""
    steps, guidance = PRESETS[args.preset or "turbo"]
    args.steps = steps if args.steps is None else args.steps
    args.guidance = guidance if args.guidance is None else args.guidance


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


def add_precision(parser: Parser) -> None:
    """--precision of the commands that run one model."""
    parser.add_argument(
        "--precision", default="auto", help="auto (default), w4a16, w4a8, w4a4; w8a16 or w8a8 of FP8 and INT8 files"
    )


def pipeline_options(args: argparse.Namespace) -> dict[str, Any]:
    """A command's options that are arguments of `load_pipeline`."""
    return {name: value for name, value in vars(args).items() if name in PIPELINE}
