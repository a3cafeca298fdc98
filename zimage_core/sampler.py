"""Flow matching: sigmas, starting noise, the loop over steps and the samplers that take one.

sigma runs from 1 (noise) to 0 (image) and x = (1 - sigma) image + sigma noise, so the flow is
d x / d sigma = noise - image. Default schedule and guidance: huggingface/diffusers `pipelines/z_image@v0.42.1`. The
other schedules and the samplers give ComfyUI's sigmas and steps (`comfy/samplers.py`, `comfy/k_diffusion/sampling.py`
v0.33.0).
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .failures import integer, one_of, within
from .models.config import SHIFT
from .models.transformer import PIXELS_PER_CELL, Conditioning

MAX_STEPS = 100
SEEDS = 2**64
MAX_SHIFT = 100
TIMES = 1000  # that ComfyUI's schedules choose from
ROUNDING = 1e-5  # of a sigma in fp32, far below a step

Seeds = torch.Generator | int | Sequence[int] | Sequence[torch.Generator] | None
Model = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""ZImageTransformer, or its `forward` with hooks."""


def shift_sigma(s: Tensor, shift: float = SHIFT) -> Tensor:
    """Spend more of the steps near the noise: shift * s / (1 + (shift - 1) s)."""
    return shift * s / (1 + (shift - 1) * s)


def get_sigmas(steps: int = 8, start: float = 1.0, shift: float = SHIFT, schedule: str = "even") -> Tensor:
    """(steps + 1,) fp32 from the shifted `start` down to 0, spaced before the shift as one of SCHEDULES has it.

    start below 1 is the denoise strength of img2img. "even" begins exactly there; the others, as ComfyUI does, at the
    last `steps` of as many more as the whole way would take. "beta" may have fewer steps, where many crowd at its ends.
    Raises ValueError for steps outside 1..100, not 0 < start <= 1, a shift not above 0 and an unknown schedule.
    """
    within("steps", integer("steps", steps), 1, MAX_STEPS, "8 is what the model was made for")
    within("strength", start, 0, 1, "0.6 keeps much of the picture, 1 nothing", above=True)
    _check_shift(shift)
    if one_of("schedule", schedule, ("even", *SCHEDULES)) == "even":
        return shift_sigma(torch.linspace(start, 0, steps + 1, dtype=torch.float64), shift).float()
    total = max(steps, int(steps / start))
    sigmas = shift_sigma(SCHEDULES[schedule](total, shift).unique().flip(0), shift)
    return torch.cat((sigmas, torch.zeros(1)))[-(steps + 1) :].float()


def _check_shift(shift: float) -> None:
    within("shift", shift, 0, MAX_SHIFT, f"{SHIFT:g} is Turbo's own", above=True)


def _simple(steps: int, shift: float) -> Tensor:
    """(steps,) of a thousandth each, every (1000 / steps)th."""
    return 1 - (torch.arange(steps, dtype=torch.float64) * (TIMES / steps)).floor() / TIMES


def _beta(steps: int, shift: float) -> Tensor:
    """(steps,) at quantiles of the beta distribution (0.6, 0.6), denser at both ends (arXiv 2407.12173).

    Its distribution function is the integral of (sin a cos a)^(2 * 0.6 - 1) over a, at sin(a)^2.
    """
    angle = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    reached = torch.cumulative_trapezoid((angle.sin() * angle.cos()).clamp(min=0) ** (2 * 0.6 - 1), angle)
    wanted = (1 - torch.arange(steps, dtype=torch.float64) / steps) * reached[-1]
    above = torch.searchsorted(reached, wanted).clamp(1, len(reached) - 1)
    part = (wanted - reached[above - 1]) / (reached[above] - reached[above - 1])
    quantile = (angle[above] + part * (angle[1] - angle[0])).sin() ** 2
    return ((quantile * (TIMES - 1)).round() + 1) / TIMES


def _sgm_uniform(steps: int, shift: float) -> Tensor:
    """(steps,) evenly from 1 down to the last thousandth, without that; even after one shift, then shifted again."""
    least = shift_sigma(torch.tensor(1 / TIMES, dtype=torch.float64), shift)
    return torch.linspace(1, float(least), steps + 1, dtype=torch.float64)[:-1]


