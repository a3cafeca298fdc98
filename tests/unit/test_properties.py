"""Whatever is in a file, a config, a name, a picture or on the command line: one ValueError, or what it should be.

Mutations of genuine files, found by hypothesis and the same in every run. FUZZ_EXAMPLES is how many of each kind:
`tests/slow` has 2,000, `benchmarks/fuzz.py` as many as asked for, which are others in each run (FUZZ_RANDOM).
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_core import cli, files, load_pipeline, metadata, pictures
from zimage_core.cli.inspect import inspect_file
from zimage_core.formats import names
from zimage_core.formats.encoder import config_from_json, load_text_encoder
from zimage_core.formats.load import load_transformer
from zimage_core.formats.safetensors import read_header
from zimage_core.formats.vae import config_from_diffusers, load_vae
from zimage_core.lora.read import PeftConfig, load_lora
from zimage_core.models.tokenizer import load_tokenizer
from zimage_core.quantize.writer import StreamedFile
from zimage_core.whole import check_name, write

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_RANDOM" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
third = settings(many, max_examples=max(EXAMPLES // 3, 3))  # of what is tried on three parts, with a picture each
commands = settings(many, max_examples=max(EXAMPLES // 5, 50))

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 64, 10**9, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), True]),
)
scalars = st.one_of(st.none(), numbers, st.text(max_size=20))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
DTYPES = ["F32", "F16", "BF16", "I8", "U8", "I64", "F64", "F8_E4M3", "F8_E5M2", "BOOL", "X", ""]
PARTS = {
    "model": load_transformer,
    "text_encoder": load_text_encoder,
    "vae": load_vae,
    "lora": load_lora,
}


@pytest.fixture(scope="module")
def genuine(tiny_files, tmp_path_factory) -> dict[str, Path]:
    """One file of each part."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    pair = {"lora_A.weight": torch.ones(4, 128), "lora_B.weight": torch.ones(128, 4), "alpha": torch.tensor(2.0)}
    tensors = {f"layers.{i}.attention.to_out.0.{leaf}": t.clone() for i in range(2) for leaf, t in pair.items()}
    peft = {"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_out.0": 4}}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(peft), "ss_network_alpha": "4"})
    return {**tiny_files, "lora": path}


