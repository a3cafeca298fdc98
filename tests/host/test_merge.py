"""ComfyUI's nodes that merge, subtract and save models, on a dense MODEL of ours: as on its own of the same file.

A random Z-Image of the smallest sizes that ComfyUI's class has, which is told that it is one by its width.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from test_adapters import flux_vae_state, stock_encoder  # noqa: F401  a fixture
from test_model import conditioning, ksample, relative
from test_refusals import run

DIM, CAPTION, LAYERS = 1152, 64, 1
SIZES = {"n_heads": 9, "n_kv_heads": 9, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]}
SIZES |= {"rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0}
SIZES |= {"pad_tokens_multiple": 32}
FILES = ("one.safetensors", "two.safetensors")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def nodes(host):
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module", autouse=True)
def files(host):
    """Two models in ComfyUI's names, which its own loader takes for Z-Image: it knows that by their width."""
    import comfy.model_detection
    import comfy.ops
    import comfy.supported_models
    import folder_paths
    from comfy.ldm.lumina.model import NextDiT
    from safetensors.torch import save_file

    detect = comfy.model_detection.detect_unet_config

    def detect_small(state, prefix, **kwargs):
        found = detect(state, prefix, **kwargs)
        return found | SIZES if found and found.get("dim") == DIM else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_detection, "detect_unet_config", detect_small)
        patch.setitem(comfy.supported_models.ZImage.unet_config, "dim", DIM)
        sizes = {"patch_size": 2, "in_channels": 16, "dim": DIM, "cap_feat_dim": CAPTION, "n_layers": LAYERS}
        like = NextDiT(**sizes, **SIZES, qk_norm=True, operations=comfy.ops.disable_weight_init).state_dict()
        for seed, name in enumerate(FILES):
            noise = torch.Generator().manual_seed(seed)
            state = {
                key: torch.randn(t.shape, generator=noise) / t.shape[-1] ** 0.5 + ("norm" in key)
                for key, t in like.items()
            }
            state = {key: t.bfloat16() for key, t in state.items()}
            save_file(state, Path(folder_paths.get_folder_paths("diffusion_models")[0]) / name)
        yield sorted(like)


@pytest.fixture(scope="module")
def ours(host, files):
    return [host.model.load_model(name, "torch", "auto") for name in FILES]


@pytest.fixture(scope="module")
def stock(nodes, files):
    return [run(nodes["UNETLoader"], unet_name=name, weight_dtype="default")[0] for name in FILES]


@pytest.fixture(scope="module")
def lora(host):
    """The name of a LoRA for some of the linears, parts of fused ones among them."""
    import folder_paths
    from safetensors.torch import save_file

    noise, tensors = torch.Generator().manual_seed(9), {}
    for name, n, k in (
        ("layers.0.attention.qkv", 3 * DIM, DIM),
        ("layers.0.feed_forward.w1", 3072, DIM),
        ("noise_refiner.1.attention.out", DIM, DIM),
    ):
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, k, generator=noise) / k**0.5
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(n, 4, generator=noise) / 2
    path = Path(folder_paths.get_folder_paths("loras")[0]) / "small.safetensors"
    save_file(tensors, path)
    yield path.name
    path.unlink()


def weights(patcher) -> dict[str, torch.Tensor]:
    """What ComfyUI would save of a MODEL."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    state = patcher.state_dict_for_saving()
    return {
        key: value.to("cpu") if type(value).__name__ == "LazyCastingParam" else value for key, value in state.items()
    }


MERGES = {
    "ModelMergeSimple": {"ratio": 0.3},
    "ModelMergeBlocks": {"input": 0.25, "middle": 0.5, "out": 0.75},
    "ModelMergeSubtract": {"multiplier": 0.5},
    "ModelMergeAdd": {},
}


def merge(nodes, name: str, one, two):
    return run(nodes[name], model1=one, model2=two, **MERGES[name])[0]


def check_same(found, expected) -> None:
    """Two MODELs have the same weights, bit for bit, under the same names, and give the same latents."""
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("name", MERGES)
def test_merges(nodes, ours, stock, name):
    found, expected = merge(nodes, name, *ours), merge(nodes, name, *stock)
    check_same(found, expected)
    latents = ksample(found, conditioning(), steps=2)
    assert relative(latents, ksample(expected, conditioning(), steps=2)) < 1e-4


def test_a_merge_leaves_the_models_that_went_into_it_alone(host, nodes, ours, stock):
    """Merges refer to another model's weights; that model, and others of the same file, go on as they were."""
    asked = conditioning()
    plain = [ksample(model, asked, steps=1) for model in ours]
    one = merge(nodes, "ModelMergeSimple", *ours)
    both = merge(nodes, "ModelMergeAdd", ours[1], one)
    ksample(both, asked, steps=1)  # the second model's weights are now others
    found = ksample(one, asked, steps=1)
    assert relative(found, ksample(merge(nodes, "ModelMergeSimple", *stock), asked, steps=1)) < 1e-4
    expected = merge(nodes, "ModelMergeAdd", stock[1], merge(nodes, "ModelMergeSimple", *stock))
    check_same(both, expected)
    assert all(torch.equal(ksample(model, asked, steps=1), latents) for model, latents in zip(ours, plain))


