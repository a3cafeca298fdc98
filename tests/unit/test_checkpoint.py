"""Every layout that a transformer comes in gives the same model; every other file gives one clear sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.formats.identify import model_info
from zimage_core.formats.load import load_transformer
from zimage_core.formats.names import canonical_module, canonical_tensor
from zimage_core.formats.safetensors import read_header
from zimage_core.linear.svdq import SVDQLinear
from zimage_core.quantize.run import svdq_from_dense

DATA = Path(__file__).parent.parent / "data"
TINY = DATA / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"
FUSED = {"attention.to_qkv", "attention.to_out.0", "feed_forward.net.0.proj", "feed_forward.net.2"}


@pytest.fixture(scope="module")
def tiny():
    """The golden checkpoint's tensors and metadata."""
    return load_file(TINY), read_header(TINY).metadata


@pytest.fixture(scope="module")
def dense(tiny):
    """The golden checkpoint, dequantized, in diffusers' names."""
    model = load_transformer(TINY, dtype=torch.float32, precision="w4a16")
    tensors = {k: v for k, v in tiny[0].items() if not k.rpartition(".")[0].endswith(tuple(FUSED))}
    for name, module in model.named_modules():
        if not isinstance(module, SVDQLinear):
            continue
        block, _, leaf = name.rpartition(".")
        block = block.rpartition(".")[0]
        weight = module.weights().dequantize().to(torch.bfloat16)
        if leaf == "to_qkv":
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                tensors[f"{block}.attention.to_{part}.weight"] = rows.contiguous()
        elif leaf == "w3_w1":
            for part, rows in zip(("w3", "w1"), weight.chunk(2), strict=True):
                tensors[f"{block}.feed_forward.{part}.weight"] = rows.contiguous()
        else:
            tensors[f"{block}." + {"to_out": "attention.to_out.0", "w2": "feed_forward.w2"}[leaf] + ".weight"] = weight
    return tensors


def draw(model):
    gen = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, 8, generator=gen)
    caps = torch.randn(20, 64, generator=gen)
    with torch.no_grad():
        return model(latents, torch.tensor([0.4]), model.prepare([caps], 64, 64))


def comfy_name(key: str) -> str:
    """diffusers' names -> ComfyUI's, written down independently of `keys`."""
    for theirs, comfys in (
        ("attention.to_qkv.", "attention.qkv."),
        ("attention.to_out.0.", "attention.out."),
        ("attention.norm_q.", "attention.q_norm."),
        ("attention.norm_k.", "attention.k_norm."),
        ("feed_forward.net.0.proj.", "feed_forward.w13."),
        ("feed_forward.net.2.", "feed_forward.w2."),
        ("all_x_embedder.2-1.", "x_embedder."),
        ("all_final_layer.2-1.", "final_layer."),
    ):
        key = key.replace(theirs, comfys)
    return key


def comfy_dense(tensors):
    out = {comfy_name(k): v for k, v in tensors.items()}
    for q in [k for k in out if k.endswith("to_q.weight")]:
        parts = [out.pop(q.replace("to_q", f"to_{x}")) for x in "qkv"]
        out[q.replace("to_q", "qkv")] = torch.cat(parts)
    return out


