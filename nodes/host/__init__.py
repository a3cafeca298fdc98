"""All that touches ComfyUI: model files, MODEL, CLIP and VAE around `zimage_core`, sampling, messages.

May import ComfyUI and `zimage_core`; only the node classes in `nodes/` import it. Written against ComfyUI 0.18 and
0.33; `needs` lists what is taken from it. The modules are imported on first use, so that a node whose ComfyUI lacks
something fails alone.
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