def test_a_merge_with_comfyuis_own_model(nodes, ours, stock):
    for one, two in ((ours[0], stock[1]), (stock[0], ours[1])):
        check_same(merge(nodes, "ModelMergeSimple", one, two), merge(nodes, "ModelMergeSimple", *stock))


@pytest.mark.parametrize("ours_too", [False, True])
def test_loras_are_merged_too(host, nodes, ours, stock, lora, ours_too):
    """Before a merge on both models, and after it, by ComfyUI's loader or by ours."""

    def load(model, strength):
        if ours_too and model.model is not stock[0].model and model.model is not stock[1].model:
            return host.model.add_loras(model, [(lora, strength)], None)
        return run(nodes["LoraLoaderModelOnly"], model=model, lora_name=lora, strength_model=strength)[0]

    merged = []
    for one, two in (ours, stock):
        result = merge(nodes, "ModelMergeSimple", load(one, 0.5), load(two, -1.0))
        merged.append(load(result, 0.25))
    found, expected = (weights(model) for model in merged)
    assert found.keys() == expected.keys() and all(relative(found[k], expected[k]) < 1e-6 for k in found)
    assert any(not torch.equal(found[k], v) for k, v in weights(merge(nodes, "ModelMergeSimple", *ours)).items())
    latents = [ksample(model, conditioning(), steps=2) for model in merged]
    assert relative(*latents) < 1e-4


def test_merged_weights_while_streaming(nodes, ours, stock, small_gpu):
    found = merge(nodes, "ModelMergeSimple", *ours)
    expected = ksample(found, conditioning(), steps=1)
    small_gpu(found.model_size() * 0.7, found)
    assert relative(ksample(found, conditioning(), steps=1), expected) < 1e-6
    assert 0 < found.module.streamer.resident < len(found.module.streamer.blocks)


def saved(prefix: str) -> Path:
    import folder_paths

    path = Path(folder_paths.get_output_directory(), prefix)
    (found,) = path.parent.glob(f"{path.name}_*.safetensors")
    return found


def test_model_save(host, nodes, ours, stock, lora, files):
    """The file is that of ComfyUI's own model, and its loader and ours read it."""
    import folder_paths
    from safetensors.torch import load_file

    models = {"plain": (ours[0], stock[0])}
    models["merged"] = tuple(merge(nodes, "ModelMergeSimple", *pair) for pair in (ours, stock))
    for name, (found, expected) in models.items():
        run(nodes["ModelSave"], model=found, filename_prefix=f"save/ours_{name}")
        run(nodes["ModelSave"], model=expected, filename_prefix=f"save/stock_{name}")
        a, b = (load_file(saved(f"save/{whose}_{name}")) for whose in ("ours", "stock"))
        assert sorted(a) == [f"model.diffusion_model.{key}" for key in files]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    (folder / "again.safetensors").symlink_to(saved("save/ours_merged"))
    again = [run(nodes["UNETLoader"], unet_name="again.safetensors", weight_dtype="default")[0]]
    again.append(host.model.load_model("again.safetensors", "torch", "auto"))
    wanted = ksample(models["merged"][1], conditioning(), steps=1)
    assert all(relative(ksample(model, conditioning(), steps=1), wanted) < 1e-4 for model in again)


