"""What a call may ask for beside prompt and size: samplers, NAG, variety, tiles, start pictures, limits."""

from __future__ import annotations

import functools
import itertools
import json

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zimage_core import Control, load_pipeline
from zimage_core.formats.identify import model_info
from zimage_core.models.config import ControlNetConfig
from zimage_core.sampler import SAMPLERS, SCHEDULES, get_sigmas
from zimage_core.tiles import Tiles
from zimage_core.variety import Variety, seed_of

SIZE = {"height": 32, "width": 48, "num_inference_steps": 3, "generator": 1}


@pytest.fixture(scope="module")
def draw(tiny_files):
    return load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")


def pixels(pictures) -> numpy.ndarray:
    return numpy.stack([numpy.asarray(picture) for picture in pictures]).astype(int)


def differ(one, other) -> bool:
    return not numpy.array_equal(pixels(one), pixels(other))


# --- samplers and schedules ---------------------------------------------------------------------------------------


def test_defaults_are_even_sigmas_and_euler(draw):
    plain = draw("a cat", **SIZE)
    assert not differ(plain, draw("a cat", **SIZE, sampler="euler", schedule="even", shift=3.0))


def test_every_sampler_and_schedule_gives_a_picture_of_its_own(draw):
    asked = [*itertools.product(SAMPLERS, ["even"]), *itertools.product(["euler"], SCHEDULES)]
    found = {pixels(draw("a cat", **SIZE, sampler=s, schedule=c)).tobytes() for s, c in asked}
    assert len(found) == len(asked)


def test_the_shift_is_that_of_the_sigmas(draw):
    seen = []
    draw("a cat", **SIZE, shift=6.0, callback_on_step_end=lambda _, i, timestep, tensors: seen.append(timestep.item()))
    torch.testing.assert_close(torch.tensor(seen), 1000 * get_sigmas(3, shift=6.0)[:-1])


# --- NAG and variety ----------------------------------------------------------------------------------------------


def test_nag_needs_no_guidance(draw, caplog):
    caplog.set_level("WARNING", "zimage_core")
    plain = draw("a cat", **SIZE)
    guided = draw("a cat", **SIZE, negative_prompt="a dog", nag_scale=3.0)
    assert differ(plain, guided) and "negative prompt" not in caplog.text
    assert differ(guided, draw("a cat", **SIZE, negative_prompt="a tree", nag_scale=3.0))
    assert differ(guided, draw("a cat", **SIZE, negative_prompt="a dog", nag_scale=3.0, guidance_scale=1.0))
    assert numpy.abs(pixels(plain) - pixels(draw("a cat", **SIZE, nag_scale=3.0, nag_alpha=0.0))).max() <= 1


def test_a_negative_prompt_for_each(draw):
    """As each prompt alone; sums of a batch of two are ordered otherwise, which may move a pixel by one."""
    asked = {**SIZE, "nag_scale": 3.0, "generator": [1, 2]}
    both = draw(["a cat", "a large tree"], **asked, negative_prompt=["a house on a hill", "sky"])
    one = draw("a cat", **SIZE, nag_scale=3.0, negative_prompt="a house on a hill")
    assert numpy.abs(pixels(both)[:1] - pixels(one)).max() <= 1


def test_variety_follows_the_seed(draw):
    asked = {**SIZE, "num_images_per_prompt": 4, "output_type": "latent"}
    plain, varied = (draw("a cat", **asked, variety=v).images.flatten(1) for v in (0.0, Variety(20.0, 1.0, 1.0)))
    assert ((varied - plain).abs().amax(1) > 0.1).all()
    assert torch.equal(varied, draw("a cat", **asked, variety=Variety(20.0, 1.0, 1.0)).images.flatten(1))
    one = draw("a cat", **{**asked, "generator": 3, "num_images_per_prompt": 1}, variety=Variety(20.0, 1.0, 1.0))
    torch.testing.assert_close(one.images.flatten(1), varied[2:3], atol=1e-4, rtol=1e-4)  # in a batch, but the same


def test_variety_ends_where_it_is_told_to(draw):
    """Of three steps one begins before 0.3 of the way: later features do not matter to it, nor to the plain rest."""
    first = []
    for until in (0.3, 1.0):
        first.append(seen := [])
        asked = {**SIZE, "on_step": lambda done, total, image, seen=seen: seen.append(image.clone())}
        draw("a cat", **asked, variety=Variety(20.0, 1.0, until))
    assert torch.equal(first[0][0], first[1][0]) and not torch.equal(first[0][1], first[1][1])


