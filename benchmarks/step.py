"""One step of the transformer: every backend and precision here against dense models in 16 bits, in one run.

    python benchmarks/step.py                              the GPU: 512 to 1280 pixels, batch 1 and 4, random weights
    COMFYUI_PATH=DIR python benchmarks/step.py             with ComfyUI's NextDiT, from a checkout
    python benchmarks/step.py --sizes 1024 --only "triton w4a8" ComfyUI
    python benchmarks/step.py --model FILE.safetensors     a file's weights; also its load time and host memory
    python benchmarks/step.py --sizes 1024 --controlnet 2.1    also with a ControlNet beside the model, random weights
    python benchmarks/step.py --sizes 1024 --forms         also FP4, FP8, INT8 and GGUF forms of the same sizes
    python benchmarks/step.py --tiny                       a small model on the CPU, to see that it runs

The peers are diffusers' ZImageTransformer2DModel where it is installed and ComfyUI's NextDiT, as it is, compiled, and,
with comfy-kitchen, in ComfyUI's FP8, INT8 and 4-bit forms; all with random weights of the same sizes. Their step is one
call of their forward, which embeds and refines the caption every time; ours does that once for all steps, in `prepare`,
and it is not timed. The table is for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from zimage_core import bench, report
from zimage_core.bench import CAPTION_TOKENS, Call, Step
from zimage_core.device import choose_device, choose_dtype, dtype_name
from zimage_core.formats.gguf import QUANTIZED
from zimage_core.formats.identify import model_info
from zimage_core.formats.load import load_transformer
from zimage_core.formats.stored import StoredLinear
from zimage_core.linear.adapters import Linear
from zimage_core.linear.backends import BACKENDS, Backend, load, select
from zimage_core.linear.svdq import SVDQLinear, SVDQWeights
from zimage_core.models import ops
from zimage_core.models.config import ControlNetConfig, ZImageConfig
from zimage_core.models.controlnet import ControlNet
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.sampler import draw_noise

TINY = ZImageConfig(384, 1, 1, 6, cap_feat_dim=64, axes_dims=(16, 24, 24))
TINY_RANK = 16
GGUF = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")  # that are timed
COMFYUI = "ComfyUI NextDiT"
COMFYUI_FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "fp8": ("float8_e4m3fn", {"scale": "recalculate"}),
    "int8": ("int8_tensorwise", {"per_channel": True}),
    "int8 ConvRot": ("int8_tensorwise", {"per_channel": True, "convrot": True}),
    "convrot_w4a4": ("convrot_w4a4", {}),
    "asym_w4a8_int8": ("asym_w4a8_int8", {}),
}
"""Name -> a kind of comfy.quant_ops.QUANT_ALGOS, and how its layout quantizes weights."""
CONTROLNETS = {"2.1": (15, 33, "hints"), "2.0": (15, 33, "layers"), "lite": (3, 33, "hints"), "v1": (6, 16, "alone")}
"""Layers, channels and refiner of the published ones."""


def diffusers_side(config: ZImageConfig, device: torch.device, dtype: torch.dtype) -> Step:
    """Steps of diffusers' model."""
    from diffusers import ZImageTransformer2DModel

    sizes = {name: getattr(config, name) for name in ("dim", "n_layers", "n_refiner_layers", "n_heads", "norm_eps")}
    sizes |= {name: getattr(config, name) for name in ("cap_feat_dim", "in_channels", "rope_theta", "t_scale")}
    axes = {"axes_dims": list(config.axes_dims), "axes_lens": list(config.axes_lens)}
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**sizes, **axes, n_kv_heads=config.n_heads)
    model = bench.randomize(model, device, dtype)

    def at(size: int, batch: int) -> Call:
        latents = [torch.randn(16, 1, size // 8, size // 8, device=device, dtype=dtype) for _ in range(batch)]
        captions = [torch.randn(CAPTION_TOKENS, config.cap_feat_dim, device=device, dtype=dtype)] * batch
        t = torch.full((batch,), 0.4, device=device)
        return lambda: model(latents, t, captions, return_dict=False)[0]

    return at


def comfyui_side(
    config: ZImageConfig, device: torch.device, dtype: torch.dtype, form: str | None = None, compiled: bool = False
) -> Step:
    """Steps of ComfyUI's model, with the settings that its detection gives a Z-Image file; form: of COMFYUI_FORMS."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = device.type == "cpu"
        import comfy.ldm.lumina.model
        import comfy.ops
    finally:
        sys.argv = argv
    model = comfy.ldm.lumina.model.NextDiT(
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        dim=config.dim,
        n_layers=config.n_layers,
        n_refiner_layers=config.n_refiner_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
        axes_dims=list(config.axes_dims),
        axes_lens=list(config.axes_lens),
        rope_theta=config.rope_theta,
        cap_feat_dim=config.cap_feat_dim,
        ffn_dim_multiplier=8 / 3,
        qk_norm=True,
        z_image_modulation=True,
        time_scale=config.t_scale,
        pad_tokens_multiple=32,
        device="meta",
        dtype=dtype,
        operations=comfy.ops.mixed_precision_ops({}, dtype) if form else comfy.ops.disable_weight_init,
    )
    model = bench.randomize(model, device, dtype)
    if form:  # its linears have no weights yet
        quantize_as_comfyui(model, form, device, dtype)
    if compiled:
        model = torch.compile(model)

    def at(size: int, batch: int) -> Call:
        latents = torch.randn(batch, 16, size // 8, size // 8, device=device, dtype=dtype)
        captions = torch.randn(batch, CAPTION_TOKENS, config.cap_feat_dim, device=device, dtype=dtype)
        t = torch.full((batch,), 0.6, device=device)
        return lambda: model(latents, t, captions, CAPTION_TOKENS)

    return at


def quantize_as_comfyui(model: nn.Module, form: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give every linear of ComfyUI's model random weights, those of the blocks in a form of COMFYUI_FORMS."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    kind, options = COMFYUI_FORMS[form]
    for name, module in model.named_modules():
        if not hasattr(module, "in_features"):
            continue
        n, k = module.out_features, module.in_features
        weight = torch.randn(n, k, device=device, dtype=dtype) * k**-0.5
        if ".attention." in name or ".feed_forward." in name:
            module.quant_format, module.layout_type = kind, QUANT_ALGOS[kind]["comfy_tensor_layout"]
            group = next(size for size in (256, 64, 16) if k % size == 0)
            rotated = {"convrot_groupsize": group} if kind != "float8_e4m3fn" else {}
            weight = QuantizedTensor.from_float(weight, module.layout_type, **options, **rotated)
        module.weight = nn.Parameter(weight, requires_grad=False)


def with_controlnet(
    variant: str, config: ZImageConfig, rank: int, device: torch.device, dtype: torch.dtype, backend: Backend | None
) -> Step:
    """Steps of a model of random weights with a ControlNet of the same arithmetic beside it."""
    layers, channels, refiner = CONTROLNETS[variant]
    places = tuple(range(0, config.n_layers, max(round(config.n_layers / layers), 1)))
    base = bench.random_model(config, device, dtype, backend, rank)
    with torch.device("meta"):
        linear = partial(SVDQLinear, rank=rank) if backend else Linear
        net = ControlNet(ControlNetConfig(config, places, channels, refiner), linear)
    net.backend = backend
    net.use(ops.select(backend.name if backend else "auto", device, dtype, config.head_dim))
    for module in net.modules():
        if backend and isinstance(module, SVDQLinear):
            weights = bench.random_weights(module.out_features, module.in_features, rank, device, dtype)
            module.load(weights, backend)
    bench.randomize(net, device, dtype)

    def at(size: int, batch: int) -> Call:
        caption = torch.randn(CAPTION_TOKENS, config.cap_feat_dim, device=device, dtype=dtype)
        cond = base.prepare([caption], size, size)
        context = torch.randn(1, channels, size // 8, size // 8, device=device)
        cond = replace(cond, controls=(net.prepare(context, base, cond, 0.8),))
        t = torch.full((batch,), 0.4, device=device)
        return partial(base, draw_noise(0, batch, size, size).to(device), t, cond)

    return at


def stored_parts(form: str, n: int, k: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random parts of a weight (N, K) in a stored form, of a size that keeps activations near 1."""
    step = k**-0.5
    if form not in QUANTIZED:
        codes = torch.randint(-100, 101, (n, k), dtype=torch.int8, device=device)
        if form == "float8_e4m3fn":
            codes = codes.float().div_(100).to(torch.float8_e4m3fn).view(torch.uint8)
        return {
            "codes": codes,
            "scale": torch.full((n, 1), step / (0.58 if form == "float8_e4m3fn" else 58), device=device),
        }
    block, size = QUANTIZED[form]
    codes = torch.randint(0, 256, (n, k // block, size), dtype=torch.uint8, device=device)
    # The fp16 scales: where they begin, and what makes weights about as large as `step`.
    scales = {"Q4_K": {0: 160, 2: 40}, "Q5_K": {0: 320, 2: 40}, "Q6_K": {208: 1600}, "Q8_0": {0: 74}}.get(form, {0: 5})
    for start, divisor in scales.items():
        value = torch.tensor([step / divisor], dtype=torch.float16, device=device)
        codes[..., start : start + 2] = value.view(torch.uint8)
    return {"codes": codes.flatten(1)}


def stored_side(form: str, way: str, config: ZImageConfig, device: torch.device, dtype: torch.dtype) -> Step:
    """Steps of a model whose blocks' linears are kept in a stored form, dequantized by a "kernel" or in "slices", or
    multiplied as they are stored by a backend."""
    with torch.device("meta"):
        model = ZImageTransformer(config, StoredLinear)
    model.use(ops.select("auto", device, dtype, config.head_dim))
    if way in BACKENDS:
        model.backend = Backend(way, "w8a8", load(way), "")  # which says whether its kernels can be in a CUDA graph
    for name, module in model.named_modules():
        if isinstance(module, StoredLinear):
            n, k = module.shape
            if ".attention." in name or ".feed_forward." in name:
                module.load(form, stored_parts(form, n, k, device))
                module.kernels = way == "kernel"
                if way in BACKENDS:
                    module.products = {form.split(" ")[0]: load(way).multiply_8bit}
            else:
                module.load("float", {"weight": torch.randn(n, k, device=device, dtype=dtype) * k**-0.5})
    return bench.step_of(bench.randomize(model, device, dtype), device, dtype)


def fp4_side(rank: int, precision: str, config: ZImageConfig, device: torch.device, dtype: torch.dtype) -> Step:
    """Steps of a model of random SVDQuant FP4 weights on Triton's kernels."""
    backend = select("triton", precision, device=device, dtype=dtype, fp4=True)
    with torch.device("meta"):
        model = ZImageTransformer(config, partial(SVDQLinear, rank=rank, fp4=True))
    model.backend = backend
    model.use(ops.select("triton", device, dtype, config.head_dim))
    for module in model.modules():
        if isinstance(module, SVDQLinear):
            weights = bench.random_weights(module.out_features, module.in_features, rank, device, dtype).tensors()
            n, groups = weights["wscales"].shape
            outer = weights["wscales"].float().mean(1) / 2
            ones = torch.full((n, 4 * groups), 0x38, dtype=torch.uint8, device=device)  # e4m3's 1
            module.load(SVDQWeights(**weights | {"wscales": ones, "outer_scale": outer}), backend)
    return bench.step_of(bench.randomize(model, device, dtype), device, dtype)


def forms(config: ZImageConfig, rank: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    """Other stored forms, dequantized layer by layer, and on a GPU multiplied in 8 bits or on Triton's FP4 ways."""
    names = {"FP8": "float8_e4m3fn", "INT8": "int8"} | {f"GGUF {name}": name for name in GGUF}
    names = {name: form for name, form in names.items() if config.dim % QUANTIZED.get(form, (1,))[0] == 0}
    ways = [(name, "slices", form) for name, form in names.items()]
    found = {}
    if device.type == "cuda":
        ways = [(name, "kernel", form) for name, form in names.items()]
        ways += [(f"{name}, plain torch", "slices", names[name]) for name in ("FP8", "GGUF Q4_0", "GGUF Q4_K")]
        ways += [(f"{name} w8a8, triton", "triton", names[name]) for name in ("FP8", "INT8")]
        if load("kitchen").unavailable(device, dtype, precision="w4a8") is None:
            ways += [
                ("INT8 w8a8, kitchen", "kitchen", "int8"),
                ("INT8 ConvRot, kitchen", "kitchen", "int8_convrot 256"),
            ]
        found |= {f"FP4 triton {p}": partial(fp4_side, rank, p, config, device, dtype) for p in ("w4a8", "w4a16")}
    return {name: partial(stored_side, form, way, config, device, dtype) for name, way, form in ways} | found


def peers(config: ZImageConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    """The peers that are there."""
    found = {}
    if "COMFYUI_PATH" in os.environ:
        found[COMFYUI] = partial(comfyui_side, config, device, dtype)
        if device.type == "cuda":
            found["ComfyUI compiled"] = partial(comfyui_side, config, device, dtype, compiled=True)
        if importlib.util.find_spec("comfy_kitchen"):
            found |= {f"ComfyUI {form}": partial(comfyui_side, config, device, dtype, form) for form in COMFYUI_FORMS}
    if importlib.util.find_spec("diffusers"):
        found["diffusers"] = partial(diffusers_side, config, device, dtype)
    return found


def measure_load(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and GiB of host memory that loading takes; on the CPU the model itself is in both figures."""
    with bench.host_memory() as host:
        begun, worked = time.perf_counter(), time.process_time()
        model = load_transformer(path, device=device, dtype=dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, worked = time.perf_counter() - begun, time.process_time() - worked
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / bench.GIB
    return {"seconds": seconds, "processor_seconds": worked, "model_gib": held, **host}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="transformer file (default: random weights of the real size)")
    parser.add_argument("--device", help="default: a GPU if torch sees one")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels of an edge")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=15, help="0: one single call, without a warm-up")
    parser.add_argument("--only", nargs="+", default=[""], help="ways whose names contain one of these")
    parser.add_argument("--controlnet", choices=CONTROLNETS, help="also every way with one of random weights beside it")
    parser.add_argument("--forms", action="store_true", help="also other stored forms, their linears of random values")
    parser.add_argument("--tiny", action="store_true", help="a small model and small pictures")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = choose_device(args.device)
    dtype = choose_dtype(None, device)
    config, rank = (TINY, TINY_RANK) if args.tiny else (ZImageConfig(), bench.RANK)
    facts: dict[str, object] = {"weights": args.model.name if args.model else "random"}
    if args.model:
        info = model_info(args.model)
        config, rank = info.config, info.rank
        facts["load"] = measure_load(args.model, device, dtype)
    sides = bench.own_sides(config, rank, device, dtype, args.model) | peers(config, device, dtype)
    if args.forms:
        sides |= forms(config, rank or bench.RANK, device, dtype)
    if args.controlnet:
        ways: dict[str, Backend | None] = {f"dense {dtype_name(dtype)}": None, **bench.every_way(device, dtype)}
        for name, way in ways.items():
            build = partial(with_controlnet, args.controlnet, config, rank or bench.RANK, device, dtype, way)
            sides[f"{name} + ControlNet {args.controlnet}"] = build
    sides = {name: build for name, build in sides.items() if any(part in name for part in args.only)}
    sizes = args.sizes or ([64] if args.tiny else [512, 768, 1024, 1280])
    batches = args.batches or [1, 4]
    machine, peak = report.machine(device, dtype), bench.ceilings(device, dtype, 1 + args.repeats // 2)
    report.print_machine(machine, peak)
    if args.model:
        print("load: " + ", ".join(f"{name} {value:.2f}" for name, value in facts["load"].items()))
    repeats, warm_up = (args.repeats, bench.WARM_UP) if args.repeats else (1, 0)
    together = device.type == "cpu" and config.dim <= bench.LARGE_ON_CPU
    steps = bench.bench_steps(sides, sizes, batches, device, repeats, warm_up, together)
    title = f"One step, {facts['weights']} weights, width {config.dim}, {config.n_layers} layers, rank {rank}"
    bench.show_steps(title, steps, dtype, COMFYUI)
    report.print_json("step", machine, peak=peak, **facts, steps=steps)


if __name__ == "__main__":
    main()
