"""Every stored form of the text encoder: files written here by the formats' own rules, against transformers' Qwen3.

Each file is read twice: by a writer's or package's own dequantizer into transformers (must agree to rounding), and
compared with the unquantized model (must be as accurate as the form allows).
"""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from pathlib import Path

import ggml
import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core import cli
from zimage_core.demo import demo_files
from zimage_core.formats import stored
from zimage_core.formats.encoder import check_text_encoder, load_text_encoder
from zimage_core.formats.gguf import QUANTIZED
from zimage_core.formats.stored import FORMS, HostEmbedding, StoredLinear, dequantize
from zimage_core.models.text_encoder import TextEncoderConfig
from zimage_core.models.tokenizer import load_tokenizer
from zimage_core.quantize.encoder import quantize_encoder

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, FFN, LAYERS, HEADS, KV, HEAD = 300, 256, 512, 3, 4, 2, 64
IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
EIGHT_BIT, FOUR_BIT = 0.999, 0.98
FP8 = 0.997  # three bits of mantissa: a weight is off by up to 6%


def config():
    return transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def hidden(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' hidden_states[-2] with weights named without `model.`, in fp32."""
    model = transformers.Qwen3Model(config()).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    with torch.no_grad():
        return model(IDS, output_hidden_states=True).hidden_states[-2]


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """bf16 weights with a tail, as trained ones have, norms that are not 1, and a token table that carries the stream.

    With a small table the layers amplify every rounding, which no trained model does.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.Qwen3Model(config()).state_dict().items()}
    tails = torch.distributions.StudentT(10.0)
    weights = {name: 1 + 0.2 * torch.randn(s) if len(s) == 1 else 0.05 * tails.sample(s) for name, s in shapes.items()}
    weights["embed_tokens.weight"] *= 20
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


@pytest.fixture(scope="module")
def reference(original) -> torch.Tensor:
    return hidden(original)


def linears(weights) -> list[str]:
    """Layers' Linears, without `.weight`."""
    return [n.removesuffix(".weight") for n, t in weights.items() if t.ndim == 2 and n.startswith("layers.")]


def check(path, meant: dict[str, torch.Tensor], reference, cosine: float) -> None:
    """The file's features equal those of the weights it means, and are that close to the original's."""
    encoder = load_text_encoder(path, dtype=torch.float32)
    found, expected = encoder(IDS), hidden(meant)
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-5
    assert torch.cosine_similarity(found, reference, dim=-1).min() >= cosine
    halves = load_text_encoder(path)(IDS)
    assert halves.dtype == torch.bfloat16
    assert torch.cosine_similarity(halves.float(), reference, dim=-1).min() >= min(cosine, 0.999)


def prefixed(tensors):
    return {f"model.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def comfy(form: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


# ---------------------------------------------------------------- FP8


def to_fp8(weight, dtype=torch.float8_e4m3fn):
    scale = weight.float().abs().max() / torch.finfo(dtype).max
    return (weight.float() / scale).to(dtype), scale


def fp8_scaled(path, weights, dtype=torch.float8_e4m3fn):
    """The older naming: marker, .scale_weight, .scale_input; the token table is FP8 too."""
    stored, meant = dict(weights), dict(weights)
    for layer in [*linears(weights), "embed_tokens"]:
        codes, scale = to_fp8(weights[f"{layer}.weight"], dtype)
        stored[f"{layer}.weight"] = codes
        stored[f"{layer}.scale_weight"] = scale.reshape(1)
        stored[f"{layer}.scale_input"] = torch.tensor([0.5])
        meant[f"{layer}.weight"] = codes.float() * scale
    stored = prefixed(stored) | {"scaled_fp8": torch.empty(0, dtype=dtype)}
    save_file(stored, path)
    return meant


def fp8_mixed(path, weights, where="tensors", as_bytes=False):
    """Every other layer in FP8, described by .comfy_quant tensors or in the metadata."""
    stored, meant, described = dict(weights), dict(weights), {}
    for layer in linears(weights)[::2]:
        codes, scale = to_fp8(weights[f"{layer}.weight"])
        stored[f"{layer}.weight"] = codes.view(torch.uint8) if as_bytes else codes
        stored[f"{layer}.weight_scale"] = scale
        described[f"model.{layer}"] = {"format": "float8_e4m3fn"}
        meant[f"{layer}.weight"] = codes.float() * scale
        if where == "tensors":
            stored[f"{layer}.comfy_quant"] = comfy("float8_e4m3fn")
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": described})}
    save_file(prefixed(stored), path, metadata=metadata if where == "metadata" else None)
    return meant


def fp8_plain(path, weights):
    """Cast to FP8 without scales."""
    meant = dict(weights)
    for layer in linears(weights):
        meant[f"{layer}.weight"] = weights[f"{layer}.weight"].to(torch.float8_e4m3fn)
    save_file(prefixed(meant), path)
    return meant


@pytest.mark.parametrize(
    "write",
    [
        fp8_scaled,
        fp8_mixed,
        fp8_plain,
        lambda path, weights: fp8_mixed(path, weights, "metadata"),
        lambda path, weights: fp8_mixed(path, weights, "tensors", as_bytes=True),
    ],
    ids=["scaled", "mixed", "plain", "mixed-metadata", "mixed-bytes"],
)
def test_fp8(tmp_path, original, reference, write):
    path = tmp_path / "fp8.safetensors"
    check(path, write(path, original), reference, FP8)


def test_fp8_e5m2(tmp_path, original, reference):
    path = tmp_path / "fp8.safetensors"
    check(path, fp8_scaled(path, original, torch.float8_e5m2), reference, 0.99)


# ---------------------------------------------------------------- NVFP4

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def to_nvfp4(weight):
    """-> codes, tiled block scales, scale, the weight meant. Scale offsets by cuBLAS' formula, element by element."""
    rows, columns = weight.shape
    scale = weight.float().abs().max() / (448 * 6)
    blocks = weight.float().view(rows, -1, 16)
    fp8 = (blocks.abs().amax(-1) / 6 / scale).clamp(max=448).to(torch.float8_e4m3fn)
    step = (fp8.float() * scale).unsqueeze(-1)
    ratio = torch.where(step > 0, blocks / step, torch.zeros_like(blocks))
    index = (ratio.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
    meant = (FP4[index] * blocks.sign() * step).view(rows, columns)
    codes = (index + 8 * (blocks < 0)).view(rows, columns).to(torch.uint8)
    tall, wide = -(-rows // 128) * 128, -(-fp8.shape[1] // 4) * 4
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(fp8.shape[1]), indexing="ij")
    offset = (r // 128 * (wide // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    tiled = torch.zeros(tall * wide, dtype=torch.uint8)
    tiled[offset.flatten()] = fp8.view(torch.uint8).flatten()
    return codes[:, ::2] * 16 + codes[:, 1::2], tiled.view(torch.float8_e4m3fn).view(tall, wide), scale, meant


def nvfp4(path, weights, quantize=to_nvfp4):
    """NVFP4 but for the q projections, which are FP8: several forms in one file."""
    stored, meant = dict(weights), dict(weights)
    for layer in linears(weights):
        if layer.endswith("q_proj"):
            codes, scale = to_fp8(weights[f"{layer}.weight"])
            stored[f"{layer}.weight_scale"], stored[f"{layer}.comfy_quant"] = scale, comfy("float8_e4m3fn")
            value = codes.float() * scale
        else:
            codes, blocks, scale, value = quantize(weights[f"{layer}.weight"])
            stored[f"{layer}.weight_scale"], stored[f"{layer}.weight_scale_2"] = blocks, scale
            stored[f"{layer}.input_scale"], stored[f"{layer}.comfy_quant"] = torch.tensor(0.1), comfy("nvfp4")
        stored[f"{layer}.weight"], meant[f"{layer}.weight"] = codes, value
    save_file(prefixed(stored), path)
    return meant


def test_nvfp4(tmp_path, original, reference):
    path = tmp_path / "nvfp4.safetensors"
    check(path, nvfp4(path, original), reference, FOUR_BIT)


def test_nvfp4_as_comfyui_writes_it(tmp_path, original, reference):
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")

    def quantize(weight):
        scale = weight.abs().max().float() / (448 * 6)
        codes, blocks = kitchen.quantize_nvfp4(weight, scale)
        return codes, blocks, scale, kitchen.dequantize_nvfp4(codes, scale, blocks, torch.float32)

    path = tmp_path / "nvfp4.safetensors"
    check(path, nvfp4(path, original, quantize), reference, FOUR_BIT)


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}


def nvfp4_of_modelopt(folder, weights, quantization=MODELOPT):
    """By the rules of ModelOpt's NVFP4QTensor and its export: low nibble first, scales in rows, config.json."""
    stored, meant = dict(weights), dict(weights)
    for layer in linears(weights):
        weight = weights[f"{layer}.weight"].float()
        scale = weight.abs().max() / (6 * 448)
        blocks = weight.view(len(weight), -1, 16)
        fp8 = (blocks.abs().amax(-1) / (6 * scale)).clamp(min=2**-9).to(torch.float8_e4m3fn)
        step = (fp8.float() * scale).unsqueeze(-1)
        index = ((blocks / step).abs().unsqueeze(-1) - FP4).abs().argmin(-1)
        meant[f"{layer}.weight"] = (FP4[index] * blocks.sign() * step).view(weight.shape)
        codes = ((blocks < 0).long() << 3 | index).view(weight.shape).to(torch.uint8)
        stored[f"{layer}.weight"] = codes[:, 1::2] << 4 | codes[:, 0::2]
        stored |= {f"{layer}.weight_scale": fp8, f"{layer}.weight_scale_2": scale}
        stored[f"{layer}.input_scale"] = torch.tensor(0.1)
        if layer.endswith(("k_proj", "v_proj")):  # of the cache, where that is FP8
            stored[f"{layer}.{layer[-6]}_scale"] = torch.tensor(0.5)
    folder.mkdir(exist_ok=True)
    save_file(prefixed(stored), folder / "model.safetensors")
    described = config().to_dict() | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(described))
    return meant


def test_nvfp4_as_modelopt_exports_it(tmp_path, original, reference):
    """FFN and attention widths here fill ComfyUI's tiles, as Qwen3-4B's do: only the config tells the layouts apart."""
    check(tmp_path, nvfp4_of_modelopt(tmp_path, original), reference, FOUR_BIT)


@pytest.mark.parametrize("quantization", [None, {"quant_method": "fp8"}, []])
def test_nvfp4_that_nothing_describes_is_refused(tmp_path, original, quantization):
    nvfp4_of_modelopt(tmp_path, original, quantization)
    words = ["weight_scale_2: expected ComfyUI's .comfy_quant beside it or ModelOpt's config.json", "found neither"]
    refused(tmp_path, words)
    (tmp_path / "config.json").unlink()
    refused(tmp_path / "model.safetensors", words)


def test_nvfp4_tiles_that_are_not_full():
    """Rows and blocks that do not fill the tiles of scales (128 x 4), as no layer of Qwen3-4B has."""
    from zimage_core.formats.weights import Stored, blocked, row_parts

    weight = torch.randn(48, 112)
    codes, tiled, scale, meant = to_nvfp4(weight)
    raw = {"codes": codes, "block_scale": tiled, "scale": scale}
    parts = row_parts(Stored("nvfp4", (48, 112), {}), raw)
    assert torch.equal(dequantize("nvfp4", parts), meant)
    assert torch.equal(blocked(parts["block_scale"]), tiled.view(torch.uint8))


# ---------------------------------------------------------------- quanto


def quanto_int8(path, weights):
    """quanto's rules by hand, with mmgp's metadata."""
    stored, meant, kinds = dict(weights), dict(weights), {}
    for layer in linears(weights):
        weight = stored.pop(f"{layer}.weight")
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        stored |= {f"{layer}.weight._data": codes, f"{layer}.weight._scale": scale}
        stored |= {f"{layer}.{name}": torch.ones((), dtype=torch.bfloat16) for name in ("input_scale", "output_scale")}
        meant[f"{layer}.weight"] = codes.float() * scale.float()
        kinds[f"model.{layer}"] = {"weights": "qint8", "activations": "none"}
    encoded = {
        f"{name}_base64": base64.b64encode(json.dumps(data).encode()).decode()
        for name, data in (("quantization_map", kinds), ("config", config().to_dict()))
    }
    save_file(prefixed(stored), path, metadata={"format": "pt", "quantization_format": "quanto", **encoded})
    return meant


def test_quanto_int8(tmp_path, original, reference):
    path = tmp_path / "quanto.safetensors"
    check(path, quanto_int8(path, original), reference, EIGHT_BIT)


@pytest.fixture
def quanto():
    return pytest.importorskip("optimum.quanto")


@pytest.mark.parametrize("kind", ["qint8", "qfloat8"])
def test_quanto_as_quanto_writes_it(tmp_path, original, reference, quanto, kind):
    model = transformers.Qwen3Model(config()).to(torch.bfloat16)
    model.load_state_dict(original)
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    path = tmp_path / "quanto.safetensors"
    save_file(prefixed(model.state_dict()), path, metadata={"quantization_format": "quanto"})
    modules = dict(model.named_modules())
    meant = dict(original)
    for layer in linears(original):
        weight = modules[layer].weight
        meant[f"{layer}.weight"] = weight._data.float() * weight._scale.float()
    check(path, meant, reference, EIGHT_BIT if kind == "qint8" else FP8)


# ---------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf")


def write_gguf(gguf, path, weights, kind, embedding=None, arch="qwen3", change=None):
    """A GGUF file with Linears of a kind (a function of the layer for several); the weights it means."""
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
        "attention.key_length": HEAD,
        "context_length": 4096,
    } | (change or {})
    for name, value in fields.items():
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{arch}.rope.freq_base", 1e6)
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    names, meant = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS), {}
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            form = "F32"
        elif name == "embed_tokens.weight":
            form = embedding or "F16"
        else:
            form = kind(name) if callable(kind) else kind
        data, which = ggml.quantize(tensor, form), gguf.GGMLQuantizationType[form]
        writer.add_tensor(names.get_name(f"model.{name}", try_suffixes=(".weight",)), data, raw_dtype=which)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(data, which).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize(
    ("kind", "embedding", "cosine"),
    [
        ("F16", None, 0.9999),
        ("BF16", "BF16", 0.9999),
        ("F32", "F32", 0.9999),
        ("Q8_0", "Q8_0", EIGHT_BIT),
        ("Q6_K", "Q6_K", 0.998),
        ("Q5_K", "Q5_K", 0.99),
        ("Q4_K", "Q6_K", FOUR_BIT),
        ("Q4_0", "Q8_0", FOUR_BIT),  # through the gguf package's dequantizer
    ],
)
def test_gguf(tmp_path, original, reference, gguf, kind, embedding, cosine):
    path = tmp_path / "encoder.gguf"
    check(path, write_gguf(gguf, path, original, kind, embedding), reference, cosine)


