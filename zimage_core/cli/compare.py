"""`zimage compare`: pictures of several models side by side, with PSNR and SSIM."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import metadata, whole
from .options import Commands, Parser, add_runtime, add_size, pipeline_options
from .output import Progress, check_outputs

if TYPE_CHECKING:
    from ..pipeline import Pipeline


def add_parser(commands: Commands) -> Parser:
    about = "generate the same seeds with several models, side by side, with PSNR and SSIM"
    p = commands.add_parser("compare", help=about)
    p.add_argument("prompt", help="what to see")
    p.add_argument("--models", nargs="+", required=True, help="transformer files or folders, the reference first")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a row each, 0 to 2^64 - 1 (default 0 1)")
    p.add_argument("--out", type=Path, default=Path("zimage-compare.png"), help="PNG (default zimage-compare.png)")
    add_size(p)
    p.add_argument("--steps", type=int, default=8, help="1 to 100 (default 8)")
    p.add_argument("--text-encoder", help="Qwen3-4B folder or file, for all models")
    p.add_argument("--tokenizer", help="its tokenizer.json or folder (default: beside it)")
    p.add_argument("--vae", help="VAE file or folder, for all models")
    p.add_argument("--json", action="store_true", help="end with a line of scores")
    add_runtime(p)
    p.add_argument(
        "--precision",
        nargs="+",
        default=["auto"],
        help="auto, w4a16, w4a8 or w4a4: one for all models, or for each; BF16 has no choice (default auto)",
    )
    return p


def run(args: argparse.Namespace) -> int:
    """Write the sheet, print its path and the scores."""
    check_outputs(args.out, 1)
    from ..compare import compare

    models = pipelines(args)
    progress = Progress()
    progress.start("compare", len(models) * len(args.seeds))
    try:
        sheet, scores = compare(
            args.prompt,
            models,
            args.seeds,
            height=args.height,
            width=args.width,
            steps=args.steps,
            progress=progress.step,
        )
    finally:
        progress.finish()
    facts = {"prompt": args.prompt, "seeds": args.seeds, "models": list(models), "steps": args.steps}
    whole.write(args.out, metadata.encoded(sheet, facts, args.out.suffix))
    print(args.out)
    for score in scores:
        print(f"{score.label}, seed {score.seed}: PSNR {score.psnr:.2f} dB, SSIM {score.ssim:.4f}")
    if args.json:
        # equal pictures have an infinite PSNR, for which JSON has no number
        rows = [vars(score) | {"psnr": score.psnr if math.isfinite(score.psnr) else None} for score in scores]
        print(json.dumps({"sheet": str(args.out), "scores": rows}))
    return 0


def pipelines(args: argparse.Namespace) -> dict[str, Callable[[], Pipeline]]:
    """Label -> what loads its pipeline. ValueError, before any picture, for what one of them would refuse."""
    from ..formats.identify import model_info
    from ..linear.backends import select
    from ..pipeline import load_pipeline

    precisions = args.precision * len(args.models) if len(args.precision) == 1 else args.precision
    if len(precisions) != len(args.models):
        raise ValueError(f"--precision: expected 1 or {len(args.models)}, one for each model, found {len(precisions)}")
    models: dict[str, Callable[[], Pipeline]] = {}
    for model, precision in zip(args.models, precisions, strict=True):
        load = partial(load_pipeline, **{**pipeline_options(args), "model": model, "precision": precision})
        pipeline = load()  # reads headers only
        info = model_info(pipeline.files.model)
        quantized = bool(info.rank)
        if quantized:
            select(args.backend, precision, device=pipeline.device, dtype=pipeline.dtype, fp4=info.fp4)
        label = f"{model} {precision}" if quantized and len(args.precision) > 1 else model
        if label in models:
            raise ValueError(f"--models: {label} is there twice; leave one out, or give --precision for each model")
        models[label] = load
    return models
