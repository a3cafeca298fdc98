"""CLIP and VAE: ComfyUI's own and the adapters around the core give the same for the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WIDTH, LAYERS, VOCABULARY = 64, 4, 151936


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def stock_encoder(host):
    """ComfyUI's Qwen3 class and tokenizer at a small size, as a CLIP."""
    import comfy.sd
    import comfy.text_encoders.llama
    from comfy import sd1_clip
    from comfy.text_encoders import z_image

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }

    class Small(sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                layer="hidden",
                layer_idx=-2,
                textmodel_json_config=config,
                dtype=dtype,
                special_tokens={"pad": 151643},
                layer_norm_hidden_state=False,
                model_class=comfy.text_encoders.llama.Qwen3_4B,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options or {},
            )

    class Model(sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(device=device, dtype=dtype, name="qwen3_4b", clip_model=Small, model_options=model_options)

    class Target:
        params = {}
        clip = Model
        tokenizer = z_image.ZImageTokenizer

    clip = comfy.sd.CLIP(Target, model_options={"dtype": torch.float32})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in clip.cond_stage_model.named_parameters():
        scale = 0.2 if parameter.ndim == 2 else 0.3
        value = torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1)
        parameter.data = value if "logit_scale" not in name else parameter.data
    return clip


@pytest.fixture(scope="module")
def encoder_file(stock_encoder, tmp_path_factory):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("encoder") / "small_qwen3.safetensors"
    prefix = "qwen3_4b.transformer."
    state = stock_encoder.cond_stage_model.state_dict()
    state = {k.removeprefix(prefix): v.clone() for k, v in state.items() if k.startswith(prefix)}
    save_file(state, path)
    return path


def test_same_conditioning(host, stock_encoder, encoder_file):
    clip = host.clip.core_clip(encoder_file)
    for prompt in ("", "a red circle on a blue background", "Ein Haus am See, 水墨画, emoji 🙂 " * 8):
        ((found, extra),) = host.clip.encode_prompt(clip, prompt)
        ((expected, stock_extra),) = stock_encoder.encode_from_tokens_scheduled(stock_encoder.tokenize(prompt))
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert relative(found, expected) < 1e-4
        assert set(extra) == set(stock_extra)


def test_stock_text_nodes_take_our_clip(host, encoder_file):
    import nodes

    clip = host.clip.core_clip(encoder_file)
    ((expected, _),) = host.clip.encode_prompt(clip, "a house")
    ((found, _),) = nodes.CLIPTextEncode().encode(clip.clone(), "a house")[0]
    assert torch.equal(found, expected)
    ((zero, _),) = nodes.ConditioningZeroOut().zero_out(nodes.CLIPTextEncode().encode(clip, "a house")[0])[0]
    assert not zero.any()


# ---- LoRA on the text encoder ---------------------------------------------------------------------------------


def encoder_lora(path: Path, seed: int, style: str = "text_encoders.qwen3_4b.transformer.model.") -> Path:
    """A random rank-4 LoRA with alpha on linears of two layers that Z-Image runs, in keys that ComfyUI maps."""
    from safetensors.torch import save_file

    noise, tensors = torch.Generator().manual_seed(seed), {}
    sizes = {"self_attn.q_proj": (256, WIDTH), "self_attn.o_proj": (WIDTH, 256)}
    sizes |= {"mlp.gate_proj": (128, WIDTH), "mlp.down_proj": (WIDTH, 128)}
    for layer in (0, 2):
        for name, (n, k) in sizes.items():
            name = f"layers.{layer}.{name}"
            key = style + (name.replace(".", "_") if style.endswith("_") else name)
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, k, generator=noise) / k**0.5
            tensors[f"{key}.lora_up.weight"] = torch.randn(n, 4, generator=noise) * 0.2
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def encoder_loras(host):
    import folder_paths

    root = Path(folder_paths.get_folder_paths("loras")[0])
    names = [encoder_lora(root / f"encoder_{seed}.safetensors", seed).name for seed in (1, 2)]
    folder_paths.filename_list_cache.clear()
    return names


