"""Our MODEL inside ComfyUI: against ComfyUI's own Lumina 2 over the same weights, samplers, patches, memory."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
import torch

TINY = "svdq-int4_r32-z-image-tiny.safetensors"
CAPTION = 64
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
STEPS = 4


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def ours(host):
    return host.model.load_model(TINY, "torch", "w4a16")


@pytest.fixture(scope="module")
def stock(host, ours):
    """ComfyUI's own Z-Image with the dequantized weights of the same file, its t_embedder widened to the file's."""
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder

    transformer = ours.model.diffusion_model.transformer
    c = transformer.config
    settings = comfy.supported_models.ZImage(
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": c.dim,
            "cap_feat_dim": c.cap_feat_dim,
            "n_layers": c.n_layers,
            "n_refiner_layers": c.n_refiner_layers,
            "n_heads": c.n_heads,
            "n_kv_heads": c.n_heads,
            "qk_norm": True,
            "axes_dims": list(c.axes_dims),
            "axes_lens": list(c.axes_lens),
            "rope_theta": c.rope_theta,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }
    )
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({})
    model.diffusion_model.t_embedder = TimestepEmbedder(
        1024, output_size=256, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    state = {}
    for name, module in transformer.named_modules():
        for old, new in (("to_qkv", "qkv"), ("to_out", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm")):
            name = name.replace(f"attention.{old}", f"attention.{new}")
        if hasattr(module, "weights"):
            weight = module.weights().dequantize()
        elif isinstance(getattr(module, "weight", None), torch.Tensor):
            weight = module.weight
        else:
            continue
        if name.endswith("w3_w1"):
            state[name.replace("w3_w1", "w3.weight")], state[name.replace("w3_w1", "w1.weight")] = weight.chunk(2)
        else:
            state[f"{name}.weight"] = weight
        if getattr(module, "bias", None) is not None:
            state[f"{name}.bias"] = module.bias
    state["x_pad_token"], state["cap_pad_token"] = transformer.x_pad_token, transformer.cap_pad_token
    model.diffusion_model.load_state_dict({k: v.float().clone() for k, v in state.items()}, strict=True)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=device)


def conditioning(tokens: int = 20, seed: int = 0, batch: int = 1):
    noise = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, CAPTION, generator=noise), {"pooled_output": None}]]


def ksample(model, positive, negative=None, *, latent=None, cfg=1.0, seed=7, steps=STEPS, denoise=1.0, sampler="euler"):
    import nodes

    latent = latent or {"samples": torch.zeros(1, 16, 8, 12)}
    negative = negative or [[torch.zeros_like(c), extra] for c, extra in positive]
    return nodes.common_ksampler(model, seed, steps, cfg, sampler, "simple", positive, negative, latent, denoise)[0][
        "samples"
    ]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_same_latents_as_stock_model(ours, stock):
    assert relative(ksample(ours, conditioning()), ksample(stock, conditioning())) < 1e-4


@pytest.mark.parametrize("size", [(7, 13), (9, 8), (16, 5)])
def test_odd_sizes_are_padded_as_the_stock_model_does(ours, stock, size):
    latent = {"samples": torch.zeros(1, 16, *size)}
    assert relative(ksample(ours, conditioning(), latent=latent), ksample(stock, conditioning(), latent=latent)) < 1e-4


@pytest.fixture(scope="module")
def picture():
    return {"samples": torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(3)) * 0.5}


def test_guidance_with_captions_of_unequal_length(ours, stock):
    args = (conditioning(20), conditioning(50, seed=1))
    assert relative(ksample(ours, *args, cfg=3.0), ksample(stock, *args, cfg=3.0)) < 1e-4


def test_batch_with_one_and_with_many_captions(ours, stock):
    latent = {"samples": torch.zeros(3, 16, 8, 8)}
    for captions in (1, 3):
        args = (conditioning(20, batch=captions), conditioning(20, seed=1, batch=captions))
        found, expected = (ksample(m, *args, cfg=2.0, latent=latent) for m in (ours, stock))
        assert relative(found, expected) < 1e-4


def test_img2img_and_masks(ours, stock, picture):
    found, expected = (ksample(m, conditioning(), latent=picture, denoise=0.5) for m in (ours, stock))
    assert relative(found, expected) < 1e-4
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:40, 16:60] = 1
    masked = {**picture, "noise_mask": mask}
    found, expected = (ksample(m, conditioning(), latent=masked, denoise=0.7) for m in (ours, stock))
    assert relative(found, expected) < 1e-4
    assert torch.allclose(found[:, :, -1], picture["samples"][:, :, -1], atol=1e-4)


def test_areas_and_start_end(ours, stock):
    left = [[c, {**e, "area": (8, 6, 0, 0), "strength": 1.0, "end_percent": 0.6}] for c, e in conditioning(20)]
    right = [[c, {**e, "area": (8, 6, 0, 6), "strength": 0.8}] for c, e in conditioning(40, seed=5)]
    positive = [*left, *right, *conditioning(10, seed=6)]
    assert relative(ksample(ours, positive), ksample(stock, positive)) < 1e-4


@pytest.mark.parametrize("sampler", ["res_multistep", "dpmpp_2m", "euler_ancestral"])
def test_other_samplers(ours, stock, sampler):
    found, expected = (ksample(m, conditioning(), sampler=sampler) for m in (ours, stock))
    assert relative(found, expected) < 1e-4


def test_patches_of_blocks(ours, stock):
    """The same patches on both models see the same values and change the result alike, returned or in place."""
    seen = {}

    def patched(model, name):
        seen[name] = []

        def refiner(given):
            shapes = {k: tuple(v.shape) for k, v in given.items() if isinstance(v, torch.Tensor)}
            seen[name].append((given["block_type"], given["block_index"], shapes, given["pe"].double().sum().item()))
            return {"img": given["img"] * 1.5}

        def double(given):
            options = given["transformer_options"]
            shapes = {k: tuple(v.shape) for k, v in given.items() if isinstance(v, torch.Tensor)}
            where = (options["block_type"], options["block_index"], options["total_blocks"])
            seen[name].append((where, shapes, given["pe"].double().sum().item(), given["vec"].double().sum().item()))
            given["img"] += given["img_input"] * 0.5
            return {"txt": given["txt"] * 0.5}

        clone = model.clone()
        clone.set_model_patch(refiner, "noise_refiner")
        clone.set_model_double_block_patch(double)
        return clone

    found, expected = ksample(patched(ours, "ours"), conditioning()), ksample(patched(stock, "stock"), conditioning())
    assert relative(found, expected) < 1e-4
    assert relative(found, ksample(ours, conditioning())) > 1e-3
    assert len(seen["ours"]) == len(seen["stock"]) == 2 * STEPS
    for one, other in zip(seen["ours"], seen["stock"], strict=True):
        assert one[:-2] == other[:-2]
        assert one[-1] == pytest.approx(other[-1], rel=1e-4)


def test_attention_override(ours, stock):
    calls = {"ours": 0, "stock": 0}

    def patched(model, name):
        def override(function, q, k, v, heads, *args, **kwargs):
            calls[name] += 1
            return function(q * 0.5, k, v, heads, *args, **kwargs)

        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = override
        return clone

    found, expected = ksample(patched(ours, "ours"), conditioning()), ksample(patched(stock, "stock"), conditioning())
    assert calls["ours"] == calls["stock"] == 3 * STEPS
    assert relative(found, expected) < 1e-4
    assert relative(found, ksample(ours, conditioning())) > 1e-4


def test_torch_chooses_attention_where_comfyui_is_set_to_torch_s(ours, monkeypatch):
    import comfy.ldm.modules.attention as attention

    asked = []

    def counted(*args, **kwargs):
        asked.append(1)
        return attention_pytorch(*args, **kwargs)

    attention_pytorch = attention.attention_pytorch
    monkeypatch.setattr(attention, "optimized_attention_masked", counted)
    expected = ksample(ours, conditioning())
    assert len(asked) == 1 + 2 * STEPS
    monkeypatch.setattr(attention, "attention_pytorch", counted)
    assert relative(ksample(ours, conditioning()), expected) < 1e-4
    assert len(asked) == 1 + 2 * STEPS


def test_rope_options(ours, stock):
    def patched(model):
        clone = model.clone()
        clone.set_model_rope_options(scale_x=1.7, shift_x=0.5, scale_y=0.6, shift_y=3.0, scale_t=1.0, shift_t=0.0)
        return clone

    found = ksample(patched(ours), conditioning())
    assert relative(found, ksample(patched(stock), conditioning())) < 1e-4
    assert relative(found, ksample(ours, conditioning())) > 1e-4


def test_wrappers(ours, stock):
    import comfy.patcher_extension as extension

    def patched(model, log):
        def around(executor, *args, **kwargs):
            log.append("diffusion")
            return executor(*args, **kwargs) * 1.1

        def apply(executor, *args, **kwargs):
            log.append("apply")
            return executor(*args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "test", around)
        clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "test", apply)
        return clone

    logs = ([], [])
    found, expected = (ksample(patched(m, log), conditioning()) for m, log in zip((ours, stock), logs, strict=True))
    assert logs[0] == logs[1] == ["apply", "diffusion"] * STEPS
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda m: m.set_model_attn1_patch(lambda *a: a), "attn1_patch"),
        (lambda m: m.set_model_patch_replace(lambda *a: a, "dit", "double_block", 0), "dit"),
        (lambda m: m.set_model_output_block_patch(lambda *a: a), "output_block_patch"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(ours, change, name):
    clone = ours.clone()
    change(clone)
    with pytest.raises(ValueError, match=f"cannot honour.*{name}"):
        ksample(clone, conditioning())
    ksample(ours, conditioning(), steps=1)


def patch_nodes() -> dict[str, tuple]:
    """Every stock node that takes a MODEL and settings only: {name: (class, the MODEL's input, default settings)}."""
    import nodes

    found = {}
    for name, node in sorted(nodes.NODE_CLASS_MAPPINGS.items()):
        if name.startswith("ZImage") or "orchCompile" in name or not getattr(node, "RETURN_TYPES", None):
            continue
        required = node.INPUT_TYPES().get("required", {})
        linked = [n for n, d in required.items() if isinstance(d[0], str) and d[0] not in WIDGETS]
        if list(node.RETURN_TYPES)[0] != "MODEL" or [required[n][0] for n in linked] != ["MODEL"]:
            continue
        settings = {}
        for setting, definition in required.items():
            options = definition[1] if len(definition) > 1 else {}
            listed = definition[0] if isinstance(definition[0], list) else options.get("options")
            settings[setting] = options.get("default", listed[0] if listed else None)
        settings.pop(linked[0])
        if None not in settings.values():
            found[name] = (node, linked[0], settings)
    return found


def test_every_stock_node_that_patches_a_model(host, ours, stock):
    """Each does to our MODEL what it does to ComfyUI's own, or is refused by name; none is ignored."""
    import asyncio

    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    prompts = (conditioning(), conditioning(30, seed=2))
    plain, wrong, refused = ksample(ours, *prompts, cfg=2.0, steps=2), [], []
    for name, (node, model, settings) in patch_nodes().items():

        def result(patcher, node=node, model=model, settings=settings):
            v3 = node.FUNCTION == "EXECUTE_NORMALIZED"
            out = (node.execute if v3 else getattr(node(), node.FUNCTION))(**{model: patcher}, **settings)
            return ksample((out.args if hasattr(out, "args") else out)[0], *prompts, cfg=2.0, steps=2)

        try:
            expected = result(stock)
        except (KeyError, AttributeError, RuntimeError, TypeError):
            continue  # made for another architecture
        try:
            found = result(ours)
        except ValueError as error:
            refused.append(name)
            if not str(error).startswith("Z-Image cannot honour"):
                wrong.append(f"{name}: {error}")
            continue
        if name == "NAGuidance":  # ComfyUI's own Z-Image ignores it; what it does to ours is in test_guidance.py
            assert relative(found, expected) > 1e-2
        elif relative(found, expected) > 1e-4:
            wrong.append(f"{name}: differs by {relative(found, expected)}")
    assert wrong == []
    assert {"HyperTile", "PerturbedAttentionGuidance"} <= set(refused) and len(refused) < 12
    assert torch.equal(ksample(ours, *prompts, cfg=2.0, steps=2), plain)


def test_wrong_conditioning_is_refused(ours):
    with pytest.raises(ValueError, match="2560 wide, this model wants 64"):
        ksample(ours, [[torch.zeros(1, 5, 2560), {}]])
    with pytest.raises(ValueError, match="reference latents"):
        ksample(ours, [[c, {**e, "reference_latents": [torch.zeros(1, 16, 4, 4)]}] for c, e in conditioning()])


def test_merging_and_saving_are_refused(ours):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    merge = ModelMergeSimple()
    with pytest.raises(ValueError, match="cannot be merged"):
        getattr(merge, merge.FUNCTION)(ours, ours, 0.5)


# ---- other stored forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "limit"), [("fp8", 0.25), ("int8", 0.03), ("gguf", 0.03), ("kitchen", 0)])
def test_other_forms_generate_through_ksampler_and_take_loras(host, form, limit):
    """The demo's BF16 file in 8 bits, its INT4 file in comfy-kitchen's layout; limits are twice what was seen."""
    import folder_paths
    from safetensors.torch import load_file, save_file

    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    source = host.files.demo_paths("dense")[host.files.DEMO]
    name = f"{form}.{'gguf' if form == 'gguf' else 'safetensors'}"
    if form == "kitchen":
        source = host.files.demo_paths("model")[host.files.DEMO]
        convert = importlib.import_module("zimage_pack.zimage_core.quantize.convert").convert
        convert(source, folder / name, "kitchen")
    elif form == "gguf":
        write_gguf(load_file(source), folder / name)
    else:
        save_file(eight_bit(load_file(source), form), folder / name)
    (folder / "source.safetensors").unlink(missing_ok=True)
    (folder / "source.safetensors").symlink_to(source)
    found, expected = (host.model.load_model(one, "torch", "auto") for one in (name, "source.safetensors"))
    width = found.model.diffusion_model.transformer.config.cap_feat_dim
    asked = [[torch.randn(1, 20, width, generator=torch.Generator().manual_seed(0)), {"pooled_output": None}]]
    plain = ksample(found, asked)
    assert relative(plain, ksample(expected, asked)) <= limit
    lora = Path(folder_paths.get_folder_paths("loras")[0]) / f"{form}.safetensors"
    lora.write_bytes(next(iter(host.files.demo_paths("lora").values())).read_bytes())
    framed = stock_loader(found, lora.name, 1.0)
    assert relative(ksample(framed, asked), plain) > 0.05


def eight_bit(tensors, form):
    """The blocks' linears in ComfyUI's scaled FP8, or in quanto's INT8."""
    for key in [k for k, t in tensors.items() if t.ndim == 2 and (".attention." in k or ".feed_forward." in k)]:
        weight = tensors.pop(key).float()
        scale = weight.abs().amax(1, keepdim=True) / (448 if form == "fp8" else 127)
        if form == "fp8":
            tensors |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale}
        else:
            tensors |= {f"{key}._data": (weight / scale).round().to(torch.int8), f"{key}._scale": scale}
    return tensors


def write_gguf(tensors, path):
    """Every matrix of the blocks in Q8_0, as ComfyUI-GGUF's converter leaves the names."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "lumina2")
    for key, tensor in tensors.items():
        small = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and (".attention." in key or ".feed_forward." in key)
        kind = gguf.GGMLQuantizationType.Q8_0 if small else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- our sampler node -----------------------------------------------------------------------------------------


def zsample(
    host, model, positive, negative=None, *, cfg=1.0, seed=7, steps=STEPS, width=96, height=64, batch=1, latent=None,
    denoise=1.0,
):  # fmt: skip
    size = (width, height, batch)
    return host.sampling.sample(model, positive, negative, cfg, seed, steps, size, latent, denoise, None)["samples"]


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_our_sampler_is_ksampler(host, ours, steps):
    assert relative(zsample(host, ours, conditioning(), steps=steps), ksample(ours, conditioning(), steps=steps)) < 1e-4


def test_our_sampler_with_guidance_is_ksampler(host, ours):
    positive, negative = conditioning(), conditioning(9, seed=1)
    found = zsample(host, ours, positive, negative, cfg=5.0)
    assert relative(found, ksample(ours, positive, negative, cfg=5.0)) < 1e-4
    assert relative(found, zsample(host, ours, positive, negative)) > 0.01


def test_our_sampler_says_where_a_model_wants_the_other_preset(host, ours, monkeypatch):
    transformer = ours.model.diffusion_model.transformer
    said, info = [], transformer.checkpoint
    monkeypatch.setattr(host.messages, "say", lambda text, node_id: said.append(text))
    for variant, told in ((None, False), ("base", True)):
        metadata = dict(info.metadata) | ({"variant": variant} if variant else {})
        monkeypatch.setattr(transformer, "checkpoint", dataclasses.replace(info, metadata=metadata))
        zsample(host, ours, conditioning(), steps=1)
        assert ("preset base" in said[-1]) is told
    zsample(host, ours, conditioning(), conditioning(9, seed=1), cfg=5.0, steps=1)
    assert "preset base" not in said[-1]


def test_our_sampler_says_where_a_negative_prompt_has_no_effect(host, ours, monkeypatch):
    """At cfg 1, but for ComfyUI's NAGuidance, which takes it without guidance."""
    from comfy_extras.nodes_nag import NAGuidance

    said = []
    monkeypatch.setattr(host.messages, "say", lambda text, node_id: said.append(text))
    (stock,) = NAGuidance.execute(ours, 3.0, 0.5, 1.5).result
    for model, negative, cfg, told in (
        (ours, True, 1, True),
        (ours, False, 1, False),
        (ours, True, 5, False),
        (stock, True, 1, False),
    ):
        zsample(host, model, conditioning(), conditioning(9, seed=1) if negative else None, cfg=float(cfg), steps=1)
        assert ("no effect at cfg 1" in said[-1]) is told


def test_our_sampler_img2img_mask_and_batch_index(host, ours, picture):
    masked = {**picture, "noise_mask": torch.ones(1, 64, 96)}
    masked["noise_mask"][:, :20] = 0
    found = zsample(host, ours, conditioning(), latent=masked, denoise=0.5)
    assert relative(found, ksample(ours, conditioning(), latent=masked, denoise=0.5)) < 1e-4
    batch = zsample(host, ours, conditioning(), batch=3)
    one = zsample(host, ours, conditioning(), latent={"samples": torch.zeros(1, 16, 8, 12), "batch_index": [2]})
    assert relative(one, batch[2:]) < 1e-4


def test_our_sampler_takes_stock_models_and_latents(host, stock):
    from comfy_extras.nodes_sd3 import EmptySD3LatentImage

    assert relative(zsample(host, stock, conditioning()), ksample(stock, conditioning())) < 1e-4
    make = getattr(EmptySD3LatentImage, "execute", None) or EmptySD3LatentImage().generate
    out = make(96, 64, 1)
    latent = out[0] if isinstance(out, tuple) else out.args[0]
    assert relative(zsample(host, stock, conditioning(), latent=latent), ksample(stock, conditioning())) < 1e-4
    four = {"samples": torch.zeros(1, 4, 8, 12)}
    assert relative(zsample(host, stock, conditioning(), latent=four), ksample(stock, conditioning())) < 1e-4


def test_latents_of_another_model_are_refused(host, ours):
    with pytest.raises(ValueError, match="has 4 channels.*Z-Image VAE Loader"):
        zsample(host, ours, conditioning(), latent={"samples": torch.ones(1, 4, 8, 8)})


def test_model_sampling_patches_rule_the_schedule(host, ours):
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    node = ModelSamplingAuraFlow()
    for shift in (3.0, 6.0):
        patched = getattr(node, node.FUNCTION)(ours, shift)[0]
        assert relative(zsample(host, patched, conditioning()), ksample(patched, conditioning())) < 1e-4
    assert relative(zsample(host, patched, conditioning()), zsample(host, ours, conditioning())) > 1e-3


# ---- prompts are prepared once per run, and never stale -----------------------------------------------------------


@pytest.fixture
def prepared(ours, monkeypatch):
    """How often the model prepared a prompt, the memory plan's runs on the meta device left out."""
    count, prepare = [], type(ours.module.transformer).prepare

    def counted(self, feats, *args):
        count.extend([1] * (not feats[0].is_meta))
        return prepare(self, feats, *args)

    monkeypatch.setattr(type(ours.module.transformer), "prepare", counted)
    return count


def test_no_step_waits_for_the_device(ours, prepared):
    """Nothing that our module runs per step reads a value back to the host, which would stall a GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if steps and function.name() in ("aten::equal", "aten::_local_scalar_dense", "aten::nonzero", "aten::item"):
                reads.append(function.name())
            return function(*args, **(kwargs or {}))

    def watched(executor, *args, **kwargs):
        with Reads():
            out = executor(*args, **kwargs)
        steps.append(1)
        return out

    import comfy.patcher_extension as extension

    for prompts, more in (((conditioning(),), {}), ((conditioning(), conditioning(20, seed=1)), {"cfg": 2.0})):
        steps, reads, clone = [], [], ours.clone()
        clone.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "test", watched)
        prepared.clear()
        ksample(clone, *prompts, **more)
        assert len(steps) == STEPS and reads == [] and len(prepared) == 1
    with Reads():  # the watch itself works
        assert torch.equal(torch.ones(1), torch.ones(1)) and reads == ["aten::equal"]


def test_prompts_of_a_batch_and_of_areas_are_prepared_once(ours, prepared):
    left = [[c, {**e, "area": (8, 6, 0, 0), "strength": 1.0}] for c, e in conditioning(20)]
    ksample(ours, [*left, *conditioning(10, seed=6)], conditioning(30, seed=2), cfg=2.0)
    assert len(prepared) == 4  # ComfyUI gives the negative prompt an area for each of the positive's
    prepared.clear()
    ksample(ours, conditioning(), conditioning(30, seed=2), cfg=2.0, latent={"samples": torch.zeros(3, 16, 8, 8)})
    assert len(prepared) == 2


def test_prompt_that_changes_is_never_stale(ours, stock, prepared):
    """From run to run, and within one by wrappers that replace the context or write into it: as in the stock model."""
    import comfy.patcher_extension as extension

    written = conditioning()
    for _ in range(3):  # the same tensor object with other values
        assert relative(ksample(ours, written), ksample(stock, written)) < 1e-4
        written[0][0].mul_(-1.5)

    def function(change):
        def around(apply, given):
            change(given["c"], given["timestep"])
            return apply(given["input"], given["timestep"], **given["c"])

        return lambda model: model.set_model_unet_function_wrapper(around)

    def wrapper(change):
        def around(executor, x, timesteps, context, *args, **kwargs):
            given = {"c_crossattn": context}
            change(given, timesteps)
            return executor(x, timesteps, given["c_crossattn"], *args, **kwargs)

        return lambda model: model.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "test", around)

    ramp = torch.linspace(-3, 3, CAPTION)  # the caption's norm would undo one factor

    def replace(c, timestep):
        c["c_crossattn"] = c["c_crossattn"] * (timestep[0] + ramp)

    def write(c, timestep):
        c["c_crossattn"].mul_(timestep[0] + ramp)

    def write_a_part(c, timestep):
        c["c_crossattn"][:, 3:7, :9].copy_(timestep[0].expand(4, 9))

    plain = ksample(ours, conditioning())
    for kind in (function, wrapper):
        for change in (replace, write, write_a_part):
            clones = ours.clone(), stock.clone()
            for clone in clones:
                kind(change)(clone)
            prepared.clear()
            found, expected = (ksample(clone, conditioning()) for clone in clones)
            assert relative(found, expected) < 1e-4 and relative(found, plain) > 1e-4, (kind, change)
            assert len(prepared) == STEPS
    assert torch.equal(ksample(ours, conditioning()), plain)
    assert len(ours.module.prepared.entries) <= 4


def test_steps_are_replayed_only_where_nothing_is_changed(host, small_device, monkeypatch):
    """A stand-in for the CUDA graphs counts the steps that they are asked for."""
    import comfy.ldm.modules.attention
    import comfy.model_management

    ours, module, asked = small_device, small_device.module, []
    attention = comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "optimized_attention_masked", attention.attention_pytorch)
    expected = ksample(ours, conditioning())

    def run(model, *inputs):
        asked.append(1)
        with torch.inference_mode(False), torch.no_grad():  # as a capture does
            return model(*inputs)

    dropped = []
    graphs = type("Graphs", (), {"possible": True, "run": staticmethod(run), "clear": lambda self: dropped.append(1)})()
    monkeypatch.setattr(module, "graphs", graphs)
    assert torch.equal(ksample(ours, conditioning()), expected)
    assert len(asked) == STEPS

    patched, override, budgeted = ours.clone(), ours.clone(), host.model.load_model(TINY, "torch", "w4a16", 1.0)
    patched.set_model_double_block_patch(lambda given: given)
    override.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k)
    monkeypatch.setattr(budgeted.module, "graphs", graphs)
    asked.clear()
    for changed in (patched, override, budgeted):
        ksample(changed, conditioning())
    monkeypatch.setattr(attention, "optimized_attention_masked", attention.attention_sub_quad)
    ksample(ours, conditioning())
    assert not asked

    monkeypatch.setattr(attention, "optimized_attention_masked", attention.attention_pytorch)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ours.model.apply_model(torch.zeros(1, 16, 8, 8), torch.ones(1), c_crossattn=conditioning()[0][0])
    assert not asked, "a replay could not be interrupted"
    ours.load(torch.device("cpu"), full_load=True)
    dropped.clear()
    ours.partially_unload(torch.device("cpu"), 1)
    assert dropped, "their memory goes before blocks do"


def test_kept_codes_leave_before_blocks_do(host, monkeypatch):
    """comfy-kitchen's 8 bits on the CPU, where there is space for all; ComfyUI counts the weights alone."""
    import comfy.model_management

    pytest.importorskip("comfy_kitchen")
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **_: torch.bfloat16)
    patcher, cpu = host.model.load_model(TINY, "kitchen", "w4a8"), torch.device("cpu")
    patcher.load(cpu, full_load=True)
    streamer = patcher.module.streamer
    kept = streamer.codes
    assert kept and patcher.loaded_size() == patcher.model_size() == streamer.used - kept
    assert "8-bit codes kept" in host.model.describe_plan(patcher, 64, 64)
    assert patcher.partially_unload(cpu, kept // 2) == kept
    assert not streamer.codes and not streamer.host and patcher.loaded_size() == patcher.model_size()
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 0)
    patcher.load(cpu, full_load=True)
    assert not streamer.codes and not streamer.host, "nothing is free beside the weights"


