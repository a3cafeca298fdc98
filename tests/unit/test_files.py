"""Reading files: headers as strict as `safetensors` itself, shards, and what every kind of file is called."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save_file

from zimage_core.demo import demo_files, demo_loras
from zimage_core.files import find_files
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.formats.identify import READ, identify, model_info
from zimage_core.formats.load import load_transformer
from zimage_core.formats.safetensors import open_tensors, read_header, tensor_bytes
from zimage_core.formats.vae import load_vae
from zimage_core.models.vae import VAE, VAEConfig

TINY = Path(__file__).parents[1] / "data" / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"


def packed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: str = "F32", shape: object = (1,), start: object = 0, end: object = 4, **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


# ---------------------------------------------------------------- headers


def check_against_safetensors(path: Path, content: bytes) -> None:
    """read_header takes a file exactly where `safetensors` does, and finds the same in it."""
    path.write_bytes(content)
    try:
        expected = {name: (t["dtype"], tuple(t["shape"])) for name, t in deserialize(content)}
    except SafetensorError:
        with pytest.raises(ValueError) as error:
            read_header(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    else:
        header = read_header(path)
        assert header.tensors == expected
        data = len(content) - 8 - int.from_bytes(content[:8], "little")
        assert sum(tensor_bytes(*t) for t in expected.values()) == data


DTYPES = ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "F16", "BF16", "I32", "F32", "F64", "I64", "C64"]
DTYPES += ["F4", "F6_E2M3", "F6_E3M2", "U16", "U32", "U64"]
NUMBERS = st.one_of(st.integers(-1, 9), st.sampled_from([2**62, 2**64 - 1, 2**64, 1.0, True, None, "1"]))


@st.composite
def files(draw) -> bytes:
    """A file whose header is right, but for up to two faults in its entries, its bytes or the file's length."""
    header: dict = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
        size = tensor_bytes(dtype, tuple(shape))
        header[name] = entry(dtype, shape, end, end + size)
        end += size
    for _ in range(draw(st.integers(0, 2))):
        if header and (name := draw(st.sampled_from([*header]))) and isinstance(header[name], dict):
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            odd = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3), st.sampled_from(["f32", "F128", {}]))
            header[name] = {**header[name], field: draw(odd)}
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.one_of(st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2), NUMBERS, st.just({"a": 1}))
        )
    raw = json.dumps(header).encode()
    if draw(st.integers(0, 3)) == 0 and raw:
        place = draw(st.integers(0, len(raw) - 1))
        raw = raw[:place] + draw(st.binary(max_size=2)) + raw[place + draw(st.integers(0, 2)) :]
    content = packed(raw, bytes(end))
    return content[: len(content) - draw(st.integers(0, 2))] if draw(st.integers(0, 5)) == 0 else content


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("headers") / "x.safetensors"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(content=files())
def test_headers_are_taken_exactly_where_safetensors_takes_them(scratch, content):
    check_against_safetensors(scratch, content)


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
ODD = {
    "gap": packed(json.dumps({"a": entry(start=4, end=8)}).encode(), bytes(8)),
    "overlap": packed(json.dumps({"a": entry(), "b": entry()}).encode(), bytes(4)),
    "backwards": packed(json.dumps({"a": entry(start=4, end=0)}).encode(), bytes(4)),
    "size": packed(json.dumps({"a": entry(shape=[2])}).encode(), bytes(4)),
    "half a byte": packed(json.dumps({"a": entry("F4", [3], 0, 2)}).encode(), bytes(2)),
    "twice": packed(TWICE, bytes(8)),
    "metadata": packed(b'{"__metadata__":{"a":1}}'),
    "metadata twice": packed(b'{"__metadata__":{},"__metadata__":{}}'),
    "nesting": packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "overflow": packed(json.dumps({"a": entry(shape=[2**63, 2, 0], end=0)}).encode()),
    "UTF-8": packed(b'{"\xff":1}'),
    "list": packed(b"[]"),
    "header too long": struct.pack("<Q", 100_000_001) + b"{}",
    "header of 2 ** 64": b"\xff" * 8 + b"{}",
    "scalar": packed(json.dumps({"a": entry(shape=[])}).encode(), bytes(4)),
    "no numbers": packed(json.dumps({"a": entry(shape=[0, 2**40], end=0)}).encode()),
    "many axes": packed(json.dumps({"a": entry(shape=[1] * 1000)}).encode(), bytes(4)),
    "spaces": packed(b"{}" + b" " * 99),
    "nothing": b"",
}


