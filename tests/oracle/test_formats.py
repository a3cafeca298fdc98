"""Every form that a transformer is stored in: files with full names in the demo's size, against what each writer means.

comfy-kitchen, optimum-quanto and gguf write their own forms and dequantize them; FP8 is written by its rules. Of each
file: the weights in memory equal what the writer dequantizes, it stays small, and pictures, LoRAs, budgets and
`zimage quantize` work.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ggml
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core import cli, load_pipeline, tune
from zimage_core.batch.work import pinned
from zimage_core.demo import demo_files, demo_loras
from zimage_core.formats.gguf import QUANTIZED
from zimage_core.formats.identify import identify
from zimage_core.formats.load import load_transformer, open_transformer
from zimage_core.formats.names import FUSED_PARTS, canonical_tensor
from zimage_core.formats.stored import StoredLinear
from zimage_core.linear import backends
from zimage_core.lora.read import load_lora
from zimage_core.memory.meta import LiveBytes, on_meta, peak_bytes
from zimage_core.memory.offload import BlockStreamer
from zimage_core.memory.placement import module_bytes
from zimage_core.memory.placement import weights as weights_of
from zimage_core.models.transformer import Hooks
from zimage_core.quantize.run import quantize_checkpoint
from zimage_core.quantize.source import DenseSource

BF16 = Path(__file__).parents[2] / "demo_training" / "z-image-demo-bf16.safetensors"
PARTS = {name: path for name, path in demo_files().items() if name != "model"}
PROMPT = "a large red circle in the top left corner on a blue background"

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def diffusers() -> Weights:
    """The demo's BF16 tensors under the official names, q, k and v apart."""
    return load_file(BF16)


@pytest.fixture(scope="module")
def comfy(diffusers) -> Weights:
    """The same under ComfyUI's names, q, k and v in one."""
    found = {}
    for key, tensor in diffusers.items():
        name = key.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        name = name.replace("norm_q", "q_norm").replace("norm_k", "k_norm").replace("to_out.0", "out")
        if name.endswith("to_q.weight"):
            stem = key.removesuffix("to_q.weight")
            found[f"{stem}qkv.weight"] = torch.cat([diffusers[f"{stem}to_{part}.weight"] for part in "qkv"])
        elif not name.endswith(("to_k.weight", "to_v.weight")):
            found[name] = tensor
    return found


def linears(weights: Weights) -> list[str]:
    """The blocks' attention and feed-forward linears, without `.weight`."""
    return [
        n.removesuffix(".weight") for n, t in weights.items() if t.ndim == 2 and (".attention." in n or ".feed_" in n)
    ]


