"""The three models of a pipeline, each read when it is made, placed for its stage and sent away after it.

`planning.Stage` says how much of a model may be on the device. What takes longest is left to the caller to record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .control import Control
from .failures import check_finite
from .formats.controlnet import load_controlnet
from .formats.encoder import load_text_encoder
from .formats.load import load_transformer
from .formats.vae import load_vae
from .lora.apply import apply
from .lora.read import Lora
from .memory import plan as planning
from .memory.graphs import Graphs
from .memory.offload import BlockStreamer
from .memory.placement import module_bytes
from .models.attention import KINDS
from .models.controlnet import ControlNet, run_order
from .models.text_encoder import encode_tokens
from .models.transformer import Conditioning, Hooks

Loras = tuple[tuple[Lora, float], ...]


def _read_to(stage: planning.Stage, device: torch.device) -> torch.device:
    """Where a model's weights go when it is read: to the device only if all of them may be there."""
    return device if stage.resident == stage.blocks else torch.device("cpu")


class ResidentEncoder:
    """The text encoder; it is dropped rather than sent to the host."""

    def __init__(self, path: Path, stage: planning.Stage, device: torch.device, dtype: torch.dtype):
        self._path, self._device = path, device
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
        for feats in found:
            remedy = "its file is damaged, or a LoRA changes it too much"
            check_finite(feats, f"text encoder ({self._path})", remedy)
        return [feats.cpu() for feats in found]


class ResidentTransformer:
    """The transformer, with the ControlNets beside it and CUDA graphs of its steps."""

    def __init__(
        self,
        path: Path,
        stage: planning.Stage,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        precision: str,
        attention: str = "sdpa",
    ):
        self._device = device
        self._options: dict[str, Any] = {"dtype": dtype, "backend": backend, "precision": precision}
        self._options["compute_device"] = device
        self.model = load_transformer(path, device=_read_to(stage, device), **self._options)
        self.model.attention = KINDS[attention]
        self._nets: dict[Path, ControlNet] = {}
        self._assemble()

    def _assemble(self) -> None:
        nets = list(self._nets.values())
        self._streamer = BlockStreamer(run_order(self.model, nets), nn.ModuleList([self.model, *nets]))
        self._graphs = Graphs(self.model, self._streamer)
        self._hooks = Hooks(run_block=self._streamer.run_block)

    @property
    def on_device(self) -> int:
        """Bytes of it on the device."""
        return self._streamer.used

    def place(self, stage: planning.Stage, loras: Loras, controlnets: Collection[Path] = ()) -> None:
        """Have it with exactly these LoRAs and ControlNets, with as many blocks on the device as the plan allows."""
        apply(self.model, loras)
        if set(self._nets) != set(controlnets):
            self._graphs.clear()
            if self._streamer.host:  # what is streamed rests in this streamer's buffers
                self._streamer.leave()
            where = _read_to(stage, self._device)
            self._nets = {
                path: self._nets.get(path) or load_controlnet(path, device=where, **self._options)
                for path in dict.fromkeys(controlnets)
            }
            self._assemble()
        self._streamer.place(self._device, stage.allowance)

    def leave(self) -> None:
        """Send it to the host."""
        self._graphs.clear()
        self._streamer.leave()

    def prepare(self, captions: Sequence[Tensor], height: int, width: int) -> Conditioning:
        """`ZImageTransformer.prepare`, with its blocks streamed."""
        return self.model.prepare(captions, height, width, self._hooks)

    def controlled(self, cond: Conditioning, controls: Iterable[tuple[Control, Tensor]]) -> Conditioning:
        """A conditioning with ControlNets, each with its control context."""
        prepared = (
            self._nets[Path(control.model)].prepare(
                context, self.model, cond, control.strength, control.start, control.end
            )
            for control, context in controls
        )
        return replace(cond, controls=tuple(prepared))

    def steps(self, graphs: bool) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """The model as a function (latents, t, cond) -> output; graphs: replay CUDA graphs of it where possible.

        Beside a ControlNet steps are not replayed: a graph does not know its control picture.
        """
        model = functools.partial(self.model, hooks=self._hooks)
        replayed = graphs and not self._nets and self._graphs.possible
        return functools.partial(self._graphs.run, model) if replayed else model


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