@st.composite
def edits(draw):
    """A function that changes a safetensors header, its JSON as a dict."""
    kind = draw(
        st.sampled_from(["shape", "dtype", "delete", "rename", "metadata", "config", "offsets", "entry", "swap"])
    )
    index, value = draw(st.integers(0, 10**6)), draw(values)
    text, dtype = draw(st.text(max_size=30)), draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5) | st.sampled_from([128, 2**40, 2**62]), max_size=6) | st.just([1] * 65))

    def edit(header: dict) -> None:
        keys = [key for key in header if key != "__metadata__"]
        key = keys[index % len(keys)]
        other = keys[(index // 7) % len(keys)]
        metadata = header.setdefault("__metadata__", {})
        if kind == "shape":
            header[key]["shape"] = shape
        elif kind == "dtype":
            header[key]["dtype"] = dtype
        elif kind == "delete":
            del header[key]
        elif kind == "rename":
            header[text] = header.pop(key)
        elif kind == "metadata":
            metadata[text] = value
        elif kind == "config":
            name = list(metadata)[index % len(metadata)] if metadata else "config"
            try:
                inner = json.loads(metadata.get(name, "{}"))
                inner[list(inner)[index % len(inner)]] = value
            except (ValueError, TypeError, IndexError, ZeroDivisionError):
                inner = value
            metadata[name] = json.dumps(inner)
        elif kind == "offsets":
            header[key]["data_offsets"] = value
        elif kind == "entry":
            header[key] = value
        else:  # two tensors under each other's names
            header[key], header[other] = header[other], header[key]

    return edit


def rewritten(source: Path, target: Path, edit) -> None:
    """A copy of a file with another header over the same data."""
    raw = source.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    target.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def refused_or_done(work, path: Path) -> None:
    """Run it; a ValueError, and no other error, is a sentence that names the file."""
    try:
        work(path)
    except ValueError as error:
        message = str(error)
        assert path.name in message and len(message) < 3000, message[:300]


@pytest.mark.parametrize("part", PARTS)
@many
@given(edit=edits())
def test_another_header(genuine, tmp_path_factory, part, edit):
    path = tmp_path_factory.mktemp("header") / "changed.safetensors"
    rewritten(genuine[part], path, edit)
    refused_or_done(read_header, path)
    refused_or_done(inspect_file, path)
    refused_or_done(PARTS[part], path)
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("part", PARTS)
@many
@given(place=st.floats(0, 1), data=st.binary(max_size=8), cut=st.booleans())
def test_other_bytes(genuine, tmp_path_factory, part, place, data, cut):
    """Bytes of the header replaced, or the end cut off."""
    path = tmp_path_factory.mktemp("bytes") / "changed.safetensors"
    raw = bytearray(genuine[part].read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    start = int(place * (len(raw) if cut else length))
    path.write_bytes(raw[:start] if cut else raw[:start] + data + raw[start + len(data) :])
    refused_or_done(inspect_file, path)
    refused_or_done(PARTS[part], path)
    shutil.rmtree(path.parent)


@pytest.fixture(scope="module")
def picture(tiny_files):
    return drawn(tiny_files)


def drawn(parts: dict) -> bytes:
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "generator": 1}
    return load_pipeline(**parts, device="cpu", dtype="float32")("a cat", **size)[0].tobytes()


@pytest.mark.parametrize("part", ["model", "text_encoder", "vae"])
@third
@given(index=st.integers(0, 10**6), place=st.integers(0, 10**9), value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_number_that_is_none(tiny_files, picture, tmp_path_factory, part, index, place, value):
    """Anywhere in a file: refused, or, where it is not used, the same picture."""
    folder = tmp_path_factory.mktemp("number")
    tensors = load_file(tiny_files[part])
    floats = [key for key, tensor in tensors.items() if tensor.is_floating_point()]
    flat = tensors[floats[index % len(floats)]].view(-1)
    flat[place % len(flat)] = value
    save_file(tensors, folder / "changed.safetensors", read_header(tiny_files[part]).metadata)
    shutil.copy(tiny_files["text_encoder"].parent / "tokenizer.json", folder)
    try:
        assert drawn({**tiny_files, part: folder / "changed.safetensors"}) == picture
    except ValueError as error:
        assert "finite numbers" in str(error)
    shutil.rmtree(folder)


@many
@given(config=st.dictionaries(st.sampled_from(sorted(["hidden_size", "num_attention_heads", "num_key_value_heads",
    "num_hidden_layers", "vocab_size", "intermediate_size", "head_dim", "rope_theta", "rms_norm_eps", "rope_scaling",
    "rope_parameters", "model_type"])), values) | values, base=st.booleans())  # fmt: skip
def test_configs_of_the_text_encoder(config, base):
    good = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    good |= {"vocab_size": 259, "intermediate_size": 96, "head_dim": 32}
    if isinstance(config, dict):
        refused_or_done(lambda path: config_from_json(good | config if base else config, path.name), Path("config"))


@many
@given(config=values | st.dictionaries(st.sampled_from(["block_out_channels", "layers_per_block", "latent_channels",
    "norm_num_groups", "scaling_factor", "shift_factor", "in_channels", "down_block_types"]), values))  # fmt: skip
def test_configs_of_the_vae(config):
    with suppress(ValueError):
        config_from_diffusers(config)


@many
@given(config=values | st.dictionaries(st.sampled_from(["lora_alpha", "r", "alpha_pattern", "rank_pattern", "alpha",
    "use_rslora"]), values), module=st.text(max_size=30))  # fmt: skip
def test_configs_of_peft(config, module):
    with suppress(ValueError):
        PeftConfig.read({}, "lora", json.dumps(config)).scale(module, 4)


@many
@given(config=values | st.fixed_dictionaries({"shift": values}))
def test_configs_of_the_scheduler(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("scheduler")
    for name in ("scheduler", "transformer"):
        (folder / name).mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    try:
        assert 0 < files.read_shift(folder / "transformer") <= 100
    except ValueError as error:
        assert "scheduler_config.json" in str(error)


@many
@given(config=values | st.fixed_dictionaries({"model": values, "added_tokens": values, "version": st.just("1.0")}))
def test_tokenizers(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(folder)


words = st.sampled_from(
    ["layers", "0", "99999999999", "attention", "to_q", "to_out", "lora_A", "lora_B", "weight", "default", "lora_unet_",
     "module", "_orig_mod", "diffusion_model", "transformer", "a1", "oft_R", "hada_w1_a", "decoder", "up", "blk", ""]
)  # fmt: skip


@many
@given(key=st.lists(words | st.text(max_size=5), max_size=200).map(".".join) | st.text(max_size=600))
def test_names(key):
    """Any name is read or not read."""
    for read in (names.canonical_tensor, names.control_tensor, names.lora_leaf, names.lora_refused, names.lora_target):
        read(key)
    names.encoder_tensor(key)
    names.vae_tensor(key, 4)
    names.is_lora([key])


@many
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]),
    place=st.floats(0, 1),
    data=st.binary(max_size=16),
    cut=st.booleans(),
)
def test_pictures(tmp_path_factory, kind, place, data, cut):
    """A picture file with other bytes: a picture in a plain mode, or a sentence."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, kind)
    raw = buffer.getvalue()
    start = int(place * len(raw))
    path = tmp_path_factory.mktemp("picture") / "picture"
    path.write_bytes(raw[:start] if cut else raw[:start] + data + raw[start + len(data) :])
    try:
        assert pictures.to_rgb(pictures.read_image(path)).mode == "RGB"
        pictures.file_size(path)
    except ValueError as error:
        assert "picture" in str(error)
    shutil.rmtree(path.parent)


HEADER, NOTES = {"b.x": ("BF16", (4, 8)), "c.x": ("BF16", (4, 8))}, {"n": ("F32", (3,))}


def quantized(path: Path, stop: bool = False) -> bytes:
    """A resumable file of two sections, written to its end or stopped after the first."""
    with suppress(KeyboardInterrupt), StreamedFile(path, HEADER, {"made": "here"}, NOTES) as out:
        if out.finished:
            out.read("n")
        else:
            out.write("n", torch.arange(3.0))
        for name, section in (("b.x", "b"), ("c.x", "c")):
            if section not in out.finished:
                out.write(name, torch.full((4, 8), float(ord(section))).to(torch.bfloat16))
                out.finish(section)
            if stop:
                raise KeyboardInterrupt
    return path.read_bytes() if path.exists() else b""


@many
@given(which=st.sampled_from(["part", "done"]), place=st.floats(0, 1), data=st.binary(max_size=4), cut=st.booleans())
def test_leftovers_of_a_quantizer(tmp_path_factory, which, place, data, cut):
    """Other bytes anywhere in what an interrupted run left: the file of an undisturbed run, or a sentence."""
    folder = tmp_path_factory.mktemp("leftovers")
    whole = quantized(folder / "whole")
    quantized(folder / "q", stop=True)
    path = folder / f".q.zimage-{which}"
    raw = path.read_bytes()
    start = int(place * len(raw))
    path.write_bytes(raw[:start] if cut else raw[:start] + data + raw[start + len(data) :])
    try:
        with warnings.catch_warnings(record=True):
            assert quantized(folder / "q") == whole
    except ValueError as error:
        assert "move it away" in str(error)
    shutil.rmtree(folder)


@many
@given(name=st.text(max_size=30) | st.sampled_from(["..", "a/b", "C:", "NUL", "x" * 300, "a.", "\x00"]))
def test_names_of_files(tmp_path_factory, name):
    """A name is refused, or makes one file in its folder."""
    folder = tmp_path_factory.mktemp("names")
    with suppress(ValueError):
        check_name(name)
        write(folder / name, b"x")
        assert os.listdir(folder) == [name]
    shutil.rmtree(folder)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@many
@given(prompt=texts, negative=texts, seed=st.integers(0, 2**64 - 1), model=texts)
def test_what_a_picture_says(prompt, negative, seed, model):
    """Whatever the prompt is, it is read back, and no chunk is one that ComfyUI takes for a graph."""
    facts = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "steps": 8, "model": model}
    with Image.open(io.BytesIO(metadata.png(Image.new("RGB", (1, 1)), facts))) as picture:
        assert metadata.read(picture) == facts and not {"prompt", "workflow"} & picture.text.keys()


OPTIONS = [
    *("--steps", "--width", "--height", "--seed", "--batch", "--guidance", "--strength", "--lora", "--image"),
    *("--vram-budget", "--device", "--dtype", "--backend", "--precision", "--model", "--vae", "--tokenizer"),
]
WRONG = [
    "-1",
    "nan",
    "inf",
    "1e400",
    "9" * 400,
    "x",
    "",
    "meta",
    "gone.safetensors:nan",
    "/",
    ".",
    "\udcff",
    "[]",
    "1.5",
]


@commands
@given(option=st.sampled_from(OPTIONS), value=st.sampled_from(WRONG))
def test_command_lines(tiny_files, tmp_path_factory, capsys, option, value):
    """A wrong value of any option ends with exit code 2 and one line, and writes no picture."""
    target = tmp_path_factory.mktemp("command") / "x.png"
    given_options = {"--model": tiny_files["model"], "--text-encoder": tiny_files["text_encoder"]}
    given_options |= {"--vae": tiny_files["vae"], "--steps": 1, "--width": 32, "--height": 32, "--out": target}
    given_options |= {"--device": "cpu", option: value}
    try:
        code = cli.main(["generate", "a", *(f"{name}={given}" for name, given in given_options.items())])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert (code == 2) != target.exists(), error
    assert code in (0, 2) and "Traceback" not in error
