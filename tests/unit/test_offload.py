"""Block streaming: which blocks stay, the order of copies, slots that are never overwritten in use, bit-identity.

Devices are told apart by a copier that behaves like a second stream at its laziest: a copy happens when somebody
waits for it and not before, so that a missing wait shows as wrong weights.
"""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

from zimage_core.formats.encoder import load_text_encoder
from zimage_core.formats.load import load_transformer
from zimage_core.linear.adapters import Linear, Terms
from zimage_core.linear.svdq import SVDQLinear
from zimage_core.memory import copies, offload, placement
from zimage_core.memory.copies import CopyAtOnce, CopyOnStream
from zimage_core.memory.offload import BlockStreamer
from zimage_core.memory.placement import BUFFERS, fit, flat_bytes, module_bytes
from zimage_core.models.config import ZImageConfig
from zimage_core.models.transformer import Hooks, ZImageTransformer

CPU = torch.device("cpu")
PLAIN = Hooks()


class Lazy(CopyAtOnce):
    """Copies at the last moment; asserts that nothing is overwritten while it is in use or before it was used."""

    def __init__(self, device):
        self.waiting: dict[int, tuple] = {}
        self.busy: set[int] = set()
        self.log: list[tuple[str, int]] = []

    def start(self, slot, copies):
        assert slot not in self.busy, "a slot is overwritten while a block runs from it"
        self.log.append(("start", slot))
        self.waiting[slot] = copies
        for target, _ in copies:
            target.fill_(0xFF)  # whoever reads it too early gets NaN

    def wait(self, slot):
        self.log.append(("wait", slot))
        for target, source in self.waiting.pop(slot, ()):
            target.copy_(source)
        self.busy.add(slot)

    def used(self, slot):
        self.log.append(("used", slot))
        self.busy.remove(slot)

    def drain(self):
        assert not self.busy
        self.waiting.clear()


class Scale(nn.Module):
    """A block with a parameter, a buffer, an odd size and a matrix in column order."""

    def __init__(self, value: float, size: int = 1001):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), value), requires_grad=False)
        self.register_buffer("matrix", torch.arange(12.0).view(3, 4).t().add(value))
        self.register_buffer("short", torch.full((3,), value, dtype=torch.bfloat16))

    def forward(self, x, offset=0.0):
        return x + self.weight.sum() + self.matrix.sum() + self.short.sum() + offset


def blocks_of(*values) -> list[Scale]:
    return [Scale(value) for value in values]


def streamer_of(blocks, allowance=0, model=None, copies=Lazy) -> BlockStreamer:
    streamer = BlockStreamer(blocks, model, copies)
    streamer.place(CPU, allowance)
    return streamer


def run_all(streamer, order) -> list[float]:
    return [streamer.run(i, lambda i=i: streamer.blocks[i](torch.zeros(()))).item() for i in order]


def test_which_blocks_stay():
    assert fit([10] * 6, 12, 60) == set(range(6))
    assert fit([10] * 6, 12, 59) == {1, 3, 5}  # 24 for the slots, 30 for three blocks
    assert len(fit([10] * 6, 12, 64 - 10)) == 3 and len(fit([10] * 6, 12, 64 - 11)) == 2
    assert fit([10] * 6, 12, 0) == set() == fit([], 0, 0)


def test_streamed_blocks_compute_the_same_and_never_share_a_slot_with_a_copy():
    blocks = blocks_of(*range(1, 8))
    expected = [block(torch.zeros(())).item() for block in blocks]
    for allowance in (0, 4.5 * flat_bytes(blocks[0]), 1e9):
        streamer = streamer_of(blocks, allowance)
        for _ in range(3):
            assert run_all(streamer, range(7)) == expected
    assert streamer.resident == 7


