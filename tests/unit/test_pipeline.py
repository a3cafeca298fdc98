"""The pipeline: stage order, seeds, batches, guidance, img2img, the prompt memory and refusals."""

from __future__ import annotations

import inspect
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch

from zimage_core import captions, device, files, job, load_pipeline, pipeline, recorder, sampler
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.formats.load import load_transformer
from zimage_core.formats.vae import load_vae
from zimage_core.lora.read import Lora
from zimage_core.models.text_encoder import encode_prompts
from zimage_core.models.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from zimage_core.models.vae import decode_image

SIZE = {"height": 32, "width": 48, "num_inference_steps": 2}
WHOLE_RUN = ["load text encoder", "encode prompt", "load transformer", "sample", "load VAE", "decode"]


@pytest.fixture(scope="module")
def draw(tiny_files):
    return load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")


def pixels(pictures) -> numpy.ndarray:
    return numpy.stack([numpy.asarray(picture) for picture in pictures]).astype(int)


def names(draw) -> list[str]:
    """The stages of a call, or of a pipeline's last one."""
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


@pytest.mark.skipif(not recorder.reset_host_peak(), reason="the system does not count a stage's own host memory")
def test_a_stage_has_its_own_host_peak(draw):
    """512 MiB touched and freed in one stage are in its peak and not in the next one's.

    Half of it is asked for: the libraries' mapped pages count too, and a system may take them away and bring them back.
    """

    def touch(name, steps):
        if name == "sample":
            torch.ones(2**27).sum()

    draw("a cat", **SIZE, on_stage=touch)
    peaks = {stage.name: stage.host_peak for stage in draw.stages}
    assert peaks["sample"] - peaks["decode"] > 256 * 2**20


def test_where_the_system_counts_no_stage_the_host_peak_is_left_out(draw, monkeypatch):
    monkeypatch.setattr(recorder, "reset_host_peak", lambda: False)
    draw("a cat", **SIZE)
    assert {stage.host_peak for stage in draw.stages} == {None}


def test_a_stage_has_its_own_device_peak(monkeypatch):
    """The counter begins anew, when the stage before is over, and is read when this one is."""
    log = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: log.append(name) or len(log))
    record = recorder.Recorder(torch.device("cuda:0"))
    for stage in ("first", "second"):
        with record(stage):
            log.append(stage)
    begin = ["synchronize", "reset_peak_memory_stats"]
    end = ["synchronize", "max_memory_allocated", "max_memory_reserved"]
    assert log == [*begin, "first", *end, *begin, "second", *end]
    assert [(stage.device_peak, stage.device_reserved) for stage in record.stages] == [(5, 6), (11, 12)]


def test_the_prompt_memory_is_bounded(draw, monkeypatch):
    monkeypatch.setattr(captions, "KEPT", 2)
    draw(["one", "two", "three"], **SIZE)
    assert "encode prompt" not in names(draw(["two", "three"], **SIZE))
    assert "encode prompt" in names(draw("one", **SIZE))


def test_many_prompts_are_encoded_with_one_reading_of_the_encoder(draw):
    prompts, seen = [f"cat {i}" for i in range(captions.KEPT + 3)], []
    draw.encode(prompts, on_stage=lambda name, steps: seen.append(name))
    assert seen == ["load text encoder", "encode prompt"]
    for prompt in (prompts[0], prompts[-1]):
        assert "encode prompt" not in names(draw(prompt, **SIZE))


def test_without_any_limit_the_encoder_is_read_once(tiny_files):
    draw = load_pipeline(**tiny_files, device="cpu", dtype="float32", vram_budget=None)
    first = draw("a cat", **SIZE, generator=1)
    assert names(first) == WHOLE_RUN
    assert names(draw("a dog", **SIZE)) == ["encode prompt", "sample", "decode"]
    assert names(draw(["a bird", "a cat"], **SIZE)) == ["encode prompt", "sample", "decode"]
    assert names(again := draw("a cat", **SIZE, generator=1)) == ["sample", "decode"]
    assert numpy.array_equal(pixels(again), pixels(first))


