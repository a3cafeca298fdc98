"""ComfyUI loads this folder as a custom node pack; everything is imported on first use.

So tests and tools that collect this file need no ComfyUI. A failure to import becomes an AttributeError, which is
what ComfyUI's loader asks for, with the cause in the log.
"""

import logging

WEB_DIRECTORY = "./nodes/web"
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import nodes
    except ImportError as error:
        logging.getLogger(__name__).exception("Z-Image INT4: its nodes cannot be imported")
        raise AttributeError(f"Z-Image INT4: its nodes cannot be imported: {error}") from error
    return getattr(nodes, name)
