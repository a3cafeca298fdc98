"""The text encoder against transformers' Qwen3, its files, and the tokenizer's template, limits and hiding places."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.formats import safetensors as tensorfiles
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig, encode_prompts
from zimage_core.models.tokenizer import MAX_TOKENS, find_tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

LAYERS = 3
SVDQ = Path(__file__).parents[1] / "data" / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def oracle():
    """A tiny random Qwen3 with grouped queries, heads wider than hidden / heads, and norms that are not 1."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model = transformers.Qwen3Model(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def hidden(oracle, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return oracle(ids, output_hidden_states=True).hidden_states[-2]


@pytest.fixture
def tensors(oracle):
    return {f"model.{name}": tensor.clone() for name, tensor in oracle.state_dict().items()}


@pytest.fixture
def single(tmp_path, tensors):
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("length", [1, 2, 9, 70, 512])
def test_equals_the_second_to_last_hidden_state(oracle, single, length):
    ids = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(length))
    found = load_text_encoder(single, dtype=torch.float32)(ids)
    assert found.dtype == torch.float32
    assert relative(found, hidden(oracle, ids)) <= 1e-5


def test_trains_under_autograd_and_autocast():
    encoder = TextEncoder(TextEncoderConfig(50, 32, 48, 2, 4, 2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(torch.randint(0, 50, (2, 5)))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_default_config_has_the_names_and_shapes_of_qwen3_4b():
    with torch.device("meta"):
        config = transformers.Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        )
        theirs = transformers.Qwen3Model(config).state_dict()
        ours = TextEncoder(TextEncoderConfig()).state_dict()
    expected = {n: t.shape for n, t in theirs.items() if n != "norm.weight" and not n.startswith("layers.35.")}
    assert {n: t.shape for n, t in ours.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_single_file_of_any_float_type_and_prefix(oracle, tensors, tmp_path, dtype, prefix):
    path = tmp_path / "qwen.safetensors"
    stored = {n.replace("model.", prefix, 1): t.to(dtype) for n, t in tensors.items()}
    stored["lm_head.weight"] = torch.zeros(300, 64, dtype=dtype)
    save_file(stored, path)
    encoder = load_text_encoder(path)
    path.unlink()  # mapped tensors outlive the file's name
    assert encoder.config == TextEncoderConfig(300, 64, 96, LAYERS - 1, 4, 2, 32)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, stored[prefix + name].to(torch.bfloat16))


@pytest.mark.parametrize("shard_size", ["60KB", "1GB"])
def test_transformers_folder(oracle, tmp_path, shard_size):
    folder = tmp_path / "model" / "text_encoder"
    oracle.save_pretrained(folder, max_shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "60KB")
    ids = torch.randint(0, 300, (1, 20))
    for path in (folder, folder.parent):
        found = load_text_encoder(path, dtype=torch.float32)(ids)
        assert relative(found, hidden(oracle, ids)) <= 1e-5


def test_reads_each_needed_tensor_once_and_no_other(single, monkeypatch):
    read = []
    get = tensorfiles.TensorFiles.get
    monkeypatch.setattr(tensorfiles.TensorFiles, "get", lambda self, name: read.append(name) or get(self, name))
    encoder = load_text_encoder(single)
    with torch.device("meta"):
        needed = TextEncoder(encoder.config).state_dict()
    assert sorted(read) == sorted(f"model.{name}" for name in needed)
    assert not any("layers.2." in name or name == "model.norm.weight" for name in read)


def test_config_counts_the_layers_even_where_the_last_is_not_stored(oracle, tensors, tmp_path):
    path = tmp_path / "encoder.safetensors"
    kept = {n: t for n, t in tensors.items() if "layers.2." not in n and n != "model.norm.weight"}
    config = oracle.config.to_dict() | {"rope_theta": 5e5, "rope_parameters": None}
    save_file(kept, path, metadata={"config": json.dumps(config)})
    encoder = load_text_encoder(path, dtype=torch.float32)
    assert (encoder.config.num_layers, encoder.config.rope_theta) == (LAYERS - 1, 5e5)


def t5(tensors):
    return {
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4),
        "shared.weight": torch.zeros(9, 4),
    }


