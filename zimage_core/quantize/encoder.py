"""A smaller text encoder file from a BF16 one: INT8 as quanto writes it, or 4-bit NVFP4 as ComfyUI reads it.

Only the layers' Linears are quantized; the token table and the norms stay in bf16, and the language-model head, which
Z-Image does not run, is left out. Codes are rounded for the stored, already rounded scale. The 4-bit format is NVFP4,
as its scale for every 16 weights leaves less error than quanto's INT4 with groups of 128 (benchmarks/README.md).

Source: optimum-quanto 0.2.7 (tensor/optimizers/absmax_optimizer.py, nn/qmodule.py) for names, codes and scalars, mmgp
3.8.2 (safetensors2.py) for the metadata; QUANTIZATION.md and comfy/quant_ops.py of Comfy-Org/ComfyUI@783545f6.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..formats.encoder import ENCODER_REMEDY, EncoderFile, open_encoder
from ..formats.weights import blocked
from ..sizes import round_up
from .writer import DTYPES, Header, StreamedFile, check_apart

_LINEAR = re.compile(r"layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight")
_HEAD = "lm_head.weight"
_FP8_MAX, _FP8_MIN = 448.0, 2**-9
# Codes tried for the largest of 16 weights: clipped from above 6 or scaled below it, the others may fit better.
_PEAKS = (6.0, 4.0, 4.5, 5.0, 5.5, 6.5, 7.0)
# Weight-only: tells ComfyUI not to quantize activations.
_COMFY_QUANT = b'{"format": "nvfp4", "full_precision_matrix_mult": true}'
_ROWS = 512  # at a time, for the search


def quantize_encoder(
    src: str | Path,
    dst: str | Path,
    *,
    bits: int = 8,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Write `dst`, a safetensors file with 8-bit (quanto) or 4-bit (NVFP4) Linears, from a BF16, FP16 or FP32 encoder.

    The source is a file or a transformers folder; one tensor at a time is in memory. device: where the arithmetic
    runs. progress(done, total, name) is called before every tensor and once at the end. `dst` is replaced if it
    exists, and only at the end. Raises FileNotFoundError, or ValueError where the source is no such encoder or holds
    NaN or infinity, where bits is neither 8 nor 4, or where the destination cannot be written.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, found {bits}; use 8")
    src, dst = Path(src), Path(dst)
    with open_encoder(src) as file:
        _check_source(file, dst)
        names = [name for name in file.weights if name != _HEAD]
        linears = [name.removesuffix(".weight") for name in names if _LINEAR.fullmatch(name)]
        form = _int8_parts if bits == 8 else _nvfp4_parts
        header: Header = {}
        for name in names:
            shape = file.weights[name].shape
            planned = _planned(name, shape, bits) if _LINEAR.fullmatch(name) else {name: ("BF16", shape)}
            header |= {f"model.{key}": entry for key, entry in planned.items()}
        # The widest dtypes first, so that every tensor is aligned.
        header = dict(sorted(header.items(), key=lambda item: -DTYPES[item[1][0]].itemsize))
        with StreamedFile(dst, header, _metadata(file, linears, bits)) as out:
            for done, name in enumerate(names):
                if progress:
                    progress(done, len(names), name)
                tensor = file.files.get(file.weights[name].key)
                if not tensor.isfinite().all():
                    raise ValueError(
                        f"{src}: {name}: expected finite weights, found NaN or infinity; download it again"
                    )
                if _LINEAR.fullmatch(name):
                    parts = form(name, tensor.to(device).float())
                else:
                    parts = {name: tensor.to(torch.bfloat16)}
                for key, part in parts.items():
                    out.write(f"model.{key}", part)
        if progress:
            progress(len(names), len(names), "")


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (N, K) -> codes int8 (N, K) in -127..127 and scale bf16 (N, 1), so that weight ~ codes * scale."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def nvfp4_rows(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (n, K), scale () -> codes uint8 (n, K / 2), earlier column in the high nibble, block scales FP8 (n, K / 16).

    Each block's scale is the one of several that leaves the least squared error.
    """
    groups = weight.unflatten(1, (-1, 16))  # (n, S, 16)
    sizes = groups.abs()
    peak = sizes.amax(-1, keepdim=True)
    least = torch.full_like(peak, torch.inf)
    scales = torch.zeros_like(peak)
    for target in _PEAKS:
        found = (peak / target / scale).clamp(_FP8_MIN, _FP8_MAX).to(torch.float8_e4m3fn).float()
        step = found * scale
        error = (_to_fp4(sizes / step).mul_(step) - sizes).square_().sum(-1, keepdim=True)
        scales = torch.where(error < least, found, scales)
        least = torch.minimum(error, least)
    values = _to_fp4(sizes / (scales * scale))
    # 0, 0.5, 1, 1.5 | 2, 3 | 4, 6 are numbered 0 .. 7: two per octave from 2 on.
    index = torch.where(values < 2, 2 * values, torch.where(values < 4, values + 2, values / 2 + 4))
    codes = (index.to(torch.uint8) | torch.signbit(groups).to(torch.uint8) << 3).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales.squeeze(-1).to(torch.float8_e4m3fn)