def test_gguf_of_several_types(tmp_path, original, reference, gguf):
    """Q4_K_M: Q6_K for v and down, Q4_K otherwise."""
    path = tmp_path / "encoder-Q4_K_M.gguf"
    meant = write_gguf(gguf, path, original, lambda n: "Q6_K" if "v_proj" in n or "down" in n else "Q4_K", "Q6_K")
    check(path, meant, reference, FOUR_BIT)


FIRST_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the fp16 numbers of a block are; of those that are not here, at its start, and a minimum behind."""


@pytest.mark.parametrize("kind", [form for form in FORMS if form in QUANTIZED])
def test_dequantizers_equal_the_gguf_packages_on_any_bytes(gguf, kind):
    which = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[which]
    codes = torch.randint(0, 256, (8, 3, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for start in FIRST_SCALES.get(kind, (0, 2) if kind.endswith("_1") else (0,)):  # numbers that are finite
        codes[..., start + 1] &= 0xBF
    codes = codes.view(8, 3 * size)
    expected = torch.from_numpy(gguf.quants.dequantize(codes.numpy(), which))
    assert expected.shape == (8, 3 * block)
    assert torch.equal(dequantize(kind, {"codes": codes}), expected)


# ---------------------------------------------------------------- how accurate


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "encoder.py"
    spec = importlib.util.spec_from_file_location("encoder_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_rounds_weights_as_the_files_do(original, gguf, benchmark):
    weight = original["layers.1.mlp.down_proj.weight"].float()

    def in_gguf(kind):
        data = ggml.quantize(weight, kind)
        return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).copy())

    codes, scale = to_fp8(weight)
    halves = weight.to(torch.bfloat16)
    quanto_scale = halves.abs().amax(1, keepdim=True) / 127
    written = {
        "INT8, quanto": (halves / quanto_scale).round().float() * quanto_scale.float(),
        "FP8 scaled (e4m3)": codes.float() * scale,
        "NVFP4, ComfyUI": to_nvfp4(weight)[-1],
        "GGUF Q8_0": in_gguf("Q8_0"),
        "GGUF Q6_K": in_gguf("Q6_K"),
        "GGUF Q4_K": in_gguf("Q4_K"),
    }
    for form, expected in written.items():
        found = benchmark.FORMS[form][1](weight)
        assert (found != expected).float().mean() < 2e-3, form  # ties may be rounded either way
        assert (found - expected).norm() < 0.2 * (expected - weight).norm(), form


@pytest.mark.parametrize("form", ["INT8", "FP8 scaled", "FP8 mixed"])
def test_eight_bit_files_of_a_trained_encoder(tmp_path, benchmark, form):
    """The demo's: every token within the target; benchmarks/README.md has the figures of 100 captions and all forms."""
    source = demo_files()["text_encoder"]
    tokenizer = load_tokenizer(demo_files()["tokenizer"])
    captions = [tokenizer(f"a small {colour} star on a black background") for colour in ("red", "blue", "white")]
    reference = benchmark.features(load_text_encoder(source, dtype=torch.float32), captions)
    path = tmp_path / "model.safetensors"
    if form == "INT8":
        quantize_encoder(source, path)
    else:
        shutil.copy(source / "config.json", tmp_path)
        weights = {n.removeprefix("model."): t for n, t in load_file(source / "model.safetensors").items()}
        {"FP8 scaled": fp8_scaled, "FP8 mixed": fp8_mixed}[form](path, weights)
    found = benchmark.features(load_text_encoder(tmp_path, dtype=torch.float32), captions)
    cosine = torch.cosine_similarity(found, reference, dim=1)
    assert benchmark.TARGET <= cosine.min() < 1


