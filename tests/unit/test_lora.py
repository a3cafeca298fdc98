"""LoRA files in every key style and format, against weights merged by hand into the dequantized tiny model, in fp32."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_core.demo import demo_loras
from zimage_core.formats import names as keys
from zimage_core.formats.identify import identify
from zimage_core.formats.load import load_transformer
from zimage_core.formats.stored import StoredLinear
from zimage_core.linear.adapters import Linear
from zimage_core.linear.svdq import SVDQLinear
from zimage_core.lora import apply as lora
from zimage_core.lora.read import Lora, inspect, load_lora, read_plan
from zimage_core.memory.placement import weights
from zimage_core.models.config import ZImageConfig
from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.pipeline import load_pipeline

TINY = Path(__file__).parents[1] / "data" / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"
DIM, FFN, CAP = 384, 1024, 64
BLOCK = {
    "attention.to_q": (DIM, DIM),
    "attention.to_k": (DIM, DIM),
    "attention.to_v": (DIM, DIM),
    "attention.to_out.0": (DIM, DIM),
    "feed_forward.w1": (FFN, DIM),
    "feed_forward.w2": (DIM, FFN),
    "feed_forward.w3": (FFN, DIM),
}
MODULES = {
    f"{stack}.0.{m}": s for stack in ("layers", "noise_refiner", "context_refiner") for m, s in BLOCK.items()
} | {
    "layers.0.adaLN_modulation.0": (4 * DIM, 256),
    "noise_refiner.0.adaLN_modulation.0": (4 * DIM, 256),
    "all_x_embedder.2-1": (DIM, 64),
    "all_final_layer.2-1.linear": (64, DIM),
    "all_final_layer.2-1.adaLN_modulation.1": (DIM, 256),
    "cap_embedder.1": (DIM, CAP),
    "t_embedder.mlp.0": (1024, 256),
    "t_embedder.mlp.2": (256, 1024),
}
"""Every linear under its official name, with its (N, K)."""


@pytest.fixture(scope="module")
def dense(tiny_model):
    """The tiny model with its dequantized weights in dense linears."""
    model = ZImageTransformer(tiny_model.config)
    quantized = {n: m for n, m in tiny_model.named_modules() if isinstance(m, SVDQLinear)}
    state = dict(tiny_model.state_dict()) | {f"{n}.weight": m.dense_weight() for n, m in quantized.items()}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny_model():
    return load_transformer(TINY, dtype=torch.float32, backend="reference", precision="w4a16")


@pytest.fixture
def model(tiny_model):
    yield tiny_model
    lora.apply(tiny_model, [])


@torch.no_grad()
def picture(model) -> torch.Tensor:
    """What the model makes of one fixed input."""
    g = torch.Generator().manual_seed(5)
    cond = model.prepare([torch.randn(9, CAP, generator=g)], 64, 48)
    return model(torch.randn(1, 16, 8, 6, generator=g), torch.tensor([0.3]), cond)


def random_pairs(seed: int = 0, rank: int = 4, modules=MODULES) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, k, generator=g) / k**0.5, 0.1 * torch.randn(n, rank, generator=g))
        for name, (n, k) in modules.items()
    }


def from_pairs(pairs, name: str = "LoRA") -> Lora:
    return Lora.from_tensors(written("DiffSynth", pairs), name)


def merged_picture(dense, changes) -> torch.Tensor:
    """The dense model's picture with {official module name: W (N, K) -> merged W} applied to its weights."""
    kept = {}
    for name, change in changes.items():
        target, part = keys.canonical_module(name)
        weight = dense.get_submodule(target).weight
        kept.setdefault(target, weight.clone())
        parts = next((p for m, p in keys.FUSED_PARTS.items() if target.endswith(m)), (None,))
        rows = weight.view(len(parts), -1, weight.shape[1])[parts.index(part)] if part else weight
        rows.copy_(
            change(kept[target].view(len(parts), -1, weight.shape[1])[parts.index(part)] if part else kept[target])
        )
    try:
        return picture(dense)
    finally:
        for target, weight in kept.items():
            dense.get_submodule(target).weight.copy_(weight)


def assert_change(model, dense, changes, tolerance=1e-3):
    """The adapter's change of the picture agrees with that of the merged weights."""
    change = picture(model)
    strengths = model.adapters
    lora.apply(model, [])
    change = change - picture(model)
    lora.apply(model, strengths)
    expected = merged_picture(dense, changes) - picture(dense)
    assert expected.norm() > 1e-3 * picture(dense).norm()
    assert (change - expected).norm() / expected.norm() < tolerance


# ---------------------------------------------------------------- key styles


def comfyui_names(name: str) -> str:
    name = name.replace("all_final_layer.2-1", "final_layer").replace("all_x_embedder.2-1", "x_embedder")
    return name.replace("to_out.0", "out")


