"""The VAE against diffusers' AutoencoderKL, its file reader, and tiling.

`tests/data/vae_bfl_keys.json`: names and shapes of `ae.safetensors` as ComfyUI's own classes have them
(`comfy/ldm/modules/diffusionmodules/model.py@v0.33.0`, ch 128, ch_mult 1 2 4 4, 2 blocks, 16 channels).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zimage_core.formats import vae as vae_files
from zimage_core.formats.names import vae_tensor
from zimage_core.formats.vae import load_vae
from zimage_core.models import vae as vae_module
from zimage_core.models.vae import VAE, VAEConfig, decode_image, tiled

diffusers = pytest.importorskip("diffusers")
BFL_KEYS = json.loads((Path(__file__).parents[1] / "data" / "vae_bfl_keys.json").read_text())
SMALL = {"block_out_channels": [32, 64, 64, 96], "layers_per_block": 1, "norm_num_groups": 32}


def oracle(**changes) -> nn.Module:
    config = {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        **SMALL,
        **changes,
    }
    levels = len(config["block_out_channels"])
    config["down_block_types"] = ["DownEncoderBlock2D"] * levels
    config["up_block_types"] = ["UpDecoderBlock2D"] * levels
    return diffusers.AutoencoderKL(**config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = oracle()
    for name, p in model.named_parameters():  # norms and biases that differ from 1 and 0, so that every tensor counts
        if p.ndim == 1:
            p.add_(torch.randn_like(p) * 0.2 if "norm" in name else torch.randn_like(p) * 0.05)
    return model


@pytest.fixture(scope="module")
def tensors(model) -> dict[str, torch.Tensor]:
    return {name: t.contiguous() for name, t in model.state_dict().items()}


def bfl_name(name: str, levels: int) -> str:
    """diffusers name -> BFL name, written apart from the table under test."""
    half, *rest = name.split(".")
    leaf = rest[-1]
    if rest[0] == "conv_norm_out":
        return f"{half}.norm_out.{leaf}"
    if rest[0] in ("conv_in", "conv_out"):
        return name
    if rest[0] == "mid_block":
        if rest[1] == "resnets":
            return ".".join([half, "mid", f"block_{int(rest[2]) + 1}", *rest[3:]])
        part = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[rest[3]]
        return f"{half}.mid.attn_1.{part}.{leaf}"
    level = int(rest[1])
    side = f"down.{level}" if half == "encoder" else f"up.{levels - 1 - level}"
    if rest[2] == "resnets":
        part = rest[4].replace("conv_shortcut", "nin_shortcut")
        return f"{half}.{side}.block.{rest[3]}.{part}.{leaf}"
    return f"{half}.{side}.{'downsample' if half == 'encoder' else 'upsample'}.conv.{leaf}"


def as_bfl(tensors: dict[str, torch.Tensor], levels: int = 4) -> dict[str, torch.Tensor]:
    return {
        bfl_name(name, levels): t[..., None, None] if "attentions" in name and t.ndim == 2 else t
        for name, t in tensors.items()
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, model, tensors) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("vae")
    save_file(tensors, base / "diffusers.safetensors")
    save_file(tensors, base / "metadata.safetensors", metadata={"config": json.dumps(dict(model.config))})
    save_file(as_bfl(tensors), base / "bfl.safetensors")
    model.save_pretrained(base / "folder")
    return {p.stem: p for p in base.iterdir()}


# (H, W): square, multiples of 8 that are none of 16, and one cell high
@pytest.mark.parametrize("size", [(32, 32), (40, 72), (8, 56)])
@pytest.mark.parametrize("style", ["diffusers", "metadata", "bfl", "folder"])
def test_equals_diffusers(written, model, style, size):
    vae = load_vae(written[style])
    assert vae.config == VAEConfig((32, 64, 64, 96), 1)
    h, w = size
    images = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean = model.encode(images).latent_dist.mean
    latents = vae.encode(images)
    assert latents.shape == (2, 16, h // 8, w // 8)
    assert relative(latents, (mean - 0.1159) * 0.3611) <= 1e-5
    assert relative(vae.encoder(images), model.encoder(images)) <= 1e-5  # with the log variance
    raw = torch.randn(2, 16, h // 8, w // 8, generator=torch.Generator().manual_seed(2))
    expected = model.decode(raw).sample
    assert relative(vae.decode((raw - 0.1159) * 0.3611), expected) <= 1e-5
    image = decode_image(vae, (raw - 0.1159) * 0.3611)
    assert image.shape == (2, h, w, 3) and image.dtype == torch.float32
    assert torch.allclose(image, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-5)


def test_norm_groups_scale_and_shift_come_from_the_metadata(tmp_path):
    model = oracle(norm_num_groups=8, block_out_channels=[24, 40], scaling_factor=0.5, shift_factor=0.25)
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"config": json.dumps(dict(model.config))})
    vae = load_vae(tmp_path / "a.safetensors")
    assert vae.config == VAEConfig((24, 40), 1, 16, 8, 0.5, 0.25)
    images = torch.rand(1, 3, 12, 20) * 2 - 1
    assert relative(vae.encode(images), (model.encode(images).latent_dist.mean - 0.25) * 0.5) <= 1e-5


def test_full_size_names_and_shapes():
    """The real config on the meta device, against diffusers' class and against the names in ae.safetensors."""
    with torch.device("meta"):
        ours = {name: list(p.shape) for name, p in VAE().state_dict().items()}
        theirs = oracle(block_out_channels=[128, 256, 512, 512], layers_per_block=2).state_dict()
    assert ours == {name: list(p.shape) for name, p in theirs.items()}
    renamed = {vae_tensor(key, 4)[0]: shape for key, shape in BFL_KEYS.items()}
    linear = [name for name in ours if "attentions" in name and len(ours[name]) == 2]
    assert renamed == {name: [*shape, 1, 1] if name in linear else shape for name, shape in ours.items()}
    assert {bfl_name(name, 4) for name in ours} == set(BFL_KEYS)  # the writer used in this file
    shapes = {name: shape[:2] if name in linear else shape for name, shape in renamed.items()}
    assert vae_files.config_from_shapes(shapes) == VAEConfig()