def test_live_previews_have_the_colours_of_the_picture(host, ours, monkeypatch):
    """The demo's latents have their own colours; those of a file for Flux's VAE keep ComfyUI's."""
    import comfy.latent_formats
    import latent_preview

    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    model, clip = host.model.load_model(host.files.DEMO, "torch", "w4a16"), host.clip.load_clip(host.files.DEMO)
    vae = host.vae.load_vae(host.files.DEMO, "fp32")
    assert model.clone().model.latent_format.taesd_decoder_name is None
    for prompt in ("a large red circle on a blue background", "a green star on a white background"):
        latents = zsample(host, model, host.clip.encode_prompt(clip, prompt), steps=8, width=128, height=128)
        previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
        shown = previewer.decode_latent_to_preview(model.model.latent_format.process_in(latents))
        assert shown.size == (16, 16)
        found = torch.tensor(list(shown.convert("RGB").tobytes())).view(16, 16, 3) / 255
        picture = host.vae.decode(vae, {"samples": latents}, "off")[0]
        expected = picture.unflatten(0, (16, 8)).unflatten(2, (16, 8)).mean((1, 3))
        # A linear fit: over all scenes it misses 0.06 of this range in root mean square, and white grounds by more.
        assert (found - expected).abs().mean() < 0.075
    flux = comfy.latent_formats.Flux()
    assert ours.model.latent_format.latent_rgb_factors == flux.latent_rgb_factors


