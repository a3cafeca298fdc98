"""The names in the loaders' lists, the files behind them, and checks that a file is what its loader takes."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import folder_paths

from ...zimage_core.demo import demo_controlnet, demo_files, demo_loras
from ...zimage_core.formats.controlnet import control_info
from ...zimage_core.formats.encoder import open_encoder
from ...zimage_core.formats.identify import identify, model_info, open_part
from ...zimage_core.formats.safetensors import read_header
from ...zimage_core.lora.read import inspect

DEMO = "bundled demo"
DEMO_BF16 = Path(__file__).parents[2] / "demo_training" / "z-image-demo-bf16.safetensors"
EXTENSIONS = (".safetensors", ".sft")
LATENT_CHANNELS = 16
NO_LORA = "none"


def choices(folder: str, demo: str, folders_too: bool = False) -> list[str]:
    """A loader's list: the files of a models folder, its model folders and GGUF files if asked for, the bundled demo.

    demo: the kind of the bundled file, as for `demo_paths`.
    """
    names = []
    if folder in folder_paths.folder_names_and_paths:
        names = [n for n in folder_paths.get_filename_list(folder) if n.lower().endswith(EXTENSIONS)]
        for root in map(Path, folder_paths.get_folder_paths(folder) if folders_too else ()):
            if root.is_dir():
                names += sorted(p.name for p in root.iterdir() if (p / "config.json").is_file())
                names += sorted(str(p.relative_to(root)) for p in root.rglob("*.gguf"))
    return [*dict.fromkeys(names), *demo_paths(demo)]


def demo_paths(kind: str) -> dict[str, Path]:
    """{name in the lists: path} of the bundled files of a kind: of `demo_files`, "lora", "controlnet" or "dense"."""
    if kind == "lora":
        return {f"{DEMO}: {name}": path for name, path in demo_loras().items() if path.is_file()}
    if kind == "controlnet":
        return {f"{DEMO}: outlines": demo_controlnet()}
    if kind == "dense":
        return {DEMO: DEMO_BF16} if DEMO_BF16.is_file() else {}
    return {DEMO: demo_files()[kind]}


def find(folder: str, name: str, demo: str) -> Path:
    """The path of a name in `choices(folder, demo)`; ValueError where the file is missing, or as `contained`.

    A name that leads out of the folder is no name: names come from whoever sends a prompt, and ComfyUI leaves the check
    of those in VALIDATE_INPUTS to the node.
    """
    bundled = demo_paths(demo)
    if name in bundled:
        return bundled[name]
    inside = not Path(name).anchor and ".." not in name.replace("\\", "/").split("/")
    known = inside and folder in folder_paths.folder_names_and_paths
    roots = folder_paths.get_folder_paths(folder) if known else []
    path = folder_paths.get_full_path(folder, name) if known else None
    for root in roots:
        if path is None and name and (Path(root) / name / "config.json").is_file():
            path = Path(root) / name
    if path is None:
        where = " or ".join(map(str, roots)) or f"models/{folder}"
        instead = f", or choose {next(iter(bundled))!r}" if bundled else ""
        raise ValueError(f"{name!r} is not in {where}: put the file there and press R to refresh{instead}")
    return contained(Path(path))


def contained(path: Path, *more: Path) -> Path:
    """A path of a models folder; ValueError where a link leads it, or anything in a folder, out of all of them.

    Every folder that ComfyUI knows counts, Hugging Face's cache, whose snapshots are made of links, and `more`.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    known = [
        [found[0]] if isinstance(found[0], str) else found[0] for found in folder_paths.folder_names_and_paths.values()
    ]
    inside = {os.path.realpath(folder) for folder in (*chain(*known), HF_HUB_CACHE, *more)}
    waiting, seen = [path], set()
    while waiting:
        entry = waiting.pop()
        real = Path(os.path.realpath(entry))
        if not any(map(real.is_relative_to, inside)):
            raise ValueError(
                f"{entry}: a link out of ComfyUI's model folders, to {real}, which is not followed; add "
                f"{real.parent} to extra_model_paths.yaml, or put the file itself here"
            )
        if real.is_dir() and real not in seen:
            seen.add(real)
            waiting += sorted(entry.iterdir())
    return path


def check_model(name: str) -> None:
    """ValueError unless a file of `diffusion_models` is, by its header, a model that can be loaded."""
    path = find("diffusion_models", name, "model")
    if name != DEMO:
        model_info(path)


def check_control(name: str) -> None:
    """ValueError unless a file of `model_patches` is a ControlNet that can be loaded."""
    control_info(find("model_patches", name, "controlnet"))


def check_encoder(name: str) -> None:
    """ValueError unless a file or folder of `text_encoders` is a text encoder that can be loaded."""
    path = find("text_encoders", name, "text_encoder")
    if name != DEMO and not reads_encoder(path):
        with open_encoder(path):
            pass


def check_vae(name: str) -> None:
    """ValueError unless a file of `vae` is a 16-channel autoencoder."""
    path = find("vae", name, "vae")
    if name != DEMO:
        identify(open_part(path, "vae")).require("vae")


def check_lora(name: str) -> None:
    """ValueError unless a file of `loras` is, by its header, a LoRA for Z-Image."""
    inspect(find("loras", name, "lora"))


def reads_encoder(path: Path) -> bool:
    """Whether ComfyUI's own loader reads an encoder file: Qwen3-4B with plain weights under their usual names."""
    if path.is_dir() or not path.name.lower().endswith(EXTENSIONS):
        return False
    tensors = read_header(path).tensors
    norm = tensors.get("model.layers.0.self_attn.q_norm.weight")
    embedding = tensors.get("model.embed_tokens.weight")
    plain = "model.layers.0.self_attn.q_proj.weight" in tensors
    return bool(norm and plain and embedding and embedding[1][-1] == 2560)
