"""Blocks on the host and their copies on the device: flat buffers, and the order between copying and computing.

All tensors of a block, adapters included, lie in one flat buffer, so that a block is one copy, or in a few where torch
would round one up to nearly twice its size. The slots on the device are allocated once and reused under events of our
own, so that the caching allocator, which knows nothing of the second stream, never hands their memory to anyone while
a copy is under way.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .placement import BUFFERS, Slot, aligned_bytes, slots, typed_like

CPU = torch.device("cpu")
WHOLE = 2**22  # bytes that are not worth a copy of their own

Contents = list[tuple[dict, tuple]]

logger = logging.getLogger(__name__)


def share_buffers(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of the tensors, of these sizes, that share a host buffer, buffer by buffer.

    torch rounds page-locked buffers up to powers of two. If that adds more than an eighth, a buffer of half that size
    takes as many tensors as fit, large ones first, and the rest is divided in the same way.
    """
    groups, rest = [], list(range(len(sizes)))
    while rest:
        total = sum(sizes[i] for i in rest)
        space = 1 << max(total - 1, 0).bit_length()
        group = []
        if total > WHOLE and space > 1.125 * total:
            space //= 2
            for i in sorted(rest, key=lambda i: -sizes[i]):
                if sizes[i] <= space:
                    group.append(i)
                    space -= sizes[i]
        groups.append(sorted(group or rest))
        rest = [i for i in rest if i not in groups[-1]]
    return groups


def _pinned(count: int) -> Tensor:
    """Page-locked bytes, or pageable ones if the system refuses more."""
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        logger.warning("offload: no page-locked host memory is left, streaming will be slower (%s)", error)
        return torch.empty(count, dtype=torch.uint8)


class HostBlock:
    """A block on the host: its tensors are views of one flat (pinned) buffer, or of a few."""

    def __init__(self, block: nn.Module, pin: bool):
        found = list(slots(block))
        sizes = [aligned_bytes(tensor) for _, _, tensor in found]
        self.bytes = sum(sizes)
        self.pinned = pin
        self.buffers: list[Tensor] = []
        self.laid: list[tuple[Slot, tuple[int, ...], int]] = []  # place, stride, offset in a slot in bytes
        start = 0  # of the buffer in a slot
        for group in share_buffers(sizes):
            count = sum(sizes[i] for i in group)
            flat, offset = _pinned(count) if pin else torch.empty(count, dtype=torch.uint8), 0
            for i in group:
                holder, name, tensor = found[i]
                stride = torch.empty_like(tensor, device="meta").stride()  # that of the tensor, without holes
                home = holder[name] = typed_like(_view(flat, tensor, stride, offset), tensor)
                home.copy_(tensor)
                self.laid.append(((holder, name, home), stride, start + offset))
                offset += sizes[i]
            self.buffers.append(flat)
            start += count
        self.places = [place for place, _, _ in self.laid]
        self.device = CPU  # where the block is, if it is valid
        self._at_home = contents(block)
        self._away: Contents = []

    def current(self) -> bool:
        """Whether the block still uses the tensors here: no adapter was added or removed, and it did not move."""
        return unchanged(self._at_home)

    def send(self, block: nn.Module, device: torch.device) -> None:
        """Copy the block to a device, where it stays."""
        if device == self.device:
            return
        self.come_back()
        if device.type != "cpu":
            copies, places = DeviceSlot(torch.empty(self.bytes, dtype=torch.uint8, device=device)).views(self)
            for target, source in copies:
                target.copy_(source, non_blocking=device.type == "cuda")
            put(places)
            self.device, self._away = device, contents(block)

    def valid(self) -> bool:
        """Whether the tensors here are those of the block, which uses them or a copy made by `send`."""
        return self.current() or bool(self._away) and unchanged(self._away)

    def come_back(self) -> None:
        """Let the block use the tensors here again; weights never change, so nothing is copied."""
        put(self.places)
        self.device, self._away = CPU, []


def contents(module: nn.Module) -> Contents:
    """The tensors and modules that a module and its parts hold, for `unchanged`."""
    kinds = ("_parameters", "_buffers", "_modules")
    holders = (getattr(part, kind) for part in module.modules() for kind in kinds)
    return [(holder, tuple(holder.values())) for holder in holders]


def unchanged(found: Contents) -> bool:
    return not any(
        len(holder) != len(values) or (values and not all(map(operator.is_, holder.values(), values)))
        for holder, values in found
    )


def put(places: Sequence[Slot]) -> None:
    """Set tensors as the parameters and buffers of their modules."""
    for holder, name, tensor in places:
        holder[name] = tensor


def _view(flat: Tensor, like: Tensor, stride: tuple[int, ...], offset: int) -> Tensor:
    """A view of a flat buffer, from an offset in bytes on, with the dtype and shape of another tensor."""
    return torch.as_strided(flat.view(like.dtype), like.shape, stride, offset // like.element_size())


class DeviceSlot:
    """A flat device buffer that holds one streamed block at a time."""

    def __init__(self, flat: Tensor):
        self.flat = flat
        self._views: WeakKeyDictionary[HostBlock, tuple] = WeakKeyDictionary()

    def views(self, home: HostBlock) -> tuple[list[tuple[Tensor, Tensor]], list[Slot]]:
        """The copies (target, source) that bring a block here, and its tensors here.

        Made once per block: making them in every step takes the host longer than it has.
        """
        if home not in self._views:
            with torch.inference_mode(False), torch.no_grad():
                parts = self.flat[: home.bytes].split([len(flat) for flat in home.buffers])
                places = [
                    (holder, name, typed_like(_view(self.flat, like, stride, offset), like))
                    for (holder, name, like), stride, offset in home.laid
                ]
            self._views[home] = list(zip(parts, home.buffers, strict=True)), places
        return self._views[home]


class CopyAtOnce:
    """Synchronous copies, for devices without streams."""

    def __init__(self, device: torch.device):
        pass

    def start(self, slot: int, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start the copies (target, source) into a slot, after its last use."""
        for target, source in copies:
            target.copy_(source)

    def wait(self, slot: int) -> None:
        """Make computation from now on wait for the last copies into a slot."""

    def used(self, slot: int) -> None:
        """Record that all computation that reads a slot has been launched."""

    def drain(self) -> None:
        """Wait until no copy runs and nothing reads a slot."""


class CopyOnStream(CopyAtOnce):
    """Copies on a CUDA stream of their own, ordered with the computing stream by two events per slot."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.copied = [torch.cuda.Event() for _ in range(BUFFERS)]
        self.free = [torch.cuda.Event() for _ in range(BUFFERS)]
        # What was computed in the slots' memory before it became theirs may not be over yet.
        for slot in range(BUFFERS):
            self.used(slot)

    def start(self, slot: int, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[slot])
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            self.copied[slot].record(self.stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.copied[slot])

    def used(self, slot: int) -> None:
        self.free[slot].record(torch.cuda.current_stream(self.device))

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)


def copier(device: torch.device) -> CopyAtOnce:
    """The way to copy to a device."""
    return CopyOnStream(device) if device.type == "cuda" else CopyAtOnce(device)
