"""The pack as ComfyUI's manager installs it: the files of the registry's zip in a folder of custom_nodes."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from comfyui_server import Server
from test_server import IDS, api, outcome, pixels

ROOT = Path(__file__).resolve().parents[2]


def registry_zip(path: Path) -> Path:
    """What `comfy node pack` writes: the tracked files but for those that .comfyignore names."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ignored = [f"{line}*" for line in (ROOT / ".comfyignore").read_text().split()]
    with zipfile.ZipFile(path, "w") as file:
        for name in tracked.splitlines():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored):
                file.write(ROOT / name, name)
    return path


def test_an_installed_zip_runs_the_demo(tmp_path):
    folder = tmp_path / "comfyui-zimage-int4-main"
    with zipfile.ZipFile(registry_zip(tmp_path / "node.zip")) as file:
        file.extractall(folder)
    assert not (folder / "tests").exists()
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    server = Server(Path(os.environ["COMFYUI_PATH"]), tmp_path / "base", "--cpu", python=python, pack=folder)
    try:
        assert set(server.get("/object_info")) >= IDS
        entry = server.run(api())
        assert outcome(entry) == "success" and pixels(server.images(entry)[0]).std() > 1
        sources = server.get("/object_info/ZImageQuantize")["ZImageQuantize"]["input"]["required"]["model_name"][0]
        assert sources == ["bundled demo"]
        found = {entry["name"] for entry in server.get("/global_subgraphs").values()}
        assert found >= {path.stem for path in (ROOT / "subgraphs").glob("*.json")}
    finally:
        server.stop()


def test_version_and_changelog_agree():
    version = re.search(r'^version = "([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.M)[1].rstrip(".")
    assert (ROOT / "CHANGELOG.md").read_text().split("## ")[1].startswith(f"{version}, ")


def test_metadata_passes_comfy_clis_own_validation(tmp_path):
    """Where comfy-cli is installed; it reads pyproject.toml as publishing does, without a network."""
    pytest.importorskip("comfy_cli")
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "Warning" not in run.stdout.split("Running security checks")[0], run.stdout
