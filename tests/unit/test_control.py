"""ControlNets, masks and borders through the pipeline: what they change, what they leave, what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
import math

import numpy
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from zimage_core import Control, load_pipeline, notation, pictures
from zimage_core.cli import main
from zimage_core.formats.identify import model_info
from zimage_core.models.config import ControlNetConfig

SIZE = {"height": 32, "width": 48, "num_inference_steps": 4, "generator": 1}


@pytest.fixture(scope="module")
def net_files(control_tensors, tiny_files, tmp_path_factory):
    """Files of a 33-channel ControlNet for the tiny model, and of one like v1."""
    base, folder = model_info(tiny_files["model"]).config, tmp_path_factory.mktemp("control")
    found = {}
    for name, channels, refiner in (("masked", 33, "hints"), ("plain", 16, "alone")):
        config = {"n_layers": base.n_layers, "axes_dims": base.axes_dims, "control_layers_places": [0]}
        found[name] = folder / f"{name}.safetensors"
        weights = control_tensors(ControlNetConfig(base, (0,), channels, refiner))
        save_file(weights, found[name], {"config": json.dumps(config)})
    return found


@pytest.fixture(scope="module")
def generate(tiny_files):
    return load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")


def pixels(found) -> numpy.ndarray:
    return numpy.stack([numpy.asarray(picture) for picture in found]).astype(int)


def outline(width=48, height=32) -> Image.Image:
    picture = Image.new("RGB", (width, height))
    ImageDraw.Draw(picture).ellipse((width // 4, height // 4, width // 2, height // 2), outline="white")
    return picture


def noise(width=48, height=32) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (height, width, 3), numpy.uint8))


def box(width=48, height=32, corners=(16, 8, 31, 23)) -> Image.Image:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle(corners, fill=255)
    return mask


def test_a_control_picture_changes_the_result_by_its_strength(generate, net_files):
    plain = pixels(generate("a cat", **SIZE))
    full = pixels(generate("a cat", **SIZE, control=Control(outline(), net_files["masked"])))
    assert "encode image" in [stage.name for stage in generate.stages]
    half = pixels(generate("a cat", **SIZE, control=Control(outline(), net_files["masked"], strength=0.1)))
    other = pixels(generate("a cat", **SIZE, control=Control(noise(), net_files["masked"])))
    assert abs(full - plain).mean() > abs(half - plain).mean() > 0
    assert (full != other).any()
    off = generate("a cat", **SIZE, control=Control(outline(), net_files["masked"], strength=0.0))
    assert numpy.array_equal(pixels(off), plain)
    assert numpy.array_equal(pixels(generate("a cat", **SIZE)), plain)


def test_ranges_follow_one_another(generate, net_files):
    """Half the way each is the whole way, step for step; a range between two steps is the next one's."""
    whole = pixels(generate("a cat", **SIZE, control=Control(outline(), net_files["masked"])))
    halves = [Control(outline(), net_files["masked"], 1.0, *part) for part in ((0, 0.5), (0.5, 1))]
    assert numpy.array_equal(pixels(generate("a cat", **SIZE, control=halves)), whole)
    first = pixels(generate("a cat", **SIZE, control=halves[0]))
    last = pixels(generate("a cat", **SIZE, control=halves[1]))
    assert (first != whole).any() and (last != whole).any() and (first != last).any()


def test_several_at_once_and_with_guidance(generate, net_files):
    masked, plain = (Control(outline(), net_files[name], 0.5) for name in ("masked", "plain"))
    both = pixels(generate("a cat", **SIZE, control=[masked, plain]))
    for one in (masked, plain):
        assert (pixels(generate("a cat", **SIZE, control=one)) != both).any()
    options = SIZE | {"guidance_scale": 2.0, "negative_prompt": "a dog", "num_images_per_prompt": 2}
    guided = generate(["a cat", "a bird"], **options, control=masked)
    assert len(guided) == 4 and guided.plan.stage("transformer").activations


@pytest.mark.parametrize("names", [("masked",), ("masked", "plain")])
def test_streamed_blocks_give_the_same_picture(tiny_files, net_files, names):
    """With no allowance but the slots, in the plan and when it runs; ControlNets' blocks are the model's equals."""
    controls = [Control(outline(), net_files[name], 0.8) for name in names]
    free = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")
    expected = free("a cat", **SIZE, control=controls)
    plain = free("a cat", **SIZE)
    alone = plain.plan.stage("transformer")
    whole = expected.plan.stage("transformer")
    assert whole.blocks == alone.blocks + 2 * len(names)  # a refiner block and a layer each
    assert whole.weights > alone.weights and whole.activations > alone.activations
    tight = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16", vram_budget=0.07)
    found = tight("a cat", **SIZE, control=controls)
    stage = found.plan.stage("transformer")
    assert stage.resident < stage.blocks
    assert numpy.array_equal(pixels(found), pixels(expected))
    for pipeline in (tight, free):  # without them again, and with them once more
        assert numpy.array_equal(pixels(pipeline("a cat", **SIZE)), pixels(plain))
        assert numpy.array_equal(pixels(pipeline("a cat", **SIZE, control=controls)), pixels(expected))


