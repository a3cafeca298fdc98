"""A corrupt number never becomes a picture: each place is refused when it is read, or the stage that it spoils says so.

The files are the tiny genuine ones with one number changed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core import cli, load_pipeline
from zimage_core.failures import out_of_memory
from zimage_core.formats import load
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.formats.load import load_transformer
from zimage_core.formats.safetensors import open_tensors
from zimage_core.formats.vae import load_vae
from zimage_core.linear import backends
from zimage_core.linear.svdq import SVDQWeights
from zimage_core.lora.apply import apply
from zimage_core.lora.read import Lora, PeftConfig
from zimage_core.models import ops
from zimage_core.models.config import ZImageConfig
from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig
from zimage_core.models.vae import VAEConfig

SIZE = {"height": 32, "width": 32, "num_inference_steps": 1, "generator": 1}
NUMBERS = (math.nan, math.inf, -math.inf)


def changed(source, target, key: str, value: float):
    """A copy of a file whose tensors named by the end of a key begin with a value."""
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    named = [name for name in tensors if name.endswith(key)]
    assert named
    for name in named[:1]:
        tensors[name].view(-1)[0] = value
    save_file(tensors, target, metadata=metadata)
    if source.stem == "encoder":
        shutil.copy(source.parent / "tokenizer.json", target.parent)
    return target


def refused(files: dict) -> str:
    with pytest.raises(ValueError) as error:
        load_pipeline(**files, device="cpu", dtype="float32")("a cat", **SIZE)
    return str(error.value)


LOADERS = {"model": load_transformer, "text_encoder": load_text_encoder, "vae": load_vae}


@pytest.mark.parametrize(
    ("part", "key", "words"),
    [
        ("model", "layers.0.attention.to_qkv.wscales", "wscales': expected finite numbers"),
        ("model", "layers.0.attention.to_qkv.smooth_factor", "smooth_factor': expected finite numbers"),
        ("model", "layers.0.attention_norm1.weight", "attention_norm1.weight': expected finite numbers"),
        ("model", "layers.0.attention.to_qkv.proj_down", "denoising: expected finite numbers"),
        ("model", "x_embedder.2-1.weight", "denoising: expected finite numbers"),
        ("text_encoder", "layers.0.mlp.down_proj.weight", "text encoder ("),
        ("text_encoder", "layers.0.input_layernorm.weight", "input_layernorm.weight': expected finite numbers"),
        ("vae", "decoder.conv_in.weight", "decoding: expected finite numbers"),
        ("vae", "decoder.conv_out.weight", "decoding: expected finite numbers"),
        ("vae", "decoder.conv_out.bias", "conv_out.bias': expected finite numbers"),
    ],
)
def test_a_number_that_is_none_in_a_file(tiny_files, tmp_path, monkeypatch, part, key, words):
    """Small tensors are checked when they are loaded; for the stages' own checks the tiny ones pass for large."""
    loading = "'" in words
    if not loading:
        monkeypatch.setattr(load, "SMALL", 0)
    for value in NUMBERS:
        path = changed(tiny_files[part], tmp_path / "changed.safetensors", key, value)
        if loading and value is not NUMBERS[0]:  # the loader's sentence is the pipeline's, as the first number shows
            with pytest.raises(ValueError) as error:
                LOADERS[part](path)
            message = str(error.value)
        else:
            message = refused({**tiny_files, part: path})
        assert words in message and ("download" in message or "damaged" in message)


def test_a_smoothing_factor_of_zero(tiny_files, tmp_path):
    path = changed(tiny_files["model"], tmp_path / "zero.safetensors", "layers.0.attention.to_qkv.smooth_factor", 0.0)
    assert "smooth_factor': expected no zero" in refused({**tiny_files, "model": path})