def test_the_benchmark_of_the_full_size_with_a_small_one(tmp_path, benchmark):
    small = TextEncoderConfig(512, 512, 1024, 3, 8, 4, 64)
    rows = benchmark.measure_full_size(tmp_path, small)
    assert [row["what"] for row in rows] == ["load", "first prompt", "second prompt"]
    (path,) = tmp_path.iterdir()
    assert check_text_encoder(path)[0] == small
    assert path.stat().st_blocks * 512 < path.stat().st_size / 10, "sparse on the disk"


# ---------------------------------------------------------------- in memory


def test_weights_stay_small_and_the_table_stays_on_the_host(tmp_path, original):
    path = tmp_path / "quanto.safetensors"
    quanto_int8(path, original)
    encoder = load_text_encoder(path)
    table = encoder.embed_tokens
    assert isinstance(table, HostEmbedding)
    assert all(isinstance(m, StoredLinear) for n, m in encoder.named_modules() if n.endswith("_proj"))
    for module in encoder.modules():
        if isinstance(module, StoredLinear):
            held = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
            assert held == module.shape[0] * module.shape[1] + 2 * module.shape[0]
    encoder.to("meta")
    assert encoder.device.type == "meta" and table.get_buffer("weight").device.type == "cpu"
    assert {t.device.type for m in encoder.layers.modules() for t in (*m.parameters(), *m.buffers())} == {"meta"}