STYLES = {
    "ai-toolkit": lambda n: (f"diffusion_model.{n}.lora_A.weight", f"diffusion_model.{n}.lora_B.weight"),
    "kohya": lambda n: tuple(f"lora_unet_{n.replace('.', '_')}.lora_{h}.weight" for h in ("down", "up")),
    "kohya, double": lambda n: tuple(f"lora_unet__{n.replace('.', '_')}.lora_{h}.weight" for h in ("down", "up")),
    "musubi for ComfyUI": lambda n: tuple(
        f"lora_unet_{comfyui_names(n).replace('.', '_')}.lora_{h}.weight" for h in ("down", "up")
    ),
    "PEFT": lambda n: tuple(f"base_model.model.transformer.{n}.lora_{h}.weight" for h in "AB"),
    "PEFT, ComfyUI": lambda n: tuple(f"base_model.model.diffusion_model.{n}.lora_{h}.default.weight" for h in "AB"),
    "diffusers": lambda n: tuple(f"transformer.{n}.lora_{h}.weight" for h in "AB"),
    "DiffSynth": lambda n: tuple(f"{n}.lora_{h}.default.weight" for h in "AB"),
    "OneTrainer": lambda n: tuple(f"transformer.{n}.lora_{h}.weight" for h in ("down", "up")),
    "ComfyUI": lambda n: tuple(f"diffusion_model.{comfyui_names(n)}.lora_{h}.weight" for h in "AB"),
    "Anime-Z": lambda n: tuple(f"{re.sub('_(?=[qkvo])', '.', n)}.lora.{h}.weight" for h in ("down", "up")),
    "LyCORIS": lambda n: tuple(f"lycoris_{n.replace('.', '_')}.lora_{h}.weight" for h in ("down", "up")),
}


def written(style: str, pairs, dtype=torch.float32) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        tensors |= dict(zip(STYLES[style](name), (t.to(dtype) for t in pair)))
    return tensors


def test_every_style_of_every_linear_makes_the_same_picture_as_merging(model, dense, tmp_path):
    pairs = random_pairs()
    reference = None
    for style in STYLES:
        save_file(written(style, pairs), tmp_path / "lora.safetensors")
        assert identify(tmp_path / "lora.safetensors").role == "lora"
        loaded = load_lora(tmp_path / "lora.safetensors")
        assert not loaded.report.unmatched and not loaded.report.ignored, style
        assert len(loaded.report.matched) == 2 * len(MODULES)
        lora.apply(model, [(loaded, 1.0)])
        if reference is None:
            assert_change(model, dense, {n: lambda w, p=p: w + p[1] @ p[0] for n, p in pairs.items()})
            reference = picture(model)
        assert torch.equal(picture(model), reference), style


def test_fused_qkv_and_w3_w1_equal_their_parts(model):
    pairs = random_pairs(modules={n: s for n, s in MODULES.items() if n.startswith("layers.0.a") and "to_" in n})
    lora.apply(model, [(Lora.from_tensors(written("kohya", pairs)), 1.0)])
    split = picture(model)
    parts = [pairs.pop(f"layers.0.attention.to_{p}") for p in "qkv"]
    fused = {"layers.0.attention.qkv": (torch.cat([d for d, _ in parts]), torch.block_diag(*[u for _, u in parts]))}
    tensors = written("ai-toolkit", pairs) | written("ComfyUI", fused)
    tensors["diffusion_model.layers.0.attention.qkv.alpha"] = torch.tensor(12.0)  # rank x3, alpha x3
    lora.apply(model, [(Lora.from_tensors(tensors), 1.0)])
    assert torch.allclose(picture(model), split, atol=1e-5)


def test_every_spelled_out_name_is_a_module_and_flat_names_are_unambiguous():
    names = [f"layers.7.{n}" for n in keys.BLOCK_NAMES] + list(keys.OTHER_NAMES)
    flat = [re.sub(r"[.-]", "_", n) for n in names]
    assert len(set(flat)) == len(flat)
    for name, underscored in zip(names, flat):
        assert keys.canonical_module(name)
        assert keys.lora_target(underscored) == keys.lora_target(name) == ("transformer", *keys.canonical_module(name))


def test_duplicates_are_applied_once(model):
    pairs = random_pairs(modules={n: s for n, s in MODULES.items() if n.startswith("layers.0.attention.to_")})
    once = Lora.from_tensors(written("kohya", pairs))
    down, up = (torch.cat([pairs[f"layers.0.attention.to_{p}"][i] for p in "qkv"]) for i in (0, 1))
    up = torch.block_diag(*up.split(DIM))
    twice = written("Anime-Z", pairs) | {
        "layers.0.attention.qkv.lora.down.weight": down,
        "layers.0.attention.qkv.lora.up.weight": up,
        "layers.0.attention.out.lora.down.weight": pairs["layers.0.attention.to_out.0"][0],
        "layers.0.attention.out.lora.up.weight": pairs["layers.0.attention.to_out.0"][1],
    }
    loaded = Lora.from_tensors(twice)
    assert len(loaded.report.ignored) == 8 and "applied once" in loaded.report.summary()
    lora.apply(model, [(once, 1.0)])
    expected = picture(model)
    lora.apply(model, [(loaded, 1.0)])
    assert torch.allclose(picture(model), expected, atol=1e-5)


# ---------------------------------------------------------------- formats


def matrices(*shapes, seed=1, scale=0.3):
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=g) for shape in shapes]


def dora(delta, magnitude, on_output):
    def merge(w):
        merged = w + delta
        return magnitude * merged / merged.norm(dim=1 if on_output else 0, keepdim=True)

    return merge