def _to_fp4(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 to numbers that are not negative."""
    spacing = torch.where(x < 2, 0.5, torch.where(x < 4, 1.0, 2.0))
    return (x / spacing).round_().mul_(spacing).clamp_(max=6)


def _check_source(file: EncoderFile, dst: Path) -> None:
    """ValueError if a source cannot be quantized, or is the destination itself."""
    file.match()
    for name, stored in file.weights.items():
        if stored.form != "float":
            raise ValueError(
                f"{file.files.path}: {name}: expected BF16, F16 or F32, found {stored.form}, small already; "
                f"{ENCODER_REMEDY}"
            )
    check_apart(dst, file.files)


def _planned(name: str, shape: tuple[int, ...], bits: int) -> Header:
    """A quantized Linear's tensors: name -> (safetensors dtype, shape)."""
    layer, (n, k) = name.removesuffix(".weight"), shape
    if bits == 8:
        scalars = {f"{layer}.input_scale": ("BF16", ()), f"{layer}.output_scale": ("BF16", ())}
        return {f"{name}._data": ("I8", (n, k)), f"{name}._scale": ("BF16", (n, 1)), **scalars}
    if k % 16 or n % 16:
        raise ValueError(f"{name}: expected multiples of 16 for 4 bits, found {n} x {k}; use 8 bits")
    return {
        name: ("U8", (n, k // 2)),
        f"{layer}.weight_scale": ("F8_E4M3", (round_up(n, 128), round_up(k // 16, 4))),
        f"{layer}.weight_scale_2": ("F32", ()),
        f"{layer}.comfy_quant": ("U8", (len(_COMFY_QUANT),)),
    }


def _int8_parts(name: str, weight: Tensor) -> dict[str, Tensor]:
    codes, scale = int8_rows(weight)
    layer, one = name.removesuffix(".weight"), torch.ones((), dtype=torch.bfloat16)
    return {
        f"{name}._data": codes,
        f"{name}._scale": scale,
        f"{layer}.input_scale": one,
        f"{layer}.output_scale": one,
    }


def _nvfp4_parts(name: str, weight: Tensor) -> dict[str, Tensor]:
    # The smallest target asks for the largest block scale, which has to fit in FP8.
    scale = (weight.abs().amax() / (min(_PEAKS) * _FP8_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    codes, scales = zip(*(nvfp4_rows(rows, scale) for rows in weight.split(_ROWS)), strict=True)
    layer = name.removesuffix(".weight")
    return {
        name: torch.cat(codes),
        f"{layer}.weight_scale": blocked(torch.cat(scales).view(torch.uint8)).view(torch.float8_e4m3fn),
        f"{layer}.weight_scale_2": scale,
        f"{layer}.comfy_quant": torch.frombuffer(bytearray(_COMFY_QUANT), dtype=torch.uint8),
    }


def _metadata(file: EncoderFile, linears: list[str], bits: int) -> dict[str, str]:
    """The file's metadata: the config and, for 8 bits, which Linears are small, both as mmgp writes them."""
    data = file.data or {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": file.config.num_layers + 1,
        **{name: size for name, size in asdict(file.config).items() if name != "num_layers"},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    if bits == 4:
        return {"format": "pt", "config": json.dumps(data)}
    kinds = {f"model.{name}": {"weights": "qint8", "activations": "none"} for name in linears}
    return {
        "format": "pt",
        "quantization_format": "quanto",
        "quantization_map_base64": _base64(kinds),
        "config_base64": _base64(data),
    }


def _base64(data: Mapping) -> str:
    return base64.b64encode(json.dumps(data).encode("utf-8")).decode("ascii")
