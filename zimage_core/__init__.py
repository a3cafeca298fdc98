"""Z-Image Turbo from SVDQuant INT4 checkpoints, self-contained and without ComfyUI.

Lazy: `import zimage_core` does not import torch; the names below do when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .control import Control
    from .formats.load import load_transformer
    from .lora.read import load_lora
    from .pipeline import Pipeline, load_pipeline

__version__ = "0.2.0"

_HOME = {
    "load_pipeline": "pipeline",
    "Pipeline": "pipeline",
    "Control": "control",
    "load_lora": "lora.read",
    "load_transformer": "formats.load",
}
__all__ = ["Control", "Pipeline", "__version__", "load_lora", "load_pipeline", "load_transformer"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
