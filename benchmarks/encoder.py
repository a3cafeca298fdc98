"""How close a small text encoder file stays to bf16: cosine of cap_feats, token by token, for every form that is read.

    python benchmarks/encoder.py [--captions 100] [--layers 35]
    python benchmarks/encoder.py --full-size FOLDER    # seconds and host memory of Qwen3-4B in INT8, on the CPU
    python benchmarks/encoder.py --times [--layers 2]  # a prompt's time by Qwen3-4B in small forms, on a GPU if any

Three models: the bundled demo's encoder, which is trained but small (2 layers, 128 wide); random weights 256 wide and 2
layers deep, the model of the tests; and random weights 512 wide and as deep as Qwen3-4B. The random ones have tails,
norms that are not 1 and a residual stream that grows with depth. Every linear's weights are rounded as the form rounds
them, everything is computed in fp32, and the cosine is to the unrounded weights' result. That the files mean exactly
these weights is shown by tests/oracle/test_encoder_formats.py.

Q4_K and Q6_K are rounded plainly, where llama.cpp searches for better scales; their blocks of 256 weights go over two
rows of the demo's 128. Which layers an "FP8 mixed" file leaves in bf16 is its maker's choice; here it is every third
linear, which is about what the size of the real file (5.6 GB) leaves room for.

--full-size writes a sparse file of the real names and shapes there, whose zeros take no room on the disk, loads it and
encodes a prompt. --times takes random weights of the real sizes, dequantized in slices by plain torch and by the
kernels. A table for people, the last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from zimage_core import bench, report
from zimage_core.demo import demo_files
from zimage_core.device import choose_device, choose_dtype
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.formats.stored import StoredLinear, dequantize
from zimage_core.linear.adapters import Linear
from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig, encode_prompts
from zimage_core.models.tokenizer import load_tokenizer
from zimage_core.quantize.encoder import int8_rows, nvfp4_rows
from zimage_core.recorder import host_peak, reset_host_peak

ROOT = Path(__file__).resolve().parents[1]
FP8_MAX, FP4_MAX = 448.0, 6.0
SEARCHED_MAX = 4.0 * FP8_MAX  # as `quantize_encoder` chooses NVFP4's scale
TARGET = 0.999  # for the 8-bit forms
TOKENS = 24  # of the random models' captions
TIMED_TOKENS = 64
TIMED_FORMS = ("float8_e4m3fn", "int8", "Q8_0", "Q4_K", "Q6_K")
Rounding = Callable[[Tensor], Tensor]


def project_int8(weight: Tensor) -> Tensor:
    codes, scale = int8_rows(weight)
    return dequantize("int8", {"codes": codes, "scale": scale})


def quanto_int8(weight: Tensor) -> Tensor:
    """As optimum-quanto does it: all of it in bf16."""
    weight = weight.to(torch.bfloat16)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().clamp(-128, 127).float() * scale.float()


def fp8(weight: Tensor) -> Tensor:
    """ComfyUI's: one scale for the tensor."""
    scale = weight.abs().amax() / FP8_MAX
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def fp8_rows(weight: Tensor) -> Tensor:
    """A scale for each row, which no file of ComfyUI's has: what a better scale would be worth."""
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def nvfp4(weight: Tensor) -> Tensor:
    """As ComfyUI writes it: the largest of 16 weights becomes 6."""
    scale = weight.abs().amax() / (FP4_MAX * FP8_MAX)
    groups = weight.unflatten(1, (-1, 16))
    step = (groups.abs().amax(-1, keepdim=True) / FP4_MAX / scale).to(torch.float8_e4m3fn).float() * scale
    sizes = (groups.abs() / step).nan_to_num()
    spacing = torch.where(sizes < 2, 0.5, torch.where(sizes < 4, 1.0, 2.0))
    return ((sizes / spacing).round() * spacing * step * groups.sign()).flatten(1)


