"""`zimage generate`: pictures from a prompt."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import metadata, notation, whole
from ..models.config import PRESETS
from .options import SIDE, Commands, Parser, add_budget, add_models, add_runtime, pad_option
from .output import Progress, free_name, gib, output_paths

if TYPE_CHECKING:
    from PIL import Image

    from ..control import Control
    from ..pipeline import Pictures, Pipeline


logger = logging.getLogger(__name__)


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("generate", help="generate pictures from a prompt")
    p.add_argument("prompt", help="what to see; - reads it from standard input")
    p.add_argument("--negative-prompt", help="what to avoid; needs --guidance above 0")
    p.add_argument(
        "--out",
        type=Path,
        help="PNG to write, replaced if it is there; a batch adds -1, -2, ... (default zimage-SEED.png, numbered)",
    )
    p.add_argument("--width", type=int, help=SIDE)
    p.add_argument("--height", type=int, help=SIDE)
    p.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="what steps and guidance are unless given: turbo (default) 8 and 0, base (Z-Image) 30 and 4",
    )
    p.add_argument("--steps", type=int, help="1 to 100 (default as --preset)")
    p.add_argument("--seed", type=int, help="0 to 2^64 - 1; picture i of a batch uses SEED + i (default random)")
    p.add_argument("--batch", type=int, default=1, help="pictures to generate, 1 to 10000 (default 1)")
    add_models(p)
    p.add_argument(
        "--lora",
        type=notation.lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA of any kind; may be repeated (strength -100 to 100, default 1; negative turns it round)",
    )
    p.add_argument("--image", type=Path, help="picture to start from")
    p.add_argument(
        "--strength", type=float, help="how far to go from --image, above 0 to 1 (default 0.6; 1 with --mask or --pad)"
    )
    p.add_argument("--mask", type=Path, help="picture of the same size, white where --image is to be repainted")
    p.add_argument("--feather", type=int, default=8, help="pixels of soft edge around the mask, 0 or more (default 8)")
    p.add_argument(
        "--pad",
        type=pad_option,
        metavar="PIXELS|L,T,R,B",
        help="borders to add to --image and to fill in (outpainting)",
    )
    p.add_argument(
        "--control",
        type=notation.control,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH[:START-END]]",
        help="ControlNet; may be given several times (strength 1, from 0 to 1 of the way unless given)",
    )
    p.add_argument(
        "--control-image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="its control picture; one for each --control, or one for all",
    )
    p.add_argument("--canny", action="store_true", help="take the outlines of --control-image (needs OpenCV)")
    p.add_argument(
        "--guidance",
        type=float,
        help="0 to 100; above 0 costs twice the time; in ComfyUI's terms cfg is 1 more (default as --preset)",
    )
    add_budget(p)
    p.add_argument("--json", action="store_true", help="end with a line of the plan, timings and peak memory per stage")
    add_runtime(p)
    p.add_argument("--precision", default="auto", help="auto, w4a16, w4a8 or w4a4 (default auto)")
    return p


def run(args: argparse.Namespace) -> int:
    """Generate, save as PNG and print the paths; with --json the facts of the run behind them."""
    started = time.perf_counter()
    args.prompt = read_prompt(args.prompt)
    targets = output_paths(args.out, args.batch)
    take_preset(args)
    image, mask = edited(args)
    controls = read_controls(args)
    if args.strength is None:
        args.strength = 1.0 if image is None or mask else 0.6
    from ..pipeline import load_pipeline

    pipeline = load_pipeline(
        args.model,
        args.text_encoder,
        args.vae,
        tokenizer=args.tokenizer,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        precision=args.precision,
        vram_budget=args.vram_budget,
        once=True,
    )
    pipeline.hold_budget()
    pipeline.set_loras(args.lora)
    pictures = generate(pipeline, args, image, mask, controls)
    seeds = pictures.seeds or []
    logger.info("seed %s", " to ".join(map(str, seeds[:1] + seeds[1:][-1:])))
    used = settings(pipeline, args, pictures)
    saved = save(pictures, targets, args, used)
    if args.json:
        stages = [
            {
                "name": stage.name,
                "seconds": round(stage.seconds, 4),
                "device_peak_gib": gib(stage.device_peak),
                "host_peak_gib": gib(stage.host_peak),
            }
            for stage in pictures.stages
        ]
        seconds = round(time.perf_counter() - started, 4)
        facts = {"images": saved, "prompt": args.prompt, **used, "seconds": seconds, "stages": stages}
        print(json.dumps(facts | {"plan": pictures.plan.facts()}))
    return 0


def take_preset(args: argparse.Namespace) -> None:
    """Fill in the steps and guidance that were not given; says where a model seems to want another preset."""
    steps, guidance = PRESETS[args.preset or "turbo"]
    if args.preset is None and args.model is not None and args.steps is None and args.guidance is None:
        from ..formats.identify import likely_variant

        if likely_variant(args.model) == "base":
            print(f"zimage: {args.model} seems to be Z-Image, not Turbo: --preset base is made for it", file=sys.stderr)
    args.steps = steps if args.steps is None else args.steps
    args.guidance = guidance if args.guidance is None else args.guidance


def edited(args: argparse.Namespace) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to start from, with its borders, and the mask of what is repainted."""
    image = read_image(args.image) if args.image else None
    mask = read_image(args.mask) if args.mask else None
    if args.pad:
        if image is None or mask:
            raise ValueError(f"--pad: expected --image and no --mask, found {'no' if image is None else 'a'} picture")
        from ..pictures import pad

        image, mask = pad(image, *args.pad)
    return image, mask


