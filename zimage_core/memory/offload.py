"""Running a model whose blocks do not all fit on the device.

A byte allowance becomes a number of whole blocks that stay on the device, spread evenly over the model; the
others live on the host and are brought into one of two fixed device slots for the time of their run, on CUDA from
pinned memory on a second stream, the next one while the current one computes. All tensors of a block, adapters
included, lie in one flat buffer, so that a block is one copy, or in a few where torch would round one up to nearly
twice its size. Weights never change, so nothing travels back and results are bit-identical to a resident model. The
model knows nothing of this: it is asked to run its blocks through `BlockStreamer.run_block`.

The slots are allocated once and reused under events of our own, so that the caching allocator, which knows nothing
of the second stream, never hands their memory to anyone while a copy is under way.

The two-buffer scheme is that of CUDA C++ Best Practices Guide, "Asynchronous and Overlapping Transfers".
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..sizes import round_up

ALIGNMENT = 256
BUFFERS = 2
CPU = torch.device("cpu")
WHOLE = 2**22  # bytes that are not worth a copy of their own

Slot = tuple[dict, str, Tensor]
"""Where a module keeps a tensor: its `_parameters` or `_buffers`, the name in it, the tensor."""
Contents = list[tuple[dict, tuple]]

logger = logging.getLogger(__name__)


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
            holder[name] = _alike(made, tensor)


def _alike(made: Tensor, tensor: Tensor) -> Tensor:
    """As a parameter, where the other is one."""
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def module_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, _, tensor in slots(module))


def flat_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors behind one another in a flat buffer."""
    return sum(_aligned(tensor.numel() * tensor.element_size()) for _, _, tensor in slots(module))


@dataclass(frozen=True)
class Weights:
    """Bytes of a model: what is always on the device, each block, and the largest block as a slot needs it."""

    rest: int
    blocks: tuple[int, ...] = ()
    slot: int = 0

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)

    def within(self, allowance: float) -> tuple[int, int]:
        """How many blocks stay on the device within an allowance, and the bytes that are then there, slots included."""
        keep = fit(self.blocks, self.slot, allowance - self.rest)
        slots = BUFFERS * self.slot if len(keep) < len(self.blocks) else 0
        return len(keep), self.rest + sum(self.blocks[i] for i in keep) + slots


def weights(blocks: Sequence[nn.Module], model: nn.Module) -> Weights:
    """The bytes of a model as it is now."""
    sizes = tuple(map(module_bytes, blocks))
    return Weights(module_bytes(model) - sum(sizes), sizes, max(map(flat_bytes, blocks), default=0))


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


def _aligned(n: int) -> int:
    return round_up(n, ALIGNMENT)


def share_buffers(sizes: Sequence[int]) -> list[list[int]]:
    """Which tensors of these sizes share a host buffer, by index.

    torch rounds page-locked buffers up to powers of two. Where that adds more than an eighth, as many tensors as fit
    half of it lie together, the larger ones first, and so on with the rest.
    """
    groups, rest = [], list(range(len(sizes)))
    while rest:
        total = sum(sizes[i] for i in rest)
        room = 1 << max(total - 1, 0).bit_length()
        group = []
        if total > WHOLE and room > 1.125 * total:
            room //= 2
            for i in sorted(rest, key=lambda i: -sizes[i]):
                if sizes[i] <= room:
                    group.append(i)
                    room -= sizes[i]
        groups.append(sorted(group or rest))
        rest = [i for i in rest if i not in groups[-1]]
    return groups


def _pinned(count: int) -> Tensor:
    """Page-locked bytes, or ordinary ones where the system has no more of those."""
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        logger.warning("offload: no page-locked host memory is left, streaming will be slower (%s)", error)
        return torch.empty(count, dtype=torch.uint8)