def test_the_command_ends_with_a_sentence_and_exit_code_2(tiny_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load, "SMALL", 0)
    path = changed(tiny_files["vae"], tmp_path / "vae.safetensors", "decoder.conv_in.weight", math.nan)
    arguments = ["--model", tiny_files["model"], "--text-encoder", tiny_files["text_encoder"], "--vae", path]
    arguments += ["--width", 32, "--height", 32, "--steps", 1, "--device", "cpu", "--out", tmp_path / "x.png"]
    assert cli.main(["generate", "a cat", *map(str, arguments)]) == 2
    assert "VAE, decoding: expected finite numbers, found NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("value", [*NUMBERS, -1.0, 10**400, "1", None, True])
@pytest.mark.parametrize("name", ["norm_eps", "rope_theta", "t_scale", "n_layers", "axes_dims"])
def test_numbers_of_the_transformers_config(name, value):
    with pytest.raises(ValueError, match=f"config: {name}: expected"):
        ZImageConfig(**{name: value})


@pytest.mark.parametrize("value", [*NUMBERS, 10**400, "1", None, True])
@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_numbers_of_the_vaes_config(name, value):
    with pytest.raises(ValueError, match=f"config: {name}: expected"):
        VAEConfig(**{name: value})
    with pytest.raises(ValueError, match="scaling_factor: expected"):
        VAEConfig(scaling_factor=0)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"layers_per_block": 10**9}, "layers_per_block: expected an integer from 1 to 16"),
        ({"layers_per_block": 100}, "layers_per_block: expected an integer from 1 to 16"),
        ({"block_out_channels": (32,) * 100}, "levels"),
    ],
)
def test_counts_of_the_vaes_config_are_bounded(sizes, words):
    with pytest.raises(ValueError, match=words):
        VAEConfig(**sizes)


@pytest.mark.parametrize("guidance", [*NUMBERS, -1.0, 1e30])
def test_guidance(tiny_files, guidance):
    with pytest.raises(ValueError, match="guidance: expected (0 to 100|a number), found"):
        load_pipeline(**tiny_files, device="cpu")("a cat", **SIZE, guidance_scale=guidance)


@pytest.mark.parametrize("strength", [*NUMBERS, 1e38, -101])
def test_the_strength_of_a_lora(tiny_files, strength):
    pair = {"down": torch.ones(4, 128), "up": torch.ones(128, 4)}
    lora = Lora.from_tensors({f"layers.0.attention.to_out.lora_{k}.weight": t for k, t in pair.items()})
    model = load_transformer(tiny_files["model"], device="meta")
    with pytest.raises(ValueError, match="expected a strength of up to 100 either way"):
        apply(model, [(lora, strength)])


