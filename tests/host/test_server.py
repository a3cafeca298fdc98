"""The pack in a running ComfyUI server, through its HTTP queue and websocket."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from workflows import api_path, check_pair

ROOT = Path(__file__).resolve().parents[2]
IDS = {
    "ZImageControlNetApply",
    "ZImageControlNetLoader",
    "ZImageLoraSwitches",
    "ZImageINT4ModelLoader",
    "ZImageTextEncoderLoader",
    "ZImagePromptEncode",
    "ZImageSampler",
    "ZImageLoraLoader",
    "ZImageVAELoader",
    "ZImageVAEDecode",
    "ZImageLoraStack",
    "ZImageQuantize",
    "ZImageCompare",
    "ZImageSize",
    "ZImageNAG",
    "ZImageVariety",
}
GRAPHS = sorted((ROOT / "example_workflows").glob("*.json"))
WORKFLOWS = [api_path(path) for path in GRAPHS]
DEMO = "bundled demo"
RUNS, SETTLED = 20, 5
MANY = 100


def api(name: str = "zimage_demo", **changes) -> dict:
    """An API workflow, shrunk to the demo's size; changes as node_id__input=value."""
    workflow = json.loads((ROOT / "example_workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in workflow.values():
        for size in ("width", "height"):
            if isinstance(node["inputs"].get(size), int):
                node["inputs"][size] = min(node["inputs"][size], 128)
        if "megapixels" in node["inputs"]:
            node["inputs"]["megapixels"] = 128 * 128 / 2**20
    for change, value in changes.items():
        node_id, _, name = change.partition("__")
        workflow[node_id.lstrip("n")]["inputs"][name] = value
    return workflow


def outcome(entry: dict) -> str:
    return entry["status"]["status_str"]


def message(entry: dict, kind: str) -> dict | None:
    return next((data for name, data in entry["status"]["messages"] if name == kind), None)


def pixels(data: bytes):
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype("float32")


# ---- what the server shows ------------------------------------------------------------------------------------


def test_registered_and_described(server):
    info = server.get("/object_info")
    assert set(info) >= IDS
    for name in IDS:
        node = info[name]
        assert node["description"] and "Z-Image" in node["display_name"] and node["output_tooltips"]
        assert node["python_module"] == "custom_nodes.zimage-int4"
        assert node.get("search_aliases", ["zimage"]), name
    assert not re.search(r"IMPORT FAILED.*zimage-int4", server.log.read_text(errors="replace"))


def test_web_files_are_served(server):
    scripts = server.get("/extensions")
    assert "/extensions/zimage-int4/js/errors.js" in scripts
    for name in IDS:
        page = server.get(f"/extensions/zimage-int4/docs/{name}.md", raw=True).decode()
        for picture in re.findall(r"\]\((images/[^)]+)\)", page):
            assert server.get(f"/extensions/zimage-int4/docs/{picture}", raw=True)[:4] == b"\x89PNG"
    templates = server.get("/workflow_templates")
    assert {path.stem for path in GRAPHS} <= set(templates["zimage-int4"])
    for language, sampler in (("zh", "Z-Image 采样器"), ("ja", "Z-Image サンプラー")):
        assert server.get("/i18n")[language]["nodeDefs"]["ZImageSampler"]["display_name"] == sampler


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: p.stem)
def test_workflows_match_every_definition(server, real_names, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    form = json.loads(api_path(path).read_text(encoding="utf-8"))
    assert check_pair(graph, form, server.get("/object_info")) == []


# ---- running --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_every_workflow_runs(server, real_names, path):
    workflow = api(path.stem)
    entry = server.run(workflow)
    assert outcome(entry) == "success", entry["status"]
    (saved,) = (number for number, node in workflow.items() if node["class_type"] == "SaveImage")
    picture = server.images({"outputs": {saved: entry["outputs"][saved]}})[0]
    height, width, _ = pixels(picture).shape
    if path.stem == "zimage_compare":
        assert height > 2 * 128 and width > 2 * 128
    else:
        assert (height, width) == ((256, 256) if path.stem == "zimage_upscale" else (128, 128))
    assert pixels(picture).std() > 1
    if os.environ.get("ZIMAGE_KEEP_PICTURES"):
        (Path(os.environ["ZIMAGE_KEEP_PICTURES"]) / f"{path.stem}.png").write_bytes(picture)


def test_same_picture_as_the_command_line(server, tmp_path):
    entry = server.run(api())
    (picture,) = server.images(entry)
    prompt = api()["4"]["inputs"]["prompt"]
    command = [sys.executable, "-m", "zimage_core", "generate", prompt, "--out", str(tmp_path / "cli.png")]
    command += ["--width", "128", "--height", "128", "--seed", "1", "--device", "cpu", "--dtype", "float32"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    difference = abs(pixels(picture) - pixels((tmp_path / "cli.png").read_bytes()))
    assert difference.max() <= 2, difference.max()


def test_our_sampler_and_stock_ksampler_draw_the_same_picture(server):
    ours, stock = (server.images(server.run(api(name)))[0] for name in ("zimage_demo", "zimage_ksampler"))
    assert abs(pixels(ours) - pixels(stock)).max() <= 1


def test_stock_sampler_custom_advanced(server):
    workflow = api()
    workflow["5"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["20", 0], "guider": ["21", 0], "sampler": ["22", 0], "sigmas": ["23", 0],
                   "latent_image": ["24", 0]},
    }  # fmt: skip
    workflow |= {
        "20": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "21": {"class_type": "BasicGuider", "inputs": {"model": ["1", 0], "conditioning": ["4", 0]}},
        "22": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "23": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 8, "denoise": 1.0},
        },
        "24": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
    }
    entry = server.run(workflow)
    assert outcome(entry) == "success", entry["status"]
    ours = server.images(server.run(api()))[0]
    assert abs(pixels(server.images(entry)[0]) - pixels(ours)).max() <= 1