def test_what_a_mask_keeps_stays_bit_for_bit(generate, net_files):
    source, mask = noise(), box()
    for control in (None, Control(None, net_files["masked"]), Control(outline(), net_files["plain"])):
        found = pixels(generate("a cat", **SIZE, image=source, mask=mask, feather=2, control=control))[0]
        inside, beyond = numpy.asarray(mask) > 0, numpy.ones((32, 48), bool)
        beyond[8 - 4 : 24 + 4, 16 - 4 : 32 + 4] = False
        assert numpy.array_equal(found[beyond], pixels([source])[0][beyond])
        assert (found[inside] != pixels([source])[0][inside]).mean() > 0.9
    partly = pixels(generate("a cat", **SIZE, image=source, mask=mask, feather=0, strength=0.5))[0]
    assert numpy.array_equal(partly[~inside], pixels([source])[0][~inside])
    with_picture = pixels(
        generate("a cat", **SIZE, image=source, mask=mask, control=Control(outline(), net_files["masked"]))
    )
    without = pixels(generate("a cat", **SIZE, image=source, mask=mask, control=Control(None, net_files["masked"])))
    assert (with_picture != without).any()


def test_a_soft_edge_falls_from_one_to_zero_outside_of_the_mask():
    mask = pictures.mask_tensor(box())
    soft = pictures.soften(mask, 3)
    assert torch.equal(soft[mask == 1], mask[mask == 1])
    row = soft[0, 0, 16, :16].tolist()
    assert row == sorted(row) and row[9] == 0 and 0 < row[10] < row[15] < 1
    assert pictures.repainted_cells(soft)[0, 0, :, 0].tolist() == [0, 0, 0, 0]
    gray = torch.full((1, 1, 16, 16), 0.5)
    assert torch.allclose(pictures.soften(gray, 2), gray)


def test_borders_are_filled_in(generate):
    image, mask = pictures.pad(noise(), 16, 0, 0, 16)
    assert image.size == mask.size == (64, 48)
    found = generate("a cat", num_inference_steps=2, generator=1, image=image, mask=mask, feather=0)
    assert found[0].size == (64, 48)
    assert numpy.array_equal(pixels(found)[0][:32, 16:], pixels([noise()])[0])
    assert (pixels(found)[0][32:] != pixels([image])[0][32:]).any()
    for borders, words in (
        ((0, 0, 0, 0), "one at least"),
        ((-16, 0, 0, 0), "0 pixels or more"),
        ((8, 0, 0, 0), "add 8 more"),
    ):
        with pytest.raises(ValueError, match=words):
            pictures.pad(noise(), *borders)


def test_a_control_picture_of_another_size_is_stretched_and_said(generate, net_files, caplog):
    wide = outline(96, 32)
    with caplog.at_level(logging.INFO, logger="zimage_core"):
        found = pixels(generate("a cat", **SIZE, control=Control(wide, net_files["masked"])))
    assert "control picture: resized from 96 x 32 to 48 x 32" in caplog.text
    stretched = wide.resize((48, 32), Image.Resampling.LANCZOS)
    assert numpy.array_equal(pixels(generate("a cat", **SIZE, control=Control(stretched, net_files["masked"]))), found)


