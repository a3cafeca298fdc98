"""ControlNets in 4 bits: the file's conventions, what is lost, and that calibrating loses less."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy
import pytest
import torch
from dense_files import CONTROLNETS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from zimage_core import Control, load_pipeline
from zimage_core.cli import main
from zimage_core.formats.controlnet import control_info, load_controlnet
from zimage_core.formats.load import load_transformer
from zimage_core.linear import backends
from zimage_core.linear.svdq import SVDQLinear
from zimage_core.models.controlnet import ControlBlock
from zimage_core.models.transformer import Hooks, run_block
from zimage_core.quantize.controlnet import quantize_controlnet

CELLS = (8, 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def hints(base, net) -> torch.Tensor:
    """Every hint of one forward, in one row."""
    gen, found, like = torch.Generator().manual_seed(3), [], base.x_embedder.weight
    cond = base.prepare([torch.randn(20, base.config.cap_feat_dim, generator=gen).to(like)], 64, 64)
    latents = torch.randn(2, 16, *CELLS, generator=gen).to(like)
    context = torch.randn(2, net.config.channels, *CELLS, generator=gen).to(like)

    def record(stage, index, block, *args):
        result = run_block(stage, index, block, *args)
        if isinstance(block, ControlBlock):
            found.append(result[1].flatten())
        return result

    with torch.no_grad():
        controls = (net.prepare(context, base, cond),)
        base(
            latents,
            torch.tensor([0.3, 0.7], device=like.device),
            replace(cond, controls=controls),
            Hooks(run_block=record),
        )
    return torch.cat(found)


@pytest.fixture(scope="module")
def base(tiny_files):
    return load_transformer(tiny_files["model"], dtype=torch.float32, precision="w4a16")


@pytest.mark.parametrize("variant", CONTROLNETS)
def test_quantized_plainly(dense_nets, base, tmp_path, variant):
    path, seen = tmp_path / "net.safetensors", []
    quantize_controlnet(dense_nets[variant], path, rank=16, progress=lambda *args: seen.append(args))
    info = control_info(path)
    assert (info.variant, info.format, info.rank) == (variant, "svdq-int4", 16)
    assert info.config == control_info(dense_nets[variant]).config
    net, whole = (load_controlnet(p, dtype=torch.float32, precision="w4a16") for p in (path, dense_nets[variant]))
    linears = [m for m in net.modules() if isinstance(m, SVDQLinear)]
    projections = 2 * (2 if variant == "2.1 lite" else 1)
    assert len(linears) == 4 * len(net.blocks) + projections == len(seen) == seen[-1][0] == seen[-1][1]
    assert net.backend is not None and whole.backend is None
    for name in ("layers.0.before_proj", "layers.0.after_proj"):
        bias = whole.get_submodule(name).bias
        assert torch.allclose(net.get_submodule(name).weights().bias, bias, atol=4e-3 * bias.abs().max().item())
    # 4 bits of normal weights, which have no low-rank part: 0.08 a linear, through a few of them.
    assert relative(hints(base, net), hints(base, whole)) < 0.25


WAYS = {"triton w4a16": 0.1, "triton w4a8": 0.5, "kitchen w4a8": 0.5, "kitchen w4a4": 1.2, "nunchaku w4a4": 1.2}
"""Way -> its error in parts of that of `reference` in w4a4: bf16 in another order, 8 bits, the same rounding."""


@pytest.mark.parametrize("way", WAYS)
def test_every_backend_runs_it(dense_nets, tiny_files, tmp_path, request, monkeypatch, way):
    """Linears with and without bias, by the backends that are there; on a GPU by their kernels."""
    name, precision = way.split()
    if name == "nunchaku":
        request.getfixturevalue("engine")
        monkeypatch.setattr(backends.load(name), "capability", lambda device: 86)
    elif reason := backends.load(name).unavailable(torch.device(DEVICE), torch.bfloat16, precision=precision):
        pytest.skip(reason)
    path, options = tmp_path / "net.safetensors", {"device": DEVICE, "dtype": torch.bfloat16}
    quantize_controlnet(dense_nets["2.1 lite"], path, rank=16)
    base = load_transformer(tiny_files["model"], backend="reference", precision="w4a16", **options)
    exact, plain, found = (
        load_controlnet(path, backend=backend, precision=level, **options)
        for backend, level in (("reference", "w4a16"), ("reference", "w4a4"), (name, precision))
    )
    assert (found.backend.name, found.backend.precision) == (name, precision)
    expected = hints(base, exact)
    error = relative(hints(base, found), expected)
    print(f"{way}: {error:.4f}, reference w4a4 {relative(hints(base, plain), expected):.4f}")
    assert error <= WAYS[way] * relative(hints(base, plain), expected)


def test_the_file_follows_the_conventions(dense_nets, tmp_path):
    path = tmp_path / "net.safetensors"
    quantize_controlnet(dense_nets["2.1 lite"], path, rank=16)
    with safe_open(path, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    block = {"qweight", "wscales", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up"}
    for linear in ("attention.to_qkv", "attention.to_out.0", "feed_forward.net.0.proj", "feed_forward.net.2"):
        assert {f"control_layers.0.{linear}.{leaf}" for leaf in block} <= names
    assert {f"control_noise_refiner.0.after_proj.{leaf}" for leaf in (*block, "bias")} <= names
    assert "control_all_x_embedder.2-1.weight" in names
    config = json.loads(metadata["config"])
    assert config["add_control_noise_refiner"] == "control_noise_refiner" and config["control_layers_places"] == [0]
    assert json.loads(metadata["quantization_config"])["rank"] == 16
    assert json.loads(metadata["quantized_by"])["method"] == "svd"


@pytest.mark.parametrize("variant", CONTROLNETS)
def test_calibrated_errs_less(dense_nets, base, tiny_files, tmp_path, variant):
    gen = torch.Generator().manual_seed(0)
    feats = [torch.randn(20, base.config.cap_feat_dim, generator=gen) for _ in range(2)]
    contexts = [torch.randn(CONTROLNETS[variant][0], *CELLS, generator=gen) for _ in feats]
    whole = hints(base, load_controlnet(dense_nets[variant], dtype=torch.float32))
    errors, seen = {}, []
    for name, options in (
        ("plain", {}),
        ("calibrated", {"base": tiny_files["model"], "cap_feats": feats, "contexts": contexts, "size": 64}),
    ):
        path = tmp_path / f"{name}.safetensors"
        quantize_controlnet(dense_nets[variant], path, rank=16, **options, progress=lambda *args: seen.append(args))
        net = load_controlnet(path, dtype=torch.float32, precision="w4a16")
        errors[name] = relative(hints(base, net), whole)
    assert errors["calibrated"] < errors["plain"]
    assert seen[-1][0] == seen[-1][1]


def test_an_int4_controlnet_generates(dense_nets, tiny_files, tmp_path):
    path = tmp_path / "net.safetensors"
    quantize_controlnet(dense_nets["2.1 lite"], path, rank=16)
    picture = Image.effect_noise((48, 32), 90).convert("RGB")
    size = {"height": 32, "width": 48, "num_inference_steps": 2, "generator": 1}
    generate = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")
    whole = generate("a cat", **size, control=Control(picture, dense_nets["2.1 lite"]))
    small = generate("a cat", **size, control=Control(picture, path))
    difference = [torch.tensor(numpy.asarray(found[0])).float() for found in (whole, small)]
    assert (difference[0] - difference[1]).abs().mean() < 4  # of 255
    assert path.stat().st_size < 0.5 * dense_nets["2.1 lite"].stat().st_size  # of fp32, with its modulation in bf16


def test_the_command_takes_a_controlnet(dense_nets, tiny_files, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    assert (
        main(["quantize", str(dense_nets["v1"]), str(path), "--rank", "16", "--no-calibration", "--device", "cpu"]) == 0
    )
    assert control_info(path).rank == 16
    assert main(["inspect", str(path)]) == 0
    assert "ControlNet v1, SVDQuant INT4" in capsys.readouterr().out

    Image.effect_noise((48, 32), 90).save(tmp_path / "control.png")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    given = {"base": tiny_files["model"], "vae": tiny_files["vae"], "text-encoder": tiny_files["text_encoder"]}
    given |= {"prompts": tmp_path / "prompts.txt", "control-image": tmp_path / "control.png", "size": 64}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert main(["quantize", str(dense_nets["v1"]), str(path), "--rank", "16", "--device", "cpu", *options]) == 0
    made = json.loads(control_info(path).metadata["quantized_by"])
    assert made["method"].startswith("smooth") and made["prompts"] == 2
    assert main(["quantize", str(dense_nets["v1"]), str(path), "--skip-refiners"]) == 2
    assert "takes none of --merge, --skip-refiners" in capsys.readouterr().err


def test_bad_sources_are_refused(dense_nets, tiny_files, tmp_path):
    path = tmp_path / "net.safetensors"
    quantize_controlnet(dense_nets["v1"], path, rank=16)
    with pytest.raises(ValueError, match="expected a BF16 ControlNet, found svdq-int4"):
        quantize_controlnet(path, tmp_path / "twice.safetensors", rank=16)
    with pytest.raises(ValueError, match="is the source itself"):
        quantize_controlnet(dense_nets["v1"], dense_nets["v1"], rank=16)
    with pytest.raises(ValueError, match="rank: expected a multiple of 16"):
        quantize_controlnet(dense_nets["v1"], path, rank=8)
    with pytest.raises(ValueError, match="expected a control context a prompt, found 0, 1"):
        quantize_controlnet(dense_nets["v1"], path, rank=16, base=tiny_files["model"], cap_feats=[torch.zeros(1, 64)])
    with safe_open(dense_nets["v1"], "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    weights["control_layers.0.after_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors", metadata)
    with pytest.raises(ValueError, match="layers.0.after_proj.weight: expected numbers up to"):
        quantize_controlnet(tmp_path / "nan.safetensors", tmp_path / "out.safetensors", rank=16)
    assert not (tmp_path / "out.safetensors").exists()