def test_stock_lora_loader_gives_the_same_picture(server, real_names):
    file = {"n8__lora_name": "zimage_lora.safetensors"}
    ours, stock = api("zimage_lora", **file), api("zimage_lora", **file)
    inputs = {"model": ["1", 0], "lora_name": "zimage_lora.safetensors", "strength_model": 1.0}
    stock["8"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    plain = api("zimage_lora", n8__strength=0.0, **file)
    found, expected, without = (pixels(server.images(server.run(w))[0]) for w in (stock, ours, plain))
    assert abs(found - expected).max() <= 2
    assert abs(expected - without).max() > 2


def test_bundled_lora_draws_its_frame(server):
    with_lora, without = (pixels(server.images(server.run(api("zimage_lora", n8__strength=x)))[0]) for x in (1.0, 0.0))
    same = api(n4__prompt=api("zimage_lora")["4"]["inputs"]["prompt"])
    assert abs(without - pixels(server.images(server.run(same))[0])).max() <= 1
    frame = with_lora.copy()
    frame[12:-12, 12:-12] = float("nan")
    red, green, blue = (frame[..., i][frame[..., i] == frame[..., i]].mean() for i in range(3))
    assert red > green + 40 and blue > green + 20  # pink, where the picture without it is blue
    assert without[:12, :, 2].mean() > without[:12, :, 0].mean() + 40


def test_inpainting_changes_only_the_mask(server, real_names):
    prompt = "a large green circle on a white background"  # unlike the picture, wherever it is repainted
    workflow = api("zimage_image_to_image", n5__denoise=0.9, n4__prompt=prompt)
    mask = {"value": 0.0, "width": 128, "height": 128}
    part = {"value": 1.0, "width": 64, "height": 128}
    workflow |= {
        "30": {"class_type": "SolidMask", "inputs": mask},
        "31": {"class_type": "SolidMask", "inputs": part},
        "32": {
            "class_type": "MaskComposite",
            "inputs": {"destination": ["30", 0], "source": ["31", 0], "x": 0, "y": 0, "operation": "add"},
        },
        "33": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["11", 0], "mask": ["32", 0]}},
        "34": {"class_type": "ZImageVAEDecode", "inputs": {"vae": ["3", 0], "latent": ["11", 0], "tiling": "off"}},
        "35": {"class_type": "SaveImage", "inputs": {"images": ["34", 0], "filename_prefix": "before"}},
    }
    workflow["5"]["inputs"]["latent"] = ["33", 0]
    entry = server.run(workflow)
    assert outcome(entry) == "success", entry["status"]
    found = {key: entry["outputs"][key]["images"][0] for key in ("7", "35")}
    after, before = (
        pixels(server.get(f"/view?filename={i['filename']}&subfolder={i['subfolder']}&type={i['type']}", raw=True))
        for i in found.values()
    )
    change = abs(after - before).mean(axis=(0, 2))  # the decoder's norms see the whole picture: small, not zero
    assert change[96:].mean() < change[:48].mean() / 4


def test_changing_the_seed_runs_only_the_sampler_again(server):
    server.run(api(n5__seed=100))
    entry = server.run(api(n5__seed=101))
    assert set(message(entry, "execution_cached")["nodes"]) == {"1", "2", "3", "4"}


# ---- websocket: progress, previews, text on the node, interrupt -----------------------------------------------


def test_progress_previews_and_text(server):
    seen = server.watch(api(n5__seed=200, n1__precision="w4a16"))
    assert seen["end"] == "execution_success"
    assert [p for p in seen["progress"] if p[1] == 8][-1] == (8, 8) and len(seen["progress"]) >= 8
    assert seen["previews"] >= 7
    assert any("INT4 r" in text for text in seen["texts"]), seen["texts"]