def test_bf16_is_close_and_trainable_under_autocast(written):
    vae, half = load_vae(written["bfl"]), load_vae(written["bfl"], dtype=torch.bfloat16)
    assert half.decoder.conv_in.weight.dtype == torch.bfloat16
    latents = torch.randn(1, 16, 6, 6)
    decoded = half.decode(latents)
    assert decoded.dtype == torch.float32 and half.encode(decoded).dtype == torch.float32
    # bf16 keeps 8 bits: 0.4% per operation, about 25 of them in a row
    assert relative(decoded, vae.decode(latents)) <= 0.05
    vae.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = vae.encoder(torch.rand(2, 3, 16, 16)).chunk(2, dim=1)
        loss = vae.decoder(mean + torch.randn_like(mean) * (logvar / 2).exp()).float().pow(2).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def test_tiles_blend_to_the_whole():
    """A function of single cells gives the same in tiles; one of 3 x 3 cells differs by a faded border only."""
    x = torch.randn(1, 1, 37, 50)
    double = nn.Upsample(scale_factor=8)
    for tile, overlap in ((12, 3), (16, 8), (37, 9), (64, 16)):
        assert torch.allclose(tiled(double, x, tile, overlap, 1, 8), double(x), atol=1e-5)
        pixels = double(x)
        shrink = nn.AvgPool2d(8)
        assert torch.allclose(tiled(shrink, pixels, tile, overlap, 8, 1), x, atol=1e-5)
    # Tiles of constants 0, 1, 2 ...: the largest step from pixel to pixel is the ramp's, 1 / (overlap in pixels).
    count = iter(range(100))
    ramp = tiled(lambda p: torch.full_like(double(p), float(next(count))), x[..., :12, :], 12, 3, 1, 8)
    assert ramp.max() == 5 and ramp.diff(dim=-1).abs().max() <= 1 / 24 + 1e-5


def test_tiled_vae_has_no_seams(written, monkeypatch):
    """Tiled against whole, for decode and encode, on noise, whose statistics are alike in every tile.

    Borders of tiles see zeros instead of their neighbours, and attention sees one tile only: with random weights and
    tiles of 128 pixels that is up to 0.2 (decode), 0.25 (encode) of the picture. What must not be is a step where a
    tile begins or ends: from pixel to pixel the difference may change there no more than anywhere (x 1.5, for chance).
    Without blending it changes several times as much.
    """
    monkeypatch.setattr(vae_module, "TILES", (16, 8))
    vae = load_vae(written["bfl"])
    latents = torch.randn(1, 16, 16, 40, generator=torch.Generator().manual_seed(3))
    whole, blended = vae.decode(latents, "off"), vae.decode(latents, "on")
    assert relative(blended, whole) <= 0.2
    images = whole.clamp(-1, 1)
    assert relative(vae.encode(images, "on"), vae.encode(images, "off")) <= 0.25
    monkeypatch.setattr(vae_module, "_ramp", lambda length, *_: torch.ones(length))
    steps = {"blended": blended, "hard": vae.decode(latents, "on")}
    ends = [8 * c - 1 for c in (12, 16, 24, 28)]  # tiles are cells 0-15, 12-27, 24-39
    seams = {}
    for name, picture in steps.items():
        step = (picture - whole).diff(dim=-1).abs().mean(dim=(0, 1, 2))
        seams[name] = (step[ends].max() / step.mean()).item()
    assert seams["blended"] <= 1.5 and seams["hard"] >= 3


