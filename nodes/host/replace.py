"""Workflows of nunchaku's packs: their Z-Image nodes become ours in the editor and in API prompts, where not installed.

Ids, inputs and the order of widget values: nunchaku-ai/ComfyUI-nunchaku `nodes/models/zimage.py@002c232`,
ussoewwin/ComfyUI-nunchaku-unofficial-loader `nodes/models/zimage.py@02e9d2a`, ussoewwin/ComfyUI-QwenImageLoraLoader
`nodes/lora/zimageturbo_v4.py@d03dbb3`, `zimageturbo_v3.py@0fbcd55`, `_v2.py@33ba82e`,
`_v1.py@1b77745` and the scripts in its `js`, which put a count of their own before the widgets.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from . import messages, needs

LOADER, SWITCHES = "ZImageINT4ModelLoader", "ZImageLoraSwitches"
SLOTS = range(1, 11)
COUNT = "\N{INPUT SYMBOL FOR NUMBERS} LoRA Count"


@dataclass(frozen=True)
class Replacement:
    """A node of another pack: our node for it, its widgets in the order of a saved workflow's values, the inputs that
    both have, our outputs by its own, and the defaults of the optional inputs that a prompt may leave out."""

    new: str
    widgets: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[int, ...] = (0,)
    defaults: tuple[tuple[str, Any], ...] = ()


def slots(*kinds: str) -> tuple[str, ...]:
    return tuple(f"{kind}_{i}" for i in SLOTS for kind in kinds)


SWITCHED, PLAIN = slots("enabled", "lora_name", "lora_strength"), slots("lora_name", "lora_strength")
EMPTY = {"enabled": True, "lora_name": "None", "lora_strength": 1.0}
DEFAULTS = tuple((name, EMPTY[name.rpartition("_")[0]]) for name in SWITCHED)
REPLACEMENTS = {
    "NunchakuZImageDiTLoader": Replacement(LOADER, ("model_name",), ("model_name",)),
    "NunchakuUssoewwinZImageDiTLoader": Replacement(
        LOADER, ("model_name", "cpu_offload", "num_blocks_on_gpu", "use_pin_memory"), ("model_name",)
    ),
    "NunchakuZImageTurboLoraStackV4": Replacement(
        SWITCHES,
        (COUNT, "lora_count", "toggle_all", *SWITCHED),
        ("model", "clip", "lora_count", *SWITCHED),
        (0, 1),
        DEFAULTS,
    ),
    **{
        f"NunchakuZImageTurboLoraStackV{version}": Replacement(
            SWITCHES,
            (COUNT, "lora_count", "cpu_offload", *PLAIN),
            ("model", "lora_count", *PLAIN),
            defaults=DEFAULTS,
        )
        for version in (2, 3)
    },
}
V1 = "NunchakuZImageTurboLoraStackV1"  # its slots are objects, which ComfyUI's replacement cannot take apart


def register() -> bool:
    """Register the replacements with ComfyUI's server; False where none runs, or one without replacements."""
    server = messages.server()
    manager = getattr(server, "node_replace_manager", None)
    if manager is None or needs.lacking(needs.OPTIONAL["nodes of nunchaku's packs that become ours"]):
        return False
    from comfy_api.latest import io

    for old, found in REPLACEMENTS.items():
        set_values = {"backend": "auto", "precision": "auto"} if found.new == LOADER else {}
        manager.register(
            io.NodeReplace(
                new_node_id=found.new,
                old_node_id=old,
                old_widget_ids=list(found.widgets),
                input_mapping=[
                    *({"new_id": name, "old_id": name} for name in found.inputs),
                    *({"new_id": name, "set_value": value} for name, value in set_values.items()),
                ],
                output_mapping=[{"new_idx": i, "old_idx": i} for i in found.outputs],
            )
        )
    server.add_on_prompt_handler(complete)
    return True


def complete(request: dict) -> dict:
    """A request to `/prompt` with what ComfyUI's replacement asks of the nodes that it replaces: `_meta`, every input.

    Without them it fails. A stack V1 becomes ours here. Nodes of installed packs are left alone.
    """
    installed = importlib.import_module("nodes").NODE_CLASS_MAPPINGS  # ComfyUI's module, not ours of that name
    prompt = request.get("prompt") if isinstance(request, dict) else None
    for node in prompt.values() if isinstance(prompt, dict) else ():
        old = str(node.get("class_type")) if isinstance(node, dict) else None
        if old in REPLACEMENTS and old not in installed and isinstance(node.get("inputs"), dict):
            node.setdefault("_meta", {"title": old})
            for name, value in REPLACEMENTS[old].defaults:
                node["inputs"].setdefault(name, value)
        elif old == V1 and V1 not in installed and isinstance(node.get("inputs"), dict):
            switched = from_v1(node["inputs"])
            node.update({"class_type": SWITCHES, "inputs": switched} if switched else {})
    return request


def from_v1(inputs: dict) -> dict | None:
    """The inputs of our stack for those of a stack V1, {"lora_N": {enabled, lora_name, lora_strength}}; None if they
    do not fit ten slots."""
    found = [value for name, value in inputs.items() if name.startswith("lora_") and isinstance(value, dict)]
    if len(found) > len(SLOTS):
        return None
    ours = {name: inputs[name] for name in ("model", "clip") if name in inputs} | {"lora_count": max(1, len(found))}
    for i, slot in enumerate(found, 1):
        given = {**EMPTY, **{name: slot[name] for name in EMPTY if name in slot}}
        given["enabled"] = bool(given["enabled"] and inputs.get("stack_enabled", True))
        ours |= {f"{name}_{i}": value for name, value in given.items()}
    return ours
