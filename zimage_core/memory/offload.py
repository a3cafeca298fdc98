"""Running a model whose blocks do not all fit on the device.

A byte allowance becomes a number of whole blocks that stay on the device, spread evenly over the model; the
others live on the host and are copied into one of two fixed device slots for the time of their run, on CUDA from
pinned memory on a second stream, the next one while the current one computes. Weights never change, so nothing travels
back and results are bit-identical to a resident model. The model knows nothing of this: it is asked to run its blocks
through `BlockStreamer.run_block`.

The two-buffer scheme is that of CUDA C++ Best Practices Guide, "Asynchronous and Overlapping Transfers".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..linear.svdq import SVDQLinear, svdq_linears
from .copies import CPU, Contents, CopyAtOnce, DeviceSlot, HostBlock, contents, copier, put, unchanged
from .placement import BUFFERS, Weights, change, codes_bytes, fit, flat_bytes, module_bytes, slots


class BlockStreamer:
    """Places blocks on a device within a byte allowance, and streams the others from the host when they run.

    blocks: in the order in which they run; model: what they belong to, whose other parts are then always on the device
    and count. Call `place` before each run: it takes account of tensors that were replaced.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        model: nn.Module | None = None,
        copies: Callable[[torch.device], CopyAtOnce] = copier,
    ):
        self.blocks = list(blocks)
        self.device = CPU
        self.host: dict[int, HostBlock] = {}  # the blocks that are streamed
        self.used = 0  # bytes on the device
        self.codes = 0  # of them, those of kept 8-bit codes
        self.addresses: int | None = None  # a digest of where all tensors lie, None where blocks are streamed
        self._seen: Contents = []  # what `place` left, where nothing streams
        self._held = Weights(0)  # and the bytes of that
        self._model = model
        self._index = {id(block): i for i, block in enumerate(self.blocks)}
        self._make_copier = copies
        self._copies = CopyAtOnce(CPU)
        self._homes: dict[int, HostBlock] = {}  # blocks whose tensors rest in a flat host buffer
        self._buffers: list[DeviceSlot] = []
        self._in_buffer: dict[int, int] = {}  # block -> slot that its copy was started into
        self._next: dict[int, int] = {}  # streamed block -> the streamed one that ran after it
        self._last: int | None = None

    @property
    def resident(self) -> int:
        return len(self.blocks) - len(self.host)

    @torch.inference_mode(False)
    @torch.no_grad()
    def place(self, device: torch.device | str, allowance: float) -> int:
        """Put as many blocks on the device as the allowance (bytes) holds; returns the bytes now used there.

        The two slots and the model's other parts count; with an allowance smaller than they are, no block is
        resident. With one that holds more than all blocks, 8-bit codes are kept. Cheap where nothing changes.
        """
        device = torch.device(device)
        known = self._seen and device == self.device and self._held.within(allowance) == (len(self.blocks), self.used)
        if known and unchanged(self._seen):
            return self.used
        self._seen = []
        rest = self._place_rest(device)
        sizes = [module_bytes(block) for block in self.blocks]
        buffer = max(map(flat_bytes, self.blocks), default=0)
        keep = fit(sizes, buffer, allowance - rest)
        codes = sum(map(codes_bytes, self.blocks))
        self.codes = codes if rest + sum(sizes) + codes <= allowance else 0
        if not self.codes or device != self.device:
            self._keep_codes(False)
        self._last = None
        self._in_buffer.clear()
        if device != self.device or len(keep) == len(self.blocks) or self._size() != buffer:
            self._drop_slots()
        pin = device.type == "cuda"
        for i in set(range(len(self.blocks))) - keep:
            self._go_home(i, pin)
        self.device = device
        for i in keep:
            if i in self._homes and not self._homes[i].valid():
                del self._homes[i]
            if i in self._homes:
                self._homes[i].send(self.blocks[i], device)
            else:
                change(self.blocks[i], lambda tensor: tensor.to(device))
        self.host = {i: self._homes[i] for i in range(len(self.blocks)) if i not in keep}
        order = sorted(self.host)
        self._next = dict(zip(order, order[1:] + order[:1]))
        if self.host and not self._buffers:
            self._make_slots(buffer)
        if self.codes:
            self._keep_codes(True)
        self.used = rest + sum(sizes[i] for i in keep) + BUFFERS * self._size() + self.codes
        self.addresses = None if self.host else self._digest()
        if not self.host:
            self._seen = [held for part in self._parts() for held in contents(part)]
            self._held = Weights(rest, tuple(sizes), buffer, codes)
        return self.used

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave(self) -> None:
        """Move everything to the host; `place` brings it back."""
        self._seen = []
        self._drop_slots()
        self._keep_codes(False)
        for i in range(len(self.blocks)):
            self._go_home(i, self.device.type == "cuda")
        self._place_rest(CPU)
        self.device, self.host, self.used, self.codes, self.addresses = CPU, {}, 0, 0, None

    def run_block(self, stage: str, index: int, block: nn.Module, x: Tensor, *args: object) -> Tensor:
        """`run` with the signature of the models' hooks."""
        if not self.host:  # torch.compile compiles all blocks once as long as no index tells them apart
            return block(x, *args)
        return self.run(self._index[id(block)], functools.partial(block, x, *args))

    def run(self, index: int, compute: Callable[[], Tensor]) -> Tensor:
        """compute() with block `index` on the device, while the next streamed block is copied."""
        if not self.host:
            return compute()
        if index not in self.host:
            if not self._in_buffer:
                self._start(next((i for i in sorted(self.host) if i > index), min(self.host)))
            return compute()
        if not self.host[index].current():
            self._take_up_changes(index)
        if self._last is not None:
            self._next[self._last] = index
        self._last = index
        self._start(index)
        slot, home = self._in_buffer.pop(index), self.host[index]
        self._copies.wait(slot)
        if self._next[index] != index:
            self._start(self._next[index], busy=slot)
        put(self._buffers[slot].views(home)[1])
        try:
            return compute()
        finally:
            put(home.places)
            self._copies.used(slot)

    def _parts(self) -> Sequence[nn.Module]:
        return [self._model] if self._model else self.blocks

    def _digest(self) -> int:
        held = [tensor for part in self._parts() for _, _, tensor in slots(part)]
        held += [linear.codes for linear in self._linears() if linear.codes is not None]
        return hash(tuple(tensor.data_ptr() for tensor in held))

    def _linears(self) -> list[SVDQLinear]:
        return [linear for block in self.blocks for linear in svdq_linears(block)]

    def _keep_codes(self, keep: bool) -> None:
        for linear in self._linears():
            linear.keep_codes(keep)

    def _place_rest(self, device: torch.device) -> int:
        """Move the model's other parts, and count their bytes."""
        total, inside = 0, {id(part) for block in self.blocks for part in block.modules()}
        for part in self._model.modules() if self._model else ():
            if id(part) in inside:
                continue
            change(part, lambda tensor: tensor.to(device), inside=False)
            held = (*part._parameters.values(), *part._buffers.values())
            total += sum(t.numel() * t.element_size() for t in held if t is not None and t.device.type == device.type)
        return total

    def _go_home(self, index: int, pin: bool) -> None:
        """Move a block to its flat host buffer, which is made anew if the block's tensors were replaced."""
        home = self._homes.get(index)
        if home is None or home.pinned < pin or not home.valid():
            self._homes[index] = HostBlock(self.blocks[index], pin)
        elif not home.current():
            home.come_back()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_up_changes(self, index: int) -> None:
        """Make the host buffer of a block anew, whose tensors were replaced since `place`."""
        self._copies.drain()
        self._in_buffer.pop(index, None)
        self._go_home(index, self.host[index].pinned)
        self.host[index] = self._homes[index]
        if self.host[index].bytes > self._size():
            self._drop_slots()
            self._make_slots(self.host[index].bytes)

    def _size(self) -> int:
        return self._buffers[0].flat.numel() if self._buffers else 0

    def _make_slots(self, size: int) -> None:
        flats = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(BUFFERS)]
        self._buffers = [DeviceSlot(flat) for flat in flats]
        self._copies = self._make_copier(self.device)

    def _drop_slots(self) -> None:
        """Free the slots once the copies into them are over."""
        self._copies.drain()
        self._in_buffer.clear()
        self._buffers, self._copies = [], CopyAtOnce(CPU)

    def _start(self, index: int, busy: int | None = None) -> None:
        """Start copying a block into the free slot, unless that has started already."""
        if index in self._in_buffer:
            return
        taken = {*self._in_buffer.values(), busy}
        free = [slot for slot in range(BUFFERS) if slot not in taken]
        if not free:  # what was copied ahead is not what runs next
            free = [self._in_buffer.pop(next(iter(self._in_buffer)))]
        slot = self._in_buffer[index] = free[0]
        self._copies.start(slot, self._buffers[slot].views(self.host[index])[0])
