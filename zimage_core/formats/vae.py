"""VAE files in diffusers' and Black Forest Labs' names: the config, and the strict load.

Source: huggingface/diffusers `models/autoencoders/autoencoder_kl.py@v0.42.1`; ComfyUI
`comfy/ldm/modules/diffusionmodules/model.py@v0.33.0` (the other names).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..models.vae import VAE, VAEConfig, check_dtype
from .identify import EXPECTED, identify
from .safetensors import TensorFiles, open_tensors

BFL_ROWS = (
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (r"^(encoder|decoder)\.mid\.attn_1\.(q|k|v)\.", r"\1.mid_block.attentions.0.to_\2."),
    (r"^(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^(.*\.resnets\.\d+)\.nin_shortcut\.", r"\1.conv_shortcut."),
)
"""Names of Black Forest Labs -> diffusers, applied in turn; `bfl_rows` adds those that depend on the number of levels,
which the former count from the finest in the decoder and the latter from the coarsest."""


def bfl_rows(levels: int) -> tuple[tuple[str, str], ...]:
    """The anchored (pattern, replacement) rows for an autoencoder of `levels` resolutions."""
    up = []
    for level in range(levels):
        block = f"decoder.up_blocks.{levels - 1 - level}"
        up += [
            (rf"^decoder\.up\.{level}\.block\.(\d+)\.", rf"{block}.resnets.\1."),
            (rf"^decoder\.up\.{level}\.upsample\.", f"{block}.upsamplers.0."),
        ]
    return (*up, *BFL_ROWS)


def rename_bfl(key: str, rows: tuple[tuple[str, str], ...]) -> str:
    """BFL key -> diffusers key; a key that no row matches stays as it is."""
    for pattern, replacement in rows:
        key = re.sub(pattern, replacement, key)
    return key


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
    if not isinstance(config, dict):
        raise ValueError(f"config: expected a JSON object, found {config!r}; {_REMEDY}")
    ours = {
        name: tuple(config[name]) if isinstance(config[name], list) else config[name]
        for name in VAEConfig.__dataclass_fields__
        if name in config
    }
    found = VAEConfig(**ours)
    levels = len(found.block_out_channels)
    fixed = FIXED_FIELDS | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for name in config.keys() - ours.keys() - FREE_FIELDS:
        if name.startswith("_") and name not in fixed:
            continue
        if name not in fixed or config[name] != fixed[name]:
            expected = repr(fixed[name]) if name in fixed else "no such field"
            raise ValueError(f"config field {name}: expected {expected}, found {config[name]!r}; {_REMEDY}")
    return found


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> VAEConfig:
    """The config that follows from diffusers-style names and shapes; norm groups, scale and shift are the defaults.

    Raises ValueError where a shape that it needs is missing.
    """
    blocks = {
        tuple(map(int, m.groups()))
        for key in shapes
        if (m := re.match(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", key))
    }
    levels, layers = (1 + max((b[i] for b in blocks), default=0) for i in (0, 1))
    keys = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)] + ["decoder.conv_in.weight"]
    for key in keys:
        if len(shapes.get(key, ())) != 4:
            raise ValueError(f"{key!r}: expected four dimensions, found {shapes.get(key, 'none')}; {_REMEDY}")
    return VAEConfig(tuple(shapes[key][0] for key in keys[:-1]), layers, latent_channels=shapes[keys[-1]][1])


def _names(keys: list[str]) -> dict[str, str]:
    """Our name -> key in the file, for either style; ValueError for a doubled tensor."""
    levels = 1 + max((int(m[1]) for key in keys if (m := re.match(r"decoder\.up\.(\d+)\.", key))), default=-1)
    rows = bfl_rows(levels) if levels else ()
    names: dict[str, str] = {}
    for key in keys:
        if (twin := names.setdefault(rename_bfl(key, rows), key)) != key:
            raise ValueError(f"{twin!r} and {key!r} are the same tensor, expected only one; {_REMEDY}")
    return names


def _check_tensors(
    names: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    for name, key in names.items():
        dtype, shape = tensors[key]
        if name not in expected:
            raise ValueError(f"unexpected tensor {key!r} of shape {shape}, expected none of that name; {_REMEDY}")
        if shapes[name] != expected[name]:
            raise ValueError(f"{key!r}: expected shape {expected[name]}, found {shape}; {_REMEDY}")
        if dtype not in ("F32", "BF16", "F16"):
            raise ValueError(f"{key!r}: expected dtype F32, BF16 or F16, found {dtype}; {_REMEDY}")
    missing = [name for name in expected if name not in names]
    if missing:
        raise ValueError(
            f"expected tensor {missing[0]!r} of shape {expected[missing[0]]}, found none ({len(missing)} are "
            "missing); the file is incomplete, download it again"
        )


def read_vae_config(path: str | Path) -> VAEConfig:
    """The sizes of the VAE in a file or folder, from its header; errors as load_vae."""
    return _identify(open_tensors(path))[0].config


def _identify(files: TensorFiles) -> tuple[VAE, dict[str, str]]:
    """The VAE of a checked file, without its weights, and our name -> key of each tensor."""
    identify(files).require("vae")
    try:
        names = _names(list(files.keys()))
        shapes = {name: files.tensors[key][1] for name, key in names.items()}
        # BFL stores the attention's linear layers as 1x1 convolutions.
        shapes = {
            name: shape[:2] if ".attentions." in name and name != names[name] and shape[2:] == (1, 1) else shape
            for name, shape in shapes.items()
        }
        raw = files.metadata.get("config")
        config = config_from_diffusers(json.loads(raw)) if raw else config_from_shapes(shapes)
        with torch.device("meta"):
            vae = VAE(config)
        expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
        _check_tensors(names, shapes, expected, files.tensors)
    except json.JSONDecodeError as error:
        raise ValueError(f"{files.path}: expected JSON as config, found {raw!r} ({error}); {_REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"{files.path}: {error}") from None
    return vae, names


def load_vae(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """The VAE of a safetensors file (diffusers or BFL names) or a diffusers folder, frozen, on a device.

    The config is the diffusers JSON of the file's metadata or the folder's config.json, else it follows from the
    shapes. Tensors go from the memory-mapped file to the device one by one. Raises ValueError, naming the file, for a
    wrong kind of file, config values not known here, and unexpected, missing or misshapen tensors; also for fp16.
    """
    check_dtype(dtype)
    with open_tensors(path) as files:
        vae, names = _identify(files)
        expected = {name: tensor.shape for name, tensor in vae.state_dict().items()}
        state = {
            name: files.get(key).reshape(expected[name]).to(device, dtype, copy=True) for name, key in names.items()
        }
    vae.load_state_dict(state, assign=True)
    return vae.requires_grad_(False).eval()