def rotated(blocks, limit=0.0, rescale=None):
    def merge(w):
        skew = blocks - blocks.transpose(1, 2)
        if limit and skew.norm() > limit:
            skew = skew * limit / skew.norm()
        one = torch.eye(blocks.shape[1])
        rotation = torch.block_diag(*[((one + q) @ (one - q).inverse()).T for q in skew])
        return (rotation @ w) * (1 if rescale is None else rescale)

    return merge


def formats():
    """(name, module, tensors by leaf, W -> merged W)."""
    n, k = 384, 1024
    d, u = matrices((4, k), (n, 4), scale=0.2)
    yield (
        "alpha",
        "layers.0.feed_forward.w2",
        {"lora_down.weight": d, "lora_up.weight": u, "alpha": torch.tensor(2.0)},
        (lambda w: w + 0.5 * u @ d),
    )
    conv = {"lora_down.weight": d[..., None, None], "lora_up.weight": u[..., None, None]}
    yield "LoCon 1x1", "layers.0.feed_forward.w2", conv, lambda w: w + u @ d
    bias = {"lora_A.weight": d, "lora_B.weight": u}
    yield (
        "half precision",
        "layers.0.feed_forward.w2",
        {x: t.bfloat16() for x, t in bias.items()},
        (lambda w: w + u.bfloat16().float() @ d.bfloat16().float()),
    )
    for rank in (3, 24):  # of low rank, and dense because rank 576 is dearer
        a1, b1, a2, b2 = matrices((n, rank), (rank, k), (n, rank), (rank, k))
        leaves = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
        yield (
            f"LoHa {rank}",
            "layers.0.feed_forward.w2",
            leaves,
            (lambda w, a1=a1, b1=b1, a2=a2, b2=b2, rank=rank: w + (a1 @ b1) * (a2 @ b2) / rank),
        )
    w1, w2, w1a, w1b, w2a, w2b = matrices((8, 16), (48, 64), (8, 2), (2, 16), (48, 4), (4, 64))
    alpha = torch.tensor(2.0)
    huge = torch.tensor(1e10)  # ai-toolkit's, which whole factors ignore
    yield (
        "LoKr whole",
        "layers.0.feed_forward.w2",
        {"lokr_w1": w1, "lokr_w2": w2, "alpha": huge},
        (lambda w: w + torch.kron(w1, w2)),
    )
    half = {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": alpha}
    yield "LoKr w2 factored", "layers.0.feed_forward.w2", half, lambda w: w + torch.kron(w1, w2a @ w2b) / 2
    yield (
        "LoKr w1 factored",
        "layers.0.feed_forward.w2",
        {"lokr_w1_a": w1a, "lokr_w1_b": w1b, "lokr_w2": w2, "alpha": alpha},
        (lambda w: w + torch.kron(w1a @ w1b, w2)),
    )
    both = {"lokr_w1_a": w1a, "lokr_w1_b": w1b, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": alpha}
    yield "LoKr factored", "layers.0.feed_forward.w2", both, lambda w: w + torch.kron(w1a @ w1b, w2a @ w2b) / 2
    v1, v2 = matrices((8, 16), (48, 24))
    yield "LoKr on k", "layers.0.attention.to_k", {"lokr_w1": v1, "lokr_w2": v2}, lambda w: w + torch.kron(v1, v2)
    (m_out,), (m_in,) = matrices((n, 1), seed=3), matrices((1, k), seed=4)
    m_out, m_in = 1 + m_out.abs(), 1 + m_in.abs()
    low = {"lora_down.weight": d, "lora_up.weight": u}
    yield "DoRA out", "layers.0.feed_forward.w2", {**low, "dora_scale": m_out}, dora(u @ d, m_out, True)
    yield (
        "DoRA out, PEFT",
        "layers.0.feed_forward.w2",
        {**low, "lora_magnitude_vector": m_out[:, 0]},
        (dora(u @ d, m_out, True)),
    )
    yield "DoRA in", "layers.0.feed_forward.w2", {**low, "dora_scale": m_in}, dora(u @ d, m_in, False)
    dq, uq = matrices((4, 384), (384, 4), scale=0.2)
    small = {"lora_down.weight": dq, "lora_up.weight": uq}
    m_part = 1 + matrices((1, 384))[0].abs()
    yield "DoRA in, k", "layers.0.attention.to_k", {**small, "dora_scale": m_part}, dora(uq @ dq, m_part, False)
    yield "DoRA out, k", "layers.0.attention.to_k", {**small, "dora_scale": m_part.T}, dora(uq @ dq, m_part.T, True)
    yield (
        "DoRA LoKr",
        "layers.0.attention.to_k",
        {"lokr_w1": v1, "lokr_w2": v2, "dora_scale": m_part},
        (dora(torch.kron(v1, v2), m_part, False)),
    )
    blocks, rescale = matrices((24, 16, 16), (384, 1), scale=0.1)
    yield "OFT", "layers.0.feed_forward.w2", {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, rotated(blocks)
    yield (
        "OFT limited",
        "layers.0.feed_forward.w2",
        {"oft_blocks": blocks, "alpha": torch.tensor(0.01)},
        (rotated(blocks, limit=0.01 * 384)),
    )
    yield (
        "OFT rescaled, v",
        "layers.0.attention.to_v",
        {"oft_blocks": blocks, "rescale": 1 + rescale},
        (rotated(blocks, rescale=1 + rescale)),
    )
    yield (
        "OFT beside a bias",
        "layers.0.adaLN_modulation.0",
        {"oft_blocks": matrices((96, 16, 16))[0]},
        (rotated(matrices((96, 16, 16))[0])),
    )
    diff = 0.02 * matrices((n, k))[0]
    yield "diff", "layers.0.feed_forward.w2", {"diff": diff}, lambda w: w + diff


FORMATS = list(formats())


@pytest.mark.parametrize("module, leaves, merge", [f[1:] for f in FORMATS], ids=[f[0] for f in FORMATS])
def test_every_format_acts_like_its_merged_weight(model, dense, module, leaves, merge):
    loaded = Lora.from_tensors({f"diffusion_model.{module}.{leaf}": t for leaf, t in leaves.items()})
    before = picture(model)
    for strength in (1.0, -0.6):
        lora.apply(model, [(loaded, strength)])
        assert_change(model, dense, {module: lambda w, s=strength: w + s * (merge(w) - w)})
    lora.apply(model, [])
    assert torch.equal(picture(model), before)


def test_the_costly_formats_say_so():
    costs = {
        name: Lora.from_tensors({f"{m}.{leaf}": t for leaf, t in x.items()}).report.costs for name, m, x, _ in FORMATS
    }
    assert "1 MiB in 16 bits" in costs["diff"][0] and costs["LoHa 24"] == costs["diff"]
    assert not costs["LoHa 3"] and not costs["LoKr whole"] and not costs["alpha"]
    assert "pass over" in costs["DoRA in"][0] and "dense branch" in costs["DoRA LoKr"][0]


def test_biases_norms_and_pad_tokens_take_diffs(model, dense):
    g = torch.Generator().manual_seed(2)
    before, state = picture(model), {k: v.clone() for k, v in model.state_dict().items()}
    diffs = {
        "x_embedder.diff_b": torch.randn(DIM, generator=g),
        "layers.0.attention_norm1.w_norm": 0.3 * torch.randn(DIM, generator=g),
        "layers.0.attention.norm_q.diff": 0.3 * torch.randn(128, generator=g),
        "cap_pad_token.diff": torch.randn(1, DIM, generator=g),
        "layers.0.adaLN_modulation.0.lora_A.weight": torch.randn(2, 256, generator=g) / 16,
        "layers.0.adaLN_modulation.0.lora_B.weight": torch.randn(4 * DIM, 2, generator=g),
        "layers.0.adaLN_modulation.0.lora_B.bias": torch.randn(4 * DIM, generator=g),
    }
    loaded = Lora.from_tensors({f"diffusion_model.{k}": v for k, v in diffs.items()})
    lora.apply(model, [(loaded, 0.5), (loaded, 0.25)])
    change = picture(model) - before
    kept = {k: v.clone() for k, v in dense.state_dict().items()}
    d = list(diffs.values())
    for name, value in (
        ("x_embedder.bias", d[0]),
        ("layers.0.attention_norm1.weight", d[1]),
        ("layers.0.attention.norm_q.weight", d[2]),
        ("cap_pad_token", d[3]),
        ("layers.0.adaLN_modulation.0.weight", d[5] @ d[4]),
        ("layers.0.adaLN_modulation.0.bias", d[6]),
    ):
        dense.state_dict()[name].add_(0.75 * value)
    expected = picture(dense)
    dense.load_state_dict(kept)
    expected = expected - picture(dense)
    assert (change - expected).norm() / expected.norm() < 1e-3
    lora.apply(model, [])
    assert torch.equal(picture(model), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(name.rpartition(".")[2].startswith("own_") for name, _ in model.named_buffers())


# ---------------------------------------------------------------- stacks, strengths, removal


def test_loras_stack_change_strength_and_leave_without_a_trace(model, dense):
    first, second = random_pairs(1), random_pairs(2, rank=3, modules=dict(list(MODULES.items())[:9]))
    a, b = from_pairs(first), from_pairs(second)
    before = picture(model)
    for strengths in ((1.0, 0.5), (0.3, -2.0), (-1.0, 0.0)):
        lora.apply(model, [(a, strengths[0]), (b, strengths[1])])
        changes = {
            n: lambda w, n=n, s=strengths: (
                w + s[0] * first[n][1] @ first[n][0] + (s[1] * second[n][1] @ second[n][0] if n in second else 0)
            )
            for n in MODULES
        }
        assert_change(model, dense, changes)
    version = model.adapter_version
    lora.apply(model, [(a, -1.0)])
    assert model.adapter_version == version  # the same as before: (b, 0.0) is no LoRA
    lora.apply(model, [(a, 0.0), (b, 0.0)])
    assert model.adapter_version == version + 1
    assert torch.equal(picture(model), before)
    assert all(m.adapter is None for m in model.modules() if hasattr(m, "set_adapter"))


def test_only_what_changes_is_made_again(model):
    everywhere, one = (
        from_pairs(random_pairs(1)),
        from_pairs(random_pairs(2, modules={"cap_embedder.1": (DIM, CAP)})),
    )
    lora.apply(model, [(everywhere, 1.0)])
    kept = {n: m.adapter for n, m in model.named_modules() if hasattr(m, "set_adapter")}
    lora.apply(model, [(everywhere, 1.0), (one, 1.0)])
    changed = {n for n, m in model.named_modules() if hasattr(m, "set_adapter") and m.adapter is not kept[n]}
    assert changed == {"cap_embedder.1"}


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_joined_low_rank_branches_are_exact_and_leave_no_trace(dense, monkeypatch, precision):
    """Large weights carry pairs inside the file's own low-rank branch."""
    from zimage_core.linear.backends import reference

    monkeypatch.setattr(reference, "DENSE", 0)
    model = load_transformer(TINY, dtype=torch.float32, backend="reference", precision=precision)
    pairs = random_pairs(modules={n: s for n, s in MODULES.items() if n.startswith("layers.0.") and "adaLN" not in n})
    linear, x = model.layers[0].feed_forward.w2, torch.randn(5, FFN)
    before, plain, weights = picture(model), linear(x), linear.weights()
    lora.apply(model, [(from_pairs(pairs), 0.7)])
    assert linear.adapter is None and linear.proj_down.shape == (32 + 16, FFN)
    assert linear.proj_up.shape == (DIM, 32 + 16)
    down, up = pairs["layers.0.feed_forward.w2"]
    change = linear(x) - plain
    expected = 0.7 * x @ down.T @ up.T
    assert (change - expected).norm() / expected.norm() < 1e-3
    if precision == "w4a16":
        assert_change(model, dense, {n: lambda w, p=p: w + 0.7 * p[1] @ p[0] for n, p in pairs.items()})
    assert all(torch.equal(t, weights.tensors()[n]) for n, t in linear.weights().tensors().items())
    diff = Lora.from_tensors(
        {"layers.0.feed_forward.w2.dora_scale": torch.ones(DIM, 1)}
        | {f"layers.0.feed_forward.w2.lora_{h}.weight": t for h, t in zip(("down", "up"), (down, up))}
    )
    lora.apply(model, [(diff, 1.0)])  # needs the plain product: the pair moves to a branch of its own
    assert linear.adapter.down is not None and linear.proj_down.shape == (32, FFN)
    lora.apply(model, [])
    assert torch.equal(picture(model), before)


@pytest.mark.parametrize("name", ["reference", "triton", "kitchen", "nunchaku"])
def test_every_backend_can_join_and_part_a_pair(model, monkeypatch, name):
    """In the form that its kernels read, checked by restoring it: needs no GPU."""
    from zimage_core.linear import backends
    from zimage_core.linear.backends import reference

    monkeypatch.setattr(reference, "DENSE", 0)
    weights = model.layers[0].feed_forward.w2.weights().to(dtype=torch.bfloat16)
    module = backends.load(name)
    prepared = module.prepare(weights, module.PRECISIONS[0])
    down, up = torch.randn(16, FFN).bfloat16(), torch.randn(DIM, 16).bfloat16()
    joined = prepared | module.join(prepared, 32, (down, up))
    restored = module.restore(joined)
    assert torch.equal(restored["proj_down"], torch.cat((weights.proj_down, down)))
    assert torch.equal(restored["proj_up"], torch.cat((weights.proj_up, up), 1))
    parted = module.join(joined, 32, None)
    assert all(torch.equal(t, prepared[n]) and t.stride() == prepared[n].stride() for n, t in parted.items())


def test_adapters_are_buffers_that_move_with_the_model(model):
    lora.apply(
        model,
        [
            (from_pairs(random_pairs()), 1.0),
            (Lora.from_tensors({f"{FORMATS[5][1]}.{x}": t for x, t in FORMATS[5][2].items()}), 1.0),
        ],
    )
    block = model.layers[0]
    buffers = {name for name, _ in block.named_buffers()}
    assert {
        "attention.to_qkv.adapter.down",
        "adaLN_modulation.0.adapter.up",
        "feed_forward.w2.adapter.krons_0_0",
    } <= buffers
    assert not any("adapter" in name for name in model.state_dict())


def test_refiner_loras_change_what_prepare_made_and_the_version_says_so(model):
    version = model.adapter_version
    pairs = random_pairs(modules={n: s for n, s in MODULES.items() if n.startswith("context_refiner")})
    lora.apply(model, [(from_pairs(pairs), 1.0)])
    assert model.adapter_version == version + 1


# ---------------------------------------------------------------- the text encoder


@pytest.mark.parametrize("linear", [Linear, StoredLinear])
@pytest.mark.parametrize(
    "prefix", ["lora_te_model_", "text_encoder.model.", "text_encoders.qwen3_4b.transformer.model.", "lora_te1_"]
)
def test_text_encoder_keys_are_applied_to_the_encoder(model, linear, prefix, caplog):
    torch.manual_seed(0)
    config = TextEncoderConfig(50, 32, 48, 2, 2, 1, 16)
    encoder = TextEncoder(config, linear).eval().requires_grad_(False)
    if linear is StoredLinear:
        for module in encoder.modules():
            if isinstance(module, StoredLinear):
                module.load("float", {"weight": torch.randn(*module.shape) / 6})
    ids = torch.arange(7)[None]
    before = encoder(ids)
    down, up = torch.randn(2, 32), torch.randn(48, 2)
    names = [f"layers.{i}.mlp.gate_proj" for i in (1, 2)]  # layer 2 is the one that is not run
    if prefix.startswith("lora_"):
        names = [name.replace(".", "_") for name in names]
    tensors = {f"{prefix}{n}.lora_{h}.weight": t for n in names for h, t in (("down", down), ("up", up))}
    loaded = Lora.from_tensors(tensors)
    assert (loaded.report.transformer, loaded.report.text_encoder) == (0, 2)
    lora.apply(encoder, [(loaded, 0.5)])
    assert "layers.2.mlp.gate_proj: ignored" in caplog.text
    gate = encoder.layers[1].mlp.gate_proj
    x = torch.randn(3, 32)
    merged = gate.dense_weight() + 0.5 * up @ down
    assert torch.allclose(gate(x), x @ merged.T, atol=1e-4) and not torch.equal(encoder(ids), before)
    lora.apply(encoder, [])
    assert torch.equal(encoder(ids), before)
    lora.apply(model, [(loaded, 1.0)])  # and the transformer is left alone
    assert all(m.adapter is None for m in model.modules() if hasattr(m, "set_adapter"))


# ---------------------------------------------------------------- reports and refusals


def test_report(tmp_path, caplog):
    pairs = random_pairs(modules={"layers.0.attention.to_q": (DIM, DIM)})
    tensors = written("ai-toolkit", pairs) | {
        "diffusion_model.something.else.lora_A.weight": torch.ones(1, 1),
        "lora_te_model_layers_0_mlp_up_proj.lora_down.weight": torch.ones(1, 8),
        "lora_te_model_layers_0_mlp_up_proj.lora_up.weight": torch.ones(8, 1),
        "diffusion_model.layers.0.attention.to_k.lora_A.weight": torch.ones(1, DIM),
        "diffusion_model.layers.0.attention.to_k.lora_B.weight": torch.ones(DIM, 1),
        "diffusion_model.layers.0.attention.to_k.alpha": torch.tensor(0.0),
    }
    path = tmp_path / "zimage_turbo_training_adapter_v2.safetensors"
    save_file(tensors, path)
    report = load_lora(path).report
    assert "training adapter" in caplog.text and len(report.warnings) == 1
    assert report.unmatched == ("diffusion_model.something.else.lora_A.weight",)
    assert set(report.ignored.values()) == {"alpha is 0: without effect"} and len(report.ignored) == 3
    assert len(report.matched) == 4 and report.text_encoder == 1
    summary = report.summary()
    assert "something.else" in summary and "alpha is 0" in summary and "text encoder" in summary
    header = inspect(path)
    assert (header.unmatched, header.warnings) == (report.unmatched, report.warnings)


def test_alpha_of_peft_and_diffusers_metadata(tmp_path):
    pairs = random_pairs(modules={"layers.0.attention.to_q": (DIM, DIM), "layers.0.feed_forward.w2": (DIM, FFN)})
    config = {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"feed_forward.w2": 2},
        "use_rslora": False,
        "peft_type": "LORA",
    }
    save_file(
        written("diffusers", pairs),
        tmp_path / "a.safetensors",
        {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})},
    )
    save_file(written("PEFT", pairs), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for name in ("a.safetensors", "adapter_model.safetensors"):
        loaded = load_lora(tmp_path / name)
        assert {t: d[0].scale for t, d in loaded.transformer.items()} == {
            "layers.0.attention.to_qkv": 2.0,
            "layers.0.feed_forward.w2": 0.5,
        }


W2 = "diffusion_model.layers.0.feed_forward.w2"
LOW = {f"{W2}.lora_A.weight": torch.ones(4, FFN), f"{W2}.lora_B.weight": torch.ones(DIM, 4)}
BROKEN = {
    "missing up": ({f"{W2}.lora_A.weight": torch.ones(4, FFN)}, r"w2: LoRA with .*lora_A.*expected up too"),
    "missing down": ({f"{W2}.lora_B.weight": torch.ones(4, FFN)}, "expected down too"),
    "missing hada": ({f"{W2}.hada_w1_a": torch.ones(4, 2)}, "expected hada_w1_b, hada_w2_a, hada_w2_b too"),
    "missing lokr": ({f"{W2}.lokr_w1": torch.ones(4, 2), f"{W2}.lokr_w2_a": torch.ones(4, 2)}, "lokr_w2.* too"),
    "ranks differ": (LOW | {f"{W2}.lora_B.weight": torch.ones(DIM, 3)}, "expected one rank, found 3 and 4"),
    "NaN": (
        LOW | {f"{W2}.lora_B.weight": torch.full((DIM, 4), torch.nan)},
        "lora_B.weight: expected numbers, found NaN",
    ),
    "NaN alpha": (LOW | {f"{W2}.alpha": torch.tensor(torch.nan)}, "alpha: expected numbers"),
    "alpha vector": (LOW | {f"{W2}.alpha": torch.ones(3)}, "alpha: expected one number"),
    "vector": (LOW | {f"{W2}.lora_B.weight": torch.ones(DIM)}, "expected a matrix"),
    "empty": ({f"{W2}.lora_A.weight": torch.ones(0, FFN), f"{W2}.lora_B.weight": torch.ones(DIM, 0)}, "not empty"),
    "3x3": (LOW | {f"{W2}.lora_A.weight": torch.ones(4, FFN, 3, 3)}, "expected a matrix"),
    "integers": (
        LOW | {f"{W2}.lora_A.weight": torch.ones(4, FFN, dtype=torch.int8)},
        "expected BF16, F16 or F32, found I8",
    ),
    "magnitude alone": ({f"{W2}.dora_scale": torch.ones(DIM, 1)}, "DoRA without its LoRA"),
    "two adapters": (
        {f"{W2}.lora_{h}.{n}.weight": torch.ones(2, 2) for h in "AB" for n in ("one", "two")},
        "two adapters in one file",
    ),
    "BOFT": ({f"{W2}.oft_blocks": torch.ones(2, 3, 4, 4)}, "BOFT"),
    "oft_R": ({f"{W2}.oft_R.weight": torch.ones(2, 3)}, "oft_R"),
    "GLoRA": ({f"{W2}.a1.weight": torch.ones(2, 3)}, "GLoRA is not read"),
    "Flux": ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(1, 1)}, "found one for Flux"),
    "SD": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(1, 1)}, "Stable Diffusion"),
    "nothing": ({"x": torch.ones(1)}, "expected a LoRA for Z-Image, found another kind of file"),
}


