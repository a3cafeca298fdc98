"""Qwen3-4B at its real size: sparse files with the real names and shapes of every stored form, and no data.

Names and shapes are transformers' own; of each file the header is checked, and the model is built on the meta device.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zimage_core.formats.encoder import check_text_encoder, load_text_encoder
from zimage_core.formats.stored import HostEmbedding, StoredLinear
from zimage_core.memory.placement import weights
from zimage_core.memory.stages import encoding_bytes
from zimage_core.models.text_encoder import TextEncoderConfig

transformers = pytest.importorskip("transformers")

CONFIG = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
FP8_LAYERS = range(6, 30)  # of the mixed file: as many as make it 5.6 GB
ITEM = {"BF16": 2, "F32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
ONE, ONE_BF16 = struct.pack("<f", 1.0), b"\x80\x3f"  # scales; where they are 0 a load reads the codes to compare
Entries = dict[str, tuple[str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = transformers.Qwen3Model(transformers.Qwen3Config(**CONFIG))
    return {f"model.{name}": tuple(t.shape) for name, t in model.state_dict().items()}


def write_sparse(path: Path, entries: Entries, metadata: Mapping[str, str], content: Mapping[str, bytes]) -> None:
    """A safetensors file of zeros, which take no room on the disk, but for the tensors in content."""
    header, end = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + ITEM[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, data in content.items():
            file.seek(8 + len(raw) + header[name]["data_offsets"][0])
            file.write(data)
        file.truncate(8 + len(raw) + end)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def bf16(folder: Path, shapes) -> Path:
    write_sparse(folder / "qwen_3_4b.safetensors", {n: ("BF16", s) for n, s in shapes.items()}, {}, {})
    return folder / "qwen_3_4b.safetensors"


def folder_of_shards(folder: Path, shapes) -> Path:
    """As on the hub: three shards, their index, config.json."""
    names, weight_map = list(shapes), {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        part = names[i * len(names) // 3 : (i + 1) * len(names) // 3]
        write_sparse(folder / file, {name: ("BF16", shapes[name]) for name in part}, {"format": "pt"}, {})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = CONFIG | {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8_scaled(folder: Path, shapes) -> Path:
    entries, content = {"scaled_fp8": ("F8_E4M3", (2,))}, {}
    for name, shape in shapes.items():
        entries[name] = ("F8_E4M3" if is_linear(name) else "BF16", shape)
        if is_linear(name):
            stem = name.removesuffix("weight")
            entries |= {f"{stem}scale_weight": ("F32", ()), f"{stem}scale_input": ("F32", ())}
            content[f"{stem}scale_weight"] = ONE
    write_sparse(folder / "qwen_3_4b_fp8_scaled.safetensors", entries, {}, content)
    return folder / "qwen_3_4b_fp8_scaled.safetensors"


def fp8_mixed(folder: Path, shapes) -> Path:
    entries, content = {}, {}
    quant = json.dumps({"format": "float8_e4m3fn"}).encode()
    for name, shape in shapes.items():
        small = is_linear(name) and int(name.split(".")[2]) in FP8_LAYERS
        entries[name] = ("F8_E4M3" if small else "BF16", shape)
        if small:
            stem = name.removesuffix("weight")
            entries |= {f"{stem}weight_scale": ("F32", ()), f"{stem}comfy_quant": ("U8", (len(quant),))}
            content |= {f"{stem}weight_scale": ONE, f"{stem}comfy_quant": quant}
    write_sparse(folder / "qwen_3_4b_fp8_mixed.safetensors", entries, {}, content)
    return folder / "qwen_3_4b_fp8_mixed.safetensors"


def nvfp4(folder: Path, shapes) -> Path:
    entries, content = {}, {}
    quant = json.dumps({"format": "nvfp4"}).encode()
    for name, shape in shapes.items():
        if not is_linear(name):
            entries[name] = ("BF16", shape)
            continue
        stem, (n, k) = name.removesuffix("weight"), shape
        entries |= {name: ("U8", (n, k // 2)), f"{stem}weight_scale": ("F8_E4M3", (n, k // 16))}
        entries |= {f"{stem}weight_scale_2": ("F32", ()), f"{stem}input_scale": ("F32", ())}
        entries[f"{stem}comfy_quant"] = ("U8", (len(quant),))
        content |= {f"{stem}weight_scale_2": ONE, f"{stem}comfy_quant": quant}
    write_sparse(folder / "qwen_3_4b_nvfp4.safetensors", entries, {}, content)
    return folder / "qwen_3_4b_nvfp4.safetensors"


def quanto(folder: Path, shapes) -> Path:
    entries, kinds, content = {}, {}, {}
    for name, shape in shapes.items():
        if not is_linear(name):
            entries[name] = ("BF16", shape)
            continue
        stem = name.removesuffix("weight")
        entries |= {f"{name}._data": ("I8", shape), f"{name}._scale": ("BF16", (shape[0], 1))}
        content[f"{name}._scale"] = ONE_BF16 * shape[0]
        entries |= {f"{stem}{scalar}": ("BF16", ()) for scalar in ("input_scale", "output_scale")}
        kinds[stem.removesuffix(".")] = {"weights": "qint8", "activations": "none"}
    described = {"quantization_map_base64": kinds, "config_base64": CONFIG | {"model_type": "qwen3"}}
    metadata = {name: base64.b64encode(json.dumps(data).encode()).decode() for name, data in described.items()}
    path = folder / "qwen3_quanto_bf16_int8.safetensors"
    write_sparse(path, entries, {"format": "pt", "quantization_format": "quanto", **metadata}, content)
    return path


def gguf_file(kind: Callable[[str], str]) -> Callable[[Path, Mapping[str, tuple[int, ...]]], Path]:
    def write(folder: Path, shapes) -> Path:
        gguf = pytest.importorskip("gguf")
        import numpy

        path = folder / "Qwen3-4B.gguf"
        writer = gguf.GGUFWriter(path, "qwen3")
        for field, value in (("block_count", 36), ("embedding_length", 2560), ("feed_forward_length", 9728)):
            writer.add_uint32(f"qwen3.{field}", value)
        for field, value in (("head_count", 32), ("head_count_kv", 8), ("key_length", 128), ("value_length", 128)):
            writer.add_uint32(f"qwen3.attention.{field}", value)
        writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", 1e-6)
        writer.add_float32("qwen3.rope.freq_base", 1e6)
        writer.add_token_list([f"t{i}" for i in range(1000)])
        names, end = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 36), 0
        for name, shape in shapes.items():
            stem = names.get_name(name.removesuffix(".weight"))
            form = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else kind(stem)]
            block, size = gguf.GGML_QUANT_SIZES[form]
            row = shape[-1] // block * size
            count = math.prod(shape[:-1]) * row
            stored = (*shape[:-1], row)
            writer.add_tensor_info(f"{stem}.weight", stored, numpy.dtype(numpy.uint8), count, raw_dtype=form)
            end += -(-count // 32) * 32
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with path.open("r+b") as file:
            start = file.seek(0, 2)
            file.truncate(-(-start // 32) * 32 + end)
        return path

    return write


def q4_k_m(stem: str) -> str:
    return "Q6_K" if stem == "token_embd" or stem.endswith(("attn_v", "ffn_down")) else "Q4_K"


@pytest.mark.parametrize(
    ("write", "gigabytes", "expected"),
    [
        (bf16, 8.04, {"float"}),
        (folder_of_shards, 8.04, {"float"}),
        (fp8_scaled, 4.41, {"float8_e4m3fn"}),
        (fp8_mixed, 5.6, {"float", "float8_e4m3fn"}),
        (nvfp4, 2.82, {"nvfp4"}),
        (quanto, 4.41, {"int8"}),
        (gguf_file(lambda stem: "Q8_0"), 4.28, {"Q8_0"}),
        (gguf_file(lambda stem: "Q6_K"), 3.3, {"Q6_K"}),
        (gguf_file(q4_k_m), 2.6, {"Q4_K", "Q6_K"}),
        (gguf_file(lambda stem: "Q4_0"), 2.26, {"Q4_0"}),
        (gguf_file(lambda stem: "Q3_K"), 1.73, {"Q3_K"}),
        (gguf_file(lambda stem: "BF16"), 8.05, {"float"}),
    ],
    ids=[
        *("bf16", "shards", "fp8 scaled", "fp8 mixed", "nvfp4", "quanto"),
        *("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q3_K", "gguf bf16"),
    ],
)
def test_a_full_size_file_is_recognised_and_built(tmp_path, shapes, write, gigabytes, expected):
    path = write(tmp_path, shapes)
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
    assert sum(file.stat().st_size for file in files) / 1e9 == pytest.approx(gigabytes, rel=0.02)
    config, stored = check_text_encoder(path)
    assert replace(config, rms_norm_eps=1e-6) == TextEncoderConfig() and config.rms_norm_eps == pytest.approx(1e-6)
    assert {f"model.{name}" for name in stored} == set(shapes)
    assert {stored[name.removeprefix("model.")].form for name in shapes if is_linear(name)} == expected
    if write in (bf16, folder_of_shards):  # which take longest to map, and are loaded in every other test
        return

    encoder = load_text_encoder(path, device="meta")
    assert isinstance(encoder.embed_tokens, HostEmbedding) and len(encoder.layers) == 35
    assert any(isinstance(m, StoredLinear) for m in encoder.modules()) == (expected != {"float"})
    # A layer in 16 bits has 202 MB; the small forms hold less, beside a weight that is dequantized while it is used.
    held = weights(encoder.layers, encoder.layers)
    assert max(held.blocks) <= 203e6 and held.total < gigabytes * 1e9
    dequantized = 2 * 9728 * 2560 if expected != {"float"} else 0
    assert dequantized < encoding_bytes(encoder, 100) < 3 * 2 * 9728 * 2560
