"""Quantizing one linear to SVDQuant INT4: smoothing, low-rank branch, 4-bit codes.

A weight W (N, K) becomes `up @ down + q * s / smooth`. The plain version takes the branch from the SVD of the
weight and rounds the rest to nearest. The calibrated version knows the layer's inputs. It searches for the smoothing
vector with the least error of the outputs, fits branch and codes to each other in turns, chooses each group's scale
by its weighted error, rounds with GPTQ, where later channels compensate for the rounding of earlier ones, and fits the
branch's up matrix to what is left. Smoothing, branch and scales are rounded before the next step is computed from
them, so that it corrects their error.

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
OVERSAMPLING = 16  # directions beyond the rank in the subspace iteration
COARSE_ALPHAS = (0.25, 0.5, 0.75)  # smoothing exponents of the first search
FINE_STEPS = (0.125, 0.0625)  # distances from the best exponent so far
TURNS = 8  # of fitting codes to the branch and the branch to the codes
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # scales tried for a group, relative to its maximum's
DAMPING = 0.05  # of the second moments' mean diagonal, added to the diagonal
PANEL = 128  # input channels that GPTQ rounds before it updates the others
TINY = 1e-30  # avoids division by zero in layers whose inputs are all zero
SAMPLE_ROWS = 2048  # input rows kept for the error of the outputs


class InputStats:
    """Statistics of a linear's inputs for the calibrated quantizer: second moments and a sample of rows.

    The sample is not part of the second moments, so that it validates results on other inputs.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.rows = torch.zeros(0, in_features, device=device)  # (M, K), an even random sample
        self._gram = torch.zeros(in_features, in_features, device=device)
        self._keys = torch.zeros(0)
        self._seen = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Add the rows of x (M, K)."""
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
    """A candidate for a quantized linear, in fp32 but rounded to the file's dtypes."""

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
        """The linear in bf16."""
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
    """Quantize a dense weight (N, K) for inputs with the statistics `stats`, on the weight's device."""
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
    """Squared error of the outputs for rows (M, K), relative to the right `outputs` (M, N), with inputs of `bits`."""
    smoothed = _bf16(rows / parts.smooth)
    smoothed = smoothed if bits == 16 else quantize_inputs(smoothed, bits)
    found = smoothed @ parts.residual().T + (rows @ parts.down.T) @ parts.up.T
    return (outputs - found).square().sum() / outputs.square().sum().clamp(min=TINY)


def _both_errors(parts: Parts, rows: Tensor, outputs: Tensor) -> float:
    """The calibrated quantizer's objective: the sum of the errors with 16-bit and with 4-bit inputs."""
    return (squared_error(parts, rows, outputs, 16) + squared_error(parts, rows, outputs, 4)).item()


def _search_smooth(weight: Tensor, rank: int, moments: Tensor, rows: Tensor, outputs: Tensor) -> Parts:
    """The plain quantization whose smoothing gives the least error of the outputs.

    Candidates are 1, inputs^a and inputs^a / weights^(1 - a), first for a few a, then for values next to the best, in
    halving steps. Inputs and weights are the channels' root mean squares (K,) or, as in the paper, their maxima. The
    former are better for most layers, as a single large token sets a maximum; the latter for some.
    """
    means = (moments.diagonal().clamp(min=0).sqrt(), weight.square().mean(0).sqrt())
    maxima = (rows.abs().amax(0), weight.abs().amax(0))
    spans = [[t.clamp(min=1e-4 * t.amax().clamp(min=TINY)).log() for t in pair] for pair in (means, maxima)]
    up, down = low_rank(weight, rank)
    best = round_plainly(weight, torch.ones_like(weight[0]), up, down)
    errors = {(0, 0.0, 0.0): _both_errors(best, rows, outputs)}  # by span, alpha and beta
    candidates = [(span, a, b) for span in range(len(spans)) for a in COARSE_ALPHAS for b in (0.0, 1 - a)]
    for step in (*FINE_STEPS, None):
        for span, alpha, beta in candidates:
            inputs, weights = spans[span]
            exponent = alpha * inputs - beta * weights
            smooth = _bf16((exponent - exponent.mean()).exp())
            up, down = low_rank(weight * smooth, rank, start=down)
            parts = round_plainly(weight * smooth, smooth, up, down)
            error = _both_errors(parts, rows, outputs)
            if error < min(errors.values()):
                best = parts
            errors[span, alpha, beta] = error
        if step is not None:
            span, alpha, beta = min(errors, key=errors.__getitem__)
            candidates = [(span, a, 1 - a if beta else 0.0) for a in (alpha - step, alpha + step)]
    return best