@pytest.mark.parametrize("tensors, message", BROKEN.values(), ids=BROKEN)
def test_damaged_and_foreign_files_are_refused_in_a_sentence(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_lora(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "module, down, up",
    [
        ("layers.0.feed_forward.w2", (4, 2304), (DIM, 4)),
        ("layers.0.attention.to_q", (4, DIM), (3 * DIM, 4)),
        ("layers.29.attention.to_q", (4, DIM), (DIM, 4)),
        ("layers.0.attention_norm1", (4, DIM), (DIM, 4)),
    ],
)
def test_wrong_widths_are_refused_by_name_with_nothing_applied(model, module, down, up):
    good = from_pairs(random_pairs())
    lora.apply(model, [(good, 1.0)])
    before = picture(model)
    bad = from_pairs({module: (torch.ones(down), torch.ones(up))}, name="bad.safetensors")
    with pytest.raises(ValueError, match=f"bad.safetensors: {module}: expected"):
        lora.apply(model, [(good, 1.0), (bad, 1.0)])
    with pytest.raises(ValueError, match="strength of up to 100"):
        lora.apply(model, [(good, float("nan"))])
    assert torch.equal(picture(model), before)


def test_fuzzed_files_raise_a_sentence_or_load(tmp_path, model):
    """Tensors dropped, reshaped and renamed at random: never any other error, never half applied."""
    rng = random.Random(0)
    before = picture(model)
    loaded = 0
    for _ in range(150):
        tensors = {}
        for _, module, leaves, _ in rng.sample(FORMATS, rng.randint(1, 2)):
            for leaf, tensor in leaves.items():
                if rng.random() < 0.1:
                    tensor = torch.zeros([rng.choice((0, 1, 4, 384)) for _ in range(rng.randint(0, 4))])
                if rng.random() < 0.1:
                    leaf = rng.choice(list(rng.choice(FORMATS)[2]))
                if rng.random() < 0.9:
                    tensors[f"{module}.{leaf}"] = tensor
        try:
            found = Lora.from_tensors(tensors)
            lora.apply(model, [(found, 1.0)])
            loaded += 1
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) > 20
            assert model.adapters == ()
        finally:
            lora.apply(model, [])
    assert 20 < loaded < 130
    assert torch.equal(picture(model), before)