class HostBlock:
    """One block on the host: all its tensors are views of a flat (pinned) buffer, or of a few of them."""

    def __init__(self, block: nn.Module, pin: bool):
        found = list(slots(block))
        sizes = [_aligned(tensor.numel() * tensor.element_size()) for _, _, tensor in found]
        self.bytes = sum(sizes)
        self.pinned = pin
        self.buffers = []
        laid: dict[int, tuple[Slot, tuple[int, ...], int]] = {}  # place, stride, offset in a slot in bytes
        start = 0  # of the buffer in a slot
        for group in share_buffers(sizes):
            count = sum(sizes[i] for i in group)
            flat, offset = _pinned(count) if pin else torch.empty(count, dtype=torch.uint8), 0
            for i in group:
                holder, name, tensor = found[i]
                stride = torch.empty_like(tensor, device="meta").stride()  # that of the tensor, without holes
                home = holder[name] = _alike(_view(flat, tensor, stride, offset), tensor)
                home.copy_(tensor)
                laid[i] = (holder, name, home), stride, start + offset
                offset += sizes[i]
            self.buffers.append(flat)
            start += count
        self.laid = [laid[i] for i in range(len(found))]
        self.places = [place for place, _, _ in self.laid]
        self.device = CPU  # where the block is, if it is valid
        self._at_home = contents(block)
        self._away: Contents = []

    def current(self) -> bool:
        """False where the block's tensors are no longer at home (an adapter came or went, the block moved)."""
        return unchanged(self._at_home)

    def send(self, block: nn.Module, device: torch.device) -> None:
        """Have the block on a device until further notice."""
        if device == self.device:
            return
        self.come_back()
        if device.type != "cpu":
            copies, places = DeviceSlot(torch.empty(self.bytes, dtype=torch.uint8, device=device)).views(self)
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            put(places)
            self.device, self._away = device, contents(block)

    def valid(self) -> bool:
        """Whether the block is at home, or what is on the device came from here."""
        return self.current() or bool(self._away) and unchanged(self._away)

    def come_back(self) -> None:
        """Have the block use its tensors here; weights never change, so nothing is copied."""
        put(self.places)
        self.device, self._away = CPU, []


def contents(module: nn.Module) -> Contents:
    """What a module and those inside it hold, to find out later whether they still do."""
    kinds = ("_parameters", "_buffers", "_modules")
    holders = (getattr(part, kind) for part in module.modules() for kind in kinds)
    return [(holder, tuple(holder.values())) for holder in holders]


def unchanged(found: Contents) -> bool:
    return not any(
        len(holder) != len(values) or (values and not all(map(operator.is_, holder.values(), values)))
        for holder, values in found
    )


def put(places: Sequence[Slot]) -> None:
    """Put tensors where a module keeps them."""
    for holder, name, tensor in places:
        holder[name] = tensor