def test_the_next_block_is_brought_while_one_computes():
    lazy, seen = Lazy(CPU), []
    streamer, log = streamer_of(blocks_of(1, 2, 3, 4), copies=lambda device: lazy), lazy.log
    for _ in range(2):
        for i in range(4):
            streamer.run(i, lambda: seen.append(list(log)) or torch.zeros(()))
    for number, before in enumerate(seen):
        starts = [slot for what, slot in before if what == "start"]
        waits = [slot for what, slot in before if what == "wait"]
        assert len(starts) == number + 2, "the next copy has begun when a block computes, no other one"
        assert starts[: number + 1] == waits == [n % BUFFERS for n in range(number + 1)]


def test_the_order_is_learnt_so_that_a_second_pass_brings_nothing_in_vain():
    """A model runs blocks 0 and 1 once per prompt, the others at every step."""
    lazy = Lazy(CPU)
    streamer = streamer_of(blocks_of(1, 2, 3, 4, 5), copies=lambda device: lazy)
    for _ in range(2):
        run_all(streamer, (2, 3, 4))
    started = sum(what == "start" for what, _ in lazy.log)
    run_all(streamer, (2, 3, 4) * 5)
    assert sum(what == "start" for what, _ in lazy.log) == started + 15


def test_any_order_of_runs_gives_the_right_weights():
    blocks = blocks_of(*range(6))
    expected = [block(torch.zeros(())).item() for block in blocks]
    streamer = streamer_of(blocks, 2.2 * flat_bytes(blocks[0]) + BUFFERS * flat_bytes(blocks[0]))
    assert 0 < streamer.resident < 6
    order = torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    assert run_all(streamer, order) == [expected[i] for i in order]


def test_an_error_in_a_block_leaves_everything_usable():
    blocks = blocks_of(1, 2, 3)
    expected = [block(torch.zeros(())).item() for block in blocks]
    streamer = streamer_of(blocks)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        streamer.run(1, fail)
    assert run_all(streamer, range(3)) == expected
    streamer.leave()
    assert [block(torch.zeros(())).item() for block in blocks] == expected


def test_placing_and_leaving_restore_tensors_and_their_kinds():
    blocks = blocks_of(1, 2, 3)
    before = [{k: v.clone() for k, v in block.state_dict().items()} for block in blocks]
    strides = blocks[0].matrix.stride()
    streamer = streamer_of(blocks)
    streamer.run(0, lambda: (blocks[0].matrix.stride() == strides) or pytest.fail("another memory order"))
    homes = [block.weight.data_ptr() for block in blocks]
    streamer.leave()
    assert streamer.used == 0
    streamer.place(CPU, 0)
    assert [block.weight.data_ptr() for block in blocks] == homes, "what is at home already is not copied again"
    streamer.place(CPU, 1e9)
    assert not streamer.host and streamer.used == sum(map(module_bytes, blocks)), "no slot is left"
    for block, state in zip(blocks, before, strict=True):
        assert isinstance(block.weight, nn.Parameter) and not isinstance(block.matrix, nn.Parameter)
        assert all(torch.equal(block.state_dict()[k], v) for k, v in state.items())


def test_what_was_at_home_before_comes_back_without_a_copy():
    """The meta device has nothing to copy back."""
    blocks = blocks_of(1, 2, 3)
    expected = [block(torch.zeros(())).item() for block in blocks]
    streamer = streamer_of(blocks)
    homes = [block.weight.data_ptr() for block in blocks]
    for _ in range(2):
        streamer.place("meta", 1e9)
        assert {tensor.device.type for block in blocks for _, _, tensor in placement.slots(block)} == {"meta"}
        streamer.place("meta", 1e9)  # for the next picture
        streamer.leave()
        assert [block.weight.data_ptr() for block in blocks] == homes
    streamer.place(CPU, 0)
    assert run_all(streamer, range(3)) == expected