def test_a_full_size_plan_needs_no_tensors():
    """Names and widths of a rank-32 LoRA of the real model."""
    config = ZImageConfig()
    shapes = {}
    for i in range(config.n_layers):
        for part in ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"):
            shapes[f"diffusion_model.layers.{i}.{part}.lora_A.weight"] = (32, config.dim)
            shapes[f"diffusion_model.layers.{i}.{part}.lora_B.weight"] = (config.dim, 32)
    sources, report = read_plan("real", shapes, {})
    assert report.transformer == 60 and len(sources) == 120 and not report.unmatched


# ---------------------------------------------------------------- pipeline and command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A LoRA of every linear, one of the text encoder, and one for another model."""
    folder = tmp_path_factory.mktemp("loras")
    save_file(written("ai-toolkit", random_pairs()), folder / "style.safetensors")
    g = torch.Generator().manual_seed(0)
    encoder = {
        "lora_te_model_layers_0_mlp_down_proj": (torch.randn(2, 96, generator=g), torch.randn(64, 2, generator=g))
    }
    save_file(
        {f"{m}.lora_{h}.weight": t for m, p in encoder.items() for h, t in zip(("down", "up"), p)},
        folder / "encoder.safetensors",
    )
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(1, 1)}, folder / "flux.safetensors")
    return folder


