"""`zimage quantize`: an SVDQuant INT4 file from a BF16 transformer or ControlNet."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import notation
from ..models.config import PRESETS
from .options import Commands, Parser
from .output import Progress

if TYPE_CHECKING:
    import torch


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("quantize", help="write an SVDQuant INT4 file from a transformer or ControlNet")
    p.add_argument("src", help="transformer or ControlNet in BF16, or in anything of 8 bits or more; file or folder")
    p.add_argument("dst", type=Path, help="safetensors file to write")
    p.add_argument("--rank", type=int, default=256, help="of the low-rank branch, a multiple of 16 (default 256)")
    p.add_argument("--text-encoder", type=Path, help="Qwen3-4B, to calibrate with (default: the one of SRC's folder)")
    p.add_argument("--tokenizer", type=Path, help="its tokenizer.json or folder (default: beside it)")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one a line, best of the model's own kind")
    p.add_argument("--size", type=int, help="pixels of an edge to calibrate on (default 512, on a CPU 256)")
    p.add_argument("--no-calibration", action="store_true", help="from the weights alone: quicker, larger error")
    p.add_argument(
        "--merge",
        type=notation.lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to make part of the weights first; may be repeated",
    )
    p.add_argument("--skip-refiners", action="store_true", help="leave the refiners in bf16: larger file, less error")
    p.add_argument(
        "--variant", choices=tuple(PRESETS), help="what SRC is, for DST's metadata (default: as SRC's name suggests)"
    )
    p.add_argument("--base", type=Path, help="for a ControlNet: the model to calibrate beside, of any format")
    p.add_argument("--vae", type=Path, help="for a ControlNet: the VAE that encodes its control pictures")
    p.add_argument(
        "--control-image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="for a ControlNet: control picture to calibrate with; may be repeated, prompts take them in turn",
    )
    p.add_argument("--device", help="where to compute (default: a GPU if torch sees one)")
    return p


def run(args: argparse.Namespace) -> int:
    """Write the INT4 file, calibrated where there is a text encoder, and print its path."""
    from ..device import choose_device
    from ..formats.identify import identify
    from ..quantize.controlnet import quantize_controlnet
    from ..quantize.run import TimeLeft, calibration_defaults, check_request, quantize_checkpoint

    device = choose_device(args.device)
    if args.device is None and device.type == "mps":  # without float64
        device = choose_device("cpu")
    prompts, size = calibration_defaults(device)
    if args.size is not None:
        size = args.size
    check_request(args.dst, size, args.merge)
    is_control = Path(args.src).exists() and identify(args.src).role == "controlnet"
    if is_control and (args.merge or args.skip_refiners or args.variant):
        raise ValueError(f"{args.src}: is a ControlNet, which takes none of --merge, --skip-refiners, --variant")
    if is_control and not args.no_calibration and not (args.base and args.vae and args.control_image):
        warnings.warn("a ControlNet is calibrated with --base, --vae, --control-image and --text-encoder", stacklevel=1)
        args.no_calibration = True
    cap_feats = captions(args, prompts, device)
    progress, words = Progress("{desc} |{bar:28}| {percentage:3.0f}% {elapsed}{postfix}"), TimeLeft()

    def show(done: int, total: int, what: str) -> None:
        progress.say(words(done, total, what))
        progress.step(done, total)

    progress.start("quantize", 1)
    given: dict[str, Any] = {"rank": args.rank, "size": size, "device": device, "progress": show}
    try:
        if is_control:
            if cap_feats:
                contexts = control_pictures(args, len(cap_feats), size, device)
                given |= {"base": args.base, "cap_feats": cap_feats, "contexts": contexts}
            quantize_controlnet(args.src, args.dst, **given)
        else:
            given |= {"cap_feats": cap_feats, "merge": args.merge, "skip_refiners": args.skip_refiners}
            given["variant"] = args.variant
            quantize_checkpoint(args.src, args.dst, **given)
    finally:
        progress.finish()
    print(args.dst)
    return 0


def control_pictures(args: argparse.Namespace, count: int, size: int, device: torch.device) -> list[torch.Tensor]:
    """A control context (C, size / 8, size / 8) for each of `count` prompts, from --control-image in turn."""
    from ..control import Control, control_contexts
    from ..formats.vae import load_vae
    from ..pictures import read_image

    vae = load_vae(args.vae, device=device)

    def encode(picture: torch.Tensor) -> torch.Tensor:
        return vae.encode(picture.to(device)).float().cpu()

    controls = [Control(read_image(path), args.src) for path in args.control_image]
    found = control_contexts(controls, None, size, size, encode)
    return [found[i % len(found)][0] for i in range(count)]


def captions(args: argparse.Namespace, prompts: Sequence[str], device: torch.device) -> list[torch.Tensor] | None:
    """Features (L, C) of the prompts to calibrate on, --prompts or the given ones; None where nothing is calibrated."""
    from ..formats.encoder import check_text_encoder, check_width
    from ..quantize.run import calibration_captions, caption_width

    encoder = args.text_encoder or Path(args.src) / "text_encoder"
    calibrated = not args.no_calibration and (args.text_encoder is not None or encoder.is_dir())
    if args.prompts and not calibrated:
        raise ValueError("--prompts: are to calibrate with, so name a --text-encoder and leave out --no-calibration")
    if args.prompts:
        prompts = read_prompts(args.prompts)
    if calibrated:
        model = args.base or args.src
        check_width(check_text_encoder(encoder)[0].hidden_size, caption_width(model), encoder, model)
        return calibration_captions(encoder, prompts, tokenizer=args.tokenizer, device=device)
    if not args.no_calibration:
        warnings.warn(
            "without --text-encoder the file is made from the weights alone, with a larger error than a calibrated "
            "one; --no-calibration asks for that",
            stacklevel=1,
        )
    return None


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank. ValueError if there is none, or if it is no text."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found other bytes ({error.reason}); save it as such") from error
    if not prompts:
        raise ValueError(f"{path}: expected a prompt a line, found none; write some, or leave out --prompts")
    return prompts