@pytest.mark.parametrize("case", ODD)
def test_odd_headers(tmp_path, case):
    check_against_safetensors(tmp_path / "x.safetensors", ODD[case])


@pytest.mark.parametrize(
    "length", [640, 640 + 65536, int.from_bytes(b"<html", "little") % 2**16, int.from_bytes(b"PK\x03\x04", "little")]
)
def test_a_length_that_looks_like_another_file_is_a_length(tmp_path, length):
    """640 is b"\\x80\\x02", with which pickles begin, and 67 MB are a ZIP file's first bytes."""
    check_against_safetensors(tmp_path / "x.safetensors", packed(b"{}".ljust(length)))


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path}: expected a file, found a pipe or device"):
            open_tensors(path)
    with pytest.raises(ValueError, match="found a folder"):
        read_header(tmp_path)
    for path in ("absent.safetensors", "a" * 300, "x.safetensors/y"):
        (tmp_path / "x.safetensors").touch()
        with pytest.raises(ValueError, match=path):
            read_header(tmp_path / path)


def test_shards_are_read_where_the_index_says(tmp_path):
    one, two = torch.ones(2), torch.zeros(2)
    save_file({"a": one, "b": one.clone()}, tmp_path / "1.safetensors")
    save_file({"a": two, "c": two.clone()}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def write(**weight_map):
        index.write_text(json.dumps({"weight_map": {k: f"{v}.safetensors" for k, v in weight_map.items()}}))

    for number, expected in ((1, one), (2, two)):
        write(a=number, b=1, c=2)
        with open_tensors(tmp_path) as files:
            assert sorted(files.tensors) == ["a", "b", "c"] and torch.equal(files.get("a"), expected)
    for weight_map, words in (
        ({"a": 1, "b": 2, "c": 2}, "2.safetensors: expected tensor 'b', as model.*index.json says, found none"),
        ({"a": 1, "c": 2}, r"1.safetensors: tensor 'b' is not in model.safetensors.index.json"),
        ({"a": 3}, "3.safetensors: no such file"),
    ):
        write(**weight_map)
        with pytest.raises(ValueError, match=words):
            open_tensors(tmp_path)


# ---------------------------------------------------------------- what a file is


def quantized(tensors: dict, make) -> dict:
    """The tiny dense model with every weight of a block's linears in another form."""
    found = {}
    for key, value in tensors.items():
        stem = key.removesuffix("weight")
        small = value.ndim == 2 and key.startswith("layers.") and ("attention." in key or "feed_forward." in key)
        found |= make(key, stem, *value.shape) if small and key != stem else {key: value}
    return found


@pytest.fixture(scope="module")
def dense() -> dict[str, torch.Tensor]:
    return load_file(DENSE)


DENSE = Path(__file__).parents[2] / "demo_training" / "z-image-demo-bf16.safetensors"


U8, I8, F8 = torch.uint8, torch.int8, torch.float8_e4m3fn
FORMS = {
    "FP8": lambda k, s, n, c: {k: torch.zeros(n, c).to(F8), f"{s}weight_scale": torch.ones(())},
    "INT8": lambda k, s, n, c: {k: torch.zeros(n, c, dtype=I8), f"{s}weight_scale": torch.ones(())},
    "NVFP4": lambda k, s, n, c: {
        k: torch.zeros(n, c // 2, dtype=U8),
        f"{s}weight_scale": torch.ones(n, c // 16).to(F8),
        f"{s}weight_scale_2": torch.ones(()),
    },
    "ComfyUI SVDQuant W4A4": lambda k, s, n, c: {
        k: torch.zeros(n, c // 2, dtype=I8),
        f"{s}weight_scale": torch.zeros(c // 64, n),
        f"{s}proj_down": torch.zeros(c, 16),
        f"{s}proj_up": torch.zeros(n, 16),
        f"{s}smooth_factor": torch.zeros(c),
    },
    "quanto INT8": lambda k, s, n, c: {f"{k}._data": torch.zeros(n, c, dtype=I8), f"{k}._scale": torch.ones(n, 1)},
    "quanto INT4": lambda k, s, n, c: {
        f"{k}._data._data": torch.zeros(n // 2, c, dtype=U8),
        f"{k}._scale": torch.ones(n),
    },
    "SDNQ": lambda k, s, n, c: {
        k: torch.zeros(n * c // 2, dtype=U8),
        f"{s}scale": torch.ones(n),
        f"{s}svd_up": torch.ones(n),
    },
    "bitsandbytes": lambda k, s, n, c: {k: torch.zeros(n * c // 2, 1, dtype=U8), f"{k}.absmax": torch.ones(n)},
}


@pytest.mark.parametrize("form", FORMS)
def test_quantized_transformers_are_called_by_their_form(dense, tmp_path, form):
    save_file(quantized(dense, FORMS[form]), tmp_path / "x.safetensors")
    found = identify(tmp_path / "x.safetensors")
    assert found.role == "model" and form in found.what and found.form.id != "dense"
    if found.form.id in (*READ, "comfy-svdq"):
        seen_as = {"comfy-svdq": "svdq-int4"}.get(found.form.id, found.form.id)
        assert model_info(tmp_path / "x.safetensors").format == seen_as
        return
    with pytest.raises(
        ValueError, match=f"x.safetensors: expected a Z-Image transformer in .*, found .*{form}.*not read"
    ):
        model_info(tmp_path / "x.safetensors")


def relatives(dense: dict) -> dict[str, dict]:
    one = torch.ones(1)
    return {
        "Omni": dense | {"siglip_embedder.0.weight": one, "siglip_pad_token": one},
        "L2P": dense | {"dec_net.cond_embed.weight": one},
        "TwinFlow": dense | {"t_embedder_2.mlp.0.weight": one},
        "Lumina 2": {k.replace("adaLN_modulation.0", "adaLN_modulation.1"): v for k, v in dense.items()},
        "a Z-Image ControlNet": {
            "control_layers.0.after_proj.weight": one,
            "control_all_x_embedder.2-1.weight": one,
            "control_noise_refiner.0.attention.to_q.weight": one,
        },
        "SDXL": {
            "model.diffusion_model.input_blocks.0.0.weight": one,
            "model.diffusion_model.label_emb.0.0.weight": one,
        },
        "Flux": {"double_blocks.0.img_attn.qkv.weight": one, "single_blocks.0.linear1.weight": one},
        "SD3": {"joint_blocks.0.x_block.attn.qkv.weight": one},
        "HunyuanVideo": {"txt_in.individual_token_refiner.blocks.0.norm1.weight": one},
        "HiDream": {"double_stream_blocks.0.block.ff_i.gate.weight": one},
        "Stable Diffusion": {"input_blocks.0.0.weight": one},
        "a video autoencoder": {"decoder.upsamples.0.residual.0.gamma": one},
        "quant_conv": {"post_quant_conv.weight": one, "decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)},
        "the decoder of an autoencoder only": {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)},
        "Gemma": {"model.layers.0.pre_feedforward_layernorm.weight": one},
        "a vision-language model": {"visual.blocks.0.attn.qkv.weight": one},
        "a mixture-of-experts": {"model.layers.0.mlp.experts.0.up_proj.weight": one},
        "a ControlNet for another model": {"control_model.input_blocks.0.0.weight": one},
        "Qwen-Image": {"transformer_blocks.0.img_mod.1.weight": one},
        "Wan": {"blocks.0.self_attn.q.weight": one, "patch_embedding.weight": one},
        "T5": {"encoder.block.0.layer.0.SelfAttention.q.weight": one},
        "CLIP": {"text_model.encoder.layers.0.self_attn.q_proj.weight": one},
        "a tiny autoencoder": {"decoder.layers.0.weight": one},
        "4 latent channels": {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)},
        "another kind of file (keys such as 'x')": {"x": one},
        "a file without tensors": {},
    }


def test_relatives_and_strangers_are_called_by_name(dense, tmp_path):
    for what, tensors in relatives(dense).items():
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "x.safetensors")
        found = identify(tmp_path / "x.safetensors")
        assert what in found.what and found.role in ("other", "controlnet")
        with pytest.raises(ValueError, match="expected a Z-Image transformer"):
            model_info(tmp_path / "x.safetensors")


def test_parts_and_whole_checkpoints(dense, tmp_path):
    parts = demo_files()
    roles = {"model": "model", "text_encoder": "text encoder", "vae": "vae"}
    for name, role in roles.items():
        found = identify(parts[name])
        assert found.role == role
        for other in set(roles.values()) - {role}:
            with pytest.raises(ValueError, match=f"found {found.what}"):
                found.require(other)
    encoder = load_file(parts["text_encoder"] / "model.safetensors")
    whole = {f"model.diffusion_model.{k}": v for k, v in dense.items()}
    whole |= {f"text_encoders.qwen3_4b.transformer.{k}": v for k, v in encoder.items()}
    parts["vae"] = tmp_path / "vae.safetensors"  # one whose config its shapes tell
    save_file(VAE(VAEConfig((32, 32, 32, 32), 1)).state_dict(), parts["vae"])
    whole |= {f"vae.{k}": v for k, v in load_file(parts["vae"]).items()}
    save_file(whole, tmp_path / "x.safetensors")
    assert identify(tmp_path / "x.safetensors").role == "checkpoint"
    path = tmp_path / "x.safetensors"
    assert model_info(path).format == "dense"
    files = find_files(path, tokenizer=parts["tokenizer"])
    assert files.model == files.text_encoder == files.vae == path
    for load, part in ((load_text_encoder, "text_encoder"), (load_vae, "vae")):
        apart, within = (dict(load(p).state_dict()) for p in (parts[part], path))
        assert apart.keys() == within.keys() and all(torch.equal(apart[k], within[k]) for k in apart)
    names = {name: load_transformer(p).state_dict() for name, p in (("whole", path), ("apart", DENSE))}
    assert all(torch.equal(t, names["apart"][k]) for k, t in names["whole"].items())
    save_file({k: v for k, v in whole.items() if not k.startswith("vae.")}, path)
    with pytest.raises(ValueError, match="expected a checkpoint with a vae, found none in it"):
        load_vae(path)


def test_a_checkpoint_of_another_model_gets_no_advice_for_its_parts(tmp_path):
    """It is not "a VAE, put it into models/vae", and --model does not take it."""
    one = torch.ones(1)
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": one,
        "model.diffusion_model.label_emb.0.0.weight": one.clone(),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": one.clone(),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(8, 4, 3, 3),
    }
    path = tmp_path / "sdxl.safetensors"
    save_file(tensors, path)
    found = identify(path)
    assert found.role == "other" and found.what.startswith("a whole checkpoint of another model (SDXL) (diffusion")
    for role in ("model", "text encoder", "vae", "lora", "controlnet"):
        with pytest.raises(ValueError, match=r"found a whole checkpoint of another model \(SDXL\)") as caught:
            found.require(role)
        assert "put it into" not in str(caught.value) and "--model" not in str(caught.value)
    for load in (load_vae, load_text_encoder):
        with pytest.raises(
            ValueError, match=r"sdxl\.safetensors: expected .* found a whole checkpoint of another model"
        ):
            load(path)


def test_names_left_by_wrappers_are_read(dense, tmp_path):
    for wrap in (
        lambda k: f"_orig_mod.{k}",
        lambda k: f"module.{k}",
        lambda k: k.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace(
            "refiner.0.", "refiner.0._orig_mod."
        ),
    ):
        save_file({wrap(k): v for k, v in dense.items()}, tmp_path / "x.safetensors")
        assert model_info(tmp_path / "x.safetensors").format == "dense"


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod."])
@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_names_left_by_wrappers_in_the_other_parts(tiny_files, tmp_path, part, wrapper):
    """In front of all names, or within them as FSDP leaves it: the same weights."""
    load = {"text_encoder": load_text_encoder, "vae": load_vae}[part]
    header, tensors = read_header(tiny_files[part]), load_file(tiny_files[part])
    whole = dict(load(tiny_files[part]).state_dict())
    for wrapped in (
        {wrapper + key: tensor for key, tensor in tensors.items()},
        {key.replace("0.", f"0.{wrapper}", 1): tensor for key, tensor in tensors.items()},
    ):
        save_file(wrapped, tmp_path / "x.safetensors", header.metadata)
        found = dict(load(tmp_path / "x.safetensors").state_dict())
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize("prefix", ["transformer.", "qwen3_4b.transformer."])
def test_an_encoder_that_clipsave_wrote(tiny_files, tmp_path, prefix):
    header, tensors = read_header(tiny_files["text_encoder"]), load_file(tiny_files["text_encoder"])
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "x.safetensors", header.metadata)
    found, whole = (
        dict(load_text_encoder(path).state_dict()) for path in (tmp_path / "x.safetensors", tiny_files["text_encoder"])
    )
    assert all(torch.equal(found[key], whole[key]) for key in whole)


IDENTIFY = """
import re, sys
from pathlib import Path
from zimage_core.formats.identify import identify

def mapped():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

import safetensors, numpy
identify(sys.argv[1])  # what there is to import
before = mapped()
roles = [identify(path).role for path in sys.argv[1:]]
print(mapped() - before, "torch" in sys.modules, *roles, sep="\\n")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell which memory is mapped")
def test_identifying_reads_headers_only_and_leaves_torch_alone(tmp_path):
    """Of files of 64 MiB of each kind, of which at most 1 MiB comes into memory; 0.3 s is what that takes together."""
    parts, size = demo_files(), 2**26
    names = {"model": TINY, "lora": next(iter(demo_loras().values())), "vae": parts["vae"]}
    names["text encoder"] = parts["text_encoder"] / "model.safetensors"
    paths = {role: tmp_path / f"{i}.safetensors" for i, role in enumerate(names)}
    for role, path in names.items():
        tensors = load_file(path)
        save_file(tensors | {"zzz.weight": torch.zeros(size, dtype=torch.uint8)}, paths[role])
    paths["gguf"] = tmp_path / "x.gguf"
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(paths["gguf"], "lumina2")
    for key in ("cap_embedder.0.weight", "layers.0.attention.qkv.weight"):
        writer.add_tensor(key, np.zeros((size // 8, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    command = [sys.executable, "-c", IDENTIFY, *map(str, paths.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TINY.parents[3])
    kib, torch_there, *roles = done.stdout.split("\n")[:-1]
    assert int(kib) < 1024 and torch_there == "False"
    assert roles == ["model", "lora", "vae", "text encoder", "model"]


def test_the_shift_of_a_folders_scheduler(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(DENSE.read_bytes())
    parts = demo_files()
    options = (folder, parts["text_encoder"], parts["vae"], parts["tokenizer"])
    assert find_files(*options).shift == 3
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps({"shift": 6.0, "use_dynamic_shifting": False}))
    assert find_files(*options).shift == 6
    for bad in ({"shift": -1}, {"shift": "6"}, {"shift": 3, "use_dynamic_shifting": True}, []):
        scheduler.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="scheduler_config.json: expected a"):
            find_files(*options)
