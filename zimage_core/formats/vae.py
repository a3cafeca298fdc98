"""VAE files in diffusers' and Black Forest Labs' names: the config, and the strict load.

Source: huggingface/diffusers `models/autoencoders/autoencoder_kl.py@v0.42.1`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..models.vae import VAE, VAEConfig, check_dtype
from .identify import EXPECTED, identify, open_part
from .load import Sources, fill, match_tensors
from .names import unwrapped, vae_tensor
from .safetensors import TensorFiles, read_object
from .weights import find_weights

_REMEDY = EXPECTED["vae"][1]

FIXED_FIELDS = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "latents_mean": None,
    "latents_std": None,
}
"""Fields of a diffusers config that exist here with one value only."""
FREE_FIELDS = {"sample_size", "force_upcast"}
"""Fields without effect on the numbers, besides those that begin with "_" (diffusers' own notes)."""


def config_from_diffusers(config: dict) -> VAEConfig:
    """A diffusers AutoencoderKL config as VAEConfig; ValueError for a field or value not known here."""
    ours: dict[str, Any] = {
        name: tuple(config[name]) if isinstance(config[name], list) else config[name]
        for name in VAEConfig.__dataclass_fields__
        if name in config
    }
    sizes = VAEConfig(**ours)
    levels = len(sizes.block_out_channels)
    fixed = FIXED_FIELDS | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for name in config.keys() - ours.keys() - FREE_FIELDS:
        if name.startswith("_") and name not in fixed:
            continue
        if name not in fixed or config[name] != fixed[name]:
            value = config[name]
            expected = repr(fixed[name]) if name in fixed else "no such field"
            found = repr(value) if name in fixed or isinstance(value, int | float) else type(value).__name__
            raise ValueError(f"config field {name}: expected {expected}, found {found}; {_REMEDY}")
    return sizes


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> VAEConfig:
    """The config that follows from diffusers-style names and shapes; norm groups, scale and shift are the defaults.

    Raises ValueError where a shape that it needs is missing.
    """
    blocks = {
        tuple(map(int, m.groups()))
        for key in shapes
        if (m := re.match(r"encoder\.down_blocks\.(\d{1,2})\.resnets\.(\d{1,2})\.", key))
    }
    levels, layers = (1 + max((b[i] for b in blocks), default=0) for i in (0, 1))
    keys = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)] + ["decoder.conv_in.weight"]
    for key in keys:
        if len(shapes.get(key, ())) != 4:
            raise ValueError(f"{key!r}: expected four dimensions, found {shapes.get(key, 'none')}; {_REMEDY}")
    return VAEConfig(tuple(shapes[key][0] for key in keys[:-1]), layers, latent_channels=shapes[keys[-1]][1])


def read_vae_config(path: str | Path) -> VAEConfig:
    """The sizes of the VAE in a file or folder, from its header; errors as load_vae."""
    with open_part(path, "vae") as files:
        return _match(files)[0].config


def _match(files: TensorFiles) -> tuple[VAE, Sources]:
    """The VAE of an open file, without its weights, and where each of its tensors is."""
    identify(files).require("vae")
    found = find_weights(files, _REMEDY)
    numbers = (re.match(r"decoder\.up\.(\d{1,2})\.", unwrapped(key)) for key in found)
    levels = 1 + max((int(number[1]) for number in numbers if number), default=0)
    shapes = {vae_tensor(key, levels)[0]: stored.shape for key, stored in found.items()}
    raw = files.metadata.get("config")
    try:
        config = config_from_diffusers(read_object(raw, "config", _REMEDY)) if raw else config_from_shapes(shapes)
    except ValueError as error:
        raise ValueError(f"{files.path}: {error}") from None
    with torch.device("meta"):
        vae = VAE(config)
    return vae, match_tensors(files, found, vae, lambda key: vae_tensor(key, levels), _REMEDY, what="this autoencoder")


def load_vae(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """The VAE of a safetensors file (diffusers or BFL names) or a diffusers folder, frozen, on a device.

    The config is the diffusers JSON of the file's metadata or the folder's config.json, else it follows from the
    shapes. Tensors go from the memory-mapped file to the device one by one. Raises ValueError, naming the file, for a
    wrong kind of file, config values not known here, and unexpected, missing or misshapen tensors; also for fp16.
    """
    check_dtype(dtype)
    with open_part(path, "vae") as files:
        vae, sources = _match(files)
        fill(vae, sources, device, dtype)
    return vae
