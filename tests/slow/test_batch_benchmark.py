"""benchmarks/batch.py with small files: every part that needs no other package runs and says what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "batch.py"), "--tiny", f"--folder={tmp_path}", "--device=cpu"]
    command += ["--count=30", "--pace", "--batches", "--gpus", "2", "--kills=3", "--rows=100"]
    command += ["--demo-kills=1", "--demo-rows=12"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["way"] for row in found["rows"]] == ["zimage batch", "one by one", "together", "2 processes"]
    assert all(row["a_minute"] > 0 for row in found["rows"])
    assert [row["count"] for row in found["rows"][:3]] == [28, 28, 28], "of 30, after two"
    assert found["apart_64"]["largest"] == 0, "on a CPU pictures are made one by one anyway"
    for part, rows, kills in (("tenth", 10, 0), ("kills", 100, 3), ("demo_kills", 12, 1)):
        assert (found[part]["rows"], found[part]["kills"], found[part]["half_written"]) == (rows, kills, 0)