def round_plainly(smoothed: Tensor, smooth: Tensor, up: Tensor, down: Tensor) -> Parts:
    """Round the branch (up, down) of a smoothed weight (N, K), then the residual, to nearest."""
    up, down = _branch(up, down, smooth)
    rest = smoothed - up @ (down * smooth)
    scales = _bf16(rest.unflatten(1, (-1, GROUP)).abs().amax(-1) / MAX_CODE)
    return Parts(smooth, up, down, _codes(rest, scales), scales)


def _branch(up: Tensor, down: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """A smoothed weight's branch as the file stores it: for inputs before smoothing, rounded to bf16."""
    return _bf16(up), _bf16(down / smooth)


def low_rank(weight: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-R approximation of a weight (N, K), as up (N, R) and orthonormal down (R, K).

    Subspace iteration from a fixed random start, at a fraction of an SVD's cost. From `start` (R, K), the result for a
    similar weight, two rounds are enough.
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
    """Columns (K, R) that span the same space as `basis`, nearly orthonormal by one Cholesky step.

    That is enough between rounds, and takes a fraction of a QR decomposition's time on a GPU.
    """
    basis = basis.double()
    factor = torch.linalg.cholesky(_damped(basis.T @ basis, 1e-11), upper=True)
    return torch.linalg.solve_triangular(factor, basis, upper=True, left=False).float()


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """A symmetric matrix, made definite in place by adding to its diagonal."""
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
    """Codes (N, K) of `rest` (N, K) for given scales, rounded channel by channel, the largest inputs first."""
    order = moments.diagonal().argsort(descending=True)
    factor = _inverse_factor(moments, order, damping)
    factor /= factor.diagonal().clone()[:, None]
    rest, steps = rest.T[order], scales.T[order // GROUP]  # (K, N), so that a channel's values are contiguous
    divisors = torch.where(steps > 0, steps, torch.inf)
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), PANEL):
        chosen = slice(start, start + PANEL)
        panel, triangle = rest[chosen], factor[chosen, chosen]
        channels = zip(panel, codes[chosen], steps[chosen], divisors[chosen], strict=True)
        for i, (values, rounded, step, divisor) in enumerate(channels, 1):
            torch.div(values, divisor, out=rounded).round_().clamp_(-MAX_CODE, MAX_CODE)
            values.addcmul_(rounded, step, value=-1)  # the rounding error
            panel[i:].addr_(triangle[i - 1, i:], values, alpha=-1)
        rest[start + PANEL :].addmm_(factor[chosen, start + PANEL :].T, panel, alpha=-1)
    return codes[order.argsort()].T.contiguous()


def _inverse_factor(moments: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper triangular U (K, K) with U^T U the inverse of the damped moments (K, K), channels in `order`.

    Computed from the Cholesky factor of the moments in reverse order, whose inverse is U reversed.
    """
    reverse = order.flip(0)
    lower = torch.linalg.cholesky(_damped(moments[reverse][:, reverse].double(), damping))
    identity = torch.eye(len(order), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).float().flip(0, 1)


def _fit_up(rest: Tensor, parts: Parts, moments: Tensor) -> Tensor:
    """The branch's up (N, R) that, with its given down, fits `rest` (N, K) best for the inputs."""
    down = (parts.down * parts.smooth).double()
    seen = down @ moments.double()  # (R, K)
    normal = _damped(seen @ down.T, 1e-4)
    return _bf16(torch.linalg.solve(normal, seen @ rest.T.double()).T.float())


def _codes(rest: Tensor, scales: Tensor) -> Tensor:
    """Codes (N, K) of `rest` (N, K) in steps of the groups' scales (N, G), rounded to nearest."""
    steps = scales[:, :, None]
    groups = rest.unflatten(1, (-1, GROUP)) / torch.where(steps > 0, steps, torch.inf)
    return groups.round_().clamp_(-MAX_CODE, MAX_CODE).flatten(1)


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights (N, K) of codes (N, K) at scales (N, G)."""
    return (codes.unflatten(1, (-1, GROUP)) * scales[:, :, None]).flatten(1)


def quantize_inputs(x: Tensor, bits: int) -> Tensor:
    """Inputs (M, K) rounded to `bits` in groups of 64 and dequantized, as in W4A4 and W4A8 kernels."""
    groups, largest = x.unflatten(1, (-1, GROUP)), 2 ** (bits - 1) - 1
    steps = groups.abs().amax(-1, keepdim=True) / largest
    return (torch.where(steps > 0, groups / steps, 0).round() * _bf16(steps)).flatten(1)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
