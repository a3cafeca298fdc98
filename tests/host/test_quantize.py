"""The quantizer and the comparison in a running ComfyUI: BF16 demo -> INT4 file -> picture, stopped and resumed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BF16 = "z-image-demo-bf16.safetensors"
DEMO = "bundled demo"
BLOCKS = 7  # of the demo

spec = importlib.util.spec_from_file_location("zimage_server_checks", Path(__file__).with_name("test_server.py"))
checks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checks)


@pytest.fixture(scope="module")
def folder(server) -> Path:
    """The server's diffusion_models, with the demo's BF16 file."""
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    (folder / BF16).symlink_to(ROOT / "demo_training" / BF16)
    return folder


def quantizing(calibrate: bool = False, **changes) -> dict:
    inputs = {"model_name": BF16, "rank": "32", "calibrate": calibrate, "lora_name": "none", "lora_strength": 1.0}
    inputs |= {"output_name": "", **changes}
    if calibrate:
        inputs |= {"clip": ["2", 0], "prompts": "a red circle\na blue star on a white background", "size": 64}
    encoder = {"class_type": "ZImageTextEncoderLoader", "inputs": {"encoder_name": DEMO}}
    return {"1": {"class_type": "ZImageQuantize", "inputs": inputs}, **({"2": encoder} if calibrate else {})}


def comparing(first: str, second: str) -> dict:
    """The example graph with two files, and the scores as text."""
    workflow = checks.api("zimage_compare", n1__model_name=first, n8__model_name=second, n8__precision="w4a16")
    return workflow | {"20": {"class_type": "PreviewAny", "inputs": {"source": ["11", 1]}}}


def scores(server, workflow: dict) -> list[float]:
    entry = server.run(workflow)
    assert checks.outcome(entry) == "success", entry["status"]
    return [float(number) for number in re.findall(r"PSNR (\S+) dB", str(entry["outputs"]["20"]["text"]))]


def test_quantized_file_draws_what_its_source_draws(server, folder):
    entry = server.run(quantizing())
    assert checks.outcome(entry) == "success", entry["status"]
    name = "svdq-int4_r32-z-image-demo.safetensors"
    assert entry["outputs"]["1"]["text"] == [name]
    assert sorted(path.name for path in folder.glob(f"{name}*")) == [name]
    assert (
        name
        in server.get("/object_info/ZImageINT4ModelLoader")["ZImageINT4ModelLoader"]["input"]["required"]["model_name"][
            0
        ]
    )
    found = scores(server, comparing(BF16, name))
    assert len(found) == 2 and all(25 < psnr < 90 for psnr in found), found
    assert scores(server, comparing(name, name)) == [float("inf")] * 2


def test_merged_lora_changes_the_file(server, folder):
    changes = {"lora_name": f"{DEMO}: frame", "output_name": "framed", "model_name": DEMO}
    entry = server.run(quantizing(**changes))
    assert checks.outcome(entry) == "success", entry["status"]
    assert max(scores(server, comparing(BF16, "framed.safetensors"))) < 25  # it draws a frame


def test_stopped_calibration_goes_on_where_it_was(server, folder):
    workflow = quantizing(calibrate=True, output_name="calibrated")
    seen = server.watch(workflow, interrupt_at=f"block 3/{BLOCKS}, ")
    assert seen["end"] == "execution_interrupted"
    assert not (folder / "calibrated.safetensors").exists()
    lines = (folder / ".calibrated.safetensors.zimage-done").read_text().splitlines()[1:]
    finished = [json.loads(line)["section"] for line in lines]
    assert finished[:2] == ["context_refiner.0", "noise_refiner.0"] and len(finished) < BLOCKS
    assert any(re.fullmatch(rf"block \d/{BLOCKS}, \S+, \d+:\d\d left", text) for text in seen["texts"]), seen["texts"]
    seen = server.watch(workflow)
    assert seen["end"] == "execution_success"
    assert f"resumed after block {len(finished)}/{BLOCKS}" in seen["texts"]
    assert not any("generating" in text for text in seen["texts"])
    assert seen["progress"][-1][0] == seen["progress"][-1][1]
    assert [path.name for path in folder.glob("calibrated*")] == ["calibrated.safetensors"]
    assert all(25 < psnr < 90 for psnr in scores(server, comparing(BF16, "calibrated.safetensors")))


def test_errors_are_sentences(server, folder):
    tiny = "svdq-int4_r32-z-image-tiny.safetensors"
    assert "expected a BF16 model, found svdq-int4" in checks.refused(server, quantizing(model_name=tiny))
    (folder / "taken.safetensors").write_bytes(b"somebody's")
    for changes, words in (
        ({"output_name": "taken"}, "is there already; choose another output_name"),
        ({"output_name": "../x"}, "expected a plain file name"),
        ({"calibrate": True, "clip": None}, "connect a CLIP"),
        ({"rank": "256", "model_name": DEMO, "output_name": "taken.safetensors"}, "is there already"),
    ):
        workflow = quantizing(**changes)
        workflow["1"]["inputs"] = {k: v for k, v in workflow["1"]["inputs"].items() if v is not None}
        if changes.get("calibrate"):
            del workflow["1"]["inputs"]["clip"]
        error = checks.message(server.run(workflow), "execution_error")
        assert words in error["exception_message"] and error["exception_type"] == "ValueError", error
    assert (folder / "taken.safetensors").read_bytes() == b"somebody's"
    (folder / "taken.safetensors").unlink()
    small = comparing(BF16, DEMO)
    small["9"]["inputs"]["width"] = 64
    error = checks.message(server.run(small), "execution_error")
    assert "w4a4: expected 2 of 128 x 128 pictures as in w4a16, found 2 of 64 x 128" in error["exception_message"]