def test_bad_input_gets_a_sentence(generate, net_files, tiny_files, control_tensors, tmp_path):
    for options, words in (
        ({"strength": math.nan}, "strength: expected a number, found nan"),
        ({"strength": math.inf}, "found inf"),
        ({"start": 0.5, "end": 0.5}, "expected 0 <= start < end <= 1, found 0.5 to 0.5"),
        ({"end": 1.5}, "found 0.0 to 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            Control(outline(), net_files["masked"], **options)

    def refused(words, **options):
        with pytest.raises(ValueError, match=words):
            generate("a cat", **SIZE, **options)

    refused("needs a control picture, or a mask; name it", control=Control(None, net_files["masked"]))
    refused("v1 needs a control picture; name it", control=Control(None, net_files["plain"]), image=noise(), mask=box())
    refused("expected a Fun ControlNet for Z-Image", control=Control(outline(), tiny_files["model"]))
    refused("no such file", control=Control(outline(), tmp_path / "gone.safetensors"))
    refused("mask: a picture to repaint is needed", mask=box())
    refused("expected the picture's size 48 x 32, found 16 x 32", image=noise(), mask=box(16, 32))
    refused("black and white, found colours", image=noise(), mask=noise())
    refused("black everywhere", image=noise(), mask=Image.new("L", (48, 32)))
    refused("without transparency", image=noise(), mask=Image.new("RGBA", (48, 32), (255, 255, 255, 0)))
    refused("feather: expected 0 to 16384", image=noise(), mask=box(), feather=-1)

    base = model_info(tiny_files["model"]).config
    config = {"n_layers": base.n_layers + 1, "axes_dims": base.axes_dims, "control_layers_places": [0]}
    path = tmp_path / "other.safetensors"
    save_file(control_tensors(ControlNetConfig(base, (0,), 33, "hints")), path, {"config": json.dumps(config)})
    refused("made for a model of width .* use the ControlNet of this model", control=Control(outline(), path))


def test_outlines_need_no_more_than_opencv():
    cv2 = pytest.importorskip("cv2")
    picture = box().convert("RGB")
    found = numpy.asarray(pictures.canny(picture))
    assert found.shape == (32, 48, 3) and set(numpy.unique(found)) == {0, 255}
    assert numpy.array_equal(found[..., 0], cv2.Canny(numpy.asarray(picture), 100, 200))
    with pytest.raises(ValueError, match="0 <= low <= high"):
        pictures.canny(picture, 200, 100)


def test_the_command_line(tiny_files, net_files, tmp_path, capsys):
    """`--control` with strength and range, `--canny`, `--mask`, `--pad`: the pictures are the library's."""
    files = [part for name in tiny_files for part in (f"--{name.replace('_', '-')}", str(tiny_files[name]))]
    common = ["generate", "a cat", *files, "--steps", "2", "--seed", "1", "--device", "cpu", "--dtype", "float32"]
    common += ["--precision", "w4a16"]
    noise().save(tmp_path / "photo.png")
    box().save(tmp_path / "mask.png")
    photo, mask, out = (str(tmp_path / name) for name in ("photo.png", "mask.png", "out.png"))
    library = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")
    size = {"height": 32, "width": 48, "num_inference_steps": 2, "generator": 1}

    def made(*options):
        assert main([*common, "--out", out, *options]) == 0, capsys.readouterr().err
        return pixels([Image.open(out)])

    part = f"{net_files['masked']}:0.8:0-0.5"
    found = made("--width", "48", "--height", "32", "--control", part, "--control-image", photo)
    control = Control(noise(), net_files["masked"], 0.8, 0.0, 0.5)
    assert numpy.array_equal(found, pixels(library("a cat", **size, control=control)))
    settings = json.loads(Image.open(out).text["zimage"])
    assert settings["controls"] == [["masked.safetensors", 0.8, 0.0, 0.5]]

    found = made("--image", photo, "--mask", mask, "--control", str(net_files["masked"]), "--feather", "3")
    expected = library(
        "a cat", **size, image=noise(), mask=box(), feather=3, control=Control(None, net_files["masked"])
    )
    assert numpy.array_equal(found, pixels(expected))
    assert made("--image", photo, "--pad", "16,0,0,16").shape[1:3] == (48, 64)
    assert json.loads(Image.open(out).text["zimage"])["strength"] == 1.0

    if importlib.util.find_spec("cv2"):
        found = made("--width", "48", "--height", "32", "--canny", "--control", part, "--control-image", photo)
        control = Control(pictures.canny(noise()), net_files["masked"], 0.8, 0.0, 0.5)
        assert numpy.array_equal(found, pixels(library("a cat", **size, control=control)))

    for options, words in (
        (["--control-image", photo], "name it with --control"),
        (["--control", part, "--control-image", photo, "--control-image", photo], "expected one, or 1, found 2"),
        (["--control", f"{net_files['masked']}:nan", "--control-image", photo], "found nan"),
        (["--pad", "16"], "expected --image and no --mask"),
    ):
        assert main([*common, *options]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*common, "--image", photo, "--pad", "1,2"])
    assert "expected PIXELS or LEFT,TOP,RIGHT,BOTTOM, found '1,2'" in capsys.readouterr().err


def test_control_options():
    for text, expected in (
        ("net.safetensors", ("net.safetensors", 1, 0, 1)),
        ("C:\\x\\net.safetensors:0.8", ("C:\\x\\net.safetensors", 0.8, 0, 1)),
        ("a:b:-1:0.25-.5", ("a:b", -1, 0.25, 0.5)),
        ("a:0.5-1", ("a:0.5-1", 1, 0, 1)),
        ("a:2e9", ("a", 2e9, 0, 1)),
        ("a:+5e-1:0-1", ("a", 0.5, 0, 1)),
        ("a:-INF", ("a", -math.inf, 0, 1)),
    ):
        assert notation.control(text) == expected
