"""Which files make up a pipeline: transformer, text encoder, tokenizer and VAE."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .formats.identify import identify, model_info
from .formats.safetensors import read_object, read_text
from .models.config import SHIFT, ZImageConfig
from .models.tokenizer import find_tokenizer

LARGEST_SHIFT = 100
PathOption: TypeAlias = "str | Path | None"


@dataclass(frozen=True)
class ModelFiles:
    """The files of one pipeline. demo: the transformer is the bundled model; demo_like: it, or made from it, by its
    sizes; shift: that of its sigmas."""

    model: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path
    demo: bool = False
    demo_like: bool = False
    shift: float = SHIFT


def find_files(
    model: PathOption = None, text_encoder: PathOption = None, vae: PathOption = None, tokenizer: PathOption = None
) -> ModelFiles:
    """The four files of a pipeline, all there; no model at all means the bundled demo.

    `model` may be a whole diffusers folder or a checkpoint of all models, whose parts are then the defaults. The
    tokenizer is looked for beside the encoder unless named. Raises ValueError for a transformer that cannot be read,
    or a part that is not named or not there.
    """
    named = {"model": model, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    for name, path in named.items():
        if path is not None and not isinstance(path, str | Path):
            raise ValueError(f"{name}: expected the name of a file or folder, found {path!r:.100}")
    parts = {name: Path(path) for name, path in named.items() if path is not None}
    defaults: dict[str, Path] = {}
    if model is None:
        from .demo import demo_files

        defaults = demo_files()
    elif (parts["model"] / "transformer").is_dir():
        defaults = {name: parts["model"] / name for name in ("text_encoder", "tokenizer", "vae")}
        parts["model"] /= "transformer"
    elif parts["model"].is_file() and identify(parts["model"]).role == "checkpoint":
        defaults = {"text_encoder": parts["model"], "vae": parts["model"]}
    if text_encoder is not None:
        defaults.pop("tokenizer", None)
    parts = defaults | parts
    for name, path in parts.items():
        if not os.path.exists(path):  # False of names that no system takes, too
            raise ValueError(f"{path}: the {name.replace('_', ' ')} is not there; check the path")
    config = model_info(parts["model"]).config
    for name, what in (("text_encoder", "Qwen3-4B text encoder"), ("vae", "16-channel VAE")):
        if name not in parts:
            option = name.replace("_", "-")
            raise ValueError(f"{model}: a {what} is needed beside the transformer; name it with --{option} ({name}=)")
    if "tokenizer" not in parts:
        parts["tokenizer"] = get_tokenizer(parts["text_encoder"])
    like, shift = config == _demo_config(), read_shift(parts["model"])
    return ModelFiles(**parts, demo=model is None, demo_like=like, shift=shift)


def is_demo_like(model: str | Path | None) -> bool:
    """Whether a transformer has the sizes of the bundled one, as one that was made from it has."""
    return model is None or model_info(model).config == _demo_config()


@functools.cache
def _demo_config() -> ZImageConfig:
    from .demo import demo_files

    return model_info(demo_files()["model"]).config


def read_shift(transformer: Path) -> float:
    """The shift that the scheduler of a diffusers folder has, which its `transformer` is in; else Turbo's."""
    path = transformer.parent / "scheduler" / "scheduler_config.json"
    if not (transformer.is_dir() and path.is_file()):
        return SHIFT
    config = read_object(read_text(path), path)
    shift, dynamic = config.get("shift", 1.0), config.get("use_dynamic_shifting", False)
    if dynamic or isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= LARGEST_SHIFT:
        found = "use_dynamic_shifting" if dynamic else f"shift {shift!r}"
        raise ValueError(f"{path}: expected a fixed shift up to {LARGEST_SHIFT}, found {found}; get Z-Image's own")
    return float(shift)


def get_tokenizer(text_encoder: str | Path, comfyui: PathOption = None) -> Path:
    """The folder of the tokenizer for an encoder, from this machine or else from the hub; ValueError for neither."""
    try:
        return find_tokenizer(text_encoder, comfyui)
    except ValueError as missing:
        from .hub import download_tokenizer

        try:
            return download_tokenizer()
        except ValueError as error:
            raise ValueError(f"{missing}. Downloading it failed too: {error}") from None
