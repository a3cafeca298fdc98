"""A ComfyUI server of one's own with the pack in it, for `tests/host` and `benchmarks/comfyui.py`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READY_S = 120


class Server:
    """One running ComfyUI with the pack linked into its custom_nodes.

    checkout: ComfyUI's; base: the folder for its models, input and output; args: more for its main.py; models: {path
    below base/models: file} to link there, whose folders ComfyUI is told of, as of this repository's; pack: what is
    linked into custom_nodes. RuntimeError where it does not start.
    """

    def __init__(
        self,
        checkout: Path,
        base: Path,
        *args: str,
        python: str = sys.executable,
        models: dict[str, Path] | None = None,
        log: Path | None = None,
        pack: Path = ROOT,
    ):
        self.base = base
        for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (base / name).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / "zimage-int4"
        if not link.is_symlink():
            link.symlink_to(pack)
        for where, source in (models or {}).items():
            target = base / "models" / where
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source)
        folders = {str(ROOT), *(str(source.resolve().parent) for source in (models or {}).values())}
        (base / "linked.yaml").write_text(json.dumps({"linked": {"zimage_linked": "\n".join(sorted(folders))}}))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or base / "comfyui.log"
        command = [python, str(checkout / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base}/user/comfyui.db"]
        command += ["--extra-model-paths-config", str(base / "linked.yaml")]
        command += ["--disable-api-nodes", "--disable-auto-launch", *args]
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log_file:
            self.process = subprocess.Popen(
                command, cwd=base, env=env, stdout=log_file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        end = time.time() + READY_S
        while time.time() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at its start:\n{self.tail()}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"ComfyUI was not ready in time:\n{self.tail()}")

    def text(self) -> str:
        """What the server has logged."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.text().splitlines()[-lines:])

    def get(self, path: str, raw: bool = False):
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            data = response.read()
        return data if raw else json.loads(data)

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                data, status = response.read(), response.status
        except urllib.error.HTTPError as error:
            data, status = error.read(), error.code
        return status, json.loads(data) if data else {}

    def queue(self, workflow: dict, client: str = "test") -> str:
        status, answer = self.post("/prompt", {"prompt": workflow, "client_id": client})
        assert status == 200, json.dumps(answer, indent=1)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """The history entry of a prompt, once it has ended."""
        end = time.time() + timeout
        while time.time() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            assert self.process.poll() is None, self.tail()
            time.sleep(0.1)
        raise AssertionError(f"prompt did not end in {timeout} s:\n{self.tail()}")

    def run(self, workflow: dict, timeout: float = 300) -> dict:
        return self.wait(self.queue(workflow), timeout)

    def watch(
        self,
        workflow: dict,
        interrupt_after: int | None = None,
        interrupt_at: str | None = None,
        timeout: float = 300,
    ) -> dict:
        """Queue a workflow and collect what the websocket tells until it ends; `began`: when each node did.

        It is interrupted after so many steps, or at the first text on a node that begins so. timeout: seconds for all
        of it; asyncio.TimeoutError after them.
        """
        return asyncio.run(asyncio.wait_for(self._watch(workflow, interrupt_after, interrupt_at), timeout))

    async def _watch(self, workflow: dict, interrupt_after: int | None, interrupt_at: str | None) -> dict:
        import aiohttp

        seen = {"progress": [], "previews": 0, "texts": [], "began": {}, "end": None}
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId=watch") as ws:
            async with session.post(f"{self.url}/prompt", json={"prompt": workflow, "client_id": "watch"}) as answer:
                assert answer.status == 200, await answer.text()
                seen["prompt_id"] = (await answer.json())["prompt_id"]
            while seen["end"] is None:
                event = await ws.receive()
                if event.type is aiohttp.WSMsgType.BINARY:
                    kind = struct.unpack(">I", event.data[:4])[0]
                    seen["previews"] += kind in (1, 4)
                    if kind == 3:
                        length = struct.unpack(">I", event.data[4:8])[0]
                        seen["texts"].append(event.data[8 + length :].decode())
                        if interrupt_at and seen["texts"][-1].startswith(interrupt_at):
                            interrupt_at = None
                            await session.post(f"{self.url}/interrupt", json={"prompt_id": seen["prompt_id"]})
                    continue
                assert event.type is aiohttp.WSMsgType.TEXT, f"the connection ended: {self.tail()}"
                data = json.loads(event.data)
                if data["type"] == "progress":
                    seen["progress"].append((data["data"]["value"], data["data"]["max"]))
                    if len(seen["progress"]) == interrupt_after:
                        await session.post(f"{self.url}/interrupt", json={"prompt_id": seen["prompt_id"]})
                elif data["type"] == "executing":
                    seen["began"][data["data"]["node"]] = time.monotonic()
                elif data["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    seen["end"] = data["type"]
        return seen

    def images(self, entry: dict) -> list[bytes]:
        found = []
        for output in entry["outputs"].values():
            for item in output.get("images", ()):
                query = "&".join(f"{k}={urllib.request.quote(item[k])}" for k in ("filename", "subfolder", "type"))
                found.append(self.get(f"/view?{query}", raw=True))
        return found

    def rss(self) -> int:
        """Resident bytes of the server process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