def with_lora(clip, name: str, strength: float, bypass: bool = False):
    """A stock LoRA loader on a CLIP (no MODEL)."""
    import comfy.sd
    import comfy.utils
    import folder_paths

    weights = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", name), safe_load=True)
    load = comfy.sd.load_bypass_lora_for_models if bypass else comfy.sd.load_lora_for_models
    return load(None, clip, weights, 0, strength)[1]


def encode(clip, prompt: str = "a red circle on a blue background") -> torch.Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0]


@pytest.mark.parametrize("bypass", [False, True])
def test_stock_lora_loaders_reach_our_encoder(host, stock_encoder, encoder_file, encoder_loras, bypass, memory):
    """As they change ComfyUI's own encoder; clones keep their own sets, and none is left behind."""
    clip = host.clip.core_clip(encoder_file)
    plain = encode(clip)
    one, expected_one = (with_lora(c, encoder_loras[0], 0.8, bypass) for c in (clip, stock_encoder))
    expected = encode(expected_one)
    assert relative(expected, plain) > 1e-2
    assert relative(encode(one), expected) < 1e-3
    assert torch.equal(encode(clip), plain)
    assert relative(encode(one.clone()), expected) < 1e-3
    memory.unload_all_models()
    assert torch.equal(encode(clip), plain)
    memory.unload_all_models()
    assert relative(encode(one), expected) < 1e-3
    two, expected_two = (with_lora(c, encoder_loras[1], -0.4) for c in (one, expected_one))
    assert relative(encode(two), encode(expected_two)) < 1e-3 < relative(encode(two), expected)
    assert torch.equal(encode(clip), plain)
    assert relative(encode(one), expected) < 1e-3
    assert torch.equal(encode(with_lora(clip, encoder_loras[0], 0.0)), plain)
    assert relative(encode(stock_encoder), plain) < 1e-4


def test_stock_loader_with_model_and_clip(host, encoder_file, encoder_loras):
    """One file for both: each gets its part, and neither refuses the other's."""
    import folder_paths
    from safetensors.torch import load_file, save_file

    import nodes

    root = Path(folder_paths.get_folder_paths("loras")[0])
    name, noise = "diffusion_model.layers.0.attention.to_out.0", torch.Generator().manual_seed(5)
    both = load_file(root / encoder_loras[0])
    both |= {f"{name}.lora_A.weight": torch.randn(4, 384, generator=noise) / 20}
    both |= {f"{name}.lora_B.weight": torch.randn(384, 4, generator=noise)}
    save_file(both, root / "both.safetensors")
    folder_paths.filename_list_cache.clear()
    model = host.model.load_model("svdq-int4_r32-z-image-tiny.safetensors", "torch", "w4a16")
    clip = host.clip.core_clip(encoder_file)
    found_model, found_clip = nodes.LoraLoader().load_lora(model, clip, "both.safetensors", 0.5, 0.8)
    assert set(found_model.patches) == {"diffusion_model.layers.0.attention.out.weight"} and not model.patches
    assert torch.equal(encode(found_clip), encode(with_lora(clip, encoder_loras[0], 0.8)))


def test_key_styles_of_encoder_loras(host, stock_encoder, encoder_file, tmp_path):
    """Every name that ComfyUI's map gives the linears of its own encoder leads to the same one of ours."""
    import comfy.lora

    maps = [
        comfy.lora.model_lora_keys_clip(c.cond_stage_model, {})
        for c in (stock_encoder, host.clip.core_clip(encoder_file))
    ]
    linears = {key: name for key, name in maps[0].items() if "_proj" in key and f"layers.{LAYERS - 1}." not in name}
    assert linears and {key: maps[1].get(key) for key in linears} == linears


