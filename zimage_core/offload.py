"""Running a model whose blocks do not all fit on the device.

A byte allowance becomes a number of whole blocks that stay on the device, spread evenly over the model; the
others live on the host and are brought into one of two fixed device buffers for the time of their run, on CUDA
from pinned memory on a second stream, the next one while the current one computes. Weights never change, so
nothing travels back and results are bit-identical to a resident model.

The two-buffer scheme is that of CUDA C++ Best Practices Guide, "Asynchronous and Overlapping Transfers".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 256
BUFFERS = 2

Slot = tuple[dict, str, Tensor]
"""Where a module keeps a tensor: its `_parameters` or `_buffers`, the name in it, the tensor."""


def slots(module: nn.Module) -> Iterator[Slot]:
    """Every parameter and buffer of a module tree, in a fixed order."""
    for part in module.modules():
        for holder in (part._parameters, part._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield holder, name, tensor


def module_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, _, tensor in slots(module))


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _put(holder: dict, name: str, tensor: Tensor) -> None:
    is_parameter = isinstance(holder[name], nn.Parameter)
    holder[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


class HostBlock:
    """One block on the host: all its tensors are views of one flat (pinned) buffer."""

    def __init__(self, block: nn.Module, pin: bool):
        self.entries = []  # (holder, name, offset, host view)
        found = list(slots(block))
        self.bytes = sum(_aligned(t.numel() * t.element_size()) for _, _, t in found)
        self.flat = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=pin)
        offset = 0
        for holder, name, tensor in found:
            view = self._view(self.flat, offset, tensor)
            view.copy_(tensor)
            _put(holder, name, view)
            self.entries.append((holder, name, offset, holder[name]))
            offset += _aligned(tensor.numel() * tensor.element_size())

    @staticmethod
    def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
        return flat[offset : offset + like.numel() * like.element_size()].view(like.dtype).view(like.shape)

    def current(self, block: nn.Module) -> bool:
        """False where the block has got or lost tensors since (an adapter)."""
        found = list(slots(block))
        return len(found) == len(self.entries) and all(
            t.data_ptr() == view.data_ptr() for (_, _, t), (_, _, _, view) in zip(found, self.entries, strict=True)
        )

    def point_to(self, flat: Tensor) -> None:
        for holder, name, offset, view in self.entries:
            _put(holder, name, self._view(flat, offset, view))

    def point_home(self) -> None:
        for holder, name, _, view in self.entries:
            holder[name] = view


class BlockStreamer:
    """Places blocks on a device within a byte allowance and runs those that had to stay on the host.

    Blocks are given in the order in which they run.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = list(blocks)
        self.device = torch.device("cpu")
        self.host: dict[int, HostBlock] = {}
        self._buffers: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._copied: list[torch.cuda.Event] = []
        self._used: list[torch.cuda.Event] = []
        self._order: list[int] = []
        self._in_buffer: dict[int, int] = {}  # block -> buffer that its copy was started into

    @property
    def resident(self) -> int:
        return len(self.blocks) - len(self.host)

    @torch.inference_mode(False)
    @torch.no_grad()
    def place(self, device: torch.device | str, allowance: float) -> int:
        """Put as many blocks on the device as the allowance (bytes) holds; returns the bytes now used there.

        The two buffers count; with an allowance smaller than they are, no block is resident. Cheap where
        nothing changes.
        """
        device = torch.device(device)
        sizes = [module_bytes(block) for block in self.blocks]
        buffer = max(map(_aligned, sizes), default=0) + ALIGNMENT * 64
        count = len(self.blocks)
        keep = set(range(count))
        if sum(sizes) > allowance:
            for resident in reversed(range(count)):
                keep = {i for i in range(count) if (i + 1) * resident // count > i * resident // count}
                if sum(sizes[i] for i in keep) + BUFFERS * buffer <= allowance:
                    break
        moved = device != self.device
        self.device = device
        pin = device.type == "cuda"
        for i, block in enumerate(self.blocks):
            if i in keep:
                self.host.pop(i, None)
                block.to(device)
            elif moved or i not in self.host or not self.host[i].current(block):
                self.host[i] = HostBlock(block, pin)
        self._order = sorted(self.host)
        self._in_buffer.clear()
        if not self.host:
            self._buffers, self._copied, self._used, self._stream = [], [], [], None
            return sum(sizes)
        buffer = max(host.bytes for host in self.host.values())
        if moved or not self._buffers or self._buffers[0].numel() != buffer:
            self._buffers = [torch.empty(buffer, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
            if pin:
                self._stream = torch.cuda.Stream(device)
                self._copied = [torch.cuda.Event() for _ in range(BUFFERS)]
                self._used = [torch.cuda.Event() for _ in range(BUFFERS)]
        return sum(sizes[i] for i in keep) + BUFFERS * buffer

    def run(self, index: int, compute: Callable[[], Tensor]) -> Tensor:
        """compute() with block `index` on the device; starts to bring the next one."""
        if not self.host:
            return compute()
        position = next((p for p, i in enumerate(self._order) if i >= index), 0)
        if index not in self.host:
            self._start(self._order[position])
            return compute()
        self._start(index)
        buffer = self._in_buffer.pop(index)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied[buffer])
        self._start(self._order[(position + 1) % len(self._order)], busy=buffer)
        self.host[index].point_to(self._buffers[buffer])
        try:
            return compute()
        finally:
            self.host[index].point_home()
            if self._stream is not None:
                self._used[buffer].record(torch.cuda.current_stream(self.device))

    def _start(self, index: int, busy: int | None = None) -> None:
        """Begin to copy a block into the buffer that is free, unless that has begun already."""
        if index in self._in_buffer:
            return
        taken = {*self._in_buffer.values(), busy}
        free = [b for b in range(BUFFERS) if b not in taken]
        if not free:  # what was brought ahead is not what runs next: drop it
            dropped = next(iter(self._in_buffer))
            free = [self._in_buffer.pop(dropped)]
        buffer, host = free[0], self.host[index]
        self._in_buffer[index] = buffer
        target = self._buffers[buffer][: host.bytes]
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                target.copy_(host.flat)
                return
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._used[buffer])
                target.copy_(host.flat, non_blocking=True)
                self._copied[buffer].record(self._stream)
