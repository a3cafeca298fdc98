"""What strangers give: unusable input of every kind ends in a ValueError of one sentence, soon, in little memory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_core import cli, device, load_pipeline, pictures
from zimage_core.formats.identify import identify, model_info
from zimage_core.formats.safetensors import open_tensors
from zimage_core.formats.vae import load_vae
from zimage_core.lora.read import PeftConfig, inspect, load_lora
from zimage_core.models.tokenizer import load_tokenizer

SIZE = {"height": 32, "width": 32, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def tiny(tiny_files):
    return load_pipeline(**tiny_files, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": None}, "prompt: expected text, found NoneType"),
        ({"prompt": [None]}, "prompt: expected text, found NoneType"),
        ({"prompt": ["a", 3]}, "prompt: expected text, found int"),
        ({"prompt": b"a"}, "prompt: expected text, found int"),
        ({"prompt": "caf\udce9"}, "prompt: expected UTF-8 text"),
        ({"negative_prompt": ["a", "b"], "guidance_scale": 1.0}, "negative prompts: expected 1, or 1 as there are"),
        ({"negative_prompt": [3]}, "negative prompt: expected text, found int"),
        ({"negative_prompt": "\ud800"}, "negative prompt: expected UTF-8 text"),
        ({"generator": [None]}, "seed: expected an integer, found None"),
        ({"generator": "1"}, "seed"),
        ({"generator": [torch.Generator(), 3], "prompt": ["a", "b"]}, "generator: expected one on the cpu, found 3"),
        ({"latents": torch.zeros(1, 16, 4, 5)}, "latents: expected a finite tensor (1, 16, 4, 4), found (1, 16, 4, 5)"),
        ({"latents": torch.full((1, 16, 4, 4), math.nan)}, "latents: expected a finite tensor"),
        ({"latents": "x"}, "latents: expected a finite tensor (1, 16, 4, 4), found str"),
        ({"sigmas": 1.0}, "sigmas: expected a list of numbers, found 1.0"),
        ({"sigmas": []}, "sigmas: expected 1 to 100, falling from at most 1 to above 0"),
        ({"sigmas": [0.5, 1.0]}, "sigmas: expected 1 to 100"),
        ({"sigmas": [1.0, 0.0]}, "sigmas: expected 1 to 100"),
        ({"sigmas": [math.nan]}, "sigmas: expected 1 to 100"),
        ({"prompt_embeds": torch.ones(3, 64)}, "prompt: expected text or features (embeds), found both"),
        ({"prompt": None, "prompt_embeds": "x"}, "prompt embeds: expected finite tensors (tokens, width), found str"),
        ({"prompt": None, "prompt_embeds": torch.ones(0, 64)}, "prompt embeds: expected finite tensors"),
        ({"prompt": None, "prompt_embeds": torch.ones(3, 65)}, "prompt embeds: expected (tokens, 64), found (3, 65)"),
        ({"output_type": "tiff"}, "output_type: expected one of pil, np, pt, latent, found 'tiff'"),
        ({"generator": 1.0}, "seed: expected an integer, found 1.0"),
        ({"image": "x.png"}, "image: expected a PIL image, found str"),
        ({"mask": "x.png"}, "mask: expected a PIL image, found str"),
        ({"height": 128.0}, "height: expected an integer, found 128.0"),
        ({"width": "128"}, "width: expected an integer, found '128'"),
        ({"height": 2**20}, "height: expected up to 16384 pixels, found 1048576"),
        ({"num_inference_steps": 8.0}, "steps: expected an integer, found 8.0"),
        ({"num_inference_steps": 8.0, "sigmas": [1.0]}, "steps: expected an integer, found 8.0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt: expected an integer, found 1.5"),
        ({"num_images_per_prompt": 10**9}, "pictures: expected up to 2097152 of 32 x 32 in a call, found 1000000000"),
        ({"guidance_scale": "1"}, "guidance: expected a number, found '1'"),
        ({"strength": None}, "strength: expected a number, found None"),
        (
            {"loras": ["x.safetensors"]},
            "loras: expected pairs of a file or Lora and its strength, found 'x.safetensors'",
        ),
        ({"loras": "ab"}, "loras: expected pairs"),
        ({"loras": [("x.safetensors", "much")]}, "loras: expected pairs"),
        ({"loras": [(3, 1.0)]}, "loras: expected pairs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_call_with_another_type_or_size(tiny, arguments, words):
    with pytest.raises(ValueError) as error:
        tiny(**{"prompt": "a", **SIZE, **arguments})
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "vulkan", "hpu", "cuda:99", "gpu", 3.5])
def test_devices_that_are_not_there(name):
    if name in ("mps", "xpu") and getattr(torch, name).is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match="device"):
        device.choose_device(name)


def test_a_plan_knows_the_host_s_memory(tiny_files, monkeypatch):
    """On a CPU there is no budget, but the machine's own memory: a picture beyond it is refused before any work."""
    assert device.host_memory() > 2**28
    tiny, stages = load_pipeline(**tiny_files, device="cpu"), []
    monkeypatch.setattr("zimage_core.residents.host_memory", lambda: 2**26)
    with pytest.raises(ValueError, match=r"memory: the \w+ needs .* for 1 picture of 4096 x 4096, this machine"):
        options = {"num_inference_steps": 1, "on_stage": lambda *stage: stages.append(stage)}
        tiny("a", height=4096, width=4096, **options)
    assert not stages