def test_a_prompt_is_tokenized_once(tiny_files, monkeypatch):
    seen, plain = [], Tokenizer.__call__
    monkeypatch.setattr(Tokenizer, "__call__", lambda self, text, limit: seen.append(text) or plain(self, text, limit))
    draw = load_pipeline(**tiny_files, device="cpu", dtype="float32")
    for _ in range(2):
        draw(["a cat", "a dog", "a cat"], **SIZE, guidance_scale=1.0)
    assert seen == ["a cat", "a dog", ""]


def test_the_result_is_a_list_that_knows_what_the_call_did(draw):
    first = draw("a cat", **SIZE, generator=7, num_images_per_prompt=2)
    assert isinstance(first, list) and first.images == list(first) and len(first) == 2
    assert [first[0].size, first[-1].mode] == [(48, 32), "RGB"]
    second = draw("a dog", **SIZE, generator=torch.Generator().manual_seed(1))
    assert (first.seeds, second.seeds, draw.seeds) == ([7, 8], None, None)
    assert first.stages is not second.stages is draw.stages
    assert first.plan.title.startswith("2 pictures of 48 x 32") and second.plan.title.startswith("1 picture")
    assert first.backend.name == "reference" and first.backend.precision == "w4a16"


def lora_of(pairs) -> Lora:
    """A LoRA of {module: (down (r, K), up (N, r))}."""
    halves = {f"{m}.lora_{half}.weight": t for m, pair in pairs.items() for half, t in zip(("down", "up"), pair)}
    return Lora.from_tensors(halves)


def test_its_gpu_is_the_current_one_while_it_works(tiny_files, monkeypatch):
    """Functions of torch fault on tensors of another GPU than the current one; more than one GPU is simulated here."""
    current = []

    @contextmanager
    def guard(device):
        current.append(device)
        yield
        current.remove(device)

    monkeypatch.setattr(pipeline, "guard", guard)
    found = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")
    stages = []
    found.encode(["a cat"], on_stage=lambda name, _: stages.append((name, list(current))))
    found("a dog", **SIZE, on_stage=lambda name, _: stages.append((name, list(current))))
    assert {name for name, _ in stages} == set(WHOLE_RUN)
    assert all(devices == [torch.device("cpu")] for _, devices in stages) and not current


def test_threads_share_a_pipeline(tiny_files):
    """Eight at once: each gets the picture of its own prompt, seed and LoRA, as when it is alone."""
    draw = load_pipeline(**tiny_files, device="cpu", dtype="float32")
    hidden = load_text_encoder(tiny_files["text_encoder"], dtype=torch.float32).config.hidden_size
    dim = load_transformer(tiny_files["model"], dtype=torch.float32).config.dim
    loras = []
    for i in range(8):
        g = torch.Generator().manual_seed(i)
        pairs = {"layers.0.attention.to_q": (torch.randn(2, dim, generator=g), torch.randn(dim, 2, generator=g))}
        if i % 2:  # the text encoder's features differ, too
            down = torch.randn(2, hidden, generator=g)
            pairs["lora_te_model_layers_0_self_attn_o_proj"] = down, torch.randn(hidden, 2, generator=g)
        loras.append(lora_of(pairs))

    def work(i):
        chosen = [(loras[i], 0.5)]
        draw.set_loras(chosen)  # for everyone: a call under way keeps its own
        return draw(f"cat {i % 3}", **SIZE, generator=i, loras=chosen)

    alone = [pixels(draw(f"cat {i % 3}", **SIZE, generator=i, loras=[(loras[i], 0.5)])) for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(work, [*range(8), *range(8)]))
    for i, pictures in enumerate(found):
        assert numpy.array_equal(pixels(pictures), alone[i % 8])
        assert pictures.seeds == [i % 8] and names(pictures)[-2:] == ["sample", "decode"]