def test_what_changed_while_it_was_resident_is_not_taken_from_home():
    blocks = blocks_of(1, 2, 3)
    streamer = streamer_of(blocks)
    for place in (streamer.leave, functools.partial(streamer.place, CPU, 0)):
        streamer.place(CPU, 1e9)
        blocks[0].register_buffer("short", torch.full((3,), 9.0, dtype=torch.bfloat16))
        blocks[1].adapter = Scale(5)
        place()
        assert blocks[0].short.sum() == 27 and blocks[1].adapter.weight[0] == 5
        streamer.place(CPU, 1e9)
        del blocks[1].adapter
        place()
        assert len(list(placement.slots(blocks[1]))) == 3


def test_what_was_loaded_in_inference_mode_runs_in_it_and_outside_after_a_move():
    """ComfyUI's nodes run in inference mode, and `place` outside; a clone stands for the move to another device."""
    with torch.inference_mode():
        linear = nn.Sequential(nn.Linear(4, 4).requires_grad_(False))
        linear.register_buffer("kept", torch.ones(1))
        expected = linear(torch.ones(1, 4))
    first = [tensor for _, _, tensor in placement.slots(linear)]
    with torch.inference_mode(False), torch.no_grad():
        placement.change(linear, torch.clone)
    assert [type(tensor) for tensor in first] == [type(tensor) for _, _, tensor in placement.slots(linear)]
    assert not {id(tensor) for tensor in first} & {id(tensor) for _, _, tensor in placement.slots(linear)}
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(linear(torch.ones(1, 4)), expected)


def test_bytes_used_are_counted_with_the_rest_of_the_model():
    model = nn.Sequential(*blocks_of(1, 2, 3, 4), nn.Linear(4, 4))
    blocks = list(model)[:4]
    rest = module_bytes(model[4])
    streamer = BlockStreamer(blocks, model, copies=Lazy)
    assert streamer.place(CPU, 0) == rest + BUFFERS * flat_bytes(blocks[0]) == streamer.used
    assert streamer.place(CPU, 1e9) == module_bytes(model)
    allowance = rest + 2 * flat_bytes(blocks[0]) + module_bytes(blocks[0])
    assert streamer.place(CPU, allowance) == allowance and streamer.resident == 1
    assert placement.weights(blocks, model).total == module_bytes(model)


def test_what_is_placed_again_counts_what_was_replaced_added_and_removed_since():
    blocks = blocks_of(1.0, 2.0)
    streamer = streamer_of(blocks, float("inf"))
    before, where = streamer.used, streamer.addresses
    assert (streamer.place(CPU, float("inf")), streamer.addresses) == (before, where)
    blocks[0].weight = nn.Parameter(torch.ones(1002), requires_grad=False)
    assert streamer.place(CPU, float("inf")) == before + 4 and streamer.addresses != where
    blocks[1].register_buffer("added", torch.ones(5))
    assert streamer.place(CPU, float("inf")) == before + 4 + 20
    del blocks[1].added
    blocks[1].inner = Scale(3.0)
    assert streamer.place(CPU, float("inf")) == before + 4 + module_bytes(blocks[1].inner)
    assert streamer.place(CPU, 0) == BUFFERS * max(map(flat_bytes, blocks)) and streamer.addresses is None
    assert streamer.place(CPU, float("inf")) == before + 4 + module_bytes(blocks[1].inner)


def test_another_allowance_of_which_nothing_follows_moves_nothing(monkeypatch):
    """ComfyUI's differs a little for each picture, as the GPU's free memory does."""
    blocks = blocks_of(1.0, 2.0)
    model = nn.Sequential(*blocks, nn.Linear(4, 4))
    streamer, whole, moved = BlockStreamer(blocks, model, copies=Lazy), module_bytes(model), []
    streamer.place(CPU, 2 * whole)
    monkeypatch.setattr(offload, "change", lambda module, make, inside=True: moved.append(module))
    for allowance in (3 * whole, whole, float("inf")):
        assert streamer.place(CPU, allowance) == whole and not moved
    streamer.place(CPU, whole - 1)
    assert streamer.host and moved


