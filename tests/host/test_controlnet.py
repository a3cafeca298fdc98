"""Our ControlNet in ComfyUI: its hints against ComfyUI's class, which leaves captions and pad tokens out, and the nodes
on our MODEL and on ComfyUI's own."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file
from test_model import TINY, conditioning, ksample, ours, stock  # noqa: F401  fixtures

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
    args = (cos, sin, None, t_emb, transformer.sdpa)

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


class FakeVAE:
    """Latents that belong to a picture: its means of 8 x 8 pixels, spread over 16 channels."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([cells.roll(i, 1) * (1 + 0.1 * i) for i in range(6)], 1)[:, :16]


@pytest.fixture(scope="module")
def controls(host, control_tensors):
    """Names in models/model_patches of ControlNets for the tiny model."""
    import folder_paths

    config = host_module(host, "models.config")
    base = host_module(host, "formats.identify").model_info(host.files.find("diffusion_models", TINY, "model")).config
    root = folder_paths.get_folder_paths("diffusion_models")[0]
    folder = __import__("pathlib").Path(root).parent / "model_patches"
    folder.mkdir(exist_ok=True)
    folder_paths.folder_names_and_paths["model_patches"] = ([str(folder)], {".safetensors"})
    given = {"n_layers": base.n_layers, "axes_dims": base.axes_dims, "n_refiner_layers": base.n_refiner_layers}
    kinds = {"masked": ((0,), 33, "hints"), "plain": ((0,), 16, "alone"), "old": ((0,), 33, "layers")}
    kinds["long"] = (tuple(range(base.n_layers)), 16, "alone")
    for name, (places, channels, refiner) in kinds.items():
        weights = control_tensors(config.ControlNetConfig(base, places, channels, refiner))
        metadata = given | {"control_layers_places": list(places)}
        save_file(weights, folder / f"{name}.safetensors", {"config": json.dumps(metadata)})
    return {name: host.controlnet.load_control(f"{name}.safetensors", "torch", "w4a16") for name in kinds}


def host_module(host, name: str):
    return importlib.import_module(f"{host.__name__.partition('.')[0]}.zimage_core.{name}")


def image(seed: int = 0, size=(64, 96)) -> torch.Tensor:
    return torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(seed))


def square() -> torch.Tensor:
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:40, 16:60] = 1
    return mask


def applied(host, model, control, image=None, source=None, mask=None, strength=0.7, start=0.0, end=1.0):
    with torch.inference_mode():
        return host.controlnet.apply_control(model, control, FakeVAE(), image, source, mask, strength, start, end)


@pytest.mark.parametrize("name", ["masked", "plain", "old"])
@torch.inference_mode()
def test_our_model_and_the_stock_model_agree(host, ours, stock, controls, name):  # noqa: F811
    plain = ksample(ours, conditioning())
    found = ksample(applied(host, ours, controls[name], image()), conditioning())
    assert relative(found, plain) > 0.02
    assert relative(ksample(applied(host, stock, controls[name], image()), conditioning()), found) < 1e-4
    assert torch.equal(ksample(ours, conditioning()), plain)


@torch.inference_mode()
def test_masks_batches_guidance_and_two_at_once(host, ours, stock, controls):  # noqa: F811
    latent = {"samples": torch.zeros(2, 16, 8, 12)}
    found = []
    for model in (ours, stock):
        model = applied(host, model, controls["masked"], None, image(1), square())
        model = applied(host, model, controls["plain"], image(2), strength=0.4)
        found.append(ksample(model, conditioning(20), conditioning(50, seed=1), cfg=2.0, latent=latent))
    assert relative(*found) < 1e-4
    one = applied(host, ours, controls["masked"], None, image(1), square())
    assert relative(ksample(one, conditioning(20), conditioning(50, seed=1), cfg=2.0, latent=latent), found[0]) > 0.01


@torch.inference_mode()
def test_the_range_is_that_of_comfyuis_percents(host, ours, stock, controls):  # noqa: F811
    whole = ksample(applied(host, ours, controls["masked"], image()), conditioning())
    halves = []
    for model in (ours, stock):
        half = applied(host, model, controls["masked"], image(), end=0.5)
        halves.append(ksample(half, conditioning()))
        both = applied(host, half, controls["masked"], image(), start=0.5)
        assert relative(ksample(both, conditioning()), whole) < 1e-4
    assert relative(*halves) < 1e-4 and relative(halves[0], whole) > 0.01


