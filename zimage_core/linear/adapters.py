"""Adapters, which add to a linear what LoRA files change, and the plain linear that can carry one.

A linear y = W x + b keeps its weights as they are. An adapter adds, for some or all rows of the output:

    low rank   up (down x)                2 M r (K + N) FLOPs; pairs of several files are concatenated into one
    kron       (w1 (x) up down) x         2 M (K r + a b r + N r) for w1 (a, b), up (N/a, r), down (r, K/b)
    dense      D x                        2 M K N, as much as the linear in 16 bit, and its memory
    input      W (x + T x)                T diagonal or block-diagonal; one linear more for each part of a fused one
    output     T (W x)                    likewise, on the result
    bias       a vector

A low-rank change of an SVDQuant linear is instead appended to its low-rank branch (`SVDQLinear.set_adapter`), which
reads and writes y anyway: a pair beside the linear costs few FLOPs but one more pass over y (benchmarks/README.md).

Legend: M rows, N out, K in, r the adapter's rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Rows = tuple[int, int]


@dataclass
class Terms:
    """An adapter's tensors for one linear, in its dtype on its device, multiplied by their strengths.

    Rows are (start, stop)."""

    down: Tensor | None = None  # (r, K)
    up: Tensor | None = None  # (N, r)
    bias: Tensor | None = None  # (N,)
    dense: list[tuple[Rows, Tensor]] = field(default_factory=list)  # (rows, K)
    krons: list[tuple[Rows, Tensor, Tensor, Tensor | None]] = field(default_factory=list)  # w1, up, down or identity
    inputs: list[tuple[Rows, Tensor]] = field(default_factory=list)  # (K,) or (blocks, size, size)
    outputs: list[tuple[Rows, Tensor]] = field(default_factory=list)  # (rows,) or (blocks, size, size)

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """down and up, where they can be appended to a low-rank branch: not beside transforms, which need W x alone."""
        if self.down is None or self.up is None or self.inputs or self.outputs:
            return None
        return self.down, self.up

    def __bool__(self) -> bool:
        found = (self.dense, self.krons, self.inputs, self.outputs)
        return self.down is not None or self.bias is not None or any(found)


def transform(t: Tensor, x: Tensor) -> Tensor:
    """T x for rows x (M, n); t (n,) is a diagonal, t (blocks, size, size) holds [block, from, to]."""
    if t.ndim == 1:
        return x * t
    return torch.einsum("knm,rkn->rkm", t, x.unflatten(-1, t.shape[:2])).flatten(1)


def kron(x: Tensor, w1: Tensor, up: Tensor, down: Tensor | None) -> Tensor:
    """(w1 (x) up down) x for rows x (M, K), w1 (a, b), up (c, r), down (r, d) or None for the identity -> (M, a c)."""
    h = x.unflatten(-1, (w1.shape[1], -1))  # (M, b, d)
    if down is not None:
        h = h @ down.T
    return (torch.einsum("mbr,ab->mar", h, w1) @ up.T).flatten(1)


class Adapter(nn.Module):
    """The terms of one linear as buffers, so that they move, stream and are counted with the model."""

    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None

    def __init__(self, terms: Terms, out_features: int):
        super().__init__()
        self.out_features = out_features
        self.rows: dict[str, list[tuple[Rows, list[str]]]] = {}
        for name in ("down", "up", "bias"):
            self.register_buffer(name, getattr(terms, name), persistent=False)
        for kind in ("inputs", "outputs", "dense", "krons"):
            self.rows[kind] = []
            for i, (rows, *tensors) in enumerate(getattr(terms, kind)):
                names = [f"{kind}_{i}_{j}" for j in range(len(tensors))]
                for name, tensor in zip(names, tensors):
                    self.register_buffer(name, tensor, persistent=False)
                self.rows[kind].append((rows, names))

    def terms(self, kind: str) -> Iterator[tuple[Rows, list]]:
        """(rows, tensors) of one kind; a kron's `down` may be None."""
        for rows, names in self.rows[kind]:
            yield rows, [self._buffers[name] for name in names]

    def forward(self, x: Tensor, linear: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor:
        """x (M, K) -> (M, N); `linear` is the carrier's own arithmetic, its bias included."""
        y = self._transformed(x, linear, bias)
        for (start, stop), (weight,) in self.terms("dense"):
            y[:, start:stop] += x @ weight.T
        for (start, stop), (w1, up, down) in self.terms("krons"):
            y[:, start:stop] += kron(x, w1, up, down)
        if self.bias is not None:
            y = y + self.bias
        if self.down is not None and self.up is not None:
            y = torch.addmm(y, x @ self.down.T, self.up.T)
        return y

    def _transformed(self, x: Tensor, linear: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor:
        """W x + b with the transforms of x and of W x."""
        inputs: dict[Rows, Tensor] = {}
        for rows, (t,) in self.terms("inputs"):
            inputs[rows] = inputs.get(rows, x) + transform(t, x)
        whole = inputs.pop((0, self.out_features), x)
        y = linear(whole)
        for (start, stop), transformed in inputs.items():
            y[:, start:stop] = linear(transformed + (whole - x))[:, start:stop]
        if self.rows["outputs"]:
            plain = linear(x) if inputs or whole is not x else y.clone()
            if bias is not None:
                plain -= bias
            for (start, stop), (t,) in self.terms("outputs"):
                y[:, start:stop] += transform(t, plain[:, start:stop])
        return y


@runtime_checkable
class Carrier(Protocol):
    """A linear that can carry an adapter, whatever the form of its own weight."""

    in_features: int
    out_features: int

    def set_adapter(self, terms: Terms | None) -> None:
        """Carry these terms and no others."""

    def dense_weight(self) -> Tensor:
        """The weight (N, K) in fp32, without the adapter."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]: ...


class Adapted(nn.Module):
    """A model whose linears can carry adapters; its fields are `lora.apply`'s."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters: tuple[tuple[Any, float], ...] = ()  # each LoRA with its strength
        self.adapter_plan: dict[str, list[tuple[Any, float]]] = {}  # the changes of each module
        self.adapter_version = 0  # grows with every change: what was prepared before is out of date


class Linear(nn.Linear):
    """A dense linear that can carry an adapter."""

    adapter: Adapter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.register_module("adapter", None)

    def set_adapter(self, terms: Terms | None) -> None:
        """Replace the adapter by one with these terms; None removes it."""
        self.adapter = Adapter(terms, self.out_features) if terms else None

    def dense_weight(self) -> Tensor:
        """The weight (N, K) in fp32."""
        return self.weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return super().forward(x)
        y = self.adapter(x.reshape(-1, self.in_features), super().forward, self.bias)
        return y.view(*x.shape[:-1], self.out_features)
