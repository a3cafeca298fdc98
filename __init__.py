"""ComfyUI's entry to the node pack.

Lazy: the node classes are imported when ComfyUI asks for them, so tools that merely import this package (a test
collector, an installer) need no ComfyUI.
"""

from __future__ import annotations

import logging

_NAMES = ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY")


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import nodes
    except ImportError as error:
        logging.getLogger(__name__).exception("Z-Image INT4: the nodes could not be imported")
        raise AttributeError(f"{name} is missing because the nodes could not be imported: {error}") from error
    return getattr(nodes, name)
