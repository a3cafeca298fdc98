"""ControlNets in 4 bits: the file's conventions, what is lost, and that calibrating loses less."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core import Control, load_pipeline
from zimage_core.cli import main
from zimage_core.formats.controlnet import control_info, load_controlnet
from zimage_core.formats.identify import model_info
from zimage_core.formats.load import load_transformer
from zimage_core.linear.svdq import SVDQLinear
from zimage_core.models.config import ControlNetConfig
from zimage_core.models.controlnet import ControlBlock
from zimage_core.models.transformer import Hooks, run_block
from zimage_core.quantize.controlnet import quantize_controlnet

VARIANTS = {"v1": (16, "alone"), "2.0": (33, "layers"), "2.1 lite": (33, "hints")}
CELLS = (8, 8)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def dense(control_tensors, tiny_files, tmp_path_factory):
    """Files of dense ControlNets for the tiny model, by variant."""
    base, folder, files = model_info(tiny_files["model"]).config, tmp_path_factory.mktemp("dense"), {}
    for variant, (channels, refiner) in VARIANTS.items():
        config = {"n_layers": base.n_layers, "n_refiner_layers": base.n_refiner_layers, "axes_dims": base.axes_dims}
        files[variant] = folder / f"{refiner}.safetensors"
        weights = control_tensors(ControlNetConfig(base, (0,), channels, refiner))
        save_file(weights, files[variant], {"config": json.dumps(config | {"control_layers_places": [0]})})
    return files


def hints(base, net) -> torch.Tensor:
    """Every hint of one forward, in one row."""
    gen, found = torch.Generator().manual_seed(3), []
    cond = base.prepare([torch.randn(20, base.config.cap_feat_dim, generator=gen)], 64, 64)
    latents = torch.randn(2, 16, *CELLS, generator=gen)
    context = torch.randn(2, net.config.channels, *CELLS, generator=gen)

    def record(stage, index, block, *args):
        result = run_block(stage, index, block, *args)
        if isinstance(block, ControlBlock):
            found.append(result[1].flatten())
        return result

    with torch.no_grad():
        controls = (net.prepare(context, base, cond),)
        base(latents, torch.tensor([0.3, 0.7]), replace(cond, controls=controls), Hooks(run_block=record))
    return torch.cat(found)


@pytest.fixture(scope="module")
def base(tiny_files):
    return load_transformer(tiny_files["model"], dtype=torch.float32, precision="w4a16")


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantized_plainly(dense, base, tmp_path, variant):
    path, seen = tmp_path / "net.safetensors", []
    quantize_controlnet(dense[variant], path, rank=16, progress=lambda *args: seen.append(args))
    info = control_info(path)
    assert (info.variant, info.format, info.rank) == (variant, "svdq-int4", 16)
    assert info.config == control_info(dense[variant]).config
    net, whole = (load_controlnet(p, dtype=torch.float32, precision="w4a16") for p in (path, dense[variant]))
    linears = [m for m in net.modules() if isinstance(m, SVDQLinear)]
    projections = 2 * (2 if variant == "2.1 lite" else 1)
    assert len(linears) == 4 * len(net.blocks) + projections == len(seen) == seen[-1][0] == seen[-1][1]
    assert net.backend is not None and whole.backend is None
    for name in ("layers.0.before_proj", "layers.0.after_proj"):
        bias = whole.get_submodule(name).bias
        assert torch.allclose(net.get_submodule(name).weights().bias, bias, atol=4e-3 * bias.abs().max().item())
    # 4 bits of normal weights, which have no low-rank part: 0.08 a linear, through a few of them.
    assert relative(hints(base, net), hints(base, whole)) < 0.25


def test_the_file_follows_the_conventions(dense, tmp_path):
    path = tmp_path / "net.safetensors"
    quantize_controlnet(dense["2.1 lite"], path, rank=16)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_calibrated_errs_less(dense, base, tiny_files, tmp_path, variant):
    gen = torch.Generator().manual_seed(0)
    feats = [torch.randn(20, base.config.cap_feat_dim, generator=gen) for _ in range(2)]
    contexts = [torch.randn(VARIANTS[variant][0], *CELLS, generator=gen) for _ in feats]
    whole = hints(base, load_controlnet(dense[variant], dtype=torch.float32))
    errors, seen = {}, []
    for name, options in (
        ("plain", {}),
        ("calibrated", {"base": tiny_files["model"], "cap_feats": feats, "contexts": contexts, "size": 64}),
    ):
        path = tmp_path / f"{name}.safetensors"
        quantize_controlnet(dense[variant], path, rank=16, **options, progress=lambda *args: seen.append(args))
        net = load_controlnet(path, dtype=torch.float32, precision="w4a16")
        errors[name] = relative(hints(base, net), whole)
    assert errors["calibrated"] < errors["plain"]
    assert seen[-1][0] == seen[-1][1]


def test_an_int4_controlnet_generates(dense, tiny_files, tmp_path):
    path = tmp_path / "net.safetensors"
    quantize_controlnet(dense["2.1 lite"], path, rank=16)
    picture = Image.effect_noise((48, 32), 90).convert("RGB")
    size = {"height": 32, "width": 48, "num_inference_steps": 2, "generator": 1}
    generate = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a16")
    whole = generate("a cat", **size, control=Control(picture, dense["2.1 lite"]))
    small = generate("a cat", **size, control=Control(picture, path))
    difference = [torch.tensor(numpy.asarray(found[0])).float() for found in (whole, small)]
    assert (difference[0] - difference[1]).abs().mean() < 4  # of 255
    assert path.stat().st_size < 0.5 * dense["2.1 lite"].stat().st_size  # of fp32, with its modulation in bf16


def test_the_command_takes_a_controlnet(dense, tiny_files, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    assert main(["quantize", str(dense["v1"]), str(path), "--rank", "16", "--no-calibration", "--device", "cpu"]) == 0
    assert control_info(path).rank == 16
    assert main(["inspect", str(path)]) == 0
    assert "ControlNet v1, SVDQuant INT4" in capsys.readouterr().out

    Image.effect_noise((48, 32), 90).save(tmp_path / "control.png")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    given = {"base": tiny_files["model"], "vae": tiny_files["vae"], "text-encoder": tiny_files["text_encoder"]}
    given |= {"prompts": tmp_path / "prompts.txt", "control-image": tmp_path / "control.png", "size": 64}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert main(["quantize", str(dense["v1"]), str(path), "--rank", "16", "--device", "cpu", *options]) == 0
    made = json.loads(control_info(path).metadata["quantized_by"])
    assert made["method"].startswith("smooth") and made["prompts"] == 2
    assert main(["quantize", str(dense["v1"]), str(path), "--skip-refiners"]) == 2
    assert "takes none of --merge, --skip-refiners" in capsys.readouterr().err


def test_bad_sources_are_refused(dense, tiny_files, tmp_path):
    path = tmp_path / "net.safetensors"
    quantize_controlnet(dense["v1"], path, rank=16)
    with pytest.raises(ValueError, match="expected a BF16 ControlNet, found svdq-int4"):
        quantize_controlnet(path, tmp_path / "twice.safetensors", rank=16)
    with pytest.raises(ValueError, match="is the source itself"):
        quantize_controlnet(dense["v1"], dense["v1"], rank=16)
    with pytest.raises(ValueError, match="rank: expected a multiple of 16"):
        quantize_controlnet(dense["v1"], path, rank=8)
    with pytest.raises(ValueError, match="expected a control context a prompt, found 0, 1"):
        quantize_controlnet(dense["v1"], path, rank=16, base=tiny_files["model"], cap_feats=[torch.zeros(1, 64)])
    with safe_open(dense["v1"], "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    weights["control_layers.0.after_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors", metadata)
    with pytest.raises(ValueError, match="layers.0.after_proj.weight: expected numbers up to"):
        quantize_controlnet(tmp_path / "nan.safetensors", tmp_path / "out.safetensors", rank=16)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_interrupted_calibration_is_resumed(dense, base, tiny_files, tmp_path):
    """The file of an undisturbed run; another base is another run."""
    gen = torch.Generator().manual_seed(0)
    feats = [torch.randn(20, base.config.cap_feat_dim, generator=gen) for _ in range(2)]
    contexts = [torch.randn(33, *CELLS, generator=gen) for _ in feats]
    options = {"rank": 16, "cap_feats": feats, "contexts": contexts, "size": 64}
    other = tmp_path / "other.safetensors"
    tensors = load_file(tiny_files["model"])
    tensors["cap_pad_token"] += 1
    with safe_open(tiny_files["model"], "pt") as file:
        save_file(tensors, other, file.metadata())
    seen = []

    def run(name, base, stop=False):
        def progress(done, total, what):
            seen.append(what)
            assert done <= total
            if stop and what == "layers.0.attention.to_qkv":
                raise KeyboardInterrupt

        quantize_controlnet(dense["2.1 lite"], tmp_path / name, base=base, **options, progress=progress)
        return (tmp_path / name).read_bytes()

    whole = run("whole", tiny_files["model"])
    for again in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run("net", tiny_files["model"], stop=True)
        seen.clear()
        if again:
            with pytest.warns(UserWarning, match="are of a run with other settings"):
                assert run("net", other) != whole
        else:
            assert run("net", tiny_files["model"]) == whole
            resumed = [what for what in seen if what.startswith("resumed")]
            assert resumed and all(what.startswith("resumed noise_refiner.0.") for what in resumed)
            assert "a step" not in seen


def test_what_an_interrupted_calibration_left_is_checked(dense, base, tiny_files, tmp_path):
    """A byte that flipped in a finished part: it is made afresh, the file is that of an undisturbed run."""
    gen = torch.Generator().manual_seed(0)
    feats = [torch.randn(20, base.config.cap_feat_dim, generator=gen) for _ in range(2)]
    contexts = [torch.randn(33, *CELLS, generator=gen) for _ in feats]
    options = {"rank": 16, "cap_feats": feats, "contexts": contexts, "size": 64, "base": tiny_files["model"]}

    def stop(done, total, what):
        if what == "layers.0.attention.to_qkv":
            raise KeyboardInterrupt

    quantize_controlnet(dense["2.1 lite"], tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize_controlnet(dense["2.1 lite"], tmp_path / "net", **options, progress=stop)
    left = tmp_path / ".net.zimage-part"
    name = "control_noise_refiner.0.attention.to_qkv.qweight"
    raw = bytearray(left.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]] ^= 1
    left.write_bytes(raw)
    with pytest.warns(UserWarning, match="are damaged"):
        quantize_controlnet(dense["2.1 lite"], tmp_path / "net", **options)
    assert (tmp_path / "net").read_bytes() == (tmp_path / "whole").read_bytes()
