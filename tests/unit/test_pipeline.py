"""The pipeline: stage order, seeds, batches, guidance, img2img, the prompt memory and refusals."""

from __future__ import annotations

import numpy
import pytest
import torch

from zimage_core import load_pipeline, pipeline, sampler
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.models.text_encoder import encode_prompts
from zimage_core.models.tokenizer import find_tokenizer, load_tokenizer
from zimage_core.models.vae import decode_image

SIZE = {"height": 32, "width": 48, "num_inference_steps": 2}
WHOLE_RUN = ["load text encoder", "encode prompt", "load transformer", "sample", "load VAE", "decode"]


@pytest.fixture(scope="module")
def draw(tiny_files):
    return load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")


def pixels(pictures) -> numpy.ndarray:
    return numpy.stack([numpy.asarray(picture) for picture in pictures]).astype(int)


def names(draw) -> list[str]:
    return [stage.name for stage in draw.stages]


def test_stages_run_in_order_and_a_known_prompt_needs_no_encoder(tiny_files):
    draw = load_pipeline(**tiny_files, device="cpu", dtype="float32")
    seen = []
    (picture,) = draw("a cat", **SIZE, generator=1, on_stage=lambda name, steps: seen.append((name, steps)))
    assert picture.size == (48, 32)
    assert names(draw) == WHOLE_RUN == [name for name, _ in seen]
    assert dict(seen)["sample"] == 2
    assert all(stage.seconds >= 0 and stage.device_peak is None for stage in draw.stages)
    again = draw("a cat", **SIZE, generator=1)
    assert names(draw) == ["sample", "decode"]
    assert numpy.array_equal(pixels(again), pixels([picture]))
    draw("a dog", **SIZE)
    assert names(draw) == ["load text encoder", "encode prompt", "sample", "decode"]


@pytest.mark.skipif(not pipeline.reset_host_peak(), reason="the system does not count a stage's own host memory")
def test_a_stage_has_its_own_host_peak(draw):
    """128 MiB touched and freed in one stage are in its peak and not in the next one's."""

    def touch(name, steps):
        if name == "sample":
            torch.ones(2**25).sum()

    draw("a cat", **SIZE, on_stage=touch)
    peaks = {stage.name: stage.host_peak for stage in draw.stages}
    assert peaks["sample"] - peaks["decode"] > 100 * 2**20


def test_where_the_system_counts_no_stage_the_host_peak_is_left_out(draw, monkeypatch):
    monkeypatch.setattr(pipeline, "reset_host_peak", lambda: False)
    draw("a cat", **SIZE)
    assert {stage.host_peak for stage in draw.stages} == {None}


def test_a_stage_has_its_own_device_peak(tiny_files, monkeypatch):
    """The counter begins anew, when the stage before is over, and is read when this one is."""
    log = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: log.append(name) or len(log))
    draw = load_pipeline(**tiny_files, device="cpu")
    draw.device = torch.device("cuda:0")
    for stage in ("first", "second"):
        with draw._stage(stage):
            log.append(stage)
    begin, end = ["synchronize", "reset_peak_memory_stats"], ["synchronize", "max_memory_allocated"]
    assert log == [*begin, "first", *end, *begin, "second", *end]
    assert [stage.device_peak for stage in draw.stages] == [5, 10]


def test_the_prompt_memory_is_bounded(draw, monkeypatch):
    monkeypatch.setattr(pipeline, "CACHED_PROMPTS", 2)
    draw(["one", "two", "three"], **SIZE)
    assert list(draw._prompts) == ["two", "three"]


def test_many_prompts_are_encoded_with_one_reading_of_the_encoder(draw):
    prompts = [f"cat {i}" for i in range(pipeline.CACHED_PROMPTS + 3)]
    draw.encode(prompts)
    assert names(draw) == ["load text encoder", "encode prompt"]
    for prompt in (prompts[0], prompts[-1]):
        draw(prompt, **SIZE)
        assert "encode prompt" not in names(draw)