def test_a_card_without_bf16_gets_fp16(host, monkeypatch):
    """As ComfyUI sees a Turing; the text encoder, too, which would take twice the memory in fp32."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *_, **__: False)
    monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda *_, **__: True)
    model, clip = host.model.load_model(host.files.DEMO, "torch", "w4a16"), host.clip.load_clip(host.files.DEMO)
    transformer = model.model.diffusion_model.transformer
    assert transformer.dtype is torch.float16 and clip.cond_stage_model.dtypes == {torch.float16}
    latents = zsample(host, model, host.clip.encode_prompt(clip, "a red circle"), steps=2, width=64, height=64)
    assert latents.isfinite().all() and latents.std() > 0.1


# ---- a good citizen -------------------------------------------------------------------------------------------


@pytest.fixture
def small_device(host, ours):
    """The model as on a device that holds little: give back the patcher, whole again afterwards."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    yield ours
    ours.module.streamer.place(torch.device("cpu"), math.inf)
    ours.model.model_loaded_weight_memory = 0
    ours.model.model_lowvram = False


def test_byte_allowance_becomes_whole_blocks(host, small_device):
    patcher, streamer = small_device, small_device.module.streamer
    expected = ksample(patcher, conditioning())
    cpu = torch.device("cpu")
    size = patcher.model_size()
    assert size == sum(t.nbytes for t in (*patcher.module.parameters(), *patcher.module.buffers()))

    patcher.load(cpu, full_load=True)
    assert streamer.resident == 3 and patcher.loaded_size() == size and not patcher.model.model_lowvram
    freed = patcher.partially_unload(cpu, 1)
    assert (
        streamer.resident < 3 and freed >= 1 and patcher.loaded_size() == size - freed and patcher.model.model_lowvram
    )
    patcher.load(cpu, lowvram_model_memory=1)
    assert streamer.resident == 0 and 0 < patcher.loaded_size() < size

    module = patcher.model
    with torch.inference_mode():
        x, sigma = torch.randn(1, 16, 8, 12), torch.tensor([0.7])
        context = conditioning()[0][0]
        streamed = module.diffusion_model(x, sigma, context)
        patcher.load(cpu, full_load=True)
        assert torch.equal(streamed, module.diffusion_model(x, sigma, context))
    assert torch.equal(ksample(patcher, conditioning()), expected)


