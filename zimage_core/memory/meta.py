"""What code takes of a device's memory, counted by running it on the meta device, where tensors have no bytes.

The counter sees every tensor that is made and when it is freed. Blocks repeat, so each kind of block runs once.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from ..linear.svdq import SVDQLinear
from .placement import allocated, slots, typed_like

M = TypeVar("M", bound=nn.Module)
META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are made on a device while it is on: those alive now, and their peak.

    Blocks repeat: `run_once` runs one of each form and shape, and a repeat adds what that one took. The peak is the
    same, in a fraction of the time.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self._device = device
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._runs: dict[Hashable, tuple[int, list]] = {}  # bytes that one took; shape and dtype of each of its results

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, made=True)
        return out

    def run_once(self, module: nn.Module, run: Callable[..., Any], *args: object) -> Any:
        """run(*args), which returns a tensor or a tuple of them; skipped if a module of the same form has run."""
        tensors = (*(tensor for _, _, tensor in slots(module)), *(x for x in args if isinstance(x, Tensor)))
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key in self._runs:
            taken, results = self._runs[key]
            self.peak = max(self.peak, self.now + taken)
            made = tuple(torch.empty(shape, dtype=dtype, device=META) for shape, dtype in results)
            return made if len(made) > 1 else made[0]
        before, begun, self.peak = self.peak, self.now, self.now
        made = run(*args)
        results = [(tensor.shape, tensor.dtype) for tensor in (made if isinstance(made, tuple) else (made,))]
        self._runs[key] = self.peak - begun, results
        self.peak = max(self.peak, before)
        return made

    def run_block(self, stage: str, index: int, block: nn.Module, x: Tensor, *args: object) -> Any:
        """`run_once` in the form in which models ask their hooks to run a block."""
        return self.run_once(block, block, x, *args)

    def _meet(self, found: object, made: bool) -> None:
        """Count storages that were not seen before; those that an operation is given were there already."""
        for tensor in tree_iter(found):
            if not isinstance(tensor, Tensor) or tensor.device.type != self._device.type:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                size = allocated(storage.nbytes()) if made else 0
                self._known.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class FlashAttention(TorchFunctionMode):
    """Attention on the meta device makes what a GPU's kernels make: its output, and a number per query and head."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        query, _, value = args[:3]
        _ = query.new_empty(query.shape[:-1], dtype=torch.float32)
        return query.new_empty(*query.transpose(1, 2).shape[:-1], value.shape[-1]).transpose(1, 2)


def peak_bytes(run: Callable[[LiveBytes], object]) -> int:
    """Most bytes that run(counter) has on the meta device at once, beside the tensors that were there before."""
    with torch.no_grad(), FlashAttention(), LiveBytes() as live:
        run(live)
    return live.peak


def on_meta(module: M) -> M:
    """A copy of a module whose parameters and buffers are on the meta device, not counted; all else is shared."""
    twin = copy.copy(module)
    if isinstance(twin, SVDQLinear):
        twin.codes = None
    with _disable_current_modes():
        for kind in ("_parameters", "_buffers"):
            held = {
                name: None if tensor is None else typed_like(tensor.to(META), tensor)
                for name, tensor in getattr(module, kind).items()
            }
            setattr(twin, kind, held)
    twin._modules = {name: None if part is None else on_meta(part) for name, part in module._modules.items()}
    return twin
