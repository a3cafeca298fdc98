"""The dense transformer that is quantized: its tensors by the model's names, LoRA files merged into them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..formats.gguf import QUANTIZED
from ..formats.identify import ModelInfo
from ..formats.load import build_transformer, match_transformer
from ..formats.safetensors import TensorFiles, tensor_bytes
from ..formats.stored import dequantize
from ..formats.weights import Stored, read_parts
from ..lora.apply import check, merged
from ..lora.deltas import Bias, Delta
from ..lora.read import Lora
from ..models.transformer import ZImageTransformer

EIGHT_BITS = 7.99  # of a weight on average, from which on a source is as good as it gets
LARGEST = 1e6  # allowed in weights: far above any working model's, and with powers that fp32 still holds


def match_source(files: TensorFiles, info: ModelInfo) -> tuple[ZImageTransformer, Mapping[str, list[Stored]]]:
    """The model of an open file on the meta device, and where each of its tensors is; a warning below 8 bits.

    ValueError unless the file is a Z-Image transformer without SVDQuant, with every tensor.
    """
    if info.format.startswith("svdq"):
        raise ValueError(f"{files.path}: expected a BF16 model, found {info.format}; quantize its BF16 original")
    model = build_transformer(info)
    stored = match_transformer(files, model, info).stored
    if (bits := _bits(files, stored)) < EIGHT_BITS:
        text = (
            f"{files.path}: has {bits:.1f} bits a weight, and they get rounded twice; the BF16 file gives better ones"
        )
        warnings.warn(text, stacklevel=4)
    return model, stored


def _bits(files: TensorFiles, stored: Mapping[str, list[Stored]]) -> float:
    """Bits of a weight on average, over a file's quantized matrices; 16 without one."""
    found = [one for pieces in stored.values() for one in pieces if one.form != "float"]
    if not found:
        return 16.0
    size = 0.0
    for one in found:
        dtype, shape = files.tensors[one.key]
        block, count = QUANTIZED.get(dtype, (1, 0))
        size += prod(shape) / block * count if count else tensor_bytes(dtype, shape)
    return 8 * size / sum(prod(one.shape) for one in found)


class DenseSource:
    """The dense model's tensors by the model's names, with LoRA files merged into them."""

    def __init__(self, files: TensorFiles, info: ModelInfo, loras: Sequence[tuple[Lora, float]], device: torch.device):
        """ValueError if a tensor is missing or has a wrong shape, or a LoRA does not fit."""
        self.files = files
        self.config = info.config
        self.device = device
        model, self.stored = match_source(files, info)
        self.loras = ", ".join(lora.name for lora, _ in loras)
        self.changes: dict[str, list[tuple[Delta, float]]] = {}
        for lora, strength in loras:
            if lora.text_encoder:
                count = len(lora.text_encoder)
                text = f"{lora.name}: its {count} modules of the text encoder are not merged; load it at run time too"
                warnings.warn(text, stacklevel=4)
            for target, deltas in check(lora, model).items():
                self.changes.setdefault(target, []).extend((delta, strength) for delta in deltas)

    def get(self, name: str) -> Tensor:
        """A tensor on the device, joined from its parts. ValueError if it holds NaN or numbers above `LARGEST`."""
        parts = []
        for stored in self.stored[name]:
            parts.append(self._read(stored, self.device))
            check_numbers(parts[-1], f"{self.files.path}: {stored.key}", "get an undamaged file")
        whole = torch.cat(parts)
        module, _, leaf = name.rpartition(".")
        changes = self.changes.get(module or name)
        if not changes:
            return whole
        if any(isinstance(delta, Bias) for delta, _ in changes) and f"{module}.bias" not in self.stored:
            raise ValueError(f"{module}: the LoRA adds a bias, which the INT4 file cannot hold; load it at run time")
        found = merged(whole, module, leaf, changes)
        check_numbers(found, f"{self.loras}: merged into {name}", "lower its strength")
        return found

    def digest(self) -> str:
        """As `digest` of all tensors."""
        return digest(self.stored, partial(self._read, device=torch.device("cpu")))

    def _read(self, stored: Stored, device: torch.device) -> Tensor:
        """A tensor of the file on a device, in bf16 where the file has it smaller."""
        if stored.form == "float":
            tensor = self.files.get(stored.key).to(device)
            return tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor
        parts = read_parts(self.files, stored)
        return dequantize(stored.form, {part: t.to(device) for part, t in parts.items()}).to(torch.bfloat16)


def digest(sources: Mapping[str, list[Stored]], read: Callable[[Stored], Tensor]) -> str:
    """A hash of every tensor's name and numbers, the same however the file is sharded or named."""
    found = hashlib.sha256()
    for name, pieces in sorted(sources.items()):
        parts = [read(stored).contiguous().flatten() for stored in pieces]
        found.update(f"{name} {sum(map(len, parts))} {parts[0].dtype}".encode())
        for part in parts:
            found.update(part.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def files_digest(files: TensorFiles) -> str:
    """A hash of all bytes of a model's files."""
    found = hashlib.sha256()
    for header in files.headers:
        with Path(header.path).open("rb") as file:
            for chunk in iter(partial(file.read, 2**24), b""):
                found.update(chunk)
    return found.hexdigest()[:16]


def check_numbers(tensor: Tensor, where: str, remedy: str) -> None:
    """ValueError if a tensor holds NaN or numbers above `LARGEST`."""
    largest = tensor.abs().amax().item()  # NaN if there is one
    if not largest <= LARGEST:
        raise ValueError(f"{where}: expected numbers up to {LARGEST:.0e}, found {largest:.1e}; {remedy}")