def test_loras_set_during_a_call_are_for_the_next_one(draw, tiny_files):
    dim = load_transformer(tiny_files["model"], dtype=torch.float32).config.dim
    pair = torch.full((1, dim), 0.1), torch.full((dim, 1), 0.5)
    other = [(lora_of({"layers.0.attention.to_q": pair}), 1.0)]
    plain = pixels(draw("a cat", **SIZE, generator=1))
    during = draw("a cat", **SIZE, generator=1, on_step=lambda *_: draw.set_loras(other))
    assert numpy.array_equal(pixels(during), plain)
    assert abs(pixels(draw("a cat", **SIZE, generator=1)) - plain).max() > 0
    assert numpy.array_equal(pixels(draw("a cat", **SIZE, generator=1, loras=[])), plain)
    draw.set_loras([])
    assert numpy.array_equal(pixels(draw("a cat", **SIZE, generator=1)), plain)


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
    model = load_transformer(tiny_files["model"], dtype=torch.float32, precision="w4a16")
    vae = load_vae(tiny_files["vae"], dtype=torch.float32)
    with torch.no_grad():
        cond, uncond = (model.prepare([feats], 32, 48) for feats in (positive, negative))
        latents = sampler.draw_noise(5, 1, 32, 48)
        sigmas = sampler.get_sigmas(2)
        for i in range(2):
            pos, neg = (sampler.predict_flow(model, latents, sigmas[i], c) for c in (cond, uncond))
            latents = latents + (sigmas[i + 1] - sigmas[i]) * (pos + 2.0 * (pos - neg))
    by_hand = decode_image(vae, latents).mul(255).round().int().numpy()
    assert abs(by_hand - pixels([picture])).max() <= 1
    assert abs(pixels(draw("a cat", **SIZE, generator=5)) - by_hand).max() > 1


def test_negative_prompts_of_each_and_features_instead_of_texts(draw, tiny_files):
    """A list has one negative prompt for each prompt, and features are what the encoder would give."""
    prompts, negatives, options = (
        ["a cat", "a dog"],
        ["blue", "a long red line"],
        {"guidance_scale": 1.0, "generator": 3},
    )
    batch = pixels(draw(prompts, **SIZE, **options, negative_prompt=negatives))
    for i in range(2):
        alone = draw(prompts[i], **SIZE, **options | {"generator": 3 + i}, negative_prompt=negatives[i])
        assert abs(pixels(alone)[0] - batch[i]).max() <= 1
    encoder = load_text_encoder(tiny_files["text_encoder"], dtype=torch.float32)
    tokenizer = load_tokenizer(find_tokenizer(tiny_files["text_encoder"]))
    feats, against = (list(encode_prompts(encoder, tokenizer, texts)) for texts in (prompts, negatives))
    given = draw(prompt_embeds=feats, negative_prompt_embeds=against, **SIZE, **options)
    assert numpy.array_equal(pixels(given), batch) and "encode prompt" not in names(given)
    one = draw(prompt_embeds=feats[0], **SIZE, generator=3, num_images_per_prompt=2)
    assert abs(pixels(one) - pixels(draw("a cat", **SIZE, generator=3, num_images_per_prompt=2))).max() <= 1


def test_outputs_of_other_types_are_the_same_picture(draw, tiny_files):
    from PIL import Image

    options = {"generator": 3, "num_images_per_prompt": 2, **SIZE}
    plain = pixels(draw("a cat", **options))
    array, tensor, latents = (draw("a cat", **options, output_type=kind) for kind in ("np", "pt", "latent"))
    assert array.images.shape == (2, 32, 48, 3) and array.images.dtype == numpy.float32
    assert numpy.array_equal((array.images * 255).round(), plain) and len(array) == 2 and array.seeds == [3, 4]
    assert torch.equal(tensor.images.permute(0, 2, 3, 1), torch.from_numpy(array.images))
    vae = load_vae(tiny_files["vae"], dtype=torch.float32)
    assert numpy.array_equal(decode_image(vae, latents.images).mul(255).round().int().numpy(), plain)
    assert names(latents)[-1] == "sample"
    image, mask = Image.new("RGB", (48, 32), "green"), Image.new("L", (48, 32))
    mask.paste(255, (0, 0, 16, 32))
    kept = {"image": image, "mask": mask, "feather": 0, **options, "num_images_per_prompt": 1}
    masked = draw("a cat", **kept, output_type="np").images
    assert numpy.array_equal((masked * 255).round(), pixels(draw("a cat", **kept)))


