"""Shared fixtures: a tiny set of model files in the genuine formats, random except for the golden transformer."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # torch takes all cores in each, and so do its children
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(processes))))

TINY_MODEL = Path(__file__).parent / "data" / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"


def write_tokenizer(folder: Path) -> int:
    """A tokenizer.json of single bytes and the template's special tokens; returns the vocabulary's size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> dict[str, Path]:
    """Arguments of load_pipeline: the golden tiny INT4 transformer, a random Qwen3 and a random VAE."""
    import torch
    from safetensors.torch import save_file

    from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig
    from zimage_core.models.vae import VAE, VAEConfig

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    encoder = TextEncoder(
        TextEncoderConfig(
            vocab_size=write_tokenizer(folder),
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
        )
    )
    save_file({f"model.{k}": v.clone() for k, v in encoder.state_dict().items()}, folder / "encoder.safetensors")
    config = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 4}
    vae = VAE(VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}))
    save_file(vae.state_dict(), folder / "vae.safetensors", metadata={"config": json.dumps(config)})
    return {
        "model": TINY_MODEL,
        "text_encoder": folder / "encoder.safetensors",
        "vae": folder / "vae.safetensors",
    }


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """nunchaku's engine, emulated."""
    import engine

    engine.install(tmp_path / "engine")
    engine.forget()
    monkeypatch.syspath_prepend(tmp_path / "engine")
    yield
    engine.forget()


@pytest.fixture(scope="session")
def outliers(tmp_path_factory) -> Path:
    """A source of two blocks whose inputs have a few strong channels, as real ones do."""
    import torch
    from dense_files import CONFIG, diffusers_names
    from safetensors.torch import save_file

    from zimage_core.models.transformer import ZImageTransformer
    from zimage_core.quantize.writer import diffusers_config

    config = replace(CONFIG, n_layers=2, n_refiner_layers=0)
    torch.manual_seed(4)
    state = ZImageTransformer(config).to(torch.bfloat16).state_dict()
    for name in (n for n in state if n.endswith(("attention_norm1.weight", "ffn_norm1.weight"))):
        state[name] *= (2 * torch.rand(384)).exp()
        state[name][torch.randperm(384)[:6]] *= 12
    path = tmp_path_factory.mktemp("outliers") / "dense.safetensors"
    save_file(diffusers_names(state), path, {"config": json.dumps(diffusers_config(config))})
    return path


@pytest.fixture(scope="session")
def captions() -> list[torch.Tensor]:
    """Features of two prompts for `outliers`."""
    import torch
    from dense_files import CONFIG

    generator = torch.Generator().manual_seed(6)
    return [torch.randn(tokens, CONFIG.cap_feat_dim, generator=generator) for tokens in (20, 40)]


@pytest.fixture(scope="session")
def calibrated(outliers, captions, tmp_path_factory) -> Path:
    """`outliers` quantized for `captions`."""
    from zimage_core.quantize.run import quantize_checkpoint

    path = tmp_path_factory.mktemp("calibrated") / "q.safetensors"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* tokens to calibrate linears of", UserWarning)
        quantize_checkpoint(outliers, path, rank=32, cap_feats=captions, size=96)
    return path


@pytest.fixture(scope="session")
def control_tensors():
    """A function (ControlNetConfig) -> random weights of such a ControlNet under the trainer's names."""

    def make(config):
        import torch

        from zimage_core.models.controlnet import ControlNet

        gen, parts, named = torch.Generator().manual_seed(0), {"to_qkv": "qkv", "w3_w1": "31"}, {}
        for name, tensor in ControlNet(config).state_dict().items():
            tensor = torch.randn(tensor.shape, generator=gen) * (tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.1)
            tensor += "norm" in name
            key = "control_" + name.replace("x_embedder", "all_x_embedder.2-1").replace("to_out", "to_out.0")
            leaf = next((leaf for leaf in parts if f".{leaf}." in name), None)
            if leaf is None:
                named[key] = tensor
                continue
            for part, rows in zip(parts[leaf], tensor.chunk(len(parts[leaf]))):
                named[key.replace(leaf, ("to_" if leaf == "to_qkv" else "w") + part)] = rows.clone()
        return named

    return make


@pytest.fixture(scope="session")
def dense_nets(control_tensors, tiny_files, tmp_path_factory) -> dict[str, Path]:
    """Files of dense ControlNets for the tiny model, by variant."""
    from dense_files import CONTROLNETS
    from safetensors.torch import save_file

    from zimage_core.formats.identify import model_info
    from zimage_core.models.config import ControlNetConfig

    base, folder, files = model_info(tiny_files["model"]).config, tmp_path_factory.mktemp("dense"), {}
    for variant, (channels, refiner) in CONTROLNETS.items():
        config = {"n_layers": base.n_layers, "n_refiner_layers": base.n_refiner_layers, "axes_dims": base.axes_dims}
        files[variant] = folder / f"{refiner}.safetensors"
        weights = control_tensors(ControlNetConfig(base, (0,), channels, refiner))
        save_file(weights, files[variant], {"config": json.dumps(config | {"control_layers_places": [0]})})
    return files
