"""Weights by ComfyUI's names, and those of dense models as its nodes merge, subtract and save them.

A merge is a patch of every weight, which ComfyUI adds to a MODEL's clone. Here the clone that is loaded puts merged
weights in the place of the module's own; those are kept on the host, and never written into, as other models' merges
may refer to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.weight_adapter
import torch
from torch import Tensor, nn

from ...zimage_core.linear import adapters
from ...zimage_core.lora.apply import merged, unadapted
from ...zimage_core.lora.deltas import Bias
from ...zimage_core.lora.read import Lora

STOCK_NAMES = (  # how modules end here -> in ComfyUI's model
    ("attention.to_qkv", "attention.qkv"),
    ("attention.to_out", "attention.out"),
    ("attention.norm_q", "attention.q_norm"),
    ("attention.norm_k", "attention.k_norm"),
)
FUSED, PARTS = "feed_forward.w3_w1", ("feed_forward.w3", "feed_forward.w1")


@dataclass(frozen=True)
class Place:
    """Where a weight of ComfyUI's own model is in the core's: one of `count` equal parts of a module's tensor."""

    module: nn.Module
    target: str  # as LoRAs name it
    leaf: str
    shape: tuple[int, ...]
    index: int = 0
    count: int = 1

    @property
    def tensor(self) -> tuple[nn.Module, str]:
        return self.module, self.leaf

    @property
    def is_token(self) -> bool:
        """Whether it is a pad token, which belongs to the model itself."""
        return self.target == self.leaf

    def part(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.count)[self.index]


def stock_places(model: nn.Module) -> dict[str, Place]:
    """{ComfyUI's name: Place} of every weight of a transformer."""
    found = {}
    for target, module in model.named_modules():
        names = [target]
        if target.endswith(FUSED):
            names = [target.removesuffix(FUSED) + part for part in PARTS]
        for ours, theirs in STOCK_NAMES:
            names = [name.removesuffix(ours) + theirs if name.endswith(ours) else name for name in names]
        for leaf, (rows, *columns) in leaves(module):
            for i, name in enumerate(names):
                shape = (rows // len(names), *columns)
                found[f"{name}.{leaf}".lstrip(".")] = Place(module, target or leaf, leaf, shape, i, len(names))
    return found


def leaves(module: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A module's own tensors and their shapes; of a linear its dense weight's, in whatever form it has it."""
    if not hasattr(module, "in_features"):
        yield from ((leaf, tuple(p.shape)) for leaf, p in module.named_parameters(recurse=False))
        return
    yield "weight", (module.out_features, module.in_features)
    if getattr(module, "bias", None) is not None:
        yield "bias", (module.out_features,)


class Change(comfy.weight_adapter.WeightAdapterBase):
    """What one of our LoRAs changes in one weight, as a patch of ComfyUI's; `weights` are the Lora and the Place."""

    name = "zimage"

    def __init__(self, loaded_keys: set[str], weights: tuple[Lora, Place]):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, *_args, **_kwargs) -> Tensor:
        lora, place = self.weights
        deltas = lora.transformer[place.target]
        if any(isinstance(delta, Bias) for delta in deltas) and getattr(place.module, "bias", None) is None:
            raise ValueError(f"{lora.name}: {place.target}: adds a bias, which ComfyUI's Z-Image has no place for")
        whole = weight.new_zeros(place.count, *weight.shape)
        whole[place.index] = weight
        changes = [(delta, strength) for delta in deltas]
        return place.part(merged(whole.flatten(0, 1), place.target, place.leaf, changes))


def changes(lora: Lora, places: Mapping[str, Place]) -> dict[str, Change]:
    """{ComfyUI's name of a weight: what a LoRA changes in it}."""
    return {name: Change(set(), (lora, place)) for name, place in places.items() if place.target in lora.transformer}


def is_merge(value: Any, strength_model: float) -> bool:
    """Whether a patch is made of another weight, or scales the one that is there."""
    return isinstance(value, list) or strength_model != 1.0


def same(one: Sequence[tuple], other: Sequence[tuple]) -> bool:
    """Whether two lists hold the same patches."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other))


class DenseWeights:
    """The weights of a dense transformer by ComfyUI's names.

    patches: {name: list of patches}, as ComfyUI keeps them.
    """

    def __init__(self, core: adapters.Adapted, places: Mapping[str, Place]):
        self.core, self.places = core, places
        self.merged: dict[str, list[tuple]] = {}  # the patches that are in the weights now
        self.kept: dict[tuple[nn.Module, str], Tensor] = {}  # the own tensors that others stand in for, on the host

    def own(self, name: str) -> Tensor:
        """A weight without any patch."""
        place = self.places[name]
        kept = self.kept.get(place.tensor)
        return place.part(unadapted(*place.tensor) if kept is None else kept)

    def patched(self, name: str, patches: Sequence[tuple], device: torch.device) -> Tensor:
        """A weight with patches, computed on a device as `ModelPatcher.patch_weight_to_device` does."""
        own = self.own(name)
        if not patches:
            return own
        if same(self.merged.get(name, ()), patches):
            place = self.places[name]
            return place.part(place.module.get_parameter(place.leaf))
        dtype = comfy.model_management.lora_compute_dtype(device)
        value = comfy.model_management.cast_to_device(own, device, dtype, copy=True)
        return comfy.lora.calculate_weight(list(patches), value, name).to(own.dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, patches: Mapping[str, list[tuple]], device: torch.device) -> None:
        """Replace the model's weights by patched ones, computed on a device; without patches, restore its own."""
        wanted = {name: list(found) for name, found in patches.items() if found}
        changed = {
            self.places[name].tensor
            for name in {**self.merged, **wanted}
            if not same(self.merged.get(name, ()), wanted.get(name, ()))
        }
        names: dict[tuple[nn.Module, str], list[str]] = {}
        for name, place in self.places.items():
            names.setdefault(place.tensor, []).append(name)
        for tensor in changed:
            module, leaf = tensor
            now = module.get_parameter(leaf)
            own = self.kept.get(tensor, now).cpu()
            made = own.to(now.device)
            if any(name in wanted for name in names[tensor]):
                made = torch.cat(
                    [self.patched(name, wanted.get(name, ()), device).to(now.device) for name in names[tensor]]
                )
                self.kept[tensor] = own
            else:
                self.kept.pop(tensor)
            module._parameters[leaf] = (
                made if isinstance(made, nn.Parameter) else nn.Parameter(made, requires_grad=False)
            )
        self.merged = wanted
        self.core.adapter_version += bool(changed)
