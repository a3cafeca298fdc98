"""The example workflows in ComfyUI's own graph editor (headless Chromium): what it shows, queues and says.

PLAYWRIGHT_CORE names a folder whose node_modules holds playwright-core; CHROMIUM the browser (/usr/bin/chromium).
EDITOR_SHOTS names a folder for the screenshots, to be looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from test_server import IDS
from workflows import api_path

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
QUICK = [path for path in GRAPHS if path.stem != "Z-Image text to image"]  # all others are of 128 x 128
LACKING = ["Depth to image (Z-Image INT4)", "Image upscale (Z-Image INT4)"]  # other models, which are not here or large
if not (ROOT / "zimage_core" / "demo" / "controlnet.safetensors").is_file():
    LACKING += [f"{name} (Z-Image INT4)" for name in ("Canny to image", "ControlNet", "Pose to image")]
SMALL = {"width": 128, "height": 128}
WRONG = {  # name: graph, {node: {place of a widget: a wrong value}}
    "backend": ("Z-Image demo", {"ZImageINT4ModelLoader": {1: "nunchaku"}}),
    "size": ("Z-Image demo", {"ZImageSampler": {3: 130}}),
    "gone": ("Z-Image demo", {"ZImageINT4ModelLoader": {0: "gone.safetensors"}}),
    "lora": ("Z-Image LoRA", {"ZImageLoraLoader": {0: "sdxl_lora.safetensors"}}),
}
SENTENCES = {  # name: how it ends, the node's title, what our toast says
    "backend": ("error", "Z-Image INT4 Model Loader", "backend 'nunchaku' with precision 'auto' cannot run on cpu"),
    "size": ("error", "Z-Image Sampler", "width 130: it must be a multiple of 16 from 16 to 4096; try 128"),
    "gone": ("refused", "Z-Image INT4 Model Loader", "'gone.safetensors' is not in"),
    "lora": ("refused", "Z-Image LoRA Loader", "expected a LoRA for Z-Image, found one for Stable Diffusion"),
}
LORAS = {"ZImageLoraLoader", "ZImageLoraStack", "ZImageLoraSwitches"}
WORDS = {  # what is typed into the node search: which nodes come first among ours
    **dict.fromkeys(("svdquant", "gguf", "awq", "dit loader"), {"ZImageINT4ModelLoader"}),
    **dict.fromkeys(("lora", "nunchaku lora"), LORAS),
    "nunchaku": {"ZImageINT4ModelLoader", *LORAS},
}
CLEARS_LINES = (1, 58)  # from this frontend on, as far as is known: 1.49 keeps them after a run
BROWSER = os.environ.get("CHROMIUM", "/usr/bin/chromium")
pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and os.environ.get("PLAYWRIGHT_CORE") and Path(BROWSER).exists()),
    reason="needs node, PLAYWRIGHT_CORE (a folder with node_modules/playwright-core) and CHROMIUM",
)


def nunchaku_graph() -> dict:
    """The demo's graph as made for nunchaku's packs: their loader, and their LoRA stack with two slots in between."""
    graph = json.loads((ROOT / "example_workflows" / "Z-Image demo.json").read_text(encoding="utf-8"))
    nodes = {node["type"]: node for node in graph["nodes"]}
    loader, encoder, sampler = (
        nodes[name] for name in ("ZImageINT4ModelLoader", "ZImageTextEncoderLoader", "ZImageSampler")
    )
    old = next(link for link in graph["links"] if link[1] == loader["id"])
    links = [[90, loader["id"], 0, 20, 0, "MODEL"], [91, encoder["id"], 0, 20, 1, "CLIP"]]
    links.append([92, 20, 0, sampler["id"], old[4], "MODEL"])
    graph["links"] = [link for link in graph["links"] if link is not old] + links
    loader |= {"type": "NunchakuZImageDiTLoader", "widgets_values": ["bundled demo"], "properties": {}}
    loader["outputs"][0]["links"] = [90]
    encoder["outputs"][0]["links"].append(91)
    sampler["inputs"][old[4]]["link"] = 92
    values = ["2", 2, True, True, "bundled demo: frame", 0.7, False, "bundled demo: grey", 1.0]
    stack = {"id": 20, "type": "NunchakuZImageTurboLoraStackV4", "pos": [380, -260], "size": [340, 240], "mode": 0}
    stack |= {"flags": {}, "order": 1, "properties": {"visibleLoraCount": 2}, "widgets_values": values}
    stack["inputs"] = [{"name": "model", "type": "MODEL", "link": 90}, {"name": "clip", "type": "CLIP", "link": 91}]
    stack["outputs"] = [
        {"name": "MODEL", "type": "MODEL", "links": [92]},
        {"name": "CLIP", "type": "CLIP", "links": []},
    ]
    graph["nodes"].append(stack)
    graph |= {"last_node_id": 20, "last_link_id": 92}
    return graph


@pytest.fixture(scope="module", params=["classic", "nodes 2.0"])
def seen(request, server, real_names, tmp_path_factory):
    """One browser session over all jobs: {name: report} and the browser's log."""
    work = tmp_path_factory.mktemp("editor")
    shots = Path(os.environ.get("EDITOR_SHOTS", work)) / request.param
    shots.mkdir(parents=True, exist_ok=True)
    jobs = [{"graph": str(path), "shot": str(shots / f"{path.stem}.png"), "run": path in QUICK} for path in GRAPHS]
    jobs[-1] |= {"help": "ZImageSampler"}
    for path in BLUEPRINTS:
        runs = path.stem not in LACKING
        sizes = SMALL if path.stem.startswith("Text") else {"megapixels": 128 * 128 / 2**20} if runs else {}
        widgets = {"prompt": "a red circle on a blue background", **sizes}
        job = {"blueprint": path.stem, "widgets": widgets, "picture": SMALL, "run": runs}
        jobs.append({**job, "shot": str(shots / f"{path.stem}.png")})
    for name, (graph, changes) in WRONG.items():
        wrong = json.loads((ROOT / "example_workflows" / f"{graph}.json").read_text(encoding="utf-8"))
        for node in wrong["nodes"]:
            for place, value in changes.get(node["type"], {}).items():
                node["widgets_values"][place] = value
        (work / f"{name}.json").write_text(json.dumps(wrong))
        jobs.append({"graph": str(work / f"{name}.json"), "run": True, "shot": str(shots / f"{name}.png")})
    moved = work / "nunchaku.json"
    moved.write_text(json.dumps(nunchaku_graph()))
    jobs.insert(0, {"graph": str(moved), "replace": True, "shot": str(shots / "nunchaku.png")})  # before any toast
    (work / "jobs.json").write_text(json.dumps(jobs))
    command = ["node", str(Path(__file__).with_name("editor.mjs")), server.url]
    env = {**os.environ, "NODES_2": "1" if request.param == "nodes 2.0" else ""}
    command += [str(work / "jobs.json"), str(work / "report.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((work / "report.json").read_text())
    return {Path(r["graph"]).stem: r for r in report["reports"]}, report["log"]


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: p.stem)
def test_graph_opens_with_every_node_and_value(seen, path):
    report = seen[0][path.stem]
    graph = json.loads(path.read_text(encoding="utf-8"))
    assert {(int(n["id"]), n["type"]) for n in report["nodes"]} == {(n["id"], n["type"]) for n in graph["nodes"]}
    for node in report["nodes"]:
        assert node["known"] and not node["badCombos"], node
        assert set(node["unlinked"]) <= {
            "latent",
            "negative",
            "mask",
            "inpaint_image",
            "image",
            "image_c",
            "image_d",
        }, node


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_blueprint_is_found_by_its_name_and_runs(seen, path):
    report = seen[0][path.stem]
    (inside,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    assert sorted(report["inside"][0]) == sorted(node["type"] for node in inside["nodes"])
    widgets = {name for node in report["nodes"] for name in node["widgets"]}
    assert widgets >= {slot["name"] for slot in inside["inputs"]} - {"image"}
    made = [node["class_type"] for node in report["api"].values()]
    assert set(made) >= {node["type"] for node in inside["nodes"]} and "PreviewImage" in made
    if path.stem in LACKING:
        assert {w.partition("=")[0] for node in report["nodes"] for w in node["badCombos"]} <= {
            "depth_model",
            "depth_vae",
            "upscale_model",
            "control_name",
        }
    else:
        assert report["run"]["how"] == "success", report["run"]


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: p.stem)
def test_editor_makes_the_api_form_that_is_shipped(seen, path):
    shipped = json.loads(api_path(path).read_text(encoding="utf-8"))
    made = seen[0][path.stem]["api"]
    assert {k: (v["class_type"], v["inputs"]) for k, v in made.items()} == {
        k: (v["class_type"], v["inputs"]) for k, v in shipped.items()
    }


def test_no_errors_from_the_pack(seen):
    ours = [
        line for line in seen[1] if "zimage-int4" in line and "PromptExecutionError" not in line
    ]  # refused on purpose
    assert [line for line in ours if not line.endswith("/en.md")] == []  # the page of a locale, which it tries first


@pytest.mark.parametrize("path", QUICK, ids=lambda p: p.stem)
def test_queue_button_runs_the_graph_and_no_node_grows_over_another(seen, path):
    report, title = seen[0][path.stem], 30
    assert report["run"]["how"] == "success", report["run"]
    for i, (kind, x, y, w, h) in enumerate(report["boxes"]):
        for other, x2, y2, w2, h2 in report["boxes"][:i]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 - title or y2 + h2 <= y - title
            assert apart, f"{kind} lies over {other}"


@pytest.mark.parametrize("name", WRONG)
def test_toast_shows_the_packs_own_sentence_below_comfyuis_own_box(seen, name):
    """Whether it is refused before the run or ends it; with "View details" free to be clicked."""
    report, (how, title, words) = seen[0][name], SENTENCES[name]
    assert report["run"]["how"] == how, report["run"]
    ours = {toast for toast in report["toasts"] if words in toast}
    assert len(ours) == 1 and ours.pop().startswith(title), report["toasts"]
    assert report["covered"] == []


def test_no_word_of_a_nodes_lines_is_broken(seen):
    """In any graph; ComfyUI shows no lines on nodes whose results it kept from an earlier one."""
    frontend = version("comfyui-frontend-package")
    if tuple(map(int, frontend.split(".")[:2])) >= CLEARS_LINES:
        pytest.skip(f"frontend {frontend} clears a node's lines when the run ends")
    said = [report["said"] for report in seen[0].values() if "said" in report]
    assert sum(len(one["lines"]) for one in said) > 10 and not any(one["broken"] for one in said)


def test_one_click_replaces_the_nodes_of_nunchakus_packs(seen):
    report = seen[0]["nunchaku"]
    if not report["replaceButton"]:
        pytest.skip("this frontend has no button that replaces nodes")
    nodes = {node["type"]: node for node in report["nodes"]}
    assert [node["type"] for node in report["nodes"] if not node["known"]] == []
    assert nodes["ZImageINT4ModelLoader"]["widgets"]["model_name"] == "bundled demo"
    widgets = nodes["ZImageLoraSwitches"]["widgets"]
    assert [widgets[f"lora_name_{i}"] for i in (1, 2, 3)] == ["bundled demo: frame", "bundled demo: grey", "None"]
    assert (widgets["lora_count"], widgets["lora_strength_1"]) == (2, 0.7)
    assert [widgets[f"enabled_{i}"] for i in (1, 2)] == [True, False]
    made = {node["class_type"]: node["inputs"] for node in report["api"].values()}
    assert made["ZImageLoraSwitches"]["clip"][1] == 0 and made["ZImageSampler"]["model"] == ["20", 0]


def test_help_page_in_chinese(server, tmp_path):
    shots = Path(os.environ.get("EDITOR_SHOTS", tmp_path))
    job = {"graph": str(GRAPHS[-1]), "help": "ZImageSampler", "shot": str(shots / "chinese.png")}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    command = ["node", str(Path(__file__).with_name("editor.mjs")), server.url]
    command += [str(tmp_path / "jobs.json"), str(tmp_path / "report.json")]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "EDITOR_LOCALE": "zh"})
    (report,) = json.loads((tmp_path / "report.json").read_text())["reports"]
    if not report["helpButton"]:
        pytest.skip("this frontend's selection toolbox has no info button")
    assert "中断会在模型的两块之间停止" in report["help"]
    assert any("ZImageSampler.png" in src and width > 100 for src, width in report["pictures"]), report["pictures"]


