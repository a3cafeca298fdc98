"""Samplers against diffusers' schedulers, with a flow that bends: its euler and heun.

diffusers' DPM-Solver++ for flows extrapolates over log((1 - sigma) / sigma), ComfyUI's dpmpp_2m, which ours is, over
log(sigma), and its beta sigmas are not rounded to a thousand times; tests/host compares those with ComfyUI.
"""

from __future__ import annotations

import pytest
import torch

from zimage_core.sampler import denoise, get_sigmas

diffusers = pytest.importorskip("diffusers")
SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}


class Plain:
    """A conditioning that changes nothing."""

    controls = ()


def bent(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A model's output, from noise to image, that depends on where and when it is asked."""
    return (latents * 2 + t).sin() - latents * t


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 5, 8])
def test_a_sampler_equals_diffusers(sampler, steps):
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = getattr(diffusers, SCHEDULERS[sampler])(num_train_timesteps=1000, shift=3.0)
    if sampler == "euler":
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
        sigmas = get_sigmas(steps)
    else:
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas[[0, *range(1, 2 * steps, 2)]]  # each but the first and last twice
    expected = noise
    for timestep in scheduler.timesteps:
        expected = scheduler.step(-bent(expected, 1 - timestep / 1000), timestep, expected).prev_sample
    found = denoise(lambda latents, t, cond: bent(latents, t), noise, sigmas, Plain(), sampler=sampler)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)  # fp32 rounding, whose order differs