def test_sampling_while_streaming_is_bit_identical(host, ours, monkeypatch):
    import comfy.model_management

    expected = ksample(ours, conditioning(), conditioning(30, seed=2), cfg=2.0)
    load = type(ours).load

    def tight(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        return load(self, device_to, lowvram_model_memory=self.model_size() * 0.75)

    comfy.model_management.unload_all_models()
    ours.detach()
    monkeypatch.setattr(type(ours), "load", tight)
    found = ksample(ours, conditioning(), conditioning(30, seed=2), cfg=2.0)
    assert ours.module.streamer.resident < 3
    assert torch.equal(found, expected)
    monkeypatch.undo()
    comfy.model_management.unload_all_models()
    ours.detach()
    assert torch.equal(ksample(ours, conditioning(), conditioning(30, seed=2), cfg=2.0), expected)


def test_comfyuis_own_memory_manager(host, ours, small_gpu, monkeypatch, memory):
    """Its arithmetic for a GPU with so and so much free memory, on the CPU: partial load, more, part of it back."""
    expected, size, seen = ksample(ours, conditioning()), ours.model_size(), []
    memory.unload_all_models()
    monkeypatch.setattr(ours.model, "memory_required", lambda *args, **kwargs: 0)
    for share in (0.01, 0.8, 2.0):
        small_gpu(share * size, ours)
        assert relative(ksample(ours, conditioning()), expected) < 1e-5  # its attention cuts by free memory too
        assert ours.loaded_size() <= max(share, 0.75) * size  # embedders and two slots are the least there is
        seen.append(ours.module.streamer.resident)
    assert seen[0] == 0 and seen[1] < 3 and seen[2] == 3
    loaded = next(m for m in memory.current_loaded_models if m.model.is_clone(ours))
    assert loaded.model_unload(memory_to_free=0.2 * size) is False  # part of it was enough
    assert ours.module.streamer.resident < 3 and ours.loaded_size() <= 0.8 * size
    assert relative(ksample(ours, conditioning()), expected) < 1e-5
    memory.unload_all_models()
    assert not any(m.model is not None and m.model.is_clone(ours) for m in memory.current_loaded_models)
    assert ours.loaded_size() == 0


def test_plan_is_what_comfyui_then_does(host, small_gpu, monkeypatch, memory):
    """The sampler's line by what is free, other models' memory counted, is what the run then takes of the device."""
    from zimage_pack.zimage_core.memory.plan import readable

    said, model = [], host.model.load_model(host.files.DEMO, "torch", "w4a16")
    positive = [[torch.randn(1, 20, model.module.transformer.config.cap_feat_dim), {}]]
    monkeypatch.setattr(host.messages, "say", lambda text, node_id: said.append(text))
    size, need, streamer = model.model_size(), model.model.activations([2, 16, 8, 12]), model.module.streamer
    count, seen = len(streamer.blocks), []
    for part in (0.0, 0.6, 1.01):
        free = part * size + need
        small_gpu(free, model)
        zsample(host, model, positive, batch=2)
        seen.append(len(streamer.host))
        how = f"{seen[-1]} of {count} blocks streamed" if seen[-1] else "nothing streamed"
        held = readable(model.loaded_size())
        assert said == [f"2 of 96 x 64: {held} weights + {readable(need)} to generate; {readable(free)} free, {how}"]
        said.clear()
    assert seen[0] == count > seen[1] > seen[2] == 0

    class Other:  # a model of another node's that would give way
        device = torch.device("cpu")

        def model_loaded_memory(self):
            return 2 * size

    Other.model = model
    none, all_of_it = f"{count} of {count} blocks streamed", "nothing streamed"
    small_gpu(need)
    monkeypatch.setattr(memory, "current_loaded_models", [Other()])
    assert host.model.describe_plan(model, 96, 64, 2).endswith(f"; {readable(2 * size + need)} free, {all_of_it}")
    monkeypatch.setattr(memory, "current_loaded_models", [])
    assert host.model.describe_plan(model, 96, 64, 2).endswith(f"; {readable(need)} free, {none}")
    model.budget = round(size + need + 1)
    small_gpu(4 * size + need)
    assert host.model.describe_plan(model, 96, 64, 2).endswith(f"; budget {readable(model.budget)}, {all_of_it}")
    small_gpu(need)
    assert host.model.describe_plan(model, 96, 64, 2).endswith(f"; {readable(need)} free, {none}")
    model.budget = None
    monkeypatch.setattr(memory, "vram_state", memory.VRAMState.NO_VRAM)
    assert host.model.describe_plan(model, 96, 64).endswith(f"; --novram, {none}")
    monkeypatch.setattr(memory, "vram_state", memory.VRAMState.HIGH_VRAM)
    assert host.model.describe_plan(model, 96, 64).endswith(f" to generate; {all_of_it}")


@pytest.fixture
def scarce(ours, monkeypatch):
    """Memory runs out in the third step while a block is on the device (limit 0: or none is, 9: never)."""
    from types import SimpleNamespace

    streamer, found = ours.module.streamer, SimpleNamespace(limit=1, raised=0, steps=0, error=torch.OutOfMemoryError)
    run_block = streamer.run_block

    def run(stage, index, block, x, *args):
        found.steps += stage == "layers" and index == 0
        if stage == "layers" and found.steps >= 3 and streamer.resident >= found.limit:
            found.raised += 1
            raise found.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run_block(stage, index, block, x, *args)

    monkeypatch.setattr(streamer, "run_block", run)
    return found


@pytest.mark.parametrize("sampler", ["ksampler", "ours"])
def test_out_of_memory_while_drawing_is_survived(host, ours, small_gpu, scarce, caplog, monkeypatch, sampler, memory):
    """The step is drawn again with every block streamed: the same latents, one message, true sizes, and a next run."""
    from comfy_execution.utils import CurrentNodeContext

    def draw(**more):
        if sampler == "ours":
            return zsample(host, ours, conditioning(), **more)
        return ksample(ours, conditioning(), latent={"samples": torch.zeros(1, 16, *more.values())} if more else None)

    said, streamer, weights = [], ours.module.streamer, ours.module.weights()
    monkeypatch.setattr(host.messages, "say", lambda text, node_id: said.append((text, node_id)))
    scarce.limit = 9
    expected = draw()
    scarce.limit = 1
    scarce.steps = 0
    with CurrentNodeContext("prompt", "17"):
        assert torch.equal(draw(), expected)
    assert scarce.raised == 1 and scarce.steps == STEPS + 1
    message = "out of memory: trying again with every block of the model streamed"
    assert [m for m in caplog.messages if "out of memory" in m] == [message] and said[-1] == (message, "17")
    assert streamer.resident == 0 and ours.model.model_lowvram
    assert ours.loaded_size() == streamer.used == weights.rest + 2 * weights.slot
    assert host.model.describe_plan(ours, 96, 64).endswith("; out of memory before, 3 of 3 blocks streamed")
    assert host.model.describe_plan(ours, 32, 32).endswith("; nothing streamed")
    assert torch.equal(draw(), expected)
    assert scarce.raised == 1 and streamer.resident == 0, "the next run does not try again what failed"
    scarce.limit = 9
    draw(**({"width": 32, "height": 32} if sampler == "ours" else {"h": 4, "w": 4}))
    assert streamer.resident == 3, "a smaller picture may have its blocks on the device"
    memory.unload_all_models()
    assert torch.equal(draw(), expected) and streamer.resident == 3


def test_out_of_memory_that_streaming_cannot_help(ours, small_gpu, scarce):
    """Any other error, and that one with nothing on the device, go to ComfyUI as before; the next run works."""
    scarce.limit = 9
    expected = ksample(ours, conditioning())

    class Other(RuntimeError):
        def __str__(self):
            return "an illegal memory access was encountered"

    for error, limit, attempts in ((Other, 1, 1), (torch.OutOfMemoryError, 0, 2), (torch.OutOfMemoryError, 0, 1)):
        scarce.error, scarce.limit, scarce.raised, scarce.steps = error, limit, 0, 0
        with pytest.raises(error):
            ksample(ours, conditioning())
        assert scarce.raised == attempts
        scarce.limit = 9
        assert torch.equal(ksample(ours, conditioning()), expected)


def test_budget_caps_the_resident_blocks(host, ours, loras, monkeypatch):
    """The loader's vram_budget: fewer blocks, the same latents, kept by clones, and never more than it says."""
    import comfy.model_management

    expected = ksample(ours, conditioning())
    comfy.model_management.unload_all_models()
    need, size = ours.model.activations([1, 16, 8, 12]), ours.model_size()
    weights = ours.module.weights()
    least = weights.rest + 2 * weights.slot + need
    for share, resident in ((1.01, 3), (0.75, (0, 1, 2)), (0.0, 0)):
        budget = max(share * size + need, least + 2**10) / 2**30
        model = host.model.load_model(TINY, "torch", "w4a16", budget)
        assert model.budget == model.clone().clone().budget == round(budget * 2**30)
        assert torch.equal(ksample(model.clone(), conditioning()), expected)
        streamer = model.module.streamer
        assert streamer.resident in (resident if isinstance(resident, tuple) else (resident,))
        assert model.loaded_size() + need <= model.budget
        model.load(torch.device("cpu"), full_load=True)
        assert model.loaded_size() + need <= model.budget
        streamed = 3 - streamer.resident
        plan = host.model.describe_plan(model, 96, 64)
        assert plan.startswith("96 x 64: ") and " weights + " in plan and "\n" not in plan
        assert plan.endswith(f"{streamed} of 3 blocks streamed" if streamed else "nothing streamed")
        said = []
        monkeypatch.setattr(host.messages, "say", lambda text, node_id, said=said: said.append(text))
        zsample(host, model, conditioning(), latent={"samples": torch.zeros(1, 16, 8, 12)})
        assert said == [plan]
        with_lora = host.model.add_loras(model, [(loras[0], 1.0)], None) if streamed < 3 else model
        zsample(host, with_lora, conditioning(), latent={"samples": torch.zeros(1, 16, 8, 12)})
        zsample(host, model, conditioning(), latent={"samples": torch.zeros(1, 16, 8, 12)})
        assert said[-1] == plan  # without the bytes of the LoRA before
        function, arguments = model.cached_patcher_init
        assert function(*arguments, disable_dynamic=True).budget == model.budget


def test_loaders_say_what_their_models_will_take(host, ours, small_gpu, monkeypatch, memory):
    """Each loader's line in numbers: weights, what grows with the picture or the prompt, what is streamed."""
    from zimage_pack.nodes.loaders import ZImageINT4ModelLoader, ZImageTextEncoderLoader, ZImageVAELoader
    from zimage_pack.zimage_core.memory.stages import decoding_bytes, encoding_bytes
    from zimage_pack.zimage_core.sizes import readable

    said = {}
    monkeypatch.setattr(host.messages, "say", lambda text, node_id: said.update({node_id: text}))
    ZImageINT4ModelLoader().load(TINY, "torch", "w4a16", 0.0, "model")
    weights, need = ours.model_size(), ours.model.activations([1, 16, 128, 128])
    drawn = f"{readable(weights)} weights + {readable(need)} to generate"
    assert said["model"].splitlines()[1] == f"1024 x 1024: {drawn}; nothing streamed"
    (clip,) = ZImageTextEncoderLoader().load(host.files.DEMO, "clip")
    encoder = clip.cond_stage_model.encoder
    weights = sum(tensor.nbytes for tensor in (*encoder.layers.parameters(), *encoder.layers.buffers()))
    need = encoding_bytes(encoder, 512)
    assert encoder.dtype is torch.float32 and weights > 2**20 and need > 2**20
    prompt = f"{readable(weights)} weights + {readable(need)} for a prompt of 512 tokens"
    assert said["clip"] == f"text encoder: {prompt}; nothing streamed"
    (vae,) = ZImageVAELoader().load(host.files.DEMO, "fp32", "vae")
    model, weights = vae.first_stage_model.vae, sum(p.nbytes for p in vae.first_stage_model.parameters())
    need = decoding_bytes(model, 1024, 1024)
    line = f"VAE: {readable(weights)} weights + up to {{}} to decode 1024 x 1024"
    assert said["vae"] == line.format(readable(need))
    monkeypatch.setattr(memory, "get_total_memory", lambda device: 2**20)
    tiled = decoding_bytes(model, 512, 512) + 16 * 1024**2
    assert tiled < need and host.vae.describe_vae(vae, 1024, 1024) == line.format(readable(tiled)) + ", in tiles"
    count = len(encoder.layers)
    small_gpu(1)
    assert host.clip.describe_encoder(clip).endswith(f" free, {count} of {count} blocks streamed")


def test_budget_that_cannot_hold_is_refused(host, ours):
    """At the loader where nothing fits, else for the picture that does not; the next one that does is drawn."""
    with pytest.raises(ValueError, match=r"vram_budget 1 MiB: the smallest picture needs .* at least 0\.\d\d GiB, or"):
        host.model.load_model(TINY, "torch", "w4a16", 1 / 1024)
    expected = ksample(ours, conditioning())
    budget = (ours.model_size() + ours.model.activations([1, 16, 8, 12])) / 2**30
    model = host.model.load_model(TINY, "torch", "w4a16", budget)
    large = {"samples": torch.zeros(1, 16, 256, 256)}
    for draw in (ksample, lambda *args, **more: zsample(host, *args, **more)):
        with pytest.raises(ValueError, match="vram_budget .* needs .* smaller or fewer pictures"):
            draw(model, conditioning(), latent=large)
        assert torch.equal(ksample(model, conditioning()), expected)
    assert "vram_budget" in host.model.try_plan(model, 2048, 2048)


def test_clones_and_detach_leave_the_model_usable(host, ours):
    expected = ksample(ours, conditioning())
    clone = ours.clone().clone()
    assert clone.model is ours.model and clone.cached_patcher_init == ours.cached_patcher_init
    assert torch.equal(ksample(clone, conditioning()), expected)
    clone.detach()
    assert clone.loaded_size() == 0
    assert torch.equal(ksample(ours, conditioning()), expected)


def test_memory_estimate_is_sane(ours):
    """At the real sizes: more than one residual stream, far less than ComfyUI's 6.7 GB without flash attention."""
    from zimage_pack.zimage_core.models.config import ZImageConfig
    from zimage_pack.zimage_core.models.transformer import ZImageTransformer

    module = ours.model.diffusion_model
    before = module.core
    try:
        with torch.device("meta"):
            module.core = ZImageTransformer(ZImageConfig(n_layers=2)).to(torch.bfloat16)
        one = ours.model.memory_required([1, 16, 128, 128])
        assert 2**28 < one < 3 * 2**30
        assert ours.model.memory_required([2, 16, 128, 128]) > 1.5 * one
        assert ours.model.memory_required([1, 16, 128, 128], {"c_crossattn": [(1, 2048, 2560)]}) > 1.2 * one
    finally:
        module.core = before


def test_key_map_of_stock_lora_loaders(ours, stock):
    """Every weight of ComfyUI's own model has the same name and shape in what our MODEL shows to key maps."""
    import comfy.lora

    theirs = {k: tuple(v.shape) for k, v in stock.model.state_dict().items() if k.startswith("diffusion_model.")}
    mine = {k: tuple(v.shape) for k, v in ours.model.state_dict().items()}
    assert {k: mine.get(k) for k in theirs} == theirs
    assert comfy.lora.model_lora_keys_unet(ours.model, {}) == comfy.lora.model_lora_keys_unet(stock.model, {})


# ---- LoRA -----------------------------------------------------------------------------------------------------


def lora_file(path, seed: int, style: str = "diffusion_model.", scale: float = 0.3):
    """A random rank-4 LoRA on every linear of the layer and the noise refiner, in keys that ComfyUI maps."""
    from safetensors.torch import save_file

    noise, tensors = torch.Generator().manual_seed(seed), {}
    widths = {"attention.to_q": (384, 384), "attention.to_v": (384, 384), "attention.to_out.0": (384, 384)}
    widths |= {"feed_forward.w1": (1024, 384), "feed_forward.w3": (1024, 384), "feed_forward.w2": (384, 1024)}
    for block in ("layers.0", "noise_refiner.0"):
        for name, (n, k) in widths.items():
            key = f"{style}{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, k, generator=noise) / k**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(n, 4, generator=noise) * scale
    save_file(tensors, path)


@pytest.fixture(scope="module")
def loras(host):
    from pathlib import Path

    import folder_paths

    root = Path(folder_paths.get_folder_paths("loras")[0])
    for seed, name in ((11, "one.safetensors"), (12, "two.safetensors")):
        lora_file(root / name, seed)
    folder_paths.filename_list_cache.clear()
    return "one.safetensors", "two.safetensors"


def stock_loader(model, name, strength):
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]