@pytest.mark.parametrize("streaming", [False, True])
def test_lora_hooks_on_our_encoder(host, stock_encoder, encoder_file, encoder_loras, small_gpu, streaming):
    """A hook that patches the CLIP (Create Hook LoRA, Set CLIP Hooks)."""
    import comfy.hooks
    import comfy.utils
    import folder_paths

    import nodes

    weights = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", encoder_loras[0]), safe_load=True)

    def hooked(clip):
        hooks = comfy.hooks.create_hook_lora(weights, 0.0, 0.8)
        clip = clip.clone()
        clip.apply_hooks_to_conds = hooks
        clip.patcher.forced_hooks = hooks.clone()
        clip.use_clip_schedule = False
        clip.patcher.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip))
        return nodes.CLIPTextEncode().encode(clip, "a house")[0][0][0]

    clip = host.clip.core_clip(encoder_file)
    plain, expected = encode(clip, "a house"), hooked(stock_encoder)
    if streaming:
        small_gpu(1, clip.patcher)
    found, streamer = hooked(clip), clip.cond_stage_model.streamer
    assert relative(expected, plain) > 1e-2 and relative(found, expected) < 1e-3
    assert streamer.resident == (0 if streaming else 3)
    if streaming:  # the slots hold the layers as they are now, and ComfyUI knows
        assert clip.patcher.loaded_size() == streamer.used == 2 * clip.cond_stage_model.weights().slot
    assert torch.equal(encode(clip, "a house"), plain)


def test_our_nodes_name_what_they_leave_to_the_encoder(host, encoder_loras, monkeypatch, caplog):
    said, model = [], host.model.load_model("svdq-int4_r32-z-image-tiny.safetensors", "torch", "w4a16")
    monkeypatch.setattr(host.messages, "say", lambda text, node_id: said.append(text))
    host.model.add_loras(model, [(encoder_loras[0], 1.0)], None)
    assert "its 8 modules of the text encoder are left out: to apply them, put ComfyUI's Load LoRA" in said[0]
    assert "encoder_1.safetensors: its 8 modules of the text encoder are left out" in caplog.text


def test_saving_and_merging_our_encoder_are_refused(host, encoder_file):
    from comfy_extras.nodes_model_merging import CLIPMergeSimple, CLIPSave

    clip = host.clip.core_clip(encoder_file)
    with pytest.raises(ValueError, match="this text encoder cannot be saved here: use a file of Qwen3-4B"):
        CLIPSave().save(clip, "clip/test")
    with pytest.raises(ValueError, match="cannot be merged"):
        CLIPMergeSimple().merge(clip, clip, 0.5)


def flux_vae_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of the real autoencoder's size, BFL keys."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    sizes = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    sizes |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    package = "comfy.ldm.modules.diffusionmodules.model."
    with torch.device("meta"):
        model = AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": package + "Encoder", "params": sizes},
            decoder_config={"target": package + "Decoder", "params": sizes},
        )
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, like in model.state_dict().items():
        if "norm" in name:
            state[name] = torch.ones(like.shape) if name.endswith("weight") else torch.zeros(like.shape)
        else:
            fan = max(1, like[0].numel()) if like.ndim > 1 else 100
            state[name] = torch.randn(like.shape, generator=generator) / fan**0.5
    return {name: tensor.bfloat16() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def vae_file(host):
    import folder_paths
    from safetensors.torch import save_file

    path = Path(folder_paths.get_folder_paths("vae")[0]) / "ae.safetensors"
    save_file(flux_vae_state(), path)
    return path


def test_same_pixels_and_latents(host, vae_file):
    import nodes

    stock, core = host.vae.load_vae(vae_file.name, "fp32"), host.vae.core_vae(vae_file, torch.float32)
    assert not isinstance(stock.first_stage_model, host.vae.CoreVAE)
    assert isinstance(core.first_stage_model, host.vae.CoreVAE)
    latent = {"samples": torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(1))}
    expected = nodes.VAEDecode().decode(stock, latent)[0]
    assert expected.shape == (2, 48, 64, 3)
    for found in (nodes.VAEDecode().decode(core, latent)[0], host.vae.decode(core, latent, "auto")):
        assert relative(found, expected) < 1e-4
    assert torch.equal(host.vae.decode(stock, latent, "off"), expected)
    images = torch.rand(1, 50, 64, 3, generator=torch.Generator().manual_seed(2))
    found, expected = (nodes.VAEEncode().encode(v, images)[0]["samples"] for v in (core, stock))
    assert found.shape == expected.shape == (1, 16, 6, 8)
    assert relative(found, expected) < 1e-4


