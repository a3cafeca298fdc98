"""The cases of the ControlNet's vectors: configs, weights and inputs, all from seeds, so that only outputs are kept.

`make_controlnet_vectors.py` writes the outputs of VideoX-Fun's class for them, `test_controlnet.py` compares ours.
Legend: B batch, C control channels, h x w the latents' size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "data" / "controlnet"

BASE = {
    "dim": 96,
    "n_layers": 6,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "cap_feat_dim": 16,
    "axes_dims": (8, 12, 12),
    "axes_lens": (256, 64, 64),
}
"""The base's sizes: three heads of 32, as in the real model split in 1/4, 3/8, 3/8 among the axes."""

PLACES = {"v1": (0, 2, 4), "2.0": (0, 2, 4), "2.1": (0, 2, 4), "lite": (0, 3)}
CHANNELS = {"v1": 16, "2.0": 33, "2.1": 33, "lite": 33}


@dataclass(frozen=True)
class Case:
    """One forward: latents' size, caption lengths (one a picture), the hints' strength."""

    size: tuple[int, int]
    captions: tuple[int, ...]
    strength: float

    @property
    def name(self) -> str:
        return f"{self.size[0]}x{self.size[1]}_{'_'.join(map(str, self.captions))}_{self.strength}"


CASES = (
    Case((8, 8), (7,), 1.0),  # both streams padded to 32
    Case((8, 8), (7,), 0.0),
    Case((16, 24), (32,), 0.6),  # neither padded
    Case((20, 12), (7, 40), 1.0),  # pads and a mask
    Case((20, 12), (20, 20), 0.6),
)


def seeded(name: str, *shape: int) -> Tensor:
    """Normal numbers (shape) that belong to a name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A tensor for each official key: activations stay O(1), and every parameter matters."""
    made = {}
    for key, shape in shapes.items():
        tensor = seeded(key, *shape)
        if len(shape) == 2 and "pad_token" not in key:
            tensor *= shape[1] ** -0.5
        else:
            tensor *= 0.3
            if key.endswith("weight"):  # of a norm
                tensor += 1
        made[key] = tensor
    return made


def checksum(tensors: Mapping[str, Tensor]) -> float:
    """One number that differs where the seeds gave other weights."""
    return math.fsum(tensor.double().abs().sum().item() for tensor in tensors.values())


def inputs(case: Case, channels: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """latents (B, 16, h, w), t (B,), captions (L, 16) each, control context (B, C, h, w)."""
    batch = len(case.captions)
    latents = seeded(f"latents {case.name}", batch, 16, *case.size)
    t = torch.linspace(0.2, 0.7, batch)
    captions = [seeded(f"caption {i} {case.name}", n, BASE["cap_feat_dim"]) for i, n in enumerate(case.captions)]
    return latents, t, captions, seeded(f"control {case.name}", batch, channels, *case.size)
