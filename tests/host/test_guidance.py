"""Samplers, NAG, variety and their nodes in a real ComfyUI: against its own samplers and its own NAGuidance."""

from __future__ import annotations

import pytest
import torch

from zimage_core.models.guidance import Nag
from zimage_core.sampler import SAMPLERS, SCHEDULES, denoise, draw_noise, get_sigmas

TINY = "svdq-int4_r32-z-image-tiny.safetensors"
CAPTION, HEIGHT, WIDTH = 64, 64, 128  # 32 image tokens, no pads
STEPS = 5


@pytest.fixture(scope="module")
def ours(host):
    return host.model.load_model(TINY, "torch", "w4a16")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def conditioning(tokens: int = 20, seed: int = 0):
    return [[torch.randn(1, tokens, CAPTION, generator=torch.Generator().manual_seed(seed)), {}]]


def latent(count: int = 1):
    return {"samples": torch.zeros(count, 16, HEIGHT // 8, WIDTH // 8)}


def ksample(model, positive, negative=None, sampler="euler", scheduler="simple", start=None, cfg=1.0):
    import nodes

    negative = negative or [[torch.zeros_like(c), extra] for c, extra in positive]
    args = (model, 7, STEPS, cfg, sampler, scheduler, positive, negative, start or latent())
    return nodes.common_ksampler(*args)[0]["samples"]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("scheduler", SCHEDULES)
@pytest.mark.parametrize("shift", [1.5, 3.0, 6.0])
def test_schedules_are_comfyuis(ours, scheduler, shift):
    import comfy.samplers
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    (model,) = ModelSamplingAuraFlow().patch_aura(ours, shift)
    sampling = model.get_model_object("model_sampling")
    for steps in (1, 4, 8, 9, 30, 77):
        expected = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        torch.testing.assert_close(get_sigmas(steps, shift=shift, schedule=scheduler), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_are_comfyuis(host, ours, sampler, schedule):
    """The core's loop on the same model and noise; its latents as ComfyUI's format scales them."""
    positive = conditioning()
    expected = ksample(ours, positive, sampler=sampler, scheduler=schedule)
    transformer = ours.model.diffusion_model.transformer
    cond = transformer.prepare(list(positive[0][0]), HEIGHT, WIDTH)
    noise = draw_noise(7, 1, HEIGHT, WIDTH)
    found = denoise(transformer, noise, get_sigmas(STEPS, schedule=schedule), cond, sampler=sampler)
    assert relative(ours.get_model_object("latent_format").process_out(found), expected) < 1e-4


def test_the_sampler_node_has_them(host, ours):
    pack = __import__("sys").modules["zimage_pack"]
    node, positive = pack.NODE_CLASS_MAPPINGS["ZImageSampler"](), conditioning()
    for sampler, scheduler in (("euler", "simple"), ("res_multistep", "beta"), ("heun", "sgm_uniform")):
        (found,) = node.sample(ours, positive, 7, STEPS, WIDTH, HEIGHT, 1, sampler_name=sampler, scheduler=scheduler)
        assert relative(found["samples"], ksample(ours, positive, None, sampler, scheduler)) < 1e-5


@pytest.mark.parametrize("tokens", [20, 50])
def test_nag_is_that_of_comfyuis_node(host, ours, tokens):
    """NAGuidance on our MODEL, with a batch of both prompts, against ours, whose scale counts 1 less."""
    from comfy_extras.nodes_nag import NAGuidance

    positive, negative = conditioning(), conditioning(tokens, 1)
    (stock,) = NAGuidance.execute(ours, 3.0, 0.5, 1.5).result
    expected = ksample(stock, positive, negative)
    found = ksample(host.guidance.apply_nag(ours, negative, 2.0, 1.5, 0.5), positive)
    plain = ksample(ours, positive)
    assert relative(found, expected) < 1e-4 < 1e-2 < relative(found, plain)


def test_nag_is_the_cores(host, ours):
    positive, negative = conditioning(), conditioning(40, 1)
    transformer = ours.model.diffusion_model.transformer
    cond, against = (transformer.prepare(list(one[0][0]), HEIGHT, WIDTH) for one in (positive, negative))
    guided = transformer.guided(cond, against, Nag(2.0))
    expected = denoise(transformer, draw_noise(7, 1, HEIGHT, WIDTH), get_sigmas(STEPS, schedule="simple"), guided)
    found = ksample(host.guidance.apply_nag(ours, negative, 2.0, Nag.tau, Nag.alpha), positive)
    assert relative(found, ours.get_model_object("latent_format").process_out(expected)) < 1e-4


def test_nag_counts_in_the_plan(host, ours):
    guided = host.guidance.apply_nag(ours, conditioning(512, 1), 1.0, 2.5, 0.5)
    assert guided.need(1024, 1024) > ours.need(1024, 1024)
    asked, plain = [], type(ours.model).activations

    def remember(self, *args, **kwargs):
        asked.append(self.nag)
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ours.model), "activations", remember)
        ksample(guided, conditioning())
        ksample(ours, conditioning())
    assert (guided.model_options["transformer_options"]["zimage_nag"][0], 512) in asked and asked[-1] is None


def test_nag_is_refused_where_it_cannot_work(host, ours):
    with pytest.raises(ValueError, match="wide, this model wants 64"):
        host.guidance.apply_nag(ours, [[torch.zeros(1, 3, 2560), {}]], 1.0, 2.5, 0.5)
    assert host.guidance.apply_nag(ours, conditioning(), 0.0, 2.5, 0.5) is ours


def test_variety_is_for_the_first_part_of_the_way(host, ours):
    plain, found = conditioning(), host.guidance.vary(conditioning(), 20.0, 3, 2, 0.5, 0.5)
    (varied, first), (rest, second) = found
    assert varied.shape == (2, 20, CAPTION) and torch.equal(rest, plain[0][0])
    assert first["end_percent"] == second["start_percent"] and second["end_percent"] == 1.0
    both = ksample(ours, found, start=latent(2))
    assert relative(both, ksample(ours, plain, start=latent(2))) > 1e-3
    assert torch.equal(both, ksample(ours, host.guidance.vary(plain, 20.0, 3, 2, 0.5, 0.5), start=latent(2)))
    assert host.guidance.vary(plain, 0.0, 3, 1, 0.5, 0.5) is plain
    assert len(host.guidance.vary(plain, 1.0, 3, 1, 0.5, 1.0)) == 1
