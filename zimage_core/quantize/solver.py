"""Quantizing one linear to SVDQuant INT4: smoothing, low-rank branch, 4-bit codes.

A weight W (N, K) becomes `up @ down + q * s / smooth`. The plain version takes the branch from the SVD of the
weight and rounds the rest to nearest. The calibrated version knows the layer's inputs: it searches the smoothing
vector by the error of the outputs, fits branch and codes to each other by turns, chooses each group's scale by its
weighted error, rounds by GPTQ, which lets every later channel make up for the rounding of the earlier ones, and
fits the branch's upper half to what is left. Whatever is rounded (smoothing, branch, scales) is rounded before the
next step is computed from it, so that the later step corrects it.

Legend: M rows, N out, K in, R rank, G = K / 64 groups. "Smoothed" is W * smooth, whose input is x / smooth.
Source: SVDQuant (arXiv 2411.05007), GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linear.layout import GROUP, pack_nibbles
from ..linear.svdq import SVDQWeights

MAX_CODE = 7  # quantizers emit -7..7
OVERSAMPLING = 16  # directions beyond the rank that the subspace iteration carries along
COARSE_ALPHAS = (0.25, 0.5, 0.75)  # smoothing exponents that are tried at first
FINE_STEPS = (0.125, 0.0625)
TURNS = 8  # of fitting codes to the branch and the branch to the codes
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # scales tried for a group, of the one that reaches its maximum
DAMPING = 0.05  # of the second moments' mean diagonal, added to the diagonal
PANEL = 128  # input channels that GPTQ rounds before it updates the others
TINY = 1e-30  # keeps layers that see only zeros from dividing by it
SAMPLE_ROWS = 2048  # input rows kept to measure the error of the outputs


class InputStats:
    """What the calibrated quantizer needs of a linear's inputs: second moments and a sample of rows.

    The sample is kept out of the second moments, so that it tells whether what they led to holds for other inputs.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.rows = torch.zeros(0, in_features, device=device)  # (M, K), an even random sample
        self._gram = torch.zeros(in_features, in_features, device=device)
        self._keys = torch.zeros(0)
        self._seen = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Take in the rows of x (M, K)."""
        x = x.float()
        self._gram.addmm_(x.T, x)
        self._seen += len(x)
        keys = torch.cat([self._keys, torch.rand(len(x), generator=self._generator)])
        kept = keys.topk(min(SAMPLE_ROWS, -(-self._seen // 4))).indices.sort().values
        old, new = kept[kept < len(self.rows)], kept[kept >= len(self.rows)] - len(self.rows)
        self.rows = torch.cat([self.rows[old.to(x.device)], x[new.to(x.device)]])
        self._keys = keys[kept]

    def second_moments(self) -> Tensor:
        """The mean of x^T x (K, K) over the rows that are not in the sample."""
        return (self._gram - self.rows.T @ self.rows) / max(self._seen - len(self.rows), 1)


@dataclass(frozen=True)
class Parts:
    """A quantized linear under work, everything in fp32 but already rounded to what the file holds."""

    smooth: Tensor  # (K,)
    up: Tensor  # (N, R)
    down: Tensor  # (R, K), for the raw input
    codes: Tensor  # (N, K)
    scales: Tensor  # (N, G)

    def branch(self) -> Tensor:
        """Smoothed weight (N, K) of the low-rank branch."""
        return self.up @ (self.down * self.smooth)

    def residual(self) -> Tensor:
        """Smoothed weight (N, K) of the codes."""
        return _scaled(self.codes, self.scales)

    def weights(self) -> SVDQWeights:
        up, down, smooth, scales = (t.to(torch.bfloat16) for t in (self.up, self.down, self.smooth, self.scales))
        return SVDQWeights(pack_nibbles(self.codes.to(torch.int8)), scales, smooth, down, up)


def svdq_from_dense(weight: Tensor, rank: int, smooth: Tensor | None = None) -> SVDQWeights:
    """Quantize a dense weight (N, K) by truncated SVD and round-to-nearest; `smooth` (K,) divides the input.

    Runs in fp32 on the weight's device; deterministic there.
    """
    weight = weight.float()
    smooth = torch.ones_like(weight[0]) if smooth is None else _bf16(smooth)
    return round_plainly(weight * smooth, smooth, *low_rank(weight * smooth, rank)).weights()


def svdq_calibrated(weight: Tensor, rank: int, stats: InputStats) -> SVDQWeights:
    """Quantize a dense weight (N, K) for the inputs that `stats` describes, on the weight's device."""
    weight = weight.float()
    outputs = stats.rows @ weight.T  # (M, N)
    moments = stats.second_moments()
    parts = _search_smooth(weight, rank, moments, stats.rows, outputs)
    smooth, smoothed = parts.smooth, weight * parts.smooth
    moments = moments / torch.outer(smooth, smooth)
    importance = moments.diagonal()
    for _ in range(TURNS):
        down = parts.down * smooth
        up, down = _branch(*low_rank(smoothed - parts.residual(), rank, start=down), smooth)
        rest = smoothed - up @ (down * smooth)
        scales = _best_scales(rest, importance)
        parts = Parts(smooth, up, down, _codes(rest, scales), scales)
    rounded = replace(parts, codes=gptq(smoothed - parts.branch(), parts.scales, moments))
    fitted = replace(rounded, up=_fit_up(smoothed - rounded.residual(), rounded, moments))
    return min((parts, rounded, fitted), key=lambda found: _both_errors(found, stats.rows, outputs)).weights()


