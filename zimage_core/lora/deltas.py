"""What a LoRA file changes in one module: a `Delta` for each format, linear in the strength.

A delta D acts as strength * (merged(W) - W):

    LoRA, LoCon   W + s up down                    low rank; pairs of all files are concatenated (see `adapters`)
    LoHa          W + s (a1 b1) * (a2 b2)          exactly low rank (r1 r2) where that is cheaper, else dense
    LoKr          W + s w1 (x) w2                  factored, never expanded
    DoRA          m (W + D) / |W + D|              a diagonal on the output or the input, beside D's own form
    OFT           blockdiag(R) W                   block-diagonal on the output
    diff, diff_b  W + D, b + D                     dense: costs the linear's memory and time once more in 16 bits

s = alpha / rank where the file has alpha, else 1. DoRA divides by the norm of the changed weight, as the paper, PEFT
and LyCORIS do. Norms and pad tokens, which are no linears, take diff only and hold the sum.

Legend: N out, K in, r rank, W (N, K) a linear's weight.
Sources: LoRA arXiv:2106.09685, DoRA arXiv:2402.09353; KohakuBlueleaf/LyCORIS `lycoris/functional@4.1.3` for LoHa, LoKr
and diagonal OFT; huggingface/peft `tuners@v0.21.2`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats.names import FUSED_PARTS
from ..formats.safetensors import Shape
from ..linear.adapters import Carrier, Rows

Size = tuple[int | None, int | None]
"""(N, K) of a change; None where any fits."""

FORMATS = {  # the tensors of each format, any of the alternatives
    "LoRA": (("down", "up"),),
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "LoKr": (
        ("lokr_w1", "lokr_w2"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    ),
    "OFT": (("oft_blocks",),),
    "diff": (("diff",),),
    "diff_b": (("diff_b",),),
}
OPTIONAL = {"LoRA": "up_bias", "OFT": "rescale"}
FORMAT_OF = {leaf: name for name, sets in FORMATS.items() for leaves in sets for leaf in leaves}
FORMAT_OF |= {leaf: name for name, leaf in OPTIONAL.items()}


@dataclass(frozen=True, eq=False)
class Delta:
    """A change of a linear's weight, or of some rows of it; tensors as stored, on the host."""

    key: str  # the module as the file names it
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    part: str | None = None
    magnitude: Tensor | None = None
    gains: weakref.WeakKeyDictionary[Carrier, Tensor] = field(default_factory=weakref.WeakKeyDictionary, repr=False)

    def size(self) -> Size:
        """Of the weights that it changes."""
        raise NotImplementedError

    def pair(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """down (r, K) and up (N, r), scaled, in fp32; None where the change is not of low rank."""
        return None

    def matrix(self, device: torch.device) -> Tensor:
        """The whole change (N, K), scaled, in fp32."""
        raise NotImplementedError

    def get(self, leaf: str, device: torch.device) -> Tensor:
        return self.tensors[leaf].to(device).float()


class LoRA(Delta):
    def size(self) -> Size:
        return self.tensors["up"].shape[0], self.tensors["down"].shape[1]

    def pair(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.get("down", device), self.get("up", device) * self.scale

    def matrix(self, device: torch.device) -> Tensor:
        down, up = self.pair(device)
        return up @ down


def loha_is_low_rank(a1: Shape, b1: Shape, a2: Shape, b2: Shape) -> bool:
    """Whether factors of these shapes cost less as a low-rank pair than as a dense matrix."""
    n, k, rank = a1[0], b1[1], a1[1] * a2[1]
    return rank * (n + k) < n * k


class LoHa(Delta):
    def size(self) -> Size:
        return self.tensors["hada_w1_a"].shape[0], self.tensors["hada_w1_b"].shape[1]

    def pair(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(a1 b1) * (a2 b2) has as up and down all products of a column of a1 and one of a2, and likewise of rows."""
        factors = [self.get(leaf, device) for leaf in FORMATS["LoHa"][0]]
        if not loha_is_low_rank(*(f.shape for f in factors)):
            return None
        a1, b1, a2, b2 = factors
        return (b1[:, None] * b2).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1) * self.scale

    def matrix(self, device: torch.device) -> Tensor:
        a1, b1, a2, b2 = (self.get(leaf, device) for leaf in FORMATS["LoHa"][0])
        return (a1 @ b1) * (a2 @ b2) * self.scale


class LoKr(Delta):
    def size(self) -> Size:
        w1, up, down = self.factors(torch.device("cpu"))
        return w1.shape[0] * up.shape[0], w1.shape[1] * (up if down is None else down).shape[1]

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """w1 (a, b), scaled, up (N/a, r) and down (r, K/b); down None where w2 (N/a, K/b) is whole."""
        whole = "lokr_w1" in self.tensors
        w1 = self.get("lokr_w1", device) if whole else self.get("lokr_w1_a", device) @ self.get("lokr_w1_b", device)
        if "lokr_w2" in self.tensors:
            return w1 * self.scale, self.get("lokr_w2", device), None
        return w1 * self.scale, self.get("lokr_w2_a", device), self.get("lokr_w2_b", device)

    def matrix(self, device: torch.device) -> Tensor:
        w1, up, down = self.factors(device)
        return torch.kron(w1, up if down is None else up @ down)


class Diff(Delta):
    def size(self) -> Size:
        shape = self.tensors["diff"].shape
        return (shape[0], shape[1]) if len(shape) == 2 else (None, None)

    def matrix(self, device: torch.device) -> Tensor:
        return self.get("diff", device)


class Bias(Delta):
    def size(self) -> Size:
        return self.tensors["diff_b"].shape[0], None


class OFT(Delta):
    """scale is the limit of the rotation's norm per output channel, 0 for none."""

    def size(self) -> Size:
        return math.prod(self.tensors["oft_blocks"].shape[:2]), None

    def blocks(self, device: torch.device) -> Tensor:
        """R - 1 (blocks, size, size) as `adapters.transform` takes it: [block, from, to]."""
        blocks = self.get("oft_blocks", device)
        skew = blocks - blocks.transpose(1, 2)
        limit, norm = self.scale * math.prod(blocks.shape[:2]), skew.norm() + 1e-8
        if limit > 0:
            skew = torch.where(norm > limit, skew * (limit / norm), skew)
        one = torch.eye(blocks.shape[1], device=device)
        rotation = torch.linalg.solve(one - skew, one + skew, left=False)  # (1 + Q) (1 - Q)^-1, [block, from, to]
        if "rescale" in self.tensors:
            rotation = rotation * self.get("rescale", device).view(len(blocks), 1, -1)
        return rotation - one


KINDS: Mapping[str, type[Delta]] = {"LoRA": LoRA, "LoHa": LoHa, "LoKr": LoKr, "OFT": OFT, "diff": Diff, "diff_b": Bias}


def span(delta: Delta, target: str, out_features: int) -> Rows:
    """The rows of the model's linear that a change is for."""
    for module, parts in FUSED_PARTS.items():
        if delta.part is not None and target.endswith(module):
            size = out_features // len(parts)
            start = parts.index(delta.part) * size
            return start, start + size
    return 0, out_features