def test_each_picture_of_a_batch_may_have_a_seed_of_its_own(draw):
    batch = pixels(draw(["a cat", "a dog"], **SIZE, generator=[9, 4]))
    assert draw.seeds == [9, 4]
    for picture, prompt, seed in zip(batch, ("a cat", "a dog"), (9, 4)):
        assert abs(pixels(draw(prompt, **SIZE, generator=seed))[0] - picture).max() <= 1
    with pytest.raises(ValueError, match="expected 2, one for each picture, found 1"):
        draw(["a cat", "a dog"], **SIZE, generator=[9])
    with pytest.raises(ValueError, match="found -1"):
        draw("a cat", **SIZE, generator=[-1])


def test_it_composes_the_parts_and_nothing_else(draw, tiny_files):
    """The same picture by hand from the public functions."""
    (picture,) = draw("a cat", **SIZE, guidance_scale=2.0, negative_prompt="a dog", generator=5)
    encoder = load_text_encoder(tiny_files["text_encoder"], dtype=torch.float32)
    tokenizer = load_tokenizer(find_tokenizer(tiny_files["text_encoder"]))
    positive, negative = encode_prompts(encoder, tokenizer, ["a cat", "a dog"])
    model = draw.transformer
    with torch.no_grad():
        cond, uncond = (model.prepare([feats], 32, 48) for feats in (positive, negative))
        latents = sampler.draw_noise(5, 1, 32, 48)
        sigmas = sampler.get_sigmas(2)
        for i in range(2):
            pos, neg = (sampler.predict_flow(model, latents, sigmas[i], c) for c in (cond, uncond))
            latents = latents + (sigmas[i + 1] - sigmas[i]) * (pos + 2.0 * (pos - neg))
    by_hand = decode_image(draw.vae, latents).mul(255).round().int().numpy()
    assert abs(by_hand - pixels([picture])).max() <= 1
    assert abs(pixels(draw("a cat", **SIZE, generator=5)) - by_hand).max() > 1


def test_picture_i_of_a_batch_is_the_picture_of_seed_plus_i(draw):
    batch = pixels(draw("a cat", **SIZE, generator=7, num_images_per_prompt=3))
    assert draw.seeds == [7, 8, 9]
    for i, picture in enumerate(batch):
        assert abs(pixels(draw("a cat", **SIZE, generator=7 + i))[0] - picture).max() <= 1
    assert abs(batch[0] - batch[1]).max() > 1


def test_several_prompts_are_drawn_as_each_alone(draw):
    long = "a cat " * 20
    batch = pixels(draw(["a dog", long], **SIZE, generator=3, num_images_per_prompt=2))
    assert draw.seeds == [3, 4, 5, 6]
    for i, prompt in enumerate(["a dog", "a dog", long, long]):
        assert abs(pixels(draw(prompt, **SIZE, generator=3 + i))[0] - batch[i]).max() <= 1


def test_generators_and_random_seeds(draw):
    from_seed = pixels(draw("a cat", **SIZE, generator=11))
    from_generator = pixels(draw("a cat", **SIZE, generator=torch.Generator().manual_seed(11)))
    assert draw.seeds is None
    assert numpy.array_equal(from_seed, from_generator)
    draw("a cat", **SIZE)
    (seed,) = draw.seeds
    draw("a cat", **SIZE)
    assert draw.seeds != [seed]
    draw("a cat", **SIZE, generator=2**64 - 1, num_images_per_prompt=2)
    assert draw.seeds == [2**64 - 1, 0]


def test_guidance_zero_ignores_the_negative_prompt(draw):
    plain = pixels(draw("a cat", **SIZE, generator=1))
    assert numpy.array_equal(pixels(draw("a cat", **SIZE, generator=1, negative_prompt="a dog")), plain)