def test_loras_of_both_loaders_equal_patched_stock_weights(host, ours, stock, loras):
    """Our node and the stock loader on our MODEL change the picture as the stock loader does on the stock model."""
    plain = ksample(ours, conditioning())
    for stack in (((loras[0], 0.8),), ((loras[0], 0.7), (loras[1], -0.4))):
        expected, ours_way, stock_way = stock, ours, ours
        for name, strength in stack:
            expected = stock_loader(expected, name, strength)
            stock_way = stock_loader(stock_way, name, strength)
            ours_way = host.model.add_loras(ours_way, [(name, strength)], None)
        expected = ksample(expected, conditioning())
        assert relative(expected, plain) > 1e-2
        assert relative(ksample(ours_way, conditioning()), expected) < 1e-3
        assert relative(ksample(stock_way, conditioning()), expected) < 1e-3
        mixed = stock_loader(host.model.add_loras(ours, [stack[0]], None), *stack[-1]) if len(stack) > 1 else ours_way
        assert relative(ksample(mixed, conditioning()), expected) < 1e-3
    assert torch.equal(ksample(ours, conditioning()), plain)


def bypass_loader(model, name, strength):
    from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly

    return LoraLoaderBypassModelOnly().load_lora_model_only(model, name, strength)[0]


def test_stock_bypass_loader(host, ours, stock, loras):
    """It hooks into modules of ComfyUI's own model; on ours the same change arrives as a LoRA, also while streaming."""
    plain = ksample(ours, conditioning())
    expected = ksample(bypass_loader(stock, loras[0], 0.8), conditioning())
    one = bypass_loader(ours, loras[0], 0.8)
    assert relative(expected, plain) > 1e-2
    assert relative(ksample(one, conditioning()), expected) < 1e-3
    assert relative(ksample(stock, conditioning()), plain) < 1e-4
    assert torch.equal(ksample(ours, conditioning()), plain)
    assert relative(ksample(one.clone(), conditioning()), expected) < 1e-3
    two = bypass_loader(one, loras[1], -0.5)
    back = bypass_loader(two, loras[1], 0.5)
    assert relative(ksample(two, conditioning()), expected) > 1e-2  # a chain of them stacks
    assert relative(ksample(back, conditioning()), expected) < 1e-3
    assert torch.equal(ksample(ours, conditioning()), plain)


