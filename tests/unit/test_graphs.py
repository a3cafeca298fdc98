"""Steps from CUDA graphs: when they are captured, what they are fed, when they are dropped; on a GPU also the bits."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zimage_core import bench
from zimage_core.formats.stored import StoredLinear
from zimage_core.linear.backends import select
from zimage_core.memory import graphs
from zimage_core.memory.graphs import Graph, Graphs
from zimage_core.memory.offload import BlockStreamer
from zimage_core.models.config import ZImageConfig
from zimage_core.models.transformer import Conditioning
from zimage_core.sampler import draw_noise

CONFIG = ZImageConfig(dim=384, n_layers=1, n_refiner_layers=1, n_heads=3, cap_feat_dim=64)


class Recorded(Graph):
    """A graph that runs the model again on what it was captured with, as a replay does."""

    def __init__(self, model, latents, t, cond, pool):
        self.latents, self.t, self.source, self.pool = latents.clone(), t.clone(), cond, pool
        self.cond = replace(cond, **{name: tensor.clone() for name, tensor in graphs.tensors(cond).items()})
        self.graph = SimpleNamespace(replay=self._again)
        self.flow = torch.full_like(latents, math.nan)
        made.append(self)

    def _again(self):
        self.flow = self.latents * self.t + self.cond.context.mean()


class Watched:
    """Answers of the clock, one for each time that it is asked."""

    answers: list = []

    def run(self, model, *given):
        watched.append(self)
        return model(*given)

    def launch_bound(self):
        return self.answers.pop(0) if self.answers else True


made, watched = [], []


@pytest.fixture
def steps(monkeypatch):
    """A function that runs a step of given tokens, and whether the model itself ran."""
    made.clear(), watched.clear(), Watched.answers.clear()
    monkeypatch.setattr(graphs, "free_bytes", lambda device: graphs.FREE_BYTES)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native", raising=False)
    transformer, streamer = SimpleNamespace(backend=None, adapter_version=0), SimpleNamespace(addresses=1)
    found, ran = Graphs(transformer, streamer, Recorded, Watched), []

    def model(latents, t, cond):
        ran.append(latents)
        return latents * t + cond.context.mean()

    def step(cond, latents=None, t=0.5):
        before = len(ran)
        latents = torch.randn(1, 16, 4, 4) if latents is None else latents
        flow = found.run(model, latents, torch.tensor([t]), cond)
        assert torch.equal(flow, latents * t + cond.context.mean())
        return len(ran) > before

    return SimpleNamespace(step=step, graphs=found, transformer=transformer, streamer=streamer)


def caption(tokens=32, seed=0):
    context = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed))
    angles = torch.zeros(1, 32 + tokens, 1, 4)
    return Conditioning(context, angles, angles, mask=None, grid=(2, 2), image_tokens=32)


def test_the_third_step_of_a_shape_is_captured_and_later_ones_replayed(steps):
    cond = caption()
    assert [steps.step(cond) for _ in range(5)] == [True, True, False, False, False]
    assert (len(made), len(watched)) == (1, 1)
    assert not steps.step(caption(seed=1)), "another prompt of the same length needs no other graph"
    assert not steps.step(cond, t=0.1)


def test_a_step_is_not_captured_while_it_is_unknown_what_takes_the_time_nor_where_the_gpu_does(steps):
    Watched.answers[:] = [None, None, False]
    assert all(steps.step(caption()) for _ in range(9))
    assert not made
    assert len(watched) == 1


def test_nor_with_a_controlnet(steps):
    control = SimpleNamespace(net=None)
    assert all(steps.step(replace(caption(), controls=(control,))) for _ in range(5))
    assert not watched


def test_nor_where_the_gpu_has_no_memory_left(steps, monkeypatch):
    monkeypatch.setattr(graphs, "free_bytes", lambda device: graphs.FREE_BYTES - 1)
    assert all(steps.step(caption()) for _ in range(5))


@pytest.mark.parametrize("change", [("transformer", "adapter_version"), ("streamer", "addresses")])
def test_other_weights_drop_the_graphs(steps, change):
    for _ in range(4):
        steps.step(caption())
    owner, name = change
    setattr(getattr(steps, owner), name, 7)
    assert [steps.step(caption()) for _ in range(4)] == [True, True, False, False]
    assert made[0].pool is not made[1].pool


def test_every_shape_has_its_own_and_the_oldest_go(steps):
    lengths = [32 * n for n in range(1, graphs.SHAPES + 2)]
    for tokens in lengths:
        for _ in range(3):
            steps.step(caption(tokens))
    assert len(made) == len(lengths)
    assert not steps.step(caption(lengths[-1]))
    assert steps.step(caption(lengths[0])), "one more than are remembered"
    assert len({id(graph.pool) for graph in made}) == 1


def test_a_pool_whose_last_graph_was_dropped_is_not_used_again(steps):
    """torch asserts that a pool which is captured into is in use: "use_count > 0", seen in a batch on an H100."""
    for _ in range(3):
        steps.step(caption(32))
    for i in range(graphs.SHAPES):  # run once each, so without a graph, until the first is forgotten
        steps.step(caption(64 + 32 * i))
    for _ in range(3):
        steps.step(caption(32))
    assert len(made) == 2 and made[0].pool is not made[1].pool


def test_what_cudamallocasync_keeps_for_graphs_is_given_back_with_the_last(steps, monkeypatch):
    """The driver keeps the memory of dropped graphs for new ones, which ComfyUI would count as taken."""
    trimmed = []
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: graphs.ASYNC)
    driver = SimpleNamespace(cuDeviceGraphMemTrim=trimmed.append)
    monkeypatch.setattr(graphs.ctypes, "CDLL", lambda name: driver)
    for _ in range(3):
        steps.step(caption())
    steps.graphs.clear()
    assert trimmed


def test_only_what_is_known_to_allow_it_is_captured():
    def possible(**changes):
        facts = {"backend": None, "addresses": 1, "device": torch.device("cpu")} | changes
        transformer = nn.ModuleList(facts.get("linears", ()))
        transformer.backend = facts["backend"]
        return Graphs(transformer, SimpleNamespace(addresses=facts["addresses"], device=facts["device"])).possible

    assert not possible()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "capability", lambda device: 90)
        patch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
        assert possible()
        assert possible(backend=SimpleNamespace(name="triton"))
        assert not possible(backend=SimpleNamespace(name="nunchaku"))
        assert not possible(addresses=None), "streamed"
        for form, by_torch in (("int8", True), ("Q4_K", True), ("IQ4_NL", False), ("int8_convrot 256", False)):
            linear = StoredLinear(8, 4, bias=False)
            linear.load(form, {"codes": torch.zeros(4, 8, dtype=torch.int8)})
            assert possible(linears=[linear]) is by_torch, form
        patch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
        kernels = SimpleNamespace(DIRECT=True)
        patch.setattr(graphs, "load", lambda name: kernels)
        assert possible()
        kernels.DIRECT = False
        assert not possible(), "Triton before 3.3 refuses what was allocated while capturing"
        patch.setattr(torch.cuda, "get_allocator_backend", lambda: "pluggable")
        assert not possible()


def test_addresses_tell_of_every_move():
    transformer = bench.random_model(CONFIG, torch.device("cpu"), torch.float32, None)
    streamer = BlockStreamer(transformer.blocks, transformer)
    streamer.place("cpu", math.inf)
    first = streamer.addresses
    streamer.place("cpu", math.inf)
    assert streamer.addresses == first
    linear = transformer.layers[0].attention.to_out
    linear.weight = torch.nn.Parameter(linear.weight.clone(), requires_grad=False)
    streamer.place("cpu", math.inf)
    assert streamer.addresses not in (first, None)
    streamer.place("cpu", 0)
    assert streamer.addresses is None
    streamer.leave()
    assert streamer.addresses is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [None, "w4a16", "w4a8"])
def test_on_a_gpu_replays_are_the_same_bit_for_bit(precision):
    device = torch.device("cuda", torch.cuda.current_device())
    backend = precision and select("triton", precision, device=device, dtype=torch.bfloat16)
    transformer = bench.random_model(CONFIG, device, torch.bfloat16, backend, 32)
    streamer = BlockStreamer(transformer.blocks, transformer)
    streamer.place(device, math.inf)
    captured = []

    def record(*args):
        captured.append(Graph(*args))
        return captured[-1]

    found = Graphs(transformer, streamer, record)
    assert found.possible
    with torch.inference_mode():
        for seed in range(3):
            caption = torch.randn(20, CONFIG.cap_feat_dim, device=device, dtype=torch.bfloat16)
            cond = transformer.prepare([caption], 256, 192)
            for i in range(4):
                latents = draw_noise(10 * seed + i, 1, 256, 192).to(device)
                t = torch.tensor([0.1 * i], device=device)
                expected = transformer(latents, t, cond)
                assert torch.equal(found.run(partial(transformer), latents, t, cond), expected)
    assert len(captured) == 1, "a model this small is launch-bound on any GPU"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_an_error_while_capturing_is_only_an_error():
    """With cudaMallocAsync a tensor that outlived a capture in the error's frames would end the process."""
    device = torch.device("cuda", torch.cuda.current_device())

    def model(latents, t, cond):
        kept = latents * t
        raise ValueError(f"{kept.shape}")

    cond = replace(caption(), **{name: tensor.to(device) for name, tensor in graphs.tensors(caption()).items()})
    latents, t = torch.ones(1, 16, 4, 4, device=device), torch.tensor([0.5], device=device)
    with pytest.raises(ValueError, match="16") as caught:
        Graph(model, latents, t, cond, torch.cuda.graph_pool_handle())
    del caught
    assert torch.equal(latents + 1, torch.full_like(latents, 2))