def test_noise_of_features_is_relative_to_each_token():
    feats = torch.ones(3, 2000) * torch.tensor([[0.1], [1.0], [10.0]])
    varied = Variety(1.0, 0.25, 1.0).vary(feats, 5)
    changed = (varied != feats).float().mean(1)
    deviation = (varied - feats).square().mean(1).sqrt() / feats[:, 0]
    torch.testing.assert_close(changed, torch.full((3,), 0.25), atol=0.05, rtol=0)
    torch.testing.assert_close(deviation, torch.full((3,), (0.25 / 3) ** 0.5), atol=0.03, rtol=0)
    assert seed_of(torch.randn(16, 4, 4)) != seed_of(torch.randn(16, 4, 4))


@pytest.mark.parametrize(
    "asked",
    [
        {"sampler": "ddim"},
        {"schedule": "karras"},
        {"shift": 0.0},
        {"shift": float("nan")},
        {"nag_scale": -1.0},
        {"nag_scale": 1.0, "nag_tau": 0.5},
        {"nag_scale": 1.0, "nag_alpha": 2.0},
        {"variety": -1.0},
        {"variety": float("inf")},
        {"tile": 100},
        {"tile": 64},
        {"max_sequence_length": 5},
        {"max_sequence_length": 4000},
        {"image": [Image.new("RGB", (48, 32))] * 2},
    ],
)
def test_what_cannot_be_asked_for(draw, asked):
    with pytest.raises(ValueError, match="expected"):
        draw("a cat", **SIZE, **asked)