def read_controls(args: argparse.Namespace) -> list[Control]:
    """The ControlNets with their pictures. ValueError unless there is a picture for each, or one for all, or none."""
    if args.control_image and not args.control:
        raise ValueError("--control-image: expected a ControlNet with it, found none; name it with --control")
    from ..control import Control
    from ..pictures import canny

    pictures: list[Image.Image | None] = [read_image(path) for path in args.control_image]
    if args.canny:
        pictures = [canny(picture) for picture in pictures if picture]
    if len(pictures) < 2:
        pictures = (pictures or [None]) * len(args.control)
    if len(pictures) != len(args.control):
        raise ValueError(f"--control-image: expected one, or {len(args.control)}, found {len(pictures)}")
    return [Control(picture, *control) for picture, control in zip(pictures, args.control)]


def generate(
    pipeline: Pipeline,
    args: argparse.Namespace,
    image: Image.Image | None,
    mask: Image.Image | None,
    controls: list[Control],
) -> Pictures:
    """The pictures, with a progress bar for each stage."""
    progress = Progress()
    try:
        return pipeline(
            args.prompt,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            negative_prompt=args.negative_prompt,
            generator=args.seed,
            num_images_per_prompt=args.batch,
            image=image,
            strength=args.strength,
            mask=mask,
            feather=args.feather,
            control=controls,
            on_stage=progress.start,
            on_step=progress.step,
        )
    finally:
        progress.finish()


def settings(pipeline: Pipeline, args: argparse.Namespace, pictures: Pictures) -> dict[str, object]:
    """What the pictures were made with, as the PNG files and --json have it."""
    backend = pictures.backend
    found: dict[str, object] = {
        "width": pictures[0].width,
        "height": pictures[0].height,
        "steps": args.steps,
        "guidance": args.guidance,
        "model": "bundled demo" if args.model is None else Path(args.model).name,
        "device": str(pipeline.device),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "backend": backend.name if backend else "dense",
        "precision": backend.precision if backend else None,
    }
    if args.lora:
        found["loras"] = [[Path(path).name, strength] for path, strength in args.lora]
    if args.image:
        found |= {"image": args.image.name, "strength": args.strength}
    if args.mask or args.pad:
        found |= {"mask": args.mask.name} if args.mask else {"pad": args.pad}
        found["feather"] = args.feather
    if args.control:
        found["controls"] = [[Path(path).name, *numbers] for path, *numbers in args.control]
        found["control_images"] = [path.name for path in args.control_image]
    return found


def save(
    pictures: Pictures, targets: Sequence[Path], args: argparse.Namespace, used: dict[str, object]
) -> list[dict[str, object]]:
    """Write each picture with its facts and print its path; returns path and seed of each, for --json."""
    saved: list[dict[str, object]] = []
    for i, (picture, seed) in enumerate(zip(pictures, pictures.seeds or ())):
        path = targets[i] if targets else free_name(seed)
        facts = {"prompt": args.prompt, "seed": seed, **used}
        if args.negative_prompt:
            facts["negative_prompt"] = args.negative_prompt
        whole.write(path, metadata.png(picture, facts))
        saved.append({"path": str(path), "seed": seed})
        print(path)
    return saved


def read_prompt(text: str) -> str:
    """The prompt, or what comes from standard input for `-`. ValueError where nothing comes or no text."""
    if text != "-":
        return text
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"-: expected UTF-8 text on standard input, found other bytes ({error.reason})") from None
    if not text:
        raise ValueError("-: expected a prompt on standard input, found nothing")
    return text


def read_image(path: Path) -> Image.Image:
    """`pictures.read_image`, imported when needed."""
    from ..pictures import read_image

    return read_image(path)