def test_wrong_latents_are_refused(host, vae_file):
    vae = host.vae.core_vae(vae_file, torch.float32)
    with pytest.raises(ValueError, match="4 channels, Z-Image's have 16"):
        host.vae.decode(vae, {"samples": torch.zeros(1, 4, 8, 8)}, "auto")


def test_files_that_comfyui_reads_itself_become_its_own_clip(host, monkeypatch, tmp_path):
    """Qwen3-4B under its usual names goes to ComfyUI's loader, in one file; other sizes and folders go to the core."""
    import folder_paths

    def encoder(path: Path, width: int, prefix: str = "model."):
        header = {
            f"{prefix}embed_tokens.weight": ("BF16", (151936, width)),
            f"{prefix}layers.0.self_attn.q_norm.weight": ("BF16", (128,)),
            f"{prefix}layers.0.self_attn.q_proj.weight": ("BF16", (4096, width)),
        }
        end, entries = 0, {}
        for name, (dtype, shape) in header.items():
            size = 2 * torch.Size(shape).numel()
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        raw = json.dumps(entries).encode()
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)  # sparse

    root = Path(folder_paths.get_folder_paths("text_encoders")[0])
    encoder(root / "qwen_3_4b.safetensors", 2560)
    encoder(root / "other.safetensors", 1024)
    folder_paths.filename_list_cache.clear()
    calls = []
    monkeypatch.setattr(host.clip.comfy.sd, "load_clip", lambda **given: calls.append(given) or "clip")
    assert host.clip.load_clip("qwen_3_4b.safetensors") == "clip"
    assert calls[0]["ckpt_paths"] == [str(root / "qwen_3_4b.safetensors")]
    assert host.files.reads_encoder(root / "other.safetensors") is False
    assert host.files.reads_encoder(tmp_path) is False
    (root / "qwen_3_4b.safetensors").unlink()
    (root / "other.safetensors").unlink()


def test_size_of_the_encoder_without_the_table_that_stays_on_the_host(host, encoder_file):
    clip = host.clip.core_clip(encoder_file)
    assert clip.patcher.model_size() == sum(p.nbytes for p in clip.cond_stage_model.encoder.layers.parameters())
    with pytest.raises(ValueError, match="token 200000, this text encoder knows 151936"):
        clip.encode_from_tokens({"zimage": [[(200000, 1.0)]]})