def test_hooks_into_modules_are_refused_and_injections_kept(ours):
    """Another change of a block would be lost beside INT4 weights, so it is refused; what injects elsewhere is run."""
    from comfy.patcher_extension import PatcherInjection

    clone = ours.clone()
    clone.add_object_patch("diffusion_model.layers.0.attention.qkv.forward", lambda x: x)
    with pytest.raises(ValueError, match=r"cannot honour a change of layers\.0\.attention\.qkv\.forward"):
        ksample(clone, conditioning())
    assert not hasattr(ours.module, "blocks") and not hasattr(ours.module.layers[0], "nothing")
    log, clone = [], ours.clone()
    injection = PatcherInjection(inject=lambda p: log.append("in"), eject=lambda p: log.append("out"))
    clone.set_injections("other", [injection])
    ksample(clone, conditioning(), steps=1)
    assert log[0] == "in" and clone.get_injections("other") == [injection]
    ksample(ours, conditioning(), steps=1)


def test_branches_with_different_loras_do_not_disturb_each_other(host, ours, loras):
    plain = ksample(ours, conditioning())
    one, two = (host.model.add_loras(ours, [(name, 1.0)], None) for name in loras)
    first, second = ksample(one, conditioning()), ksample(two, conditioning())
    assert relative(first, second) > 1e-2
    for _ in range(2):
        assert torch.equal(ksample(one, conditioning()), first)
        assert torch.equal(ksample(ours, conditioning()), plain)
        assert torch.equal(ksample(two, conditioning()), second)
        assert torch.equal(ksample(one.clone(), conditioning()), first)
    assert torch.equal(ksample(host.model.add_loras(ours, [(loras[0], 0.0)], None), conditioning()), plain)


