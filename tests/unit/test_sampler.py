"""Sigmas, noise and the Euler loop, against closed forms and a model whose flow is known."""

from __future__ import annotations

import itertools

import pytest
import torch

from zimage_core.sampler import SAMPLERS, SCHEDULES, denoise, draw_noise, get_sigmas, predict_flow

COMFY_SIMPLE_SHIFT_3 = [1, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3, 0]


class StraightLine:
    """A stand-in whose flow is exact: every x lies on the line from `image` to `noise`, output = image - noise."""

    def __init__(self, image, noise):
        self.image, self.noise, self.seen = image, noise, []

    def __call__(self, latents, t, cond):
        self.seen.append(t.item())
        return cond * (self.image - self.noise)


class Times(float):
    """A conditioning that multiplies, without ControlNets."""

    controls = ()


@pytest.fixture
def line():
    gen = torch.Generator().manual_seed(0)
    return StraightLine(torch.randn(2, 16, 4, 4, generator=gen), torch.randn(2, 16, 4, 4, generator=gen))


def test_eight_sigmas():
    torch.testing.assert_close(get_sigmas(), torch.tensor(COMFY_SIMPLE_SHIFT_3), atol=5e-6, rtol=0)
    s = torch.arange(8, -1, -1) / 8
    torch.testing.assert_close(get_sigmas(8), 3 * s / (1 + 2 * s))


@pytest.mark.parametrize("steps", [4, 8, 20])
def test_sigmas_equal_diffusers(steps):
    """As its Z-Image pipeline sets its scheduler up: its default sigmas, static shift 3 of the model's config."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
    if steps == 8:
        torch.testing.assert_close(get_sigmas(8), scheduler.sigmas)
    assert len(scheduler.sigmas) == steps + 1


@pytest.mark.parametrize("steps", [1, 4, 100])
def test_ends_and_order(steps):
    sigmas = get_sigmas(steps)
    assert (len(sigmas), sigmas[0].item(), sigmas[-1].item()) == (steps + 1, 1.0, 0.0)
    assert (sigmas.diff() < 0).all()


def test_denoise_strength():
    assert get_sigmas(4, start=0.5)[0].item() == pytest.approx(1.5 / 2)
    for schedule in SCHEDULES:
        whole = get_sigmas(10, schedule=schedule)
        assert torch.equal(get_sigmas(5, start=0.5, schedule=schedule), whole[-6:])


BAD = [(0,), (101,), (-1,), (8, 0.0), (8, 1.1), (8, 1.0, 0.0), (8, 1.0, float("nan")), (8, 1.0, 3.0, "karras")]


@pytest.mark.parametrize("arguments", BAD)
def test_bad_ranges(arguments):
    with pytest.raises(ValueError, match="expected"):
        get_sigmas(*arguments)


SIGMAS = {  # ComfyUI v0.33.0 `calculate_sigmas`, shift 3
    ("simple", 6): [1.0, 0.937781, 0.8573264, 0.75, 0.6007194, 0.3755622, 0.0],
    ("beta", 6): [1.0, 0.9677076, 0.8877552, 0.7507493, 0.5335051, 0.2331081, 0.0],
    ("sgm_uniform", 6): [1.0, 0.9377105, 0.8576924, 0.751121, 0.6021506, 0.3791946, 0.0],
}


@pytest.mark.parametrize("schedule, steps", SIGMAS)
def test_schedules_are_comfyuis(schedule, steps):
    torch.testing.assert_close(get_sigmas(steps, schedule=schedule), torch.tensor(SIGMAS[schedule, steps]))


@pytest.mark.parametrize("shift, schedule", list(itertools.product([1.0, 3.0, 6.0], SCHEDULES)))
def test_every_schedule_falls_from_one_to_zero(shift, schedule):
    for steps in (1, 2, 9, 33, 100):
        sigmas = get_sigmas(steps, shift=shift, schedule=schedule)
        assert (sigmas[0].item(), sigmas[-1].item()) == (1.0, 0.0) and (sigmas.diff() < 0).all()
        assert len(sigmas) == steps + 1 or schedule == "beta" and len(sigmas) <= steps + 1


def test_noise_is_that_of_the_seed():
    noise = draw_noise(7, 2, 64, 96)
    expected = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(7))
    assert noise.dtype == torch.float32 and torch.equal(noise, expected)
    assert torch.equal(draw_noise(torch.Generator().manual_seed(7), 2, 64, 96), expected)


def test_flow_has_one_sign_and_one_time(line):
    flow = predict_flow(line, line.noise, torch.tensor(0.75), 1.0)
    assert torch.equal(flow, line.noise - line.image)
    assert line.seen == [0.25]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_follows_the_line(line, sampler):
    seen = []
    sigmas = get_sigmas(8)

    def on_step(done, total, image):
        seen.append((done, total, image))

    out = denoise(line, line.noise, sigmas, Times(1), on_step=on_step, sampler=sampler)
    torch.testing.assert_close(out, line.image, atol=1e-5, rtol=1e-5)
    assert [s[:2] for s in seen] == [(i, 8) for i in range(1, 9)]
    again = {"heun": sigmas[1:-1]}.get(sampler, sigmas[:0])  # heun looks where it comes to, too
    torch.testing.assert_close(torch.tensor(sorted(line.seen)), 1 - torch.cat((sigmas[:-1], again)).sort()[0].flip(0))
    torch.testing.assert_close(seen[0][2], line.image, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("res_multistep", 2)])
def test_order_of_a_sampler(sampler, order):
    """Twice the steps, half or a quarter of the error; above sigma 0, where all end by a step of first order."""

    def errors(steps):
        sigmas = torch.logspace(-0.05, -1, steps + 1)
        start = torch.ones(1, 16, 2, 2)
        # d x / d sigma = (x - x^2 / 2) / sigma, so that x = 2 sigma / (sigma + c)
        out = denoise(lambda x, t, cond: -(x - x * x / 2) / (1 - t), start, sigmas, Times(1), sampler=sampler)
        return (out - 2 * sigmas[-1] / (sigmas[-1] + sigmas[0])).abs().max().item()

    coarse, fine = errors(16), errors(32)
    assert coarse / fine > 2**order * 0.85


def test_an_unknown_sampler_is_refused(line):
    with pytest.raises(ValueError, match="sampler: expected one of euler"):
        denoise(line, line.noise, get_sigmas(2), Times(1), sampler="ddim")


def test_guidance_is_added_to_the_positive(line):
    """pos + g (pos - neg), with pos twice and neg half of the line's flow."""
    sigmas = get_sigmas(1)
    out = denoise(line, line.noise, sigmas, Times(2), negative=Times(0.5), guidance=3.0)
    expected = line.noise - (2.0 + 3.0 * 1.5) * (line.noise - line.image)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="negative"):
        denoise(line, line.noise, sigmas, Times(1), guidance=1.0)


def test_a_callback_can_stop(line):
    denoise(line, line.noise, get_sigmas(8), Times(1), on_step=lambda done, total, image: done < 3)
    assert len(line.seen) == 3
