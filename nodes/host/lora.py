"""What ComfyUI's LoRA loaders patch, as LoRAs of the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .patcher import Adapted


class StockModule:
    """A module of ComfyUI's own model by its name, for loaders that look one up and hook into it; it holds nothing.

    It takes the forward of ComfyUI's bypass LoRA, which `AdapterPatcher.set_injections` makes a LoRA, and refuses
    every other change.
    """

    def __init__(self, owner: Adapted, path: str):
        vars(self).update(owner=owner, path=path, forward=None)

    def __getattr__(self, name: str) -> StockModule | Tensor:
        path, shapes = f"{self.path}{name}", self.owner.shapes
        if path in shapes:
            return shapes[path]
        if any(key.startswith(f"{path}.") for key in shapes):
            return StockModule(self.owner, f"{path}.")
        raise AttributeError(f"{path}: ComfyUI's own model has no such module")

    def __getitem__(self, index: int) -> StockModule | Tensor:
        return getattr(self, str(index))

    def __setattr__(self, name: str, value) -> None:
        adapter = getattr(getattr(value, "__self__", None), "adapter", None)
        if name != "forward" or self.owner.taken is None or not hasattr(adapter, "weights"):
            raise ValueError(
                f"Z-Image cannot honour a change of {self.path}{name}: remove the node that makes it "
                "(LoRA loaders do work)"
            )
        self.owner.taken.append((f"{self.path}weight", adapter, value.__self__.multiplier))


ADAPTER_LEAVES = {  # ComfyUI's weight adapters: the tensors they hold, in their order, as files name them
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", None, "dora_scale", None),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", None, None, "dora_scale"),
    "lokr": ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", None, "dora_scale"),
}


def stock_lora(key, value, strength_model: float = 1.0):
    """One patch of a stock LoRA loader as a core `Lora`; key is a name or (name, (axis, start, length)).

    ValueError for what cannot run beside INT4 weights.
    """
    from ...zimage_core.lora.apply import Lora

    key, rows = (key, None) if isinstance(key, str) else (key[0], key[1])
    module, _, leaf = key.rpartition(".")
    if rows is not None and module.endswith("attention.qkv") and rows[1] % rows[2] == 0:
        module = f"{module.removesuffix('qkv')}to_{'qkv'[rows[1] // rows[2]]}"
    elif rows is not None:
        module = ""
    kind = getattr(value, "name", None) or (value[0] if isinstance(value, tuple) else type(value).__name__)
    tensors = {}
    if kind == "diff":
        tensors = {"diff" if leaf == "weight" else "diff_b": value[1][0]}
    elif kind in ADAPTER_LEAVES and leaf == "weight":
        for name, tensor in zip(ADAPTER_LEAVES[kind], value.weights, strict=True):
            if name is None and tensor is not None:
                module = ""
            elif tensor is not None:
                tensors[name] = tensor if isinstance(tensor, Tensor) else torch.tensor(float(tensor))
    if not module or not tensors or strength_model != 1.0:
        raise ValueError(f"{key}: a {kind} patch cannot be applied to an INT4 model: use the Z-Image LoRA Loader")
    return Lora.from_tensors({f"{module}.{name}": tensor for name, tensor in tensors.items()}, name=key)


def stock_loras(patches: dict, known: dict) -> list[tuple]:
    """[(Lora, strength)] of what stock LoRA loaders put into `patches`; `known` keeps the conversions in use."""
    converted, found = {}, []
    for key, entries in patches.items():
        for strength, value, strength_model, offset, _function in entries:
            name = (key, offset, id(value))
            if name not in converted:
                kept = known.get(name) or (value, stock_lora((key, offset), value, strength_model))
                converted[name] = kept
            found.append((converted[name][1], strength))
    known.clear()
    known.update(converted)
    return found
