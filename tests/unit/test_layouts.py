"""comfy-kitchen's layouts of SVDQuant linears: written by its rules, read, and converted there and back."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core import bench, cli
from zimage_core.demo import demo_files
from zimage_core.formats.identify import identify
from zimage_core.formats.layouts import to_kitchen
from zimage_core.formats.load import check_transformer, load_transformer
from zimage_core.formats.safetensors import read_header
from zimage_core.linear import layout
from zimage_core.linear.svdq import SVDQWeights
from zimage_core.models.config import ZImageConfig
from zimage_core.quantize.convert import convert
from zimage_core.quantize.writer import diffusers_config

DEMO = demo_files()["model"]
GOLDEN = sorted((Path(__file__).parent.parent / "data" / "linear").glob("*.safetensors"))
QKV = "layers.0.attention.to_qkv"


def tensors_and_metadata(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("to", ["kitchen", "kitchen-tiles"])
def test_there_and_back_is_the_same_file(to, tmp_path):
    there, back, twice = (tmp_path / f"{name}.safetensors" for name in ("there", "back", "twice"))
    assert cli.main(["convert", str(DEMO), str(there), "--to", to]) == 0
    convert(there, back, "nunchaku")
    (found, metadata), (expected, given) = tensors_and_metadata(back), tensors_and_metadata(DEMO)
    same(found, expected)
    assert metadata == given
    assert back.read_bytes()[-(2**20) :] == DEMO.read_bytes()[-(2**20) :]
    convert(there, twice, to)
    same(*(tensors_and_metadata(path)[0] for path in (twice, there)))


@pytest.mark.parametrize("to", ["kitchen", "kitchen-tiles"])
def test_a_file_in_the_other_layout_is_the_same_model(to, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    convert(DEMO, path, to)
    assert identify(path).form.id == "comfy-svdq"
    assert cli.main(["inspect", str(path)]) == 0
    assert "ComfyUI SVDQuant W4A4" in capsys.readouterr().out
    found, expected = load_transformer(path), load_transformer(DEMO)
    assert found.checkpoint.rank == expected.checkpoint.rank
    same(dict(found.named_buffers()), dict(expected.named_buffers()))
    same(dict(found.named_parameters()), dict(expected.named_parameters()))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_is_written_is_what_comfy_kitchen_multiplies(path):
    """Its own eager functions read both layouts; limits as for the kitchen backend."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.svdquant")
    tensors = load_file(path)
    if tensors["x"].dtype == torch.float16:
        pytest.skip("comfy-kitchen's eager form takes bf16")
    weights = SVDQWeights.from_packed(tensors, "packed.")
    for tiles in (False, True):
        made = to_kitchen(weights, tiles)
        codes, scales, rank = kitchen.quantize_svdquant_w4a4(
            tensors["x"], made["smooth_factor"], made["proj_down"].contiguous()
        )
        y = kitchen.scaled_mm_svdquant_w4a4(
            codes, made["weight"], scales, made["weight_scale"], rank, made["proj_up"], made.get("bias")
        )[: len(tensors["x"])]
        exact = tensors["y_w4a4"].double()
        assert (y.double() - exact).norm() / exact.norm() < 2e-2


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """nunchaku's linears cut into q, k, v and w1, w3, as Nunchaku Lite has them under diffusers' names."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(".smooth_factor_orig")}
    for key in [name for name in found if name.endswith((".to_qkv.qweight", ".net.0.proj.qweight"))]:
        stem = key.removesuffix("qweight")
        names = [f"to_{p}." for p in "qkv"] if "to_qkv" in stem else ["w3.", "w1."]
        whole = {
            leaf: found.pop(f"{stem}{leaf}") for leaf in ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
        }
        cuts = {leaf: whole[leaf].chunk(len(names)) for leaf in ("qweight", "proj_up")}
        scales = layout.unpack_wscales(whole["wscales"]).chunk(len(names))
        for i, name in enumerate(names):
            base = stem.replace("to_qkv.", name).replace("net.0.proj.", name)
            part = {leaf: pieces[i] for leaf, pieces in cuts.items()} | {"wscales": layout.pack_wscales(scales[i])}
            part |= {leaf: whole[leaf].clone() for leaf in ("smooth_factor", "proj_down")}
            found |= {f"{base}{leaf}": tensor.contiguous() for leaf, tensor in part.items()}
    return {name.replace("feed_forward.net.2", "feed_forward.w2"): tensor for name, tensor in found.items()}


def lite_folder(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    described = {"quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "int4", "group_size": 64, "rank": 16}}
    config = json.loads(metadata["config"]) | {"quantization_config": described}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_inspect_reads_how_a_linear_is_stored(tiny_files, tmp_path, capsys):
    """Another format or layout in a linear's own description: inspect does not say that it runs here."""
    convert(tiny_files["model"], tmp_path / "k.safetensors", "kitchen")
    tensors = load_file(tmp_path / "k.safetensors")
    key = next(name for name in tensors if name.endswith(".comfy_quant"))
    said = json.loads(bytes(tensors[key].tolist()))
    for change in ({"format": "svdquant_w4a8"}, {"act_unsigned": True}, {"layout": "columns"}):
        text = json.dumps(said | change).encode()
        tensors[key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        save_file(tensors, tmp_path / "x.safetensors", read_header(tmp_path / "k.safetensors").metadata)
        assert cli.main(["inspect", str(tmp_path / "x.safetensors")]) == 2
        found = capsys.readouterr()
        assert "runs here" not in found.out and key in found.err


def test_a_nunchaku_lite_folder_is_the_same_model(tmp_path):
    tensors, metadata = tensors_and_metadata(DEMO)
    lite = lite_folder(tmp_path / "lite", apart(tensors), metadata)
    found, expected = load_transformer(lite), load_transformer(DEMO)
    same(dict(found.named_buffers()), dict(expected.named_buffers()))
    convert(lite, tmp_path / "back.safetensors", "nunchaku")
    same(load_file(tmp_path / "back.safetensors"), tensors)


def change_json(**more: object):
    def change(tensors):
        key = "layers.0.attention.qkv.comfy_quant"
        described = json.loads(bytes(tensors[key].tolist())) | more
        tensors[key] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)

    return change


