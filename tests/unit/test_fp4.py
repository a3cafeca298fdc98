"""SVDQuant with FP4 codes: golden vectors packed by deepcompressor and unpacked by Wan2GP, and a whole file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core import load_pipeline
from zimage_core.demo import demo_files, demo_loras
from zimage_core.formats.identify import identify
from zimage_core.formats.load import load_transformer
from zimage_core.linear import layout
from zimage_core.linear.backends import reference, select
from zimage_core.linear.svdq import SVDQLinear, SVDQWeights
from zimage_core.lora.read import load_lora

GOLDEN = sorted((Path(__file__).parent.parent / "data" / "linear_nvfp4").glob("*.safetensors"))
TABLE = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
LEAVES = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "wcscales")
goldens = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@goldens
def test_golden_linears_unpack_exactly(path):
    golden = load_file(path)
    weights = SVDQWeights.from_packed(golden, "packed.")
    codes, scale = golden["logical.code"], golden["logical.scale"]
    assert torch.equal(layout.unpack_nibbles(weights.qweight) & 15, codes & 15)
    assert torch.equal(weights.wscales, scale.view(torch.uint8))
    packed = layout.pack_micro_scales(weights.wscales)
    assert torch.equal(packed.view(torch.uint8), golden["packed.wscales"].view(torch.uint8))
    outer = golden.get("logical.wcscales", golden.get("logical.wtscale")).float()
    assert torch.equal(weights.outer_scale, outer.expand(len(codes)))
    steps = (scale.float() * weights.outer_scale[:, None]).repeat_interleave(16, 1)
    assert torch.equal(weights.residual(), TABLE[(codes & 15).long()] * steps)
    for name in ("smooth", "down", "up"):
        field = {"smooth": "smooth_factor", "down": "proj_down", "up": "proj_up"}[name]
        assert torch.equal(getattr(weights, field), golden[f"logical.{name}"])


@pytest.mark.parametrize("dense", [0, reference.DENSE], ids=["dequantized", "kept dense"])
@goldens
def test_w4a16_equals_the_golden_output(path, dense, monkeypatch):
    monkeypatch.setattr(reference, "DENSE", dense)
    monkeypatch.setattr(reference, "CHUNK", 2**14)  # several chunks of rows
    golden = load_file(path)
    weights = SVDQWeights.from_packed(golden, "packed.")
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):  # bf16: rounding of W, x / s, y
        module = SVDQLinear(weights.in_features, weights.out_features, rank=weights.rank, fp4=True)
        module.load(weights.to(dtype=dtype), select("reference", device="cpu", dtype=dtype, fp4=True))
        assert relative(module(golden["x"].to(dtype)), golden["y_w4a16"]) < limit
        assert torch.equal(module.weights().wscales, weights.wscales)


def test_other_ways_are_refused_with_their_reasons():
    assert select(device="cpu", dtype=torch.bfloat16, fp4=True).precision == "w4a16"
    with pytest.raises(ValueError, match="has no w4a4 for FP4 weights"):
        select("reference", "w4a4", device="cpu", dtype=torch.bfloat16, fp4=True)


def to_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> codes (N, K) int8, e4m3 scales (N, K/16), the scale of all."""
    outer = (weight.abs().max() / (448 * 6)).to(torch.bfloat16)
    groups = weight.view(len(weight), -1, 16)
    scales = (groups.abs().amax(-1) / 6 / outer.float()).clamp(min=2**-9).to(torch.float8_e4m3fn)
    steps = (scales.float() * outer.float()).unsqueeze(-1)
    index = ((groups / steps).abs().unsqueeze(-1) - TABLE[:8]).abs().argmin(-1)
    return (index + 8 * (groups < 0)).view(weight.shape).to(torch.int8), scales, outer


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The bundled model with FP4 codes in the place of INT4, laid out as nunchaku's FP4 files are."""
    packed = load_file(demo_files()["model"])
    with safe_open(demo_files()["model"], "pt") as file:
        metadata = file.metadata()
    metadata["quantization_config"] = metadata["quantization_config"].replace("int4", "fp4_e2m1_all")
    metadata["quantization_config"] = metadata["quantization_config"].replace('"group_size": 64', '"group_size": 16')
    for name in [key.removesuffix("qweight") for key in packed if key.endswith(".qweight")]:
        codes, scales, outer = to_fp4(SVDQWeights.from_packed(packed, name).residual())
        packed[f"{name}qweight"] = layout.pack_qweight(codes)
        packed[f"{name}wscales"] = layout.pack_micro_scales(scales.view(torch.uint8))
        if name.endswith("to_qkv."):
            packed[f"{name}wcscales"] = layout.pack_vector(outer.expand(len(codes)))
        else:
            packed[f"{name}wtscale"] = outer
    path = tmp_path_factory.mktemp("fp4") / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, path, metadata)
    return path


