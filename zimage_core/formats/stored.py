"""Weights kept small in memory: their stored forms, and the modules that dequantize them layer by layer at use.

Every stored form becomes a few tensors, its parts, that all have one row per row of the weight: a linear can then be
dequantized in slices of rows, and an embedding row by row without the rest of its table. One function per form turns
rows of parts into rows of fp32 weights; a new form is a function and a row of `FORMS`. How a file stores the parts is
in `weights.py`.

Legend: N out, K in, n some of the N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear.adapters import Adapter, Terms
from ..linear.backends import Backend, describe, load
from ..linear.layout import e2m1
from ..models import ops
from ..tune import select_ops, select_products
from . import blocks, kitchen
from .gguf import QUANTIZED

CHUNK = 2**22  # weights dequantized at once
HEAD_DIM = 128  # of a model that has no heads of its own to choose kernels for
WITHOUT_FP8 = ("mps",)  # devices whose tensors cannot have FP8 types


def _float(weight: Tensor) -> Tensor:
    return weight


def _int8(codes: Tensor, scale: Tensor) -> Tensor:
    """codes int8 (n, K), scale (n, 1)."""
    return codes.float() * scale.float()


def _fp8(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """codes: the bytes of FP8 values, uint8 (n, K), so that casting a module never casts them; scale fp32 (n, 1)."""
    return lambda codes, scale: _fp8_values(codes, dtype) * scale.float()


def _fp8_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes uint8 (n, K) as the FP8 numbers that they are, fp32; by a table on devices without the dtype."""
    if codes.device.type not in WITHOUT_FP8:
        return codes.view(dtype).float()
    table = torch.arange(256, dtype=torch.uint8).view(dtype).float().to(codes.device)
    return table[codes.int()]


def _nvfp4(codes: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """codes uint8 (n, K / 2), earlier column in the high nibble; block_scale FP8 bytes (n, K / 16); scale (n, 1)."""
    values = e2m1(codes.device)
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), -1)  # (256, 2): a byte's two values
    scales = _fp8_values(block_scale, torch.float8_e4m3fn) * scale.float()
    rows = F.embedding(codes.int(), pairs).reshape(*scales.shape, 16)
    return (rows * scales.unsqueeze(-1)).flatten(1)


def _mxfp8(codes: Tensor, block_scale: Tensor) -> Tensor:
    """codes: the bytes of FP8 values (n, K); block_scale: exponents of 2 above -127, uint8 (n, K / 32)."""
    values = _fp8_values(codes, torch.float8_e4m3fn).unflatten(1, (-1, 32))
    return (values * torch.exp2(block_scale.float() - 127).unsqueeze(-1)).flatten(1)


FORMS: dict[str, Callable[..., Tensor]] = {
    "float": _float,
    "int8": _int8,
    "float8_e4m3fn": _fp8(torch.float8_e4m3fn),
    "float8_e5m2": _fp8(torch.float8_e5m2),
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
    "Q8_0": blocks.q8_0,
    "Q4_0": blocks.q4_0,
    "Q4_1": blocks.q4_1,
    "Q5_0": blocks.q5_0,
    "Q5_1": blocks.q5_1,
    "Q2_K": blocks.q2_k,
    "Q3_K": blocks.q3_k,
    "Q4_K": blocks.q4_k,
    "Q5_K": blocks.q5_k,
    "Q6_K": blocks.q6_k,
}