def test_lora_save_of_whole_differences(nodes, ours, stock):
    from safetensors.torch import load_file

    for whose, pair in (("ours", ours), ("stock", stock)):
        diff = run(nodes["ModelMergeSubtract"], model1=pair[1], model2=pair[0], multiplier=1.0)[0]
        save_lora(nodes, diff, f"lora/{whose}", "full_diff")
    a, b = (load_file(saved(f"lora/{whose}")) for whose in ("ours", "stock"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save_lora(nodes, diff, prefix: str, kind: str) -> None:
    run(nodes["LoraSave"], model_diff=diff, filename_prefix=prefix, rank=8, lora_type=kind, bias_diff=True)


def test_lora_save_of_low_rank_differences(host, nodes):
    """Of the demo, whose matrices are small: what ComfyUI extracts of them, and it acts as what it was made of."""
    import folder_paths
    from comfy_extras.nodes_lora_extract import extract_lora
    from safetensors.torch import load_file

    folders = {key: Path(folder_paths.get_folder_paths(key)[0]) for key in ("diffusion_models", "loras")}
    (folders["diffusion_models"] / "demo.safetensors").symlink_to(host.files.demo_paths("dense")[host.files.DEMO])
    model = host.model.load_model("demo.safetensors", "torch", "auto")
    framed = host.model.add_loras(model, [(f"{host.files.DEMO}: frame", 1.0)], None)
    (diff,) = run(nodes["ModelMergeSubtract"], model1=framed, model2=model, multiplier=1.0)
    save_lora(nodes, diff, "lora/frame", "standard")
    found, changed = load_file(saved("lora/frame")), weights(diff)
    for name in ("layers.0.attention.qkv", "layers.2.feed_forward.w1"):
        parts = extract_lora(changed[f"model.diffusion_model.{name}.weight"], 8)
        for leaf, part in zip(("lora_up", "lora_down"), parts, strict=True):
            assert torch.equal(found[f"diffusion_model.{name}.{leaf}.weight"], part.half())
    extracted = folders["loras"] / "extracted.safetensors"
    extracted.symlink_to(saved("lora/frame"))
    width = model.module.transformer.config.cap_feat_dim
    asked = [[torch.randn(1, 20, width, generator=torch.Generator().manual_seed(0)), {"pooled_output": None}]]
    plain, wanted = (ksample(one, asked, steps=2) for one in (model, framed))
    again = host.model.add_loras(model, [(extracted.name, 1.0)], None)
    extracted.unlink()
    assert relative(ksample(again, asked, steps=2), wanted) < relative(plain, wanted) / 2


def test_checkpoint_save(nodes, ours, stock, request):
    """With ComfyUI's own CLIP and VAE, which our loaders give for real files; its loader reads the model again."""
    import comfy.sd
    from safetensors.torch import load_file

    clip, vae = request.getfixturevalue("stock_encoder"), comfy.sd.VAE(sd=flux_vae_state())
    for whose, model in (("ours", ours[0]), ("stock", stock[0])):
        run(nodes["CheckpointSave"], model=model, clip=clip, vae=vae, filename_prefix=f"check/{whose}")
    a, b = (load_file(saved(f"check/{whose}")) for whose in ("ours", "stock"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert {key.partition(".")[0] for key in a} == {"model", "text_encoders", "vae"}
    again = comfy.sd.load_checkpoint_guess_config(str(saved("check/ours")), output_clip=False, output_vae=False)[0]
    assert relative(ksample(again, conditioning(), steps=1), ksample(stock[0], conditioning(), steps=1)) < 1e-6


def test_what_does_not_merge(host, nodes, ours):
    """Models of other sizes and quantized ones, on either side."""
    demo = host.model.load_model(host.files.DEMO, "torch", "w4a16")
    dense = host.files.demo_paths("dense")[host.files.DEMO]
    for one, two in ((demo, ours[0]), (ours[0], demo)):
        with pytest.raises(
            ValueError, match="a quantized model cannot be merged with another here: do that with its BF16"
        ):
            merge(nodes, "ModelMergeSimple", one, two)
    import folder_paths

    (Path(folder_paths.get_folder_paths("diffusion_models")[0]) / "demo-bf16.safetensors").symlink_to(dense)
    with pytest.raises(ValueError, match="merge models of the same sizes"):
        merge(nodes, "ModelMergeSimple", ours[0], host.model.load_model("demo-bf16.safetensors", "torch", "auto"))