def described(form: str, **more: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": form, **more}).encode()), dtype=torch.uint8)


def save(tensors: Weights, path: Path, prefix: str = "", **metadata: str) -> None:
    with_config = {"config": config()} | metadata
    save_file({prefix + name: t.contiguous() for name, t in tensors.items()}, path, metadata=with_config)


def config() -> str:
    from zimage_core.formats.safetensors import read_header

    return read_header(BF16).metadata["config"]


def to_fp8(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.float().abs().max() / torch.finfo(dtype).max
    return (weight.float() / scale).to(dtype), scale


# ---------------------------------------------------------------- writers: (path, weights) -> the weights they mean


def fp8_plain(path: Path, weights: Weights, dtype: torch.dtype = torch.float8_e4m3fn) -> Weights:
    """Everything cast to FP8, norms and biases too, as many published files are."""
    found = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save(found, path)
    return found


def fp8_scaled(path: Path, weights: Weights, dtype: torch.dtype = torch.float8_e4m3fn) -> Weights:
    """The older naming, in front of it ComfyUI's prefix of whole checkpoints."""
    stored, meant = dict(weights), dict(weights)
    for layer in linears(weights):
        codes, scale = to_fp8(weights[f"{layer}.weight"], dtype)
        stored |= {f"{layer}.weight": codes, f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}
        meant[f"{layer}.weight"] = codes.float() * scale
    save(stored | {"scaled_fp8": torch.empty(2, dtype=dtype)}, path, "model.diffusion_model.")
    return meant


def fp8_mixed(path: Path, weights: Weights, where: str = "tensors") -> Weights:
    """Every other layer, described by .comfy_quant or in the metadata."""
    stored, meant, layers = dict(weights), dict(weights), {}
    for layer in linears(weights)[::2]:
        codes, scale = to_fp8(weights[f"{layer}.weight"], torch.float8_e4m3fn)
        stored |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
        layers[layer] = {"format": "float8_e4m3fn"}
        meant[f"{layer}.weight"] = codes.float() * scale
        if where == "tensors":
            stored[f"{layer}.comfy_quant"] = described("float8_e4m3fn")
    more = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save(stored, path, **(more if where == "metadata" else {}))
    return meant


def quanto(path: Path, weights: Weights, kind: str = "qint8") -> Weights:
    """By optimum-quanto, as diffusers and Wan2GP save: q, k, v and w1, w3 apart, mmgp's map of the linears.

    It dequantizes in the scales' dtype; the weights meant are what it gives where those are fp32 before.
    """
    package = pytest.importorskip("optimum.quanto")
    model, names = torch.nn.ModuleDict(), linears(weights)
    for i, layer in enumerate(names):
        weight = weights[f"{layer}.weight"]
        model[str(i)] = torch.nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
        model[str(i)].weight.data = weight
    package.quantize(model, weights=getattr(package, kind))
    package.freeze(model)
    stored = {name: tensor for name, tensor in weights.items() if name.removesuffix(".weight") not in names}
    meant = dict(weights)
    for key, tensor in model.state_dict().items():
        index, _, leaf = key.partition(".")
        stored[f"{names[int(index)]}.{leaf}"] = tensor
    for layer, module in zip(names, model.values()):
        found = module.weight
        exact = package.WeightQBytesTensor(
            found.qtype, found.axis, found.size(), found.stride(), found._data, found._scale.float(), None
        )
        meant[f"{layer}.weight"] = exact.dequantize()
        assert torch.equal(found.dequantize(), meant[f"{layer}.weight"].to(torch.bfloat16))
    kinds = {names[int(index)]: said for index, said in package.quantization_map(model).items()}
    encoded = base64.b64encode(json.dumps(kinds).encode()).decode()
    save(stored, path, quantization_format="quanto", quantization_map_base64=encoded)
    return meant


def by_kitchen(quantize: Callable[[torch.Tensor], tuple[Weights, dict, torch.Tensor]], prefix: str = ""):
    """A writer that quantizes each linear with comfy-kitchen: weight -> tensors by suffix, description, dequantized."""

    def write(path: Path, weights: Weights) -> Weights:
        pytest.importorskip("comfy_kitchen")
        stored, meant = dict(weights), dict(weights)
        for layer in linears(weights):
            parts, says, value = quantize(weights[f"{layer}.weight"].float())
            stored |= {f"{layer}.{suffix}": tensor for suffix, tensor in parts.items()}
            stored[f"{layer}.comfy_quant"] = described(**says)
            meant[f"{layer}.weight"] = value
        save(stored, path, prefix)
        return meant

    return write


def nvfp4(weight: torch.Tensor):
    import comfy_kitchen as kitchen

    scale = weight.abs().max() / (448 * 6)
    codes, blocks = kitchen.quantize_nvfp4(weight, scale)
    value = kitchen.dequantize_nvfp4(codes, scale, blocks, torch.float32)
    return {"weight": codes, "weight_scale": blocks, "weight_scale_2": scale}, {"form": "nvfp4"}, value


def mxfp8(weight: torch.Tensor):
    import comfy_kitchen as kitchen

    codes, blocks = kitchen.quantize_mxfp8(weight)
    value = kitchen.dequantize_mxfp8(codes, blocks, torch.float32)
    return {"weight": codes, "weight_scale": blocks.view(torch.uint8)}, {"form": "mxfp8"}, value


def int8(weight: torch.Tensor, per_channel: bool = False, **rotation: object):
    from comfy_kitchen.tensor import TensorWiseINT8Layout as Layout

    options = {"per_channel": per_channel, "convrot": bool(rotation), **({"convrot_groupsize": 64} if rotation else {})}
    codes, params = Layout.quantize(weight, **options)
    value = Layout.dequantize(codes, params)
    return {"weight": codes, "weight_scale": params.scale}, {"form": "int8_tensorwise", **rotation}, value


def convrot_w4a4(weight: torch.Tensor):
    import comfy_kitchen as kitchen

    codes, scale = kitchen.quantize_convrot_w4a4_weight(weight, 64)
    value = kitchen.dequantize_convrot_w4a4_weight(codes, scale, 64)
    return {"weight": codes, "weight_scale": scale}, {"form": "convrot_w4a4", "convrot_groupsize": 64}, value


def w4a8(weight: torch.Tensor, bits: int = 4):
    import comfy_kitchen as kitchen

    codes, rel, channel, _, book = kitchen.quantize_w4a8_int8_weight(weight, 16, 64, bits=bits)
    value = kitchen.dequantize_w4a8_int8_weight(codes, rel, channel, book, None, 16, 64, torch.float32)
    parts = {"weight": codes, "weight_s_rel": rel, "weight_s_channel": channel}
    says = {"form": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}
    return parts | ({} if book is None else {"weight_codebook": book}), says, value


def gguf(kinds: str, prefix: str = "", everything: bool = False, reshaped: bool = False):
    """A writer of GGUF files as ComfyUI-GGUF's converter has them, or sd.cpp's with a prefix and more quantized.

    kinds: the types that the blocks' w2 have in turn, other linears the first of them; rows that a type's blocks do not
    fit are Q8_0, 1-D tensors F32, embedders and refiners F16 unless `everything`.
    """

    def form(name: str, tensor: torch.Tensor, kind: str) -> str:
        if tensor.ndim == 1 or tensor.numel() <= 1024:
            return "F32"
        if not everything and ("layers." not in name or "adaLN" in name):
            return "F16"
        return next(k for k in (kind, "Q8_0") if tensor.shape[1] % QUANTIZED.get(k, (1,))[0] == 0)

    def write(path: Path, weights: Weights) -> Weights:
        package = pytest.importorskip("gguf")
        writer, meant, turn = package.GGUFWriter(path, "lumina2"), {}, itertools.cycle(kinds.split())
        for name, tensor in weights.items():
            values, kind = (
                tensor.float(),
                form(name, tensor, next(turn) if name.endswith("w2.weight") else kinds.split()[0]),
            )
            if kind == "Q8_0" and reshaped:
                values = values.view(-1, 32)
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            which = package.GGMLQuantizationType[kind]
            data = ggml.quantize(values, kind)
            writer.add_tensor(prefix + name, data, raw_dtype=which)
            meant[name] = torch.from_numpy(package.quants.dequantize(data, which).copy()).view(tensor.shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return meant

    return write


@dataclass(frozen=True)
class Case:
    """write: of the files; names: of its tensors; form: what `identify` says; decibels: least PSNR to BF16's picture.

    bits of a weight in the blocks, beside the scales of rows: at most this is in memory.
    """

    write: Callable[[Path, Weights], Weights]
    names: str
    form: str
    bits: float
    decibels: float
    suffix: str = ".safetensors"


CASES = {
    "fp8": Case(fp8_plain, "comfy", "fp8", 8, 20),
    "fp8-e5m2": Case(lambda p, w: fp8_plain(p, w, torch.float8_e5m2), "diffusers", "fp8", 8, 15),
    "fp8-scaled": Case(fp8_scaled, "comfy", "fp8", 8, 25),
    "fp8-scaled-apart": Case(fp8_scaled, "diffusers", "fp8", 8, 25),
    "fp8-mixed": Case(fp8_mixed, "comfy", "fp8", 13, 25),
    "fp8-metadata": Case(lambda p, w: fp8_mixed(p, w, "metadata"), "diffusers", "fp8", 13, 25),
    "quanto-float8": Case(lambda p, w: quanto(p, w, "qfloat8"), "diffusers", "quanto-int8", 8, 25),
    "quanto-int8": Case(quanto, "diffusers", "quanto-int8", 8, 30),
    "nvfp4": Case(by_kitchen(nvfp4), "comfy", "nvfp4", 4.5, 12),
    "mxfp8": Case(by_kitchen(mxfp8), "comfy", "fp8", 8.25, 20),
    "int8": Case(by_kitchen(int8), "comfy", "int8", 8, 25),
    "int8-rows": Case(by_kitchen(lambda w: int8(w, True), "transformer."), "diffusers", "int8", 8, 30),
    "int8-convrot": Case(
        by_kitchen(lambda w: int8(w, True, convrot=True, convrot_groupsize=64)), "comfy", "int8", 8, 30
    ),
    "convrot-w4a4": Case(by_kitchen(convrot_w4a4, "model.diffusion_model."), "comfy", "convrot-w4a4", 4, 10),
    "w4a8": Case(by_kitchen(w4a8), "comfy", "comfy-w4a8", 5.5, 10),
    "w6a8": Case(by_kitchen(lambda w: w4a8(w, 6)), "comfy", "comfy-w4a8", 7, 18),
    "gguf-q8_0": Case(gguf("Q8_0"), "comfy", "gguf", 9, 30, ".gguf"),
    "gguf-q8_0-sdcpp": Case(gguf("Q8_0", "model.diffusion_model.", True), "comfy", "gguf", 8.5, 30, ".gguf"),
    "gguf-q8_0-reshaped": Case(gguf("Q8_0", reshaped=True), "comfy", "gguf", 9, 30, ".gguf"),
    "gguf-legacy": Case(gguf("Q5_1 Q5_0 Q4_1 Q4_0"), "comfy", "gguf", 7, 15, ".gguf"),
    "gguf-k": Case(gguf("Q4_K Q2_K Q3_K Q5_K Q6_K"), "comfy", "gguf", 7.9, 15, ".gguf"),
    "gguf-q4_0": Case(gguf("Q4_0", everything=True), "diffusers", "gguf", 4.5, 10, ".gguf"),
    "gguf-bf16": Case(gguf("BF16"), "comfy", "dense", 16, 50, ".gguf"),
}


@pytest.fixture(scope="module")
def written(request, tmp_path_factory) -> tuple[Path, Weights, Case]:
    """One case's file and the weights it means."""
    case = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param) / f"model{case.suffix}"
    return path, case.write(path, request.getfixturevalue(case.names)), case


every = pytest.mark.parametrize("written", CASES, indirect=True)
one_of_each = pytest.mark.parametrize("written", {c.form: name for name, c in CASES.items()}.values(), indirect=True)


def by_the_models_names(weights: Weights) -> Weights:
    """In fp32, the parts of fused linears one below the other."""
    parts: dict[str, dict[str | None, torch.Tensor]] = {}
    for key, tensor in weights.items():
        target, part = canonical_tensor(key)
        parts.setdefault(target, {})[part] = tensor.float()
    found = {}
    for target, own in parts.items():
        order = next((p for module, p in FUSED_PARTS.items() if target.endswith(f"{module}.weight")), ())
        found[target] = own[None] if None in own else torch.cat([own[part] for part in order])
    return found


@every
def test_weights_equal_the_writers_own_and_stay_small(written):
    path, meant, case = written
    assert identify(path).role == "model" and identify(path).form.id == case.form
    model, known = load_transformer(path, dtype=torch.float32), by_the_models_names(meant)
    for name, module in model.named_modules():
        if isinstance(module, StoredLinear):
            assert torch.equal(module.dense_weight(), known.pop(f"{name}.weight")), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, known.pop(name).view_as(parameter)), name
    assert not known
    small = [module for module in load_transformer(path).layers[0].modules() if isinstance(module, StoredLinear)]
    count, rows = sum(m.shape[0] * m.shape[1] for m in small), sum(m.shape[0] for m in small)
    of_a_row = 4 + 64 * (case.form == "comfy-w4a8")  # its scale, and in one form the codebook
    assert sum(map(module_bytes, small)) <= count * case.bits / 8 + rows * of_a_row


@every
def test_loading_holds_few_bytes_more_than_the_model(written):
    """Counted in what torch allocates on the CPU; mapped files are none of it."""
    path, _, _ = written
    with torch.no_grad(), LiveBytes(torch.device("cpu")) as live:
        model = load_transformer(path)
    weights = [*model.parameters(), *(module for module in model.modules() if isinstance(module, StoredLinear))]
    held, largest = module_bytes(model), max(math.prod(weight.shape) for weight in weights)
    assert live.now == held
    assert live.peak <= held + 10 * largest, "the largest weight in fp32 twice, and in 16 bits"
    assert 10 * largest < 0.7 * held


def open_pipeline(path: Path, budget: str | None = None):
    return load_pipeline(path, **PARTS, device="cpu", vram_budget=budget)


def picture(pipeline) -> np.ndarray:
    found = pipeline(PROMPT, height=128, width=128, generator=7, num_inference_steps=2)
    return np.asarray(found.images[0]).astype(float)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(((one - other) ** 2).mean(), 1e-9))


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return picture(open_pipeline(BF16))