SCHEDULES: dict[str, Callable[[int, float], Tensor]] = {"simple": _simple, "beta": _beta, "sgm_uniform": _sgm_uniform}
"""Beside "even": (steps, shift) -> (steps,) fp64 before the shift, from 1 down, on ComfyUI's thousand times."""


def read_sigmas(given: Iterable[float], shift: float = SHIFT) -> Tensor:
    """(N + 1,) fp32 of N sigmas as diffusers takes them: shifted, with 0 behind them.

    ValueError unless they are 1 to 100 numbers that fall from at most 1 to above 0.
    """
    _check_shift(shift)
    try:
        found = [float(sigma) for sigma in given]
    except (TypeError, ValueError):
        raise ValueError(f"sigmas: expected a list of numbers, found {given!r:.100}") from None
    falling = all(before > after for before, after in zip(found, [*found[1:], 0.0]))
    if not falling or not 1 <= len(found) <= MAX_STEPS or found[0] > 1:
        raise ValueError(f"sigmas: expected 1 to {MAX_STEPS}, falling from at most 1 to above 0, found {found!r:.100}")
    return torch.cat([shift_sigma(torch.tensor(found, dtype=torch.float64), shift), torch.zeros(1)]).float()


def draw_noise(generator: torch.Generator | int, batch: int, height: int, width: int, channels: int = 16) -> Tensor:
    """(batch, channels, H/8, W/8) fp32 normal noise, made on the CPU so that a seed gives the same on every device.

    height, width in pixels. An int seeds a fresh generator, as ComfyUI does.
    """
    if isinstance(generator, int):
        generator = torch.Generator("cpu").manual_seed(generator)
    cells = (height // PIXELS_PER_CELL, width // PIXELS_PER_CELL)
    return torch.randn((batch, channels, *cells), generator=generator, device="cpu", dtype=torch.float32)


def starting_noise(generator: Seeds, count: int, height: int, width: int) -> tuple[Tensor, list[int] | None]:
    """(count, 16, H/8, W/8) fp32 noise of a size in pixels, and the seed of each, None where a generator was given.

    An int, or else a random one, seeds the first picture, the next int the next one; a list has a seed or a generator
    for each. ValueError for seeds outside 0 .. 2^64 - 1, another number of them, and generators not on the CPU.
    """
    if isinstance(generator, torch.Generator):
        return draw_noise(_on_cpu(generator), count, height, width), None
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"seeds: expected {count}, one for each picture, found {len(generator)}")
        if isinstance(generator[0], torch.Generator):
            return torch.cat([draw_noise(_on_cpu(one), 1, height, width) for one in generator]), None
        seeds = [integer("seed", seed) for seed in generator]
    else:
        first = secrets.randbelow(2**32) if generator is None else integer("seed", generator)
        seeds = [first, *((first + i) % SEEDS for i in range(1, count))]
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, found {seed}")
    return torch.cat([draw_noise(seed, 1, height, width) for seed in seeds]), seeds


def _on_cpu(generator: object) -> torch.Generator:
    """The generator; ValueError unless it is one, on the CPU."""
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        found = generator.device if isinstance(generator, torch.Generator) else repr(generator)
        raise ValueError(f"generator: expected one on the cpu, found {found}; give a seed instead")
    return generator


