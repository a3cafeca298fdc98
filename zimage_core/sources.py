"""Reading the models of a pipeline, with their weights or, for a plan, from headers alone.

A plan needs every model before its weights are loaded: `where` is the meta device then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .files import ModelFiles
from .formats.controlnet import load_controlnet
from .formats.encoder import load_text_encoder
from .formats.load import load_transformer
from .formats.safetensors import stamp
from .formats.vae import load_vae
from .models.attention import KINDS
from .models.controlnet import ControlNet
from .models.text_encoder import TextEncoder
from .models.transformer import ZImageTransformer
from .models.vae import VAE


@dataclass(frozen=True)
class Sources:
    """The files of a pipeline, and how its models compute. Each function loads a model onto the device `where`.

    device: where the models will run. attention: "sdpa" or "int8".
    """

    files: ModelFiles
    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    precision: str = "auto"
    attention: str = "sdpa"
    _stamps: dict[Path, tuple[object, ...]] = field(default_factory=dict, compare=False)

    def transformer(self, where: torch.device) -> ZImageTransformer:
        model = load_transformer(self.files.model, device=where, **self._computes)
        model.attention = KINDS[self.attention]
        return model

    def controlnet(self, path: Path, where: torch.device) -> ControlNet:
        return load_controlnet(path, device=where, **self._computes)

    def text_encoder(self, where: torch.device) -> TextEncoder:
        path = self.files.text_encoder
        return load_text_encoder(path, device=where, dtype=self.dtype, compute_device=self.device)

    def vae(self, where: torch.device) -> VAE:
        """fp32 on the CPU and wherever the rest is not bf16, never fp16."""
        half = self.device.type != "cpu" and self.dtype is torch.bfloat16
        return load_vae(self.files.vae, device=where, dtype=torch.bfloat16 if half else torch.float32)

    @property
    def _computes(self) -> dict[str, Any]:
        options = {"dtype": self.dtype, "backend": self.backend, "precision": self.precision}
        return {**options, "compute_device": self.device}

    def remember(self, *paths: Path) -> None:
        """Note size and time of these files, unless they were noted before."""
        for path in paths:
            self._stamps.setdefault(path, stamp(path))

    def check_unchanged(self, *paths: Path) -> None:
        """ValueError if a file has changed since it was noted."""
        for path in paths:
            if stamp(path) != self._stamps[path]:
                raise ValueError(f"{path}: changed since its header was read; wait until it is whole, and load it anew")