def squared_error(parts: Parts, rows: Tensor, outputs: Tensor, bits: int) -> Tensor:
    """Of the outputs for rows (M, K), which should be (M, N), relative to their square; bits: of the inputs, or 16."""
    smoothed = _bf16(rows / parts.smooth)
    smoothed = smoothed if bits == 16 else quantize_inputs(smoothed, bits)
    found = smoothed @ parts.residual().T + (rows @ parts.down.T) @ parts.up.T
    return (outputs - found).square().sum() / outputs.square().sum().clamp(min=TINY)


def _both_errors(parts: Parts, rows: Tensor, outputs: Tensor) -> float:
    """What the calibrated quantizer makes small: the errors with plain inputs and with 4-bit inputs, added up."""
    return sum(squared_error(parts, rows, outputs, bits) for bits in (16, 4)).item()


def _search_smooth(weight: Tensor, rank: int, moments: Tensor, rows: Tensor, outputs: Tensor) -> Parts:
    """The plain quantization whose smoothing gives the smallest error of the outputs.

    Tried are 1, inputs^a and inputs^a / weights^(1 - a), first for few a, then for those next to the best, with steps
    that halve. Inputs and weights are the channels' root mean squares (K,) or, as in the paper, their maxima: for most
    layers the former give smaller errors, as a single loud token decides a maximum, for some the latter.
    """
    means = (moments.diagonal().clamp(min=0).sqrt(), weight.square().mean(0).sqrt())
    maxima = (rows.abs().amax(0), weight.abs().amax(0))
    spans = [[t.clamp(min=1e-4 * t.amax().clamp(min=TINY)).log() for t in pair] for pair in (means, maxima)]
    errors: dict[tuple[int, float, float], float] = {}
    best = down = None

    def attempt(span: int, alpha: float, beta: float) -> None:
        nonlocal best, down
        inputs, weights = spans[span]
        exponent = alpha * inputs - beta * weights
        smooth = _bf16((exponent - exponent.mean()).exp())
        up, down = low_rank(weight * smooth, rank, start=down)
        parts = round_plainly(weight * smooth, smooth, up, down)
        error = _both_errors(parts, rows, outputs)
        if best is None or error < min(errors.values()):
            best = parts
        errors[span, alpha, beta] = error

    attempt(0, 0, 0)
    for span in range(len(spans)):
        for alpha in COARSE_ALPHAS:
            attempt(span, alpha, 0)
            attempt(span, alpha, 1 - alpha)
    for step in FINE_STEPS:
        span, alpha, beta = min(errors, key=errors.get)
        for near in (alpha - step, alpha + step):
            attempt(span, near, 1 - near if beta else 0)
    return best


def round_plainly(smoothed: Tensor, smooth: Tensor, up: Tensor, down: Tensor) -> Parts:
    """Round a branch for the smoothed weight and then what it leaves, to nearest."""
    up, down = _branch(up, down, smooth)
    rest = smoothed - up @ (down * smooth)
    scales = _bf16(rest.unflatten(1, (-1, GROUP)).abs().amax(-1) / MAX_CODE)
    return Parts(smooth, up, down, _codes(rest, scales), scales)


