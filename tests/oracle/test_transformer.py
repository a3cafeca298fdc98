"""The transformer against diffusers' class over the same weights, and against the golden tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.formats.load import load_transformer
from zimage_core.linear.backends import reference
from zimage_core.linear.svdq import SVDQLinear
from zimage_core.models.config import ZImageConfig
from zimage_core.models.transformer import Block, ZImageTransformer, rope_angles
from zimage_core.sampler import predict_flow

diffusers = pytest.importorskip("diffusers")

TINY = Path(__file__).parent.parent / "data" / "tiny_ckpt"
SMALL = {
    "dim": 384,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "cap_feat_dim": 64,
    "axes_dims": (16, 24, 24),
    "axes_lens": (600, 64, 64),
}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights under which activations stay O(1) and every parameter matters (norms off 1, pads off 0)."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim == 2 and p.shape[0] > 1 else 0.3
        p.data = torch.randn(p.shape, generator=gen) * scale + (1.0 if p.ndim == 1 and scale == 0.3 else 0.0)
    return module.eval()


def theirs(config: dict, seed: int = 0) -> torch.nn.Module:
    keys = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    model = diffusers.ZImageTransformer2DModel(n_kv_heads=config["n_heads"], **keys)
    return randomize(model, seed)


def run_theirs(model, latents, t, caps):
    with torch.no_grad():
        out = model([x[:, None] for x in latents], t, caps).sample
    return torch.stack([x[:, 0] for x in out])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' small model, and ours loaded from the file that it saves."""
    reference = theirs(SMALL)
    path = tmp_path_factory.mktemp("small") / "dense.safetensors"
    config = {"_class_name": "ZImageTransformer2DModel", **SMALL}
    save_file(reference.state_dict(), path, metadata={"config": json.dumps(config)})
    return reference, load_transformer(path, dtype=torch.float32)


def inputs(batch, height, width, lengths, seed=1, cap_dim=64):
    gen = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 16, height // 8, width // 8, generator=gen)
    caps = [torch.randn(n, cap_dim, generator=gen) for n in lengths]
    t = torch.linspace(0.05, 0.95, batch)
    return latents, t, caps


@pytest.mark.parametrize("size", [(64, 64), (64, 112), (208, 48), (16, 16), (256, 256), (144, 80)])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 200, 512])
@torch.no_grad()
def test_equals_diffusers(pair, size, length):
    reference, model = pair
    latents, t, caps = inputs(1, *size, [length])
    out = model(latents, t, model.prepare(caps, *size))
    assert out.dtype == latents.dtype
    assert relative(out, run_theirs(reference, latents, t, caps)) <= 1e-4


@torch.no_grad()
def test_batch_of_unequal_captions(pair):
    reference, model = pair
    latents, t, caps = inputs(4, 80, 112, [1, 40, 33, 100])
    out = model(latents, t, model.prepare(caps, 80, 112))
    assert relative(out, run_theirs(reference, latents, t, caps)) <= 1e-4
    for i in range(4):
        alone = model(latents[i : i + 1], t[i : i + 1], model.prepare([caps[i]], 80, 112))
        assert relative(out[i : i + 1], alone) <= 1e-5


@torch.no_grad()
def test_one_caption_is_shared_by_the_batch(pair):
    _, model = pair
    latents, t, caps = inputs(4, 64, 64, [20])
    shared = model(latents, t, model.prepare(caps, 64, 64))
    assert relative(shared, model(latents, t, model.prepare(caps * 4, 64, 64))) <= 1e-5


@torch.no_grad()
def test_positions_beyond_the_table_of_lengths(pair):
    """diffusers' table ends at axes_lens; a wider model-side table must give what ours computes."""
    reference, model = pair
    latents, t, caps = inputs(1, 16, 2048, [5])
    reference.rope_embedder.axes_lens, reference.rope_embedder.freqs_cis = [600, 256, 256], None
    out = model(latents, t, model.prepare(caps, 16, 2048))
    assert relative(out, run_theirs(reference, latents, t, caps)) <= 1e-4


@pytest.fixture(scope="module")
def wide_block():
    """diffusers' block of the real width, with modulation."""
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

    with torch.device("meta"):  # without the class's own random numbers
        block = ZImageTransformerBlock(0, 3840, 30, 30, 1e-5, True, modulation=True)
    return randomize(block.to_empty(device="cpu"), 3)