@pytest.fixture(scope="module")
def listed(server, tmp_path_factory):
    """What one browser session found of each node: its help page, its place in the search."""
    work = tmp_path_factory.mktemp("nodes")
    shots = Path(os.environ.get("EDITOR_SHOTS", work)) / "help"
    shots.mkdir(parents=True, exist_ok=True)
    types = ["ZImageLoraSwitches", *sorted(IDS - {"ZImageLoraSwitches"})]
    job = {"nodes": types, "search": list(WORDS), "shot": str(shots / "help.png")}
    (work / "jobs.json").write_text(json.dumps([job]))
    command = ["node", str(Path(__file__).with_name("editor.mjs")), server.url]
    subprocess.run([*command, str(work / "jobs.json"), str(work / "report.json")], check=True, timeout=600)
    return json.loads((work / "report.json").read_text())["reports"][0]


@pytest.mark.parametrize("node", sorted(IDS))
def test_help_pages_fit_the_side_panel(listed, node):
    if not listed["pages"]:
        pytest.skip("this frontend's selection toolbox has no info button")
    page = listed["pages"][node]
    assert page["width"] == 260 and len(page["text"]) > 200 and page["cut"] == []


@pytest.mark.parametrize("words, nodes", WORDS.items(), ids=lambda p: p if isinstance(p, str) else "")
def test_the_search_finds_our_nodes(listed, words, nodes):
    ours = [name for name in listed["search"][words] if name in IDS]
    assert set(ours[: len(nodes)]) == nodes


def test_the_lora_switches_grow(listed):
    few, many = listed["grown"]
    assert few["shown"] == ["enabled_1", "lora_name_1", "lora_strength_1"]
    assert len(many["shown"]) == 12 and many["height"] > few["height"] + 100


def test_help_page_with_its_picture(seen):
    report = next(r for r in seen[0].values() if "help" in r)
    if not report["helpButton"]:
        pytest.skip("this frontend's selection toolbox has no info button")
    assert "Generates a picture" in report["help"]
    assert any("ZImageSampler.png" in src and width > 100 for src, width in report["pictures"]), report["pictures"]
