"""Fun ControlNets for Z-Image: blocks beside the base that turn a control picture into hints for its hidden state.

A ControlNet has an embedder for the control context, blocks like the base's, and a projection of each block's result,
the hint, which is added behind one of the base's blocks. All hints of a stage follow from the base's tokens at its
start, so a ControlNet block may run just before the base's block that its hint belongs to, and only one hint exists
at a time.

Variants, by what happens beside the base's noise refiner: in v1 the control tokens pass two plain blocks alone, in
2.1 (and lite) two control blocks give hints there too, in 2.0 all control layers do so before they run a second time.

Arithmetic: aigc-apps/VideoX-Fun `videox_fun/models/z_image_transformer2d_control.py` and
`videox_fun/pipeline/pipeline_z_image_control.py` @804a4258, the trainer's own code.

Legend: B batch, L image tokens, D width, C control channels, h x w the latents' size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear.adapters import Linear
from . import ops
from .attention import Attend, sdpa
from .config import ControlNetConfig
from .transformer import Block, BlockModel, Conditioning, LinearFactory, RunBlock, ZImageTransformer, patchify

MASKED_CHANNELS = 33  # control latents, mask, inpainting latents


class ControlBlock(Block):
    """A block that also gives a hint; the first of a stack takes the base's tokens in."""

    def __init__(self, config: ControlNetConfig, linear: LinearFactory, first: bool):
        super().__init__(config.base, linear, modulated=True)
        dim = config.base.dim
        self.before_proj = linear(dim, dim, True) if first else None
        self.after_proj = linear(dim, dim, True)

    def forward(  # type: ignore[override]  # a pair, not only the tokens that go on
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        t_emb: Tensor | None = None,
        attend: Attend = sdpa,
        base: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Control tokens x (1 or B, L, D), in the first block with the base's (B, L, D) -> next x, hint (B, L, D)."""
        if self.before_proj is not None:
            x = self.before_proj(self._narrow(x)) + base
        x = super().forward(x, cos, sin, mask, t_emb, attend)
        return x, self.after_proj(self._narrow(x))

    def _narrow(self, x: Tensor) -> Tensor:
        """From the residual stream's dtype to the linears'; in fp16 that can saturate, as in `ops.finite`."""
        dtype = self.attention_norm1.weight.dtype
        return ops.finite(x, dtype).to(dtype)


class ControlNet(BlockModel):
    """The model. `linear(in, out, bias)` builds the blocks' linears, `refiner_linear` the refiner's if given."""

    def __init__(
        self,
        config: ControlNetConfig,
        linear: LinearFactory = Linear,
        refiner_linear: LinearFactory | None = None,
    ):
        super().__init__()
        self.config = config
        refiner_linear = refiner_linear or linear
        self.x_embedder = Linear(config.patch_dim, config.base.dim)
        refiner: list[Block] = []
        if config.refiner == "alone":
            refiner = [Block(config.base, refiner_linear, True) for _ in range(config.base.n_refiner_layers)]
        elif config.refiner == "hints":
            refiner = [ControlBlock(config, refiner_linear, first=not i) for i in range(config.base.n_refiner_layers)]
        self.noise_refiner = nn.ModuleList(refiner)
        self.layers = nn.ModuleList(ControlBlock(config, linear, first=not i) for i in range(len(config.places)))

    @property
    def blocks(self) -> list[Block]:
        """All blocks in the order in which they run."""
        return [*self.noise_refiner, *self.layers]

    def check(self, base: ZImageTransformer) -> None:
        """ValueError for a base of another width or depth than the ControlNet's own."""
        ours, theirs = self.config.base, base.config
        if (ours.dim, ours.n_heads, ours.n_layers) != (theirs.dim, theirs.n_heads, theirs.n_layers):
            raise ValueError(
                f"ControlNet: made for a model of width {ours.dim} with {ours.n_layers} layers, this one has width "
                f"{theirs.dim} and {theirs.n_layers}; use the ControlNet of this model"
            )

    def prepare(
        self,
        context: Tensor,
        base: ZImageTransformer,
        cond: Conditioning,
        strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
    ) -> PreparedControl:
        """Embed a control context (1 or B, C, h, w), see `control_context`, for pictures of a base's conditioning.

        ValueError for a base that `check` refuses, or a context of another size.
        """
        self.check(base)
        h, w = (cells * base.config.patch_size for cells in cond.grid)
        if context.ndim != 4 or context.shape[1:] != (self.config.channels, h, w):
            raise ValueError(
                f"control context: expected (batch, {self.config.channels}, {h}, {w}), found {tuple(context.shape)}"
            )
        return PreparedControl(self, self.embed(context, base.x_pad_token, cond.image_tokens), strength, start, end)

    def embed(self, context: Tensor, pad_token: Tensor, tokens: int) -> Tensor:
        """Tokens (1 or B, L, D) of a control context, padded with the base's token to L = `tokens`."""
        weight = self.x_embedder.weight
        found = self.x_embedder(patchify(context.to(weight.device, weight.dtype), self.config.base.patch_size))
        pads = tokens - found.shape[1]
        return torch.cat((found, pad_token.to(found).expand(len(found), pads, -1)), dim=1) if pads else found


@dataclass(frozen=True, eq=False)
class PreparedControl:
    """A control picture as a ControlNet takes it, for one size: tokens (1 or B, L, D) in the weights' dtype.

    strength multiplies every hint. start, end: the part of the way from noise (0) to picture (1) in which it works.
    """

    net: ControlNet
    tokens: Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def begin(self, run_block: RunBlock) -> ControlRun:
        """Its pass through one step."""
        return ControlRun(self, run_block)


class ControlRun:
    """The pass of one ControlNet through one step of the base, which calls it as its own blocks go on."""

    def __init__(self, control: PreparedControl, run_block: RunBlock):
        self.net, self.c, self.strength = control.net, control.tokens, control.strength
        self._run_block = run_block

    def enter_refiner(self, x: Tensor, args: tuple) -> None:
        """Take in the base's tokens x (B, L, D) before its noise refiner; args are those of its blocks."""
        config = self.net.config
        if config.refiner == "alone":
            self.c = self.c.to(x.dtype).expand(len(x), -1, -1)
            for i, block in enumerate(self.net.noise_refiner):
                self.c = self._run_block("control_noise_refiner", i, block, self.c, *args)
            self._enter("noise_refiner", (), (), x, args)
        elif config.refiner == "layers":
            self._enter("layers", self.net.layers, range(config.base.n_refiner_layers), x, args)
        else:
            self._enter("noise_refiner", self.net.noise_refiner, range(config.base.n_refiner_layers), x, args)

    def enter_layers(self, x: Tensor, args: tuple) -> None:
        """Likewise before its layers; these tokens x (B, L + Lc, D) end with the caption's."""
        while self._next < len(self._blocks):  # 2.0: its later layers change the control tokens all the same
            self._run_next()
        self.c = torch.cat((self.c, x[:, self.c.shape[1] :].to(self.c.dtype)), dim=1)
        self._enter("layers", self.net.layers, self.net.config.places, x, args)

    def add_hint(self, index: int, x: Tensor) -> Tensor:
        """The result x of the base's block `index` of the stage, with this ControlNet's hint if one belongs there."""
        hint = self.hint(index)
        return x if hint is None else torch.add(x, hint, alpha=self.strength)

    def hint(self, index: int) -> Tensor | None:
        """What belongs to the result of the base's block `index`, before the strength; each is made once, in order."""
        return self._run_next() if index in self._places else None

    def _enter(self, stage: str, blocks: Iterable[nn.Module], places: Sequence[int], x: Tensor, args: tuple) -> None:
        self._stage, self._blocks, self._places, self._args = f"control_{stage}", list(blocks), places, args
        self._start: tuple[Tensor, ...] = (x,) if self._blocks else ()  # as large as c, dropped with the first block
        self._next = 0

    def _run_next(self) -> Tensor:
        """The hint of the stack's next block."""
        start, self._start = self._start, ()
        block = self._blocks[self._next]
        self.c, hint = self._run_block(self._stage, self._next, block, self.c, *self._args, *start)
        self._next += 1
        return hint


def run_order(base: ZImageTransformer, nets: Sequence[ControlNet]) -> list[nn.Module]:
    """The blocks of a base and the ControlNets beside it in the order in which they run in a step."""
    found: list[nn.Module] = [*base.context_refiner]
    for net in nets:
        found += net.noise_refiner if net.config.refiner == "alone" else ()
    for i, block in enumerate(base.noise_refiner):
        found += [block, *(net.noise_refiner[i] for net in nets if net.config.refiner == "hints")]
    layers = [iter(net.layers) for net in nets]
    for i, block in enumerate(base.layers):
        found += [block, *(next(own) for own, net in zip(layers, nets) if i in net.config.places)]
    return found


def inpainting_picture(image: Tensor, mask: Tensor) -> Tensor:
    """image (B, 3, H, W) in -1..1 with what mask (B, 1, H, W), from 0.5 on, has repainted made gray, to be encoded."""
    return image * (mask < 0.5)


def control_context(
    channels: int,
    size: tuple[int, int],
    control: Tensor | None = None,
    inpaint: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The control context (B, channels, h, w) in fp32 from latents (B, 16, h, w) and a mask in pixels.

    control: latents of the control picture, none are zeros. inpaint: latents of `inpainting_picture`, and mask
    (B, 1, H, W), 1 where it is to be repainted; only for the 33-channel forms, whose mask channel is 1 where the
    picture is kept and 0 everywhere without one. ValueError for a mask where there is no channel for it.
    """
    given = [tensor for tensor in (control, inpaint, mask) if tensor is not None]
    batch = max((len(tensor) for tensor in given), default=1)
    device = given[0].device if given else None
    empty = torch.zeros(batch, 16, *size, device=device)
    control = empty if control is None else control.float().expand(batch, -1, -1, -1)
    if channels != MASKED_CHANNELS:
        if inpaint is not None or mask is not None:
            raise ValueError(
                f"this ControlNet takes {channels} channels and no mask; use a 33-channel one (2.0 and later), "
                "or inpaint without a ControlNet"
            )
        return control
    if mask is None:
        keep = empty[:, :1]
    else:
        keep = F.interpolate(1 - (mask >= 0.5).float(), size=size, mode="nearest").expand(batch, -1, -1, -1)
    inpaint = empty if inpaint is None else inpaint.float().expand(batch, -1, -1, -1)
    return torch.cat((control, keep, inpaint), dim=1)