@every
def test_pictures(written, plain):
    path, _, case = written
    assert decibels(picture(open_pipeline(path)), plain) >= case.decibels


@one_of_each
def test_loras(written):
    """Beside linears of each form; how a file names its tensors is nothing to an adapter."""
    path, _, _ = written
    pipeline = open_pipeline(path)
    found = picture(pipeline)
    pipeline.set_loras([(load_lora(demo_loras()["frame"]), 1.0)])
    assert decibels(picture(pipeline), found) < 30  # the LoRA draws a pink frame
    pipeline.set_loras([])
    assert np.array_equal(picture(pipeline), found)


@every
def test_streamed_blocks_generate_the_same(written):
    """Blocks of each form in flat host buffers, copied to slots: the same outputs, bit for bit."""
    path, _, _ = written
    model = load_transformer(path)
    latents, t = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    feats = [torch.randn(12, model.config.cap_feat_dim, generator=torch.Generator().manual_seed(1))]

    def run(hooks: Hooks) -> torch.Tensor:
        with torch.inference_mode():
            return model(latents, t, model.prepare(feats, 64, 64, hooks), hooks)

    expected = run(Hooks())
    streamer = BlockStreamer(model.blocks, model)
    sizes = weights_of(model.blocks, model)
    streamer.place(torch.device("cpu"), sizes.rest + 2 * sizes.slot + sizes.blocks[0])
    assert streamer.host
    assert torch.equal(run(Hooks(run_block=streamer.run_block)), expected)


