"""A full-size 2.1 ControlNet in 4 bits: its file, and its cost in memory and time beside the model.

    python benchmarks/controlnet.py FOLDER         # random weights of full size, written there if need be (20 GB)
    python benchmarks/controlnet.py FOLDER --tiny  # small models, to see that it runs

Quantizes a random BF16 ControlNet at rank 32, then generates 1024 x 1024 with everything resident and in 4 GiB: the
picture has to be the same, the plan within 3 % of the measured peak, what torch reserves within the budget. What a step
costs beside the plain model is in `step.py --controlnet`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from memory import PROMPT, TIMED, WITHIN, free, limit, write_synthetic
from PIL import Image
from safetensors.torch import save_file

from zimage_core import Control, load_pipeline, report
from zimage_core.device import choose_device, choose_dtype
from zimage_core.formats.identify import model_info
from zimage_core.linear.adapters import Linear
from zimage_core.models.config import ControlNetConfig, ZImageConfig
from zimage_core.models.controlnet import ControlNet
from zimage_core.models.text_encoder import TextEncoderConfig
from zimage_core.quantize.controlnet import controlnet_config, quantize_controlnet
from zimage_core.sizes import GIB

PLACES, CHANNELS, RANK = tuple(range(0, 30, 2)), 33, 32
TINY = ZImageConfig(384, 5, 1, 6, cap_feat_dim=128, axes_dims=(16, 24, 24))
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "w3_w1": ("w3", "w1"), "to_out": ("to_out.0",)}


def write_dense(path: Path, config: ControlNetConfig, device: torch.device) -> None:
    """A BF16 ControlNet of random weights under the official names."""
    with torch.device("meta"):
        body = ControlNet(config, Linear).state_dict()
    tensors = {}
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in body.items():
        value = torch.ones(tensor.shape, dtype=torch.bfloat16)
        if tensor.ndim > 1:
            spread = 0.1 * tensor.shape[-1] ** -0.5 if "_proj" in name else tensor.shape[-1] ** -0.5
            value = torch.empty(tensor.shape, device=device).normal_(0, spread, generator=generator).bfloat16().cpu()
        name = name.replace("x_embedder.", "all_x_embedder.2-1.")
        fused = next((leaf for leaf in FUSED if f".{leaf}." in name), None)
        for part, rows in zip(FUSED.get(fused, (None,)), value.chunk(len(FUSED.get(fused, "1")))):
            tensors[f"control_{name.replace(f'.{fused}.', f'.{part}.')}"] = rows.contiguous()
    save_file(tensors, path, {"config": json.dumps(controlnet_config(config))})


def write_quantized(folder: Path, base: ZImageConfig, places: tuple[int, ...], rank: int, device: torch.device) -> Path:
    """A 2.1 ControlNet in 4 bits of random weights in a folder, written if need be."""
    dense, net = folder / "controlnet-bf16.safetensors", folder / "controlnet-int4.safetensors"
    if not net.exists():
        write_dense(dense, ControlNetConfig(base, places, CHANNELS, "hints"), device)
        begun = time.perf_counter()
        quantize_controlnet(dense, net, rank=rank, device=device)
        print(f"quantized in {time.perf_counter() - begun:.0f} s: {dense.stat().st_size} -> {net.stat().st_size} bytes")
        dense.unlink()
    return net


def generate(files: dict[str, Path], net: Path, size: int, budget: float | None, device: torch.device) -> dict:
    """The picture, the plan, and what was measured: bytes and the median of seconds of sampling."""
    outlines = Image.new("RGB", (size, size), "black")
    outlines.paste("white", (size // 4, size // 4, size // 2, size // 2))
    parts = {name: files[name] for name in ("text_encoder", "vae", "tokenizer")}
    pipe = load_pipeline(files["model"], **parts, device=device, vram_budget=budget)
    limit(device, budget)
    free(device)
    seconds, pictures = [], []
    for _ in range(1 + TIMED):
        made = pipe(PROMPT, height=size, width=size, generator=0, control=Control(outlines, net, 0.8))
        pictures.append(made[0].tobytes())
        seconds.append(next(stage.seconds for stage in made.stages if stage.name == "sample"))
        if len(pictures) == 1:
            peaks = [stage for stage in made.stages if stage.device_peak is not None]
    found = {
        "budget": budget,
        "streamed": made.plan.stage("transformer").blocks - made.plan.stage("transformer").resident,
        "predicted": made.plan.peak / GIB,
        "measured": max((stage.device_peak / GIB for stage in peaks), default=None),
        "reserved": max((stage.device_reserved / GIB for stage in peaks), default=None),
        "seconds": sorted(seconds[1:])[TIMED // 2],
        "picture": pictures[0],
        "same": len(set(pictures)) == 1,
    }
    del pipe
    free(device)
    limit(device, None)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", type=float, default=4.0, help="GiB (default 4)")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = choose_device(None)
    base, rank, size, places = ZImageConfig(), 256, 1024, PLACES
    sizes = (base,)
    if args.tiny:
        base, rank, size, places, args.budget = TINY, 16, 64, (0, 2), 0.4
        sizes = (base, TextEncoderConfig(640, 128, 256, 2, 2, 1, 64))
    files = write_synthetic(args.folder, *sizes, rank=rank, device=device)
    assert model_info(files["model"]).rank == rank
    net = write_quantized(args.folder, base, places, min(rank, RANK), device)
    rows = [generate(files, net, size, budget, device) for budget in (None, args.budget)]
    resident, budgeted = rows
    ok = resident["same"] and budgeted["same"] and resident.pop("picture") == budgeted.pop("picture")
    if budgeted["measured"] is not None:
        ok = ok and abs(budgeted["predicted"] / budgeted["measured"] - 1) <= WITHIN
        ok = ok and budgeted["reserved"] <= args.budget
    columns = {"budget": "GiB", "streamed": "streamed", "predicted": "predicted|.3f", "measured": "measured|.3f"}
    print(report.table(rows, columns | {"reserved": "reserved|.3f", "seconds": "seconds|.3f"}))
    facts = {"rows": rows, "bytes": net.stat().st_size, "ok": ok}
    report.print_json("controlnet", report.machine(device, choose_dtype(None, device)), **facts)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