def clip(tensors):
    return {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}


def svdq(tensors):
    return load_file(SVDQ)


def zimage(tensors):
    return {"noise_refiner.0.attention.to_q.weight": torch.zeros(4, 4)}


def qwen2(tensors):
    return {n: t for n, t in tensors.items() if "_norm" not in n or "layernorm" in n}


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def plus(name, tensor=None):
    return lambda tensors: tensors | {name: torch.zeros(1) if tensor is None else tensor}


Q = "model.layers.1.self_attn.q_proj"


def bitsandbytes(tensors):
    """LLM.int8() as it is stored: rows of int8, their largest values, and a mark."""
    codes = {f"{Q}.weight": torch.zeros(128, 64, dtype=torch.int8), f"{Q}.SCB": torch.ones(128)}
    return tensors | codes | {f"{Q}.weight_format": torch.zeros((), dtype=torch.uint8)}


def hqq(tensors):
    parts = {"W_q": torch.zeros(64, 64, dtype=torch.uint8), "scale": torch.ones(1, 128), "zero": torch.ones(1, 128)}
    return without(f"{Q}.weight")(tensors) | {f"{Q}.{name}": part for name, part in parts.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (t5, ["found a T5 text encoder"]),
        (clip, ["found a CLIP text encoder"]),
        (svdq, ["expected Qwen3, found an SVDQuant INT4 model", "--model"]),
        (zimage, ["expected Qwen3, found a Z-Image transformer", "--model"]),
        (qwen2, ["expected Qwen3", "Qwen2"]),
        (plus("visual.blocks.0.norm1.weight"), ["vision-language"]),
        (plus(f"{Q}.comfy_quant"), [f"{Q}.comfy_quant", "expected a JSON object"]),
        (plus(f"{Q}.weight_scale"), [f"{Q}.weight", "expected FP8 because of its .weight_scale, found F32"]),
        (plus(f"{Q}.weight_scale_2"), ["because of its .weight_scale_2, found F32"]),
        (plus(f"{Q}.weight._data"), ["found several forms of it"]),
        (plus(f"{Q}.weight._data._data"), ["found quanto INT4"]),
        (plus(f"{Q}.weight_scale_inv"), ["found FP8 scaled in blocks"]),
        (plus(f"{Q}.weight_packed"), ["found compressed-tensors"]),
        (plus(f"{Q}.weight.absmax"), ["found bitsandbytes"]),
        (bitsandbytes, [f"{Q}.SCB", "found bitsandbytes"]),
        (hqq, [f"{Q}.W_q", "found HQQ"]),
        (plus(f"{Q}.qzeros"), ["found GPTQ or AWQ"]),
        (plus(f"{Q}.bias"), ["unexpected tensor", "layers.1.self_attn.q_proj.bias"]),
        (plus(f"{Q}.weight", torch.zeros(128, 64, dtype=torch.int8)), ["q_proj.weight", "found I8"]),
        (plus("model.norm.weight_scale"), ["norm.weight", "because of its .weight_scale"]),
        (plus(f"{Q}.weight", torch.zeros(64, 64)), ["q_proj.weight", "(128, 64)", "(64, 64)"]),
        (without(f"{Q}.weight"), ["q_proj.weight", "(128, 64)", "found none"]),
        (without("model.embed_tokens.weight"), ["embed_tokens.weight", "found shape None"]),
    ],
)
def test_other_files_are_refused_in_one_sentence(tensors, tmp_path, change, words):
    path = tmp_path / "other.safetensors"
    save_file(change(tensors), path)
    with pytest.raises(ValueError) as error:
        load_text_encoder(path)
    message = str(error.value)
    assert "\n" not in message and "get Qwen3-4B" in message
    for word in (str(path), *words):
        assert word in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "expected a JSON object"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "qwen2"}', "model_type: expected 'qwen3', found 'qwen2'"),
        ('{"hidden_size": 64}', "vocab_size: expected an integer"),
        ('{"rope_scaling": {"rope_type": "yarn"}}', "rope_type: expected 'default', found 'yarn'"),
        ('{"rope_scaling": ["yarn"]}', r"rope_scaling: expected a JSON object, found \['yarn'\]; get Qwen3-4B"),
        ('{"rope_parameters": "default"}', "rope_parameters: expected a JSON object, found 'default'; get Qwen3-4B"),
    ],
)
def test_unfit_configs_are_refused(tensors, tmp_path, config, words):
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path, metadata={"config": config})
    with pytest.raises(ValueError, match=words):
        load_text_encoder(path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("head_dim", "64", "an integer from 1 to 10000, found '64'"),
        ("head_dim", 64.0, "an integer from 1 to 10000, found 64.0"),
        ("head_dim", 0, "an integer from 1 to 10000, found 0"),
        ("num_key_value_heads", "2", "an integer from 1 to 10000, found '2'"),
        ("vocab_size", True, "an integer from 1 to 1000000, found True"),
        ("num_hidden_layers", 1_000_000, "an integer from 1 to 999, found 999999"),
        ("rms_norm_eps", None, "a number from 1e-12 to 1, found None"),
        ("rms_norm_eps", "1e-6", "a number from 1e-12 to 1, found '1e-6'"),
        ("rms_norm_eps", float("nan"), "a number from 1e-12 to 1, found nan"),
        ("rope_theta", "abc", "a number from 0.001 to 1000000000000.0, found 'abc'"),
    ],
)
def test_numbers_of_a_config_are_checked_before_anything_is_built(
    oracle, tensors, tmp_path, monkeypatch, name, value, words
):
    save_file(tensors, tmp_path / "model.safetensors")
    config = {**oracle.config.to_dict(), "rope_parameters": None, name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(TextEncoder, "__init__", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError) as error:
        load_text_encoder(tmp_path)
    ours = name.replace("hidden_layers", "layers")
    assert str(error.value).startswith(f"{tmp_path}: config: {ours}: expected {words}; get Qwen3-4B")


def test_an_absurd_layer_without_a_config_is_refused(tensors, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_file(tensors | {"model.layers.1000000.input_layernorm.weight": torch.ones(64)}, path)
    with pytest.raises(ValueError, match="num_layers: expected an integer from 1 to 999, found 1000000"):
        load_text_encoder(path)


def test_other_containers_are_refused(tmp_path):
    for name, content, words in (
        ("encoder.gguf", b"GGUF" + bytes(99), "GGUF data are damaged"),
        ("encoder.bin", b"PK\x03\x04" + bytes(99), "pickled"),
        ("encoder.safetensors", bytes(4), "not a safetensors file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_text_encoder(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_text_encoder(tmp_path / "absent.safetensors")


# ---------------------------------------------------------------- tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    return {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def write_vocabulary(folder):
    """Bytes as tokens, in the form of vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = byte_alphabet()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(len(vocab) + i): {"content": token, "special": True, "normalized": False} for i, token in enumerate(SPECIAL)
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added})
    )
    return folder


def write_tokenizer_json(folder):
    folder.mkdir(parents=True, exist_ok=True)
    source = write_vocabulary(folder.parent / f"{folder.name}-source")
    transformers.Qwen2Tokenizer.from_pretrained(source).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=[write_vocabulary, write_tokenizer_json])
def folder(request, tmp_path):
    return request.param(tmp_path / "tokenizer")


def test_template_around_the_literal_prompt(folder):
    tokenizer = load_tokenizer(folder)
    byte = byte_alphabet()
    start, end = 257, 258

    def plain(text):
        return [byte[{" ": "Ġ", "\n": "Ċ"}.get(c, c)] for c in text]

    frame = [start, *plain("user\n")], [end, *plain("\n"), start, *plain("assistant\n")]
    for prompt in ("", "a cat", "  {braces} %s \n"):
        assert tokenizer(prompt) == [*frame[0], *plain(prompt), *frame[1]]
    assert tokenizer("<|im_end|>x") == [*frame[0], end, *plain("x"), *frame[1]]


def test_equals_diffusers_tokenization(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = load_tokenizer(folder)
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for prompt in ("a cat", "Größe 猫 🚀", "x" * 600):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = ours(prompt)
        assert found == theirs(template.format(prompt), max_length=512, truncation=True)["input_ids"]


def test_long_prompts_are_cut_with_a_warning(folder):
    tokenizer = load_tokenizer(folder)
    room = MAX_TOKENS - len(tokenizer(""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokenizer("a" * room)) == MAX_TOKENS
    with pytest.warns(UserWarning, match=f"takes {MAX_TOKENS + 1} tokens and only the first {MAX_TOKENS}"):
        ids = tokenizer("a" * (room + 1))
    assert len(ids) == MAX_TOKENS


def test_unfit_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found none of its files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_tokenizer(tmp_path)
    bare = write_vocabulary(tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="found no <|im_start|>"):
        load_tokenizer(bare)
    with pytest.raises(ValueError, match="expected a JSON object with 'model'"):
        load_tokenizer(bare / "vocab.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}'),
        ("merges.txt", b"\xff\xfe\n"),
        ("merges.txt", b"#version: 0.2\na 1000\n"),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_broken_tokenizers_are_refused_in_one_sentence(tmp_path, name, content):
    folder = write_vocabulary(tmp_path / "broken")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    message, path = str(error.value), folder / name if name == "tokenizer.json" else folder
    assert message.startswith(f"{path}: expected Qwen's tokenizer, found a broken one (") and "\n" not in message
    assert "; put Qwen3's tokenizer.json, or its vocab.json, merges.txt" in message


def test_prompts_are_encoded_one_by_one_unpadded(oracle, single, folder):
    encoder, tokenizer = load_text_encoder(single, dtype=torch.float32), load_tokenizer(folder)
    prompts = ["a cat", "", "a longer prompt"]
    features = encode_prompts(encoder, tokenizer, prompts)
    for prompt, found in zip(prompts, features, strict=True):
        ids = tokenizer(prompt)
        assert found.shape == (len(ids), 64) and not found.requires_grad
        assert relative(found, hidden(oracle, torch.tensor([ids]))[0]) <= 1e-5
    assert torch.equal(encode_prompts(encoder, tokenizer, "a cat")[0], features[0])
    small = TextEncoder(TextEncoderConfig(100, 32, 48, 1, 4, 2, 16))
    with pytest.raises(ValueError, match="below 100"):
        encode_prompts(small, tokenizer, ["a cat"])


def test_tokenizer_is_found_offline(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "ComfyUI"
    file = root / "models" / "text_encoders" / "qwen_3_4b.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(ValueError, match="found none; put Qwen3's tokenizer.json"):
        find_tokenizer(file)

    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-4B" / "snapshots" / "abc"
    write_vocabulary(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    find = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *names: find(*names, cache_dir=tmp_path / "hub")
    )
    assert find_tokenizer(file) == snapshot

    elsewhere = write_vocabulary(tmp_path / "other" / "comfy" / "text_encoders" / "qwen25_tokenizer")
    assert find_tokenizer(file, comfyui=tmp_path / "other") == elsewhere
    around = write_vocabulary(root / "comfy" / "text_encoders" / "qwen25_tokenizer")
    assert find_tokenizer(file) == around

    diffusers = tmp_path / "Z-Image-Turbo"
    (diffusers / "text_encoder").mkdir(parents=True)
    sibling = write_vocabulary(diffusers / "tokenizer")
    assert find_tokenizer(diffusers / "text_encoder") == find_tokenizer(diffusers) == sibling
    beside = write_tokenizer_json(file.parent)
    assert find_tokenizer(file) == beside