def project_nvfp4(weight: Tensor) -> Tensor:
    scale = weight.abs().amax() / SEARCHED_MAX
    codes, blocks = nvfp4_rows(weight, scale)
    parts = {"codes": codes, "block_scale": blocks.view(torch.uint8), "scale": scale.expand(len(weight), 1)}
    return dequantize("nvfp4", parts)


def q8_0(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, 32)
    exact = groups.abs().amax(1, keepdim=True) / 127
    return ((groups / exact).nan_to_num().round() * exact.half().float()).view_as(weight)


def q6_k(weight: Tensor) -> Tensor:
    """16 weights share a step in 8 bits of the largest of 16 steps."""
    groups = weight.reshape(-1, 16, 16)
    steps = groups.abs().amax(-1, keepdim=True) / 31
    unit = (steps.amax(1, keepdim=True) / 127).half().float()
    steps = unit * (steps / unit).round().clamp(1, 127)
    return ((groups / steps).round().clamp(-32, 31) * steps).view_as(weight)


def q4_k(weight: Tensor) -> Tensor:
    """32 weights share a step and a minimum, in 6 bits of the largest of 8 of each."""
    groups = weight.reshape(-1, 8, 32)
    low = -groups.amin(-1, keepdim=True).clamp(max=0)
    steps = (groups.amax(-1, keepdim=True) + low) / 15
    units = [(x.amax(1, keepdim=True) / 63).half().float() for x in (steps, low)]
    steps, low = (unit * (x / unit).round().clamp(0, 63) for x, unit in zip((steps, low), units))
    return (((groups + low) / steps).round().clamp(0, 15) * steps - low).view_as(weight)


# name -> bits of a weight, its rounding, and which share of the linears has it
FORMS: Mapping[str, tuple[float, Rounding, float]] = {
    "INT8, zimage quantize-encoder": (8, project_int8, 1),
    "INT8, quanto": (8, quanto_int8, 1),
    "GGUF Q8_0": (8.5, q8_0, 1),
    "FP8 scaled (e4m3)": (8, fp8, 1),
    "FP8, a scale for each row": (8, fp8_rows, 1),
    "FP8 mixed, a third in bf16": (10.7, fp8, 2 / 3),
    "GGUF Q6_K": (6.6, q6_k, 1),
    "GGUF Q4_K": (4.5, q4_k, 1),
    "NVFP4, zimage quantize-encoder": (4.5, project_nvfp4, 1),
    "NVFP4, ComfyUI": (4.5, nvfp4, 1),
}


