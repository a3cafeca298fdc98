"""Batches by several processes, of which some are killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_core import batch
from zimage_core.batch import processes

HERE = Path(__file__).parent
SMALL = {"width": 48, "height": 32, "steps": 2}


def hashes(folder: Path) -> dict[str, str]:
    return {record["id"]: record["sha256"] for record in batch.Sink(folder).records()}


def test_processes_share_the_rows_and_one_that_is_killed_is_started_again(tiny_files, tmp_path, monkeypatch):
    rows = [{"id": f"cat-{i}", "prompt": f"cat {i}", **SMALL} for i in range(8)]
    list(batch.run(rows, tmp_path / "one", **tiny_files, device="cpu"))
    rows += [{"id": "poison", "prompt": "kill", **SMALL}, {"id": "unlucky", "prompt": "kill once", **SMALL}]
    monkeypatch.setattr(processes, "MODULE", "dying_worker")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    out = tmp_path / "out"
    run = batch.run(rows, out, **tiny_files, devices=["cpu", "cpu"])
    results = {result.id: result for result in run}
    assert len(results) == 10 and run.failed == 1
    assert "ended 2 times (signal 9)" in results["poison"].error
    found = hashes(out)
    assert found.pop("unlucky")
    assert found == hashes(tmp_path / "one")
    (failed,) = map(json.loads, (out / "failed.jsonl").read_text().splitlines())
    assert failed["id"] == "poison"
    again = batch.run(rows, out, **tiny_files, devices=["cpu"])
    assert again.missing == 1
    again.close()


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]], ids=["here", "processes"])
def test_an_interrupt_keeps_what_is_done_and_leaves_nobody_behind(tiny_files, tmp_path, devices):
    rows = [{"id": f"cat-{i}", "prompt": f"cat {i}", **SMALL, "steps": 20} for i in range(200)]
    options = {**{name: str(path) for name, path in tiny_files.items()}, "device": "cpu", "devices": devices}
    code = f"""
import signal
from zimage_core import batch
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
for result in batch.run({rows!r}, {str(tmp_path)!r}, **{options!r}):
    print(result.id, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in errors
    found = hashes(tmp_path)
    assert 3 <= len(found) < 200 and {f"{name}.png" for name in found} == {path.name for path in tmp_path.glob("*.png")}
    assert not list((tmp_path / "journal").iterdir())
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (folder / "cmdline").exists():
            assert b"zimage_core.batch.processes" not in (folder / "cmdline").read_bytes()
