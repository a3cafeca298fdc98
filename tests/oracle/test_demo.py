"""The bundled demo model: it follows its captions, and diffusers and transformers draw the same with its files."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core import load_pipeline
from zimage_core.demo import LATENT_RGB, SIZES, WORDS, advice, demo_files
from zimage_core.linear.svdq import SVDQWeights
from zimage_core.sampler import draw_noise

TRAINING = Path(__file__).parents[2] / "demo_training"
FUSED = {"attention.to_qkv": ("to_q", "to_k", "to_v"), "feed_forward.net.0.proj": ("w3", "w1")}
CAPTIONS = 8  # of the held-out ones that demo_training/measure.py asks for


def by_path(name: str):
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training():
    """The modules scenes and measure of demo_training."""
    sys.modules.pop("scenes", None)
    yield by_path("scenes"), by_path("measure")
    for name in ("scenes", "measure", "preview"):
        sys.modules.pop(name, None)


def metadata(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def dense_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The INT4 transformer's tensors in fp32 under the names of diffusers' model."""
    packed, dense = load_file(path), {}
    for key in [key for key in packed if key.endswith(".qweight")]:
        module = key.removesuffix(".qweight")
        weight = SVDQWeights.from_packed(packed, module + ".").dequantize()
        for leaf in ("qweight", "wscales", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up"):
            packed.pop(f"{module}.{leaf}", None)
        name = module.replace("feed_forward.net.2", "feed_forward.w2")
        fused = next((fused for fused in FUSED if name.endswith(fused)), None)
        if fused is None:
            dense[f"{name}.weight"] = weight
            continue
        for part, rows in zip(FUSED[fused], weight.chunk(len(FUSED[fused]))):
            dense[f"{name.removesuffix(fused)}{fused.split('.')[0]}.{part}.weight"] = rows
    return dense | {name: tensor.float() for name, tensor in packed.items()}


@pytest.fixture(scope="module")
def diffusers_pipeline():
    """diffusers' ZImagePipeline around the demo's files, in fp32."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    files = demo_files()

    config = {k: v for k, v in metadata(files["model"]).items() if not k.startswith("_")}
    transformer = diffusers.ZImageTransformer2DModel(**config)
    transformer.load_state_dict(dense_tensors(files["model"]), strict=True)
    config = {k: v for k, v in metadata(files["vae"]).items() if not k.startswith("_")}
    vae = diffusers.AutoencoderKL(**config)
    vae.load_state_dict(load_file(files["vae"]), strict=True)
    encoder = transformers.Qwen3ForCausalLM.from_pretrained(files["text_encoder"], dtype=torch.float32).model
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.float(),
        text_encoder=encoder,
        tokenizer=transformers.AutoTokenizer.from_pretrained(files["tokenizer"]),
        transformer=transformer.float(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("prompt", "height", "width"),
    [
        ("A red circle in the top left corner on a blue background", 128, 128),
        ("small white star, left, black background", 128, 192),
    ],
)
def test_diffusers_draws_the_same_picture(diffusers_pipeline, prompt, height, width):
    ours = load_pipeline(device="cpu", dtype=torch.float32, backend="reference", precision="w4a16")
    picture = np.asarray(ours(prompt, height=height, width=width, generator=7)[0]).astype(int)
    theirs = diffusers_pipeline(
        prompt,
        height=height,
        width=width,
        sigmas=[s / 8 for s in range(8, 0, -1)],
        guidance_scale=0.0,
        latents=draw_noise(7, 1, height, width),
        output_type="np",
    ).images[0]
    assert np.abs(picture - theirs * 255).max() <= 2


def test_a_diffusers_call_may_be_moved_over(diffusers_pipeline):
    """The same options give the same numbers: lists of negative prompts and generators, sigmas, latents, features,
    the callback, and arrays, tensors or latents as output."""
    ours = load_pipeline(device="cpu", dtype=torch.float32, backend="reference", precision="w4a16")
    seen = {}

    def halve(pipeline, i, timestep, tensors):
        seen.setdefault(pipeline, []).append((i, round(float(timestep), 3), tensors["latents"].shape))
        return {"latents": tensors["latents"] * (0.9 if i == 0 else 1)}

    prompts = ["a red circle on a blue background", "a small white star on a black background"]
    negatives = ["green", "two large yellow rings"]
    options = {"guidance_scale": 1.5, "sigmas": [1.0, 0.7, 0.2], "callback_on_step_end": halve}
    options |= {"height": 128, "width": 160}
    noise = draw_noise(3, 2, 128, 160)

    def both(**more):
        """diffusers' images and ours; it writes into the lists that it is given."""
        of_each = more.pop("generator", iter((None, None)))
        return [
            pipeline(**options, **copy.deepcopy(more), generator=next(of_each)).images
            for pipeline in (diffusers_pipeline, ours)
        ]

    texts = {"prompt": prompts, "negative_prompt": negatives}
    theirs, mine = both(**texts, latents=noise, output_type="latent")
    assert seen[ours] == seen[diffusers_pipeline] and [i for i, *_ in seen[ours]] == [0, 1, 2]
    assert theirs.shape == mine.shape and (theirs - mine).abs().max() < 1e-3  # the same sums in fp32
    with torch.no_grad():
        feats, against = diffusers_pipeline.encode_prompt(list(prompts), negative_prompt=list(negatives))
    theirs, mine = both(prompt_embeds=feats, negative_prompt_embeds=against, latents=noise, output_type="latent")
    assert (theirs - mine).abs().max() < 1e-3
    for kind in ("np", "pt"):
        of_each = ([torch.Generator().manual_seed(seed) for seed in (5, 6)] for _ in range(2))
        theirs, mine = both(**texts, output_type=kind, generator=of_each)
        assert type(mine) is type(theirs) and mine.shape == theirs.shape and abs(mine - theirs).max() < 2e-3


def test_it_follows_held_out_captions(training):
    scenes, measure = training
    asked = scenes.held_out_captions(CAPTIONS)
    pictures = load_pipeline(device="cpu")([caption for caption, _ in asked], generator=0)
    assert pictures[0].size == (256, 256)
    results = [measure.check(np.asarray(p), scene) for p, (_, scene) in zip(pictures, asked)]
    for fact, limit in measure.LIMITS.items():
        values = [value for facts in results for value in facts.get(fact, ())]
        if fact == "outline":
            assert np.mean(values) >= limit
        else:
            assert values and sum(values) >= len(values) - 1, fact


def test_the_reader_of_pictures_reads_what_was_drawn(training):
    """Facts are exact; outlines overlap with their own by the limit on average, small patterned ones by less."""
    scenes, measure = training
    rng, outlines = scenes.random.Random(1), []
    for _, scene in scenes.held_out_captions(20, seed=1):
        facts = measure.check(scenes.draw(scene, 256, 320, rng), scene)
        outlines += facts.pop("outline", [])
        assert all(min(values) == 1 for values in facts.values()), (scene, facts)
    assert np.mean(outlines) >= measure.LIMITS["outline"] and min(outlines) > 0.8


def test_no_caption_gets_advice(training):
    """The list of words beside the demo has at least one of every caption that it was trained on."""
    scenes, _ = training
    rng = scenes.random.Random(2)
    captions = [scenes.describe(scenes.random_scene(rng), rng) for _ in range(2000)]
    assert advice(captions, SIZES[1] // 2, SIZES[1]) == []
    assert set(WORDS) >= {*scenes.COLOURS, *scenes.SHAPES, *scenes.FILLS[1:]}


def test_it_is_the_codes_that_draw(training, tmp_path):
    """With the 4-bit codes of one layer set to zero, its captions are no longer followed."""
    scenes, measure = training
    files = demo_files()
    tensors = load_file(files["model"])
    for key in tensors:
        if key.startswith("layers.1.") and key.endswith(".qweight"):
            tensors[key] = torch.zeros_like(tensors[key])
    with safe_open(files["model"], "pt") as file:
        save_file(tensors, tmp_path / "ruined.safetensors", file.metadata())
    ruined = load_pipeline(
        tmp_path / "ruined.safetensors", files["text_encoder"], files["vae"], tokenizer=files["tokenizer"], device="cpu"
    )
    asked = scenes.held_out_captions(CAPTIONS)
    pictures = ruined([caption for caption, _ in asked], height=128, width=128, generator=0)
    results = [measure.check(np.asarray(p), scene) for p, (_, scene) in zip(pictures, asked)]
    right = [all(min(values) == 1 for fact, values in facts.items() if fact != "outline") for facts in results]
    assert sum(right) <= CAPTIONS // 2


def test_colours_of_previews_are_the_fit(training):
    """`LATENT_RGB` is what demo_training/preview.py finds, to the digits that it prints."""
    factors, missed = by_path("preview").fit()
    assert (factors - torch.tensor(LATENT_RGB, dtype=torch.float64)).abs().max() < 2e-3  # the VAE runs in fp32
    assert missed < 0.12


def test_fp16_draws_what_bf16_draws():
    """fp16 is what GPUs without bf16 run, in w4a16; the latents after 8 steps."""
    last = []
    for dtype in ("float16", "bfloat16"):
        seen = []
        draw = load_pipeline(device="cpu", dtype=dtype, backend="reference", precision="w4a16")
        draw(
            "a large red circle in the top left corner", generator=3, on_step=lambda *at, seen=seen: seen.append(at[2])
        )
        last.append(seen[-1].flatten())
    half, brain = last
    assert half.isfinite().all() and not torch.equal(half, brain)
    assert torch.cosine_similarity(half, brain, dim=0) >= 0.999