def test_pipeline_draws_with_loras_and_without_them_again(tiny_files, files):
    pipe = load_pipeline(**tiny_files, device="cpu", dtype="float32")

    def draw(*loras):
        pipe.set_loras(loras)
        steps = []
        pipe("a cat", 32, 32, 1, generator=1, on_step=lambda done, total, latents: steps.append(latents))
        return steps[-1].numpy().tobytes()

    plain = draw()
    for name in ("style", "encoder"):
        path = files / f"{name}.safetensors"
        pictures = {draw((path, 1.0)), draw((path, -1.0)), draw((load_lora(path), 0.5))}
        assert len(pictures) == 3 and plain not in pictures
        assert draw((path, 0.0)) == plain
    assert draw() == plain
    assert not {"load transformer", "load VAE"} & {stage.name for stage in pipe.stages}, "they are not read again"


@pytest.mark.parametrize(
    ("style", "precision"),
    [
        ("every linear", "w4a16"),
        *(("every linear", "w4a4"), ("norms and tokens", "w4a4"), ("LoHa 24", "w4a4"), ("LoKr w2 factored", "w4a4")),
        *(("DoRA out", "w4a4"), ("DoRA in, k", "w4a4"), ("OFT", "w4a4"), ("diff", "w4a4")),
    ],
)
def test_the_plan_counts_loras_before_the_model_is_read(tiny_files, style, precision):
    """Weights as planned from headers are those of the model with its adapters, on the device and in a slot."""
    if style == "every linear":
        chosen = [(from_pairs(random_pairs(rank=6)), 0.5), (from_pairs(random_pairs(1, 20)), 1.0)]
    elif style == "norms and tokens":
        tensors = {"layers.0.attention_norm1.diff": torch.ones(DIM), "x_pad_token.diff": torch.ones(1, DIM)}
        chosen = [(Lora.from_tensors({f"diffusion_model.{k}": t for k, t in tensors.items()}), 1.0)]
    else:
        module, leaves = next(f[1:3] for f in FORMATS if f[0] == style)
        chosen = [(Lora.from_tensors({f"diffusion_model.{module}.{k}": t for k, t in leaves.items()}), 1.0)]
    pipe = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision=precision, vram_budget=64)
    model = load_transformer(tiny_files["model"], dtype=torch.float32, precision=precision)
    bare = weights(model.blocks, model).total
    lora.apply(model, chosen)
    planned = weights(model.blocks, model).total
    assert planned > bare
    for loras, expected in ((chosen, planned), (chosen, planned), ([], bare)):  # before the model is read, and after
        plan = pipe("a cat", 32, 32, 1, generator=1, loras=loras).plan
        assert plan.stage("transformer").weights == expected


