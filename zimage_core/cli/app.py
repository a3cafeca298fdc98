"""The `zimage` command: generate, download, quantize, quantize-encoder, inspect, doctor, bench.

Results go to stdout, progress and complaints to stderr. Input that cannot be used ends in one line that names the
remedy and exit code 2; this file's `main` is the only place that turns exceptions into exit codes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from .. import __version__

GIB = 2**30
EXIT_INPUT, EXIT_MEMORY, EXIT_INTERRUPT, EXIT_BROKEN_PIPE = 2, 3, 130, 141
PACKAGES = ("safetensors", "transformers", "huggingface_hub", "diffusers", "triton", "comfy-kitchen", "nunchaku")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"zimage: {message}", file=sys.stderr)
            code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("zimage: interrupted", file=sys.stderr)
        return EXIT_INTERRUPT
    except BrokenPipeError:
        # The reader has gone, as in `zimage inspect FILE | head -1`; keep the interpreter from flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError) as error:
        print(f"zimage: {one_line(error)}", file=sys.stderr)
        return EXIT_INPUT
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print("zimage: out of memory; try smaller pictures, one at a time, or --device cpu", file=sys.stderr)
        return EXIT_MEMORY


def one_line(error: ValueError | OSError) -> str:
    """The error as one sentence, the system's own words for a file included."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}; check the path and its permissions"
    return " ".join(str(error).split())


