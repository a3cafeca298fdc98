"""What users read: lines on a node, and the sentences with which inputs are refused."""

from __future__ import annotations


def checked(check, value) -> bool | str:
    """True, or the sentence that `VALIDATE_INPUTS` shows; linked values (not text yet) are checked when they run."""
    try:
        if isinstance(value, str):
            check(value)
    except (ValueError, OSError) as error:
        return str(error)
    return True


def say(text: str, node_id: str | None) -> None:
    """Show a line of text on a node, where this ComfyUI can."""
    if node_id is not None:
        from server import PromptServer

        send = getattr(getattr(PromptServer, "instance", None), "send_progress_text", None)
        if send is not None:
            send(text, node_id)


def executing_node() -> str | None:
    """The id of the node that ComfyUI is running."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return context and context.node_id
