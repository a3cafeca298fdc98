"""The Z-Image transformer: a single-stream DiT over image and caption tokens, from noise latents to flow.

What depends on the prompt and the size alone (caption embedding, context refiner, rotary angles, masks) is
computed once by `ZImageTransformer.prepare`; a step then runs patchify -> noise refiner -> join -> layers ->
unpatchify. The blocks' linears come from a factory, so that one class serves dense and quantized weights.

Architecture: Tongyi-MAI/Z-Image `src/zimage/transformer.py` and huggingface/diffusers
`models/transformers/transformer_z_image.py@v0.42.1`, whose outputs and signs this module reproduces.

Legend: B batch, L tokens, C caption width, D width, H heads, K head width, h x w the grid of 2 x 2 patches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear.adapters import Adapted, Linear
from ..linear.svdq import smoothing
from ..sizes import round_up
from . import ops
from .attention import Attend, sdpa
from .config import ZImageConfig
from .guidance import Nag, guide

if TYPE_CHECKING:
    from ..linear.backends import Backend
    from .controlnet import PreparedControl

TOKENS_MULTIPLE = 32
ADALN_WIDTH = 256
T_EMBED_HIDDEN = 1024
PIXELS_PER_CELL = 8

LinearFactory = Callable[[int, int, bool], nn.Module]
RunBlock = Callable[..., Tensor]


@dataclass(frozen=True)
class Conditioning:
    """A prompt prepared for the steps at one size; valid only for the weights that it was prepared with.

    context (Bc, Lc, D): refined caption tokens, Bc is 1 or the batch. cos, sin (Bc, L, 1, K/2) fp32: rotary
    angles of [image, caption] tokens, L = image_tokens + Lc. mask (Bc, 1, 1, L) bool or None where all
    captions have the same padded length. grid: (h, w). lengths: each caption's, padded alone. controls: the ControlNets
    that add to each step. nag: how attention is guided, where the last tokens of a caption are a negative one's.
    """

    context: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    grid: tuple[int, int]
    image_tokens: int
    lengths: tuple[int, ...] = ()
    controls: tuple[PreparedControl, ...] = ()
    nag: Nag | None = None


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, tokens, patch * patch * C), row by row; within a token rows, columns, channels."""
    cells = pixels.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # (B, C, h, p, w, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def rope_angles(positions: Tensor, config: ZImageConfig) -> tuple[Tensor, Tensor]:
    """positions (..., 3) -> cos, sin (..., 1, K/2) fp32; the 1 broadcasts over heads."""
    angles = []
    for axis, dim in enumerate(config.axes_dims):
        inv = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append((positions[..., axis, None].double() * inv).float())
    angle = torch.cat(angles, dim=-1).unsqueeze(-2)
    return angle.cos(), angle.sin()


def run_block(stage: str, index: int, block: nn.Module, x: Tensor, *args: object) -> Tensor:
    """Run one block; stage is "context_refiner", "noise_refiner" or "layers", a ControlNet's begin with "control_"."""
    return block(x, *args)


@dataclass(frozen=True)
class Hooks:
    """Functions and positions that a caller may replace; the defaults are the model's own.

    run_block replaces the function of that name (its args: cos, sin, mask, t_emb or None, attention), attention
    that of every block. rope = (row scale, row shift, column scale, column shift) of the image's rotary positions.
    """

    run_block: Callable[..., Tensor] = run_block
    attention: Attend | None = None
    rope: tuple[float, float, float, float] | None = None


