"""The three models of a pipeline, each read when it is made, placed for its stage and sent away after it.

`planning.Stage` says how much of a model may be on the device. What takes longest is left to the caller to record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .formats.encoder import load_text_encoder
from .formats.load import load_transformer
from .formats.vae import load_vae
from .lora.apply import apply
from .lora.read import Lora
from .memory import plan as planning
from .memory.graphs import Graphs
from .memory.offload import BlockStreamer
from .memory.placement import module_bytes
from .models.text_encoder import encode_tokens
from .models.transformer import Conditioning, Hooks

Loras = tuple[tuple[Lora, float], ...]


def _read_to(stage: planning.Stage, device: torch.device) -> torch.device:
    """Where a model's weights go when it is read: to the device only if all of them may be there."""
    return device if stage.resident == stage.blocks else torch.device("cpu")


class ResidentEncoder:
    """The text encoder; it is dropped rather than sent to the host."""

    def __init__(self, path: Path, stage: planning.Stage, device: torch.device, dtype: torch.dtype):
        self._device = device
        self._model = load_text_encoder(path, device=_read_to(stage, device), dtype=dtype)
        self._streamer = BlockStreamer(list(self._model.layers))

    @property
    def on_device(self) -> int:
        """Bytes of it on the device."""
        return self._streamer.used

    def place(self, stage: planning.Stage, loras: Loras) -> None:
        """Have it with exactly these LoRAs, with as many layers on the device as the plan allows."""
        apply(self._model, loras)
        self._streamer.place(self._device, stage.allowance)

    def encode(self, tokens: Collection[list[int]], where: str) -> list[Tensor]:
        """Caption features (L, C) on the host of each prompt's token ids; where names the tokenizer in errors."""
        found = encode_tokens(self._model, tokens, where, run_block=self._streamer.run_block, device=self._device)
        return [feats.cpu() for feats in found]


class ResidentTransformer:
    """The transformer, with CUDA graphs of its steps."""

    def __init__(
        self, path: Path, stage: planning.Stage, device: torch.device, dtype: torch.dtype, backend: str, precision: str
    ):
        self._device = device
        self.model = load_transformer(
            path,
            device=_read_to(stage, device),
            dtype=dtype,
            backend=backend,
            precision=precision,
            compute_device=device,
        )
        self._streamer = BlockStreamer(self.model.blocks, self.model)
        self._graphs = Graphs(self.model, self._streamer)
        self._hooks = Hooks(run_block=self._streamer.run_block)

    @property
    def on_device(self) -> int:
        """Bytes of it on the device."""
        return self._streamer.used

    def place(self, stage: planning.Stage, loras: Loras) -> None:
        """Have it with exactly these LoRAs, with as many blocks on the device as the plan allows."""
        apply(self.model, loras)
        self._streamer.place(self._device, stage.allowance)

    def leave(self) -> None:
        """Send it to the host."""
        self._graphs.clear()
        self._streamer.leave()

    def prepare(self, captions: Sequence[Tensor], height: int, width: int) -> Conditioning:
        """`ZImageTransformer.prepare`, with its blocks streamed."""
        return self.model.prepare(captions, height, width, self._hooks)

    def steps(self, graphs: bool) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """The model as a function (latents, t, cond) -> output; graphs: replay CUDA graphs of it where possible."""
        model = functools.partial(self.model, hooks=self._hooks)
        return functools.partial(self._graphs.run, model) if graphs and self._graphs.possible else model


class ResidentVAE:
    """The VAE, whole on the device or on the host."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype):
        self._device = device
        self.model = load_vae(path, device=device, dtype=dtype)

    @property
    def on_device(self) -> int:
        """Bytes of it on the device."""
        there = next(self.model.parameters()).device.type == self._device.type
        return module_bytes(self.model) if there else 0

    def place(self) -> None:
        self.model.to(self._device)

    def leave(self) -> None:
        """Send it to the host."""
        self.model.to("cpu")
