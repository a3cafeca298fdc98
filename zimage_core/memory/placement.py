"""What of a model stays on the device: its tensors, their bytes, and which whole blocks a byte allowance holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..linear.svdq import svdq_linears
from ..sizes import round_up

ALIGNMENT = 256
MIB = 2**20
BUFFERS = 2  # on the device, each as large as the largest block

Slot = tuple[dict[str, Any], str, Tensor]
"""Where a module keeps a tensor: its `_parameters` or `_buffers`, the name in it, the tensor."""


def slots(module: nn.Module, inside: bool = True) -> Iterator[Slot]:
    """Every parameter and buffer of a module, in a fixed order, and of those inside it."""
    for part in module.modules() if inside else [module]:
        for holder in (part._parameters, part._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield holder, name, tensor


def change(module: nn.Module, make: Callable[[Tensor], Tensor], inside: bool = True) -> None:
    """Put make(tensor) in the place of every parameter and buffer.

    Not `nn.Module.to`: that writes into the parameter that is there, and one that was loaded in inference mode, as
    ComfyUI's nodes run, can then neither be used in it nor outside.
    """
    for holder, name, tensor in slots(module, inside):
        made = make(tensor)
        if made is not tensor:
            holder[name] = typed_like(made, tensor)


def typed_like(made: Tensor, tensor: Tensor) -> Tensor:
    """As a parameter, where the other is one."""
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def module_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, _, tensor in slots(module))


def aligned_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in a flat buffer, where the next one begins aligned."""
    return round_up(tensor.numel() * tensor.element_size(), ALIGNMENT)


def allocated(count: int) -> int:
    """Bytes that torch's CUDA allocator counts for a tensor of `count` bytes.

    From 10 MiB on it asks for multiples of 2 MiB, and splits nothing off that is no larger than 1 MiB
    (c10/cuda/CUDACachingAllocator.cpp, `get_allocation_size` and `should_split`).
    """
    rest = -count % (2 * MIB)
    return count + rest if count >= 10 * MIB and rest <= MIB else count


def codes_bytes(module: nn.Module) -> int:
    """Bytes of the 8-bit codes that a module's linears can keep."""
    return sum(allocated(linear.codes_bytes) for linear in svdq_linears(module))


def flat_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors behind one another in a flat buffer."""
    return sum(aligned_bytes(tensor) for _, _, tensor in slots(module))


@dataclass(frozen=True)
class Weights:
    """Bytes of a model: what is always on the device, each block, and the largest block as a slot needs it.

    codes: of the 8-bit codes that are kept where all blocks stay and there is space beside them.
    """

    rest: int
    blocks: tuple[int, ...] = ()
    slot: int = 0
    codes: int = 0

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)

    def within(self, allowance: float) -> tuple[int, int]:
        """How many blocks stay on the device within an allowance, and the bytes there, with slots or kept codes."""
        kept = self.kept(allowance)
        beside = BUFFERS * self.slot if len(kept) < len(self.blocks) else self.kept_codes(allowance)
        return len(kept), self.rest + sum(kept) + beside

    def kept_codes(self, allowance: float) -> int:
        """The bytes of the 8-bit codes that are kept within an allowance: of all or of none."""
        return self.codes if self.total + self.codes <= allowance else 0

    def kept(self, allowance: float) -> list[int]:
        """The bytes of each block that stays on the device within an allowance."""
        return [self.blocks[i] for i in fit(self.blocks, self.slot, allowance - self.rest)]


def weights(blocks: Iterable[nn.Module], model: nn.Module) -> Weights:
    """The bytes of a model as it is now."""
    blocks = list(blocks)
    sizes = tuple(map(module_bytes, blocks))
    slot = max(map(flat_bytes, blocks), default=0)
    return Weights(module_bytes(model) - sum(sizes), sizes, slot, sum(map(codes_bytes, blocks)))


def fit(sizes: Sequence[int], buffer: int, allowance: float) -> set[int]:
    """Which blocks of these sizes stay on the device within an allowance, beside the slots of `buffer` bytes.

    All of them (then there are no slots), or as many as fit, evenly spread; none where not even the slots fit.
    """
    count = len(sizes)
    if sum(sizes) <= allowance:
        return set(range(count))
    for resident in range(count - 1, 0, -1):
        keep = {i for i in range(count) if (i + 1) * resident // count > i * resident // count}
        if sum(sizes[i] for i in keep) + BUFFERS * buffer <= allowance:
            return keep
    return set()