@pytest.mark.parametrize("modulated", [True, False])
@torch.no_grad()
def test_one_block_at_the_real_width(wide_block, modulated):
    from diffusers.models.transformers.transformer_z_image import RopeEmbedder, ZImageTransformerBlock

    config, reference = ZImageConfig(), wide_block
    assert config.ffn_dim == 10240
    if not modulated:
        with torch.device("meta"):
            reference = ZImageTransformerBlock(0, 3840, 30, 30, 1e-5, True, modulation=False).eval()
        kept = {name: t for name, t in wide_block.state_dict().items() if not name.startswith("adaLN_modulation.")}
        reference.load_state_dict(kept, assign=True)
    with torch.device("meta"):
        block = Block(config, torch.nn.Linear, modulated).eval()
    state = reference.state_dict()
    qkv = torch.cat([state.pop(f"attention.to_{x}.weight") for x in "qkv"])
    w3_w1 = torch.cat([state.pop(f"feed_forward.{x}.weight") for x in ("w3", "w1")])
    state |= {"attention.to_qkv.weight": qkv, "feed_forward.w3_w1.weight": w3_w1}
    state["attention.to_out.weight"] = state.pop("attention.to_out.0.weight")
    block.load_state_dict(state, assign=True)

    gen = torch.Generator().manual_seed(4)
    x = torch.randn(1, 6, 3840, generator=gen)
    t_emb = torch.randn(1, 256, generator=gen) if modulated else None
    ids = torch.tensor([[1, 0, 0], [2, 0, 0], [33, 0, 0], [33, 0, 1], [33, 1, 0], [0, 0, 0]])
    freqs = RopeEmbedder(256.0, [32, 48, 48], [1536, 512, 512])(ids)[None]
    cos, sin = (y[None] for y in rope_angles(ids, config))
    expected = reference(x, None, freqs, t_emb)
    assert relative(block(x, cos, sin, None, t_emb), expected) <= 1e-4


@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize(
    "dtype, key, tolerance",
    [(torch.float32, "out_w4a16", 1e-4), (torch.bfloat16, "out_w4a16_all_bf16", 1.2e-2)],
)
@torch.no_grad()
def test_golden_checkpoint(sample, dtype, key, tolerance):
    io = load_file(TINY / "io.safetensors")
    model = load_transformer(TINY / "svdq-int4_r32-z-image-tiny.safetensors", dtype=dtype, precision="w4a16")
    latents, caps = io[f"s{sample}.x"][None, :, 0].to(dtype), io[f"s{sample}.cap_feats"]
    cond = model.prepare([caps], latents.shape[2] * 8, latents.shape[3] * 8)
    t = io[f"s{sample}.t"]
    out = model(latents, t, cond)
    assert relative(out[0], io[f"s{sample}.{key}"][:, 0]) <= tolerance
    sigma = 1 - t
    assert torch.equal(predict_flow(model, latents, sigma, cond), -model(latents, 1 - sigma, cond))


@torch.no_grad()
def test_fp16_saturates_instead_of_overflowing(pair):
    """Outliers that overflow fp16 in the residual stream and in SwiGLU leave a finite, correct picture."""
    _, model = pair
    half = ZImageTransformer(model.config).half().eval()
    full = ZImageTransformer(model.config).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for block in ("layers.0", "layers.1", "noise_refiner.0"):
        state[f"{block}.feed_forward.w3_w1.weight"][:8] *= 3e2
        state[f"{block}.ffn_norm2.weight"][:4] = 6e4
    full.load_state_dict(state)
    half.load_state_dict(state)
    latents, t, caps = inputs(1, 64, 64, [40])
    expected = full(latents, t, full.prepare(caps, 64, 64))
    out = half(latents, t, half.prepare(caps, 64, 64))
    assert out.isfinite().all()
    assert torch.nn.functional.cosine_similarity(out.flatten(), expected.flatten(), dim=0) >= 0.999


@torch.no_grad()
def test_a_conditioning_is_refused_where_it_does_not_fit(pair):
    _, model = pair
    latents, t, caps = inputs(3, 64, 64, [5, 6])
    with pytest.raises(ValueError, match="multiples of 16"):
        model.prepare(caps, 64, 60)
    with pytest.raises(ValueError, match="text encoder"):
        model.prepare([torch.zeros(4, 65)], 64, 64)
    with pytest.raises(ValueError, match="2 pictures, latents hold 3"):
        model(latents, t, model.prepare(caps, 64, 64))
    with pytest.raises(ValueError, match="latents: expected"):
        model(latents, t, model.prepare(caps[:1], 64, 80))


def test_int4_stays_four_bits(monkeypatch):
    """Held per linear: codes at half a byte, scales and low rank in 16 bits; only tiny linears keep more."""
    assert reference.DENSE < 3840 * 3840
    monkeypatch.setattr(reference, "DENSE", 0)
    model = load_transformer(TINY / "svdq-int4_r32-z-image-tiny.safetensors", backend="torch", precision="w4a16")
    linear = model.layers[0].feed_forward.w3_w1
    assert isinstance(linear, SVDQLinear)
    held = sum(b.numel() * b.element_size() for b in linear.buffers())
    n, k, r = 2048, 384, 32
    assert held == n * k // 2 + 2 * (n * k // 64 + k + r * (n + k))
