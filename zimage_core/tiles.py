"""Sampling in tiles: pictures larger than the model was trained for, as overlapping parts of one noise.

At each step the model predicts the flow of every tile, and the flows are blended where tiles overlap, so that all of
them go towards one picture. Source: MultiDiffusion, arXiv 2302.08113. Units: latents' cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .models.transformer import Conditioning

ALIGN = 2  # cells of a patch
OVERLAP = 4  # a tile's edge is at least so many times its overlap with the next


@dataclass(frozen=True)
class Tiles:
    """A grid of tiles of one size over latents of height x width; every tile ends within."""

    height: int
    width: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def over(cls, height: int, width: int, most: int) -> Tiles:
        """The fewest tiles of up to `most` by `most` cells, at least a quarter of which overlaps the next one."""
        tall, wide = min(height, most), min(width, most)
        return cls(tall, wide, _starts(height, tall), _starts(width, wide))

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top and left of each."""
        return [(top, left) for top in self.rows for left in self.columns]

    def part(self, whole: Tensor, top: int, left: int) -> Tensor:
        """A tile of (B, C, h, w)."""
        return whole[..., top : top + self.height, left : left + self.width]

    def weights(self) -> Tensor:
        """(height, width) fp32: from 0 at the edges to 1 over the overlap, level at both, so that no line shows."""
        down, across = (_ramp(edge) for edge in (self.height, self.width))
        return down[:, None] * across

    def model(
        self,
        model: Callable[[Tensor, Tensor, Conditioning], Tensor],
        place: Callable[[Conditioning, int, int], Conditioning] = lambda cond, top, left: cond,
    ) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """`model` for whole latents, with conditionings for one tile; place(cond, top, left) has those of another."""

        def run(latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            weights = self.weights().to(latents.device)
            total = torch.zeros_like(latents)
            share = torch.zeros_like(latents[:1, :1])
            for top, left in self.corners:
                found = model(self.part(latents, top, left).contiguous(), t, place(cond, top, left))
                self.part(total, top, left).add_(found * weights)
                self.part(share, top, left).add_(weights)
            return total.div_(share)

        return run


def _starts(length: int, tile: int) -> tuple[int, ...]:
    """Where the tiles of an edge begin, evenly spaced."""
    free = length - tile
    count = math.ceil(free / (tile - tile // OVERLAP)) if free else 0
    return tuple(round(free * i / count / ALIGN) * ALIGN for i in range(count)) + (free,)


def _ramp(edge: int) -> Tensor:
    position = torch.arange(edge, dtype=torch.float32) + 0.5
    return (torch.minimum(position, edge - position) / (edge // OVERLAP)).clamp(max=1).mul(math.pi / 2).sin().square()