@pytest.mark.parametrize("name", ["lora_alpha", "r"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", "1" + 400 * "0", "[]"])
def test_numbers_of_a_peft_config(name, value):
    with pytest.raises(ValueError, match="PEFT config is damaged"):
        PeftConfig.read({}, "lora", json.dumps({name: 0}).replace("0", value))


def test_what_overflows_fp16_makes_no_nan():
    """65504 is the largest fp16; a value beyond it is taken for it, so infinity times zero is zero."""
    infinite = torch.tensor([[math.inf, 1.0, -math.inf, 2.0], [0.0, 0.0, 1.0, -math.inf]]).half()  # values, gates
    made = ops.swiglu(infinite.flatten()[None])
    assert made.isfinite().all() and made[0, :2].eq(0).all() and made[0, 2] < -40000
    qkv = torch.randn(1, 2, 3, 2, 4).half()
    qkv[0, 0, :, 0, 0] = math.inf
    cos, sin = torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    assert all(
        t.isfinite().all() for t in ops.norm_rope(qkv, torch.ones(4).half(), torch.ones(4).half(), 1e-5, cos, sin)
    )


def test_the_low_rank_branch_holds_sums_that_overflow_fp16():
    """x @ down.T of 2e5, which fp16 holds a 256th of; up takes it back into range."""
    x, down, up = torch.full((2, 128), 100.0), torch.full((16, 128), 16.0), torch.full((128, 16), 1e-4)
    exact = (x @ down.T) @ up.T
    weights = SVDQWeights(
        torch.full((128, 64), 0x11, dtype=torch.uint8), torch.zeros(128, 2), torch.ones(128), down, up
    ).to(dtype=torch.float16)
    for backend in ("reference", "kitchen"):
        if backend == "kitchen" and importlib.util.find_spec("comfy_kitchen") is None:
            continue
        module = backends.load(backend)
        level = "w4a8" if backend == "kitchen" else "w4a16"
        prepared = {name: t for name, t in module.prepare(weights, level).items() if name != "dense"}
        found = module.linear(x.half(), prepared, level).float()
        assert (found / exact - 1).abs().max() < 3e-3


def test_an_fp16_text_encoder_holds_what_overflows_fp16():
    """Qwen3's residual stream has channels of ten thousands, its SwiGLU more: neither becomes infinite."""
    torch.manual_seed(0)
    config = TextEncoderConfig(32, 64, 96, 3, 2, 1, 32)
    full, half = TextEncoder(config), TextEncoder(config).half()
    state = full.state_dict()
    state["layers.0.mlp.down_proj.weight"][5] *= 3e5  # a channel of the stream, beyond fp16
    state["layers.1.mlp.down_proj.weight"][5] *= -3e5
    state["layers.2.mlp.up_proj.weight"][:4] *= 1e3
    full.load_state_dict(state)
    half.load_state_dict(state)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        expected, found = full(ids), half(ids)
    assert found.dtype is torch.float16 and found.isfinite().all()
    others = [i for i in range(64) if i != 5]  # the huge one saturates
    assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99
    assert torch.dist(found.float()[..., others], expected[..., others]) < 0.02 * expected[..., others].norm()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("Unable to find an engine to execute this computation"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB"),
        RuntimeError("HIP error: hipErrorOutOfMemory"),
        RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_out_of_memory_in_every_system_s_words(error):
    assert out_of_memory(error)


@pytest.mark.parametrize("change", ["shrunk", "rewritten", "gone"])
@pytest.mark.parametrize("part", ["model", "text_encoder", "vae"])
def test_a_file_that_changed_since_its_header_was_read_is_not_drawn_with(tiny_files, tmp_path, part, change):
    """Said before its stage reads it, whichever stage came before."""
    path = tmp_path / "x.safetensors"
    shutil.copy(tiny_files[part], path)
    shutil.copy(tiny_files["text_encoder"].parent / "tokenizer.json", tmp_path)
    pipeline, stages = load_pipeline(**{**tiny_files, part: path}, device="cpu"), []
    pipeline.plan(["a cat"], 32, 32)
    raw = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(raw[:-1000] if change == "shrunk" else raw[:-1000] + bytes(1000))
    with pytest.raises(ValueError, match=r"x\.safetensors: changed since its header was read"):
        pipeline("a cat", **SIZE, on_stage=lambda name, steps: stages.append(name))
    assert not any(name.endswith({"model": "transformer", "vae": "VAE"}.get(part, "encoder")) for name in stages)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_file_that_changes_while_it_is_read(tiny_files, tmp_path, kind):
    """A quantizer reads for hours: each tensor is asked for from the file whose header was read."""
    path = tmp_path / f"x.{kind}"
    if kind == "gguf":
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(path, "qwen3")
        writer.add_tensor("a", torch.ones(64, 64).numpy())
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    else:
        save_file({"a": torch.ones(64, 64)}, path)
    with open_tensors(path) as files:
        files.get("a")
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(ValueError, match="changed since its header was read; wait until it is whole"):
            files.get("a")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("out of memory.safetensors"), OSError(2, "gone")])
def test_other_errors_are_not_out_of_memory(error):
    assert not out_of_memory(error)
