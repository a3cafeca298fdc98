"""Replaying steps as CUDA graphs, where launching the thousand kernels of a step takes longer than running them.

The first run of a shape compiles kernels, the second is timed, and only if the host took more than half the GPU's time
a later run is captured: other work on the host, such as writing PNG files, easily doubles its time. From then on the
host launches once per step. Kernels and their order are the same, and so are the results, bit for bit. Timings are in
benchmarks/README.md.

A graph reads and writes fixed addresses: inputs are copied there, and other weights invalidate it.
"""

from __future__ import annotations

import ctypes
import os
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formats.stored import FORMS, StoredLinear
from ..linear.backends import capability, guard, load
from ..models.transformer import Conditioning, ZImageTransformer

if TYPE_CHECKING:
    from .offload import BlockStreamer

BACKENDS = ("triton", "reference")  # whose kernels may be captured
SHAPES = 8  # kept at a time: captions of two lengths, prompt and negative prompt, of two sizes
LAUNCH_BOUND = 2.0  # a step may be launch-bound if the GPU takes less than this times the host's time
ASYNC = "cudaMallocAsync"  # the allocator that ComfyUI chooses
FREE_BYTES = 2**31  # that the GPU must have left: a graph keeps its activations

Model = Callable[[Tensor, Tensor, Conditioning], Tensor]


class Watch:
    """Runs a step and times it: on the host, which launches it, and on the GPU.

    With `ASYNC` on the stream that captures, so that what cuBLAS keeps for a stream is no part of a graph.
    """

    def __init__(self) -> None:
        self.begun, self.done = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(self, model: Model, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """model(latents, t, cond)."""
        device = latents.device
        stream = main = torch.cuda.current_stream(device)
        if torch.cuda.get_allocator_backend() == ASYNC:
            stream = capture_stream(device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            self.host = time.perf_counter()
            self.begun.record()
            flow = model(latents, t, cond)
            self.done.record()
            self.host = time.perf_counter() - self.host
        main.wait_stream(stream)
        flow.record_stream(main)
        return flow

    def launch_bound(self) -> bool | None:
        """Whether launching took long beside running; None while the GPU still runs the step."""
        if not self.done.query():
            return None
        return self.begun.elapsed_time(self.done) < LAUNCH_BOUND * 1000 * self.host


class Graph:
    """One captured step with the tensors that it reads and writes.

    They are allocated before: of what cudaMallocAsync allocates while capturing nothing may outlive the capture, not
    even in the frames of an error; freeing it later would end the process.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Model, latents: Tensor, t: Tensor, cond: Conditioning, pool: Any):
        self.latents, self.t, self.source = latents.clone(), t.clone(), cond
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors(cond).items()}
        self.cond = replace(cond, **copies)
        self.flow = torch.empty_like(self.latents)
        self.graph = torch.cuda.CUDAGraph()
        stream = capture_stream(latents.device)
        with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
            try:
                self.flow.copy_(model(self.latents, self.t, self.cond))
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)
                raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The model's result for these inputs, which have the shapes of the captured ones."""
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
    """The steps of one shape; settled once it is decided whether they have a graph."""

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
        self._weights: Hashable = None  # addresses and adapters that the graphs were captured with
        self._steps: OrderedDict[Hashable, Step] = OrderedDict()
        self._pool: Any = None

    @cached_property
    def _by_torch(self) -> bool:
        """Whether torch alone dequantizes every weight; comfy-kitchen and gguf copy from or to the host."""
        return all(
            form in FORMS
            for module in self._transformer.modules()
            if isinstance(module, StoredLinear)
            for form, _ in module.pieces
        )

    @property
    def possible(self) -> bool:
        """Whether steps can be captured: on an NVIDIA GPU, nothing streamed, kernels and allocator allow it."""
        backend = self._transformer.backend
        known = (backend is None or backend.name in BACKENDS) and self._by_torch
        if not known or self._streamer.addresses is None or capability(self._streamer.device) is None:
            return False
        allocator = torch.cuda.get_allocator_backend()
        return allocator == "native" or (allocator == ASYNC and takes_addresses())

    def run(self, model: Model, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """model(latents, t, cond), by a graph if there is one; model calls the transformer, alike in every step.

        ControlNets work in some steps only and are not captured.
        """
        if cond.controls:
            return model(latents, t, cond)
        with guard(latents.device):
            return self._run(model, latents, t, cond)

    def clear(self) -> None:
        """Drop all graphs; their memory is free once torch's cache is emptied."""
        while self._steps:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, step = self._steps.popitem(last=False)
        if step.graph:
            device = step.graph.latents.device
            torch.cuda.synchronize(device)  # it may be running
            step.graph = None
            trim(device)
        if not any(step.graph for step in self._steps.values()):
            self._pool = None  # torch refuses a capture into a pool whose last graph is gone

    def _run(self, model: Model, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        step = self._step(latents, t, cond)
        bound = step.watch.launch_bound() if step.watch and not step.settled else None
        if bound is not None:
            step.settled = True
            if bound and free_bytes(latents.device) >= FREE_BYTES:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                step.graph = self._record(model, latents, t, cond, self._pool)
        if step.graph:
            return step.graph.replay(latents, t, cond)
        step.runs += 1
        if step.runs != 2:  # the first compiles kernels
            return model(latents, t, cond)
        step.watch = self._watch()
        return step.watch.run(model, latents, t, cond)

    def _step(self, latents: Tensor, t: Tensor, cond: Conditioning) -> Step:
        """The step of these shapes; all are dropped if weights changed."""
        weights = self._streamer.addresses, self._transformer.adapter_version
        if weights != self._weights:
            self.clear()
            self._weights = weights
        shapes = {name: tensor.shape for name, tensor in tensors(cond).items()}
        key = (latents.shape, latents.dtype, t.shape, cond.grid, cond.image_tokens, cond.nag, *shapes.items())
        step = self._steps.setdefault(key, Step())
        self._steps.move_to_end(key)
        if len(self._steps) > SHAPES:
            self._drop_oldest()
        return step


def tensors(cond: Conditioning) -> dict[str, Tensor]:
    """The tensors of a conditioning by field name."""
    return {name: value for name, value in vars(cond).items() if isinstance(value, Tensor)}


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device, on which steps are captured."""
    return torch.cuda.Stream(device)


def takes_addresses() -> bool:
    """Whether Triton's kernels, where there are any, run on plain addresses: its launcher refuses those of `ASYNC`."""
    try:
        return load("triton_kernels").DIRECT
    except (ImportError, OSError):
        return True


def trim(device: torch.device) -> None:
    """Give back what the driver keeps for the allocations in dropped graphs; torch has no call for it."""
    if torch.cuda.get_allocator_backend() == ASYNC:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDeviceGraphMemTrim(device.index)


def free_bytes(device: torch.device) -> int:
    """Free bytes of a GPU, including those that torch reserves but does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
