"""The 16-channel, 8x autoencoder of Z-Image: pictures to latents and back.

Encoder and decoder (convolutions, one attention in the middle), scale and shift of the latents, one picture at a time,
tiling with blended seams. Modules are named as in diffusers' `AutoencoderKL`. fp16 overflows in the decoder and gives
NaN (black) pictures, so only fp32 and bf16 are accepted.
Our own, because large pictures must not run out of memory and one reader must take every file that users have.
Source: arXiv:2112.10752 (architecture); huggingface/diffusers `models/autoencoders/autoencoder_kl.py@v0.42.1` (names,
paddings, eps); ComfyUI `comfy/ldm/modules/diffusionmodules/model.py@v0.33.0` (the other names).

Shapes: B batch, H x W pixels, h x w latent cells (H/8, W/8), C latent channels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..failures import check_finite, out_of_memory
from .config import check_numbers

log = logging.getLogger(__name__)

TILES = (96, 48)
"""Tile edges in latent cells; the next is tried after an out-of-memory error. The tensors of a 96-cell tile (768
pixels) take 1.7 GiB in fp32, of a 48-cell tile 0.4 GiB. Larger tiles come closer to the result without tiles, as
normalizations and attention see one tile only."""
OVERLAP = 0.25
"""Part of a tile's edge that overlaps its neighbour: differences between the two fade over at least 96 pixels."""
AUTO_PIXELS = 1536 * 1536
"""Above this "auto" starts with tiles: fp32 takes 3 KiB per pixel, 6.8 GiB here, and a machine without a GPU kills the
process instead of raising an error."""

MOST_LEVELS = 16
RANGES = {
    "block_out_channels": (1, 8192),
    "layers_per_block": (1, MOST_LEVELS),
    "latent_channels": (1, 8192),
    "norm_num_groups": (1, 8192),
    "scaling_factor": (1e-6, 1e6),
    "shift_factor": (-1e6, 1e6),
}


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are those of Z-Image (and FLUX.1)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        check_numbers(self, RANGES)
        channels, groups = self.block_out_channels, self.norm_num_groups
        if len(channels) > MOST_LEVELS:
            raise ValueError(f"config: block_out_channels: expected up to {MOST_LEVELS} levels, found {len(channels)}")
        if any(c % groups for c in channels):
            raise ValueError(
                f"config: expected block_out_channels divisible by norm_num_groups {groups}, found {channels}"
            )

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one edge."""
        return 2 ** (len(self.block_out_channels) - 1)


def _norm(config: VAEConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


def _silu(x: Tensor) -> Tensor:
    """SiLU that reuses its input's memory unless autograd needs it; x must be a fresh tensor."""
    return F.silu(x, inplace=not x.requires_grad)


class ResnetBlock(nn.Module):
    """x (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, config: VAEConfig, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = _norm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(config, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """Self-attention of one head over all cells: x (B, D, H, W) -> same."""

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        self.group_norm = _norm(config, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        cells = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, H*W, D)
        out = F.scaled_dot_product_attention(self.to_q(cells), self.to_k(cells), self.to_v(cells))
        return x + self.to_out[0](out).squeeze(1).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the coarsest size."""

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(config, channels)])
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halves both edges; zeros are added right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both edges."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Resnets, then the size of the next level: half (on the way down) or twice, unless it is the last one."""

    def __init__(self, config: VAEConfig, channels_in: int, channels_out: int, down: bool, last: bool):
        super().__init__()
        count = config.layers_per_block + (not down)
        self.resnets = nn.ModuleList(
            ResnetBlock(config, channels_in if i == 0 else channels_out, channels_out) for i in range(count)
        )
        resize = Downsample if down else Upsample
        self.add_module("downsamplers" if down else "upsamplers", nn.ModuleList([] if last else [resize(channels_out)]))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for layer in cast(nn.ModuleList, part):
                x = layer(x)
        return x


