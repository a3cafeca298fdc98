"""The sizes of a Z-Image transformer. Without torch, so that a file can be described quickly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

RANGES: dict[str, tuple[float, float]] = {
    "dim": (2, 2**16),
    "n_layers": (1, 1000),
    "n_refiner_layers": (0, 1000),
    "n_heads": (1, 2**12),
    "norm_eps": (1e-12, 1),
    "cap_feat_dim": (1, 2**16),
    "in_channels": (1, 2**12),
    "patch_size": (1, 64),
    "rope_theta": (1, 1e12),
    "t_scale": (1e-6, 1e6),
    "axes_dims": (2, 2**12),
    "axes_lens": (1, 2**31),
}
"""The smallest and largest value of each number of a config, well around every published model's."""


def check_numbers(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """ValueError unless every number of a config, a dataclass, is of its default's kind and within its range."""
    for field in fields(config):
        found, (low, high) = getattr(config, field.name), ranges[field.name]
        several = isinstance(field.default, tuple)
        real = isinstance(field.default, float)
        values = found if several and isinstance(found, tuple) else (found,)
        fit = (type(value) in ((int, float) if real else (int,)) and low <= value <= high for value in values)
        if several != isinstance(found, tuple) or not values or not all(fit):
            what = "a number" if real else "integers" if several else "an integer"
            raise ValueError(f"config: {field.name}: expected {what} from {low} to {high}, found {found!r}")


SHIFT = 3.0
"""Of Turbo's sigmas; a folder's scheduler_config.json may have another (6 for Z-Image)."""

PRESETS = {"turbo": (8, 0.0), "base": (30, 4.0)}
"""What a model was made for -> steps, guidance in diffusers' form (ComfyUI's cfg is 1 more)."""


@dataclass(frozen=True)
class ZImageConfig:
    """Sizes of the transformer; the defaults are Z-Image Turbo's.

    `axes_lens` is kept for the file's metadata only: angles are computed for any position.
    """

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    in_channels: int = 16
    patch_size: int = 2
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    def __post_init__(self) -> None:
        check_numbers(self, RANGES)
        for name in ("axes_dims", "axes_lens"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"config: {name}: expected three integers, found {getattr(self, name)}")
        if self.dim % self.n_heads or self.dim // self.n_heads != sum(self.axes_dims):
            raise ValueError(
                f"config: axes_dims {self.axes_dims} must add up to the head width {self.dim}/{self.n_heads}"
            )
        if any(d % 2 for d in self.axes_dims):
            raise ValueError(f"config: axes_dims {self.axes_dims} must be even, rotary angles turn pairs")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.in_channels

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A block's linears that are quantized, in the order of its forward pass: name -> (N, K)."""
        return {
            "attention.to_qkv": (3 * self.dim, self.dim),
            "attention.to_out": (self.dim, self.dim),
            "feed_forward.w3_w1": (2 * self.ffn_dim, self.dim),
            "feed_forward.w2": (self.dim, self.ffn_dim),
        }


@dataclass(frozen=True)
class ControlNetConfig:
    """Sizes of a Fun ControlNet: those of the `base` that it was made for, and its own.

    places: the base's layers whose results take a hint, one for each layer of the ControlNet. channels: of the
    control context, 16 or 33. refiner, what happens beside the base's noise refiner: "alone" (v1: plain blocks, no
    hints), "layers" (2.0: the ControlNet's layers give hints there too) or "hints" (2.1: control blocks of its own).
    """

    base: ZImageConfig = ZImageConfig()
    places: tuple[int, ...] = tuple(range(0, 30, 2))
    channels: int = 33
    refiner: str = "hints"

    def __post_init__(self) -> None:
        if not self.places or list(self.places) != sorted(set(self.places)) or self.places[-1] >= self.base.n_layers:
            raise ValueError(f"config: places {self.places} must be ascending layers of the {self.base.n_layers}")
        if self.refiner not in ("alone", "layers", "hints"):
            raise ValueError(f"config: refiner {self.refiner!r} must be alone, layers or hints")
        if self.refiner == "layers" and len(self.places) < self.base.n_refiner_layers:
            raise ValueError(f"config: {len(self.places)} layers are fewer than {self.base.n_refiner_layers} refiners")

    @property
    def patch_dim(self) -> int:
        return self.base.patch_size**2 * self.channels