def random_encoder(width: int, ffn: int, layers: int, heads: int, head_dim: int) -> TextEncoder:
    """Weights (bf16 values) as the tests have them: a small token table would let the layers amplify every rounding,
    which no trained model does."""
    generator = torch.Generator().manual_seed(0)
    config = TextEncoderConfig(300, width, ffn, layers, heads, heads // 2, head_dim)
    encoder = TextEncoder(config).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            values = 1 + 0.2 * values
        else:  # Student's t with 10 degrees of freedom
            tails = sum(torch.randn(parameter.shape, generator=generator).square_() for _ in range(10)) / 10
            values = values * tails.rsqrt_() * (1.0 if name.startswith("embed") else 0.05 * (256 / width) ** 0.5)
        parameter.copy_(values.to(torch.bfloat16))
    return encoder


def features(encoder: TextEncoder, captions: list[list[int]]) -> Tensor:
    """cap_feats of all captions one after the other (tokens, C)."""
    return torch.cat([encoder(torch.tensor([ids]))[0] for ids in captions]).float()


def growth(encoder: TextEncoder, captions: list[list[int]], feats: Tensor) -> float:
    """How many times as long the residual stream is at the end as at the start."""
    start = torch.cat([encoder.embed_tokens(torch.tensor(ids)) for ids in captions]).float()
    return (feats.norm(dim=1) / start.norm(dim=1)).mean().item()


@torch.no_grad()
def measure(model: str, encoder: TextEncoder, captions: list[list[int]]) -> list[dict]:
    """A row for every form: the weights' relative error, the cosine's mean and worst over all tokens."""
    right = features(encoder, captions)
    linears = [m for name, m in encoder.named_modules() if name.endswith("_proj")]
    kept = [linear.weight.data for linear in linears]
    facts = {"model": model, "layers": len(encoder.layers), "width": encoder.config.hidden_size}
    facts |= {"tokens": len(right), "growth": growth(encoder, captions, right)}
    rows = []
    for form, (bits, rounding, share) in FORMS.items():
        errors = []
        for i, (linear, weight) in enumerate(zip(linears, kept)):
            if math.floor((i + 1) * share) == math.floor(i * share):
                linear.weight.data = weight
                continue
            linear.weight.data = rounding(weight)
            errors.append(((linear.weight.data - weight).norm() / weight.norm()).item())
        cosine = torch.cosine_similarity(features(encoder, captions), right, dim=1)
        found = {"mean": cosine.mean().item(), "worst": cosine.min().item(), "weights": sum(errors) / len(errors)}
        rows.append(facts | {"form": form, "bits": bits} | found)
    for linear, weight in zip(linears, kept):
        linear.weight.data = weight
    halves = features(encoder.to(torch.bfloat16), captions)
    cosine = torch.cosine_similarity(halves, right, dim=1)
    rows.append(facts | {"form": "bf16 arithmetic", "mean": cosine.mean().item(), "worst": cosine.min().item()})
    return rows


def write_full_size(path: Path, config: TextEncoderConfig) -> None:
    """Qwen3-4B in quanto's INT8, all of it zeros."""
    with torch.device("meta"):
        shapes = {f"model.{name}": tuple(t.shape) for name, t in TextEncoder(config).state_dict().items()}
    shapes[f"model.layers.{config.num_layers}.input_layernorm.weight"] = (config.hidden_size,)  # never read
    header, end = {}, 0
    for name, shape in shapes.items():
        parts = {name: ("BF16", 2, shape)}
        if name.endswith("_proj.weight"):
            parts = {f"{name}._data": ("I8", 1, shape), f"{name}._scale": ("BF16", 2, (shape[0], 1))}
        for key, (dtype, size, sides) in parts.items():
            start, end = end, end + size * math.prod(sides)
            header[key] = {"dtype": dtype, "shape": sides, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


@torch.no_grad()
def measure_full_size(folder: Path, config: TextEncoderConfig) -> list[dict]:
    """A row for loading and for two prompts: seconds, peak of anonymous memory and of everything resident."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "qwen3-4b-int8-zeros.safetensors"
    write_full_size(path, config)
    tokenizer = load_tokenizer(demo_files()["tokenizer"])
    encoder, rows = None, []
    for what in ("load", "first prompt", "second prompt"):
        counted = reset_host_peak()
        begun = time.perf_counter()
        with bench.host_memory() as held:
            if encoder is None:
                encoder = load_text_encoder(path)
            else:
                (feats,) = encode_prompts(encoder, tokenizer, f"a large green circle on black, {what}")
                assert feats.shape[1] == config.hidden_size
        row = {"what": what, "seconds": time.perf_counter() - begun, "file_gb": path.stat().st_size / 1e9}
        resident = host_peak() / 2**30 if counted else None
        rows.append(row | {"anonymous_gib": held.get("peak_gib"), "resident_gib": resident})
    return rows


@torch.no_grad()
def measure_times(device: torch.device, dtype: torch.dtype, config: TextEncoderConfig) -> list[dict]:
    """A row for each form and way to dequantize it: a prompt's time and, on a GPU, the peak beside the weights."""
    from step import stored_parts

    ids, rows = torch.zeros(1, TIMED_TOKENS, dtype=torch.long, device=device), []
    ways = ("slices", "kernels") if device.type == "cuda" else ("slices",)
    for form, way in (("float", "as they are"), *itertools.product(TIMED_FORMS, ways)):
        linear = Linear if form == "float" else StoredLinear
        with torch.device("meta"):
            encoder = TextEncoder(config, linear)
        for module in encoder.modules():
            if isinstance(module, StoredLinear):
                module.load(form, stored_parts(form, module.out_features, module.in_features, device))
                module.kernels = way == "kernels"
        encoder = bench.randomize(encoder, device, dtype)
        row: dict[str, object] = {"form": form, "way": way}
        if device.type == "cuda":
            encoder(ids)
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        row["ms"] = bench.medians_ms({form: functools.partial(encoder, ids)}, device, 7, flush=False)[form]
        if device.type == "cuda":
            row |= {"weights_gib": held / 2**30, "peak_gib": (torch.cuda.max_memory_allocated(device) - held) / 2**30}
        rows.append(row)
    return rows


TIME_COLUMNS = {
    "form": "form",
    "way": "dequantized",
    "ms": "ms a prompt|.1f",
    "weights_gib": "weights, GiB|.2f",
    "peak_gib": "beside them, GiB|.3f",
}
FULL_COLUMNS = {
    "what": "stage",
    "seconds": "s|.1f",
    "anonymous_gib": "anonymous memory, GiB more|.2f",
    "resident_gib": "resident with mapped files, GiB|.2f",
}
COLUMNS = {
    "form": "form",
    "bits": "bits|.1f",
    "weights": "weights' error|.4f",
    "mean": "cosine, mean|.5f",
    "worst": "worst token|.5f",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--layers", type=int, default=TextEncoderConfig.num_layers, help="of the deep random model")
    parser.add_argument("--full-size", type=Path, metavar="FOLDER")
    parser.add_argument("--times", action="store_true")
    args = parser.parse_args()
    if args.times:
        device = choose_device(None)
        dtype = choose_dtype(None, device)
        rows = measure_times(device, dtype, TextEncoderConfig(vocab_size=8, num_layers=args.layers))
        machine = report.machine(device, dtype)
        print(f"{machine['device']}, {TIMED_TOKENS} tokens, {args.layers} layers\n\n{report.table(rows, TIME_COLUMNS)}")
        return report.print_json("encoder, times", machine, tokens=TIMED_TOKENS, layers=args.layers, rows=rows)
    machine = report.machine(torch.device("cpu"), torch.bfloat16 if args.full_size else torch.float32)
    if args.full_size:
        rows = measure_full_size(args.full_size, TextEncoderConfig())
        print(report.table(rows, FULL_COLUMNS))
        return report.print_json("encoder, full size", machine, rows=rows)
    sys.path.insert(0, str(ROOT / "demo_training"))
    import scenes

    files = demo_files()
    tokenizer = load_tokenizer(files["tokenizer"])
    captions = [tokenizer(caption) for caption, _ in scenes.held_out_captions(args.captions)]
    generator = torch.Generator().manual_seed(1)
    invented = torch.randint(0, 300, (max(2, args.captions // 10), TOKENS), generator=generator).tolist()
    demo = load_text_encoder(files["text_encoder"], dtype=torch.float32)
    rows = measure("the demo's, trained", demo, captions)
    rows += measure("random, as in the tests", random_encoder(256, 512, 2, 4, 64), invented)
    rows += measure("random and deep", random_encoder(512, 1536, args.layers, 8, 64), invented)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        facts = own[0]
        print(f"\n{model}: {facts['layers']} layers, {facts['width']} wide, {facts['tokens']} tokens, ", end="")
        print(f"residual stream grows {facts['growth']:.1f}-fold\n\n{report.table(own, COLUMNS)}")
    report.print_json("encoder", machine, rows=rows, target=TARGET)


if __name__ == "__main__":
    main()
