"""What LoRAs cost: a step without any, with one and with four of rank 32 on every linear, with a LoKr; and changes.

    python benchmarks/lora.py                       full size on the GPU, random weights, 1024 x 1024
    python benchmarks/lora.py --precision w4a16     likewise, another arithmetic
    python benchmarks/lora.py --model FILE.safetensors
    python benchmarks/lora.py --device cpu          a small model, to see that it runs

Medians of whole forward passes, the plain one measured before and after; then the time to change a strength, to add
a LoRA and to remove all, and whether the output is then what it was at first, bit by bit. The table is for people; the
last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from zimage_core import bench, report
from zimage_core.formats.load import load_transformer
from zimage_core.linear.backends import select
from zimage_core.lora import apply as lora
from zimage_core.lora.read import Lora
from zimage_core.models.config import ZImageConfig
from zimage_core.models.transformer import ZImageTransformer

SMALL = ZImageConfig(dim=768, n_heads=6, n_layers=4, n_refiner_layers=1, cap_feat_dim=256)
CAPTION_TOKENS = 64
LOKR_FACTOR = 16


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def random_lora(model: ZImageTransformer, rank: int, seed: int) -> Lora:
    """A LoRA as trainers write it: on every linear, q, k, v and w1, w3 apart."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, n, k in linears(model):
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, k, generator=generator).bfloat16() / k**0.5
        tensors[f"{module}.lora_B.weight"] = torch.randn(n, rank, generator=generator).bfloat16() * 0.02
    return Lora.from_tensors(tensors, f"LoRA {seed}")


def random_lokr(model: ZImageTransformer) -> Lora:
    """A LoKr with w1 (16, 16) and w2 whole, on every linear of the blocks."""
    tensors = {}
    for module, n, k in linears(model):
        if n % LOKR_FACTOR == 0 and k % LOKR_FACTOR == 0:
            tensors[f"{module}.lokr_w1"] = torch.randn(LOKR_FACTOR, LOKR_FACTOR).bfloat16() * 0.05
            tensors[f"{module}.lokr_w2"] = torch.randn(n // LOKR_FACTOR, k // LOKR_FACTOR).bfloat16() * 0.02
    return Lora.from_tensors(tensors, "LoKr")


def linears(model: ZImageTransformer):
    """(name in a LoRA file, N, K) of every linear of the blocks."""
    parts = {"to_qkv": ("to_q", "to_k", "to_v"), "w3_w1": ("w3", "w1")}
    for name, module in model.named_modules():
        if hasattr(module, "set_adapter") and name.startswith(("layers", "noise_refiner", "context_refiner")):
            parent, _, leaf = name.rpartition(".")
            names = parts.get(leaf, (leaf,))
            for part in names:
                yield f"{parent}.{part}", module.out_features // len(names), module.in_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="SVDQ INT4 file (default: random weights)")
    parser.add_argument("--model-rank", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--size", type=int, help="pixels (default 1024, 256 on the CPU)")
    parser.add_argument("--repeats", type=int, help="default 10, 3 on the CPU")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), torch.bfloat16
    on_gpu = device.type == "cuda"
    size, repeats = args.size or (1024 if on_gpu else 256), args.repeats or (10 if on_gpu else 3)

    torch.manual_seed(0)
    if args.model:
        model = load_transformer(args.model, device=device, dtype=dtype, backend=args.backend, precision=args.precision)
    else:
        config = ZImageConfig() if on_gpu else SMALL
        backend = select(args.backend, args.precision, device=device, dtype=dtype)
        model = bench.random_model(config, device, dtype, backend, min(args.model_rank, config.dim // 4))
    latents = torch.randn(1, 16, size // 8, size // 8, device=device)
    t = torch.tensor([0.4], device=device)
    caption = torch.randn(CAPTION_TOKENS, model.config.cap_feat_dim, device=device)

    loras = [random_lora(model, args.rank, seed) for seed in range(4)]
    stacks = {
        "none": [],
        "one LoRA": [(loras[0], 1.0)],
        "four LoRAs": [(found, 0.25) for found in loras],
        "LoKr": [(random_lokr(model), 0.5)],
        "none again": [],
    }
    seconds, outputs, memory = {}, {}, {}
    with torch.inference_mode():
        for name, stack in stacks.items():
            lora.apply(model, stack)
            cond = model.prepare([caption], size, size)
            step = partial(model, latents, t, cond)
            seconds[name] = bench.medians_ms({name: step}, device, repeats, flush=False)[name] / 1e3
            outputs[name] = model(latents, t, cond).float()
            memory[name] = sum(b.numel() * b.element_size() for b in model.buffers()) / 2**20
        changes = {}
        for name, stack in {
            "add one": [(loras[0], 1.0)],
            "change its strength": [(loras[0], 0.5)],
            "add three more": [(found, 0.5) for found in loras],
            "change all four": [(found, 0.3) for found in loras],
            "nothing": [(found, 0.3) for found in loras],
            "remove all": [],
        }.items():
            changes[name] = timed(lambda s=stack: lora.apply(model, s), device)

    base = min(seconds["none"], seconds["none again"])
    identical = torch.equal(outputs["none"], outputs["none again"])
    backend = f"{model.backend.name} {model.backend.precision}" if model.backend else "dense"
    machine = report.machine(device, dtype)
    print(f"{machine['device']}, torch {machine['torch']}, {backend}, {size} x {size}, rank {args.rank}")
    for name, value in seconds.items():
        print(f"  {name:12} {value * 1e3:9.1f} ms {value / base - 1:+8.1%}   buffers {memory[name]:8.0f} MiB")
    for name, value in changes.items():
        print(f"  {name:20} {value * 1e3:8.1f} ms")
    print(f"  without any, afterwards: {'bit-identical' if identical else 'DIFFERENT'}")
    found = {"step_s": seconds, "change_s": changes, "buffers_mib": memory, "identical": identical}
    report.print_json("lora", machine, backend=backend, size=size, rank=args.rank, **found)


if __name__ == "__main__":
    main()