@pytest.fixture(scope="module")
def deep_encoders(encoder_file):
    """Encoders of nine layers, of which eight are run, in fp32 and in INT8."""
    from safetensors.torch import load_file, save_file
    from zimage_pack.zimage_core.quantize.encoder import quantize_encoder

    state = load_file(encoder_file)
    for name in [name for name in state if ".layers.0." in name]:
        state |= {name.replace(".0.", f".{i}."): state[name] * (1 + i / 20) for i in range(1, 9)}
    paths = {form: encoder_file.with_name(f"deep_{form}.safetensors") for form in ("fp32", "int8")}
    save_file(state, paths["fp32"])
    quantize_encoder(paths["fp32"], paths["int8"])
    return paths


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_byte_allowance_becomes_whole_layers(host, deep_encoders, form):
    clip, cpu = host.clip.core_clip(deep_encoders[form]), torch.device("cpu")
    patcher, streamer, expected = clip.patcher, clip.cond_stage_model.streamer, encode(clip)
    size, slot = patcher.model_size(), clip.cond_stage_model.weights().slot
    assert streamer.resident == 8 and patcher.loaded_size() == size and not patcher.model.model_lowvram

    def encoded():
        """The features, each layer run by the streamer and the hidden state on its device, which a CPU cannot tell."""
        ran, forward = [], type(clip.cond_stage_model.encoder).forward
        with pytest.MonkeyPatch.context() as patch:
            run_block = streamer.run_block
            patch.setattr(streamer, "run_block", lambda *args: ran.append(args[1]) or run_block(*args))
            patch.setattr(
                type(clip.cond_stage_model.encoder),
                "forward",
                lambda self, ids, **given: ran.append(given["device"]) or forward(self, ids, **given),
            )
            out = clip.cond_stage_model.encode_token_weights(clip.tokenize("a red circle on a blue background"))[0]
        assert ran == [streamer.device, *range(8)]
        return out

    for allowance, resident in ((1, 0), (size // 2, (size // 2 - 2 * slot) * 8 // size), (size, 8), (size - 1, 5)):
        patcher.load(cpu, lowvram_model_memory=allowance)
        assert streamer.resident == resident and torch.equal(encoded(), expected)
        assert patcher.model.model_lowvram is (resident < 8)
        assert patcher.loaded_size() == streamer.used == (size if resident == 8 else resident * size // 8 + 2 * slot)
    assert patcher.partially_load(cpu, extra_memory=size) == 3 * size // 8 - 2 * slot
    assert streamer.resident == 8 and torch.equal(encoded(), expected)
    freed = patcher.partially_unload(cpu, size // 3)
    assert freed >= size // 3 and patcher.loaded_size() == streamer.used == size - freed
    assert 0 < streamer.resident < 8 and torch.equal(encoded(), expected)
    patcher.detach()
    assert patcher.loaded_size() == 0 and torch.equal(encode(clip), expected)


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_comfyuis_memory_manager_streams_the_encoder(
    host, deep_encoders, encoder_loras, small_gpu, monkeypatch, form, memory
):
    """Its arithmetic for a GPU with so and so much free memory: the same features, within it, and as the node said."""
    from zimage_pack.zimage_core.sizes import readable

    cpu = torch.device("cpu")
    clip = host.clip.core_clip(deep_encoders[form])
    lora, expected = with_lora(clip, encoder_loras[0], 0.8), encode(clip)
    module, size, with_it = clip.cond_stage_model, clip.patcher.model_size(), encode(lora)
    assert relative(with_it, expected) > 1e-2
    monkeypatch.setattr(clip.patcher, "offload_device", torch.device("meta"))  # another than that it runs on
    memory.unload_all_models()
    need = module.need(len(clip.tokenize("a red circle on a blue background")["zimage"][0]))
    for share, resident in ((0.01, 0), (0.6, (1, 2, 3)), (2.0, 8)):
        small_gpu(share * size + need, clip.patcher)
        said = host.patcher.describe_need(clip.patcher, need, "needed")
        assert torch.equal(encode(clip), expected)
        assert module.streamer.resident in (resident if isinstance(resident, tuple) else (resident,))
        assert clip.patcher.loaded_size() <= max(share, 0.26) * size  # two slots are the least there is
        streamed = len(module.streamer.host)
        how = f"{streamed} of 8 blocks streamed" if streamed else "nothing streamed"
        assert said.startswith(f"{readable(clip.patcher.loaded_size())} weights") and said.endswith(how)
        assert torch.equal(encode(lora), with_it)
        assert module.streamer.host or clip.patcher.loaded_size() == clip.patcher.model_size() > size  # with the LoRA
        assert torch.equal(encode(clip), expected)
    memory.free_memory(memory.get_free_memory() + 0.4 * size, cpu)
    assert 0 < module.streamer.resident < 8 and clip.patcher.loaded_size() == module.streamer.used <= 0.6 * size
    assert torch.equal(encode(clip), expected)
    memory.free_memory(1e30, cpu)
    assert clip.patcher.loaded_size() == module.streamer.used == 0
    assert not any(m.model is not None and m.model.is_clone(clip.patcher) for m in memory.current_loaded_models)
    assert torch.equal(encode(lora), with_it) and torch.equal(encode(clip), expected)


def test_comfyui_is_told_what_a_prompt_needs(host, deep_encoders, monkeypatch, memory):
    """Activations and, for weights in a small form, one of them dequantized; more for a longer prompt."""
    asked = []
    load = memory.load_models_gpu
    monkeypatch.setattr(
        memory, "load_models_gpu", lambda models, memory_required=0: asked.append(memory_required) or load(models)
    )
    for form in ("fp32", "int8"):
        clip = host.clip.core_clip(deep_encoders[form])
        for prompt in ("a house", "a house " * 200):
            encode(clip, prompt)
    (short, long, short_int8, _), tokens = asked, len(clip.tokenize("a house " * 200)["zimage"][0])
    assert tokens > 400 and long > 10 * short > 0 and long >= tokens * WIDTH * 4 * 8
    assert short_int8 - short > 128 * WIDTH * 4


def test_plan_of_comfyuis_own_vae_and_encoder(host, vae_file, stock_encoder):
    """What the loaders say of models that ComfyUI runs: the VAE's figure is not exceeded, and not far from it."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode
    from zimage_pack.zimage_core.memory.stages import decoding_bytes
    from zimage_pack.zimage_core.models.vae import VAE
    from zimage_pack.zimage_core.sizes import readable

    class Live(TorchDispatchMode):
        now = peak = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            storage = out.untyped_storage() if isinstance(out, torch.Tensor) else None
            if storage is not None and storage._cdata not in known:
                known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
            return out

        def forget(self, key, size):
            known.discard(key)
            self.now -= size

    vae, latents = host.vae.load_vae(vae_file.name, "fp32"), torch.zeros(1, 16, 16, 16)
    known = {p.untyped_storage()._cdata for p in (*vae.first_stage_model.parameters(), latents)}
    with Live() as live:
        vae.first_stage_model.decode(latents)
    weights = sum(p.nbytes for p in vae.first_stage_model.parameters())
    with torch.device("meta"):
        need = decoding_bytes(VAE(), 128, 128)
    line = f"VAE: {readable(weights)} weights + up to {readable(need)} to decode 128 x 128"
    assert host.vae.describe_vae(vae, 128, 128) == line
    assert 0.8 * need < live.peak <= need
    weights = readable(stock_encoder.patcher.model_size())
    assert host.clip.describe_encoder(stock_encoder) == f"text encoder: {weights} weights, run by ComfyUI itself"


def test_encoder_leaves_the_device_after_the_prompt(host, encoder_file, monkeypatch, memory):
    """On a machine whose encoder runs on another device than it waits on: everything but it is kept."""
    clip = host.clip.core_clip(encoder_file)
    other = host.clip.core_clip(encoder_file)
    freed = []
    host.clip.encode_prompt(other, "kept")
    monkeypatch.setattr(memory, "free_memory", lambda need, device, keep, **_: freed.append((device, list(keep))))
    monkeypatch.setattr(clip.patcher, "offload_device", torch.device("meta"))
    loaded = memory.LoadedModel(clip.patcher)
    loaded.real_model = lambda: clip.patcher.model
    monkeypatch.setattr(memory, "current_loaded_models", [*memory.current_loaded_models, loaded])
    host.clip.release(clip.patcher)
    device, keep = freed[-1]
    assert device == clip.patcher.load_device
    assert loaded not in keep and any(m.model is other.patcher for m in keep)
    monkeypatch.undo()  # while the encoders live: ComfyUI's own list has to see them go
