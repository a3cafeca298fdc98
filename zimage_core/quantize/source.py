"""The dense transformer that is quantized: its tensors by the model's names, LoRA files merged into them."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..formats.identify import ModelInfo, model_info
from ..formats.load import expected_tensors, match_tensors
from ..formats.safetensors import TensorFiles, open_tensors
from ..linear.adapters import Linear
from ..lora.apply import Bias, Delta, Lora, compose
from ..models.config import ZImageConfig
from ..models.transformer import ZImageTransformer

FP8 = ("F8_E4M3", "F8_E5M2")
FP8_SCALES = (".weight_scale", ".scale_weight")
FP8_UNUSED = (".input_scale", ".scale_input", ".comfy_quant", "scaled_fp8")
LARGEST = 1e6  # allowed in weights: far above any working model's, and with powers that fp32 still holds


def open_dense(path: Path) -> TensorFiles:
    """A transformer's file or folder; FP8 weights read as BF16, with a warning."""
    files = open_tensors(path)
    dtypes = {dtype for dtype, _ in files.tensors.values()}
    if dtypes.isdisjoint(FP8) or "I8" in dtypes:
        return files
    warnings.warn(f"{path}: is FP8, so its weights get rounded twice; the BF16 file gives better ones", stacklevel=3)
    return _Fp8Files(path)


def dense_info(files: TensorFiles) -> ModelInfo:
    """Format and sizes from the header. ValueError unless it is a dense Z-Image transformer."""
    info = model_info(files)
    if info.format != "dense":
        raise ValueError(f"{files.path}: expected a BF16 model, found {info.format}; quantize its BF16 original")
    return info


class DenseSource:
    """The dense model's tensors by the model's names, with LoRA files merged into them."""

    def __init__(
        self, files: TensorFiles, config: ZImageConfig, loras: Sequence[tuple[Lora, float]], device: torch.device
    ):
        """ValueError if a tensor is missing or has a wrong shape, or a LoRA does not fit."""
        self.files = files
        self.config = config
        self.device = device
        with torch.device("meta"):
            model = ZImageTransformer(config, linear=Linear)
        self.keys = match_tensors(files, expected_tensors(model, rank=0))
        self.loras = ", ".join(lora.name for lora, _ in loras)
        self.changes: dict[str, list[tuple[Delta, float]]] = {}
        for lora, strength in loras:
            for target, deltas in lora.check(model).items():
                self.changes.setdefault(target, []).extend((delta, strength) for delta in deltas)

    def get(self, name: str) -> Tensor:
        """A tensor on the device, joined from its parts. ValueError if it holds NaN or numbers above `LARGEST`."""
        parts = []
        for key in self.keys[name]:
            parts.append(self.files.get(key).to(self.device))
            _check_numbers(parts[-1], f"{self.files.path}: {key}", "get an undamaged file")
        whole = torch.cat(parts)
        module, _, leaf = name.rpartition(".")
        changes = self.changes.get(module or name)
        if not changes:
            return whole
        merged = self._merged(whole, module, leaf, changes)
        _check_numbers(merged, f"{self.loras}: merged into {name}", "lower its strength")
        return merged

    def digest(self) -> str:
        """A hash of names and of sixteen values of each tensor, the same however the file is sharded or named."""
        found = hashlib.sha256()
        for name, keys in sorted(self.keys.items()):
            parts = [self.files.get(key).flatten() for key in keys]
            count, place = sum(map(len, parts)), 0
            found.update(f"{name} {count} {parts[0].dtype}".encode())
            step = max(count // 16, 1)
            for part in parts:  # the same values of a tensor, however it is cut into parts
                found.update(part[-place % step :: step].float().numpy().tobytes())
                place += len(part)
        return found.hexdigest()[:16]

    def _merged(self, tensor: Tensor, module: str, leaf: str, changes: list[tuple[Delta, float]]) -> Tensor:
        """The tensor with the changes added, in fp32."""
        tensor = tensor.float()
        shifts = [(delta, strength) for delta, strength in changes if isinstance(delta, Bias)]
        if leaf == "bias":
            return tensor + sum(strength * delta.get("diff_b", self.device) for delta, strength in shifts)
        if tensor.ndim == 1 or not module:
            return tensor + sum(s * delta.get("diff", self.device).view_as(tensor) for delta, s in changes)
        if shifts and f"{module}.bias" not in self.keys:
            raise ValueError(f"{module}: the LoRA adds a bias, which the INT4 file cannot hold; load it at run time")
        linear = Linear(tensor.shape[1], tensor.shape[0], bias=False, device=self.device)
        linear.weight = nn.Parameter(tensor, requires_grad=False)
        terms = compose([change for change in changes if change not in shifts], linear, module, torch.float32)
        if terms.pair and not (terms.dense or terms.krons):
            down, up = terms.pair
            return torch.addmm(tensor, up, down)
        linear.set_adapter(terms)  # applied to the identity, it gives the weight
        return torch.cat([linear(rows) for rows in torch.eye(tensor.shape[1], device=self.device).split(1024)]).T


def _check_numbers(tensor: Tensor, where: str, remedy: str) -> None:
    """ValueError if a tensor holds NaN or numbers above `LARGEST`."""
    largest = tensor.abs().amax().item()  # NaN if there is one
    if not largest <= LARGEST:
        raise ValueError(f"{where}: expected numbers up to {LARGEST:.0e}, found {largest:.1e}; {remedy}")


class _Fp8Files(TensorFiles):
    """A file of FP8 weights, with or without scales, read as BF16."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._fp8 = {key for key, (dtype, _) in self.tensors.items() if dtype in FP8 and key.endswith(".weight")}
        self._scales = {key: shape for key, (_, shape) in self.tensors.items() if key.endswith(FP8_SCALES)}
        self.tensors = {
            key: ("BF16" if key in self._fp8 else dtype, shape)
            for key, (dtype, shape) in self.tensors.items()
            if not key.endswith((*FP8_SCALES, *FP8_UNUSED))
        }

    def get(self, name: str) -> Tensor:
        tensor = super().get(name)
        if name not in self._fp8:
            return tensor
        tensor = tensor.float()
        for scale in (name.removesuffix(".weight") + leaf for leaf in FP8_SCALES):
            if math.prod(self._scales.get(scale, ())) != 1:
                raise ValueError(f"{self.path}: {scale}: expected one number, found many; quantize the BF16 original")
            if scale in self._scales:
                tensor = tensor * super().get(scale).float()
        return tensor.to(torch.bfloat16)
