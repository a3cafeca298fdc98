"""The SVDQuant linear: 4-bit codes in groups, a smoothing vector and a low-rank branch, run by a backend.

`SVDQWeights` holds one linear in plain row order, two codes to a byte. `SVDQLinear` is the module that models are
built from. Backends compute y = (x / smooth) @ (q * s).T + (x @ down.T) @ up.T + bias; the low-rank branch takes x
before smoothing. Codes are int4 in groups of 64, or FP4 (e2m1) in groups of 16, whose s is an e4m3 scale times a scale
of the row.

Legend: M rows, N out, K in, R rank, G = K / 64 groups, K / 16 of FP4.
Source: SVDQuant (arXiv:2411.05007); nunchaku/models/linear.py@92e4695 for the tensors of a stored linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import nn

from ..sizes import round_up
from . import layout
from .adapters import Adapter, Terms
from .backends import NO_SMOOTHING, Backend, Quantized, Smoothing


@dataclass(frozen=True)
class SVDQWeights:
    """One quantized linear: dense weight = q * s / smooth + up @ down. ValueError if the shapes do not agree."""

    qweight: torch.Tensor  # (N, K/2) uint8, layout.pack_nibbles
    wscales: torch.Tensor  # (N, G); of FP4 the bytes of e4m3, uint8, so that a cast of floats leaves them alone
    smooth_factor: torch.Tensor  # (K,)
    proj_down: torch.Tensor  # (R, K)
    proj_up: torch.Tensor  # (N, R)
    bias: torch.Tensor | None = None  # (N,)
    outer_scale: torch.Tensor | None = None  # (N,) fp32 of FP4

    def __post_init__(self) -> None:
        n, k, r = self.out_features, self.in_features, self.rank
        expected = {
            "qweight": (n, k // 2),
            "wscales": (n, k // (layout.MICRO_GROUP if self.fp4 else layout.GROUP)),
            "smooth_factor": (k,),
            "proj_down": (r, k),
            "proj_up": (n, r),
            "bias": (n,),
            "outer_scale": (n,),
        }
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"{name}: expected {expected[name]}, found {tuple(tensor.shape)}")

    @classmethod
    def from_packed(cls, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> SVDQWeights:
        """Unpack the stored tensors of one linear. ValueError names the key that is missing or has a wrong shape."""
        required = [field.name for field in fields(cls) if field.name not in ("bias", "outer_scale")]
        for name in required:
            if prefix + name not in tensors:
                raise ValueError(f"{prefix}{name}: expected an SVDQ INT4 linear, found no such tensor")
        names = required + [name for name in ("bias", "wcscales", "wtscale") if prefix + name in tensors]
        try:
            return cls(**layout.unpack_linear({name: tensors[prefix + name] for name in names}))
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None

    def to_packed(self) -> dict[str, torch.Tensor]:
        """The tensors as an INT4 file stores them, without `smooth_factor_orig`."""
        return layout.pack_linear(self.tensors())

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        return 2 * self.qweight.shape[1]

    @property
    def rank(self) -> int:
        return self.proj_down.shape[0]

    @property
    def fp4(self) -> bool:
        return self.wscales.dtype is torch.uint8

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name; a linear without bias has no "bias"."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> SVDQWeights:
        """The weights on another device, floating-point tensors in another dtype, but for fp32's outer_scale."""
        kept = {name for name, t in self.tensors().items() if not t.is_floating_point()} | {"outer_scale"}
        moved = {name: t.to(device, None if name in kept else dtype) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def dequantize(self) -> torch.Tensor:
        """The dense weight (N, K) in fp32: q * s / smooth + up @ down."""
        return torch.addmm(self.residual() / self.smooth_factor, self.proj_up.float(), self.proj_down.float())

    def residual(self) -> torch.Tensor:
        """q * s (N, K) in fp32."""
        codes, scales = layout.unpack_nibbles(self.qweight), self.scales()
        values = layout.e2m1(codes.device)[codes.int() & 15] if self.fp4 else codes
        return (values.view(*scales.shape, -1) * scales[:, :, None]).view(codes.shape)

    def scales(self) -> torch.Tensor:
        """s (N, G) in fp32."""
        if self.outer_scale is None:
            return self.wscales.float()
        return self.wscales.view(torch.float8_e4m3fn).float() * self.outer_scale.float()[:, None]

    def largest_codes(self) -> torch.Tensor:
        """The largest |q| of each group (N, G)."""
        codes = layout.unpack_nibbles(self.qweight).view(*self.wscales.shape, -1)
        if self.fp4:
            return layout.e2m1(codes.device)[(codes & 7).amax(2).int()]
        return codes.abs_().amax(2)


class SVDQLinear(nn.Module):
    """A linear of SVDQ weights, x (..., K) -> (..., N); an optional adapter runs beside it."""

    backend: Backend  # set by `load`
    adapter: Adapter | None
    codes: torch.Tensor | None = None  # the weight in 8 bits, while it is kept

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        rank: int,
        fp4: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.rank, self.dtype = in_features, out_features, rank, dtype
        self.fp4 = fp4
        self._joined = False  # whether an adapter's pair is appended to the low-rank branch
        groups = in_features // (layout.MICRO_GROUP if fp4 else layout.GROUP)
        self._hold(
            qweight=torch.empty(out_features, in_features // 2, device=device, dtype=torch.uint8),
            wscales=torch.empty(out_features, groups, device=device, dtype=torch.uint8 if fp4 else dtype),
            smooth_factor=torch.empty(in_features, device=device, dtype=dtype),
            proj_down=torch.empty(rank, in_features, device=device, dtype=dtype),
            proj_up=torch.empty(out_features, rank, device=device, dtype=dtype),
            bias=torch.empty(out_features, device=device, dtype=dtype) if bias else None,
            outer_scale=torch.empty(out_features, device=device, dtype=torch.float32) if fp4 else None,
        )
        self.register_module("adapter", None)

    def load(self, weights: SVDQWeights, backend: Backend) -> None:
        """Take over the weights in the backend's form, on their device, in this module's dtype if it has one.

        ValueError if their features or rank are not this linear's."""
        found = (weights.in_features, weights.out_features, weights.rank, weights.fp4)
        expected = (self.in_features, self.out_features, self.rank, self.fp4)
        if found != expected:
            raise ValueError(f"SVDQ linear: expected (in, out, rank, FP4) {expected}, found {found}")
        self.adapter, self._joined = None, False
        self._buffers.clear()
        self._hold(**backend.prepare(weights.to(dtype=self.dtype)))
        self.backend = backend

    def weights(self) -> SVDQWeights:
        """The weights in plain form, restored from the backend's, without an adapter."""
        found = self.backend.restore(self._held)
        branch = {"proj_down": found["proj_down"][: self.rank], "proj_up": found["proj_up"][:, : self.rank]}
        return SVDQWeights(**found | branch)

    def set_adapter(self, terms: Terms | None) -> None:
        """Replace the adapter by one with these terms; None removes it.

        A low-rank pair is appended to the low-rank branch where the backend allows that."""
        if self._joined:
            self._hold(**self.backend.join(self._held, self.rank, None) or {})
        self._joined = False
        if terms and terms.pair:
            branch = self.backend.join(self._held, self.rank, terms.pair)
            if branch is not None:
                self._hold(**branch)
                self._joined = True
                terms = replace(terms, down=None, up=None)
        self.adapter = Adapter(terms, self.out_features) if terms else None

    def dense_weight(self) -> torch.Tensor:
        """The weight (N, K) in fp32, without the adapter."""
        return self.weights().dequantize()

    def keep_codes(self, keep: bool) -> None:
        """Keep the weight in 8 bits, or let the backend make it in every call; results are the same, bit for bit."""
        if not keep:
            self.codes = None
        elif self.codes is None:
            self.codes = self.backend.codes(self._held)

    @property
    def codes_bytes(self) -> int:
        """Bytes of the weight in 8 bits at most, 0 where the backend does not multiply it."""
        if not hasattr(self, "backend") or "w4a8" not in self.backend.levels:
            return 0
        return self.out_features * (self.in_features + 3 * round_up(self._held["proj_up"].shape[1], 32))

    def forward(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self._linear(rows) if self.adapter is None else self.adapter(rows, self._linear, self._buffers.get("bias"))
        return y.view(*x.shape[:-1], self.out_features)

    def _linear(self, rows: torch.Tensor | Quantized) -> torch.Tensor:
        held = self._held if self.codes is None else {**self._held, "codes": self.codes}
        return self.backend.linear(rows, held)

    @property
    def _held(self) -> dict[str, torch.Tensor]:
        """The backend's tensors by name; after `load` none is None."""
        return cast("dict[str, torch.Tensor]", self._buffers)

    def extra_repr(self) -> str:
        loaded = getattr(self, "backend", None)
        form = f", backend={loaded.name}, precision={loaded.precision}" if loaded else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{form}"

    def _hold(self, **tensors: torch.Tensor | None) -> None:
        self.codes = None  # are of other tensors
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


def svdq_linears(module: nn.Module) -> list[SVDQLinear]:
    """Those in a module."""
    return [part for part in module.modules() if isinstance(part, SVDQLinear)]


def smoothing(linear: nn.Module, x: torch.Tensor) -> Smoothing:
    """What a linear asks of the preceding kernel; x (..., any) has the linear's rows.

    Nothing for dense linears, and for linears with an adapter beside them, which needs x itself."""
    if not isinstance(linear, SVDQLinear) or linear.adapter is not None:
        return NO_SMOOTHING
    return linear.backend.smoothing(linear._held, x.shape[:-1].numel())