def test_the_readme_lists_what_the_call_takes():
    """Every parameter, and no other; with the ones of diffusers that are not there."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    listed, _, absent = text.partition("The call takes, under")[2].partition("\n\n")[0].partition("Nothing else:")
    named = {name.partition("(")[0] for name in re.findall(r"`([a-z_]+)[`(]", listed)} - {"pil", "np", "pt", "latent"}
    takes = set(inspect.signature(pipeline.Pipeline.__call__).parameters) - {"self"}
    assert named == takes and not takes & set(re.findall(r"`([a-z_]+)`", absent))


def test_latents_and_sigmas_instead_of_seed_and_steps(draw, caplog):
    caplog.set_level("WARNING", "zimage_core")
    plain = pixels(draw("a cat", **SIZE, generator=5))
    noise = sampler.draw_noise(5, 1, 32, 48)
    given = draw("a cat", num_inference_steps=9, sigmas=[1.0, 0.5], latents=noise)
    assert numpy.array_equal(pixels(given), plain) and given.seeds is None and not caplog.text
    draw("a cat", latents=noise, generator=3, num_inference_steps=1)
    assert "generator: has no effect beside latents" in caplog.text


def test_the_callback_of_a_step_changes_the_latents(draw):
    seen = []

    def change(pipeline, i, timestep, tensors):
        seen.append((pipeline, i, round(timestep.item()), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros(1, 16, 4, 6)} if i == 1 else {}

    found = draw("a cat", **SIZE, generator=1, output_type="latent", callback_on_step_end=change)
    assert seen == [(draw, 0, 1000, (1, 16, 4, 6)), (draw, 1, 750, (1, 16, 4, 6))] and not found.images.any()


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


def test_an_image_is_a_starting_point(draw, tiny_files):
    from PIL import Image

    ramp = numpy.tile(numpy.linspace(0, 255, 60, dtype=numpy.uint8)[None, :, None], (40, 1, 3))
    image = Image.fromarray(ramp)
    tensor = torch.from_numpy(ramp[4:36, 6:54].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    steps = {"num_inference_steps": 2, "generator": 1}
    nearly = pixels(draw("a cat", image=image, strength=1e-6, height=32, width=48, **steps))
    assert names(draw)[-3:] == ["encode image", "sample", "decode"]
    assert nearly.shape[1:3] == (32, 48)
    vae = load_vae(tiny_files["vae"], dtype=torch.float32)
    cropped = Image.fromarray(((tensor[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
    round_trip = decode_image(vae, vae.encode(tensor)).mul(255).round().int().numpy()
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
        ({"guidance_scale": -1.0}, "guidance: expected 0 to 100"),
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

    with pytest.raises(ValueError, match="strength: expected above 0 and up to 1, found"):
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
    for name in ("cuda:77", "toaster"):
        with pytest.raises(ValueError, match="device"):
            load_pipeline(**tiny_files, device=name)
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
    found = files.find_files(tmp_path)
    assert [found.text_encoder.name, found.tokenizer.name, found.vae.name] == ["text_encoder", "tokenizer", "vae"]
    assert not found.demo


def test_default_sizes():
    assert job.picture_size(None, None, (1024, 1024)) == (1024, 1024)
    assert job.picture_size(512, None, (1024, 1024)) == (512, 1024)
    assert job.picture_size(None, 48, (65, 40)) == (32, 48)


def test_a_gpu_has_its_index(monkeypatch):
    """Some functions of torch.cuda, the memory limit's among them, take no device without one."""
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    choose = device.choose_device
    assert choose(None) == choose("cuda") == torch.device("cuda", 1)
    assert choose("cuda:0") == torch.device("cuda", 0)