def lora_file(path: Path, keys: list[str], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: torch.ones(4, 4) for key in keys}, path, metadata=metadata)
    return path


def test_patterns_of_a_file_are_not_run(tmp_path):
    """As a regular expression the first takes longer than the universe has; names of modules, escaped or not, do."""
    evil = json.dumps({"lora_alpha": 8, "r": 4, "alpha_pattern": {"(a+)+$": 1}})
    with pytest.raises(ValueError, match="expected the name of a module as a pattern"):
        PeftConfig.read({"lora_adapter_metadata": evil}, "lora")
    patterns = {"layers.1.attention.to_out.0": 8, "to_out.0": 16, r"^layers\.2\.attention\.to_q$": 2}
    config = PeftConfig.read({}, "lora", json.dumps({"lora_alpha": 4, "r": 4, "alpha_pattern": patterns}))
    scales = {"layers.1.attention.to_out.0": 2, "layers.2.attention.to_out.0": 4, "layers.2.attention.to_q": 0.5}
    assert {name: config.scale(name, 4) for name in scales} == scales
    assert config.scale("layers.1.attention.not_to_out.0", 4) == 1


@pytest.mark.parametrize(
    "key", ["a" * 4000, "layers." * 600, ".lora_A" * 600, ".a1.weight" * 400, "lora_unet_" * 400, "module." * 600]
)
@pytest.mark.parametrize("end", ["", ".weight", ".lora_A.weight", ".a1.weight", ".oft_R", "!"])
def test_a_long_key_takes_no_time(tmp_path, key, end):
    """4 kB once took 45 s; a second is room for a busy machine."""
    path = lora_file(tmp_path / "long.safetensors", [key + end, "layers.0.attention.to_out.0.lora_A.weight"])
    before = time.process_time()
    identify(path)
    with pytest.raises(ValueError):
        inspect(path)
    assert time.process_time() - before < 1


@pytest.mark.parametrize("count", ["100000000", "9" * 50, "9" * 5000])
def test_counts_in_names_are_bounded(tmp_path, count):
    """A layer's number is read from its name; no list of so many is made."""
    keys = ["x_embedder.weight", "cap_embedder.1.weight", f"layers.{count}.attention.norm_q.weight"]
    with pytest.raises(ValueError):
        model_info(lora_file(tmp_path / "model.safetensors", keys))
    tensors = {f"encoder.down_blocks.{count}.resnets.{count}.conv1.weight": torch.ones(1, 1, 1, 1)}
    tensors |= {f"{half}.conv_in.weight": torch.ones(1, 16, 1, 1) for half in ("encoder", "decoder")}
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError):
        load_vae(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError):
        inspect(lora_file(tmp_path / "lora.safetensors", [f"layers.{count}.attention.to_out.0.lora_A.weight"]))


