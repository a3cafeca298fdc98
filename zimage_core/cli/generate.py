"""`zimage generate`: pictures from a prompt."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import metadata, notation, whole
from ..sizes import DEMO_SIZE, REAL_SIZE, of_aspect
from .options import (
    Commands,
    Parser,
    add_budget,
    add_models,
    add_precision,
    add_preset,
    add_runtime,
    add_size,
    option,
    pipeline_options,
    take_preset,
)
from .output import Progress, check_outputs, free_name, gib, output_path
from .restore import Restore, options

if TYPE_CHECKING:
    from PIL import Image

    from ..control import Control
    from ..pipeline import Pictures, Pipeline


logger = logging.getLogger(__name__)

SAMPLERS = ("euler", "heun", "res_multistep", "dpmpp_2m")
SCHEDULES = ("even", "simple", "beta", "sgm_uniform")
UPSCALE = "1 to 8: enlarge by it and redraw at strength 0.3 in 5 steps, above 2048 pixels in tiles"


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("generate", help="generate pictures from a prompt")
    p.add_argument("prompt", nargs="*", help="what to see, one or several; - reads it from standard input")
    p.add_argument(
        "--from",
        action=Restore,
        metavar="PICTURE",
        help="prompts and options of a picture that this command wrote; what is given beside it replaces them",
    )
    p.add_argument("--negative-prompt", help="what to avoid; needs --guidance or --nag-scale above 0")
    p.add_argument(
        "--out",
        type=Path,
        help="PNG, WebP (without loss) or JPEG to write, replaced if it is there; {seed}, {index} and {prompt} in its "
        "name are filled in, without them several get -1, -2, ... (default zimage-SEED.png, numbered)",
    )
    p.add_argument("--sheet", type=Path, metavar="FILE", help="all pictures side by side in one more file")
    add_size(p)
    p.add_argument(
        "--aspect",
        type=option(notation.aspect),
        metavar="W:H",
        help="16:9, 3:2, 1:1, 2:3 ... of the default area, instead of --width and --height",
    )
    p.add_argument("--upscale", type=float, metavar="FACTOR", help=UPSCALE)
    add_preset(p)
    p.add_argument("--seed", type=int, help="0 to 2^64 - 1; picture i of a batch uses SEED + i (default random)")
    p.add_argument("--batch", type=int, default=1, help="pictures of each prompt, 1 to 10000 (default 1)")
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
        type=option(notation.borders),
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
    add_sampling(p)
    add_budget(p)
    p.add_argument("--json", action="store_true", help="end with a line of the plan, timings and peak memory per stage")
    add_runtime(p)
    add_precision(p)
    p.set_defaults(restored=[], refuse=p.error)
    return p


def add_sampling(p: Parser) -> None:
    """Sampler and schedule, negative prompts without guidance, variety, the limit of a prompt."""
    p.add_argument("--sampler", choices=SAMPLERS, default="euler", help="default euler; heun takes twice the time")
    p.add_argument("--schedule", choices=SCHEDULES, default="even", help="default even; the others are ComfyUI's")
    p.add_argument("--shift", type=float, help="of the sigmas, above 0 to 100 (default the model's own, Turbo's 3)")
    p.add_argument(
        "--nag-scale",
        type=float,
        default=0.0,
        help="0 to 100; above 0 --negative-prompt works without guidance, at the cost of a second attention; 0.5 to 1 "
        "suits quantized models (default 0, off)",
    )
    p.add_argument("--nag-tau", type=float, default=2.5, help="1 or more: limit of what that may add (default 2.5)")
    p.add_argument("--nag-alpha", type=float, default=0.5, help="0 to 1: share of it in the result (default 0.5)")
    p.add_argument(
        "--variety",
        type=option(notation.variety),
        metavar="STRENGTH[:SHARE[:UNTIL]]",
        help="make seeds differ more: noise on that share of a prompt's features (0.5 unless given), until that part "
        "of the way (0.5); 2 to 8 is usual, 0 is off (default)",
    )
    p.add_argument("--max-tokens", type=int, default=512, help="that prompts are cut at, 16 to 1536 (default 512)")


def run(args: argparse.Namespace) -> int:
    """Generate, save and print the paths; with --json the facts of the run behind them."""
    started = time.perf_counter()
    args.prompt = [read_prompt(text) for text in args.prompt] or args.restored
    if not args.prompt:
        args.refuse("a prompt is required, one or several; - reads it from standard input")
    count = len(args.prompt) * args.batch
    check_outputs(args.out, count)
    if args.sheet:
        check_outputs(args.sheet, 1)
    advise_preset(args)
    take_preset(args)
    take_aspect(args)
    image, mask = edited(args)
    controls = read_controls(args)
    if args.strength is None:
        args.strength = 1.0 if image is None or mask else 0.6
    from ..pipeline import load_pipeline

    pipeline = load_pipeline(**pipeline_options(args), once=args.upscale is None)
    pipeline.hold_budget()
    pipeline.set_loras(args.lora)
    pictures = generate(pipeline, args, image, mask, controls)
    seeds = pictures.seeds or []
    logger.info("seed %s", " to ".join(map(str, seeds[:1] + seeds[1:][-1:])))
    used = settings(pipeline, args, pictures)
    saved = save(pictures, args, used)
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
        prompt = args.prompt[0] if len(args.prompt) == 1 else args.prompt
        facts = {"images": saved, "prompt": prompt, **used, "seconds": seconds, "stages": stages}
        print(json.dumps(facts | {"plan": pictures.plan.facts()}))
    return 0


def advise_preset(args: argparse.Namespace) -> None:
    """Warn if a model's name or metadata suggest another preset than the default."""
    if args.preset is None and args.model is not None and args.steps is None and args.guidance is None:
        from ..formats.identify import likely_variant

        if likely_variant(args.model) == "base":
            print(f"zimage: {args.model} seems to be Z-Image, not Turbo: --preset base is made for it", file=sys.stderr)