def test_rows_of_the_table_are_read_one_by_one(tmp_path, original, gguf, monkeypatch):
    path = tmp_path / "encoder.gguf"
    meant = write_gguf(gguf, path, original, "Q8_0", "Q4_K")
    table = load_text_encoder(path, dtype=torch.float32).embed_tokens
    read = []
    monkeypatch.setattr(
        stored, "dequantize", lambda form, parts: read.append(len(parts["codes"])) or dequantize(form, parts)
    )
    ids = torch.tensor([[3, 7], [7, 0]])
    assert torch.equal(table(ids), meant["embed_tokens.weight"][ids])
    assert read == [4]


def test_casting_a_module_leaves_the_codes_alone(tmp_path, original):
    path = tmp_path / "fp8.safetensors"
    fp8_scaled(path, original)
    encoder = load_text_encoder(path, dtype=torch.float32)
    expected = encoder(IDS)
    encoder.to(torch.bfloat16)
    found = encoder(IDS)
    assert found.dtype == torch.bfloat16
    assert ((found.float() - expected).norm() / expected.norm()).item() < 0.02


def test_a_fused_linear_of_several_forms_equals_its_parts(original):
    """As a transformer's q, k and v, stored each by itself; with a bias, and rows taken across their borders."""
    weights = [original[f"layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    (codes, scale), (blocks, fp8) = to_int8(weights[1]), to_fp8(weights[2])
    pieces = [
        ("float", {"weight": weights[0]}),
        ("int8", {"codes": codes, "scale": scale}),
        ("float8_e4m3fn", {"codes": blocks.view(torch.uint8), "scale": fp8.expand(len(blocks), 1)}),
    ]
    whole = torch.cat([dequantize(*piece).float() for piece in pieces])
    fused = StoredLinear(WIDTH, len(whole), bias=True)
    torch.nn.init.normal_(fused.bias)
    for form, parts in pieces:
        fused.load(form, parts)
    assert torch.equal(fused.dense_weight(), whole) and torch.equal(fused.rows(200, 400), whole[200:400])
    x = torch.randn(5, WIDTH)
    assert torch.equal(fused(x), torch.nn.functional.linear(x, whole, fused.bias))


def to_int8(weight):
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


# ---------------------------------------------------------------- quantize-encoder


@pytest.fixture
def source(tmp_path, original):
    path = tmp_path / "qwen_3_4b.safetensors"
    head = {"lm_head.weight": torch.zeros(VOCAB, WIDTH, dtype=torch.bfloat16)}
    save_file(prefixed(original) | head, path)
    return path


def test_quantized_to_int8_is_read_by_quanto(tmp_path, original, reference, source, quanto):
    path = tmp_path / "int8.safetensors"
    steps = []
    quantize_encoder(source, path, progress=lambda *step: steps.append(step))
    assert steps[-1][:2] == (len(original), len(original)) and len(steps) == len(original) + 1
    assert list(tmp_path.glob("*.partial*")) == []

    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    kinds = json.loads(base64.b64decode(metadata["quantization_map_base64"]))
    assert metadata["quantization_format"] == "quanto"
    assert set(kinds) == {f"model.{layer}" for layer in linears(original)}
    described = json.loads(base64.b64decode(metadata["config_base64"]))
    model = transformers.Qwen3Model(transformers.Qwen3Config.from_dict(described)).to(torch.bfloat16)
    quanto.requantize(model, tensors, {name.removeprefix("model."): kind for name, kind in kinds.items()})
    modules = dict(model.named_modules())
    meant = dict(original)
    for layer in linears(original):
        weight = modules[layer].weight
        assert weight.qtype == quanto.qint8
        meant[f"{layer}.weight"] = weight._data.float() * weight._scale.float()
        error = meant[f"{layer}.weight"] - original[f"{layer}.weight"].float()
        assert (error.abs() <= 0.51 * weight._scale.float()).all()
    for name, tensor in model.state_dict().items():
        if "norm" in name or name.startswith("embed"):
            assert torch.equal(tensor, original[name])
    check(path, meant, reference, EIGHT_BIT)


def test_quantized_to_nvfp4_is_read_by_comfyui(tmp_path, original, reference, source, capsys):
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    path = tmp_path / "nvfp4.safetensors"
    assert cli.main(["quantize-encoder", str(source), str(path), "--bits=4"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    tensors = load_file(path)
    meant = dict(original)
    for layer in linears(original):
        keys = [f"model.{layer}.{name}" for name in ("weight", "weight_scale_2", "weight_scale", "comfy_quant")]
        *parts, described = (tensors[key] for key in keys)
        assert json.loads(bytes(described.tolist()))["format"] == "nvfp4"
        value = kitchen.dequantize_nvfp4(*parts, torch.float32)
        meant[f"{layer}.weight"] = value
        weight = original[f"{layer}.weight"].float()
        plain = to_nvfp4(weight)[-1]
        assert (value - weight).norm() <= 0.93 * (plain - weight).norm()
    check(path, meant, reference, FOUR_BIT)


def test_quantizing_shards_and_gguf(tmp_path, original, gguf):
    model = transformers.Qwen3Model(config()).to(torch.bfloat16)
    model.load_state_dict(original)
    folder = tmp_path / "Z-Image-Turbo"
    model.save_pretrained(folder / "text_encoder", max_shard_size="500KB")
    write_gguf(gguf, tmp_path / "encoder.gguf", original, "BF16", "BF16")
    for number, source in enumerate((folder, tmp_path / "encoder.gguf")):
        quantize_encoder(source, tmp_path / f"{number}.safetensors")
    first, second = (load_file(tmp_path / f"{number}.safetensors") for number in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bad_sources_and_destinations(tmp_path, original, source):
    broken = dict(original)
    broken["layers.1.mlp.up_proj.weight"] = torch.full((FFN, WIDTH), torch.nan, dtype=torch.bfloat16)
    save_file(prefixed(broken), tmp_path / "nan.safetensors")
    fp8_plain(tmp_path / "fp8.safetensors", original)
    out = tmp_path / "out.safetensors"
    for arguments, words in (
        ((tmp_path / "nan.safetensors", out), "up_proj.weight: expected finite weights"),
        ((tmp_path / "fp8.safetensors", out), "found float8_e4m3fn, small already"),
        ((source, source), "is the source itself"),
        ((source, tmp_path / "absent" / "out.safetensors"), "no such folder; make it first"),
        ((source, tmp_path), rf"^{tmp_path}: expected a file to write, found a folder; name a file in it"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            quantize_encoder(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected 8 or 4, found 2"):
        quantize_encoder(source, out, bits=2)
    with pytest.raises(FileNotFoundError):
        quantize_encoder(tmp_path / "absent.safetensors", out)
    assert not out.exists() and not list(tmp_path.glob("*.partial*"))
    assert source.stat().st_size > 0


# ---------------------------------------------------------------- bad files

LAYER = "model.layers.1.mlp.up_proj"


def replaced(**parts):
    """Change the parts of one layer: a tensor, or None to leave it out."""

    def change(tensors):
        for name, tensor in parts.items():
            key = f"{LAYER}.{name.replace('__', '._')}"
            tensors.pop(key, None)
            if tensor is not None:
                tensors[key] = tensor
        return tensors

    return change


@pytest.mark.parametrize(
    ("write", "change", "words"),
    [
        (fp8_scaled, replaced(scale_weight=torch.ones(3)), ["up_proj.scale_weight", "of shape (3,)"]),
        (fp8_scaled, replaced(scale_weight=torch.ones(4, 2)), ["up_proj.scale_weight", "of shape (4, 2)"]),
        (fp8_scaled, replaced(weight=None), ["up_proj.scale_", "expected its weight once beside it, found none"]),
        (fp8_scaled, replaced(weight=torch.zeros(FFN, 8).to(torch.float8_e4m3fn)), ["(512, 256)", "(512, 8)"]),
        (fp8_scaled, replaced(pre_quant_scale=torch.ones(WIDTH)), ["unexpected tensor", "up_proj.pre_quant_scale"]),
        (fp8_mixed, replaced(comfy_quant=comfy("mxfp8")), ["mlp.up_proj.weight_scale", "found F32 of shape ()"]),
        (fp8_mixed, replaced(comfy_quant=comfy("int8_tensorwise")), ["int8_tensorwise as described", "found F8_E4M3"]),
        (fp8_mixed, replaced(comfy_quant=torch.zeros(4, dtype=torch.uint8)), ["comfy_quant: expected a JSON object"]),
        (fp8_mixed, replaced(weight_scale_2=torch.ones(())), ["expected float8_e4m3fn as described, found F8_E4M3"]),
        (nvfp4, replaced(comfy_quant=None), ["weight_scale_2: expected ComfyUI's .comfy_quant", "found neither"]),
        (nvfp4, replaced(weight_scale_2=None), ["expected .weight_scale_2 beside it, found none"]),
        (nvfp4, replaced(weight_scale=torch.zeros(2, 2, dtype=torch.uint8)), ["up_proj.weight_scale", "(512, 16)"]),
        (nvfp4, replaced(weight=torch.zeros(FFN, 8, dtype=torch.uint8)), ["up_proj.weight_scale", "(512, 4)"]),
        (quanto_int8, replaced(weight__scale=None), ["weight._data", "expected .weight._scale beside it"]),
        (quanto_int8, replaced(weight__data=torch.zeros(FFN, WIDTH)), ["weight._data", "found F32"]),
        (quanto_int8, replaced(weight__data=None), ["expected its weight once beside it, found none"]),
    ],
)
def test_broken_files_are_refused_in_one_sentence(tmp_path, original, write, change, words):
    path = tmp_path / "broken.safetensors"
    write(path, original)
    save_file(change(load_file(path)), path)
    refused(path, words)


def refused(path, words):
    with pytest.raises(ValueError) as error:
        load_text_encoder(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path)) and "; " in message
    for word in words:
        assert word in message


def test_broken_metadata_is_refused(tmp_path, original):
    path = tmp_path / "broken.safetensors"
    for metadata, words in (
        ({"_quantization_metadata": "{"}, "_quantization_metadata: expected a JSON object"),
        ({"_quantization_metadata": "{}"}, "expected layers, found none"),
        ({"config_base64": "?"}, "expected base64"),
        ({"config_base64": base64.b64encode(b"[]").decode()}, "config: expected a JSON object, found otherwise"),
    ):
        save_file(prefixed(original), path, metadata=metadata)
        refused(path, [words])


def test_gguf_needs_no_package_for_the_types_read_here(tmp_path, original, gguf, monkeypatch):
    path = tmp_path / "encoder.gguf"
    write_gguf(gguf, path, original, "Q4_K", "Q6_K")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert load_text_encoder(path)(IDS).isfinite().all()


def test_sizes_of_blocks_are_those_of_the_gguf_package(gguf):
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items() if size[0] > 1}
    assert QUANTIZED.items() <= sizes.items() and len(QUANTIZED) >= 20


def test_bad_gguf_files_are_refused(tmp_path, original, gguf, monkeypatch):
    path = tmp_path / "encoder.gguf"
    write_gguf(gguf, path, original, "Q8_0")
    content = path.read_bytes()
    for cut in (12, 100, 3000, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:cut])
        refused(path, ["GGUF data are damaged or cut off", "download it again"])
    for arguments, words in (
        ({"arch": "llama"}, ["architecture: expected qwen3, found llama"]),
        ({"change": {"embedding_length": 512}}, ["attn_norm.weight': expected shape (512,), found (256,)"]),
        ({"change": {"attention.head_count": 3}}, ["expected heads divisible by"]),
    ):
        write_gguf(gguf, path, original, "Q8_0", **arguments)
        refused(path, words)
    write_gguf(gguf, path, {n: t for n, t in original.items() if "layers.1.mlp.up" not in n}, "Q8_0")
    refused(path, ["'layers.1.mlp.up_proj.weight' of shape (512, 256), found none"])
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tensor(
        "token_embd.weight", torch.zeros(2, 292, dtype=torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q8_K
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, ["expected a readable GGUF type, found Q8_K"])
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(path, ["needs the gguf package"])
