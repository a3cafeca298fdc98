"""ControlNets against the stored outputs of the trainer's own class, and against diffusers' class as far as it goes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from controlnet_cases import BASE, CASES, CHANNELS, FOLDER, PLACES, checksum, inputs, seeded, weights
from safetensors import safe_open
from safetensors.torch import save_file

from zimage_core.formats.controlnet import control_info, load_controlnet
from zimage_core.formats.load import load_transformer
from zimage_core.formats.names import CONTROL
from zimage_core.models.controlnet import control_context, inpainting_picture
from zimage_core.models.transformer import Hooks, ZImageTransformer, run_block

REFINER = {"v1": "alone", "2.0": "layers", "2.1": "hints", "lite": "hints"}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def official(variant: str) -> dict[str, torch.Tensor]:
    """The weights that the variant's outputs were made with, under the trainer's names."""
    with safe_open(FOLDER / f"{variant}.safetensors", "pt") as file:
        made = weights(json.loads(file.metadata()["shapes"]))
        assert checksum(made) == float(file.metadata()["checksum"]), "this torch gives other random numbers"
    return made


def comfyui_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ControlNet's tensors as ComfyUI names them."""
    renamed = {}
    for key, tensor in tensors.items():
        for theirs, comfyuis in (("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm")):
            key = key.replace(f"attention.{theirs}", f"attention.{comfyuis}")
        if "to_q." in key:
            parts = [tensors[key.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            renamed[key.replace("to_q", "qkv")] = torch.cat(parts)
        elif "to_k." not in key and "to_v." not in key:
            renamed[key] = tensor
    return renamed


@pytest.fixture(scope="module", params=PLACES)
def models(request, tmp_path_factory):
    """(variant, base, ControlNet) loaded from files of the vectors' weights under the trainer's names."""
    variant, tensors = request.param, official(request.param)
    folder = tmp_path_factory.mktemp("controlnet")
    config = {"axes_dims": BASE["axes_dims"], "n_layers": BASE["n_layers"]}
    base = {key: tensor for key, tensor in tensors.items() if not key.startswith(CONTROL)}
    save_file(base, folder / "base.safetensors")
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(CONTROL)}
    if variant == "2.0":  # as the published file has it
        own["control_noise_refiner.0.after_proj.weight"] = torch.zeros(BASE["dim"], BASE["dim"])
    save_file(own, folder / "net.safetensors", {"config": json.dumps(config)})
    save_file(comfyui_names(own), folder / "comfyui.safetensors", {"config": json.dumps(config)})
    found = control_info(folder / "net.safetensors").config
    assert (found.refiner, found.places, found.channels) == (REFINER[variant], PLACES[variant], CHANNELS[variant])
    net, same = (load_controlnet(folder / f"{name}.safetensors", dtype=torch.float32) for name in ("net", "comfyui"))
    for (name, tensor), other in zip(net.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    return variant, load_transformer(folder / "base.safetensors", dtype=torch.float32), net


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_equals_the_trainers_class(models, case):
    variant, base, net = models
    latents, t, captions, control = inputs(case, CHANNELS[variant])
    cond = base.prepare(captions, 8 * case.size[0], 8 * case.size[1])
    found = base(latents, t, replace(cond, controls=(net.prepare(control, base, cond, case.strength),)))
    with safe_open(FOLDER / f"{variant}.safetensors", "pt") as file:
        expected = file.get_tensor(case.name)
    assert relative(found, expected) <= 1e-4
    without = relative(base(latents, t, cond), expected)
    assert without > 0.5 if case.strength else without <= 1e-4, "the case does not show the control"


@torch.no_grad()
def test_several_at_once_add_up(models):
    """Hints follow from the base's tokens before any hint of the stage, so that twice 0.3 is once 0.6."""
    variant, base, net = models
    case = CASES[2]
    latents, t, captions, control = inputs(case, CHANNELS[variant])
    cond = base.prepare(captions, 8 * case.size[0], 8 * case.size[1])
    once = base(latents, t, replace(cond, controls=(net.prepare(control, base, cond, 0.6),)))
    part = net.prepare(control, base, cond, 0.3)
    assert relative(base(latents, t, replace(cond, controls=(part, part))), once) <= 1e-5


@torch.no_grad()
def test_one_control_picture_serves_a_batch(models):
    variant, base, net = models
    latents, t, captions, control = inputs(CASES[4], CHANNELS[variant])
    cond = base.prepare(captions, 160, 96)
    shared = replace(cond, controls=(net.prepare(control[:1], base, cond),))
    each = replace(cond, controls=(net.prepare(control[:1].expand(2, -1, -1, -1), base, cond),))
    assert relative(base(latents, t, shared), base(latents, t, each)) <= 1e-6


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=lambda case: case.name)
@torch.no_grad()
def test_hints_equal_diffusers(models, case):
    """diffusers gives the hints of the base's layers; for v1, which has no others, its pictures are the same too.

    Its transformer leaves the hints of the noise refiner out (transformer_z_image.py@v0.42.1).
    """
    diffusers = pytest.importorskip("diffusers")
    variant, base, net = models
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in BASE.items()} | {"n_kv_heads": BASE["n_heads"]}
    own = {k: v for k, v in sizes.items() if k in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    theirs = diffusers.ZImageTransformer2DModel(**sizes)
    kind = {"alone": None, "layers": "control_layers", "hints": "control_noise_refiner"}[REFINER[variant]]
    control_net = diffusers.ZImageControlNetModel(
        control_layers_places=list(PLACES[variant]),
        control_refiner_layers_places=[0, 1],
        control_in_dim=CHANNELS[variant],
        add_control_noise_refiner=kind,
        **own,
    )
    tensors = official(variant)
    theirs.load_state_dict({k: t for k, t in tensors.items() if not k.startswith(CONTROL)})
    unread = "control_noise_refiner." if variant == "2.0" else ()
    control_net.load_state_dict(
        {k: t for k, t in tensors.items() if k.startswith(CONTROL) and not k.startswith(unread)}
    )
    control_net = diffusers.ZImageControlNetModel.from_transformer(control_net, theirs)

    latents, t, captions, control = inputs(case, CHANNELS[variant])
    listed = [picture[:, None] for picture in latents]
    expected = control_net(listed, t, captions, [picture[:, None] for picture in control], case.strength)

    hints = {}

    def record(stage, index, block, x, *args):
        result = run_block(stage, index, block, x, *args)
        if stage == "control_layers":  # in 2.0 the later pass overwrites the refiner's
            hints[PLACES[variant][index]] = result[1]
        return result

    cond = base.prepare(captions, 8 * case.size[0], 8 * case.size[1])
    cond = replace(cond, controls=(net.prepare(control, base, cond, case.strength),))
    found = base(latents, t, cond, Hooks(run_block=record))
    assert set(hints) == set(expected)
    for place, hint in hints.items():
        assert relative(case.strength * hint, expected[place]) <= 1e-4, place
    if variant == "v1":
        out = theirs(listed, t, captions, controlnet_block_samples=expected).sample
        assert relative(found, torch.stack([picture[:, 0] for picture in out])) <= 1e-4


@torch.no_grad()
def test_what_does_not_fit_is_refused(models):
    variant, base, net = models
    captions = inputs(CASES[0], 16)[2]
    cond = base.prepare(captions, 64, 64)
    with pytest.raises(ValueError, match="made for a model of width 96 with 6 layers, this one has width 96 and 5"):
        other = ZImageTransformer(replace(base.config, n_layers=5))
        net.prepare(torch.zeros(1, CHANNELS[variant], 8, 8), other, cond)
    with pytest.raises(ValueError, match=rf"expected \(batch, {CHANNELS[variant]}, 8, 8\), found \(1, 20, 8, 8\)"):
        net.prepare(torch.zeros(1, 20, 8, 8), base, cond)


def test_control_context_is_the_trainers():
    """[control latents | 1 where the picture is kept | latents of the picture with gray where it is repainted]."""
    control, inpaint = seeded("control", 1, 16, 4, 6), seeded("inpaint", 1, 16, 4, 6)
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 8:16, 16:32] = 0.5
    mask[..., 16:24, 16:32] = 0.49
    made = control_context(33, (4, 6), control, inpaint, mask)
    assert made.shape == (1, 33, 4, 6)
    assert torch.equal(made[:, :16], control) and torch.equal(made[:, 17:], inpaint)
    keep = torch.ones(4, 6)
    keep[1, 2:4] = 0
    assert torch.equal(made[0, 16], keep)
    image = torch.ones(1, 3, 32, 48)
    assert torch.equal(inpainting_picture(image, mask)[0, 0], 1 - (mask[0, 0] >= 0.5).float())

    alone = control_context(33, (4, 6), control)
    assert torch.equal(alone[:, :16], control) and not alone[:, 16:].any()
    assert not control_context(33, (4, 6), None, inpaint, mask)[:, :16].any()
    assert torch.equal(control_context(16, (4, 6), control), control)
    with pytest.raises(ValueError, match="takes 16 channels and no mask"):
        control_context(16, (4, 6), control, mask=mask)