class RMSNorm(nn.Module):
    """Root-mean-square norm; blocks pass its weight to `ops`, which fuses it with what follows."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.weight.dtype)


class Attention(nn.Module):
    """Self-attention with fused q/k/v rows, normed q and k, rotary positions."""

    ops = ops.TORCH

    def __init__(self, config: ZImageConfig, linear: LinearFactory):
        super().__init__()
        self.heads = config.n_heads
        self.to_qkv = linear(config.dim, 3 * config.dim, False)
        self.to_out = linear(config.dim, config.dim, False)
        self.norm_q = RMSNorm(config.head_dim, eps=1e-5)
        self.norm_k = RMSNorm(config.head_dim, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, attend: Attend = sdpa) -> Tensor:
        qkv = self.to_qkv(x).view(*x.shape[:-1], 3, self.heads, -1)  # (B, L, 3, H, K)
        q, k, v = self.ops.norm_rope(qkv, self.norm_q.weight, self.norm_k.weight, self.norm_q.eps, cos, sin)
        return self.to_out(attend(q, k, v, mask))


class FeedForward(nn.Module):
    """SwiGLU; the fused rows hold w3 (values) before w1 (gates)."""

    ops = ops.TORCH

    def __init__(self, config: ZImageConfig, linear: LinearFactory):
        super().__init__()
        self.w3_w1 = linear(config.dim, 2 * config.ffn_dim, False)
        self.w2 = linear(config.ffn_dim, config.dim, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.ops.swiglu(self.w3_w1(x), *smoothing(self.w2, x)))


class Block(nn.Module):
    """One transformer block; without modulation (the context refiner) it never sees t.

    In fp16 the residual stream x and what is added to it stay fp32, see `ops.finite`.
    """

    ops = ops.TORCH

    def __init__(self, config: ZImageConfig, linear: LinearFactory, modulated: bool):
        super().__init__()
        self.attention = Attention(config, linear)
        self.feed_forward = FeedForward(config, linear)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        if modulated:
            width = min(config.dim, ADALN_WIDTH)
            self.adaLN_modulation = nn.Sequential(Linear(width, 4 * config.dim))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        t_emb: Tensor | None = None,
        attend: Attend = sdpa,
    ) -> Tensor:
        """x (B, L, D), t_emb (1 or B, 256) or None -> (B, L, D)."""
        scale_attn = gate_attn = scale_ffn = gate_ffn = None
        if t_emb is not None:
            modulation = self.adaLN_modulation(t_emb).unsqueeze(1)
            scale_attn, gate_attn, scale_ffn, gate_ffn = modulation.chunk(4, dim=-1)
        eps, coded = self.attention_norm1.eps, smoothing(self.attention.to_qkv, x)
        h = self.ops.norm_scale(x, self.attention_norm1.weight, eps, scale_attn, *coded)
        h = self.attention(h, cos, sin, mask, attend)
        norms, coded = (self.attention_norm2.weight, self.ffn_norm1.weight), smoothing(self.feed_forward.w3_w1, x)
        x, h = self.ops.add_norm_scale(x, h, *norms, eps, gate_attn, scale_ffn, *coded)
        return self.ops.norm_gate_add(x, self.feed_forward(h), self.ffn_norm2.weight, eps, gate_ffn)


class TimestepEmbedder(nn.Module):
    """t in 0..1000 -> (B, 256)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(ADALN_WIDTH, T_EMBED_HIDDEN), nn.SiLU(), Linear(T_EMBED_HIDDEN, width))

    def forward(self, t: Tensor) -> Tensor:
        half = ADALN_WIDTH // 2
        freqs = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        args = t.float()[:, None] * freqs
        return self.mlp(torch.cat((args.cos(), args.sin()), dim=-1).to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    """LayerNorm scaled by t, then tokens -> patches."""

    def __init__(self, config: ZImageConfig):
        super().__init__()
        self.linear = Linear(config.dim, config.patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(min(config.dim, ADALN_WIDTH), config.dim))

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        scale = 1 + self.adaLN_modulation(t_emb).unsqueeze(1)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype)
        return self.linear(normed * scale)