def _branch(up: Tensor, down: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """A branch of the smoothed weight as the file holds it: for the raw input, in bf16."""
    return _bf16(up), _bf16(down / smooth)


def low_rank(weight: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-R approximation of a weight (N, K), as up (N, R) and orthonormal down (R, K).

    By subspace iteration from a fixed random start, which costs a fraction of an SVD and is as good for this; from
    `start` (R, K), the answer for a similar weight, two rounds suffice.
    """
    width = min(rank + OVERSAMPLING, *weight.shape)
    extra = width if start is None else width - len(start)
    noise = torch.randn(weight.shape[1], extra, generator=torch.Generator().manual_seed(0)).to(weight.device)
    basis = noise if start is None else torch.cat([start.T, noise], 1)
    for _ in range(7 if start is None else 1):
        basis = _conditioned(weight.T @ (weight @ basis))  # (K, R + extra)
    basis = torch.linalg.qr(weight.T @ (weight @ basis)).Q
    image = weight @ basis
    vectors = torch.linalg.eigh(image.T @ image).eigenvectors[:, -rank:]
    return image @ vectors, (basis @ vectors).T


def _conditioned(basis: Tensor) -> Tensor:
    """Columns (K, R) that span the same space as `basis`, orthonormal as far as one Cholesky step makes them.

    That is enough between rounds, and on a GPU takes a fraction of a QR decomposition.
    """
    basis = basis.double()
    factor = torch.linalg.cholesky(_damped(basis.T @ basis, 1e-11), upper=True)
    return torch.linalg.solve_triangular(factor, basis, upper=True, left=False).float()


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """A symmetric matrix that may be singular, made definite in place."""
    matrix.diagonal().add_(damping * matrix.diagonal().mean().clamp(min=TINY))
    return matrix


def _best_scales(rest: Tensor, importance: Tensor) -> Tensor:
    """Scales (N, G) of the least squared rounding error of `rest` (N, K), channels weighted by importance (K,)."""
    largest = rest.unflatten(1, (-1, GROUP)).abs().amax(-1) / MAX_CODE
    weights = importance.clamp(min=0) + DAMPING * importance.mean().clamp(min=TINY)
    best, least = largest, torch.full_like(largest, float("inf"))
    for clip in CLIPS:
        scales = _bf16(largest * clip)
        errors = (rest - _scaled(_codes(rest, scales), scales)).square_().mul_(weights)
        errors = errors.unflatten(1, (-1, GROUP)).sum(-1)
        best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return best


def gptq(rest: Tensor, scales: Tensor, moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Codes (N, K) of `rest` (N, K) by given scales, rounded channel by channel, the most used ones first."""
    order = moments.diagonal().argsort(descending=True)
    factor = _inverse_factor(moments, order, damping)
    factor /= factor.diagonal().clone()[:, None]
    rest, steps = rest.T[order], scales.T[order // GROUP]  # (K, N), so that a channel's values lie together
    divisors = torch.where(steps > 0, steps, torch.inf)
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), PANEL):
        chosen = slice(start, start + PANEL)
        panel, triangle = rest[chosen], factor[chosen, chosen]
        channels = zip(panel, codes[chosen], steps[chosen], divisors[chosen], strict=True)
        for i, (values, rounded, step, divisor) in enumerate(channels, 1):
            torch.div(values, divisor, out=rounded).round_().clamp_(-MAX_CODE, MAX_CODE)
            values.addcmul_(rounded, step, value=-1)  # what rounding leaves
            panel[i:].addr_(triangle[i - 1, i:], values, alpha=-1)
        rest[start + PANEL :].addmm_(factor[chosen, start + PANEL :].T, panel, alpha=-1)
    return codes[order.argsort()].T.contiguous()


def _inverse_factor(moments: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper triangular U (K, K) with U^T U the inverse of the damped moments (K, K), channels in that order.

    Through the Cholesky factor of the moments in reverse order, whose inverse is U in reverse.
    """
    reverse = order.flip(0)
    lower = torch.linalg.cholesky(_damped(moments[reverse][:, reverse].double(), damping))
    identity = torch.eye(len(order), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).float().flip(0, 1)


def _fit_up(rest: Tensor, parts: Parts, moments: Tensor) -> Tensor:
    """The branch's up (N, R) that, over its given down, fits `rest` (N, K) best for the inputs."""
    down = (parts.down * parts.smooth).double()
    seen = down @ moments.double()  # (R, K)
    normal = _damped(seen @ down.T, 1e-4)
    return _bf16(torch.linalg.solve(normal, seen @ rest.T.double()).T.float())


def _codes(rest: Tensor, scales: Tensor) -> Tensor:
    """Values (N, K) in steps of their groups' scales (N, G), rounded to nearest."""
    steps = scales[:, :, None]
    groups = rest.unflatten(1, (-1, GROUP)) / torch.where(steps > 0, steps, torch.inf)
    return groups.round_().clamp_(-MAX_CODE, MAX_CODE).flatten(1)


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes (N, K) mean at scales (N, G)."""
    return (codes.unflatten(1, (-1, GROUP)) * scales[:, :, None]).flatten(1)


def quantize_inputs(x: Tensor, bits: int) -> Tensor:
    """Inputs (M, K) rounded to so many bits in groups of 64 and back, as W4A4 and W4A8 kernels do."""
    groups, largest = x.unflatten(1, (-1, GROUP)), 2 ** (bits - 1) - 1
    steps = groups.abs().amax(-1, keepdim=True) / largest
    return (torch.where(steps > 0, groups / steps, 0).round() * _bf16(steps)).flatten(1)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
