"""What stock nodes ask of our MODEL, CLIP and VAE and these cannot do: a sentence that says what does work.

Never a crash in the middle of ComfyUI, never silence. All on the bundled demo.
"""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def nodes(host):
    """ComfyUI's node classes by their ids, those of `comfy_extras` included."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def model(host):
    return host.model.load_model(host.files.DEMO, "torch", "w4a16")


@pytest.fixture(scope="module")
def clip(host):
    return host.clip.load_clip(host.files.DEMO)


@pytest.fixture(scope="module")
def vae(host):
    return host.vae.load_vae(host.files.DEMO, "fp32")


def run(node, **inputs):
    """The outputs of a node, of either of ComfyUI's kinds."""
    if hasattr(node, "define_schema"):
        out = node.execute(**inputs)
        return getattr(out, "args", out)
    return getattr(node(), node.FUNCTION)(**inputs)


def encode(clip, prompt: str = "a red circle") -> torch.Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0]


# ---- the weights themselves -----------------------------------------------------------------------------------

QUANTIZED = r"a quantized model cannot be {} here: do that with its BF16 file, and quantize the result"
TRAINED = "a model from the Z-Image INT4 Model Loader cannot be trained: load its BF16 file with Load Diffusion Model"
ENCODER = r"this text encoder cannot be {} here: use a file of Qwen3-4B that Load CLIP reads"


@pytest.mark.parametrize(
    "name, inputs, what",
    [
        ("ModelSave", {"model": "model", "filename_prefix": "x"}, "saved"),
        ("CheckpointSave", {"model": "model", "clip": "clip", "vae": "vae", "filename_prefix": "x"}, "saved"),
        ("ModelMergeSimple", {"model1": "model", "model2": "model", "ratio": 0.5}, "merged with another"),
        ("ModelMergeSubtract", {"model1": "model", "model2": "model", "multiplier": 1.0}, "merged with another"),
        ("ModelMergeAdd", {"model1": "model", "model2": "model"}, "merged with another"),
        ("LoraSave", {"model_diff": "model"}, "turned into a LoRA"),
    ],
)
def test_nodes_that_need_the_models_weights(nodes, request, name, inputs, what):
    given = {k: request.getfixturevalue(v) if v in ("model", "clip", "vae") else v for k, v in inputs.items()}
    if name == "LoraSave":
        given |= {"filename_prefix": "x", "rank": 4, "lora_type": "standard", "bias_diff": True}
    with pytest.raises(ValueError, match=f"{QUANTIZED.format(what)}|{ENCODER.format(what)}"):
        run(nodes[name], **given)


def test_training_a_lora(nodes, model, clip):
    node = nodes["TrainLoraNode"]
    given = {"model": model, "latents": [{"samples": torch.zeros(1, 16, 8, 8)}], "positive": [[[encode(clip), {}]]]}
    for spec in node.define_schema().inputs:
        if spec.id not in given:
            options = getattr(spec, "options", None)
            default = getattr(spec, "default", None)
            given[spec.id] = [default if default is not None else options[0] if options else None]
    names = inspect.signature(node.execute).parameters
    given = {k: v if isinstance(v, list) and k != "model" else [v] for k, v in given.items() if k in names}
    given |= {"latents": [{"samples": torch.zeros(1, 16, 8, 8)}], "existing_lora": ["[None]"], "steps": [1]}
    given |= {"training_dtype": ["none"], "model": [model]}
    with pytest.raises(ValueError, match=TRAINED):
        node.execute(**given)


TEXT = {"prompt": "hello", "max_length": 8, "sampling_mode": {"sampling_mode": "off"}}


@pytest.mark.parametrize(
    "name, inputs, what",
    [
        ("CLIPSave", {"filename_prefix": "x"}, "saved"),
        (
            "TextGenerate",
            {"prompt": "hello", "max_length": 8, "sampling_mode": {"sampling_mode": "off"}},
            "used to write text",
        ),
    ],
)
def test_nodes_that_need_the_encoders_weights(nodes, clip, name, inputs, what):
    with pytest.raises(ValueError, match=ENCODER.format(what)):
        run(nodes[name], clip=clip, **inputs)


