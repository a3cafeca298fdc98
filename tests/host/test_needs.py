"""A ComfyUI that lacks something the pack takes from it: the nodes that need it say so, the others do their work."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("zimage_needs", ROOT / "nodes" / "host" / "needs.py")
needs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(needs)
SYMBOLS = sorted({name for names in needs.NODES.values() for name in names})
BASES = {  # what classes of ours are made from, so that their module cannot be imported without it
    "comfy.conds.CONDRegular",
    "comfy.model_base.Lumina2",
    "comfy.model_patcher.ModelPatcher",
    "comfy.sd.VAE",
    "comfy.supported_models.ZImage",
    "comfy.weight_adapter.WeightAdapterBase",
}
DEMO = "bundled demo"


def owner(name: str):
    """The module or class that has the last part of a name, and that part."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:-1]:
            found = getattr(found, part)
        return found, parts[-1]
    raise AssertionError(name)


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def forget(name: str) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture(scope="module")
def pack(host):
    return sys.modules[host.__name__.partition(".")[0]]


@pytest.fixture(scope="module")
def made(pack):
    """What each node takes from others, made before anything is missing."""
    nodes = pack.NODE_CLASS_MAPPINGS
    (clip,) = nodes["ZImageTextEncoderLoader"]().load(DEMO)
    (vae,) = nodes["ZImageVAELoader"]().load(DEMO, "fp32")
    (model,) = nodes["ZImageINT4ModelLoader"]().load(DEMO, "torch", "w4a16")
    (positive,) = nodes["ZImagePromptEncode"]().encode(clip, "a red circle")
    return {
        "clip": clip,
        "vae": vae,
        "model": model,
        "positive": positive,
        "latent": {"samples": torch.zeros(1, 16, 4, 4)},
    }


CALLS = {  # node: its arguments, from `made` where named there
    "ZImageINT4ModelLoader": (DEMO, "torch", "w4a16"),
    "ZImageTextEncoderLoader": (DEMO,),
    "ZImageVAELoader": (DEMO, "fp32"),
    "ZImagePromptEncode": ("clip", "a red circle"),
    "ZImageSampler": ("model", "positive", 0, 1, 32, 32, 1),
    "ZImageVAEDecode": ("vae", "latent", "auto"),
    "ZImageLoraLoader": ("model", f"{DEMO}: frame", 1.0),
    "ZImageSize": ("1:1", 1.0),
}


def call(node, name: str, made: dict):
    arguments = [made.get(value, value) if isinstance(value, str) else value for value in CALLS[name]]
    return getattr(node(), node.FUNCTION)(*arguments)


class Without:
    """A module or class of ComfyUI's, or what holds one, with one name hidden in it."""

    def __init__(self, found, path: str, hidden: str):
        self.__dict__.update(found=found, path=path, hidden=hidden)

    def __getattr__(self, name: str):
        path = f"{self.path}.{name}"
        if path == self.hidden:
            raise AttributeError(f"{path} is hidden")
        value = getattr(self.found, name)
        return Without(value, path, self.hidden) if self.hidden.startswith(f"{path}.") else value

    def __call__(self, *args, **kwargs):
        return self.found(*args, **kwargs)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_without_a_symbol_its_nodes_say_so_and_the_others_run(pack, made, monkeypatch, symbol, caplog):
    """It is hidden from the pack's modules alone: ComfyUI without it would work in another way, this one would not."""
    assert needs.there(symbol)
    host, first = pack.nodes.host, symbol.split(".")[0]

    def hidden(module: str):
        found = importlib.import_module(module)
        return Without(found, module, symbol) if symbol.startswith(f"{module}.") else found

    monkeypatch.setattr(host.needs, "importlib", SimpleNamespace(import_module=hidden))
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{host.__name__}.") and first in vars(module):
            monkeypatch.setattr(module, first, Without(vars(module)[first], first, symbol))
    nodes = host.needs.provided(pack.nodes.NODES, pack.nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node_id, node in nodes.items():
        usual, lacks = pack.nodes.NODES[node_id], symbol in needs.NODES[node_id]
        assert (node is not usual) == lacks, node_id
        if lacks:
            assert node.RETURN_TYPES == usual.RETURN_TYPES and node.INPUT_TYPES() is not None
            assert node.VALIDATE_INPUTS() is True and symbol in node.DESCRIPTION
            with pytest.raises(ValueError, match=f"needs {symbol}, which this ComfyUI lacks"):
                getattr(node(), node.FUNCTION)(anything=1)
        elif node_id in CALLS:
            call(node, node_id, made)
    assert symbol in caplog.text


@pytest.mark.parametrize("symbol", sorted(BASES))
def test_the_pack_is_imported_without_what_its_classes_are_made_from(host, made, monkeypatch, symbol):
    """A pack of its own, as its modules are already there in the other."""
    monkeypatch.delattr(*owner(symbol))
    pack = load("zimage_lacking")
    try:
        for node_id, node in pack.NODE_CLASS_MAPPINGS.items():
            if symbol in needs.NODES[node_id]:
                with pytest.raises(ValueError, match=f"needs {symbol}, which this ComfyUI lacks"):
                    getattr(node(), node.FUNCTION)()
            else:
                assert node.INPUT_TYPES()["required"] is not None
                if node_id in CALLS and node_id.endswith("Loader") and "Lora" not in node_id:
                    call(node, node_id, {})
        assert set(pack.NODE_CLASS_MAPPINGS) == set(needs.NODES)
    finally:
        forget("zimage_lacking")


@pytest.mark.parametrize("what", needs.OPTIONAL)
def test_what_is_missing_beside_the_nodes_is_logged(pack, host, monkeypatch, caplog, what):
    caplog.set_level("INFO")
    for symbol in needs.OPTIONAL[what]:
        if needs.there(symbol):
            monkeypatch.delattr(*owner(symbol))
    known = pack.nodes
    assert known.host.needs.provided(known.NODES, known.NODE_DISPLAY_NAME_MAPPINGS) == known.NODES
    assert f"no {what}" in caplog.text
    host.messages.say("a line", "1")
    assert host.messages.executing_node() is None and host.replace.register() is False
