"""Workflows of nunchaku's packs in a server that has our pack alone: the nodes that they name become ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from comfyui_server import Server
from test_server import api, outcome, pixels

LORA = "zimage_lora.safetensors"


@pytest.fixture(scope="module", autouse=True)
def there(server, real_names):
    if "NunchakuZImageDiTLoader" not in server.get("/node_replacements"):
        pytest.skip("this ComfyUI has no node replacement")


def picture(server, workflow: dict):
    entry = server.run(workflow)
    assert outcome(entry) == "success", entry["status"]
    return pixels(server.images(entry)[0])


def old(workflow: dict, class_type: str, **inputs) -> dict:
    """A workflow with another pack's loader, as a saved API file names it."""
    name = workflow["1"]["inputs"]["model_name"]
    return {**workflow, "1": {"class_type": class_type, "inputs": {"model_name": name, **inputs}}}


OFFLOAD = {"cpu_offload": "auto", "num_blocks_on_gpu": 1, "use_pin_memory": "disable"}


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize(
    "class_type, inputs", [("NunchakuZImageDiTLoader", {}), ("NunchakuUssoewwinZImageDiTLoader", OFFLOAD)]
)
def test_loaders(server, class_type, inputs, meta):
    workflow = old(api(), class_type, **inputs)
    if meta:
        workflow["1"]["_meta"] = {"title": "their loader"}
    assert (picture(server, workflow) == picture(server, api())).all()


@pytest.mark.parametrize("version", ["V4", "V3", "V2", "V1"])
def test_lora_stacks(server, version):
    """An API prompt holds the slots that were shown, not all ten; V4 has switches and a CLIP, V3 and V2 have
    neither, V1 has objects."""
    ours, theirs = api(), old(api(), "NunchakuZImageDiTLoader")
    ours["20"] = {"class_type": "ZImageLoraLoader", "inputs": {"model": ["1", 0], "lora_name": LORA, "strength": 0.5}}
    slots = {"lora_name_1": LORA, "lora_strength_1": 0.5, "lora_name_2": "None", "lora_strength_2": 1.0}
    stack = {"model": ["1", 0], "lora_count": 2, **slots}
    if version == "V4":
        stack |= {"clip": ["2", 0], "toggle_all": True, "enabled_1": True, "enabled_2": True, "lora_count": 3}
        stack |= {"enabled_3": False, "lora_name_3": LORA, "lora_strength_3": 5.0}
        theirs["4"]["inputs"]["clip"] = ["20", 1]
    elif version == "V1":
        slots = [(True, LORA, 0.5), (False, LORA, 5.0), (True, "None", 1.0)]
        stack = {"model": ["1", 0], "clip": ["2", 0], "stack_enabled": True}
        names = ("enabled", "lora_name", "lora_strength")
        stack |= {f"lora_{i}": dict(zip(names, slot)) for i, slot in enumerate(slots, 1)}
        theirs["4"]["inputs"]["clip"] = ["20", 1]
    else:
        stack |= {"cpu_offload": "disable", "toggle_all": True}
    theirs["20"] = {"class_type": f"NunchakuZImageTurboLoraStack{version}", "inputs": stack}
    for workflow in (ours, theirs):
        workflow["5"]["inputs"]["model"] = ["20", 0]
    plain, expected = picture(server, api()), picture(server, ours)
    assert (expected != plain).any() and (picture(server, theirs) == expected).all()


def test_a_switch_and_the_count_leave_loras_out(server):
    workflow = api()
    slots = {"enabled_1": False, "lora_name_1": LORA, "lora_strength_1": 1.0, "lora_name_2": LORA}
    workflow["20"] = {"class_type": "ZImageLoraSwitches", "inputs": {"model": ["1", 0], "lora_count": 1, **slots}}
    workflow["5"]["inputs"]["model"] = ["20", 0]
    assert (picture(server, workflow) == picture(server, api())).all()
    workflow["20"]["inputs"] |= {"enabled_1": True, "lora_name_1": "gone.safetensors"}
    status, answer = server.post("/prompt", {"prompt": workflow, "client_id": "test"})
    assert status == 400 and "lora_name_1" in str(answer)


def test_unknown_nodes_of_others_stay_unknown(server):
    status, answer = server.post("/prompt", {"prompt": old(api(), "UnetLoaderGGUF"), "client_id": "test"})
    assert status == 400 and "UnetLoaderGGUF" in str(answer)


def test_a_v1_stack_with_more_slots_than_ours_has_stays_theirs(server):
    slot = {"enabled": True, "lora_name": LORA, "lora_strength": 0.1}
    workflow = api()
    stack = {"model": ["1", 0], **{f"lora_{i}": slot for i in range(1, 12)}}
    workflow["20"] = {"class_type": "NunchakuZImageTurboLoraStackV1", "inputs": stack}
    workflow["5"]["inputs"]["model"] = ["20", 0]
    status, answer = server.post("/prompt", {"prompt": workflow, "client_id": "test"})
    assert status == 400 and "NunchakuZImageTurboLoraStackV1" in str(answer)


THEIRS = """
class Theirs:
    CATEGORY, FUNCTION, RETURN_TYPES = "theirs", "load", ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model_name": ("STRING", {})}}

    def load(self, model_name, **rest):
        return (f"theirs: {model_name}",)


names = ("NunchakuZImageDiTLoader", "NunchakuZImageTurboLoraStackV4", "NunchakuZImageTurboLoraStackV1")
NODE_CLASS_MAPPINGS = {name: type(name, (Theirs,), {}) for name in names}
"""


def test_workflows_of_a_pack_that_is_installed_are_left_alone(tmp_path):
    pack = tmp_path / "custom_nodes" / "theirs"
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text(THEIRS)
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    server = Server(Path(os.environ["COMFYUI_PATH"]), tmp_path, "--cpu", python=python)
    try:
        for name in ("NunchakuZImageDiTLoader", "NunchakuZImageTurboLoraStackV4", "NunchakuZImageTurboLoraStackV1"):
            workflow = {"1": {"class_type": name, "inputs": {"model_name": "a file"}}}
            entry = server.run(workflow | {"2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}})
            assert outcome(entry) == "success" and "theirs: a file" in str(entry["outputs"]["2"])
    finally:
        server.stop()