def test_loras_while_streaming(host, ours, loras, monkeypatch):
    import comfy.model_management

    one = host.model.add_loras(ours, [(loras[0], 1.0)], None)
    expected, plain = ksample(one, conditioning()), ksample(ours, conditioning())
    load = type(ours).load
    comfy.model_management.unload_all_models()
    ours.detach()
    monkeypatch.setattr(type(ours), "load", lambda self, device_to=None, **_: load(self, device_to, 1))
    for _ in range(2):
        assert torch.equal(ksample(one, conditioning()), expected)
        assert ours.module.streamer.resident == 0
        assert torch.equal(ksample(ours, conditioning()), plain)
    monkeypatch.undo()
    comfy.model_management.unload_all_models()
    ours.detach()


def test_lora_hooks_with_a_schedule(host, ours, stock, loras):
    """A LoRA that acts for the first half of the steps, through ComfyUI's hooks on the conditioning."""
    import comfy.hooks
    import comfy.utils
    import folder_paths

    weights = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", loras[0]))

    def hooked(model):
        hooks = comfy.hooks.create_hook_lora(weights, 1.0, 0.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
        return [[c, {**e, "hooks": hooks}] for c, e in conditioning()]

    plain = ksample(ours, conditioning())
    found, expected = ksample(ours, hooked(ours)), ksample(stock, hooked(stock))
    assert relative(found, plain) > 1e-2
    assert relative(found, expected) < 1e-3
    assert torch.equal(ksample(ours, conditioning()), plain)


def test_what_is_no_lora_for_this_model(host, ours):
    from pathlib import Path

    import folder_paths
    from safetensors.torch import save_file

    root = Path(folder_paths.get_folder_paths("loras")[0])
    save_file(
        {
            "diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.zeros(4, 3840),
            "diffusion_model.layers.0.attention.to_q.lora_B.weight": torch.zeros(3840, 4),
        },
        root / "wide.safetensors",
    )
    save_file(
        {
            "double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 64),
            "double_blocks.0.img_attn.qkv.lora_B.weight": torch.zeros(64, 4),
        },
        root / "flux.safetensors",
    )
    folder_paths.filename_list_cache.clear()
    with pytest.raises(ValueError, match="3840"):
        host.model.add_loras(ours, [("wide.safetensors", 1.0)], None)
    assert "Flux" in host.messages.checked(host.files.check_lora, "flux.safetensors")
    with pytest.raises(ValueError, match="is not in"):
        host.model.add_loras(ours, [("gone.safetensors", 1.0)], None)


def lora_stack(model, *stack):
    """`ZImageLoraStack` on a model, its other slots empty."""
    from zimage_pack.nodes.lora import ZImageLoraStack

    slots = {"lora": [name for name, _ in stack] + ["none"] * 4, "strength": [s for _, s in stack] + [1.0] * 4}
    given = {f"{kind}_{i + 1}": slots[kind][i] for i in range(4) for kind in slots}
    return ZImageLoraStack().load(model, **given)[0]


def test_a_stack_is_a_chain(host, ours, stock, loras, monkeypatch):
    said, plain = [], ksample(ours, conditioning())
    monkeypatch.setattr(host.messages, "say", lambda text, node_id: said.append(text))
    stack = ((loras[0], 0.7), (loras[1], -0.4), (loras[0], 0.2))
    chain, stock_chain = ours, stock
    for name, strength in stack:
        chain = host.model.add_loras(chain, [(name, strength)], None)
        stock_chain = stock_loader(stock_chain, name, strength)
    expected = ksample(chain, conditioning())
    assert relative(expected, plain) > 1e-2
    reports, said[:] = list(said), []
    assert reports[0].startswith("one.safetensors: ") and "keys matched" in reports[0]
    assert torch.equal(ksample(lora_stack(ours, *stack), conditioning()), expected)
    assert said == ["\n".join(reports)] and len(reports) == 3
    one = lora_stack(lora_stack(ours, *stack[:2]), ("none", 1.0), stack[2])
    assert torch.equal(ksample(one, conditioning()), expected)
    for nothing in (lora_stack(ours), lora_stack(ours, (loras[0], 0.0), (loras[1], 0.0))):
        assert torch.equal(ksample(nothing, conditioning()), plain)
    other = ksample(lora_stack(stock, *stack), conditioning())  # a MODEL that is not ours
    assert torch.equal(other, ksample(stock_chain, conditioning()))
    assert relative(ksample(stock, conditioning()), plain) < 1e-4  # and its weights are its own again


# ---- other files ----------------------------------------------------------------------------------------------


def test_bf16_file_in_comfyuis_style(host, stock):
    """A dense file as ComfyUI names its weights loads through our node and equals ComfyUI's own model."""
    from pathlib import Path

    import folder_paths
    from safetensors.torch import save_file

    state = {k: v.bfloat16() for k, v in stock.model.diffusion_model.state_dict().items()}
    save_file(state, Path(folder_paths.get_folder_paths("diffusion_models")[0]) / "dense.safetensors")
    folder_paths.filename_list_cache.clear()
    assert host.messages.checked(host.files.check_model, "dense.safetensors") is True
    dense = host.model.load_model("dense.safetensors", "auto", "auto")
    assert host.model.describe_model(dense).startswith("dense")
    before = {k: v.clone() for k, v in stock.model.diffusion_model.state_dict().items()}
    stock.model.diffusion_model.load_state_dict({k: v.float() for k, v in state.items()})
    expected = ksample(stock, conditioning())
    stock.model.diffusion_model.load_state_dict(before)
    assert relative(ksample(dense, conditioning()), expected) < 1e-4


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_precisions(host, ours, precision):
    model = host.model.load_model(TINY, "torch", precision)
    assert precision in host.model.describe_model(model)
    found = ksample(model, conditioning())
    assert relative(found, ksample(ours, conditioning())) < (1e-6 if precision == "w4a16" else 0.5)


def test_a_copy_for_another_gpu_can_be_made(ours):
    """ComfyUI's multi-GPU code builds a fresh module from `cached_patcher_init`."""
    function, arguments = ours.cached_patcher_init
    copy = function(*arguments, disable_dynamic=True)
    assert copy.model is not ours.model
    assert torch.equal(ksample(copy, conditioning()), ksample(ours, conditioning()))