def test_an_image_is_a_starting_point(draw):
    from PIL import Image

    ramp = numpy.tile(numpy.linspace(0, 255, 60, dtype=numpy.uint8)[None, :, None], (40, 1, 3))
    image = Image.fromarray(ramp)
    tensor = torch.from_numpy(ramp[4:36, 6:54].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    steps = {"num_inference_steps": 2, "generator": 1}
    nearly = pixels(draw("a cat", image=image, strength=1e-6, height=32, width=48, **steps))
    assert names(draw)[-3:] == ["encode image", "sample", "decode"]
    assert nearly.shape[1:3] == (32, 48)
    cropped = Image.fromarray(((tensor[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
    round_trip = decode_image(draw.vae, draw.vae.encode(tensor)).mul(255).round().int().numpy()
    same = pixels(draw("a cat", image=cropped, strength=1e-6, **steps))
    assert abs(same - round_trip).max() <= 2
    text_only = pixels(draw("a cat", height=32, width=48, **steps))
    assert numpy.array_equal(pixels(draw("a cat", image=cropped, strength=1.0, **steps)), text_only)
    assert draw("a cat", image=image, **steps)[0].size == (48, 32)


def test_stopping_and_interrupting_leave_the_pipeline_usable(draw):
    whole = pixels(draw("a cat", **SIZE, generator=1))
    steps = []

    def stop(done, total, image):
        steps.append((done, total, tuple(image.shape)))
        return False

    stopped = pixels(draw("a cat", **SIZE, generator=1, on_step=stop))
    assert steps == [(1, 2, (1, 16, 4, 6))]
    assert abs(stopped - whole).max() > 1

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw("a cat", **SIZE, generator=1, on_step=interrupt)
    assert numpy.array_equal(pixels(draw("a cat", **SIZE, generator=1)), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 40}, "height: expected a multiple of 16 pixels, found 40; the nearest are 32 and 48"),
        ({"width": 0}, "width: expected a multiple of 16 pixels, found 0; the nearest are 16 and 32"),
        ({"num_inference_steps": 0}, "steps: expected 1 to 100, found 0"),
        ({"num_images_per_prompt": 0}, "expected at least 1"),
        ({"guidance_scale": -1.0}, "guidance: expected 0 or more"),
        ({"generator": -1}, "seed: expected 0 to 2"),
    ],
)
def test_refusals_come_before_any_work(draw, arguments, message):
    stages = []
    with pytest.raises(ValueError, match=message):
        draw("a cat", **SIZE | arguments, on_stage=lambda *stage: stages.append(stage))
    assert not stages


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.5])
def test_refused_strengths(draw, strength):
    from PIL import Image

    with pytest.raises(ValueError, match="start"):
        draw("a cat", image=Image.new("RGB", (32, 32)), strength=strength)


def test_files_are_checked_before_anything_is_loaded(tiny_files, tmp_path):
    with pytest.raises(ValueError, match=r"text encoder is needed .* --text-encoder"):
        load_pipeline(tiny_files["model"])
    with pytest.raises(ValueError, match=r"VAE is needed .* --vae"):
        load_pipeline(tiny_files["model"], tiny_files["text_encoder"])
    with pytest.raises(ValueError, match=r"gone.safetensors: the vae is not there"):
        load_pipeline(tiny_files["model"], tiny_files["text_encoder"], tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="expected a Z-Image transformer"):
        load_pipeline(**tiny_files | {"model": tiny_files["vae"]})
    for device in ("cuda:77", "toaster"):
        with pytest.raises(ValueError, match="device"):
            load_pipeline(**tiny_files, device=device)
    for dtype in ("int8", "fast", torch.float64):
        with pytest.raises(ValueError, match="dtype"):
            load_pipeline(**tiny_files, dtype=dtype)


def test_a_whole_diffusers_folder(tiny_files, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").symlink_to(tiny_files["model"])
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").symlink_to(tiny_files["text_encoder"].parent / "tokenizer.json")
    files = pipeline.find_files(tmp_path)
    assert [files.text_encoder.name, files.tokenizer.name, files.vae.name] == ["text_encoder", "tokenizer", "vae"]
    assert not files.demo


def test_default_sizes(draw):
    assert draw._size(None, None, None) == (1024, 1024)
    assert draw._size(512, None, None) == (512, 1024)


def test_a_gpu_has_its_index(monkeypatch):
    """Some functions of torch.cuda, the memory limit's among them, take no device without one."""
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    choose = pipeline.choose_device
    assert choose(None) == choose("cuda") == torch.device("cuda", 1)
    assert choose("cuda:0") == torch.device("cuda", 0)