def picture(pipeline) -> np.ndarray:
    found = pipeline("a large red circle", height=128, width=128, generator=7, num_inference_steps=2)
    return np.asarray(found.images[0]).astype(float)


def test_a_whole_file_with_pictures_and_loras(demo):
    assert identify(demo).form.id == "svdq-fp4"
    model = load_transformer(demo)
    assert model.checkpoint.fp4 and model.checkpoint.rank == 16
    parts = {name: path for name, path in demo_files().items() if name != "model"}
    pipeline = load_pipeline(demo, **parts, device="cpu")
    found, plain = picture(pipeline), picture(load_pipeline(device="cpu"))
    assert 10 * np.log10(255**2 / ((found - plain) ** 2).mean()) > 15  # two roundings to four bits
    pipeline.set_loras([(load_lora(demo_loras()["frame"]), 1.0)])
    framed = picture(pipeline)
    assert np.abs(framed - found).mean() > 5
    pipeline.set_loras([])
    assert np.array_equal(picture(pipeline), found)


def test_q_k_v_apart_are_the_same_linear(demo, tmp_path):
    """As Nunchaku Lite has them: their scales cut, the smoothing vector and proj_down in each."""
    tensors = load_file(demo)
    for stem in [key.removesuffix("to_qkv.qweight") for key in tensors if key.endswith("to_qkv.qweight")]:
        whole = {leaf: tensors.pop(f"{stem}to_qkv.{leaf}") for leaf in LEAVES}
        tensors.pop(f"{stem}to_qkv.smooth_factor_orig")
        scales = layout.unpack_micro_scales(whole["wscales"]).chunk(3)
        for i, part in enumerate("qkv"):
            cut = {leaf: whole[leaf].chunk(3)[i].clone() for leaf in ("qweight", "proj_up", "wcscales")}
            cut["wscales"] = layout.pack_micro_scales(scales[i])
            cut |= {leaf: whole[leaf].clone() for leaf in ("smooth_factor", "proj_down")}
            tensors |= {f"{stem}to_{part}.{leaf}": tensor for leaf, tensor in cut.items()}
    save_file(tensors, tmp_path / "apart.safetensors")
    found, expected = (load_transformer(path) for path in (tmp_path / "apart.safetensors", demo))
    for (name, one), (_, other) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wscales": lambda t: t.view(torch.int8)}, "wscales': expected dtype F8_E4M3, found I8"),
        ({"wcscales": lambda t: t[:-1]}, "wcscales': expected shape"),
        ({"wscales": lambda t: t[:-1]}, "wscales': expected shape"),
    ],
)
def test_wrong_scales_are_refused(demo, tmp_path, change, words):
    tensors = load_file(demo)
    for leaf, make in change.items():
        key = f"layers.0.attention.to_qkv.{leaf}"
        tensors[key] = make(tensors[key]).contiguous()
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=words):
        load_transformer(tmp_path / "bad.safetensors")