def test_merging_the_encoder(nodes, clip):
    with pytest.raises(ValueError, match=ENCODER.format("merged with another")):
        run(nodes["CLIPMergeSimple"], clip1=clip, clip2=clip, ratio=0.5)


def test_scaling_the_encoders_attention_is_no_matter_of_loras(nodes, clip):
    with pytest.raises(ValueError, match="takes LoRAs only, it cannot be scaled") as refusal:
        run(nodes["CLIPAttentionMultiply"], clip=clip, q=3.0, k=1.0, v=1.0, out=1.0)
    assert "LoRA Loader" not in str(refusal.value)


def test_saving_a_vae(nodes, vae, monkeypatch):
    """The demo's own constants would come back as Flux's; a VAE with Flux's is written under names that can be read."""
    import folder_paths
    from safetensors.torch import load_file

    with pytest.raises(ValueError, match="its scale and shift would be lost"):
        run(nodes["VAESave"], vae=vae, filename_prefix="vae/demo")
    module, flux = vae.first_stage_model.vae, vae.first_stage_model.latent_format
    constants = {"scaling_factor": flux.scale_factor, "shift_factor": flux.shift_factor}
    monkeypatch.setattr(module, "config", replace(module.config, **constants))
    run(nodes["VAESave"], vae=vae, filename_prefix="vae/plain")
    (file,) = Path(folder_paths.get_output_directory(), "vae").glob("plain*.safetensors")
    saved = load_file(file)
    assert saved.keys() == module.state_dict().keys() and "decoder.conv_in.weight" in saved


# ---- what would be ignored ------------------------------------------------------------------------------------


def test_model_compute_dtype(nodes, model):
    node = nodes["ModelComputeDtype"]
    for dtype in ("default", {torch.float32: "fp32", torch.bfloat16: "bf16"}[model.module.dtype]):
        run(node, model=model, dtype=dtype)
    with pytest.raises(ValueError, match="not in torch.float16: remove Model Compute Dtype"):
        run(node, model=model, dtype="fp16")


@pytest.mark.parametrize("layer, good", [(-2, True), (-1, False), (-3, False)])
def test_clip_set_last_layer(nodes, clip, layer, good):
    (changed,) = run(nodes["CLIPSetLastLayer"], clip=clip, stop_at_clip_layer=layer)
    if good:
        assert torch.equal(encode(changed), encode(clip))
        return
    with pytest.raises(ValueError, match=f"reads layer -2 of its text encoder, not {layer}: remove"):
        encode(changed)
    encode(clip)


def test_a_template_of_a_nodes_own_is_used(clip):
    plain = clip.tokenize("a red circle")["zimage"][0]
    again = clip.tokenize("a red circle", llama_template="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
    assert again["zimage"][0] == plain
    bare = clip.tokenize("a red circle", llama_template="{}")["zimage"][0]
    assert len(bare) < len(plain) and [pair[0] for pair in bare] == clip.tokenizer.tokenizer.encode("a red circle")


def test_long_prompts_are_cut_where_it_is_asked_and_said_to_be_long(host, clip, monkeypatch):
    from comfy_execution.utils import CurrentNodeContext

    said = []
    monkeypatch.setattr(host.messages, "say", lambda text, node_id: said.append((text, node_id)))
    with CurrentNodeContext("prompt", "4"):
        short = host.clip.encode_prompt(clip, "a red circle")[0][0]
        prompt = " ".join(f"a small green star {i}." for i in range(170))
        long = host.clip.encode_prompt(clip, prompt, 1536)[0][0]
        cut = host.clip.encode_prompt(clip, prompt)[0][0]
    assert short.shape[1] < 30 and long.shape[1] > 800 and cut.shape[1] == 512
    torch.testing.assert_close(cut, long[:, :512])
    assert said[0] == (f"{long.shape[1]} tokens: Z-Image was trained on prompts of up to 512", "4")
    about, _, words = said[1][0].partition(": cut from ")
    assert about == f"{long.shape[1]} tokens, the first 512 are used"
    kept = prompt[: prompt.index(words.removesuffix(" on").strip("'"))]
    whole = len(clip.tokenize(kept)["zimage"][0]) - 5  # without the template behind it
    assert 500 < whole <= 512
