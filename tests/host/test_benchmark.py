"""benchmarks/comfyui.py with small files on the CPU: all of it that needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_that_needs_no_gpu(tmp_path):
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "benchmarks/comfyui.py", "--tiny", "--device=cpu"]
    command += [f"--folder={tmp_path / 'files'}", f"--out={tmp_path / 'out'}", "--modes"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    facts = json.loads(run.stdout.splitlines()[-1])
    rows = {row["part"]: row for row in facts["rows"]}
    assert facts["ok"] and all(row["ok"] for row in rows.values())
    assert rows["vram_budget 0.04"]["blocks"] == "0 of 3" and rows["vram_budget 0.04"]["same"] == "yes"
    assert rows["after the interrupt"]["same"] == rows["without it again"]["same"] == "yes"
    assert "10 prompts in a row" in rows and "defaults" in rows and (tmp_path / "out" / "comfyui_0.log").is_file()