EIGHT_BIT = {"int8": torch.int8, "int8_convrot": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
"""Kinds of forms that can be multiplied as they are, and their dtypes."""


def dequantize(form: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Rows of parts -> rows (n, K) of the weight, fp32 (a float weight: as it is).

    ComfyUI's rotated forms go through comfy-kitchen; a GGUF type without a function here goes through the `gguf`
    package, on the CPU.
    """
    if form in FORMS:
        return FORMS[form](**parts)
    if kitchen.knows(form):
        return kitchen.dequantize(form, parts)
    import gguf

    codes = parts["codes"]
    if codes.is_meta:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
        return torch.empty(len(codes), codes.shape[1] // size * block, device="meta")
    rows = gguf.quants.dequantize(codes.cpu().numpy(), gguf.GGMLQuantizationType[form])
    return torch.from_numpy(rows).to(codes.device)


def is_small(form: str) -> bool:
    """Whether tensors of a form are weights that `dequantize` makes floats of."""
    return form != "float" and (form in FORMS or form in QUANTIZED or kitchen.knows(form))


class StoredWeight(nn.Module):
    """A weight (N, K) kept as stored: parts as buffers with one row each per row of the weight.

    A fused weight is several pieces, one below the other, each with a form of its own.
    """

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.shape = (rows, columns)
        self.pieces: list[tuple[str, dict[str, str]]] = []  # form, part -> buffer
        self.starts = [0]

    def load(self, form: str, parts: Mapping[str, Tensor]) -> None:
        """Take the parts of a stored form as the rows below those taken before."""
        names = {part: f"{part}_{len(self.pieces)}" if self.pieces else part for part in parts}
        for part, name in names.items():
            self.register_buffer(name, parts[part], persistent=False)
        self.pieces.append((form, names))
        self.starts.append(self.starts[-1] + len(next(iter(parts.values()))))

    def buffer(self, name: str) -> Tensor:
        """`get_buffer` without its search through modules, which takes longer than a launch."""
        return cast(Tensor, self._buffers[name])

    def rows(self, start: int, stop: int) -> Tensor:
        """The weight's rows from start to stop, in fp32 or as stored."""
        found = []
        for (form, names), (first, last) in zip(self.pieces, pairwise(self.starts)):
            some = slice(max(start, first) - first, min(stop, last) - first)
            if some.start < some.stop:
                found.append(dequantize(form, {part: self.buffer(name)[some] for part, name in names.items()}))
        return found[0] if len(found) == 1 else torch.cat([rows.float() for rows in found])


class StoredLinear(StoredWeight):
    """A linear whose weight is dequantized whenever it is called: by Triton in one launch, or in slices of rows.

    kernels: whether Triton does it. products: by kind of form, what multiplies a weight as it is stored instead, with x
    rounded to 8 bits row by row.
    """

    bias: nn.Parameter | None
    kernels = False
    products: Mapping[str, Callable[..., Tensor]] = {}

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        values = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_parameter("bias", values)
        self.register_module("adapter", None)

    def set_adapter(self, terms: Terms | None) -> None:
        """Carry these terms and no others."""
        self.adapter = Adapter(terms, self.out_features) if terms else None

    def dense_weight(self) -> Tensor:
        """The weight (N, K) in fp32."""
        return self.rows(0, self.out_features).float()

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return self._linear(x)
        return self.adapter(x.flatten(0, -2), self._linear, self.bias).view(*x.shape[:-1], self.out_features)

    def _linear(self, x: Tensor) -> Tensor:
        if self.products:
            return self._multiplied(x)
        if len(self.pieces) == 1 and self.pieces[0][0] == "float":
            return F.linear(x, self.buffer("weight").to(x.dtype), self.bias)
        return F.linear(x, self._dequantized(x), self.bias)

    def _dequantized(self, x: Tensor) -> Tensor:
        """The weight (N, K) in x's dtype."""
        weight = torch.empty(self.shape, dtype=x.dtype, device=x.device)
        step = max(1, CHUNK // self.in_features)
        for (form, names), (first, last) in zip(self.pieces, pairwise(self.starts)):
            if self.kernels and form in FORMS and form != "float":
                rows = weight[first:last] if len(self.pieces) > 1 else weight
                load("dense").dequantize(form, {part: self.buffer(name) for part, name in names.items()}, rows)
                continue
            for start in range(first, last, step):
                stop = min(start + step, last)
                weight[start:stop] = self.rows(start, stop)
        return weight

    def _multiplied(self, x: Tensor) -> Tensor:
        rows, found = x.reshape(-1, self.in_features), []
        for (form, names), (first, last) in zip(self.pieces, pairwise(self.starts)):
            codes, scale = (self.buffer(names[part]) for part in ("codes", "scale"))
            bias = None if self.bias is None else self.bias[first:last]
            kind, *sizes = form.split(" ")
            scale = scale.flatten().float()
            found.append(self.products[kind](rows, codes.view(EIGHT_BIT[kind]), scale, bias, *map(int, sizes)))
        return torch.cat(found, 1).view(*x.shape[:-1], -1) if len(found) > 1 else found[0].view(*x.shape[:-1], -1)


def choose_arithmetic(
    model: nn.Module, device: torch.device, dtype: torch.dtype, backend: str = "auto", precision: str = "w8a16"
) -> Backend | None:
    """Say how a model's stored linears run on a device: by kernels or not, and which of a block as they are stored.

    The latter are chosen by `tune.select_products`; ValueError as there. Returns what runs linears that are stored in 8
    bits, None where there are none.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    blocks = [one for name, one in linears.items() if ".attention." in name or ".feed_forward." in name]
    kinds = sorted({form.split(" ")[0] for one in blocks for form, _ in one.pieces})
    found = select_products(kinds, backend, precision, device, dtype)
    products = {kind: load(name).multiply_8bit for kind, name in found.items()}
    for one in blocks:
        if all(form.split(" ")[0] in products for form, _ in one.pieces):
            one.products = products
    kernels = bool(linears) and select_ops(backend, device, dtype, HEAD_DIM) is not ops.TORCH
    for one in linears.values():
        one.kernels = kernels
    if not set(kinds) & EIGHT_BIT.keys():
        return None
    name = min(found.values(), default="triton" if kernels else "reference")
    return Backend(name, "w8a8" if found else "w8a16", load(name), f"linears stored in 8 bits on {describe(device)}")


class HostEmbedding(StoredWeight):
    """An embedding whose table stays on the host, mapped in its stored form; only the rows asked for are read."""

    def _apply(self, fn, recurse=True):
        return self  # .to(device) leaves the table where it is

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (..., K) of ids (...), on the host, in fp32 or as stored."""
        (form, names), index = self.pieces[0], ids.reshape(-1).cpu()
        rows = dequantize(form, {part: self.buffer(name)[index] for part, name in names.items()})
        return rows.view(*ids.shape, -1)
