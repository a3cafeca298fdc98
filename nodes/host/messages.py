"""Messages to users: lines of text on a node, sentences that refuse an input."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import Any

COLUMNS = 42  # characters that fit a line of a node; the editor would break longer lines inside a word
CELL = 16  # pixels of a token's edge
MAX_SIZE = 4096  # pixels of the edge of a picture


def checked(check: Callable[[str], None], value: str | None) -> bool | str:
    """True, or the error's sentence for `VALIDATE_INPUTS`. Linked inputs have no value yet; they are checked at run."""
    try:
        if isinstance(value, str):
            check(value)
    except (ValueError, OSError) as error:
        return str(error)
    return True


def check_pixels(name: str, pixels: int, most: int) -> None:
    """ValueError unless the edge of a picture is a multiple of CELL up to `most`.

    Raised when a node runs: were two inputs named in `VALIDATE_INPUTS`, ComfyUI would blame both for one.
    """
    if pixels % CELL or not CELL <= pixels <= most:
        near = min(max(CELL, round(pixels / CELL) * CELL), most)
        raise ValueError(f"{name} {pixels}: it must be a multiple of {CELL} from {CELL} to {most}; try {near}")


def say(text: str, node_id: str | None) -> None:
    """Show text on a node, if this ComfyUI can."""
    send = getattr(server(), "send_progress_text", None)
    if node_id is not None and send is not None:
        lines = (textwrap.fill(line, COLUMNS, break_long_words=False) for line in text.splitlines())
        send("\n".join(lines), node_id)


def server() -> Any:
    """ComfyUI's running server, or None."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def executing_node() -> str | None:
    """The id of the node that ComfyUI is running, or None."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:  # then nothing is shown on nodes while they run
        return None
    context = get_executing_context()
    return context and context.node_id