class BlockModel(Adapted):
    """A model of blocks, whose quantized linears all have one backend."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: Backend | None = None

    def use(self, chosen: ops.Ops) -> None:
        """Set the functions that every block runs between its linears."""
        for module in self.modules():
            if isinstance(module, Attention | FeedForward | Block):
                module.ops = chosen


class ZImageTransformer(BlockModel):
    """The model. `linear(in, out, bias)` builds the blocks' linears, `refiner_linear` the refiners' if given."""

    def __init__(
        self,
        config: ZImageConfig,
        linear: LinearFactory = Linear,
        refiner_linear: LinearFactory | None = None,
    ):
        super().__init__()
        self.config = config
        self.attention: Attend = sdpa
        self.checkpoint: Any = None  # what its file said: `formats.identify.ModelInfo`
        refiner_linear = refiner_linear or linear
        t_width = min(config.dim, ADALN_WIDTH)
        self.x_embedder = Linear(config.patch_dim, config.dim)
        self.t_embedder = TimestepEmbedder(t_width)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), Linear(config.cap_feat_dim, config.dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.noise_refiner = nn.ModuleList(Block(config, refiner_linear, True) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(
            Block(config, refiner_linear, False) for _ in range(config.n_refiner_layers)
        )
        self.layers = nn.ModuleList(Block(config, linear, True) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)

    @property
    def blocks(self) -> list[Block]:
        """All blocks in the order in which they run."""
        return [*self.context_refiner, *self.noise_refiner, *self.layers]

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.weight.device

    def _stream(self, x: Tensor) -> Tensor:
        return x.float() if x.dtype is torch.float16 else x

    def prepare(
        self,
        cap_feats: Sequence[Tensor],
        height: int,
        width: int,
        hooks: Hooks = Hooks(),
    ) -> Conditioning:
        """The Conditioning for all steps: embedded and refined captions, rotary angles, mask.

        cap_feats: one (L, C) for the whole batch, or one per picture. height, width in pixels, divisible by 16.
        """
        cell = PIXELS_PER_CELL * self.config.patch_size
        if height % cell or width % cell or height <= 0 or width <= 0:
            raise ValueError(f"size {width} x {height}: width and height must be positive multiples of {cell} pixels")
        for feats in cap_feats:
            if feats.ndim != 2 or feats.shape[1] != self.config.cap_feat_dim or not len(feats):
                raise ValueError(
                    f"cap_feats: expected (tokens, {self.config.cap_feat_dim}), found {tuple(feats.shape)}; "
                    "use the text encoder that this model was made for"
                )
        grid = (height // cell, width // cell)
        image_tokens = round_up(grid[0] * grid[1], TOKENS_MULTIPLE)
        lengths = [round_up(len(feats), TOKENS_MULTIPLE) for feats in cap_feats]
        longest = max(lengths)

        angles = self._angles(tuple(lengths), grid, image_tokens, hooks.rope, self.config)
        cos, sin = (y.to(self.device) for y in angles)
        mask = None
        if min(lengths) < longest:
            valid = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]  # (Bc, Lc)
            mask = F.pad(valid, (image_tokens, 0), value=True)[:, None, None].to(self.device)

        embedded = self.cap_embedder(
            torch.cat([ops.finite(f, self.dtype).to(self.device, self.dtype) for f in cap_feats])
        )
        context = self.cap_pad_token.expand(len(lengths), longest, -1).clone()
        for i, feats in enumerate(embedded.split([len(f) for f in cap_feats])):
            context[i, : len(feats)] = feats
        context = self._stream(context)
        caption_mask = None if mask is None else mask[..., image_tokens:]
        args = (cos[:, image_tokens:], sin[:, image_tokens:], caption_mask, None, hooks.attention or self.attention)
        for i, block in enumerate(self.context_refiner):
            context = hooks.run_block("context_refiner", i, block, context, *args)
        return Conditioning(context, cos, sin, mask, grid, image_tokens, tuple(lengths))

    def guided(self, cond: Conditioning, negative: Conditioning, nag: Nag) -> Conditioning:
        """A conditioning whose attention is guided away from a negative one, prepared for the same size."""
        return guide(cond, negative, nag, functools.partial(rope_angles, config=self.config))

    @staticmethod
    @functools.lru_cache(maxsize=8)
    @torch.inference_mode(False)
    def _angles(
        lengths: tuple[int, ...],
        grid: tuple[int, int],
        image_tokens: int,
        rope: tuple[float, float, float, float] | None,
        config: ZImageConfig,
    ) -> tuple[Tensor, Tensor]:
        """Rotary angles of [image, caption] tokens on the host, kept for the next prompts.

        torch's threads there wait for one another at every operation, for long where other work takes their cores.
        """
        positions = ZImageTransformer._positions(list(lengths), max(lengths), grid, image_tokens, rope)
        return rope_angles(positions, config)

    @staticmethod
    def _positions(
        lengths: list[int],
        longest: int,
        grid: tuple[int, int],
        image_tokens: int,
        rope: tuple[float, float, float, float] | None,
    ) -> Tensor:
        """(Bc, L, 3): image (caption length + 1, row, column), image pads 0, caption (1 + i, 0, 0)."""
        h, w = grid
        row_scale, row_shift, column_scale, column_shift = rope or (1.0, 0.0, 1.0, 0.0)
        positions = torch.zeros(len(lengths), image_tokens + longest, 3, dtype=torch.float64)
        image = positions[:, : h * w].view(len(lengths), h, w, 3)
        image[..., 0] = torch.tensor(lengths)[:, None, None] + 1
        image[..., 1] = torch.arange(h)[:, None] * row_scale + row_shift
        image[..., 2] = torch.arange(w) * column_scale + column_shift
        positions[:, image_tokens:, 0] = torch.arange(1, longest + 1)
        return positions

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        cond: Conditioning,
        hooks: Hooks = Hooks(),
    ) -> Tensor:
        """latents (B, 16, H/8, W/8), t (B,) from 0 (noise) to 1 (image) -> the same shape and dtype.

        The sign is diffusers': the output points from noise to image, the negated flow d x / d sigma.
        """
        batch, p = latents.shape[0], self.config.patch_size
        h, w = cond.grid
        expected = (self.config.in_channels, h * p, w * p)
        if latents.shape[1:] != expected:
            raise ValueError(f"latents: expected (batch, {expected}), found {tuple(latents.shape)}")
        if cond.context.shape[0] not in (1, batch):
            raise ValueError(f"conditioning is for {cond.context.shape[0]} pictures, latents hold {batch}")

        t_emb = self.t_embedder(t.to(self.device).expand(batch) * self.config.t_scale)
        x = self.x_embedder(patchify(latents.to(self.dtype), p))  # (B, h*w, D)
        pads = cond.image_tokens - h * w
        if pads:
            x = torch.cat((x, self.x_pad_token.to(x.dtype).expand(batch, pads, -1)), dim=1)
        x = self._stream(x)

        image_cos, image_sin = cond.cos[:, : cond.image_tokens], cond.sin[:, : cond.image_tokens]
        attend = hooks.attention or self.attention
        args: tuple[object, ...] = (image_cos, image_sin, None, t_emb, attend)
        runs = [control.begin(hooks.run_block) for control in cond.controls]
        for run in runs:
            run.enter_refiner(x, args)
        for i, block in enumerate(self.noise_refiner):
            x = hooks.run_block("noise_refiner", i, block, x, *args)
            for run in runs:
                x = run.add_hint(i, x)
        x = torch.cat((x, cond.context.expand(batch, -1, -1).to(x.dtype)), dim=1)
        attend = attend if cond.nag is None else cond.nag.attention(attend, cond.image_tokens)
        args = (cond.cos, cond.sin, cond.mask, t_emb, attend)
        for run in runs:
            run.enter_layers(x, args)
        for i, block in enumerate(self.layers):
            x = hooks.run_block("layers", i, block, x, *args)
            for run in runs:
                x = run.add_hint(i, x)

        x = self.final_layer(x[:, : h * w], t_emb)
        x = x.unflatten(-1, (p, p, -1)).unflatten(1, (h, w))  # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).to(latents.dtype)
