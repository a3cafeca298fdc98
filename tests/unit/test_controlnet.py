"""ControlNet files: every variant told from its header and values, and what is wrong with a file in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.cli import main
from zimage_core.formats.controlnet import control_info, load_controlnet
from zimage_core.models.config import ControlNetConfig, ZImageConfig
from zimage_core.quantize.controlnet import quantize_controlnet

SIZES = {"dim": 32, "n_heads": 2, "axes_dims": (4, 6, 6), "cap_feat_dim": 16}


@pytest.fixture
def tensors(control_tensors):
    """A function (refiner, places, channels) -> a small ControlNet's weights."""
    base = ZImageConfig(**SIZES)
    return lambda refiner, places, channels: control_tensors(ControlNetConfig(base, tuple(places), channels, refiner))


@pytest.fixture
def lite(tensors, tmp_path):
    """(weights of a lite ControlNet, a function that writes weights to a file)."""

    def write(named, **metadata):
        path = tmp_path / "net.safetensors"
        save_file(named, path, {name: json.dumps(value) for name, value in metadata.items()})
        return path

    return tensors("hints", (0, 10, 20), 33), write


@pytest.mark.parametrize(
    ("variant", "refiner", "places", "channels"),
    [
        ("v1", "alone", range(0, 30, 5), 16),
        ("2.0", "layers", range(0, 30, 2), 33),
        ("2.1", "hints", range(0, 30, 2), 33),
        ("2.1 lite", "hints", range(0, 30, 10), 33),
    ],
)
def test_variants(lite, tensors, variant, refiner, places, channels):
    _, write = lite
    info = control_info(write(tensors(refiner, places, channels)))
    assert (info.variant, info.config.refiner, info.format, info.rank) == (variant, refiner, "dense", 0)
    assert info.config.places == tuple(places) and info.config.channels == channels
    assert len(load_controlnet(info.path, dtype=torch.float32).layers) == len(places)


def test_2_0_is_known_by_its_untrained_refiner(lite, tensors):
    _, write = lite
    places = range(0, 30, 2)
    named = tensors("hints", places, 33)
    zero = named | {"control_noise_refiner.0.after_proj.weight": torch.zeros(32, 32)}
    without = {k: t for k, t in named.items() if "noise_refiner.0.before_proj" not in k}
    zeros = named | {"control_noise_refiner.0.before_proj.weight": torch.zeros(32, 32)}
    for found in (zero, without, zeros):
        net = load_controlnet(write(found), dtype=torch.float32)
        assert net.config.refiner == "layers" and not net.noise_refiner


def test_places_come_from_the_config_where_a_file_has_one(lite):
    named, write = lite
    config = {"n_layers": 5, "n_refiner_layers": 2, "control_layers_places": [0, 1, 4]}
    found = control_info(write(named, config=config)).config
    assert found.places == (0, 1, 4) and found.base.n_layers == 5
    config = {"control_layers_places": [0, 2], "add_control_noise_refiner": "control_noise_refiner"}
    with pytest.raises(ValueError, match="3 layers do not spread evenly over a model of 30"):
        control_info(write(named, config=config))
    with pytest.raises(ValueError, match="metadata config: expected a JSON object"):
        control_info(write(named, config=5))


def test_a_damaged_file_is_refused(lite):
    named, write = lite
    key = "control_layers.1.attention.to_k.weight"
    for change, words in (
        ({key: None}, "expected tensor 'layers.1.attention.to_qkv.weight .part k.' of shape"),
        ({key: torch.zeros(32, 31)}, r"'control_layers.1.attention.to_k.weight': expected shape"),
        ({"control_layers.1.before_proj.weight": torch.zeros(32, 32)}, "unexpected tensor .* a Z-Image ControlNet"),
        ({"layers.0.attention_norm1.weight": torch.zeros(32)}, "unexpected tensor 'layers.0"),
        (
            {"control_layers.2.after_proj.bias": torch.zeros(32, dtype=torch.int32)},
            "SVDQuant INT4, BF16, FP16, FP8 or INT8, found one in I32",
        ),
    ):
        changed = {k: t for k, t in (named | change).items() if t is not None}
        with pytest.raises(ValueError, match=words):
            load_controlnet(write(changed))
    seven = dict(named)
    for i in range(3, 7):
        seven |= {k.replace("layers.2", f"layers.{i}"): t.clone() for k, t in named.items() if "layers.2" in k}
    with pytest.raises(ValueError, match="7 layers do not spread evenly over a model of 30"):
        load_controlnet(write(seven))