@every
def test_as_a_source_of_quantizing(written):
    """`zimage quantize` reads the same weights, rounded to bf16, and warns below 8 bits."""
    path, meant, case = written
    with open_transformer(path) as (info, files), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = DenseSource(files, info, (), torch.device("cpu"))
        found = source.get("layers.1.feed_forward.w2.weight")
    assert torch.equal(found.float(), meant["layers.1.feed_forward.w2.weight"].to(torch.bfloat16).float())
    assert any("get rounded twice" in str(w.message) for w in caught) == (case.bits < 8)


KINDS = {
    "fp8-scaled": "float8_e4m3fn",
    "int8-rows": "int8",
    "int8-convrot": "int8_convrot",
    "nvfp4": "",
    "gguf-q4_0": "",
}


@pytest.mark.parametrize("written", KINDS, indirect=True)
def test_products_in_8_bits_are_for_what_is_stored_in_8(written, request, monkeypatch):
    """Refused by name for other forms, and without a GPU that has them; on a GPU see triton_kernels_check.py."""
    path, kind = written[0], KINDS[request.node.callspec.params["written"]]
    words = "needs an NVIDIA or AMD GPU" if kind else r"expected linears in INT8 or FP8 \(e4m3\), found"
    with pytest.raises(ValueError, match=f"{path}: precision w8a8: {words}.*; take auto"):
        load_transformer(path, precision="w8a8")
    for precision in ("auto", "w8a16"):
        backend = load_transformer(path, precision=precision).backend
        assert (backend.name, backend.precision) == ("reference", "w8a16") if kind else backend is None
    monkeypatch.setattr(tune, "product_refusal", lambda *_: None)
    monkeypatch.setattr(tune, "known", lambda *_: None)  # there is nothing to time here
    if kind:
        model = load_transformer(path, precision="w8a8")
        chosen = {name for name, one in model.named_modules() if isinstance(one, StoredLinear) and one.products}
        assert chosen == {name for name in chosen if ".attention." in name or ".feed_forward." in name}
        assert len(chosen) == 4 * len(model.blocks)
        assert model.backend.precision == "w8a8" and model.backend.name in ("kitchen", "triton")


