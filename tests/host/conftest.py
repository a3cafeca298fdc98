"""Shared parts of the tests in a real ComfyUI.

COMFYUI_PATH names a checkout; COMFYUI_PYTHON the interpreter that runs it where it is not the one that runs pytest;
COMFYUI_ARGS more arguments for its main.py.
Tests marked `inside` import ComfyUI into this process (CPU); the others start its server and talk HTTP.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from comfyui_server import Server

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_ckpt" / "svdq-int4_r32-z-image-tiny.safetensors"
COMFYUI = Path(os.environ["COMFYUI_PATH"]).resolve() if os.environ.get("COMFYUI_PATH") else None
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)


def pytest_collection_modifyitems(items):
    if COMFYUI is None:
        skip = pytest.mark.skip(reason="COMFYUI_PATH names no ComfyUI checkout")
        for item in items:
            if Path(item.path).parent == Path(__file__).parent and item.path.name != "test_tokens.py":
                item.add_marker(skip)


def load_pack(root: Path = ROOT, name: str = "zimage_pack"):
    """The pack as ComfyUI loads it: the repository's root by path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """ComfyUI imported into this process, on the CPU, with models folders of its own; gives the pack's `nodes.host`."""
    sys.path.insert(0, str(COMFYUI))
    argv, sys.argv = sys.argv, ["pytest"]
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import folder_paths

        import nodes  # noqa: F401  ComfyUI's own, before the pack's could take the name
    except ImportError as error:
        pytest.skip(f"this interpreter cannot import ComfyUI ({error}): run pytest with ComfyUI's own")
    finally:
        sys.argv = argv
    base = tmp_path_factory.mktemp("comfy")
    for key in ("diffusion_models", "text_encoders", "loras", "vae"):
        (base / "models" / key).mkdir(parents=True)
        folder_paths.folder_names_and_paths[key] = (
            [str(base / "models" / key)],
            folder_paths.folder_names_and_paths[key][1],
        )
    for folder in (ROOT, base):  # that tests link to
        folder_paths.add_model_folder_path("zimage_linked", str(folder))
    folder_paths.set_output_directory(str(base / "output"))
    folder_paths.set_temp_directory(str(base / "temp"))
    (base / "models" / "diffusion_models" / TINY.name).symlink_to(TINY)
    pack = load_pack()
    assert set(pack.NODE_CLASS_MAPPINGS)
    return sys.modules["zimage_pack.nodes.host"]


@pytest.fixture(scope="session")
def memory(host):
    """ComfyUI's memory manager."""
    import comfy.model_management

    return comfy.model_management


@pytest.fixture
def small_gpu(memory, monkeypatch):
    """Has ComfyUI take the CPU for a GPU of so many bytes, which these patchers share; nothing is kept in reserve."""

    def pretend(size: float, *patchers) -> None:
        def get_free_memory(device=None, torch_free_too=False):
            left = max(0, size - sum(patcher.loaded_size() for patcher in patchers))
            return (left, left) if torch_free_too else left

        monkeypatch.setattr(memory, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(memory, "vram_state", memory.VRAMState.NORMAL_VRAM)
        monkeypatch.setattr(memory, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(memory, "extra_reserved_memory", lambda: 0)
        monkeypatch.setattr(memory, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
        monkeypatch.setattr(memory, "get_free_memory", get_free_memory)

    memory.unload_all_models()
    yield pretend
    monkeypatch.undo()
    memory.unload_all_models()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    args = ["--cpu", "--preview-method", "latent2rgb", *shlex.split(os.environ.get("COMFYUI_ARGS", ""))]
    running = Server(COMFYUI, base, *args, python=PYTHON, models={f"diffusion_models/{TINY.name}": TINY})
    yield running
    running.stop()
    if os.environ.get("ZIMAGE_KEEP_LOG"):
        shutil.copy(running.log, os.environ["ZIMAGE_KEEP_LOG"])


@pytest.fixture(scope="session")
def real_names(server):
    """The demo's files under the names that the workflows for real models ask for, a LoRA and a picture."""
    from PIL import Image
    from safetensors import safe_open
    from safetensors.numpy import save_file

    demo = ROOT / "zimage_core" / "demo"
    model = next(demo.glob("svdq-int4_*.safetensors"))
    models = server.base / "models"
    for folder, name, source in (
        ("diffusion_models", "svdq-int4_r256-z-image-turbo.safetensors", model),
        ("text_encoders", "qwen_3_4b.safetensors", next((demo / "text_encoder").glob("*.safetensors"))),
        ("text_encoders", "tokenizer.json", demo / "tokenizer" / "tokenizer.json"),
        ("vae", "ae.safetensors", demo / "vae.safetensors"),
        ("diffusion_models", "z_image_bf16.safetensors", ROOT / "demo_training" / "z-image-demo-bf16.safetensors"),
        ("model_patches", "Z-Image-Turbo-Fun-Controlnet-Union.safetensors", demo / "controlnet.safetensors"),
    ):
        (models / folder).mkdir(exist_ok=True)
        (models / folder / name).symlink_to(source)
    config = demo / "text_encoder" / "config.json"
    if config.is_file():
        shutil.copy(config, models / "text_encoders" / "config.json")
    import numpy as np
    from safetensors.torch import save_file as save_torch
    from spandrel.architectures.ESRGAN import ESRGAN

    (models / "upscale_models").mkdir(exist_ok=True)
    upscaler = ESRGAN(num_filters=16, num_blocks=1, scale=4).state_dict()  # random weights: a grey picture
    save_torch(upscaler, models / "upscale_models" / "RealESRGAN_x4plus.safetensors")

    with safe_open(model, "np") as file:
        dim = file.get_slice("layers.0.attention.to_out.0.qweight").get_shape()[0]
    noise = np.random.default_rng(0)
    name = "diffusion_model.layers.0.attention.to_out.0"
    lora = {
        f"{name}.lora_down.weight": noise.standard_normal((4, dim), dtype=np.float32) / dim**0.5,
        f"{name}.lora_up.weight": noise.standard_normal((dim, 4), dtype=np.float32),
    }
    (models / "loras").mkdir(exist_ok=True)
    save_file(lora, models / "loras" / "zimage_lora.safetensors")
    sdxl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    other = {f"{sdxl}.{leaf}.weight": np.zeros((4, 4), np.float32) for leaf in ("lora_down", "lora_up")}
    save_file(other, models / "loras" / "sdxl_lora.safetensors")
    Image.linear_gradient("L").convert("RGB").save(server.base / "input" / "example.png")
    return models