def predict_flow(model: Model, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """d x / d sigma at latents (B, 16, H/8, W/8), sigma (B,) or scalar in 0..1; latents' shape and dtype.

    The only place that turns sigma into the model's time and flips its sign.
    """
    return -model(latents, 1.0 - sigma.reshape(-1), cond)


def way(sigma: float, shift: float = SHIFT) -> float:
    """How far from noise (0) to picture (1) a sigma is, as for evenly spaced steps, before the shift."""
    return 1 - sigma / (shift - (shift - 1) * sigma)


def at_sigma(cond: Conditioning, sigma: float, shift: float = SHIFT) -> Conditioning:
    """The conditioning with the ControlNets that work at a sigma."""
    done = way(sigma, shift) + ROUNDING
    working = tuple(control for control in cond.controls if control.start <= done < control.end)
    return cond if len(working) == len(cond.controls) else replace(cond, controls=working)


@dataclass(frozen=True)
class Point:
    """The start of a step: latents (B, 16, h, w) at a sigma, and their flow; `image` is the picture they lead to."""

    sigma: float
    latents: Tensor
    flow: Tensor

    @property
    def image(self) -> Tensor:
        return self.latents - self.sigma * self.flow


def euler(now: Point, last: Point | None, after: float, flow: Callable[[Tensor], Tensor]) -> Tensor:
    """One step along the flow.

    Every sampler returns the latents at the sigma `after`. now, last: the points of this step and of the one before;
    flow(latents): the flow at `after`.
    """
    return now.latents + (after - now.sigma) * now.flow


def heun(now: Point, last: Point | None, after: float, flow: Callable[[Tensor], Tensor]) -> Tensor:
    """Along the mean of the flows at both ends of the step: two runs of the model, one in the last step."""
    there = euler(now, last, after, flow)
    return there if after == 0 else now.latents + (after - now.sigma) * (now.flow + flow(there)) / 2


def dpmpp_2m(now: Point, last: Point | None, after: float, flow: Callable[[Tensor], Tensor]) -> Tensor:
    """DPM-Solver++ (2M) (arXiv 2211.01095)."""
    return _multistep(now, last, after, lambda h, moved: moved * h / 2)


def res_multistep(now: Point, last: Point | None, after: float, flow: Callable[[Tensor], Tensor]) -> Tensor:
    """The second-order multistep method of arXiv 2308.02157."""
    return _multistep(now, last, after, lambda h, moved: h - moved)


def _multistep(now: Point, last: Point | None, after: float, weight: Callable[[float, float], float]) -> Tensor:
    """Towards the image extrapolated from the last two, over the step h in log sigma; Euler in the first and last step.

    weight(h, 1 - exp(-h)) is that of the image's change for each unit of log sigma.
    """
    if last is None or after == 0:
        return euler(now, last, after, lambda latents: latents)
    h, before = math.log(now.sigma / after), math.log(last.sigma / now.sigma)
    moved = 1 - after / now.sigma
    image = now.image
    return (1 - moved) * now.latents + moved * image + weight(h, moved) / before * (image - last.image)


SAMPLERS = {"euler": euler, "heun": heun, "res_multistep": res_multistep, "dpmpp_2m": dpmpp_2m}


def denoise(
    model: Model,
    latents: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    *,
    negative: Conditioning | None = None,
    guidance: float = 0.0,
    early: tuple[Conditioning, float] | None = None,
    on_step: Callable[[int, int, Tensor], bool | None] | None = None,
    on_step_end: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    hold: Callable[[Tensor, float], Tensor] | None = None,
    shift: float = SHIFT,
    sampler: str = "euler",
) -> Tensor:
    """Integrate the flow from sigmas[0] to sigmas[-1] by one of SAMPLERS; returns fp32 latents of the same shape.

    With guidance g > 0 the flow is pos + g (pos - neg), g + 1 in ComfyUI's terms, and `negative` is needed. early: a
    conditioning in the place of cond, and the part of the way from noise to picture in which it is.
    on_step_end(i, sigma (), latents) replaces the latents after step i. on_step(done, total, predicted image latents)
    after each step; returning False stops the run early. hold(latents, sigma) replaces the latents before the first
    step and after each, for what is known of the picture. shift is that of the sigmas, for ControlNets that work part
    of the way.
    """
    if guidance > 0 and negative is None:
        raise ValueError(f"guidance {guidance}: a negative prompt's conditioning is needed, none was given")
    take_step = SAMPLERS[one_of("sampler", sampler, SAMPLERS)]
    latents = latents.float()
    total = len(sigmas) - 1
    steps = sigmas.tolist()
    device_sigmas = sigmas.to(latents.device)

    def flow_at(i: int, latents: Tensor) -> Tensor:
        first = early and way(steps[i], shift) + ROUNDING < early[1]
        positive = early[0] if early and first else cond
        flow = predict_flow(model, latents, device_sigmas[i], at_sigma(positive, steps[i], shift))
        if guidance > 0 and negative is not None:
            against = predict_flow(model, latents, device_sigmas[i], at_sigma(negative, steps[i], shift))
            flow = flow + guidance * (flow - against)
        return flow

    if hold:
        latents = hold(latents, steps[0])
    last = None
    for i in range(total):
        now = Point(steps[i], latents, flow_at(i, latents))
        latents = take_step(now, last, steps[i + 1], functools.partial(flow_at, i + 1))
        if hold:
            latents = hold(latents, steps[i + 1])
        if on_step_end:
            latents = on_step_end(i, device_sigmas[i], latents)
        if on_step and on_step(i + 1, total, now.image) is False:
            break
        last = now
    return latents