@pytest.mark.parametrize("written", ["int8-rows", "int8-convrot"], indirect=True)
def test_comfy_kitchen_multiplies_int8_as_it_is_stored(written, monkeypatch):
    """By its eager operators: near the dequantized weight's product, from which it differs by x in 127 steps."""
    path, _, _ = written
    monkeypatch.setattr(tune, "product_refusal", lambda *_: None)
    monkeypatch.setattr(tune, "known", lambda *_: None)  # there is nothing to time here
    monkeypatch.setattr(backends.load("triton"), "multiply_8bit", None)
    eight, sixteen = (load_transformer(path, precision=precision) for precision in ("w8a8", "w8a16"))
    name = "layers.1.feed_forward.w2"
    x = torch.randn(2, 9, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found, expected = (model.get_submodule(name)(x).float() for model in (eight, sixteen))
    assert 0 < (found - expected).norm() / expected.norm() < 0.02
    linear, there = on_meta(eight.get_submodule(name)), x.to("meta")
    rows, n = 18, linear.out_features
    assert peak_bytes(lambda _: linear(there)) == rows * 1024 + rows * n * (4 + 2), "codes, int32 products, the result"


@pytest.mark.parametrize("written", ["fp8-scaled"], indirect=True)
def test_pictures_say_how_stored_weights_were_multiplied(written, tmp_path, capsys):
    """So that `--from`, and a batch that another GPU goes on with, multiply them so, too."""
    path, _, _ = written
    parts = [f"--text-encoder={PARTS['text_encoder']}", f"--tokenizer={PARTS['tokenizer']}", f"--vae={PARTS['vae']}"]
    small = ["--width=64", "--height=64", "--steps=1", f"--model={path}", "--device=cpu", *parts]
    assert cli.main(["generate", PROMPT, f"--out={tmp_path / 'a.png'}", "--seed=3", *small]) == 0
    assert cli.main(["generate", "--from", str(tmp_path / "a.png"), f"--out={tmp_path / 'b.png'}"]) == 0
    one, other = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert one.tobytes() == other.tobytes() and json.loads(one.text["zimage"])["precision"] == "w8a16"
    (tmp_path / "rows.txt").write_text(PROMPT)
    assert cli.main(["batch", str(tmp_path / "rows.txt"), f"--out={tmp_path / 'out'}", *small]) == 0
    record = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert pinned(record)["precision"] == "w8a16" and pinned(record)["backend"] == "reference"


@one_of_each
@pytest.mark.filterwarnings("ignore:.*they get rounded twice:UserWarning")
def test_quantizing(written, tmp_path):
    """One of each form; what the quantizer reads of all of them is in the test above."""
    path, _, _ = written
    target = tmp_path / "q.safetensors"
    quantize_checkpoint(path, target, rank=16, skip_refiners=True)
    assert load_transformer(target).checkpoint.format == "svdq-int4"


@one_of_each
def test_comparing_and_planning(written, plain, tmp_path, capsys):
    """`zimage compare` takes it beside BF16; a plan of the whole picture counts its weights as they are stored."""
    path, _, case = written
    parts = [f"--text-encoder={PARTS['text_encoder']}", f"--tokenizer={PARTS['tokenizer']}", f"--vae={PARTS['vae']}"]
    small = ["--width=64", "--height=64", "--steps=1", "--seeds", "7", f"--out={tmp_path / 'x.png'}", "--device=cpu"]
    assert cli.main(["compare", "a red circle", "--models", str(BF16), str(path), *parts, *small]) == 0
    assert re.search(r"PSNR (\d+\.\d\d|inf) dB", capsys.readouterr().out)
    weights = {p: open_pipeline(p).plan([PROMPT], 64, 64).stage("transformer").weights for p in (path, BF16)}
    assert weights[path] <= weights[BF16] * (1 if case.bits < 16 else 1.01)


SCALE = r"\.(weight_scale|scale_weight|weight\._scale|weight_s_rel)$"
W2 = r"layers\.0\.feed_forward\.w2\.weight"
Fault = Callable[[Path, Case], "str | None"]
"""Damages a file; what the sentence then says, as a pattern, or None where a form has no such thing."""


def changed(path: Path, pattern: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> str | None:
    """Change the first tensor of a name, or drop it; its name, or None where there is none."""
    if path.suffix == ".gguf":
        return None
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    key = next(filter(re.compile(pattern).search, tensors), None)
    if key is None:
        return None
    tensor = change(tensors.pop(key))
    if tensor is not None:
        tensors[key] = tensor.contiguous()
    save_file(tensors, path, metadata)
    return re.escape(key)


def entry(path: Path, what: str, values: Callable[..., tuple[int, ...]]) -> str | None:
    """Change the (columns, rows), type or offset of a w2 in a GGUF file's header; the tensor's name."""
    if path.suffix != ".gguf":
        return None
    raw = bytearray(path.read_bytes())
    end = raw.rindex(b"layers.0.feed_forward.w2.weight") + len("layers.0.feed_forward.w2.weight")
    form, start = {"shape": ("<2Q", 4), "type": ("<I", 20), "offset": ("<Q", 24)}[what]
    struct.pack_into(form, raw, end + start, *values(*struct.unpack_from(form, raw, end + start)))
    path.write_bytes(raw)
    return W2


def cut_off(path: Path, case: Case) -> str:
    path.write_bytes(path.read_bytes()[:-1000])
    return "damaged or cut off" if case.suffix == ".gguf" else "truncated"


def cut_off_in_the_header(path: Path, case: Case) -> str:
    path.write_bytes(path.read_bytes()[:200])
    return "damaged or cut off" if case.suffix == ".gguf" else "header"


def scale_of_another_shape(path: Path, case: Case) -> str | None:
    return changed(path, SCALE, lambda t: t.new_ones(3))


def scale_of_another_type(path: Path, case: Case) -> str | None:
    return changed(path, SCALE, lambda t: t.to(torch.int32))


def scale_that_is_no_number(path: Path, case: Case) -> str | None:
    """Of those that are floats of 16 bits or more."""
    with_scales = case.form in ("fp8", "int8", "quanto-int8", "convrot-w4a4") and case.bits != 8.25
    words = r"\.(weight_scale|scale_weight|weight\._scale)$"
    found = changed(path, words, lambda t: torch.full_like(t, torch.nan)) if with_scales else None
    return found and "expected finite numbers"


def scale_of_zero(path: Path, case: Case) -> str | None:
    """Of a whole weight or its rows, where it shows in the codes that the weights were not 0."""
    if case.form == "convrot-w4a4" or case.bits == 8.25:
        return None
    words = r"\.(weight_scale_2|scale_weight|weight\._scale)$" if case.form in ("nvfp4", "quanto-int8") else SCALE[:-1]
    found = changed(path, words + "$", torch.zeros_like) if case.form not in ("comfy-w4a8",) else None
    return found and "expected a scale other than 0 for weights that are not 0, found 0"


def scale_missing(path: Path, case: Case) -> str | None:
    """FP8 without a scale is read as it is."""
    return changed(path, SCALE, lambda t: None) and "expected" if case.form != "fp8" or case.bits == 8.25 else None


def another_sub_format(path: Path, case: Case) -> str | None:
    return changed(path, r"\.comfy_quant$", lambda t: described("int3")) and "expected one of"


def described_as_another(path: Path, case: Case) -> str | None:
    other = "int8_tensorwise" if case.form == "fp8" else "float8_e4m3fn"
    return changed(path, r"\.comfy_quant$", lambda t: described(other)) and "expected"


def described_in_no_json(path: Path, case: Case) -> str | None:
    return changed(path, r"\.comfy_quant$", lambda t: t[:-1]) and "comfy_quant: expected a JSON object"


def rotated_in_odd_groups(path: Path, case: Case) -> str | None:
    rotated = case.form in ("int8", "convrot-w4a4", "comfy-w4a8")
    form = {"convrot-w4a4": "convrot_w4a4", "comfy-w4a8": "asym_w4a8_int8"}.get(case.form, "int8_tensorwise")
    new = described(form, convrot=True, convrot_groupsize=48, group_size=16)
    words = "expected a convrot_groupsize that is a power of 4"
    return changed(path, r"\.comfy_quant$", lambda t: new) and words if rotated else None


def twice_in_two_forms(path: Path, case: Case) -> str | None:
    """The same weight also as another format has it."""
    twin = ".weight" if case.form == "quanto-int8" else ".weight._data"
    key, tensors = "layers.0.feed_forward.w2", {} if case.suffix == ".gguf" else load_file(path)
    name = next((n for n in tensors if re.search(W2, n)), None)
    if name is None:
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stem = name[: name.index(key) + len(key)]
    save_file({**tensors, stem + twin: torch.zeros(4, 4, dtype=torch.int8)}, path, metadata)
    return "expected its weight once beside it, found several forms of it"


def weights_missing(path: Path, case: Case) -> str | None:
    return changed(path, W2 + r"(\._data)?$", lambda t: None) and "expected"


def weights_of_another_shape(path: Path, case: Case) -> str | None:
    return changed(path, W2 + r"(\._data)?$", lambda t: t[:-8]) and "expected|truncated"


def rows_and_columns_exchanged(path: Path, case: Case) -> str | None:
    """Where the file does not say beside it what the shape was."""
    if b"comfy.gguf.orig_shape" in path.read_bytes():
        return None
    return entry(path, "shape", lambda columns, rows: (rows, columns)) and "expected shape|weights in blocks"


def rows_that_fit_no_blocks(path: Path, case: Case) -> str | None:
    found = entry(path, "shape", lambda columns, rows: (31, rows)) if case.form == "gguf" else None
    return found and "rows of 31 weights in blocks of|cannot have been"


def a_type_that_is_not_known(path: Path, case: Case) -> str | None:
    return entry(path, "type", lambda kind: (99,)) and f"{W2}: a type numbered 99, which is not known"


def a_type_that_nobody_reads(path: Path, case: Case) -> str | None:
    """Q8_K, which is for activations only."""
    words = "expected a readable GGUF type, found Q8_K|rows of 32 weights in blocks of 256"
    return entry(path, "type", lambda kind: (15,)) and words


def whole_numbers(path: Path, case: Case) -> str | None:
    """I32, which is for no weights."""
    return entry(path, "type", lambda kind: (26,)) and "found I32|found an I32|goes past the end"


def outside_of_the_file(path: Path, case: Case) -> str | None:
    return entry(path, "offset", lambda start: (2**40,)) and "goes past the end"


def not_aligned(path: Path, case: Case) -> str | None:
    return entry(path, "offset", lambda start: (start + 1,)) and f"{W2}: offset \\d+, which is no multiple of 32"


def there_twice(path: Path, case: Case) -> str | None:
    if case.suffix != ".gguf":
        return None
    path.write_bytes(path.read_bytes().replace(b"layers.1.feed_forward.w2", b"layers.0.feed_forward.w2"))
    return f"{W2}: .*there twice"


FAULTS: tuple[Fault, ...] = (
    cut_off,
    cut_off_in_the_header,
    scale_of_another_shape,
    scale_of_another_type,
    scale_that_is_no_number,
    scale_of_zero,
    scale_missing,
    another_sub_format,
    described_as_another,
    described_in_no_json,
    rotated_in_odd_groups,
    twice_in_two_forms,
    weights_missing,
    weights_of_another_shape,
    rows_and_columns_exchanged,
    rows_that_fit_no_blocks,
    a_type_that_is_not_known,
    a_type_that_nobody_reads,
    whole_numbers,
    outside_of_the_file,
    not_aligned,
    there_twice,
)


@every
def test_faults_end_in_a_sentence_that_names_the_file(written, tmp_path):
    source, _, case = written
    path = tmp_path / source.name
    for fault in FAULTS:
        path.write_bytes(source.read_bytes())
        if words := fault(path, case):
            with pytest.raises(ValueError, match=words) as error:
                load_transformer(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value), fault


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every
def test_numbers_that_are_none_among_the_codes_end_in_a_sentence(written, tmp_path):
    """Where a load does not read them all: NaN in FP8 codes, in scales of groups and of ggml's blocks."""
    source, _, case = written
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    if case.suffix == ".gguf":
        tensors = pytest.importorskip("gguf").GGUFReader(source).tensors
        start, size = next((t.data_offset, t.n_bytes) for t in tensors if re.search(W2, t.name))
        raw = bytearray(source.read_bytes())
        raw[start : start + size] = b"\xff" * size
        path.write_bytes(raw)
    else:
        part = {"nvfp4": "_scale", "comfy-w4a8": "_s_rel"}.get(case.form, "_scale" if case.bits == 8.25 else "")
        pattern = W2 + part + r"(\._data)?$"
        if any(t.dtype == torch.int8 for name, t in load_file(path).items() if re.search(pattern, name)):
            pytest.skip("integer codes hold no NaN, and the scales beside them are checked when loaded")
        assert changed(path, pattern, lambda t: torch.full_like(t.view(torch.uint8), 255).view(t.dtype))
    with pytest.raises(ValueError, match="expected finite numbers") as error:
        picture(open_pipeline(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@every
def test_inspect_says_what_it_is(written, capsys):
    path, _, case = written
    assert cli.main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "runs here" in said
    if case.form == "quanto-int8":
        assert ("quanto INT8" in said) == (case is CASES["quanto-int8"])
        assert ("quanto FP8" in said) == (case is CASES["quanto-float8"])
