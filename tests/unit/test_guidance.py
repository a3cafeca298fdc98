"""Normalized attention guidance: against two forwards side by side, and what is left of it at its ends."""

from __future__ import annotations

import functools

import pytest
import torch

from zimage_core.formats.load import load_transformer
from zimage_core.models.attention import sdpa
from zimage_core.models.guidance import Nag
from zimage_core.models.transformer import Hooks
from zimage_core.sampler import denoise, get_sigmas

HEIGHT, WIDTH, IMAGE = 64, 128, 32  # pixels and image tokens, without pads: those stay where they are, at position 0


@pytest.fixture(scope="module")
def model(tiny_files):
    return load_transformer(tiny_files["model"], dtype=torch.float32, backend="reference", precision="w4a16")


def features(model, *lengths):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(n, model.config.cap_feat_dim, generator=gen) for n in lengths]


def noise(count, height=HEIGHT, width=WIDTH):
    return torch.randn(count, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(1))


def side_by_side(nag, q, k, v, mask):
    """Attention of rows with the positive captions and as many with the negative one, as in ComfyUI's NAGuidance."""
    out = sdpa(q, k, v, mask)
    positive, negative = out[:, :IMAGE].chunk(2)
    guided = positive * (nag.scale + 1) - negative * nag.scale
    ratio = guided.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
    guided = guided * torch.minimum(ratio, torch.full_like(ratio, nag.tau)) / ratio
    out[:, :IMAGE] = (guided * nag.alpha + positive * (1 - nag.alpha)).repeat(2, 1, 1)
    return out


@pytest.mark.parametrize("lengths, against", [((20,), 20), ((20,), 70), ((70,), 3), ((20, 40), 33), ((40, 40), 64)])
@pytest.mark.parametrize("nag", [Nag(0.5), Nag(3, tau=1.1, alpha=0.9)])
@torch.no_grad()
def test_guided_attention_equals_two_forwards(model, lengths, against, nag):
    """The same sums in another order: fp32 rounding, carried through the tiny model's layers."""
    *captions, negative = features(model, *lengths, against)
    latents, t = noise(len(lengths)), torch.tensor([0.3])
    cond = model.prepare(captions, HEIGHT, WIDTH)
    found = model(latents, t, model.guided(cond, model.prepare([negative], HEIGHT, WIDTH), nag))

    both = model.prepare([*captions, *[negative] * len(captions)], HEIGHT, WIDTH)
    hooks = Hooks(run_block=functools.partial(guide_layers, functools.partial(side_by_side, nag)))
    expected = model(latents.repeat(2, 1, 1, 1), t, both, hooks)[: len(lengths)]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found - model(latents, t, cond)).abs().max() > 1e-3


def guide_layers(attend, stage, index, block, x, *args):
    return block(x, *args[:-1], attend) if stage == "layers" else block(x, *args)


@pytest.mark.parametrize("nag", [Nag(0), Nag(5, alpha=0)])
@torch.no_grad()
def test_without_scale_or_share_the_picture_is_the_plain_one(model, nag):
    """But for rounding: attention runs over the same tokens, in slices. 48 x 80 pixels have 17 pads."""
    positive, negative = (model.prepare([x], 48, 80) for x in features(model, 20, 50))
    plain = model(noise(2, 48, 80), torch.tensor([0.3]), positive)
    guided = model(noise(2, 48, 80), torch.tensor([0.3]), model.guided(positive, negative, nag))
    torch.testing.assert_close(guided, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_negative_caption_that_is_the_positive_one_changes_nothing(model):
    (caption,) = features(model, 20)
    cond = model.prepare([caption], HEIGHT, WIDTH)
    plain = denoise(model, noise(1), get_sigmas(2), cond)
    guided = denoise(model, noise(1), get_sigmas(2), model.guided(cond, cond, Nag(4)))
    torch.testing.assert_close(guided, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tau_limits_the_norm():
    gen = torch.Generator().manual_seed(2)
    positive, negative = (torch.randn(2, 5, 8, generator=gen) for _ in range(2))
    blended = Nag(50, tau=1.5, alpha=1).blend(positive, negative)
    ratio = blended.norm(p=1, dim=-1) / positive.norm(p=1, dim=-1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.5))
    assert torch.equal(Nag(3).blend(0 * positive, 0 * positive), 0 * positive)


@pytest.mark.parametrize(
    "numbers",
    [{"scale": -1}, {"scale": 101}, {"scale": float("nan")}, {"tau": 0.9}, {"tau": float("inf")}, {"alpha": 1.1}],
)
def test_numbers_outside_their_range_are_refused(numbers):
    with pytest.raises(ValueError, match="expected"):
        Nag(**{"scale": 1.0, **numbers})