def test_large_pictures_are_tiled_at_once(written, monkeypatch):
    monkeypatch.setattr(vae_module, "TILES", (16, 8))
    monkeypatch.setattr(vae_module, "AUTO_PIXELS", 128 * 192)
    vae = load_vae(written["diffusers"])
    for columns, tiling in ((24, "off"), (32, "on")):
        latents = torch.randn(1, 16, 16, columns)
        assert torch.equal(vae.decode(latents), vae.decode(latents, tiling))
        images = torch.rand(1, 3, 128, 8 * columns)
        assert torch.equal(vae.encode(images), vae.encode(images, tiling))
    with pytest.raises(ValueError, match="tiling: expected 'auto', 'on' or 'off', found 'yes'"):
        vae.decode(latents, "yes")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_goes_on_in_tiles(written, monkeypatch, caplog, error):
    """Pictures too large for a pretended memory: tiles of 16 cells do not fit either, those of 8 do."""
    monkeypatch.setattr(vae_module, "TILES", (16, 8))
    vae = load_vae(written["diffusers"])
    latents, images = torch.randn(2, 16, 12, 20), torch.rand(2, 3, 96, 160)
    expected = []
    for function, x in ((vae.decode, latents), (vae.encode, images)):
        monkeypatch.setattr(vae_module, "TILES", (8,))
        expected.append(function(x, "on"))
    monkeypatch.setattr(vae_module, "TILES", (16, 8))
    seen = []

    def limited(forward, cells, shape_of):
        def run(x):
            seen.append(shape_of(x))
            if x.shape[2] * x.shape[3] > cells:
                raise error
            return forward(x)

        return run

    for half, cells in ((vae.decoder, 64), (vae.encoder, 64 * 64)):
        monkeypatch.setattr(half, "forward", limited(half.forward, cells, lambda x: tuple(x.shape)))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(vae.decode(latents), expected[0])
        assert torch.equal(vae.encode(images), expected[1])
    assert len(caplog.records) == 4 and "out of memory" in caplog.text and "tiles of 8 cells" in caplog.text
    assert seen.count((1, 16, 12, 20)) == 1  # the second picture starts with what worked for the first
    with pytest.raises(type(error)):
        vae.decode(latents, "off")


def test_other_errors_are_not_taken_for_memory(written, monkeypatch):
    vae = load_vae(written["diffusers"])
    monkeypatch.setattr(vae.decoder, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("device-side assert")))
    with pytest.raises(RuntimeError, match="device-side assert"):
        vae.decode(torch.randn(1, 16, 4, 4))


def test_fp16_is_refused_but_an_fp16_file_is_read(tmp_path, tensors, written):
    for action in (
        lambda: load_vae(written["diffusers"], dtype=torch.float16),
        lambda: load_vae(written["diffusers"]).half().decode(torch.randn(1, 16, 4, 4)),
        lambda: load_vae(written["diffusers"]).half().encode(torch.randn(1, 3, 32, 32)),
    ):
        with pytest.raises(ValueError, match="expected torch.float32 or torch.bfloat16, found torch.float16; .*black"):
            action()
    save_file({name: t.half() for name, t in tensors.items()}, tmp_path / "half.safetensors")
    vae = load_vae(tmp_path / "half.safetensors")
    assert all(p.dtype == torch.float32 for p in vae.parameters())
    latents = torch.randn(1, 16, 4, 4)
    assert relative(vae.decode(latents), load_vae(written["diffusers"]).decode(latents)) <= 1e-2


def test_wrong_shapes_in_use(written):
    vae = load_vae(written["diffusers"])
    with pytest.raises(ValueError, match=r"divisible by 8, found \(1, 3, 36, 32\); crop or resize"):
        vae.encode(torch.rand(1, 3, 36, 32))
    with pytest.raises(ValueError, match=r"expected latents \(B, 16, h, w\), found \(1, 4, 8, 8\)"):
        vae.decode(torch.rand(1, 4, 8, 8))


