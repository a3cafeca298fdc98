"""Write a full-size SVDQ INT4 Z-Image file with random weights, for timings without the real one.

Real names, dtypes, shapes and metadata; random codes; scales, branches and modulations of a size that keeps
activations near 1 through all blocks. The same seed gives the same file, on a GPU another one than on a CPU.

    python benchmarks/make_synthetic.py OUT.safetensors [--rank 256]
    python benchmarks/make_synthetic.py OUT.safetensors --dense   # BF16, 12.3 GB, to time the quantizer on
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from zimage_core.formats.names import comfy_module, diffusers_svdq_module
from zimage_core.models.config import ZImageConfig
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.quantize.writer import (
    Header,
    StreamedFile,
    block_names,
    diffusers_config,
    file_metadata,
    plan_header,
)

CODE_STD = 14.4**0.5  # of codes drawn evenly from -7..7 with 0 twice as likely


def draw(name: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One random tensor of the file, on the generator's device; the permuted storage does not matter here."""
    device = generator.device
    if dtype == "I8":
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=device)
        low, high = noise & 15, noise >> 4
        low[low == 8], high[high == 8] = 0, 0  # quantizers never emit -8
        return (low | high << 4).view(torch.int8)
    noise = torch.empty(shape, device=device)
    if name.endswith("wscales"):  # an even spread of a factor 2 about the scale that keeps the variance
        noise.uniform_(0.6, 1.3, generator=generator).div_(CODE_STD * math.sqrt(64 * shape[0]))
    elif "smooth_factor" in name:
        noise.uniform_(0.8, 1.25, generator=generator)
    elif name.endswith("proj_down"):
        noise.normal_(0, 1 / math.sqrt(shape[0]), generator=generator)
    elif name.endswith("proj_up"):
        noise.normal_(0, 0.3 / math.sqrt(shape[1]), generator=generator)
    elif "adaLN_modulation" in name:
        noise.normal_(0, 0.02, generator=generator)
    elif "norm" in name or name == "cap_embedder.0.weight":
        noise.uniform_(0.8, 1.2, generator=generator)
    elif name.endswith("bias"):
        noise.zero_()
    else:
        noise.normal_(0, 1 / math.sqrt(shape[-1]), generator=generator)
    return noise.to(torch.bfloat16)


def dense_header(config: ZImageConfig) -> Header:
    """The BF16 transformer's tensors: what the INT4 file holds, with whole weights for the quantized linears."""
    linears = tuple(f".{diffusers_svdq_module(linear)}." for linear in config.linears)
    header = {name: e for name, e in plan_header(config, 16).items() if not any(part in name for part in linears)}
    for block in block_names(config):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            header[f"{block}.attention.{part}.weight"] = ("BF16", (config.dim, config.dim))
        for part in ("w1", "w3"):
            header[f"{block}.feed_forward.{part}.weight"] = ("BF16", (config.ffn_dim, config.dim))
        header[f"{block}.feed_forward.w2.weight"] = ("BF16", (config.dim, config.ffn_dim))
    return header


def write_synthetic(
    path: Path, config: ZImageConfig, rank: int | None, seed: int = 0, device: torch.device | str = "cpu"
) -> int:
    """Write the file, BF16 where rank is None, and return its size in bytes. device: where the values are drawn."""
    header = plan_header(config, rank) if rank else dense_header(config)
    metadata = file_metadata(config, rank) if rank else {"config": json.dumps(diffusers_config(config))}
    generator = torch.Generator(device).manual_seed(seed)
    with StreamedFile(path, header, metadata) as out:
        for name, (dtype, shape) in header.items():
            out.write(name, draw(name, dtype, shape, generator).cpu())
    return out.size


def write_comfyui(path: Path, config: ZImageConfig, form: str | None, device: torch.device) -> None:
    """Write a model under ComfyUI's names: in BF16, or its blocks' linears as float8_e4m3fn or int8_tensorwise."""
    with torch.device("meta"):
        body = ZImageTransformer(config).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    says = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    tensors: dict[str, torch.Tensor] = {}
    for key, shape in ((key, tuple(tensor.shape)) for key, tensor in body.items()):
        module, _, leaf = key.rpartition(".")
        value = draw(key, "BF16", shape, generator)
        linear = module.rpartition(".")[2] in ("to_qkv", "to_out", "w3_w1", "w2")
        fused = module.endswith("w3_w1")
        names = [module.replace("w3_w1", part) for part in ("w3", "w1")] if fused else [comfy_module(module)]
        for name, weight in zip(names, value.chunk(len(names))):
            if not linear or form is None:
                tensors[f"{name}.{leaf}" if name else leaf] = weight.cpu()
                continue
            whole = form == "float8_e4m3fn"
            scale = weight.float().abs().amax(None if whole else 1, keepdim=not whole) / (448 if whole else 127)
            codes = weight.float() / scale
            codes = codes.to(torch.float8_e4m3fn) if whole else codes.round().to(torch.int8)
            tensors |= {f"{name}.weight": codes.cpu(), f"{name}.weight_scale": scale.cpu()}
            tensors[f"{name}.comfy_quant"] = says.clone()
    save_file(tensors, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--dense", action="store_true", help="write the BF16 transformer instead")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    size = write_synthetic(arguments.out, ZImageConfig(), None if arguments.dense else arguments.rank, arguments.seed)
    print(f"{arguments.out}: {size / 2**30:.2f} GiB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