# --- tiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width, most", [(128, 128, 128), (300, 129 * 2, 128), (130, 512, 128), (16, 40, 32)])
def test_tiles_cover_all_with_overlaps(height, width, most):
    tiles = Tiles.over(height, width, most)
    assert tiles.height <= most and tiles.width <= most
    seen = torch.zeros(height, width)
    for top, left in tiles.corners:
        assert top % 2 == left % 2 == 0
        part = tiles.part(seen, top, left)
        assert part.shape == (tiles.height, tiles.width)
        part += 1
    assert seen.min() == 1
    for starts, edge in ((tiles.rows, tiles.height), (tiles.columns, tiles.width)):
        assert all(before + edge - after >= edge // 4 - 2 for before, after in itertools.pairwise(starts))


def test_a_model_that_sees_no_further_than_a_cell_is_the_same_in_tiles():
    noise = torch.randn(2, 16, 20, 30, generator=torch.Generator().manual_seed(0))
    blended = Tiles.over(20, 30, 8).model(lambda latents, t, cond: latents.sin() * t)(noise, torch.tensor(0.3), None)
    torch.testing.assert_close(blended, noise.sin() * 0.3)


def test_a_single_tile_is_the_whole_picture(draw):
    assert not differ(draw("a cat", **SIZE), draw("a cat", **SIZE, tile=128))


def test_upscaled_pictures_are_larger_and_alike(draw):
    first = draw("a cat", **SIZE, num_images_per_prompt=2)
    large = draw.upscale(first, "a cat", 2.0, tile=128)
    assert [picture.size for picture in large] == [(96, 64)] * 2 and large.seeds == first.seeds
    assert next(stage for stage in large.stages if stage.name == "sample")
    again = draw.upscale(first[:1], "a cat", 2.0, generator=first.seeds[:1])
    assert numpy.abs(pixels(again) - pixels(large[:1])).max() <= 1
    with pytest.raises(ValueError, match="upscale: expected"):
        draw.upscale(first, "a cat", 9.0)


def test_a_call_that_upscales_is_the_two_passes(draw):
    asked = {"num_images_per_prompt": 2, "nag_scale": 2.0, "negative_prompt": "a dog", "sampler": "heun"}
    stages = []
    both = draw("a cat", **SIZE, **asked, upscale=2, on_stage=lambda name, steps: stages.append(name))
    first = draw("a cat", **SIZE, **asked)
    apart = draw.upscale(first, "a cat", 2, **{name: asked[name] for name in asked if name != "num_images_per_prompt"})
    assert not differ(both, apart) and both.seeds == first.seeds and stages.count("sample") == 2
    assert draw("a cat", **SIZE, upscale=2, output_type="pt").images.shape == (1, 3, 64, 96)


def test_what_the_larger_pictures_take_is_refused_before_anything_runs(tiny_files):
    """A budget that holds a small picture: the first pass is not generated in vain."""
    stages, asked = [], {"on_stage": lambda name, steps: stages.append(name), **SIZE}
    draw = load_pipeline(**tiny_files, device="cpu", dtype="float32", vram_budget="60MiB")
    draw("a cat", **asked)
    assert stages
    stages.clear()
    with pytest.raises(ValueError, match="vram budget .* 384 x 256"):
        draw("a cat", **asked, upscale=8)
    assert not stages


def test_a_picture_to_start_from_for_each(draw):
    images = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    asked = {**SIZE, "strength": 0.5}
    both = draw("a cat", **asked, num_images_per_prompt=2, image=images)
    one = draw("a cat", **{**asked, "generator": 2}, image=images[1])
    assert numpy.abs(pixels(both)[1:] - pixels(one)).max() <= 1


# --- prompts ------------------------------------------------------------------------------------------------------


def test_the_limit_of_tokens(draw):
    with pytest.warns(UserWarning, match="only the first 512 are used"):
        cut = draw("a cat " * 200, **SIZE)
    assert differ(cut, draw("a cat " * 200, **SIZE, max_sequence_length=1536))
    with pytest.warns(UserWarning, match="only the first 512 are used"):
        assert not differ(cut, draw("a cat " * 200, **SIZE))


# --- all of it together -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beside(tmp_path_factory, tiny_files, control_tensors):
    """A ControlNet's file and a LoRA's for the tiny model."""
    folder, base = tmp_path_factory.mktemp("beside"), model_info(tiny_files["model"]).config
    config = {"n_layers": base.n_layers, "axes_dims": base.axes_dims, "control_layers_places": [0]}
    weights = control_tensors(ControlNetConfig(base, (0,), 33, "hints"))
    save_file(weights, folder / "net.safetensors", {"config": json.dumps(config)})
    gen = torch.Generator().manual_seed(0)
    lora = {f"lora_{part}": torch.randn(*shape, generator=gen) / 8 for part, shape in zip("AB", ((4, 384), (384, 4)))}
    name = "transformer.layers.0.attention.to_q"
    save_file({f"{name}.{part}.weight": tensor for part, tensor in lora.items()}, folder / "lora.safetensors")
    return folder / "net.safetensors", folder / "lora.safetensors"


@pytest.fixture(scope="module")
def together(tiny_files, beside):
    """A function: two pictures with a LoRA and a ControlNet, without limit and in a budget, from options."""
    net, lora = beside
    control = Control(Image.new("RGB", (48, 32), "gray"), net, 0.5, 0.0, 0.7)
    options = {**SIZE, "loras": [(lora, 1.0)], "control": control}
    budgets = (None, "80MiB")
    models = {**tiny_files, "device": "cpu", "dtype": "float32", "precision": "w4a16"}
    pipelines = [load_pipeline(**models, vram_budget=budget) for budget in budgets]
    return lambda **asked: [draw(["a cat", "a tree"], **{**options, **asked}) for draw in pipelines]


@pytest.fixture(scope="module")
def plain(together):
    """A function of a size: what `together` gives without other options."""
    return functools.cache(lambda height=32, width=48: together(height=height, width=width)[0])


@pytest.mark.parametrize(
    "asked",
    [
        {"sampler": "heun", "schedule": "beta", "shift": 2.0},
        {"sampler": "res_multistep", "schedule": "simple", "guidance_scale": 1.0},
        {"nag_scale": 3.0, "negative_prompt": "a dog"},
        {"nag_scale": 3.0, "negative_prompt": ["a dog", "a long row of trees"], "guidance_scale": 1.0},
        {"variety": Variety(20.0)},
        {"upscale": 2},
        {"tile": 128, "height": 192, "width": 160},
        {"tile": 128, "height": 192, "width": 160, "nag_scale": 2.0, "variety": 20.0, "guidance_scale": 1.0},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_options_go_together_with_lora_controlnet_budget_and_batch(together, plain, asked):
    """Streamed in a budget, with a LoRA and a ControlNet, two prompts at a time of an INT4 model: as without limit."""
    found = together(**asked)
    assert found[1].plan.stage("transformer").resident < found[1].plan.stage("transformer").blocks
    assert not differ(*found)
    assert differ(found[0], plain(**{name: asked[name] for name in ("height", "width") if name in asked}))
