"""Normalized attention guidance: a negative prompt that steers each layer's attention, for models without guidance.

The negative caption's tokens run through the layers behind the positive one's. Image tokens attend to themselves and
either caption; from the two results follows what they go on with, away from the negative one, by no more than a norm
allows. What that costs is the second attention and the caption's tokens.

Source: Chen et al., "Normalized Attention Guidance", arXiv 2505.21179; its scale is 1 more than the one here, as in its
code and ComfyUI's NAGuidance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..failures import number, within
from .attention import Attend

if TYPE_CHECKING:
    from .transformer import Conditioning

MAX_SCALE = 100


@dataclass(frozen=True)
class Nag:
    """How far to go from the negative caption.

    scale s: positive + s (positive - negative). tau: how many times the positive's L1 norm the result may have. alpha:
    its share, the rest is the positive. tokens: those of the negative caption, at a conditioning's end. ValueError for
    numbers outside 0..100, 1.. and 0..1.
    """

    scale: float
    tau: float = 2.5
    alpha: float = 0.5
    tokens: int = 0

    def __post_init__(self) -> None:
        within("nag scale", self.scale, 0, MAX_SCALE, "0 is off, 0.5 to 4 are usual")
        if number("nag tau", self.tau) < 1:
            raise ValueError(f"nag tau: expected 1 or more, found {self.tau}; 2.5 is usual")
        within("nag alpha", self.alpha, 0, 1, "0.5 is usual")

    def blend(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The attention's result (B, L, D) from those for either caption."""
        guided = torch.lerp(negative, positive, 1 + self.scale)
        norm, limit = (y.float().norm(p=1, dim=-1, keepdim=True) for y in (guided, positive))
        guided *= (self.tau * limit / norm).nan_to_num(1).clamp(max=1).to(guided.dtype)
        return torch.lerp(positive, guided, self.alpha)

    def attention(self, attend: Attend, image: int) -> Attend:
        """`attend` for tokens [image, positive caption, negative caption], of which the first `image` are guided."""
        return functools.partial(self._attend, attend, image)

    def _attend(self, attend: Attend, image: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        end = q.shape[1] - self.tokens
        seen = None if mask is None else mask[..., :end]
        positive = attend(q[:, :end], k[:, :end], v[:, :end], seen)
        seen = None if mask is None else torch.cat((mask[..., :image], mask[..., end:]), dim=-1)
        q, k, v = (torch.cat((y[:, :image], y[:, end:]), dim=1) for y in (q, k, v))
        negative = attend(q, k, v, seen)
        blended = self.blend(positive[:, :image], negative[:, :image])
        return torch.cat((blended, positive[:, image:], negative[:, image:]), dim=1)


def guide(
    cond: Conditioning, negative: Conditioning, nag: Nag, angles: Callable[[Tensor], tuple[Tensor, ...]]
) -> Conditioning:
    """A conditioning with the negative caption behind its own; both are prepared for one size.

    angles: positions (..., 3) -> cos, sin. Rotary positions count by their differences: the negative caption gets those
    that put it as far from the image as where it was prepared alone.
    """
    image, length, tokens = cond.image_tokens, cond.context.shape[1], negative.context.shape[1]
    batch = max(len(cond.context), len(negative.context))
    positions = torch.zeros(batch, tokens, 3, dtype=torch.float64)
    positions[..., 0] = (
        torch.arange(1, tokens + 1) + torch.tensor(cond.lengths)[:, None] - torch.tensor(negative.lengths)[:, None]
    )
    cos, sin = (y.to(cond.cos.device) for y in angles(positions))
    mask = None
    if cond.mask is not None or negative.mask is not None:
        masks = [
            torch.ones(batch, 1, 1, count, dtype=torch.bool, device=cond.context.device)
            if part.mask is None
            else part.mask[..., image:].expand(batch, -1, -1, -1)
            for part, count in ((cond, length), (negative, tokens))
        ]
        mask = F.pad(torch.cat(masks, dim=-1), (image, 0), value=True)
    context, own_cos, own_sin = (y.expand(batch, *y.shape[1:]) for y in (cond.context, cond.cos, cond.sin))
    return replace(
        cond,
        context=torch.cat((context, negative.context.expand(batch, -1, -1)), dim=1),
        cos=torch.cat((own_cos, cos), dim=1),
        sin=torch.cat((own_sin, sin), dim=1),
        mask=mask,
        nag=replace(nag, tokens=tokens),
    )
