"""One linear: what calibration gains on inputs that it never saw, and inputs that give it nothing to go by."""

from __future__ import annotations

import pytest
import torch

from zimage_core.linear.layout import unpack_nibbles
from zimage_core.quantize.solver import (
    SAMPLE_ROWS,
    InputStats,
    Parts,
    gptq,
    low_rank,
    quantize_inputs,
    squared_error,
    svdq_calibrated,
    svdq_from_dense,
)

WIDTH, RANK = 256, 16


def as_parts(weights) -> Parts:
    w, codes = weights, unpack_nibbles(weights.qweight)
    return Parts(*(t.float() for t in (w.smooth_factor, w.proj_up, w.proj_down, codes, w.wscales)))


def layer(outliers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / 16
    inputs = torch.randn(3072, WIDTH, generator=generator)
    if outliers:
        mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
        inputs = (inputs * torch.arange(1, WIDTH + 1) ** -0.5) @ mixing * torch.randn(WIDTH, generator=generator).exp()
        inputs[:, :3] *= 20
    return weight, inputs


def stats_of(rows: torch.Tensor) -> InputStats:
    stats = InputStats(rows.shape[1])
    for chunk in rows.split(500):
        stats.add(chunk)
    return stats


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("outliers, limit", [(True, 0.75), (False, 0.95)])
def test_calibration_helps_on_inputs_it_never_saw(outliers, limit, bits):
    weight, inputs = layer(outliers)
    calibration, test = inputs[:2048], inputs[2048:]
    errors = [
        squared_error(as_parts(weights), test, test @ weight.T, bits).sqrt()
        for weights in (svdq_calibrated(weight, RANK, stats_of(calibration)), svdq_from_dense(weight, RANK))
    ]
    assert errors[0] < limit * errors[1]


def test_sample_is_kept_out_of_the_second_moments():
    rows = torch.randn(6 * SAMPLE_ROWS, 64, generator=torch.Generator().manual_seed(1))
    stats = stats_of(rows)
    assert len(stats.rows) == SAMPLE_ROWS
    position = {tuple(row.tolist()): i for i, row in enumerate(rows)}
    sampled = [position[tuple(row.tolist())] for row in stats.rows]
    assert sampled == sorted(set(sampled)) and sampled[0] < 200 and sampled[-1] > len(rows) - 200
    others = rows[[i for i in range(len(rows)) if i not in set(sampled)]]
    torch.testing.assert_close(stats.second_moments(), others.T @ others / len(others), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("rows", [torch.zeros(100, WIDTH), torch.ones(1, WIDTH), torch.eye(WIDTH)[:5] * 1e4])
def test_inputs_that_say_little_still_give_a_sound_linear(rows):
    weight, _ = layer(False)
    dequantized = svdq_calibrated(weight, RANK, stats_of(rows)).dequantize()
    assert dequantized.isfinite().all()
    assert torch.dist(dequantized, weight) < 0.5 * weight.norm()


def test_codes_are_those_that_quantizers_emit():
    weight, inputs = layer(True)
    codes = unpack_nibbles(svdq_calibrated(weight, RANK, stats_of(inputs)).qweight)
    assert codes.amin() == -7 and codes.amax() == 7


@pytest.mark.parametrize("outlier", [0.0, 1e6])
def test_low_rank_of_a_weight_of_lower_rank_is_exact(outlier):
    weight = torch.ones(WIDTH, WIDTH)
    weight[3, 5] += outlier
    up, down = low_rank(weight, RANK)
    assert torch.dist(up @ down, weight) < 1e-5 * weight.norm()
    torch.testing.assert_close(down @ down.T, torch.eye(RANK), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [128, 320])  # a whole panel, and panels of which the last is short
def test_gptq_is_the_published_one(width):
    generator = torch.Generator().manual_seed(4)
    weight, inputs = torch.randn(16, width, generator=generator), torch.randn(4 * width, width, generator=generator)
    inputs = (inputs + inputs[:, :1]) * torch.linspace(0.3, 2, width)
    moments = inputs.T @ inputs / len(inputs)
    scales = weight.unflatten(1, (-1, 64)).abs().amax(-1) / 5  # some are clipped
    scales[0, 0] = 0

    order = moments.diagonal().argsort(descending=True)
    rest, expected = weight.double().clone(), torch.zeros_like(weight)
    damped = moments.double() + 0.05 * moments.diagonal().mean() * torch.eye(width)
    while len(order):  # Optimal Brain Quantization in a fixed order: inverts anew what is left
        at, others = order[0], order[1:]
        steps = scales[:, at // 64].double()
        expected[:, at] = torch.where(steps > 0, rest[:, at] / steps, 0).round().clamp(-7, 7)
        inverse = torch.linalg.inv(damped[order][:, order])
        error = (rest[:, at] - expected[:, at] * steps) / inverse[0, 0]
        rest[:, others] -= torch.outer(error, inverse[0, 1:])
        order = others
    assert (gptq(weight, scales, moments) != expected).float().mean() < 0.002  # ties, as fp32 rounds them


def test_low_rank_starts_from_an_earlier_answer():
    weight, _ = layer(False)
    before = low_rank(weight, RANK)
    changed = weight + 0.001 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
    up, down = low_rank(changed, RANK, start=before[1])
    best = torch.linalg.svdvals(changed)[RANK:].square().sum().sqrt()
    assert torch.dist(changed, up @ down) == pytest.approx(best.item(), rel=1e-3)


def test_quantized_inputs_hold_few_values():
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(3))
    x[0, :64] = 0
    rounded = quantize_inputs(x, 4)
    assert rounded[0, :64].count_nonzero() == 0
    assert all(len(group.unique()) <= 15 for group in rounded.view(-1, 64))
    assert (rounded - x).abs().amax() <= 0.51 * x.abs().amax() / 7