def take_aspect(args: argparse.Namespace) -> None:
    """Width and height from --aspect. ValueError where they are given, too."""
    if args.aspect is None:
        return
    if args.width or args.height:
        raise ValueError("--aspect: expected no --width or --height beside it, found one; leave it or them out")
    args.width, args.height = of_aspect(args.aspect, DEMO_SIZE if args.model is None else REAL_SIZE)


def edited(args: argparse.Namespace) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to start from, with its borders, and the mask of what is repainted."""
    from ..pictures import pad, read_image

    image = read_image(args.image) if args.image else None
    mask = read_image(args.mask) if args.mask else None
    if args.pad:
        if image is None or mask:
            raise ValueError(f"--pad: expected --image and no --mask, found {'no' if image is None else 'a'} picture")
        image, mask = pad(image, *args.pad)
    return image, mask


def read_controls(args: argparse.Namespace) -> list[Control]:
    """The ControlNets with their pictures. ValueError unless there is a picture for each, or one for all, or none."""
    if args.control_image and not args.control:
        raise ValueError("--control-image: expected a ControlNet with it, found none; name it with --control")
    from ..control import Control
    from ..pictures import canny, read_image

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
    """The pictures, with a progress bar for each stage; args get the size of those that are not enlarged."""
    from ..variety import Variety

    progress = Progress()
    asked = {
        "guidance_scale": args.guidance,
        "negative_prompt": args.negative_prompt,
        "num_images_per_prompt": args.batch,
        "control": controls,
        "sampler": args.sampler,
        "schedule": args.schedule,
        "shift": args.shift,
        "nag_scale": args.nag_scale,
        "nag_tau": args.nag_tau,
        "nag_alpha": args.nag_alpha,
        "variety": Variety(*args.variety) if args.variety else 0.0,
        "max_sequence_length": args.max_tokens,
        "on_stage": progress.start,
        "on_step": progress.step,
    }
    asked |= {"image": image, "strength": args.strength, "mask": mask, "feather": args.feather, "upscale": args.upscale}
    asked |= {"height": args.height, "width": args.width, "num_inference_steps": args.steps, "generator": args.seed}
    try:
        found = pipeline(args.prompt, **asked)
        if args.upscale is None:
            args.width, args.height = found[0].size
        return found
    finally:
        progress.finish()


def settings(pipeline: Pipeline, args: argparse.Namespace, pictures: Pictures) -> dict[str, object]:
    """What the pictures were made with, as the PNG files and --json have it."""
    from ..device import dtype_name

    backend = pictures.backend
    found: dict[str, object] = {
        "width": pictures[0].width,
        "height": pictures[0].height,
        "steps": args.steps,
        "guidance": args.guidance,
        "sampler": args.sampler,
        "schedule": args.schedule,
        "model": "bundled demo" if args.model is None else Path(args.model).name,
        "device": str(pipeline.device),
        "dtype": dtype_name(pipeline.dtype),
        "backend": backend.name if backend else "dense",
        "precision": backend.precision if backend else None,
        "attention": pipeline.sources.attention,
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
    if args.nag_scale:
        found["nag"] = [args.nag_scale, args.nag_tau, args.nag_alpha]
    if args.variety:
        found["variety"] = args.variety
    if args.upscale:
        found["upscale"] = args.upscale
    return found


def save(pictures: Pictures, args: argparse.Namespace, used: dict[str, object]) -> list[dict[str, object]]:
    """Write each picture with its facts and print its path; returns path and seed of each, for --json."""
    saved: list[dict[str, object]] = []
    seeds, count = pictures.seeds or [], len(pictures)
    again = options(args, seed=seeds[0], dtype=used["dtype"], precision=used["precision"], backend=used["backend"])
    common = used | {"prompts": args.prompt, "options": again}
    if args.negative_prompt:
        common["negative_prompt"] = args.negative_prompt
    for i, (picture, seed) in enumerate(zip(pictures, seeds)):
        prompt = args.prompt[i // args.batch]
        path = output_path(args.out, i + 1, count, seed, prompt) if args.out else free_name(seed)
        whole.write(path, metadata.encoded(picture, {"prompt": prompt, "seed": seed, **common}, path.suffix))
        saved.append({"path": str(path), "seed": seed})
        print(path)
    if args.sheet:
        facts = {"prompt": args.prompt[0], "seed": seeds[0], **common}
        whole.write(args.sheet, metadata.encoded(contact_sheet(pictures), facts, args.sheet.suffix))
        print(args.sheet)
    return saved


def contact_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, in about as many rows as columns."""
    from PIL import Image

    columns = math.ceil(len(pictures) ** 0.5)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


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
