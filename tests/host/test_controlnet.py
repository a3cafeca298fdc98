"""Our ControlNet against ComfyUI's class, which leaves the captions and the pad tokens out: so do both here."""

from __future__ import annotations

import importlib

import pytest
import torch

VARIANTS = {
    "v1": ("alone", (0, 5, 10, 15, 20, 25), 16),
    "2.0": ("layers", (0, 2, 4, 6), 33),
    "2.1": ("hints", (0, 2, 4, 6), 33),
    "lite": ("hints", (0, 10, 20), 33),
}
DIM, HEADS, AXES = 96, 3, (8, 12, 12)
GRID = (4, 6)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_hints_equal_comfyuis(host, variant):
    import comfy.ops
    from comfy.ldm.lumina.controlnet import ZImage_Control

    pack = host.__name__.partition(".")[0]
    models = importlib.import_module(f"{pack}.zimage_core.models.controlnet")
    transformer = importlib.import_module(f"{pack}.zimage_core.models.transformer")
    config = importlib.import_module(f"{pack}.zimage_core.models.config")

    kind, places, channels = VARIANTS[variant]
    base = config.ZImageConfig(dim=DIM, n_heads=HEADS, axes_dims=AXES, cap_feat_dim=16)
    net = models.ControlNet(config.ControlNetConfig(base, places, channels, kind)).eval()
    gen = torch.Generator().manual_seed(0)
    for p in net.parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3
        p.data = torch.randn(p.shape, generator=gen) * scale + (p.ndim == 1)

    theirs = ZImage_Control(
        dim=DIM,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        qk_norm=True,
        n_control_layers=len(places),
        additional_in_dim=channels - 16,
        broken=kind == "layers",
        refiner_control=kind != "alone",
        operations=comfy.ops.disable_weight_init,
    ).eval()
    missing, unexpected = theirs.load_state_dict(dict(comfyui_names(net)), strict=False)
    assert not unexpected and (not missing or kind == "layers")  # 2.0 never runs its control_noise_refiner

    tokens = GRID[0] * GRID[1]
    context = torch.randn(2, channels, 2 * GRID[0], 2 * GRID[1], generator=gen)
    x, u = torch.randn(2, 2, tokens, DIM, generator=gen)
    t_emb = torch.randn(2, DIM, generator=gen)
    positions = torch.tensor([(33, row, column) for row in range(GRID[0]) for column in range(GRID[1])])[None]
    cos, sin = transformer.rope_angles(positions, base)
    turns = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2)).expand(2, -1, -1, -1, -1, -1)
    args = (cos, sin, None, t_emb, transformer.attention)

    embedded = net.x_embedder(transformer.patchify(context, 2))
    run = models.PreparedControl(net, embedded).begin(transformer.run_block)
    run.enter_refiner(x, args)
    c = theirs(None, context, turns, t_emb)
    for i in range(2):
        hint, c = theirs.forward_noise_refiner_block(i, c, x, None, turns, t_emb)
        assert relative(run.add_hint(i, x), x if hint is None else x + hint) <= 1e-4, f"noise refiner {i}"
    run.enter_layers(u, args)
    for i, place in enumerate(places):
        hint, c = theirs.forward_control_block(i, c, u, None, turns, t_emb)
        assert relative(run.add_hint(place, u), u + hint) <= 1e-4, f"layer {i}"
        assert run.add_hint(place + 1, u) is u


def comfyui_names(net):
    """The ControlNet's tensors as ComfyUI names them once it has read an official file."""
    for name, tensor in net.state_dict().items():
        if name.startswith("x_embedder."):
            yield name.replace("x_embedder.", "control_all_x_embedder.2-1."), tensor
        elif "w3_w1" in name:
            for part, rows in zip(("w3", "w1"), tensor.chunk(2), strict=True):
                yield "control_" + name.replace("w3_w1", part), rows
        else:
            for ours, comfyuis in (("to_qkv", "qkv"), ("to_out", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm")):
                name = name.replace(f"attention.{ours}", f"attention.{comfyuis}")
            yield "control_" + name, tensor