@torch.inference_mode()
def test_sizes_that_are_padded_and_a_picture_of_another_size(host, ours, stock, controls):  # noqa: F811
    latent = {"samples": torch.zeros(1, 16, 7, 13)}
    models = (applied(host, model, controls["masked"], image(0, (50, 70))) for model in (ours, stock))
    found = [ksample(model, conditioning(), latent=latent) for model in models]
    assert relative(*found) < 1e-4


def test_streamed_blocks(host, ours, controls, small_gpu):  # noqa: F811
    """ComfyUI gives the ControlNet's patcher an allowance of its own."""
    with torch.inference_mode():
        expected = ksample(applied(host, ours, controls["masked"], image()), conditioning())
        patcher = controls["masked"]
        patcher.module.leave()
        patcher._place(torch.device("cpu"), 0)
        assert relative(ksample(applied(host, ours, patcher, image()), conditioning()), expected) < 1e-5


@torch.inference_mode()
def test_the_budget_is_shared_with_the_controlnet(host, ours, controls, memory):  # noqa: F811
    """By the sizes of their weights: the model keeps to its part, fewer of its blocks stay, the latents are the same.

    A ControlNet of two blocks cannot stream less than both.
    """
    memory.unload_all_models()
    guided, patcher = applied(host, ours, controls["long"], image()), controls["long"]
    expected = ksample(guided, conditioning())
    need, sizes = ours.model.activations([1, 16, 8, 12]), ours.model_size() + patcher.model_size()
    memory.unload_all_models()
    guided.budget = round(need + 0.75 * sizes)
    assert relative(ksample(guided, conditioning()), expected) < 1e-5
    assert 0.5 * patcher.model_size() < patcher.share < 0.75 * patcher.model_size()  # less its activations
    assert guided.loaded_size() + patcher.share + need <= guided.budget and guided.module.streamer.resident < 4
    memory.unload_all_models()
    patcher.share = float("inf")


def test_what_does_not_fit_gets_a_sentence(host, ours, controls):  # noqa: F811
    for arguments, words in (
        ({"image": image(), "strength": float("nan")}, "expected a finite number, found nan"),
        ({"image": image(), "start": 0.5, "end": 0.5}, "expected 0 <= start < end <= 1"),
        ({"image": image(), "mask": square()}, "belong together"),
        ({}, "a control image is needed, or inpaint_image and mask"),
    ):
        with pytest.raises(ValueError, match=words):
            applied(host, ours, controls["masked"], **arguments)
    with pytest.raises(ValueError, match="a control image is needed: connect one"):
        applied(host, ours, controls["plain"], None, image(), square())
    assert applied(host, ours, controls["plain"], image(), strength=0.0) is ours
    with pytest.raises(ValueError, match="found an SVDQuant INT4 model"):
        import folder_paths

        folder_paths.folder_names_and_paths["model_patches"][0].append(
            folder_paths.get_folder_paths("diffusion_models")[0]
        )
        host.files.check_control(TINY)


@torch.inference_mode()
def test_the_stock_nodes_work_on_our_model(host, ours, stock, controls):  # noqa: F811
    """What ModelPatchLoader and ZImageFunControlnet make of a ControlNet does the same on both MODELs."""
    import comfy.model_patcher
    import comfy.ops
    from comfy.ldm.lumina.controlnet import ZImage_Control
    from comfy_extras.nodes_model_patch import ZImageControlPatch

    net = controls["plain"].net
    theirs = ZImage_Control(
        dim=net.config.base.dim,
        n_heads=net.config.base.n_heads,
        n_kv_heads=net.config.base.n_heads,
        qk_norm=True,
        n_control_layers=1,
        operations=comfy.ops.disable_weight_init,
    ).eval()
    state = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(state | dict(comfyui_names(net)))  # a refiner block of zeros changes nothing
    device = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(theirs.float(), load_device=device, offload_device=device)
    found = []
    for model in (ours, stock):
        n = model.clone()
        patch = ZImageControlPatch(patcher, FakeVAE(), image(), 0.7)
        n.set_model_noise_refiner_patch(patch)
        n.set_model_double_block_patch(patch)
        found.append(ksample(n, conditioning()))
    assert relative(*found) < 1e-4
    assert relative(ksample(ours, conditioning()), found[0]) > 0.02
