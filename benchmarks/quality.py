"""How much INT4 costs in quality: single layers against deepcompressor's recipe, and the demo model's pictures.

    python benchmarks/quality.py layers [--width 3840] [--out 3840] [--rank 128] [--seeds 2] [--inputs outliers white]
    python benchmarks/quality.py demo-layers --source BF16.safetensors [--ranks 32 128]
    python benchmarks/quality.py demo --source BF16.safetensors [--ranks 16 32 64 128] [--captions 24] [--plot FILE.png]
    python benchmarks/quality.py demo-formats --source BF16.safetensors [--captions 20]

`layers` quantizes random layers for white inputs and for inputs as transformers have them, `demo-layers` the demo's own
linears for what they get while it generates; `quality_layers.py` says how.
`demo` quantizes the demo's BF16 transformer, plain, calibrated on captions of its own kind, and calibrated on the
prompts that come with `zimage quantize`, which are of other kinds, and compares with BF16 for the same noise: error of
the predicted flow, PSNR of the last latents, PSNR and SSIM of the picture, and whether it shows what was asked.
`demo-formats` stores the demo in 8 bits, as quanto and as ComfyUI's scaled FP8 files do, and compares alike; the median
over the pictures is what counts there; w8a8 rounds activations to the weights' form, in plain torch.
All on the CPU in fp32; w4a8 rounds to fp8 where `backends.triton` does and computes in fp32, too.
Each prints a table for people and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import rivals
import torch
import torch.nn.functional as F
from quality_layers import PRECISIONS, ROOT, fp8, measure_demo_layers, measure_layers
from torch import Tensor

from zimage_core import report
from zimage_core.formats.stored import EIGHT_BIT, StoredLinear
from zimage_core.linear.backends import Backend, triton
from zimage_core.linear.svdq import SVDQLinear, SVDQWeights

PLAIN, CALIBRATED, BUILT_IN = "plain", "calibrated", "calibrated, built-in prompts"


def measure_demo(source: Path, ranks: list[int], captions: int, calibration: int, precisions: list[str]) -> list[dict]:
    """Error of flow, latents, picture and prompt for every rank, way and precision."""
    sys.path.insert(0, str(ROOT / "demo_training"))
    import measure
    import numpy as np
    import scenes

    from zimage_core.compare import psnr, ssim
    from zimage_core.demo import demo_files
    from zimage_core.quantize.calibrate import PROMPTS
    from zimage_core.quantize.run import calibration_captions, quantize_checkpoint

    others = {name: path for name, path in demo_files().items() if name != "model"}
    asked = scenes.held_out_captions(captions + calibration)
    shown, kept = asked[:captions], asked[captions:]
    ways = {
        PLAIN: {"cap_feats": None},
        CALIBRATED: {"cap_feats": calibration_captions(others["text_encoder"], [caption for caption, _ in kept])},
        BUILT_IN: {"cap_feats": calibration_captions(others["text_encoder"], PROMPTS), "size": 256},
    }
    right = draw(source, others, [caption for caption, _ in shown])
    rows = []

    def add(rank: int | str, way: str, precision: str, path: Path, size: float, form: str | None = None) -> None:
        drawn = draw(path, others, [caption for caption, _ in shown], precision, right["steps"], form)
        size -= drawn["saved"]
        pairs = list(zip(right["pictures"], drawn["pictures"], strict=True))
        scenes_drawn = zip(drawn["pictures"], shown, strict=True)
        facts = [measure.check(np.asarray(picture), scene) for picture, (_, scene) in scenes_drawn]
        similar = [min(psnr(a, b), 99.0) for a, b in pairs]
        latents = (drawn["latents"] - right["latents"]).square().mean() / right["latents"].var()
        rows.append(
            {
                "rank": rank, "way": way, "precision": precision, "MB": size / 1e6,
                "flow error": drawn["flow error"], "latent PSNR": -10 * math.log10(max(latents.item(), 1e-10)),
                "PSNR": sum(similar) / len(similar), "SSIM": sum(ssim(a, b) for a, b in pairs) / len(pairs),
                **measure.figures(facts),
            }
        )  # fmt: skip
        print(table([rows[-1]]).splitlines()[-1], flush=True)

    add("-", "bf16", "auto", source, source.stat().st_size)
    for form in rivals.rivals():
        add("-", f"ComfyUI {form}", rivals.ACTIVATIONS[form], source, source.stat().st_size, form)
    with tempfile.TemporaryDirectory() as folder:
        for rank in ranks:
            for way, options in ways.items():
                path = Path(folder) / f"{way}-{rank}.safetensors"
                quantize_checkpoint(source, path, rank=rank, **{"size": 128} | options)
                for precision in precisions:
                    add(rank, way, precision, path, path.stat().st_size)
    return rows


def eight_bit_linears(tensors: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """A BF16 transformer's tensors with the blocks' linears in quanto's INT8 or in FP8 with a scale for each row."""
    found = dict(tensors)
    for name in [n for n, t in tensors.items() if t.ndim == 2 and (".attention." in n or ".feed_forward." in n)]:
        weight = found.pop(name)
        if form == "INT8":
            scale = weight.abs().amax(1, keepdim=True) / 127
            codes = (weight / scale).round().clamp(-128, 127).to(torch.int8)
            found |= {f"{name}._data": codes, f"{name}._scale": scale}
        else:
            scale = weight.float().abs().amax(1, keepdim=True) / 448
            found |= {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    return found


def measure_formats(source: Path, captions: int) -> list[dict]:
    """PSNR of the pictures of the demo stored in 8 bits to BF16's, its median and its least, for each form and way."""
    sys.path.insert(0, str(ROOT / "demo_training"))
    import scenes
    from safetensors.torch import load_file, save_file

    from zimage_core.compare import psnr
    from zimage_core.demo import demo_files
    from zimage_core.formats.safetensors import read_header

    others = {name: path for name, path in demo_files().items() if name != "model"}
    asked = [caption for caption, _ in scenes.held_out_captions(captions)]
    right, rows = draw(source, others, asked), []
    with tempfile.TemporaryDirectory() as folder:
        for form, precision in product(("INT8", "FP8"), ("auto", "w8a8")):
            path = Path(folder) / f"{form}.safetensors"
            if not path.exists():
                save_file(eight_bit_linears(load_file(source), form), path, read_header(source).metadata)
            found = draw(path, others, asked, precision, right["steps"])
            decibels = sorted(psnr(a, b) for a, b in zip(right["pictures"], found["pictures"], strict=True))
            median = sum(decibels[(captions - 1) // 2 : captions // 2 + 1]) / (2 - captions % 2)
            rows.append(
                {
                    "form": form,
                    "activations": "16" if precision == "auto" else "8",
                    "pictures": captions,
                    "flow error": found["flow error"],
                    "median PSNR": median,
                    "least": decibels[0],
                }
            )
    return rows


def int8(values: Tensor) -> Tensor:
    """Values (..., columns) rounded to int8 with a scale for each row."""
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (values / scale).round() * scale


def use_w8a8(transformer: torch.nn.Module) -> None:
    """Have every linear that is stored in 8 bits multiply activations of 8 bits, in plain torch."""
    for module in transformer.modules():
        form = module.pieces[0][0] if isinstance(module, StoredLinear) else None
        if form in EIGHT_BIT:
            rounded = int8 if form == "int8" else fp8
            weight, bias = module.dense_weight(), module.bias
            module.forward = lambda x, rounded=rounded, weight=weight, bias=bias: F.linear(rounded(x), weight, bias)


def use_fp8(transformer: torch.nn.Module) -> None:
    """Have every INT4 linear compute as w4a8 with fp8 does, in plain torch."""

    def prepare(weights: SVDQWeights, precision: str) -> dict[str, Tensor]:
        scale = triton.prepare(weights, precision)["wide_scale"][:, None]
        return weights.tensors() | {"rounded": fp8(weights.residual(), scale)}

    def linear(x: Tensor, prepared: dict[str, Tensor], precision: str) -> Tensor:
        y = F.linear(fp8(x / prepared["smooth_factor"]), prepared["rounded"], prepared.get("bias"))
        return torch.addmm(y, x @ prepared["proj_down"].T, prepared["proj_up"].T)

    backend = Backend("torch", "w4a8", SimpleNamespace(prepare=prepare, linear=linear), "fp8 in plain torch")
    for module in transformer.modules():
        if isinstance(module, SVDQLinear):
            module.load(module.weights(), backend)


@torch.inference_mode()
def draw(
    model: Path, others: dict[str, Path], captions: list[str], precision: str = "auto", steps=None, form=None
) -> dict:
    """Pictures and last latents of the captions from seeds 0, 1, ...; and, given another model's steps, the relative
    error of the flow at its latents, which a picture's drift does not blur."""
    from PIL import Image

    from zimage_core.formats.encoder import load_text_encoder
    from zimage_core.formats.load import load_transformer
    from zimage_core.formats.vae import load_vae
    from zimage_core.models.text_encoder import encode_prompts
    from zimage_core.models.tokenizer import load_tokenizer
    from zimage_core.models.vae import decode_image
    from zimage_core.sampler import draw_noise, get_sigmas, predict_flow

    encoder = load_text_encoder(others["text_encoder"], dtype=torch.float32)
    feats = encode_prompts(encoder, load_tokenizer(others["tokenizer"]), captions)
    by_hand = {"w4a8": use_fp8, "w8a8": use_w8a8}.get(precision) if not form else None
    transformer = load_transformer(
        model, device="cpu", dtype=torch.float32, precision="auto" if by_hand or form else precision
    )
    saved = rivals.replace_linears(transformer, form) if form else 0
    if by_hand:
        by_hand(transformer)
    vae = load_vae(others["vae"], device="cpu")
    sigmas = get_sigmas(8)
    seen, latents, errors = [], [], []
    for i, caption in enumerate(feats):
        cond = transformer.prepare([caption], 128, 128)
        x, path = draw_noise(i, 1, 128, 128), []
        for step in range(8):
            flow = predict_flow(transformer, x, sigmas[step], cond)
            path.append((x, flow))
            if steps:
                theirs, true = steps[i][step]
                off = predict_flow(transformer, theirs, sigmas[step], cond) - true
                errors.append((off.norm() / true.norm()).item())
            x = x + (sigmas[step + 1] - sigmas[step]) * flow
        seen.append(path)
        latents.append(x)
    pixels = [(decode_image(vae, x)[0] * 255).round().to(torch.uint8).numpy() for x in latents]
    return {
        "pictures": [Image.fromarray(picture) for picture in pixels],
        "latents": torch.cat(latents),
        "steps": seen,
        "saved": saved,
        "flow error": sum(errors) / max(len(errors), 1),
    }


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""

    def cell(value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.1f}" if abs(value) > 1 else f"{value:.4f}"

    heads = max(rows, key=len)
    lines = [list(heads), ["---"] * len(heads), *([cell(row.get(head, "")) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: list[dict], path: Path) -> None:
    """PSNR of the pictures over the rank, a line for each way and precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    quantized = [row for row in rows if row["rank"] != "-"]
    for i, precision in enumerate(dict.fromkeys(row["precision"] for row in quantized)):
        for way, style in ((CALIBRATED, "-"), (BUILT_IN, ":"), (PLAIN, "--")):
            line = [row for row in quantized if (row["precision"], row["way"]) == (precision, way)]
            x, y = ([row[key] for row in line] for key in ("rank", "PSNR"))
            axes.plot(x, y, style, color=f"C{i}", marker="o", label=f"{precision} {way}")
    axes.set(xscale="log", xlabel="rank", ylabel="PSNR to BF16, dB", title="Demo model, INT4 against BF16")
    axes.set_xticks(ticks := sorted({row["rank"] for row in quantized}), [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    layers = commands.add_parser("layers")
    layers.add_argument("--width", type=int, default=3840)
    layers.add_argument("--out", type=int, default=3840)
    layers.add_argument("--rank", type=int, default=128)
    layers.add_argument("--seeds", type=int, default=2)
    layers.add_argument("--inputs", nargs="+", choices=("outliers", "white"), default=["outliers", "white"])
    linears = commands.add_parser("demo-layers")
    linears.add_argument("--source", type=Path, required=True, help="the demo's BF16 transformer")
    linears.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    demo = commands.add_parser("demo")
    demo.add_argument("--source", type=Path, required=True, help="the demo's BF16 transformer")
    demo.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    demo.add_argument("--captions", type=int, default=24)
    demo.add_argument("--calibration", type=int, default=16, help="prompts to calibrate with, other ones")
    demo.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    demo.add_argument("--plot", type=Path)
    formats = commands.add_parser("demo-formats")
    formats.add_argument("--source", type=Path, required=True, help="the demo's BF16 transformer")
    formats.add_argument("--captions", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.what == "demo-formats":
        rows = measure_formats(arguments.source, arguments.captions)
    elif arguments.what == "layers":
        given = (arguments.width, arguments.out, arguments.rank, arguments.seeds, arguments.inputs)
        rows = measure_layers(*given)
    elif arguments.what == "demo-layers":
        rows = measure_demo_layers(arguments.source, arguments.ranks)
    else:
        given = (arguments.source, arguments.ranks, arguments.captions, arguments.calibration, arguments.precisions)
        rows = measure_demo(*given)
        if arguments.plot:
            plot(rows, arguments.plot)
    print(table(rows))
    cpu = torch.device("cpu")
    report.print_json(f"quality {arguments.what}", report.machine(cpu, torch.float32), rows=rows)


if __name__ == "__main__":
    main()