def _view(flat: Tensor, like: Tensor, stride: tuple[int, ...], offset: int) -> Tensor:
    """The bytes of a flat buffer from an offset on as a tensor of another's dtype and shape."""
    return torch.as_strided(flat.view(like.dtype), like.shape, stride, offset // like.element_size())


class DeviceSlot:
    """A flat buffer on the device in which one streamed block at a time has its tensors."""

    def __init__(self, flat: Tensor):
        self.flat = flat
        self._views: WeakKeyDictionary[HostBlock, tuple] = WeakKeyDictionary()

    def views(self, home: HostBlock) -> tuple[list[tuple[Tensor, Tensor]], list[Slot]]:
        """A block in this slot: the copies (target, source) that bring it, and its tensors there. Made once: the host,
        which launches a step hardly faster than a GPU runs it, has no time for that in every step."""
        if home not in self._views:
            with torch.inference_mode(False), torch.no_grad():
                parts = self.flat[: home.bytes].split([len(flat) for flat in home.buffers])
                places = [
                    (holder, name, _alike(_view(self.flat, like, stride, offset), like))
                    for (holder, name, like), stride, offset in home.laid
                ]
            self._views[home] = list(zip(parts, home.buffers, strict=True)), places
        return self._views[home]


class CopyAtOnce:
    """Copies as plain torch does them, for devices without streams."""

    def __init__(self, device: torch.device):
        pass

    def start(self, slot: int, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to fill a slot by copies (target, source), not before its last use is over."""
        for target, source in copies:
            target.copy_(source)

    def wait(self, slot: int) -> None:
        """Let what is computed from now on see what was last copied into a slot."""

    def used(self, slot: int) -> None:
        """Say that everything that reads a slot has been given to the device."""

    def drain(self) -> None:
        """Return when no copy is under way and nothing reads a slot any more."""


class CopyOnStream(CopyAtOnce):
    """Copies on a CUDA stream of their own, ordered against the computing stream by two events for each slot."""

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
    """What copies to a device."""
    return CopyOnStream(device) if device.type == "cuda" else CopyAtOnce(device)


class BlockStreamer:
    """Places blocks on a device within a byte allowance and runs those that had to stay on the host.

    Blocks are given in the order in which they run; `model`, if given, is what they belong to, whose other parts
    are then always on the device and count. Call `place` before each run: it takes up what has changed since.
    """

    def __init__(self, blocks: Sequence[nn.Module], model: nn.Module | None = None, copies: Callable = copier):
        self.blocks = list(blocks)
        self.device = CPU
        self.host: dict[int, HostBlock] = {}  # the blocks that are streamed
        self.used = 0  # bytes on the device
        self.addresses: int | None = None  # a digest of where all tensors lie, None where blocks are streamed
        self._model = model
        self._index = {id(block): i for i, block in enumerate(self.blocks)}
        self._make_copier = copies
        self._copies: CopyAtOnce | None = None
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
        resident. Cheap where nothing changes.
        """
        device = torch.device(device)
        rest = self._place_rest(device)
        sizes = [module_bytes(block) for block in self.blocks]
        buffer = max(map(flat_bytes, self.blocks), default=0)
        keep = fit(sizes, buffer, allowance - rest)
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
        self.used = rest + sum(sizes[i] for i in keep) + BUFFERS * self._size()
        self.addresses = None if self.host else self._digest()
        return self.used

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave(self) -> None:
        """Send everything to the host; `place` brings it back."""
        self._drop_slots()
        for i in range(len(self.blocks)):
            self._go_home(i, self.device.type == "cuda")
        self._place_rest(CPU)
        self.device, self.host, self.used, self.addresses = CPU, {}, 0, None

    def run_block(self, stage: str, index: int, block: nn.Module, x: Tensor, *args: object) -> Tensor:
        """Run one of the blocks, in the form in which models ask their hooks to do it."""
        return self.run(self._index[id(block)], functools.partial(block, x, *args))

    def run(self, index: int, compute: Callable[[], Tensor]) -> Tensor:
        """compute() with block `index` on the device; starts to bring the next one."""
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

    def _digest(self) -> int:
        parts = [self._model] if self._model else self.blocks
        return hash(tuple(tensor.data_ptr() for part in parts for _, _, tensor in slots(part)))

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
        """Bring a block to its flat host buffer, which is made unless it has one that is still right."""
        home = self._homes.get(index)
        if home is None or home.pinned < pin or not home.valid():
            self._homes[index] = HostBlock(self.blocks[index], pin)
        elif not home.current():
            home.come_back()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_up_changes(self, index: int) -> None:
        """Bring the buffer of a block up to date whose tensors were replaced since `place`."""
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
        """Give the slots' memory back, not before the copies into it are over."""
        if self._copies is not None:
            self._copies.drain()
        self._in_buffer.clear()
        self._buffers, self._copies = [], None

    def _start(self, index: int, busy: int | None = None) -> None:
        """Begin to copy a block into the slot that is free, unless that has begun already."""
        if index in self._in_buffer:
            return
        taken = {*self._in_buffer.values(), busy}
        free = [slot for slot in range(BUFFERS) if slot not in taken]
        if not free:  # what was brought ahead is not what runs next: drop it
            free = [self._in_buffer.pop(next(iter(self._in_buffer)))]
        slot = self._in_buffer[index] = free[0]
        self._copies.start(slot, self._buffers[slot].views(self.host[index])[0])
