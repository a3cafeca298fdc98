"""Side by side pictures: the measures, and the sheet that shows them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from zimage_core.compare import compare, psnr, sheet, side_by_side, ssim


def picture(seed: int, noise: float = 0.0) -> Image.Image:
    generator = np.random.default_rng(seed)
    smooth = np.kron(generator.uniform(40, 215, (8, 8, 3)), np.ones((8, 8, 1)))
    return Image.fromarray((smooth + noise * generator.standard_normal(smooth.shape)).clip(0, 255).astype("uint8"))


class Fake:
    """A pipeline that draws one of the pictures above."""

    def __init__(self, noise: float):
        self.noise = noise

    def __call__(self, prompt, height=None, width=None, num_inference_steps=8, generator=0):
        return [picture(generator, self.noise)]


def test_equal_pictures_are_equal():
    assert psnr(picture(0), picture(0)) == math.inf
    assert ssim(picture(0), picture(0)) == pytest.approx(1)


def test_psnr_is_the_definition():
    black, grey = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16), (51, 51, 51))
    assert psnr(black, grey) == pytest.approx(-20 * math.log10(0.2))


def test_ssim_falls_with_noise_and_stays_in_its_range():
    values = [ssim(picture(0), picture(0, noise)) for noise in (2, 10, 40)]
    assert 1 > values[0] > values[1] > values[2] > -1
    assert abs(ssim(picture(0), picture(1))) < 0.5


def test_ssim_of_flat_pictures_is_the_formula():
    a, b = Image.new("RGB", (20, 20), (51, 51, 51)), Image.new("RGB", (20, 20), (102, 102, 102))
    assert ssim(a, b) == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4), abs=1e-4)


def test_different_sizes_are_refused():
    with pytest.raises(ValueError, match="expected one size"):
        psnr(Image.new("RGB", (16, 16)), Image.new("RGB", (16, 32)))


def test_comparison_scores_every_other_model_for_every_seed():
    calls = []
    models = {"right": lambda: Fake(0), "near": lambda: Fake(3), "far": lambda: Fake(30)}
    drawn, scores = compare("x", models, [4, 5], progress=lambda *call: calls.append(call))
    assert [(score.label, score.seed) for score in scores] == [("near", 4), ("near", 5), ("far", 4), ("far", 5)]
    assert scores[0].psnr > scores[2].psnr + 10 and scores[0].ssim > scores[2].ssim
    assert calls[-1] == (6, 6, "far")
    assert drawn.width > 3 * 64 and drawn.height > 2 * 64
    with pytest.raises(ValueError, match="two models or more"):
        compare("x", {"one": lambda: Fake(0)}, [1])


def test_pictures_that_are_there_are_put_side_by_side():
    """Two columns may have the same name; text grows with the pictures."""
    columns = [[picture(0), picture(1)], [picture(0), picture(1, 9)], [picture(0, 5), picture(1)]]
    drawn, scores = side_by_side(["A", "same", "same"], columns, ["picture 1", "picture 2"], [1, 2])
    assert [(score.label, score.seed, score.psnr == math.inf) for score in scores] == [
        *(("same", 1, True), ("same", 2, False), ("same", 1, False), ("same", 2, True)),
    ]
    large, _ = side_by_side(["A", "B"], [[Image.new("RGB", (1024, 32))]] * 2, ["1"], [1])
    assert large.height - 32 > drawn.height / 2 - 64 + 20
    with pytest.raises(ValueError, match="at least 11 x 11"):
        side_by_side(["A", "B"], [[Image.new("RGB", (8, 64))]] * 2, ["1"], [1])


def test_sheet_shows_each_picture_where_it_belongs():
    colours = [["red", "lime"], ["blue", "yellow"]]
    rows = [[Image.new("RGB", (200, 40), colour) for colour in row] for row in colours]
    drawn = sheet(["a/very/long/path/" * 8 + "a.safetensors", "b"], rows, [["1", "2"], ["3", "4"]])
    found = [name for count, name in drawn.getcolors(1 << 20) if count >= 200 * 40]
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)} <= set(found)