def test_65_axes(tmp_path):
    """A header may say so, torch cannot make one; an alpha of one number is read as it is."""
    pair = {f"layers.0.attention.to_out.0.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    save_file(pair | {"layers.0.attention.to_out.0.alpha": torch.ones(1)}, tmp_path / "axes.safetensors")
    raw = (tmp_path / "axes.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["layers.0.attention.to_out.0.alpha"]["shape"] = [1] * 65
    text = json.dumps(header).encode()
    (tmp_path / "axes.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ValueError, match="expected up to 64 axes, found 65"):
        load_lora(tmp_path / "axes.safetensors")


@pytest.mark.parametrize("name", ["layers.0.attention.norm_q.weight", "cap_embedder.0.weight", "x_embedder.2-1.weight"])
def test_tensors_without_axes(tiny_files, tmp_path, name):
    """Sizes are read from the shapes of these."""
    tensors = load_file(tiny_files["model"])
    (key,) = [key for key in tensors if key.endswith(name)]
    for odd in (torch.ones(()), torch.ones(0), torch.ones(1, 1, 1, 1)):
        save_file(tensors | {key: odd}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"x\.safetensors: "):
            model_info(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"a"', "[" * 100_000, "{", "1" * 5000, "\ud800"])
def test_side_files_that_hold_something_else(tiny_files, tmp_path, text):
    """Every JSON file beside the weights, in each folder that is read."""
    data = text.encode("utf-8", "surrogatepass")
    for part, names in {
        "model": ("config.json", "model.safetensors.index.json"),
        "text_encoder": ("config.json", "model.safetensors.index.json", "tokenizer.json"),
        "vae": ("config.json", "diffusion_pytorch_model.safetensors.index.json"),
    }.items():
        for name in names:
            folder = tmp_path / f"{part}-{name}"
            folder.mkdir()
            (folder / "model.safetensors").symlink_to(tiny_files[part])
            if part == "text_encoder" and name != "tokenizer.json":
                (folder / "tokenizer.json").symlink_to(tiny_files[part].parent / "tokenizer.json")
            (folder / name).write_bytes(data)
            if text == "null" and name == "config.json" and part != "vae":
                continue
            try:
                files = load_pipeline(**{**tiny_files, part: folder}, device="cpu")
                files("a", **SIZE)
            except ValueError as error:
                assert str(tmp_path) in str(error)
            else:
                assert open_tensors(folder).metadata["config"] != text or part == "model"


@pytest.mark.parametrize("model", [{"type": "BPE", "vocab": {}, "merges": []}, {"type": "WordPiece"}, {}, 3, "model"])
def test_a_tokenizer_of_another_make(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tiny_files, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tiny_files["model"])
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="expected a file, found a pipe"):
        open_tensors(tmp_path)


def test_more_pictures_than_a_command_makes(capsys):
    assert cli.main(["generate", "a", "--batch", "1000000000", "--out", "x.png"]) == 2
    assert "--batch: expected up to 10000 pictures, found 1000000000" in capsys.readouterr().err


BUSY = """
import hashlib, signal
from zimage_core import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background begins without it
with cli.interruptible():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sends signals")
def test_the_second_interrupt_ends_at_once():
    """In a computation of many minutes that never returns to Python, as a step on a large picture is."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    limit = threading.Timer(60, process.kill)  # rather than waiting for a line that does not come
    limit.start()
    try:
        assert process.stdout.readline() == "busy\n"
        time.sleep(0.5)  # until it computes
        process.send_signal(signal.SIGINT)
        assert "stopping at the next chance; Ctrl-C again ends at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 130
    finally:
        limit.cancel()


# ---- pictures -------------------------------------------------------------------------------------------------


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_a_phone_s_picture_is_turned_upright(tmp_path):
    """Stored lying with EXIF orientation 6: red is above in every viewer."""
    image = Image.new("RGB", (64, 32), "white")
    image.paste((255, 0, 0), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "phone.jpg", image, exif=exif, quality=95)
    seen = pictures.read_image(path)
    assert seen.size == pictures.file_size(path) == (32, 64)
    assert seen.getpixel((16, 8))[1] < 20 and seen.getpixel((16, 56))[1] > 235
    assert pictures.upright(seen).size == (32, 64)  # not twice
    assert pictures.to_rgb(Image.open(path)).size == (32, 64)  # the library's own way in


@pytest.mark.parametrize("depth", [8, 16])
def test_gray_of_more_bits_keeps_its_brightness(tmp_path, depth):
    ramp = numpy.linspace(0, 2**depth - 1, 256).round().astype(f"uint{depth}").reshape(16, 16)
    path = saved(tmp_path / "gray.png", Image.fromarray(ramp))
    found = numpy.asarray(pictures.to_rgb(pictures.read_image(path)))
    assert numpy.abs(found[..., 0].astype(int) - numpy.arange(256).reshape(16, 16)).max() <= 1


def test_fractions_are_brightness_too():
    assert pictures.to_rgb(Image.fromarray(numpy.full((2, 2), 0.5, "float32"))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    found = pictures.to_rgb(pictures.read_image(saved(tmp_path / "clear.png", image.convert(mode))))
    assert found.getpixel((3, 3)) == (255, 255, 255) and found.getpixel((0, 0)) == (0, 0, 0)


def test_cmyk_and_single_pixels(tmp_path):
    image = Image.new("RGB", (1, 1), (200, 30, 40)).convert("CMYK")
    found = pictures.fit(pictures.read_image(saved(tmp_path / "one.tif", image)), 32, 48)
    assert found.size == (32, 48) and numpy.abs(numpy.subtract(found.getpixel((9, 9)), (200, 30, 40))).max() <= 2


def test_an_animation_gives_its_first_picture_and_says_so(tmp_path, caplog):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    path = saved(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    assert pictures.to_rgb(pictures.read_image(path)).getpixel((0, 0)) == (255, 0, 0)
    assert "the first is used" in caplog.text


def test_files_that_are_no_pictures(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    for data in (
        b"",
        b"no picture",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.png: expected a (whole )?picture"):
            pictures.read_image(path)
    whole = saved(path, Image.effect_noise((64, 64), 90)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected a whole picture"):
        pictures.read_image(path)
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="make it smaller"):
        pictures.read_image(path)
    with pytest.raises(ValueError, match="found a folder"):
        pictures.read_image(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        pictures.read_image("https://example.org/x.png")


def test_a_file_s_texts_do_not_steer_the_terminal(tmp_path, capsys):
    """Escape sequences in names and metadata, and in an error's file name, are shown and not sent."""
    path = tmp_path / "x.safetensors"
    save_file({"\x1b[31mred": torch.ones(1)}, path, {"title\x1b]0;": "\x1b[2J"})
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[2J" in shown and "title\\x1b]0;" in shown
    assert cli.main(["inspect", "gone\x1b[31m"]) == 2
    assert "gone\\x1b[31m: no such file" in capsys.readouterr().err