@pytest.fixture(scope="module")
def expected(dense, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "z.safetensors"
    save_file(dense, path, metadata={"config": tiny[1]["config"]})
    return draw(load_transformer(path, dtype=torch.float32))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("style", ["diffusers", "comfy"])
def test_dense_styles(dense, expected, tmp_path, prefix, style):
    tensors = dense if style == "diffusers" else comfy_dense(dense) | {"norm_final.weight": torch.ones(384)}
    save_file({prefix + k: v for k, v in tensors.items()}, tmp_path / "z.safetensors")
    info = model_info(tmp_path / "z.safetensors")
    assert (info.format, info.rank, info.config.n_layers, info.config.n_heads) == ("dense", 0, 1, 3)
    assert torch.equal(draw(load_transformer(tmp_path / "z.safetensors", dtype=torch.float32)), expected)


def test_fp16_file(dense, expected, tmp_path):
    save_file({k: v.half() for k, v in dense.items()}, tmp_path / "z.safetensors")
    out = draw(load_transformer(tmp_path / "z.safetensors", dtype=torch.float32))
    assert (out - expected).norm() <= 1e-3 * expected.norm()


def test_sharded_folder(dense, expected, tiny, tmp_path):
    names = sorted(dense)
    weight_map = {}
    for i in range(2):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({k: dense[k] for k in names[i::2]}, tmp_path / shard)
        weight_map |= dict.fromkeys(names[i::2], shard)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(tiny[1]["config"])
    assert torch.equal(draw(load_transformer(tmp_path, dtype=torch.float32)), expected)

    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        load_transformer(tmp_path)
    for content in (b"[]", b'{"weight_map": []}', b'{"weight_map": {"a": 1, "b": "c"}}', b"\xff"):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{index.name}: expected an index of shards .*; download it again"):
            load_transformer(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_bytes(b'{"dim": "\xff"}')
    with pytest.raises(ValueError, match=r"config\.json: expected UTF-8 text, found other bytes .*; download it again"):
        load_transformer(tmp_path)


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_svdq_in_comfy_names(tiny, tmp_path, prefix, metadata):
    tensors, meta = tiny
    save_file(
        {prefix + comfy_name(k): v for k, v in tensors.items()},
        tmp_path / "z.safetensors",
        metadata=meta if metadata else None,
    )
    info = model_info(tmp_path / "z.safetensors")
    assert (info.format, info.rank, info.quantized_refiners) == ("svdq-int4", 32, True)
    assert info.config.axes_dims == (32, 48, 48)
    plain = load_transformer(TINY, dtype=torch.float32, precision="w4a16")
    assert torch.equal(
        draw(load_transformer(tmp_path / "z.safetensors", dtype=torch.float32, precision="w4a16")), draw(plain)
    )


def test_dense_refiners(tiny, dense, tmp_path):
    """skip_refiners: plain to_q/k/v, but the fused [w3; w1] under diffusers' FeedForward names."""
    tensors = {k: v for k, v in tiny[0].items() if k.startswith("layers.") or "refiner" not in k}
    for key, value in dense.items():
        if "refiner" not in key or key.endswith((".w3.weight",)):
            continue
        if key.endswith(".w1.weight"):
            w3 = dense[key.replace(".w1.", ".w3.")]
            tensors[key.replace("w1", "net.0.proj")] = torch.cat([w3, value])
        else:
            tensors[key.replace("feed_forward.w2", "feed_forward.net.2")] = value
    save_file(tensors, tmp_path / "z.safetensors", metadata=tiny[1])
    model = load_transformer(tmp_path / "z.safetensors", dtype=torch.float32, precision="w4a16")
    assert not model.checkpoint.quantized_refiners
    assert isinstance(model.layers[0].attention.to_qkv, SVDQLinear)
    assert isinstance(model.noise_refiner[0].attention.to_qkv, torch.nn.Linear)
    expected = draw(load_transformer(TINY, dtype=torch.float32, precision="w4a16"))
    assert (draw(model) - expected).norm() <= 1e-2 * expected.norm()  # the refiners were rounded to bf16


@pytest.mark.parametrize("rank", [16, 64, 128, 256])
def test_any_rank(tiny, dense, expected, tmp_path, rank):
    """Rank comes from the tensors; more of it comes closer to the dense model."""
    tensors = {k: v for k, v in tiny[0].items() if not k.rpartition(".")[0].endswith(tuple(FUSED))}
    for name in {k.rpartition(".")[0] for k in tiny[0]} - {k.rpartition(".")[0] for k in tensors}:
        block, _, leaf = name.partition(".attention.") if ".attention." in name else name.partition(".feed_forward.")
        sources = {
            "to_qkv": [f"attention.to_{x}" for x in "qkv"],
            "to_out.0": ["attention.to_out.0"],
            "net.0.proj": ["feed_forward.w3", "feed_forward.w1"],
            "net.2": ["feed_forward.w2"],
        }[leaf]
        weight = torch.cat([dense[f"{block}.{s}.weight"] for s in sources])
        tensors |= {f"{name}.{k}": v for k, v in svdq_from_dense(weight, rank).to_packed().items()}
    save_file(tensors, tmp_path / "a-name-that-says-r32.safetensors")
    model = load_transformer(tmp_path / "a-name-that-says-r32.safetensors", dtype=torch.float32, precision="w4a16")
    assert model.checkpoint.rank == rank
    assert (draw(model) - expected).norm() <= 0.2 * expected.norm()


def test_sizes_of_the_real_file():
    spec = json.loads((DATA / "real_model_expected_tensors_r256.json").read_text())["tensors"]
    assert len(spec) == 1099
    assert all(canonical_tensor(k) for k in spec)
    assert len({canonical_tensor(k) for k in spec}) == len(spec)


def test_names_of_lora_modules():
    assert canonical_module("transformer.layers.3.attention.to_k") == ("layers.3.attention.to_qkv", "k")
    assert canonical_module("diffusion_model.layers.3.attention.qkv") == ("layers.3.attention.to_qkv", None)
    assert canonical_module("noise_refiner.0.feed_forward.w1") == ("noise_refiner.0.feed_forward.w3_w1", "w1")
    assert canonical_module("all_final_layer.2-1.linear") == ("final_layer.linear", None)
    assert canonical_module("layers.3.attention.to_q_extra") is None
    assert canonical_module("xlayers.3.attention.to_q") is None


def broken(tiny, change):
    tensors, meta = dict(tiny[0]), dict(tiny[1])
    change(tensors, meta)
    return tensors, meta


def drop(key):
    return lambda tensors, meta: tensors.pop(key)


def put(key, value):
    return lambda tensors, meta: tensors.update({key: value})


QKV = "layers.0.attention.to_qkv"
CASES = {
    "missing": (drop("cap_pad_token"), "expected tensor 'cap_pad_token'.*found none"),
    "missing scale": (drop(f"{QKV}.wscales"), f"'{QKV}.wscales'.*found none"),
    "misshapen": (put("layers.0.ffn_norm1.weight", torch.ones(383)), r"expected shape \(384,\), found \(383,\)"),
    "misshapen packed": (put(f"{QKV}.qweight", torch.zeros(1152, 96, dtype=torch.int8)), "expected shape"),
    "unknown": (put("layers.0.surprise.weight", torch.ones(3)), "unexpected tensor 'layers.0.surprise.weight'"),
    "twice": (put("layers.0.attention.qkv.qweight", torch.ones(3)), "are the same tensor"),
    "dtype": (put(f"{QKV}.wscales", torch.ones(6, 1152, dtype=torch.int32)), "expected dtype BF16 or F16, found I32"),
    "fp4": (put(f"{QKV}.wcscales", torch.ones(1152)), "expected dtype F8_E4M3, found BF16.*svdq-int4_r256"),
    "int8": (lambda t, m: m.update(quantization_config='{"weight": {"dtype": "int8"}}'), "weights int8"),
    "config": (lambda t, m: m.update(config='{"dim": 512}'), "metadata says dim = 512, the tensors 384"),
    "config not json": (lambda t, m: m.update(config="{"), "metadata config: expected a JSON object"),
    "patches": (lambda t, m: m.update(config='{"all_patch_size": [4]}'), "all_patch_size"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_file_gets_a_sentence(tiny, tmp_path, case):
    change, message = CASES[case]
    tensors, meta = broken(tiny, change)
    save_file(tensors, tmp_path / "z.safetensors", metadata=meta)
    with pytest.raises(ValueError, match=message) as error:
        load_transformer(tmp_path / "z.safetensors")
    assert "z.safetensors" in str(error.value) and "\n" not in str(error.value)


OTHERS = {
    "a LoRA": {"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 4)},
    "a text encoder": {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)},
    "a VAE": {f"{half}.conv_in.weight": torch.ones(4, 16, 3, 3) for half in ("encoder", "decoder")},
    "Stable Diffusion": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4)},
    "keys such as 'something'": {"something": torch.ones(4)},
    "an SDNQ model": {
        "layers.0.attention.qkv.weight": torch.ones(4, 4),
        "layers.0.attention.qkv.svd_up": torch.ones(4),
    },
    "a quanto INT4 or INT2 model": {"layers.0.attention.to_q.weight._data._data": torch.ones(4, 4, dtype=torch.int8)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_kind_of_file_is_named(tmp_path, what):
    save_file(OTHERS[what], tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match=what):
        model_info(tmp_path / "z.safetensors")


def test_files_that_are_not_whole(tmp_path):
    path = tmp_path / "z.safetensors"
    whole = TINY.read_bytes()
    for content, message in (
        (whole[:-1000], "truncated, expected .* bytes"),
        (whole[:200], "truncated inside its header"),
        (whole + b"x", "too long"),
        (b"", "not a safetensors file"),
        (b"PK\x03\x04" + whole[4:], "pickled PyTorch file"),
        (b"GGUF" + whole[4:], "GGUF"),
        (b"<!DOCTYPE html><html></html>" * 20, "web page"),
        (struct.pack("<Q", 20) + b"{" + b"x" * 100, "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_header(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="expected one .safetensors file or an index, found 0"):
        load_transformer(DATA.parent)