def test_interrupt_stops_within_a_step_and_leaves_everything_usable(server):
    before = server.images(server.run(api()))[0]
    seen = server.watch(api(n5__seed=300, n5__steps=100), interrupt_after=3)
    assert seen["end"] == "execution_interrupted"
    assert len(seen["progress"]) <= 5
    server.run(api(n5__seed=301))
    assert (pixels(server.images(server.run(api(n1__backend="torch")))[0]) == pixels(before)).all()


# ---- errors ---------------------------------------------------------------------------------------------------


def refused(server, workflow: dict) -> str:
    """The sentence of an HTTP 400."""
    status, answer = server.post("/prompt", {"prompt": workflow, "client_id": "test"})
    assert status == 400, answer
    return json.dumps(answer["node_errors"], ensure_ascii=False)


def test_refused_before_anything_runs(server, real_names):
    models = real_names
    (models / "diffusion_models" / "cut.safetensors").write_bytes(
        (ROOT / "tests/data/tiny_ckpt/svdq-int4_r32-z-image-tiny.safetensors").read_bytes()[:200_000]
    )
    assert "truncated" in refused(server, api(n1__model_name="cut.safetensors"))
    shutil.copy(models / "loras" / "zimage_lora.safetensors", models / "diffusion_models" / "lora.safetensors")
    assert "LoRA" in refused(server, api(n1__model_name="lora.safetensors"))
    assert "is not in" in refused(server, api(n2__encoder_name="gone.safetensors"))
    assert outcome(server.run(api())) == "success"


def test_errors_while_running_are_a_sentence(server, real_names):
    entry = server.run(api(n1__model_name="svdq-int4_r32-z-image-tiny.safetensors"))
    error = message(entry, "execution_error")
    assert error["exception_type"] == "ValueError" and error["node_type"] == "ZImageSampler"
    assert "this model wants 64" in error["exception_message"]
    entry = server.run(api(n1__backend="nunchaku"))
    error = message(entry, "execution_error")
    assert error["node_type"] == "ZImageINT4ModelLoader" and "nunchaku" in error["exception_message"]
    assert "choose backend auto" in error["exception_message"] and "triton" not in error["exception_message"]
    error = message(server.run(api(n5__width=130)), "execution_error")
    assert error["exception_message"].startswith("width 130: ") and "height" not in error["exception_message"]
    assert outcome(server.run(api())) == "success"


def test_import_is_quick_and_needs_no_optional_library(server):
    """diffusers, triton, nunchaku, gguf, peft and the hub may be absent: only what needs them then fails.

    Beside ComfyUI's own imports the pack takes less than half a second of CPU time, its lists of files included.
    """
    code = (
        "import sys, time, importlib.util\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'diffusers', 'triton', 'nunchaku', 'gguf', 'peft', 'huggingface_hub'}:\n"
        "            raise ImportError(name + ' is blocked')\n"
        f"sys.path.insert(0, {os.environ['COMFYUI_PATH']!r})\n"
        "import utils.extra_config, comfy.cli_args; comfy.cli_args.args.cpu = True\n"
        "import comfy.sd, comfy.sample, comfy.samplers, comfy_api.latest, latent_preview, nodes, server\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'huggingface_hub']: del sys.modules[name]\n"
        "sys.meta_path.insert(0, Block())\n"
        "start = time.process_time()\n"
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r})\n"
        "pack = importlib.util.module_from_spec(spec); sys.modules['pack'] = pack; spec.loader.exec_module(pack)\n"
        "inputs = [node.INPUT_TYPES() for node in pack.NODE_CLASS_MAPPINGS.values()]\n"
        "print(len(inputs), time.process_time() - start)\n"
    )
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=server.base)
    assert run.returncode == 0, run.stderr[-2000:]
    nodes, seconds = run.stdout.splitlines()[-1].split()
    assert int(nodes) == len(IDS) and float(seconds) < 0.5, seconds


# ---- many runs ------------------------------------------------------------------------------------------------


def test_twenty_prompts_in_a_row_with_stable_memory(server):
    sizes = []
    for n in range(RUNS):
        entry = server.run(api(n5__seed=1000 + n, n4__prompt=f"a red circle on a blue background {n % 4}"))
        assert outcome(entry) == "success"
        sizes.append(server.rss())
    assert max(sizes[SETTLED:]) - sizes[SETTLED - 1] < 24 * 2**20, [size >> 20 for size in sizes]


def test_a_hundredth_prompt_uses_no_more_memory_than_a_tenth(server):
    """Small pictures with other seeds and prompts, with a LoRA at other strengths and without."""
    sizes = []
    for n in range(MANY):
        changes = {"n5__seed": 2000 + n, "n4__prompt": f"a red circle on a blue background {n % 7}", "n5__steps": 1}
        changes |= {"n5__width": 32, "n5__height": 32} | ({"n8__strength": n % 10 / 10} if n % 2 else {})
        entry = server.run(api("zimage_lora" if n % 2 else "zimage_demo", **changes))
        assert outcome(entry) == "success"
        sizes.append(server.rss())
    assert sizes[-1] - sizes[MANY // 10] < 12 * 2**20, [size >> 20 for size in sizes]
