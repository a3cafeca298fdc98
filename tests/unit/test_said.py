"""Nothing is ignored silently: what a file or an option asks for is done, or a line says that it is not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_core import cli, load_pipeline, sampler
from zimage_core.lora.read import Lora, load_lora
from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig
from zimage_core.quantize.run import quantize_checkpoint

SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": 1}


@pytest.fixture
def folder(tiny_files, tmp_path):
    """A whole diffusers folder of the tiny files."""
    for part, name in (("transformer", "model"), ("text_encoder", "text_encoder"), ("vae", "vae")):
        (tmp_path / part).mkdir()
        shutil.copy(tiny_files[name], tmp_path / part / "model.safetensors")
    shutil.copy(tiny_files["text_encoder"].parent / "tokenizer.json", tmp_path / "text_encoder")
    (tmp_path / "tokenizer").symlink_to(tmp_path / "text_encoder")
    (tmp_path / "scheduler").mkdir()
    return tmp_path


def scheduler(folder, **config):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def test_the_folder_s_scheduler_is_followed(folder, monkeypatch):
    """Z-Image (not Turbo) has shift 6: its sigmas, and so its picture, are others."""
    scheduler(folder, _class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)
    usual = load_pipeline(folder, device="cpu")("a", **SIZE)[0]
    scheduler(folder, _class_name="FlowMatchEulerDiscreteScheduler", shift=6.0, use_dynamic_shifting=False)
    seen, plain = [], sampler.denoise
    monkeypatch.setattr(
        sampler, "denoise", lambda m, x, sigmas, *a, **k: seen.append(sigmas) or plain(m, x, sigmas, *a, **k)
    )
    other = load_pipeline(folder, device="cpu")("a", **SIZE)[0]
    assert seen[-1].tolist() == pytest.approx([1, 6 * 0.5 / (1 + 5 * 0.5), 0])
    assert usual.tobytes() != other.tobytes()


@pytest.mark.parametrize("shift", ["NaN", "0", "-3", "1e400", '"6"', "null", "true", "[3]"])
def test_a_scheduler_s_shift_is_checked(folder, shift):
    (folder / "scheduler" / "scheduler_config.json").write_text(f'{{"shift": {shift}}}')
    with pytest.raises(ValueError, match="expected a fixed shift up to 100"):
        load_pipeline(folder, device="cpu")


def pair(rank: int = 4) -> dict[str, torch.Tensor]:
    return {"lora_A.weight": torch.ones(rank, 128), "lora_B.weight": torch.ones(128, rank)}


def named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{leaf}": tensor for leaf, tensor in tensors.items()}


def test_peft_s_alpha_counts_for_its_file_and_its_folder(tmp_path):
    """lora_alpha / r = 32 / 8 in adapter_config.json, as PEFT itself has it."""
    save_file(named("base_model.model.layers.0.attention.to_out.0", pair(8)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 32}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        (delta,) = load_lora(path).transformer["layers.0.attention.to_out"]
        assert delta.scale == 4


def test_an_alpha_in_metadata_alone_is_said(tmp_path, caplog):
    save_file(named("layers.0.attention.to_out.0", pair()), tmp_path / "x.safetensors", {"ss_network_alpha": "16"})
    load_lora(tmp_path / "x.safetensors")
    assert "its metadata say ss_network_alpha 16, its tensors hold no alpha" in caplog.text


def test_ai_toolkit_s_magnitude_is_dora():
    tensors = named("transformer.layers.0.attention.to_out.0", pair() | {"magnitude": torch.full((128,), 2.0)})
    lora = Lora.from_tensors(tensors)
    (delta,) = lora.transformer["layers.0.attention.to_out"]
    assert delta.magnitude is not None and not lora.report.unmatched
    assert lora.report.formats == {"DoRA LoRA": 1}


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_wrapped_names_are_unwrapped(tiny_files, tmp_path, wrapper):
    """As torch.compile, DDP and FSDP leave them, in a LoRA and in a model; the picture is the same."""
    assert Lora.from_tensors(named(f"transformer.{wrapper}layers.0.attention.to_out.0", pair())).report.transformer == 1
    assert Lora.from_tensors(named(f"layers.0.{wrapper}attention.to_out.0", pair())).report.transformer == 1
    tensors = {wrapper + key: tensor for key, tensor in load_file(tiny_files["model"]).items()}
    save_file(tensors, tmp_path / "wrapped.safetensors")
    plain, wrapped = (
        load_pipeline(**{**tiny_files, "model": path}, device="cpu")("a", **SIZE)[0]
        for path in (tiny_files["model"], tmp_path / "wrapped.safetensors")
    )
    assert plain.tobytes() == wrapped.tobytes()


def test_options_without_effect_are_said(tiny_files, caplog):
    pipeline = load_pipeline(**tiny_files, device="cpu")
    pipeline("a", **SIZE, negative_prompt="blur", strength=0.5)
    assert "negative prompt: has no effect without guidance" in caplog.text
    assert "strength 0.5: has no effect without a picture" in caplog.text
    caplog.clear()
    pipeline("a", **SIZE, negative_prompt="blur", guidance_scale=1.0, image=Image.new("RGB", (32, 32)), strength=0.5)
    assert "no effect" not in caplog.text


def test_an_image_of_which_nothing_is_kept_is_said(tiny_files, caplog):
    """The library's own strength is 1, the command's 0.6."""
    pipeline, image = load_pipeline(**tiny_files, device="cpu"), Image.new("RGB", (32, 32))
    pipeline("a", **SIZE, image=image)
    assert "image: nothing of it is kept at strength 1; 0.6 keeps much of it" in caplog.text
    caplog.clear()
    pipeline("a", **SIZE, image=image, strength=0.6)
    pipeline("a", **SIZE, image=image, mask=Image.new("L", (32, 32), 255))
    assert "nothing of it" not in caplog.text


def test_a_prompt_that_is_cut_is_said_on_the_command_line(tiny_files, tmp_path, capsys):
    options = [f"--{name.replace('_', '-')}={path}" for name, path in tiny_files.items()]
    options += ["--width=32", "--height=32", "--steps=1", "--device=cpu", f"--out={tmp_path / 'x.png'}"]
    assert cli.main(["generate", "cat " * 600, *options]) == 0
    assert "only the first 512 are used; shorten it" in capsys.readouterr().err


def test_the_encoder_s_half_of_a_lora_that_is_merged_is_said(outliers, tmp_path):
    pair = {"lora_down.weight": torch.ones(4, 64), "lora_up.weight": torch.ones(64, 4)}
    tensors = named("lora_te_model_layers_0_self_attn_o_proj", pair)
    down = {"lora_A.weight": torch.ones(4, 384) / 100, "lora_B.weight": torch.ones(384, 4) / 100}
    save_file(tensors | named("layers.0.attention.to_out.0", down), tmp_path / "both.safetensors")
    with pytest.warns(UserWarning, match="both.safetensors: its 1 modules of the text encoder are not merged; load it"):
        quantize_checkpoint(outliers, tmp_path / "q", rank=16, merge=[(tmp_path / "both.safetensors", 1.0)])


@pytest.fixture(scope="module")
def wide(tiny_files, tmp_path_factory):
    """A text encoder of 128 columns beside a transformer that takes 64."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copy(tiny_files["text_encoder"].parent / "tokenizer.json", folder)
    config = TextEncoderConfig(259, 128, 96, num_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    state = TextEncoder(config).state_dict()
    save_file({f"model.{key}": tensor.clone() for key, tensor in state.items()}, folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


def test_an_encoder_of_another_width_is_refused_before_anything_runs(tiny_files, wide):
    stages = []
    with pytest.raises(ValueError, match=r"encoder\.safetensors: expected a text encoder of width 64.* found 128"):
        pipeline = load_pipeline(**{**tiny_files, "text_encoder": wide}, device="cpu")
        pipeline("a", **SIZE, on_stage=lambda *stage: stages.append(stage))
    assert not stages


def test_and_before_quantizing(outliers, wide, tmp_path, capsys):
    target = tmp_path / "q.safetensors"
    assert cli.main(["quantize", str(outliers), str(target), "--rank", "32", "--text-encoder", str(wide)]) == 2
    assert "expected a text encoder of width 64" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