def test_the_plan_before_the_model_is_read_counts_no_lora_where_there_is_none(tiny_files):
    pipe = load_pipeline(**tiny_files, device="cpu", dtype="float32", precision="w4a4", vram_budget=64)
    model = load_transformer(tiny_files["model"], dtype=torch.float32, precision="w4a4")
    for _ in range(2):
        plan = pipe("a cat", 32, 32, 1, generator=1).plan
        assert plan.stage("transformer").weights == weights(model.blocks, model).total


def test_a_lora_that_does_not_fit_is_told_before_any_work(tiny_files):
    pipe = load_pipeline(**tiny_files, device="cpu", dtype="float32")
    pipe.set_loras([(from_pairs({"layers.7.attention.to_q": (torch.ones(1, DIM), torch.ones(DIM, 1))}), 1.0)])
    stages = []
    with pytest.raises(ValueError, match="expected a model with layers.7"):
        pipe("a cat", 32, 32, 1, on_stage=lambda *stage: stages.append(stage))
    assert not stages


def test_command_line(tiny_files, files, tmp_path, capsys):
    from PIL import Image

    from zimage_core import cli, notation

    options = [f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()]
    options += ["--width=32", "--height=32", "--steps=1", "--seed=1", "--device=cpu", f"--out={tmp_path / 'x.png'}"]
    pictures = set()
    for loras in ([], [f"--lora={files / 'style.safetensors'}:-0.5", f"--lora={files / 'encoder.safetensors'}"]):
        assert cli.main(["generate", "a cat", *options, *loras]) == 0
        with Image.open(tmp_path / "x.png") as image:
            pictures.add(image.tobytes())
            settings = json.loads(image.text["zimage"])
    assert len(pictures) == 2
    assert settings["loras"] == [["style.safetensors", -0.5], ["encoder.safetensors", 1.0]]
    assert notation.lora(r"C:\a.safetensors") == (r"C:\a.safetensors", 1.0)
    capsys.readouterr()
    assert cli.main(["inspect", str(files / "style.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "a LoRA" and facts["by_format"] == {"LoRA": len(MODULES)} and facts["unmatched"] == []
    assert cli.main(["inspect", str(files / "encoder.safetensors")]) == 0
    assert "text encoder modules: 1" in capsys.readouterr().out
    for arguments in (["inspect"], ["generate", "x", *options, "--lora"]):
        assert cli.main([*arguments, str(files / "flux.safetensors")]) == 2
        assert "found one for Flux" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["frame", "grey"])
def test_the_bundled_loras_show_with_strength(style, monkeypatch):
    """Read from the pixels: the frame grows pink, the colours go."""
    import numpy as np

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "demo_training")
    import train_lora

    assert demo_loras()[style].stat().st_size < 400_000
    pipe = load_pipeline(device="cpu")
    seen = []
    for strength in (0.0, 0.5, 1.0):
        pipe.set_loras([(demo_loras()[style], strength)])
        pictures = pipe(["a red circle on a blue background", "a green star on white"], 128, 128, generator=3)
        seen.append(np.mean([train_lora.measure(np.asarray(picture), style) for picture in pictures]))
    if style == "frame":
        assert seen[0] < 0.02 and seen[0] <= seen[1] < seen[2] and seen[2] > 0.8
    else:
        assert seen[0] > seen[1] > seen[2] and seen[2] < 0.25 * seen[0]
