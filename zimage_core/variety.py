"""More different pictures from different seeds: prompts whose features are perturbed while a picture's layout forms.

Turbo makes nearly the same picture of a prompt from every seed. Each picture's first steps follow features with noise
of its own, the others the prompt as it is, as ComfyUI's and InvokeAI's seed variance nodes have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .failures import within

MAX_STRENGTH = 100


@dataclass(frozen=True)
class Variety:
    """strength: the noise on a feature, in root mean squares of its token; 0 is off. share: of the features that get
    any. until: the part of the way from noise (0) to picture (1) in which it works. ValueError outside of these."""

    strength: float
    share: float = 0.5
    until: float = 0.5

    def __post_init__(self) -> None:
        within("variety", self.strength, 0, MAX_STRENGTH, "0 is off, 2 to 8 are usual")
        within("variety's share", self.share, 0, 1, above=True)
        within("variety's end", self.until, 0, 1, above=True)

    def vary(self, feats: Tensor, seed: int) -> Tensor:
        """Features (L, C) with the noise of a seed, uniform to both sides, on the host as the seed's own is."""
        generator = torch.Generator("cpu").manual_seed(seed)
        noise, chosen = torch.rand((2, *feats.shape), generator=generator)
        noise = self.strength * (2 * noise - 1) * (chosen < self.share)
        plain = feats.float().cpu()
        return (plain + noise * plain.square().mean(-1, keepdim=True).sqrt()).to(feats)


def seed_of(noise: Tensor) -> int:
    """A seed computed from a picture's starting noise (C, h, w) fp32, so that given latents have one, too."""
    return abs(int(noise.flatten()[:2].contiguous().view(torch.int64))) % 2**63
