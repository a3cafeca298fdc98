"""Steps replayed as CUDA graphs, where launching the thousand kernels of a step takes longer than running them.

At 512 x 512 an H200 runs a step in 22 ms, and Python launches it in 35 to 45. The first run of a shape compiles
kernels, the second is timed, and only where the host was the slower one is a later one captured; from then on the host
launches once. The kernels and their order are the same, and so are the results, bit for bit.

A graph reads and writes fixed addresses: the inputs are copied to them, and a change of the weights' own drops it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linear.backends import capability, guard
from ..models.transformer import Conditioning, ZImageTransformer

if TYPE_CHECKING:
    from .offload import BlockStreamer

BACKENDS = ("triton", "reference")
SHAPES = 4  # remembered at a time: prompt and negative prompt, of two sizes
LAUNCH_BOUND = 1.1  # times the launching that the GPU may take for a step
ROOM = 2**31  # bytes that must be free on the GPU: a graph keeps its activations

Model = Callable[[Tensor, Tensor, Conditioning], Tensor]


class Watch:
    """How long the host took to launch a step, and the GPU to run it."""

    def __init__(self):
        self.begun, self.done = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __enter__(self) -> None:
        self.host = time.perf_counter()
        self.begun.record()

    def __exit__(self, *_: object) -> None:
        self.done.record()
        self.host = time.perf_counter() - self.host

    def launch_bound(self) -> bool | None:
        """Whether launching took the longer; None while the GPU is still at it, for nobody waits here."""
        if not self.done.query():
            return None
        return self.begun.elapsed_time(self.done) < LAUNCH_BOUND * 1000 * self.host


class Graph:
    """One captured step, the tensors that it reads, and the one that it writes."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Model, latents: Tensor, t: Tensor, cond: Conditioning, pool):
        self.latents, self.t, self.source = latents.clone(), t.clone(), cond
        self.cond = replace(cond, **{name: tensor.clone() for name, tensor in tensors(cond).items()})
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.flow = model(self.latents, self.t, self.cond)

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the model gives for these inputs."""
        self.latents.copy_(latents)
        self.t.copy_(t)
        if cond is not self.source:
            for name, tensor in tensors(cond).items():
                getattr(self.cond, name).copy_(tensor)
            self.source = cond
        self.graph.replay()
        return self.flow.clone()


@dataclass
class Step:
    """What is known of the steps of one shape; settled once it is decided whether they have a graph."""

    runs: int = 0
    watch: Watch | None = None
    graph: Graph | None = None
    settled: bool = False


class Graphs:
    """The steps of a transformer on a GPU, by the shapes of their inputs."""

    def __init__(
        self,
        transformer: ZImageTransformer,
        streamer: BlockStreamer,
        record: Callable[..., Graph] = Graph,
        watch: Callable[[], Watch] = Watch,
    ):
        self._transformer, self._streamer, self._record, self._watch = transformer, streamer, record, watch
        self._weights: Hashable = None  # what they were when the steps were recorded
        self._steps: OrderedDict[Hashable, Step] = OrderedDict()
        self._pool = None

    @property
    def possible(self) -> bool:
        """Whether steps can be captured: on an NVIDIA GPU, with nothing streamed, by kernels known to allow it.

        And in memory of torch's own allocator: ComfyUI's default, cudaMallocAsync, has no pool for a graph.
        """
        backend = self._transformer.backend
        known = backend is None or backend.name in BACKENDS
        if not known or self._streamer.addresses is None or capability(self._streamer.device) is None:
            return False
        return torch.cuda.get_allocator_backend() == "native"

    def run(self, model: Model, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """model(latents, t, cond), where model calls the transformer and nothing that differs between steps."""
        with guard(latents.device):
            return self._run(model, latents, t, cond)

    def clear(self) -> None:
        """Forget all graphs; their memory is free once torch's cache is emptied."""
        while self._steps:
            self._drop_oldest()
        self._pool = None

    def _drop_oldest(self) -> None:
        _, step = self._steps.popitem(last=False)
        if step.graph:
            torch.cuda.synchronize(step.graph.latents.device)  # it may be running

    def _run(self, model: Model, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        weights = self._streamer.addresses, getattr(self._transformer, "adapter_version", 0)
        if weights != self._weights:
            self.clear()
            self._weights = weights
        shapes = {name: tensor.shape for name, tensor in tensors(cond).items()}
        key = (latents.shape, latents.dtype, t.shape, cond.grid, cond.image_tokens, *shapes.items())
        step = self._steps.setdefault(key, Step())
        self._steps.move_to_end(key)
        if len(self._steps) > SHAPES:
            self._drop_oldest()

        bound = step.watch.launch_bound() if step.watch and not step.settled else None
        if bound is not None:
            step.settled = True
            if bound and room(latents.device) >= ROOM:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                step.graph = self._record(model, latents, t, cond, self._pool)
        if step.graph:
            return step.graph.replay(latents, t, cond)
        step.runs += 1
        if step.runs != 2:  # the first compiles kernels
            return model(latents, t, cond)
        step.watch = self._watch()
        with step.watch:
            return model(latents, t, cond)


def tensors(cond: Conditioning) -> dict[str, Tensor]:
    """The tensors of a conditioning by the names of their fields."""
    return {name: value for name, value in vars(cond).items() if isinstance(value, Tensor)}


def room(device: torch.device) -> int:
    """Bytes that are free on a GPU, those that torch holds in reserve counted."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
