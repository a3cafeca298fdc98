"""The text encoder: the Qwen3 body whose hidden state conditions Z-Image.

Z-Image was trained on the second-to-last hidden state of Qwen3-4B, so only the first N - 1 of a file's N layers are
read and run, without the final norm and the language-model head. The body is our own, so that its Linears come from
a factory as the transformer's do.

Source: transformers/models/qwen3/modeling_qwen3.py@v5.23.0, diffusers/pipelines/z_image/pipeline_z_image.py@v0.42.1.
Legend: B batch, L tokens, C width, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear.adapters import Adapted, Linear
from ..sizes import round_up
from .config import check_numbers
from .ops import finite
from .tokenizer import Tokenizer
from .transformer import run_block

RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 10**6),
    "hidden_size": (1, 10**5),
    "intermediate_size": (1, 10**6),
    "num_layers": (1, 999),
    "num_attention_heads": (1, 10**4),
    "num_key_value_heads": (1, 10**4),
    "head_dim": (1, 10**4),
    "rope_theta": (1e-3, 1e12),
    "rms_norm_eps": (1e-12, 1),
}
PADDED = 32  # tokens: on a GPU prompts are padded to a multiple of it


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the encoder under transformers' names; the defaults are Qwen3-4B's.

    `num_layers` is one less than the model's `num_hidden_layers`, see above.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_layers: int = 35
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        check_numbers(self, RANGES)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups or self.head_dim % 2:
            raise ValueError(
                f"config: expected heads divisible by key/value heads and an even head width, found {heads}, {groups} "
                f"and {self.head_dim}"
            )


def rotary_table(length: int, config: TextEncoderConfig, device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, D) fp32 of positions 0 .. length - 1, each frequency twice (halves, not pairs)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)  # (L, D)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, L, D) by the table's angles (L, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in fp32, returned in x's dtype (promoted by the weight's), or fp16."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float16 if self.weight.dtype is torch.float16 else x.dtype
        return self.weight * F.rms_norm(x, self.weight.shape, None, self.eps).to(dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with normed queries and keys."""

    def __init__(self, config: TextEncoderConfig, linear: Callable[..., nn.Module]):
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = d
        self.q_proj = linear(c, config.num_attention_heads * d, bias=False)
        self.k_proj = linear(c, config.num_key_value_heads * d, bias=False)
        self.v_proj = linear(c, config.num_key_value_heads * d, bias=False)
        self.o_proj = linear(config.num_attention_heads * d, c, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        v = v.transpose(1, 2)  # (B, G, L, D)
        q = apply_rotary(self.q_norm(q).transpose(1, 2), cos, sin).to(v.dtype)  # (B, H, L, D)
        k = apply_rotary(self.k_norm(k).transpose(1, 2), cos, sin).to(v.dtype)  # (B, G, L, D)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, L, C)


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextEncoderConfig, linear: Callable[..., nn.Module]):
        super().__init__()
        c, f = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(c, f, bias=False)
        self.up_proj = linear(c, f, bias=False)
        self.down_proj = linear(f, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(finite(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """One pre-norm decoder layer. In fp16 the residual stream x stays fp32, see `ops.finite`."""

    def __init__(self, config: TextEncoderConfig, linear: Callable[..., nn.Module]):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, linear)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + finite(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + finite(self.mlp(self.post_attention_layernorm(x)))


class TextEncoder(Adapted):
    """Qwen3 up to its second-to-last hidden state; parameters are named as in transformers' Qwen3Model.

    `linear(in_features, out_features, bias=False)` builds every projection and `embedding(rows, width)` the token
    table, which may stay on the host.
    """

    def __init__(self, config: TextEncoderConfig, linear=Linear, embedding=nn.Embedding):
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, linear) for _ in range(config.num_layers))

    @property
    def device(self) -> torch.device:
        """The layers' device, which is the hidden state's."""
        return next(self.layers.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.layers.parameters()).dtype

    def forward(
        self,
        input_ids: Tensor,
        run_block: Callable[..., Tensor] = run_block,
        device: torch.device | None = None,
    ) -> Tensor:
        """Hidden state (B, L, C) of unpadded token ids (B, L) on any device, without the final norm.

        run_block replaces the function of that name; device: where it runs layers that are kept elsewhere.
        """
        x = self.embed_tokens(input_ids).to(device or self.device, self.dtype)
        cos, sin = (t.to(x.dtype) for t in rotary_table(input_ids.shape[1], self.config, x.device))
        if self.dtype is torch.float16:
            x = x.float()
        for i, layer in enumerate(self.layers):
            x = run_block("layers", i, layer, x, cos, sin)
        if self.dtype is torch.float16:
            x = finite(x, torch.float16).to(torch.float16)
        return x


@torch.no_grad()
def encode_tokens(encoder: TextEncoder, prompts: Iterable[list[int]], where: str, **options: Any) -> list[Tensor]:
    """Caption features (L, C) of each prompt's token ids, run one by one on the encoder's device.

    On a GPU each is padded on the right, which no token sees: cuBLAS and cuDNN plan anew for every new length. options
    go to the encoder (`run_block`, `device`). Raises ValueError, which names the tokenizer by `where`, for ids that
    exceed the encoder's vocabulary.
    """
    features = []
    multiple = PADDED if torch.device(options.get("device") or encoder.device).type == "cuda" else 1
    for ids in prompts:
        if max(ids) >= encoder.config.vocab_size:
            raise ValueError(
                f"{where}: expected token ids below {encoder.config.vocab_size}, the text encoder's vocabulary, "
                f"found {max(ids)}; use the tokenizer that belongs to the encoder"
            )
        padding = [0] * (round_up(len(ids), multiple) - len(ids))
        features.append(encoder(torch.tensor([ids + padding], device=encoder.device), **options)[0, : len(ids)])
    return features


def encode_prompts(
    encoder: TextEncoder, tokenizer: Tokenizer, prompts: str | Sequence[str], **options: Any
) -> list[Tensor]:
    """`encode_tokens` of prompts."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    return encode_tokens(encoder, map(tokenizer, texts), tokenizer.where, **options)