def one_sentence(path: Path, *parts: str) -> None:
    """Loading `path` fails with one line that names the file and holds every part."""
    with pytest.raises(ValueError) as caught:
        load_vae(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for part in parts:
        assert part in message, message


ONE = torch.zeros(1)
CONV = torch.zeros(4, 4, 3, 3)
WRONG_FILES = {
    "taef1_decoder": ({"0.weight": CONV, "2.conv.0.weight": CONV}, "a tiny autoencoder (taef1, TAESD)"),
    "taef1_diffusers": ({"decoder.layers.0.weight": CONV, "encoder.layers.0.weight": CONV}, "a tiny autoencoder"),
    "transformer": ({"layers.0.attention.to_q.weight": ONE, "x_embedder.weight": ONE}, "a Z-Image transformer"),
    "text_encoder": ({"model.embed_tokens.weight": ONE}, "a text encoder"),
    "lora": ({"diffusion_model.layers.0.attention.to_q.lora_A.weight": ONE}, "a LoRA"),
    "sd": ({"decoder.conv_in.weight": CONV, "quant_conv.weight": CONV}, "an autoencoder with quant_conv"),
    "other": ({"weight": ONE}, "another kind of file (keys such as 'weight')"),
    "empty": ({}, "a file without tensors"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_kinds_are_named(tmp_path, kind):
    content, words = WRONG_FILES[kind]
    save_file({name: t.clone() for name, t in content.items()}, tmp_path / "x.safetensors")
    one_sentence(tmp_path / "x.safetensors", "expected the 16-channel autoencoder", f"found {words}", "ae.safetensors")


@pytest.mark.parametrize("style", ["diffusers", "bfl"])
def test_bad_tensors_are_named(tmp_path, tensors, style):
    good = as_bfl(tensors) if style == "bfl" else tensors
    key = "decoder.up.0.block.0.conv1.weight" if style == "bfl" else "decoder.up_blocks.3.resnets.0.conv1.weight"
    norm = "encoder.norm_out.bias" if style == "bfl" else "encoder.conv_norm_out.bias"
    path = tmp_path / "x.safetensors"
    for half in ("encoder", "decoder"):
        save_file({name: t for name, t in good.items() if name.startswith(half)}, path)
        one_sentence(path, f"found the {half} of an autoencoder only")
    save_file({name: t for name, t in good.items() if name != key}, path)
    one_sentence(path, "'decoder.up_blocks.3.resnets.0.conv1.weight' of shape (32, 64, 3, 3), found none", "download")
    save_file(good | {key: torch.zeros(32, 32, 3, 3)}, path)
    one_sentence(path, f"{key!r}: expected shape (32, 64, 3, 3), found (32, 32, 3, 3)")
    save_file(good | {"decoder.extra.weight": ONE}, path)
    one_sentence(path, "unexpected tensor 'decoder.extra.weight'")
    save_file(good | {norm: torch.zeros(96, dtype=torch.float8_e4m3fn)}, path)
    one_sentence(path, f"{norm!r}: expected dtype BF16, F16 or F32, found F8_E4M3")
    save_file({name: t.clone() for name, t in (as_bfl(tensors) | tensors).items()}, path)
    one_sentence(path, "are the same tensor, expected only one")
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-100])
    one_sentence(path, "truncated", "download it again")


def test_bad_configs_are_named(tmp_path, tensors, model):
    good = json.loads(model.to_json_string())
    for i, (change, words) in enumerate(
        (
            ({"_class_name": "AutoencoderTiny"}, "_class_name: expected 'AutoencoderKL', found 'AutoencoderTiny'"),
            ({"use_quant_conv": True}, "use_quant_conv: expected False, found True"),
            ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types: expected ['UpDecoderBlock2D'"),
            ({"temporal": 4}, "temporal: expected no such field, found 4"),
            ({"norm_num_groups": 48}, "expected block_out_channels divisible by norm_num_groups 48"),
            ({"shift_factor": None}, "shift_factor: expected a number"),
            ({"latent_channels": 4}, "'encoder.conv_out.weight': expected shape (8, 96, 3, 3), found (32, 96, 3, 3)"),
        )
    ):
        one_sentence(write_folder(tmp_path / str(i), tensors, good | change), words)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"config": "{"})
    one_sentence(tmp_path / "x.safetensors", "config: expected a JSON object, found otherwise")
    save_file(tensors, tmp_path / "x.safetensors", metadata={"config": "[]"})
    one_sentence(tmp_path / "x.safetensors", "config: expected a JSON object, found otherwise")


def test_only_safetensors(tmp_path, tensors):
    torch.save(tensors, tmp_path / "vae.pt")
    one_sentence(tmp_path / "vae.pt", "pickled PyTorch file")


def test_loading_does_not_keep_the_file(tmp_path, tensors):
    """Parameters are copies of their own: a file that is replaced later changes nothing."""
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    vae = load_vae(path)
    with path.open("r+b") as f:
        f.seek(-4096, 2)
        f.write(b"\xff" * 4096)
    state = vae.state_dict()
    assert all(torch.equal(state[name], t) for name, t in tensors.items())
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.training
