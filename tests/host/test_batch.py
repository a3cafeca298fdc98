"""`zimage batch` with a running ComfyUI as its engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from zimage_core import batch, cli

websocket = pytest.importorskip("websocket")
ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "example_workflows" / "api" / "zimage_demo.json"
SET = ["4.prompt=prompt", "5.seed=seed", "5.steps=steps"]
ENGINE = [f"--workflow={WORKFLOW}", *(f"--set={one}" for one in SET)]


def hashes(folder: Path) -> dict[str, str]:
    return {record["id"]: record["sha256"] for record in batch.Sink(folder).records()}


def rows_file(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int) -> list[dict]:
    return [{"id": f"cat-{i}", "prompt": f"a red circle {i}", "seed": i, "steps": 2} for i in range(count)]


def test_rows_are_queued_fetched_and_resumed(server, tmp_path, capsys):
    asked = rows(4) + [{"id": "bad", "prompt": "a", "steps": 0}, {"id": "several", "prompt": "b", "count": 2}]
    out = tmp_path / "out"
    command = ["batch", str(rows_file(tmp_path, asked)), f"--out={out}", f"--comfyui={server.url}", *ENGINE]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "zimage: bad: ComfyUI refuses the prompt" in captured.err and "steps" in captured.err
    assert "6 pictures generated" in captured.out and "1 failed" in captured.out
    found = hashes(out)
    assert set(found) == {"cat-0", "cat-1", "cat-2", "cat-3", "several-1", "several-2"}
    workflow = json.loads(WORKFLOW.read_text())
    workflow["4"]["inputs"]["prompt"] = "a red circle 1"
    workflow["5"]["inputs"] |= {"seed": 1, "steps": 2}
    from PIL import Image

    entry = server.run(workflow)
    (tmp_path / "one.png").write_bytes(server.images(entry)[0])
    with Image.open(tmp_path / "one.png") as one, Image.open(out / "cat-1.png") as other:
        assert one.tobytes() == other.tobytes()
    asked[4]["steps"], asked[0]["prompt"] = 2, "another"
    rows_file(tmp_path, asked)
    assert cli.main(command) == 0
    assert "2 pictures generated" in capsys.readouterr().out
    again = hashes(out)
    assert again.pop("bad") and again.pop("cat-0") != found.pop("cat-0")
    assert again == found


def test_killed_on_the_way_it_goes_on_and_the_server_is_left_usable(server, tmp_path):
    path = rows_file(tmp_path, rows(12))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "zimage_core", "batch", str(path), f"--out={out}", f"--comfyui={server.url}"]
    process = subprocess.Popen([*command, *ENGINE], env={**os.environ, "PYTHONPATH": str(ROOT)})
    end = time.monotonic() + 120
    while len(list(out.glob("*.png"))) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {picture: picture.stat().st_mtime_ns for picture in out.glob("*.png")}
    assert 3 <= len(there) < 12
    assert subprocess.run([*command, *ENGINE], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert len(hashes(out)) == 12
    assert sum(picture.stat().st_mtime_ns != changed for picture, changed in there.items()) <= 1
    assert not server.get("/queue")["queue_pending"]


def test_an_end_on_the_way_leaves_nothing_in_the_queue(server, tmp_path):
    from zimage_core.batch.comfyui import ComfyUI, WorkflowColumns, read_workflow

    seen = []
    engine = ComfyUI(server.url, WORKFLOW, on_progress=lambda name, done, total: seen.append((name, done, total)))
    columns = WorkflowColumns(read_workflow(WORKFLOW), SET)
    run = iter(batch.run(rows(8), tmp_path, generator=engine, columns=columns))
    first = next(run)
    run.close()
    assert first.error is None and ("cat-0", 2, 2) in seen
    deadline = time.monotonic() + 30
    while (queue := server.get("/queue"))["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not queue["queue_running"] and not queue["queue_pending"]
    assert len(hashes(tmp_path)) < 8


class Relay:
    """A port that leads to a server until `cut` ends all its connections; new ones are let through again."""

    def __init__(self, port: int):
        self.target = port
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self.listener.accept()[0], socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.sockets = []


def test_a_lost_connection_costs_a_row_a_second_try(server, tmp_path):
    from zimage_core.batch.comfyui import ComfyUI, WorkflowColumns, read_workflow

    relay = Relay(server.port)
    engine = ComfyUI(relay.url, WORKFLOW)
    columns = WorkflowColumns(read_workflow(WORKFLOW), SET)
    seen = []
    for result in batch.run(rows(6), tmp_path, generator=engine, columns=columns):
        seen.append(result.id)
        assert result.error is None
        if len(seen) == 2:
            relay.cut()
    assert sorted(seen) == sorted(hashes(tmp_path)) == [f"cat-{i}" for i in range(6)]
    relay.listener.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--comfyui needs --workflow"),
        ([f"--workflow={ROOT / 'example_workflows' / 'Z-Image demo.json'}"], "expected a workflow in API form"),
        ([f"--workflow={WORKFLOW}"], "--comfyui needs --set"),
        ([f"--workflow={WORKFLOW}", "--set=5.sed=seed"], "the workflow has no input 5.sed; there are"),
        ([f"--workflow={WORKFLOW}", "--set=5.model=seed"], "expected a plain value"),
        ([f"--workflow={WORKFLOW}", "--set=5.seed"], "expected NODE.INPUT=column"),
        ([*ENGINE, "--output=77"], "there is no node 77"),
        ([*ENGINE, "--width=64"], "--width has no effect in ComfyUI"),
        ([*ENGINE, "--gpus=all"], "choose one"),
        ([f"--workflow={WORKFLOW}", "--set=4.prompt=text"], "column 'prompt' is unknown"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_queued(server, tmp_path, capsys, options, words):
    path = rows_file(tmp_path, rows(1))
    assert cli.main(["batch", str(path), f"--out={tmp_path / 'out'}", f"--comfyui={server.url}", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_server_that_is_not_there(tmp_path, capsys):
    path = rows_file(tmp_path, rows(1))
    assert cli.main(["batch", str(path), f"--out={tmp_path / 'out'}", "--comfyui=127.0.0.1:9", *ENGINE]) == 2
    assert "ComfyUI at http://127.0.0.1:9 does not answer" in capsys.readouterr().err
