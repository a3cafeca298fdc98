"""Single linears in INT4 against deepcompressor's recipe and ComfyUI's small forms, for `quality.py`.

Random layers get white inputs, or inputs as transformers have them: correlated, with outlier channels and loud tokens.
The demo's own linears get what they get while it generates. What counts is the outputs' relative error on inputs that
calibration never saw.

The rival "deepcompressor" is the published recipe of mit-han-lab/deepcompressor@69f3473
(examples/diffusion/configs/svdquant): 39 smoothing candidates by W4A4 output error with SVD and round-to-nearest, then
up to 100 rounds of SVD of what rounding left, stopped at the first that is worse; "+ gptq" is its gptq.yaml on top.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import rivals
import torch
from torch import Tensor

from zimage_core.linear.layout import unpack_nibbles
from zimage_core.linear.svdq import SVDQWeights
from zimage_core.quantize.solver import (
    InputStats,
    Parts,
    gptq,
    low_rank,
    round_plainly,
    squared_error,
    svdq_calibrated,
    svdq_from_dense,
)

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = {"w4a16": 16, "w4a8": 8, "w4a4": 4}
CALIBRATION_ROWS, TEST_ROWS, SEARCH_ROWS = 32768, 1024, 1024
OURS = "zimage quantize"


def random_layer(width: int, out: int, outliers: bool, seed: int) -> tuple[Tensor, Tensor]:
    """A weight (out, width) and inputs (rows, width), for calibration and test together."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    strengths = torch.linspace(1, 0.05, 64)
    structure = (normal(out, 64) * strengths) @ normal(64, width) / math.sqrt(64 * width)
    weight = (normal(out, width) / math.sqrt(width) + structure / 2) * (0.2 * normal(out, 1)).exp()
    inputs = normal(CALIBRATION_ROWS + TEST_ROWS, width)
    if not outliers:
        return weight, inputs
    spectrum = torch.arange(1, width + 1) ** -0.5
    inputs = (inputs * spectrum) @ torch.linalg.qr(normal(width, width)).Q.T
    channels = (0.5 * normal(width)).exp()
    channels[torch.randperm(width, generator=generator)[: width // 100]] *= 20
    return weight, inputs / inputs.std() * channels * (0.3 * normal(len(inputs), 1)).exp()


def deepcompressor(weight: Tensor, rank: int, stats: InputStats, absmax: Tensor) -> Parts:
    """Its published steps, without GPTQ."""
    rows = stats.rows[:SEARCH_ROWS]
    outputs = rows @ weight.T
    best, least, down = None, math.inf, None
    x, w = absmax.clamp(min=1e-5), weight.abs().amax(0).clamp(min=1e-5)
    alphas = [i / 20 for i in range(1, 20)]
    for alpha, beta in [(0, 0), *((a, 0) for a in alphas), *((a, 1 - a) for a in alphas)]:
        smooth = (x**alpha / w**beta).to(torch.bfloat16).float()
        up, down = low_rank(weight * smooth, rank, start=down)
        parts = round_plainly(weight * smooth, smooth, up, down)
        error = squared_error(parts, rows, outputs, 4).item()
        if error < least:
            best, least = parts, error
    smooth, parts = best.smooth, best
    for _ in range(100):
        up, down = low_rank(weight * smooth - parts.residual(), rank, start=parts.down * smooth)
        parts = round_plainly(weight * smooth, smooth, up, down)
        error = squared_error(parts, rows, outputs, 4).item()
        if error > least:
            break
        best, least = parts, error
    return best


def with_gptq(parts: Parts, weight: Tensor, stats: InputStats) -> Parts:
    """deepcompressor's GPTQ, which only rounds anew."""
    moments = stats.second_moments() / torch.outer(parts.smooth, parts.smooth)
    return replace(parts, codes=gptq(weight * parts.smooth - parts.branch(), parts.scales, moments, damping=0.01))


def as_parts(weights: SVDQWeights) -> Parts:
    """What a file's linear says, to be measured like the others."""
    w, codes = weights, unpack_nibbles(weights.qweight)
    return Parts(*(t.float() for t in (w.smooth_factor, w.proj_up, w.proj_down, codes, w.wscales)))


def quantized(weight: Tensor, rank: int, stats: InputStats, absmax: Tensor) -> Iterator[tuple[str, Parts]]:
    """Every method's answer."""
    yield "svd + nearest", as_parts(svdq_from_dense(weight, rank))
    yield "deepcompressor", (parts := deepcompressor(weight, rank, stats, absmax))
    yield "deepcompressor + gptq", with_gptq(parts, weight, stats)
    yield OURS, as_parts(svdq_calibrated(weight, rank, stats))


@torch.inference_mode()
def measure_layer(weight: Tensor, rank: int, calibration: Tensor, test: Tensor) -> dict[str, dict[str, float]]:
    """Method -> precision -> relative error of the outputs for inputs (rows, width) that calibration never saw."""
    stats = InputStats(weight.shape[1])
    for chunk in calibration.split(1024):
        stats.add(chunk)
    outputs = test @ weight.T
    found = {}
    for method, parts in quantized(weight, rank, stats, calibration.abs().amax(0)):
        squares = {name: squared_error(parts, test, outputs, bits) for name, bits in PRECISIONS.items()}
        eight = fp8(test / parts.smooth) @ fp8(parts.residual()).T + (test @ parts.down.T) @ parts.up.T
        squares["w4a8"] = (outputs - eight).square().sum() / outputs.square().sum()
        found[method] = {name: square.sqrt().item() for name, square in squares.items()}
    for form in rivals.rivals():
        error = rivals.linear(form, weight)(test) - outputs
        found[f"ComfyUI {form}"] = {rivals.ACTIVATIONS[form]: (error.norm() / outputs.norm()).item()}
    return found


def measure_layers(width: int, out: int, rank: int, seeds: int, kinds: list[str]) -> list[dict]:
    """Relative output error of every method on random layers, mean over seeds."""
    rows = []
    for kind in kinds:
        runs = []
        for seed in range(seeds):
            weight, inputs = random_layer(width, out, kind == "outliers", seed)
            runs.append(measure_layer(weight, rank, *inputs.split([CALIBRATION_ROWS, TEST_ROWS])))
            print(f"{kind}, seed {seed}: {runs[-1]}", flush=True)
        for method in runs[0]:
            errors = {
                name: sum(run[method][name] for run in runs) / seeds for name in PRECISIONS if name in runs[0][method]
            }
            rows.append({"width": width, "out": out, "rank": rank, "inputs": kind, "method": method, **errors})
    return rows


def measure_demo_layers(source: Path, ranks: list[int]) -> list[dict]:
    """Every method on every linear of the demo's image blocks: geometric means over them, and on how many of them ours
    errs more than each."""
    layers, rows = demo_inputs(source), []
    for rank in ranks:
        found = []
        for name, (weight, calibration, test) in layers.items():
            found.append(measure_layer(weight, rank, calibration, test))
            print(f"rank {rank}, {name}: {found[-1]}", flush=True)
        for method in found[0]:
            row = {"rank": rank, "linears": len(found), "method": method}
            for precision in found[0][method]:
                errors = [one[method][precision] for one in found]
                ours = [one[OURS][precision] for one in found]
                row[precision] = math.exp(sum(map(math.log, errors)) / len(errors))
                row[f"{precision}: ours worse on"] = sum(a > 1.005 * b for a, b in zip(ours, errors, strict=True))
            rows.append(row)
    return rows


@torch.inference_mode()
def demo_inputs(source: Path, captions: int = 16) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Linear -> weight, and inputs (rows, K) while it draws so many held-out captions, and so many others."""
    sys.path.insert(0, str(ROOT / "demo_training"))
    import scenes

    from zimage_core.demo import demo_files
    from zimage_core.formats.load import load_transformer
    from zimage_core.quantize.run import calibration_captions
    from zimage_core.sampler import draw_noise, get_sigmas, predict_flow

    asked = [caption for caption, _ in scenes.held_out_captions(2 * captions)]
    model = load_transformer(source, dtype=torch.float32)
    linears = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(("noise_refiner", "layers")) and name.endswith(("to_qkv", "to_out", "w3_w1", "w2"))
    }
    seen: dict[str, list[list[Tensor]]] = {name: [[], []] for name in linears}
    half = 0
    for name, module in linears.items():
        keep = seen[name]
        module.register_forward_pre_hook(lambda _, inputs, keep=keep: keep[half].append(inputs[0].flatten(0, -2)))
    sigmas = get_sigmas(8)
    for i, caption in enumerate(calibration_captions(demo_files()["text_encoder"], asked)):
        half = i // captions
        cond, x = model.prepare([caption], 128, 128), draw_noise(i, 1, 128, 128)
        for step in range(8):
            x = x + (sigmas[step + 1] - sigmas[step]) * predict_flow(model, x, sigmas[step], cond)
    return {name: (linears[name].weight, *map(torch.cat, halves)) for name, halves in seen.items()}


def fp8(values: Tensor, scale: Tensor | None = None) -> Tensor:
    """Values (..., columns) rounded to e4m3 with scales (..., 1), or one for each row's largest."""
    if scale is None:
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).float() * scale
