"""What ComfyUI's LoRA loaders do to the weights of its own model, as LoRAs of the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...zimage_core.lora.read import Lora
from .dense import Change

if TYPE_CHECKING:
    from .patcher import Adapted

Rows = tuple[int, int, int]
"""The part of a weight that a patch changes: axis, start, length."""

ADAPTER_LEAVES = {  # the tensors of ComfyUI's weight adapters, in their order, as files name them
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", None, "dora_scale", None),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", None, None, "dora_scale"),
    "lokr": ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", None, "dora_scale"),
}


class StockModule:
    """A module of ComfyUI's own model by its name, for loaders that look one up and hook into it; it holds nothing.

    The forward of ComfyUI's bypass LoRA goes to `Adapted.hooked`; every other change is a ValueError.
    """

    owner: Adapted
    path: str
    forward: None

    def __init__(self, owner: Adapted, path: str):
        vars(self).update(owner=owner, path=path, forward=None)

    def __getattr__(self, name: str) -> StockModule | Tensor:
        return self[name]

    def __getitem__(self, name: str | int) -> StockModule | Tensor:
        path, stock = f"{self.path}{name}", self.owner.stock
        if path in stock:
            return stock[path]
        if any(key.startswith(f"{path}.") for key in stock):
            return StockModule(self.owner, f"{path}.")
        raise AttributeError(f"{path}: ComfyUI's own model has no such module")

    def __setattr__(self, name: str, value) -> None:
        hook = getattr(value, "__self__", None)
        adapter = getattr(hook, "adapter", None)
        if hook is None or name != "forward" or self.owner.hooked is None or not hasattr(adapter, "weights"):
            raise ValueError(
                f"Z-Image cannot honour a change of {self.path}{name}: remove the node that makes it "
                "(LoRA loaders do work)"
            )
        self.owner.hooked.append((f"{self.path}weight", adapter, hook.multiplier))


def stock_lora(key: str | tuple[str, Rows | None], value, strength_model: float = 1.0) -> Lora:
    """One patch of a stock LoRA loader; key is ComfyUI's name of the weight, with the rows that it changes if not all.

    ValueError for patches that are no LoRA, and for the few kinds of LoRA that cannot run beside the weights.
    """
    name, rows = (key, None) if isinstance(key, str) else (key[0], key[1])
    if strength_model != 1.0 or isinstance(value, list) or value == (None,):
        raise ValueError(
            f"{name}: this weight takes LoRAs only, it cannot be scaled, merged or replaced: remove the node that does "
            "that"
        )
    module, _, leaf = name.rpartition(".")
    kind = getattr(value, "name", None) or (value[0] if isinstance(value, tuple) else type(value).__name__)
    tensors = patch_tensors(kind, value, leaf)
    if rows is not None:
        whole = module.endswith("attention.qkv") and rows[1] % rows[2] == 0
        module = f"{module.removesuffix('qkv')}to_{'qkv'[rows[1] // rows[2]]}" if whole else ""
    if not module or not tensors:
        raise ValueError(
            f"{name}: a LoRA of this kind ({kind}) cannot be applied here: for the model, use the Z-Image LoRA Loader"
        )
    return Lora.from_tensors({f"{module}.{part}": tensor for part, tensor in tensors.items()}, name=name)


def patch_tensors(kind: str, value, leaf: str) -> dict[str, Tensor]:
    """A patch's tensors by the names that they have in LoRA files; none for a patch of an unknown kind."""
    if kind == "diff":
        return {"diff" if leaf == "weight" else "diff_b": value[1][0]}
    if kind not in ADAPTER_LEAVES or leaf != "weight":
        return {}
    found = {}
    for name, tensor in zip(ADAPTER_LEAVES[kind], value.weights, strict=True):
        if tensor is None:
            continue
        if name is None:  # a part without a name in files, such as LoCon's middle convolution
            return {}
        found[name] = tensor if isinstance(tensor, Tensor) else torch.tensor(float(tensor))
    return found


def stock_loras(patches: Mapping, known: dict) -> list[tuple[Lora, float]]:
    """[(LoRA, strength)] of what LoRA nodes, ours and ComfyUI's, put into `patches`.

    known: the conversions of ComfyUI's, which are kept while in use.
    """
    converted: dict = {}
    ours: dict[tuple[Lora, float], None] = {}
    found = []
    for key, entries in patches.items():
        for strength, value, strength_model, offset, _function in entries:
            if isinstance(value, Change):
                ours[value.weights[0], strength] = None
                continue
            name = (key, offset, id(value))
            if name not in converted:
                # The value is kept beside its conversion, so that its id stays its own.
                converted[name] = known.get(name) or (value, stock_lora((key, offset), value, strength_model))
            found.append((converted[name][1], strength))
    known.clear()
    known.update(converted)
    return [*ours, *found]
