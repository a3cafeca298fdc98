"""The names that the loaders list, the files behind them, and whether a file is what its loader takes."""

from __future__ import annotations

from pathlib import Path

import folder_paths

DEMO = "bundled demo"
DEMO_BF16 = Path(__file__).parents[2] / "demo_training" / "z-image-demo-bf16.safetensors"
EXTENSIONS = (".safetensors", ".sft")
LATENT_CHANNELS = 16
NO_LORA = "none"


def choices(folder: str, demo: str, folders_too: bool = False) -> list[str]:
    """Names for a loader's list: the files (and model folders) of a models folder, and the bundled file `demo`.

    The demo comes first where there is nothing else.
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
    """The bundled files of a kind by the names that the lists show."""
    from ...zimage_core.demo import demo_files, demo_loras

    if kind == "lora":
        return {f"{DEMO}: {name}": path for name, path in demo_loras().items() if path.is_file()}
    if kind == "dense":
        return {DEMO: DEMO_BF16} if DEMO_BF16.is_file() else {}
    return {DEMO: demo_files()[kind]}


def find(folder: str, name: str, demo: str) -> Path:
    """The path behind a name of `choices`; demo is the kind of the bundled file. ValueError where it is missing."""
    bundled = demo_paths(demo)
    if name in bundled:
        return bundled[name]
    known = folder in folder_paths.folder_names_and_paths
    roots = folder_paths.get_folder_paths(folder) if known else []
    path = folder_paths.get_full_path(folder, name) if known else None
    for root in roots:
        if path is None and name and (Path(root) / name / "config.json").is_file():
            path = Path(root) / name
    if path is None:
        where = " or ".join(map(str, roots)) or f"models/{folder}"
        instead = f", or choose {next(iter(bundled))!r}" if bundled else ""
        raise ValueError(f"{name!r} is not in {where}: put the file there and press R to refresh{instead}")
    return Path(path)


def check_model(name: str) -> None:
    """ValueError unless a file of `diffusion_models` is a model that can be loaded, from its header."""
    from ...zimage_core.formats.identify import model_info

    path = find("diffusion_models", name, "model")
    if name != DEMO:
        model_info(path)


def check_encoder(name: str) -> None:
    """ValueError unless a file or folder of `text_encoders` is a text encoder that can be loaded."""
    from ...zimage_core.formats.encoder import check_model as check_names
    from ...zimage_core.formats.encoder import read_config
    from ...zimage_core.formats.stored import open_encoder

    path = find("text_encoders", name, "text_encoder")
    if name != DEMO and not reads_encoder(path):
        with open_encoder(path) as file:
            check_names(file.weights, file.where)
            read_config(file.config, file.weights, file.where)


def check_vae(name: str) -> None:
    """ValueError unless a file of `vae` is a 16-channel autoencoder."""
    from ...zimage_core.formats.identify import identify

    path = find("vae", name, "vae")
    if name != DEMO:
        identify(path).require("vae")


def check_lora(name: str) -> None:
    """ValueError unless a file of `loras` is a LoRA for Z-Image, from its header."""
    from ...zimage_core.lora import apply as lora

    lora.inspect(find("loras", name, "lora"))


def reads_encoder(path: Path) -> bool:
    """Whether ComfyUI's own loader reads an encoder file: Qwen3-4B, weights under their usual names."""
    from ...zimage_core.formats.safetensors import read_header

    if path.is_dir() or not path.name.lower().endswith(EXTENSIONS):
        return False
    tensors = read_header(path).tensors
    norm = tensors.get("model.layers.0.self_attn.q_norm.weight")
    embedding = tensors.get("model.embed_tokens.weight")
    plain = "model.layers.0.self_attn.q_proj.weight" in tensors
    return bool(norm and plain and embedding and embedding[1][-1] == 2560)
