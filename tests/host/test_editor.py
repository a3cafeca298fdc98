"""The example workflows in ComfyUI's own graph editor (headless Chromium): what it shows, queues and says.

PLAYWRIGHT_CORE names a folder whose node_modules holds playwright-core; CHROMIUM the browser (/usr/bin/chromium).
EDITOR_SHOTS names a folder for the screenshots, to be looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted((ROOT / "example_workflows").glob("*.json"))
BROWSER = os.environ.get("CHROMIUM", "/usr/bin/chromium")
pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and os.environ.get("PLAYWRIGHT_CORE") and Path(BROWSER).exists()),
    reason="needs node, PLAYWRIGHT_CORE (a folder with node_modules/playwright-core) and CHROMIUM",
)


@pytest.fixture(scope="module")
def seen(server, real_names, tmp_path_factory):
    """One browser session over all jobs: {name: report} and the browser's log."""
    work = tmp_path_factory.mktemp("editor")
    shots = Path(os.environ.get("EDITOR_SHOTS", work))
    shots.mkdir(parents=True, exist_ok=True)
    jobs = [{"graph": str(path), "shot": str(shots / f"{path.stem}.png")} for path in GRAPHS]
    jobs[0] |= {"help": "ZImageSampler"}
    demo = json.loads((ROOT / "example_workflows" / "zimage_demo.json").read_text(encoding="utf-8"))
    ok = work / "run.json"
    ok.write_text(json.dumps(demo))
    jobs.append({"graph": str(ok), "run": True, "shot": str(shots / "run.png")})
    for node in demo["nodes"]:
        if node["type"] == "ZImageINT4ModelLoader":
            node["widgets_values"][1] = "nunchaku"
    bad = work / "error.json"
    bad.write_text(json.dumps(demo))
    jobs.append({"graph": str(bad), "run": True, "shot": str(shots / "error.png")})
    (work / "jobs.json").write_text(json.dumps(jobs))
    command = ["node", str(Path(__file__).with_name("editor.mjs")), server.url]
    run = subprocess.run(
        [*command, str(work / "jobs.json"), str(work / "report.json")], capture_output=True, text=True, timeout=600
    )
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
        assert set(node["unlinked"]) <= {"latent", "image_c", "image_d"}, node


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: p.stem)
def test_editor_makes_the_api_form_that_is_shipped(seen, path):
    shipped = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    made = seen[0][path.stem]["api"]
    assert {k: (v["class_type"], v["inputs"]) for k, v in made.items()} == {
        k: (v["class_type"], v["inputs"]) for k, v in shipped.items()
    }


def test_no_errors_from_the_pack(seen):
    ours = [line for line in seen[1] if "zimage-int4" in line]
    assert [line for line in ours if not line.endswith("/en.md")] == []  # the page of a locale, which it tries first


def test_queue_button_runs_the_demo(seen):
    assert seen[0]["run"]["run"]["how"] == "success", seen[0]["run"]["run"]


def test_toast_shows_the_packs_own_sentence(seen):
    report = seen[0]["error"]
    assert report["run"]["how"] == "error" and "nunchaku" in report["run"]["detail"]
    ours = [toast for toast in report["toasts"] if "cannot run on" in toast]
    assert ours and "Z-Image INT4 Model Loader" in ours[0], report["toasts"]


def test_help_page_with_its_picture(seen):
    report = next(r for r in seen[0].values() if "help" in r)
    if not report["helpButton"]:
        pytest.skip("this frontend's selection toolbox has no info button")
    assert "Generates a picture" in report["help"]
    assert any("ZImageSampler.png" in src and width > 100 for src, width in report["pictures"]), report["pictures"]