def put(key: str, make):
    def change(tensors):
        tensors[key] = make(tensors.get(key)).contiguous()

    return change


BAD = {
    "unsigned": (change_json(act_unsigned=True), "expected signed activations"),
    "layout": (change_json(layout="new"), "expected signed activations, natural or in kitchen_tile_packed_w4a4"),
    "format": (change_json(format="int8_tensorwise"), "expected the format svdquant_w4a4 beside proj_down"),
    "json": (put("layers.0.attention.qkv.comfy_quant", lambda t: t[:-4]), "expected the format svdquant_w4a4"),
    "scale": (put("layers.0.attention.out.weight_scale", lambda t: t[:-1]), r"weight_scale: expected shape"),
    "codes": (put("layers.0.attention.out.weight", lambda t: t.float()), r"weight: expected codes in bytes, found F32"),
    "no scale": (lambda t: t.pop("layers.1.attention.qkv.weight_scale"), "weight_scale: expected a tensor of shape"),
    "other smooth": (put("layers.0.feed_forward.w1.smooth_factor", lambda t: t * 2), "expected the smooth_factor of"),
    "other branch": (put("layers.0.feed_forward.w1.proj_down", lambda t: -t), "expected the proj_down of the linears"),
    "part missing": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith("layers.0.feed_forward.w1.")],
        "in each of w3",
    ),
    "fp8 beside": (
        put("layers.0.adaLN_modulation.0.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "expected dtype BF16, F16 or F32, found F8_E4M3",
    ),
    "awq beside": (put("layers.0.adaLN_modulation.0.weight_zero", lambda t: torch.zeros(2)), "with AWQ W4A16 model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case, tmp_path):
    path, (change, words) = tmp_path / "model.safetensors", BAD[case]
    convert(DEMO, path, "kitchen")
    tensors, metadata = tensors_and_metadata(path)
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=words):
        load_transformer(path)


def test_a_branch_behind_the_smoothing_is_read_but_not_converted(tmp_path):
    path = tmp_path / "model.safetensors"
    convert(DEMO, path, "kitchen")
    tensors, metadata = tensors_and_metadata(path)
    change_json(lowrank_branch_input_basis="post_smoothing", proj_down_smooth_folded=False)(tensors)
    down, smooth = (tensors[f"layers.0.attention.qkv.{leaf}"] for leaf in ("proj_down", "smooth_factor"))
    tensors["layers.0.attention.qkv.proj_down"] = (down.float() * smooth.float()[:, None]).to(down.dtype)
    save_file(tensors, path, metadata)
    found, expected = (load_transformer(p, dtype=torch.float32).get_submodule(QKV).dense_weight() for p in (path, DEMO))
    assert (found - expected).norm() < 2e-3 * expected.norm()  # proj_down was rounded to bf16
    with pytest.raises(ValueError, match="found one that takes it smoothed"):
        convert(path, tmp_path / "other.safetensors", "nunchaku")


def test_what_is_no_int4_file_is_refused(tmp_path):
    bf16 = Path(__file__).parents[2] / "demo_training" / "z-image-demo-bf16.safetensors"
    for src, dst, words in (
        (bf16, "a.safetensors", "expected SVDQuant INT4, found dense"),
        (DEMO, "no/a.safetensors", "no such folder"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(src, tmp_path / dst, "kitchen")
    with pytest.raises(ValueError, match="layout: expected one of nunchaku"):
        convert(DEMO, tmp_path / "a.safetensors", "rows")


def test_the_header_alone_says_what_it_is(tmp_path):
    path = tmp_path / "model.safetensors"
    convert(DEMO, path, "kitchen-tiles")
    assert check_transformer(path).format == "svdq-int4"


WIDE = ZImageConfig(1536, 3, 1, 12, cap_feat_dim=64)


def fp8_of(path: Path) -> None:
    """The dense model in FP8 with scales, 130 MB."""
    tensors = {}
    for key, (_, shape) in make_synthetic().dense_header(WIDE).items():
        linear = len(shape) == 2 and ("attention." in key or "feed_forward." in key)
        tensors[key] = torch.randn(shape).to(torch.float8_e4m3fn if linear else torch.bfloat16)
        if linear:
            tensors[key.replace(".weight", ".weight_scale")] = torch.ones(())
    save_file(tensors, path, {"config": json.dumps(diffusers_config(WIDE))})


def make_synthetic():
    path = Path(__file__).parents[2] / "benchmarks" / "make_synthetic.py"
    spec = importlib.util.spec_from_file_location("make_synthetic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's own memory")
@pytest.mark.parametrize("form", ["fp8", "int4", "kitchen-tiles", "dense"])
def test_loading_never_holds_a_second_copy(form, tmp_path):
    """Of 130 to 270 MB: at most two linears of 24 MB more than the model, in bytes that are no mapped file's."""
    path = tmp_path / "model.safetensors"
    if form == "fp8":
        fp8_of(path)
    else:
        make_synthetic().write_synthetic(path, WIDE, None if form == "dense" else 16)
    if form == "kitchen-tiles":
        convert(path, tmp_path / "tiles.safetensors", form)
        path = tmp_path / "tiles.safetensors"
    with bench.host_memory() as host:
        model = load_transformer(path, backend="reference")
        held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / bench.GIB
    assert host["peak_gib"] < held + 0.09
