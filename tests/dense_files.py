"""A small dense transformer and its tensors as files name them, for the tests of quantizing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from zimage_core.formats.names import diffusers_svdq_module
from zimage_core.models.config import ZImageConfig

CONFIG = ZImageConfig(
    dim=384, n_layers=1, n_refiner_layers=1, n_heads=6, cap_feat_dim=64, axes_dims=(16, 24, 24), axes_lens=(64, 64, 64)
)
CONTROLNETS = {"v1": (16, "alone"), "2.0": (33, "layers"), "2.1 lite": (33, "hints")}
"""Variant -> channels and refiner, of the fixture `dense_nets`."""


def diffusers_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors under the official names, with q, k, v and w1, w3 apart."""
    named = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if module.endswith("to_qkv"):
            named |= {f"{module[:-3]}{p}.{leaf}": t.clone() for p, t in zip("qkv", tensor.chunk(3), strict=True)}
        elif module.endswith("w3_w1"):
            named |= {f"{module[:-5]}{p}.{leaf}": t.clone() for p, t in zip(("w3", "w1"), tensor.chunk(2), strict=True)}
        elif module.endswith("w2"):
            named[key] = tensor
        else:
            named[f"{diffusers_svdq_module(module)}.{leaf}" if module else key] = tensor
    return named


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