class Parser(argparse.ArgumentParser):
    """argparse with complaints of one line."""

    def error(self, message: str):
        self.exit(EXIT_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="zimage", description="Z-Image Turbo from SVDQuant INT4 checkpoints.")
    parser.add_argument("--version", action="version", version=f"zimage {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    p = commands.add_parser("generate", help="draw pictures from a prompt")
    p.set_defaults(run=generate)
    p.add_argument("prompt")
    p.add_argument("--negative-prompt", help="what to avoid; needs --guidance above 0")
    p.add_argument("--out", type=Path, help="PNG to write (default zimage-SEED.png); a batch adds -1, -2, ...")
    p.add_argument("--width", type=int, help="pixels, a multiple of 16 (default 1024; 128 with the bundled demo)")
    p.add_argument("--height", type=int, help="likewise")
    p.add_argument("--steps", type=int, default=8, help="1 to 100 (default 8)")
    p.add_argument("--seed", type=int, help="picture i of a batch uses SEED + i (default random)")
    p.add_argument("--batch", type=int, default=1, help="pictures to draw (default 1)")
    p.add_argument("--model", help="transformer file or folder, or a whole diffusers folder (default: bundled demo)")
    p.add_argument("--text-encoder", help="Qwen3-4B folder or safetensors file")
    p.add_argument("--tokenizer", help="tokenizer.json or its folder (default: beside the text encoder)")
    p.add_argument("--vae", help="VAE file or folder")
    p.add_argument(
        "--lora",
        type=lora_option,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA of any kind; may be given several times (strength 1 unless given, negative turns it round)",
    )
    p.add_argument("--image", type=Path, help="picture to start from")
    p.add_argument("--strength", type=float, default=0.6, help="how far to go from --image, above 0 to 1 (default 0.6)")
    p.add_argument("--guidance", type=float, default=0.0, help="0 for Turbo (default), above 0 costs twice the time")
    p.add_argument(
        "--vram-budget",
        default="auto",
        metavar="SIZE",
        help="GPU memory to use, 4GiB say; what does not fit is streamed from the host (default auto: what is free)",
    )
    p.add_argument("--json", action="store_true", help="end with a line of the plan, timings and peak memory per stage")
    _add_runtime(p)
    p.add_argument("--backend", default="auto", help="auto, reference, or one that `zimage doctor` lists")
    p.add_argument("--precision", default="auto", help="auto, w4a16, w4a8 or w4a4")

    p = commands.add_parser("download", help="fetch model, text encoder, VAE and tokenizer from the Hugging Face hub")
    p.set_defaults(run=download)
    p.add_argument("model", help="int4-r256 (best), int4-r128 or int4-r32 (smallest)")
    p.add_argument("--text-encoder", default="fp8", help="fp8 (default), bf16, q8_0, q4_k_m, or none")
    p.add_argument("--comfyui", type=Path, help="ComfyUI folder to put them into (default: the hub's cache)")

    p = commands.add_parser("quantize", help="write an SVDQuant INT4 file from a BF16 transformer")
    p.set_defaults(run=quantize)
    p.add_argument("src", help="BF16 transformer, file or folder")
    p.add_argument("dst", type=Path, help="safetensors file to write")
    p.add_argument("--rank", type=int, default=256, help="of the low-rank branch, a multiple of 16 (default 256)")
    p.add_argument("--text-encoder", type=Path, help="Qwen3-4B, to calibrate with (default: the one of SRC's folder)")
    p.add_argument("--tokenizer", type=Path, help="its tokenizer.json or folder (default: beside it)")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one a line, best of the model's own kind")
    p.add_argument("--size", type=int, help="pixels of an edge of the pictures to calibrate on (512, on a CPU 256)")
    p.add_argument("--no-calibration", action="store_true", help="from the weights alone: quicker, larger error")
    p.add_argument(
        "--merge",
        type=lora_option,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to make part of the weights first; may be repeated",
    )
    p.add_argument("--skip-refiners", action="store_true", help="leave the refiners in bf16: larger file, less error")
    p.add_argument("--device", help="where to compute (default: a GPU if torch sees one)")

    p = commands.add_parser("quantize-encoder", help="write a smaller text encoder file from a BF16 one")
    p.set_defaults(run=quantize_encoder)
    p.add_argument("src", type=Path, help="BF16 text encoder: safetensors file or folder, or GGUF file")
    p.add_argument("dst", type=Path, help="safetensors file to write")
    p.add_argument("--bits", type=int, choices=(8, 4), default=8, help="8 (quanto INT8, default) or 4 (NVFP4)")
    p.add_argument("--device", default="cpu", help="where to compute (default cpu)")

    p = commands.add_parser("inspect", help="tell what a safetensors file is, from its header")
    p.set_defaults(run=inspect)
    p.add_argument("file", type=Path)
    p.add_argument("--json", action="store_true", help="as one JSON object")

    p = commands.add_parser("compare", help="draw the same seeds with several models, side by side, with PSNR and SSIM")
    p.set_defaults(run=compare)
    p.add_argument("prompt")
    p.add_argument("--models", nargs="+", required=True, help="transformer files or folders; the first is the measure")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a row of pictures each (default 0 1)")
    p.add_argument("--out", type=Path, default=Path("zimage-compare.png"), help="PNG to write (zimage-compare.png)")
    p.add_argument("--width", type=int, help="pixels, a multiple of 16")
    p.add_argument("--height", type=int, help="likewise")
    p.add_argument("--steps", type=int, default=8, help="1 to 100 (default 8)")
    p.add_argument("--text-encoder", help="Qwen3-4B folder or file, for all models")
    p.add_argument("--tokenizer", help="its tokenizer.json or folder (default: beside it)")
    p.add_argument("--vae", help="VAE file or folder, for all models")
    p.add_argument("--json", action="store_true", help="end with a line of scores")
    _add_runtime(p)
    p.add_argument("--backend", default="auto", help="auto, reference, or one that `zimage doctor` lists")
    p.add_argument(
        "--precision",
        nargs="+",
        default=["auto"],
        help="auto, w4a16, w4a8 or w4a4: one for all models, or one for each (BF16 models have no choice)",
    )

    p = commands.add_parser("doctor", help="tell what this machine can run, and why not")
    p.set_defaults(run=doctor)
    p.add_argument("--json", action="store_true", help="as one JSON object")

    p = commands.add_parser("bench", help="time linears and a step on this machine, to be pasted into an issue")
    p.set_defaults(run=bench)
    p.add_argument("--model", help="transformer file (default: random weights, of the demo's size on a CPU)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if torch sees one)")
    p.add_argument("--size", type=int, help="pixels of an edge (default 1024, 256 on a CPU)")
    return parser


def lora_option(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH -> (file, strength); what follows the last colon counts only if it is a number."""
    path, colon, number = text.rpartition(":")
    try:
        return (path, float(number)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def _add_runtime(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if torch sees one)")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default bfloat16; float16 on GPUs without it)")


class Progress:
    """A bar on stderr for the stage at hand; silent where stderr is no terminal."""

    def __init__(self, layout: str = "{desc:<18} |{bar:28}| {n_fmt}/{total_fmt} {elapsed}"):
        self.layout = layout
        self.bar = None

    def start(self, name: str, steps: int) -> None:
        from tqdm import tqdm

        self.finish()
        self.bar = tqdm(total=steps, desc=name, bar_format=self.layout, disable=None, file=sys.stderr)

    def step(self, done: int, total: int, *_: object) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def say(self, words: str) -> None:
        """Show a few words where the layout has `{postfix}`."""
        self.bar.set_postfix_str(words, refresh=False)

    def finish(self) -> None:
        if self.bar is not None:
            self.step(self.bar.total, self.bar.total)
            self.bar.close()
            self.bar = None


def generate(args: argparse.Namespace) -> int:
    """Draw, save as PNG and print the paths."""
    started = time.perf_counter()
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.INFO)
    targets = output_paths(args.out, args.batch)
    image = read_image(args.image) if args.image else None
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
    progress = Progress()
    try:
        pictures = pipeline(
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
            on_stage=progress.start,
            on_step=progress.step,
        )
    finally:
        progress.finish()

    backend = pipeline.used_backend
    settings = {
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
        settings["loras"] = [[Path(path).name, strength] for path, strength in args.lora]
    if image is not None:
        settings |= {"image": args.image.name, "strength": args.strength}
    saved = []
    for i, (picture, seed) in enumerate(zip(pictures, pipeline.seeds)):
        path = targets[i] if targets else Path(f"zimage-{seed}.png")
        texts = {"prompt": args.prompt, "seed": str(seed), "settings": json.dumps(settings)}
        if args.negative_prompt:
            texts["negative_prompt"] = args.negative_prompt
        save_png(picture, path, texts)
        saved.append({"path": str(path), "seed": seed})
        print(path)
    if args.json:
        stages = [
            {
                "name": stage.name,
                "seconds": round(stage.seconds, 4),
                "device_peak_gib": _gib(stage.device_peak),
                "host_peak_gib": _gib(stage.host_peak),
            }
            for stage in pipeline.stages
        ]
        seconds = round(time.perf_counter() - started, 4)
        facts = {"images": saved, "prompt": args.prompt, **settings, "seconds": seconds, "stages": stages}
        print(json.dumps(facts | {"plan": pipeline.plan.facts()}))
    return 0


def download(args: argparse.Namespace) -> int:
    """Fetch the files and print how to use them."""
    from ..hub import download

    paths = download(args.model, args.text_encoder, comfyui=args.comfyui)
    for name, path in paths.items():
        print(f"--{name.replace('_', '-')}={path}")
    return 0


def output_paths(out: Path | None, batch: int) -> list[Path]:
    """Where the pictures of a batch go, empty where each is named after its seed. Raises ValueError before any work."""
    if out is None:
        return []
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: pictures are written as PNG; name a file that ends in .png")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it first")
    if batch == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(batch)]


def read_image(path: Path):
    """The picture of a file, decoded."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return image.copy()


def save_png(picture, path: Path, texts: Mapping[str, str]) -> None:
    """Write a PNG with text chunks under a temporary name, then rename it."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in {**texts, "Software": f"zimage-int4 {__version__}"}.items():
        info.add_text(name, text)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(part, format="PNG", pnginfo=info)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def quantize(args: argparse.Namespace) -> int:
    """Write the INT4 file, calibrated where there is a text encoder, and print its path."""
    from ..pipeline import choose_device
    from ..quantize.run import TimeLeft, calibration_captions, calibration_defaults, check_request, quantize_checkpoint

    encoder = args.text_encoder or Path(args.src) / "text_encoder"
    calibrated = not args.no_calibration and (args.text_encoder is not None or encoder.is_dir())
    device = choose_device(args.device)
    prompts, size = calibration_defaults(device)
    if args.size is not None:
        size = args.size
    check_request(args.dst, size, args.merge)
    if args.prompts and not calibrated:
        raise ValueError("--prompts: are to calibrate with, so name a --text-encoder and leave out --no-calibration")
    if args.prompts:
        prompts = read_prompts(args.prompts)
    cap_feats = None
    if calibrated:
        cap_feats = calibration_captions(encoder, prompts, tokenizer=args.tokenizer, device=device)
    elif not args.no_calibration:
        print(
            "zimage: without --text-encoder the file is made from the weights alone, with a larger error than a "
            "calibrated one; --no-calibration asks for that",
            file=sys.stderr,
        )
    progress, words = Progress("{desc} |{bar:28}| {percentage:3.0f}% {elapsed}{postfix}"), TimeLeft()

    def show(done: int, total: int, what: str) -> None:
        progress.say(words(done, total, what))
        progress.step(done, total)

    progress.start("quantize", 1)
    try:
        quantize_checkpoint(
            args.src,
            args.dst,
            rank=args.rank,
            cap_feats=cap_feats,
            size=size,
            merge=args.merge,
            skip_refiners=args.skip_refiners,
            device=device,
            progress=show,
        )
    finally:
        progress.finish()
    print(args.dst)
    return 0


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that say something. ValueError where there is none, or no text."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found other bytes ({error.reason}); save it as such") from error
    if not prompts:
        raise ValueError(f"{path}: expected a prompt a line, found none; write some, or leave out --prompts")
    return prompts


def compare(args: argparse.Namespace) -> int:
    """Draw the sheet and print the scores."""
    targets = output_paths(args.out, 1)
    from ..compare import compare
    from ..formats.load import identify
    from ..linear.backends import select
    from ..pipeline import load_pipeline

    precisions = args.precision * len(args.models) if len(args.precision) == 1 else args.precision
    if len(precisions) != len(args.models):
        raise ValueError(f"--precision: expected 1 or {len(args.models)}, one for each model, found {len(precisions)}")
    models = {}
    for model, precision in zip(args.models, precisions, strict=True):
        load = partial(
            load_pipeline,
            model,
            args.text_encoder,
            args.vae,
            tokenizer=args.tokenizer,
            device=args.device,
            dtype=args.dtype,
            backend=args.backend,
            precision=precision,
        )
        pipeline = load()  # reads no more than headers, and refuses what would be refused after the first pictures
        quantized = identify(pipeline.files.model).rank
        if quantized:
            select(args.backend, precision, device=pipeline.device, dtype=pipeline.dtype)
        label = f"{model} {precision}" if quantized and len(args.precision) > 1 else model
        if label in models:
            raise ValueError(f"--models: {label} is there twice; leave one out, or give --precision for each model")
        models[label] = load
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
    save_png(sheet, targets[0], {"prompt": args.prompt, "seeds": json.dumps(args.seeds)})
    print(targets[0])
    for score in scores:
        print(f"{score.label}, seed {score.seed}: PSNR {score.psnr:.2f} dB, SSIM {score.ssim:.4f}")
    if args.json:
        # equal pictures have an infinite PSNR, for which JSON has no number
        rows = [vars(score) | {"psnr": score.psnr if math.isfinite(score.psnr) else None} for score in scores]
        print(json.dumps({"sheet": str(targets[0]), "scores": rows}))
    return 0


def quantize_encoder(args: argparse.Namespace) -> int:
    """Write the smaller text encoder and print its path."""
    from ..pipeline import choose_device
    from ..quantize.encoder import quantize_encoder as write

    device = choose_device(args.device)
    progress = Progress()
    progress.start("quantize-encoder", 1)
    try:
        write(args.src, args.dst, bits=args.bits, device=device, progress=progress.step)
    finally:
        progress.finish()
    print(args.dst)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Print what a file or folder holds, from its header alone, and what would run it here."""
    facts = inspect_file(args.file)
    if args.json:
        print(json.dumps(facts))
        return 0
    runs = facts.pop("runs_here", None)
    metadata = facts.pop("metadata")
    print_facts(facts)
    if metadata:
        print("metadata:")
        for name, value in metadata.items():
            print(f"  {name}: {value if len(value) <= 300 else value[:300] + ' ...'}")
    if runs:
        sys.stdout.flush()
        print(f"runs here: {runs}")
    return 0


def inspect_file(path: Path) -> dict:
    """What a safetensors file or folder is: kind, sizes, metadata and, for a transformer, what would run it here."""
    from ..formats.load import describe, identify
    from ..formats.safetensors import open_tensors, tensor_bytes

    files = open_tensors(path)
    kind = describe(files.tensors, files.metadata)
    dtypes: dict[str, int] = {}
    for dtype, shape in files.tensors.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + tensor_bytes(dtype, shape)
    facts = {
        "file": str(path),
        "format": kind,
        "tensors": len(files.tensors),
        "gib": _gib(sum(dtypes.values())),
        "gib_by_dtype": {name: _gib(count) for name, count in dtypes.items()},
        "metadata": {name: " ".join(value.split()) for name, value in files.metadata.items()},
    }
    if kind == "a LoRA":
        from ..lora.apply import inspect as inspect_lora

        report = inspect_lora(path)
        facts |= {
            "modules": report.transformer,
            "text_encoder_modules": report.text_encoder,
            "by_format": dict(report.formats),
            "keys_matched": len(report.matched),
            "unmatched": list(report.unmatched),
            "ignored": [f"{key} ({why})" for key, why in report.ignored.items()],
            "costs": list(report.costs),
            "warnings": list(report.warnings),
        }
    if kind not in ("svdq-int4", "dense"):
        return facts
    info = identify(files)
    config = info.config
    facts |= {
        "format": "SVDQuant INT4, group 64" if info.rank else f"dense {info.dtype}",
        "rank": info.rank or None,
        "quantized_refiners": info.quantized_refiners,
        "layers": config.n_layers,
        "refiner_layers": config.n_refiner_layers,
        "width": config.dim,
        "heads": config.n_heads,
        "ffn_width": config.ffn_dim,
        "caption_width": config.cap_feat_dim,
        "runs_here": what_runs(quantized=bool(info.rank)),
    }
    return facts


def what_runs(quantized: bool) -> str:
    """The device, backend and precision that `auto` would choose on this machine."""
    from ..pipeline import choose_device, choose_dtype

    device = choose_device(None)
    dtype = choose_dtype(None, device)
    where = f"on {device} in {str(dtype).removeprefix('torch.')}"
    if not quantized:
        return where
    from ..linear.backends import select

    backend = select("auto", "auto", device=device, dtype=dtype)
    return f"{backend.name} {backend.precision} {where}"


def doctor(args: argparse.Namespace) -> int:
    """Print what this machine has and can run."""
    facts = diagnose()
    if args.json:
        print(json.dumps(facts))
    else:
        print_facts(facts)
    return 0 if facts["torch"] else 1


def bench(args: argparse.Namespace) -> int:
    """Print tables of timings, and as the last line the same as JSON."""
    from ..bench import bench

    bench(args.model, args.device, args.size)
    return 0


def diagnose() -> dict:
    """Python, torch, GPUs, packages, and every backend with the reason why it cannot be used."""
    facts = {
        "zimage-int4": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": None,
        "packages": {name: package_state(name) for name in PACKAGES},
    }
    if importlib.util.find_spec("torch") is None:
        facts["remedy"] = "torch is missing; install it as https://pytorch.org says for this machine"
        return facts
    import torch

    from ..linear.backends import report
    from ..pipeline import choose_device, choose_dtype

    device = choose_device(None)
    dtype = choose_dtype(None, device)
    facts["torch"] = torch.__version__
    facts["cuda"] = torch.version.cuda
    facts["gpus"] = [gpu_state(i) for i in range(torch.cuda.device_count())]
    facts["device"] = str(device)
    facts["dtype"] = str(dtype).removeprefix("torch.")
    facts["backends"] = {
        name: reason or f"available ({', '.join(precisions)})" for name, reason, precisions in report(device, dtype)
    }
    facts["auto"] = what_runs(quantized=True)
    return facts


def gpu_state(index: int) -> str:
    """Name, compute capability and memory of a GPU."""
    import torch

    gpu = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def package_state(name: str) -> str:
    """A package's version, or why it is of no use here."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    if name == "nunchaku" and not is_nunchaku_engine():
        return (
            f"{version}, but this is the unrelated statistics library of that name from PyPI, "
            "not the inference engine; it is not used"
        )
    return version


def is_nunchaku_engine() -> bool:
    """Whether the installed package called nunchaku is the inference engine, told by its files."""
    spec = importlib.util.find_spec("nunchaku")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return any((folder / "models").is_dir() or any(folder.glob("_C.*")) for folder in folders)


def print_facts(facts: Mapping) -> None:
    """Print a table of names and values, lists and nested tables indented."""
    for name, value in facts.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            print(f"{label}:")
            for key, inner in value.items():
                print(f"  {key}: {inner}")
        elif isinstance(value, list):
            print(f"{label}: {'; '.join(map(str, value)) or 'none'}")
        else:
            print(f"{label}: {'none' if value is None else value}")


def _gib(count: int | None) -> float | None:
    return None if count is None else round(count / GIB, 3)
