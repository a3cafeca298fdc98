"""What calibrated quantization costs: the parts of one linear, and a whole model from its file to its file.

    python benchmarks/quantize.py                    full width on the GPU, rank 256, the whole model
    python benchmarks/quantize.py --layers 2         likewise, 2 of 30 layers and a pair of refiners, projected to 34
    python benchmarks/quantize.py --source FILE      a BF16 file that is there (make_synthetic.py --dense, say)
    python benchmarks/quantize.py --device cpu --small

Weights and captions are random, which changes no time. Seconds are by the clock, the device's work included; the
whole model's are told apart by the quantizer's own progress. torch is limited to 8 GiB of the device for it; told are
what it allocated and reserved at most, and of the host the process's own memory without mapped files and with them.
Tables are for people, the last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import make_synthetic
import torch

from zimage_core import bench, report
from zimage_core.device import choose_device
from zimage_core.formats.identify import model_info
from zimage_core.models.config import ZImageConfig
from zimage_core.quantize.run import quantize_checkpoint
from zimage_core.quantize.solver import InputStats, gptq, low_rank, svdq_calibrated
from zimage_core.recorder import host_peak, reset_host_peak

SMALL = ZImageConfig(dim=384, n_heads=3, n_layers=1, n_refiner_layers=1, cap_feat_dim=64)
CAPTION_TOKENS = 64
CHUNK = 8192
PARTS = ("attention.", "feed_forward.")  # of a block, whose linears the progress names
FULL = ZImageConfig()
LIMIT = 8 * 2**30  # bytes of the device


def timed(device: torch.device, run: Callable[..., object], *args: object) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def parts_of_linear(n: int, k: int, rank: int, rows: int, device: torch.device) -> dict[str, float]:
    """Seconds of gathering inputs, of fitting a branch, of GPTQ, and of the whole solver, which does more than both."""
    weight, x = torch.randn(n, k, device=device) / k**0.5, torch.randn(min(CHUNK, rows), k, device=device)
    stats = InputStats(k, device)
    stats.add(x)
    found = {"inputs_s": timed(device, stats.add, x) * rows / len(x)}
    start = low_rank(weight, rank)[1]
    found["branch_s"] = timed(device, low_rank, weight, rank, start)
    scales = torch.full((n, k // 64), 0.01, device=device)
    found["gptq_s"] = timed(device, gptq, weight, scales, stats.second_moments())
    return found | {"solver_s": timed(device, svdq_calibrated, weight, rank, stats)}


class Watch:
    """The quantizer's progress in seconds: of generating samples, and of each kind of linear."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}
        self._last = time.perf_counter()
        self._shown = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.perf_counter()
        kind = what.rpartition(", ")[2] if what.startswith("block ") else what.partition(" ")[0]
        self.seconds.setdefault(kind, []).append(now - self._last)
        self._last = now
        if now - self._shown > 5:
            self._shown = now
            print(f"{what} ({done}/{total})", flush=True)


def whole_model(source: Path, target: Path, rank: int, prompts: int, size: int, device: torch.device) -> dict:
    """Seconds and memory of one run."""
    captions = list(torch.randn(prompts, CAPTION_TOKENS, model_info(source).config.cap_feat_dim))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(LIMIT / total, 1.0), device)
    watch, counted, start = Watch(), reset_host_peak(), time.perf_counter()
    with bench.host_memory() as host:
        quantize_checkpoint(source, target, rank=rank, cap_feats=captions, size=size, device=device, progress=watch)
    found = {"seconds": time.perf_counter() - start, "host_gib": host.get("peak_gib")}
    found["host_with_files_gib"] = host_peak() / 2**30 if counted else None
    if device.type == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    generating = watch.seconds.pop("generating")
    parts = {kind: sum(times) / len(times) for kind, times in watch.seconds.items() if kind.startswith(PARTS)}
    return found | {"drawing_s": sum(generating), "drawn_blocks": len(generating), "linear_s": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="BF16 file (default: random weights, written for the run)")
    parser.add_argument("--layers", type=int, help="of the random model (default 30, 1 with --small)")
    parser.add_argument("--small", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--size", type=int, default=512, help="pixels of the pictures to calibrate on (default 512)")
    parser.add_argument("--device", help="default: a GPU if torch sees one")
    args = parser.parse_args()
    device, config = choose_device(args.device), SMALL if args.small else FULL
    if args.layers:
        config = replace(config, n_layers=args.layers, n_refiner_layers=1)
    facts = report.machine(device, torch.bfloat16)
    report.print_machine(facts, bench.ceilings(device, torch.float32, 3))

    tokens = (args.size // 16) ** 2 + CAPTION_TOKENS
    rows = args.prompts // 2 * 8 * tokens
    parts_of_linear(config.dim, config.dim, args.rank, rows, device)  # wakes the libraries up
    linears = [
        {"linear": name, "n": n, "k": k} | parts_of_linear(n, k, args.rank, rows, device)
        for name, (n, k) in bench.block_linears(config).items()
    ]
    columns = {"linear": "linear", "n": "N", "k": "K", "inputs_s": "inputs, s|.2f", "branch_s": "a branch, s|.3f"}
    print(report.table(linears, columns | {"gptq_s": "GPTQ, s|.2f", "solver_s": "solver, s|.2f"}))

    with tempfile.TemporaryDirectory() as folder:  # TMPDIR says where
        source = args.source or Path(folder, "dense.safetensors")
        if not args.source:
            make_synthetic.write_synthetic(source, config, None, device=device)
        run = whole_model(source, Path(folder, "int4.safetensors"), args.rank, args.prompts, args.size, device)
    blocks = config.n_layers + 2 * config.n_refiner_layers
    full = FULL.n_layers + 2 * FULL.n_refiner_layers
    if not args.source and blocks != full:
        run["projected_s"] = run["seconds"] * full / blocks
    print(f"\n{blocks} blocks, rank {args.rank}, {args.prompts} prompts of {args.size} x {args.size}:")
    print(report.table([run], {key: f"{key}|.2f" for key in run if key != "linear_s"}))
    print(report.table([run["linear_s"]], {kind: f"{kind}, s|.2f" for kind in run["linear_s"]}))
    report.print_json("quantize.py", facts, rank=args.rank, size=args.size, blocks=blocks, linears=linears, run=run)


if __name__ == "__main__":
    main()