def test_replaced_tensors_are_taken_up_even_without_placing_again():
    blocks = blocks_of(1, 2, 3)
    streamer = streamer_of(blocks)
    run_all(streamer, range(3))
    blocks[1].register_buffer("short", torch.full((1000,), 7.0, dtype=torch.bfloat16))  # larger than a slot
    blocks[2].register_buffer("extra", torch.ones(3))
    expected = [block(torch.zeros(())).item() for block in blocks]
    assert run_all(streamer, range(3)) == expected
    assert len(blocks[1].short) == 1000 and blocks[2].extra.sum() == 3
    streamer.place(CPU, 0)
    assert run_all(streamer, range(3)) == expected


@pytest.fixture(scope="module")
def model(tiny_files):
    return load_transformer(tiny_files["model"], dtype=torch.bfloat16, backend="reference", precision="w4a16")


def draw(model, hooks=PLAIN) -> torch.Tensor:
    """Two steps with guidance on a batch of two captions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    width = model.config.cap_feat_dim
    feats = [torch.randn(n, width, generator=generator).bfloat16() for n in (5, 40)]
    latents = torch.randn(2, 16, 8, 12, generator=generator)
    with torch.inference_mode():
        positive, negative = (model.prepare(found, 64, 96, hooks) for found in (feats, feats[:1]))
        for sigma in (1.0, 0.5):
            flow = model(latents, torch.tensor([1 - sigma]), positive, hooks)
            latents = latents + 0.5 * (2 * flow - model(latents, torch.tensor([1 - sigma]), negative, hooks))
    return latents


def terms(linear, rank: int, generator) -> Terms:
    down = torch.randn(rank, linear.in_features, generator=generator).bfloat16()
    return Terms(down=down * 0.1, up=torch.randn(linear.out_features, rank, generator=generator).bfloat16() * 0.1)


def rounded(size: int) -> int:
    """What torch page-locks for a buffer."""
    return 1 << (size - 1).bit_length()


@pytest.mark.parametrize("rank", [None, 0, 16, 32, 128])
def test_page_locked_buffers_waste_little(rank):
    """Blocks of the real width, dense (None) or of rank 256 with a LoRA of another rank."""
    linear = Linear if rank is None else functools.partial(SVDQLinear, rank=256 + rank, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = ZImageTransformer(ZImageConfig(n_layers=1, n_refiner_layers=1), linear).to(torch.bfloat16)
    sizes = [placement.aligned_bytes(t) for _, _, t in placement.slots(model.layers[0])]
    groups = copies.share_buffers(sizes)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert len(groups) <= 4, "copies for each block"
    locked = sum(rounded(sum(sizes[i] for i in group)) for group in groups)
    assert sum(sizes) <= locked <= (1.25 if rank is None else 1.05) * sum(sizes)
    assert (len(groups) == 1) == (rank == 0), "with rank 256 alone a block just fits 128 MiB"


def test_small_blocks_and_full_ones_are_one_copy():
    assert copies.share_buffers([]) == []
    assert copies.share_buffers([2**20, 100]) == [[0, 1]]
    assert copies.share_buffers([2**26, 2**26]) == [[0, 1]]
    assert copies.share_buffers([2**26 + 1]) == [[0]], "a single tensor cannot be shared out"
    assert copies.share_buffers([2**25, 2**26, 3 * 2**23]) == [[0, 1, 2]], "120 of 128 MiB"
    assert copies.share_buffers([2**25, 2**26, 2**24]) == [[1], [0], [2]]
    assert copies.share_buffers([2**20, 2**26, 2**20]) == [[1], [0, 2]]


@pytest.mark.parametrize("whole", [2**40, 0])
def test_a_transformer_streams_bit_identically_with_and_without_adapters(model, monkeypatch, whole):
    """With one buffer for each block, and with several."""
    monkeypatch.setattr(copies, "WHOLE", whole)
    blocks = model.blocks
    plain = draw(model)
    streamer = BlockStreamer(blocks, model, copies=Lazy)
    hooks = Hooks(run_block=streamer.run_block)
    streamer.place(CPU, 0)
    assert {len(home.buffers) > 1 for home in streamer.host.values()} == {whole == 0}
    for allowance in (0, module_bytes(model) * 0.8, 1e12):
        used = streamer.place(CPU, allowance)
        assert used <= max(allowance, placement.weights(blocks, model).rest + BUFFERS * max(map(flat_bytes, blocks)))
        assert torch.equal(draw(model, hooks), plain)

    linears = [model.layers[0].attention.to_qkv, model.layers[-1].feed_forward.w2]
    generator = torch.Generator().manual_seed(1)
    streamer.place(CPU, 1e12)
    for rank in (4, 16):
        for linear in linears:
            linear.set_adapter(terms(linear, rank, generator))
        resident = draw(model)
        assert not torch.equal(resident, plain)
        streamer.place(CPU, 0)
        assert torch.equal(draw(model, hooks), resident)
    for linear in linears:  # streamed all the while
        linear.set_adapter(None)
    streamer.place(CPU, 0)
    assert torch.equal(draw(model, hooks), plain)
    streamer.leave()
    assert torch.equal(draw(model), plain)


def test_a_text_encoder_streams_bit_identically(tiny_files):
    encoder = load_text_encoder(tiny_files["text_encoder"], dtype=torch.bfloat16)
    ids = torch.arange(20)[None]
    expected = encoder(ids)
    streamer = BlockStreamer(encoder.layers, copies=Lazy)
    streamer.place(CPU, 0)
    assert streamer.resident == 0
    for _ in range(2):
        assert torch.equal(encoder(ids, run_block=streamer.run_block, device=CPU), expected)


def test_on_cuda_copies_wait_for_the_last_use_and_computing_waits_for_the_copy(monkeypatch):
    """The calls that order the two streams, from a stand-in for torch.cuda."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event.name}")

    class Event:
        def __init__(self):
            self.name = f"event {next(names)}"

        def record(self, stream):
            log.append(f"{stream.name} records {self.name}")

    class Entered:
        def __init__(self, stream):
            pass

        def __enter__(self):
            log.append("(")

        def __exit__(self, *_):
            log.append(")")

    names, main = iter(("copied 0", "copied 1", "free 0", "free 1")), Stream("main")
    fake = {
        "Stream": lambda device: Stream("copies"),
        "Event": Event,
        "current_stream": lambda device: main,
        "stream": Entered,
        "synchronize": lambda device: log.append("synchronize"),
    }
    monkeypatch.setattr(torch, "cuda", types.SimpleNamespace(**fake))
    on_stream = CopyOnStream(torch.device("cuda"))
    target = types.SimpleNamespace(copy_=lambda source, non_blocking: log.append(f"copy, non_blocking {non_blocking}"))
    on_stream.start(1, [(target, None), (target, None)])
    on_stream.wait(1)
    on_stream.used(1)
    on_stream.drain()
    assert log == [
        "main records event free 0",
        "main records event free 1",
        "(",
        "copies waits for event free 1",
        "copy, non_blocking True",
        "copy, non_blocking True",
        "copies records event copied 1",
        ")",
        "main waits for event copied 1",
        "main records event free 1",
        "synchronize",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("allowance", [float("inf"), 0])
def test_what_was_loaded_in_inference_mode_runs_on_a_gpu(model, allowance):
    with torch.inference_mode():
        placement.change(model, torch.clone)
        latents, t, feats = torch.randn(1, 16, 8, 8), torch.tensor([0.3]), torch.randn(5, model.config.cap_feat_dim)
        expected = model(latents, t, model.prepare([feats], 64, 64))
        streamer = BlockStreamer(model.blocks, model)
        streamer.place("cuda", allowance)
        hooks = Hooks(run_block=streamer.run_block)
        found = model(latents.cuda(), t.cuda(), model.prepare([feats.cuda()], 64, 64, hooks), hooks)
        streamer.leave()
    assert torch.allclose(found.cpu(), expected, rtol=0.05, atol=0.05)  # bf16, summed in another order than on the CPU