def test_another_models_file_is_refused(lite, tiny_files):
    _, write = lite
    with pytest.raises(ValueError, match="expected a Fun ControlNet for Z-Image .*, found an SVDQuant INT4 model"):
        load_controlnet(tiny_files["model"])
    for key in ("controlnet_blocks.0.weight", "control_model.input_blocks.0.0.weight"):
        with pytest.raises(ValueError, match="found a ControlNet for another model"):
            load_controlnet(write({key: torch.zeros(2, 2)}))


def test_inspect_says_which_variant(lite, capsys):
    named, write = lite
    assert main(["inspect", str(write(named))]) == 0
    out = capsys.readouterr().out
    assert "ControlNet 2.1 lite, F32" in out and "0 10 20" in out


def quantized(named: dict[str, torch.Tensor], form: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights with every linear in a small form, and the weights that those mean."""
    stored, meant = dict(named), dict(named)
    for key in [key for key, tensor in named.items() if tensor.ndim == 2 and "adaLN" not in key and "x_emb" not in key]:
        layer, weight = key.removesuffix(".weight"), stored.pop(key)
        if form == "quanto":
            scale = weight.abs().amax(1, keepdim=True) / 127
            codes = (weight / scale).round().to(torch.int8)
            stored |= {f"{key}._data": codes, f"{key}._scale": scale}
            stored |= {f"{layer}.{name}": torch.ones(()) for name in ("input_scale", "output_scale")}
        elif form == "int8":
            scale = weight.abs().max() / 127
            codes = (weight / scale).round().to(torch.int8)
            says = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
            stored |= {key: codes, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": says}
        else:
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            codes = (weight / scale).to(torch.float8_e4m3fn)
            stored |= {key: codes, f"{layer}.scale_weight": scale, "scaled_fp8": torch.empty(2, dtype=codes.dtype)}
        meant[key] = codes.float() * scale
    return stored, meant


@pytest.mark.parametrize("form", ["fp8", "int8", "quanto"])
def test_small_forms_are_kept_and_mean_what_they_say(lite, form, tmp_path):
    """A linear in FP8 or INT8 stays small in memory and gives what its dequantized weight gives."""
    named, write = lite
    stored, meant = quantized(named, form)
    small = load_controlnet(write(stored), dtype=torch.float32)
    held = sum(t.numel() * t.element_size() for block in small.blocks for t in (*block.parameters(), *block.buffers()))
    whole = load_controlnet(write(meant), dtype=torch.float32)
    dense = sum(t.numel() * t.element_size() for block in whole.blocks for t in block.parameters())
    assert held < 0.6 * dense  # the modulation stays in fp32
    x, base = torch.randn(2, 1, 5, 32)
    angles = torch.rand(1, 5, 1, 8)
    for block, other in zip(small.blocks, whole.blocks):
        args = (angles.cos(), angles.sin(), None, torch.ones(1, 32))
        found, expected = (net(x, *args, base=base) for net in (block, other))
        for one, two in zip(found, expected):
            assert torch.allclose(one, two, atol=1e-5)
    with pytest.raises(ValueError, match="expected a BF16 ControlNet, found"):
        quantize_controlnet(write(stored), tmp_path / "four.safetensors", rank=16)


def test_inspect_says_what_runs_here_of_whole_files_only(lite, capsys):
    named, write = lite
    assert main(["inspect", str(write(named))]) == 0
    assert "runs here: " in capsys.readouterr().out
    del named["control_layers.0.attention.to_q.weight"]
    assert main(["inspect", str(write(named))]) == 2
    said = capsys.readouterr()
    assert "runs here" not in said.out and "expected tensor" in said.err