class Encoder(nn.Module):
    """images (B, 3, H, W) in -1..1 -> moments (B, 2C, h, w), unscaled: the posterior's mean, its log variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(config, channels[max(i - 1, 0)], c, True, i == len(channels) - 1) for i, c in enumerate(channels)
        )
        self.mid_block = MidBlock(config, channels[-1])
        self.conv_norm_out = _norm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(_silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Unscaled latents (B, C, h, w) -> images (B, 3, H, W) in about -1..1."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(config, channels[0])
        self.up_blocks = nn.ModuleList(
            Level(config, channels[max(i - 1, 0)], c, False, i == len(channels) - 1) for i, c in enumerate(channels)
        )
        self.conv_norm_out = _norm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(_silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Encoder and decoder with scaling, slicing and tiling; train `encoder` and `decoder` directly."""

    def __init__(self, config: VAEConfig | None = None):
        super().__init__()
        self.config = config or VAEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, images: Tensor, tiling: str | int = "auto") -> Tensor:
        """images (B, 3, H, W) in -1..1 -> scaled latents (B, C, h, w) fp32, the posterior's mean.

        tiling: "off", "on" (where larger than a tile), "auto" (above AUTO_PIXELS, and after an out-of-memory error),
        or the edge in cells of the largest tile to use.
        Raises ValueError for another shape, edges that are no multiples of 8, and weights in fp16.
        """
        config, down = self.config, self.config.downscale
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % down or images.shape[3] % down:
            raise ValueError(
                f"VAE.encode: expected pictures (B, 3, H, W) with H and W divisible by {down}, found "
                f"{tuple(images.shape)}; crop or resize the picture"
            )

        def mean(x: Tensor) -> Tensor:
            return self.encoder(x)[:, : config.latent_channels]

        return (self._run(mean, images, tiling, down, 1) - config.shift_factor) * config.scaling_factor

    def decode(self, latents: Tensor, tiling: str | int = "auto") -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) fp32 in about -1..1; tiling and errors as `encode`."""
        config = self.config
        if latents.ndim != 4 or latents.shape[1] != config.latent_channels:
            raise ValueError(
                f"VAE.decode: expected latents (B, {config.latent_channels}, h, w), found "
                f"{tuple(latents.shape)}; use the VAE that belongs to the diffusion model"
            )
        unscaled = latents.float() / config.scaling_factor + config.shift_factor
        return self._run(self.decoder, unscaled, tiling, 1, config.downscale)

    def _run(self, function: Callable, x: Tensor, tiling: str | int, cell_in: int, cell_out: int) -> Tensor:
        """Apply `function` to each picture, whole or in tiles; after an out-of-memory error in smaller tiles."""
        if not isinstance(tiling, int) and tiling not in ("auto", "on", "off"):
            raise ValueError(f"tiling: expected 'auto', 'on' or 'off', found {tiling!r}")
        weight = self.decoder.conv_in.weight
        check_dtype(weight.dtype)
        sizes = tile_sizes(x.shape[2] // cell_in, x.shape[3] // cell_in, self.config.downscale, tiling)
        pictures = []
        for picture in x.split(1):
            picture = picture.to(weight.device, weight.dtype)
            for size, smaller in pairwise((*sizes, None)):
                try:
                    done = (
                        function(picture).float()
                        if size is None
                        else tiled(function, picture, size, round(size * OVERLAP), cell_in, cell_out)
                    )
                    break
                except (RuntimeError, MemoryError) as error:
                    if smaller is None or not out_of_memory(error):
                        raise
                    log.warning(
                        "VAE: out of memory on shape %s with %s; trying again with tiles of %d cells",
                        tuple(picture.shape),
                        "no tiles" if size is None else f"tiles of {size}",
                        smaller,
                    )
                # Outside the handler: only now are the failed attempt's tensors free.
                if weight.device.type == "cuda":
                    torch.cuda.empty_cache()
            sizes = sizes[sizes.index(size) :]  # sizes that failed are not tried for the next picture
            pictures.append(done)
        return torch.cat(pictures)


def tile_sizes(rows: int, columns: int, downscale: int, tiling: str | int = "auto") -> tuple[int | None, ...]:
    """Edges in cells of the tiles to try in turn for a picture of rows x columns cells; None is the whole picture.

    tiling as in `VAE.decode`.
    """
    if tiling == "off":
        return (None,)
    largest = tiling if isinstance(tiling, int) else math.inf
    tiles = tuple(tile for tile in TILES if tile < max(rows, columns) and tile <= largest)
    large = rows * columns * downscale**2 > AUTO_PIXELS
    return tiles if tiles and (tiling != "auto" or large) else (None, *tiles)


def check_dtype(dtype: torch.dtype) -> None:
    """ValueError unless the VAE may run in `dtype` (fp32 or bf16)."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"VAE: expected torch.float32 or torch.bfloat16, found {dtype}; fp16 overflows in the decoder and gives "
            "NaN (black) pictures"
        )


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an edge of `length` cells: evenly spread, sharing at least `overlap`."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int, first: bool, last: bool) -> Tensor:
    """Weights (length,) of a tile along one axis: rising over `overlap` from a seam and falling towards one, level at
    both ends: of a tile's outermost pixels, which its padding changes, even a hundredth would show as a line."""
    distance = torch.arange(length) + 0.5
    rise = torch.full((length,), float(overlap)) if first else distance
    fall = torch.full((length,), float(overlap)) if last else distance.flip(0)
    return (torch.minimum(rise, fall).clamp(max=overlap) / overlap).mul(math.pi / 2).sin().square()


def tiled(function: Callable, x: Tensor, tile: int, overlap: int, cell_in: int, cell_out: int) -> Tensor:
    """Apply `function` to overlapping tiles of x (B, C, H, W) and blend the results, in fp32.

    tile, overlap: latent cells; cell_in, cell_out: pixels per cell before and after `function`.
    """
    rows, columns = x.shape[2] // cell_in, x.shape[3] // cell_in
    total = weights = x.new_zeros(0)  # allocated for the first tile's channels
    for top in _starts(rows, tile, overlap):
        for left in _starts(columns, tile, overlap):
            bottom, right = min(top + tile, rows), min(left + tile, columns)
            done = function(x[..., top * cell_in : bottom * cell_in, left * cell_in : right * cell_in]).float()
            down = _ramp(done.shape[2], overlap * cell_out, top == 0, bottom == rows)
            across = _ramp(done.shape[3], overlap * cell_out, left == 0, right == columns)
            weight = (down[:, None] * across[None, :]).to(done.device)
            if not total.numel():
                total = done.new_zeros(*done.shape[:2], rows * cell_out, columns * cell_out)
                weights = done.new_zeros(rows * cell_out, columns * cell_out)
            area = (..., slice(top * cell_out, bottom * cell_out), slice(left * cell_out, right * cell_out))
            total[area] += done * weight
            weights[area] += weight
    return total / weights


@torch.no_grad()
def decode_image(vae: VAE, latents: Tensor, tiling: str | int = "auto") -> Tensor:
    """Scaled latents (B, C, h, w) -> pictures (B, H, W, 3) fp32 in 0..1 on the VAE's device; see VAE.decode.

    Raises ValueError if the VAE gives NaN or infinity.
    """
    pictures = vae.decode(latents, tiling)
    check_finite(pictures, "VAE, decoding", "the VAE's file is damaged, download it again")
    return pictures.add_(1).div_(2).clamp_(0, 1).permute(0, 2, 3, 1).contiguous()
