"""The sizes of a Z-Image transformer. Without torch, so that a file can be described quickly."""

from __future__ import annotations

from dataclasses import dataclass


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
