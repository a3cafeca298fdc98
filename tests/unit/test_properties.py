"""Whatever is in a file, a config, a name or a picture: one ValueError, or what it should be.

Mutations of genuine files, found by hypothesis and the same in every run; how many is in `strategies.py`.
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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from strategies import changed_bytes, many, texts, third, values, write_controlnet

from zimage_core import files, load_pipeline, metadata, pictures
from zimage_core.cli.inspect import inspect_file
from zimage_core.formats import names
from zimage_core.formats.controlnet import load_controlnet
from zimage_core.formats.encoder import config_from_json, load_text_encoder
from zimage_core.formats.load import load_transformer
from zimage_core.formats.safetensors import read_header, read_object
from zimage_core.formats.vae import config_from_diffusers, load_vae
from zimage_core.lora.read import PeftConfig, load_lora
from zimage_core.models.tokenizer import load_tokenizer
from zimage_core.quantize.convert import convert
from zimage_core.quantize.writer import StreamedFile
from zimage_core.whole import check_name, write

DTYPES = ["F32", "F16", "BF16", "I8", "U8", "I64", "F64", "F8_E4M3", "F8_E5M2", "BOOL", "X", ""]


def converted(path: Path) -> None:
    """A copy in the other layout; none is left of a file that is refused."""
    target = path.with_name("converted")
    try:
        convert(path, target, "nunchaku" if "kitchen" in path.name else "kitchen")
    except ValueError:
        assert not target.exists()
        raise


PARTS = {
    "model": load_transformer,
    "text_encoder": load_text_encoder,
    "vae": load_vae,
    "lora": load_lora,
    "controlnet": load_controlnet,
    "nunchaku's layout": converted,
    "kitchen's layout": converted,
}


@pytest.fixture(scope="module")
def genuine(tiny_files, control_tensors, tmp_path_factory) -> dict[str, Path]:
    """One file of each part."""
    folder = tmp_path_factory.mktemp("genuine")
    path, net, kitchen = (folder / f"{name}.safetensors" for name in ("lora", "net", "kitchen"))
    write_controlnet(net, tiny_files["model"], control_tensors)
    convert(tiny_files["model"], kitchen, "kitchen")
    pair = {"lora_A.weight": torch.ones(4, 128), "lora_B.weight": torch.ones(128, 4), "alpha": torch.tensor(2.0)}
    tensors = {f"layers.{i}.attention.to_out.0.{leaf}": t.clone() for i in range(2) for leaf, t in pair.items()}
    peft = {"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_out.0": 4}}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(peft), "ss_network_alpha": "4"})
    layouts = {"nunchaku's layout": tiny_files["model"], "kitchen's layout": kitchen}
    return {**tiny_files, "lora": path, "controlnet": net, **layouts}


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


def refused_or_done(work, path: Path) -> str:
    """Run it; a ValueError, and no other error, is a sentence that names the file, and returned."""
    try:
        work(path)
    except ValueError as error:
        message = str(error)
        assert path.name in message and len(message) < 3000, message[:300]
        return message
    return ""


@pytest.mark.parametrize("part", PARTS)
@many
@given(edit=edits())
def test_another_header(genuine, tmp_path_factory, part, edit):
    path = tmp_path_factory.mktemp("header") / f"changed-{genuine[part].name}"
    rewritten(genuine[part], path, edit)
    refused_or_done(read_header, path)
    facts: dict = {}
    refused_or_done(lambda path: facts.update(inspect_file(path)), path)
    message = refused_or_done(PARTS[part], path)
    of_values = ("numbers", "no zero", "makes them one", "load the file as it is")  # which headers do not tell
    assert not message or "runs_here" not in facts or any(words in message for words in of_values), message
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("part", PARTS)
@many
@given(place=st.floats(0, 1), data=st.binary(max_size=8), cut=st.booleans())
def test_other_bytes(genuine, tmp_path_factory, part, place, data, cut):
    """Bytes of the header replaced, or the end cut off."""
    path = tmp_path_factory.mktemp("bytes") / f"changed-{genuine[part].name}"
    raw = genuine[part].read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    changed = (
        changed_bytes(raw, place, data, cut=True) if cut else changed_bytes(raw[:length], place, data) + raw[length:]
    )
    path.write_bytes(changed)
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
        config_from_diffusers(read_object(json.dumps(config), "config"))


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
    path = tmp_path_factory.mktemp("picture") / "picture"
    path.write_bytes(changed_bytes(buffer.getvalue(), place, data, cut))
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
    path.write_bytes(changed_bytes(path.read_bytes(), place, data, cut))
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


@many
@given(prompt=texts, negative=texts, seed=st.integers(0, 2**64 - 1), model=texts)
def test_what_a_picture_says(prompt, negative, seed, model):
    """Whatever the prompt is, it is read back, and no chunk is one that ComfyUI takes for a graph."""
    facts = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "steps": 8, "model": model}
    with Image.open(io.BytesIO(metadata.png(Image.new("RGB", (1, 1)), facts))) as picture:
        assert metadata.read(picture) == facts and not {"prompt", "workflow"} & picture.text.keys()
