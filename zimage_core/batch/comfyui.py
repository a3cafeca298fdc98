"""Rows as prompts of a running ComfyUI: a workflow in API form, into whose inputs the columns go.

The next prompts are queued while one runs, so the server never waits. Its websocket says what happens, its history
what has come of it, and /view gives the picture, which is kept as it comes. After a lost connection a row is tried once
more.

Source of the interface: ComfyUI `server.py@v0.33.0` and `script_examples/websockets_api_example.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .columns import Cells, number, text, whole
from .rows import Row

QUEUED = 2  # prompts in the server's queue at a time
REQUEST_S, EVENT_S, BACK_S = 60.0, 5.0, 120.0
PNG = b"\x89PNG\r\n\x1a\n"
OUTPUTS = ("SaveImage", "PreviewImage")
Progress = Callable[[str, int, int], None]


class WorkflowColumns:
    """Columns that are put into inputs of a workflow; "5.seed=seed" puts column seed into input seed of node 5."""

    def __init__(self, workflow: Mapping[str, Any], assignments: Sequence[str]):
        self.inputs: dict[str, str] = {}  # NODE.INPUT -> column
        self.defaults: dict[str, Any] = {}
        for assignment in assignments:
            target, equals, column = assignment.partition("=")
            node, dot, name = target.partition(".")
            if not (equals and dot and column):
                raise ValueError(f"--set {assignment}: expected NODE.INPUT=column, such as 5.seed=seed")
            if name not in workflow.get(node, {}).get("inputs", {}):
                has = ", ".join(workflow[node]["inputs"]) if node in workflow else f"nodes {', '.join(workflow)}"
                raise ValueError(f"--set {assignment}: the workflow has no input {target}; there are {has}")
            if column in ("id", "count") or isinstance(workflow[node]["inputs"][name], list | dict):
                raise ValueError(f"--set {assignment}: expected a plain value and a column other than id and count")
            self.inputs[target] = column
            self.defaults[target] = workflow[node]["inputs"][name]
        if not self.inputs:
            raise ValueError("--comfyui needs --set NODE.INPUT=column, as all rows would be the same without")
        self.names = frozenset(self.inputs.values())

    def settings(self, cells: Cells, seed: int) -> dict[str, Any]:
        """The value of each input, of the type that the workflow has there, which is kept where a cell is empty."""
        given = {**cells, "seed": seed}
        return {
            target: convert(column, given[column], self.defaults[target]) if column in given else self.defaults[target]
            for target, column in self.inputs.items()
        }


def convert(column: str, value: object, like: object) -> object:
    """A cell as the type of the value that a workflow has at its place."""
    if isinstance(like, bool):
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"{column}: expected true or false, found {value!r}")
        return str(value).lower() == "true"
    if isinstance(like, int):
        return whole(column, value, -(2**63), 2**64 - 1)
    if isinstance(like, float):
        return number(column, value)
    return text(column, str(value) if isinstance(value, int) and not isinstance(value, bool) else value)


class ComfyUI:
    """A server at `url` as a `work.Generator`. output: the node whose picture counts, where there are several."""

    def __init__(self, url: str, workflow: str | Path, output: str | None = None, on_progress: Progress | None = None):
        self.url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
        self.path = Path(workflow)
        self.workflow = read_workflow(self.path)
        shown = [node for node, what in self.workflow.items() if what["class_type"] in OUTPUTS]
        if output is None and len(shown) > 1:
            raise ValueError(f"{workflow}: nodes {', '.join(shown)} show pictures; name one with --output")
        if output is not None and output not in self.workflow:
            raise ValueError(f"{workflow}: there is no node {output}; it has {', '.join(self.workflow)}")
        self.output = output or (shown[0] if shown else None)
        self.on_progress = on_progress
        self.client = uuid.uuid4().hex
        self.coming: deque[Row] = deque()
        self.queued: dict[str, str] = {}  # id of a row -> id of its prompt
        self.socket: Any = None
        self._require_websocket()
        self.server = self._get("/system_stats")

    @staticmethod
    def _require_websocket() -> None:
        try:
            import websocket  # noqa: F401
        except ImportError:
            raise ValueError(
                '--comfyui needs the package websocket-client; install it: pip install "zimage-int4[comfyui-client]"'
            ) from None

    def facts(self) -> dict[str, object]:
        """The workflow; the models are the server's own affair."""
        return {"workflow": self.workflow, "output": self.output}

    def made_with(self) -> dict[str, object]:
        device = next((device["name"] for device in self.server.get("devices", ())), "")
        version = self.server.get("system", {}).get("comfyui_version", "")
        return {"workflow": self.path.name, "comfyui": version, "device": device}

    def plan(self) -> str:
        made = self.made_with()
        return f"{self.path.name} in ComfyUI {made['comfyui']} at {self.url} on {made['device']}"

    def group(self, row: Row) -> Hashable:
        return row.id

    def together(self, row: Row) -> int:
        return 1

    def prepare(self, rows: Sequence[Row]) -> None:
        self.coming = deque(rows)

    def generate(self, rows: Sequence[Row]) -> list[bytes]:
        (row,) = rows
        try:
            return [self._picture(row)]
        except ConnectionError:
            self._wait_until_back()
            return [self._picture(row)]

    def _picture(self, row: Row) -> bytes:
        """Queue the row, and the next ones behind it; returns its picture when it is done."""
        self._queue(row)
        while self.coming and len(self.queued) < QUEUED:
            following = self.coming.popleft()
            if following.id != row.id:
                with contextlib.suppress(ValueError):  # told when it is its turn
                    self._queue(following)
        try:
            entry = self._wait(row)
        finally:
            del self.queued[row.id]
        return self._fetch(entry)

    def _queue(self, row: Row) -> None:
        if row.id in self.queued:
            return
        if self.socket is None:
            self._connect()
        workflow = json.loads(json.dumps(self.workflow))
        for target, value in row.settings.items():
            node, _, name = target.partition(".")
            workflow[node]["inputs"][name] = value
        answer = self._post("/prompt", {"prompt": workflow, "client_id": self.client})
        if "prompt_id" not in answer:
            raise ValueError(f"ComfyUI refuses the prompt: {refusal(answer)}")
        self.queued[row.id] = answer["prompt_id"]

    def _wait(self, row: Row) -> dict[str, Any]:
        """The history's entry of the row's prompt, when it has ended; ValueError where it failed."""
        prompt = self.queued[row.id]
        while prompt not in (history := self._get(f"/history/{prompt}")):
            while not self._event(row, prompt):
                pass
        entry = history[prompt]
        if entry["status"]["status_str"] != "success":
            told = dict(entry["status"]["messages"])
            error = told.get("execution_error", {})
            what = error.get("exception_message", "interrupted").strip()
            raise ValueError(f"ComfyUI, node {error.get('node_id', '?')} {error.get('node_type', '')}: {what}")
        return entry

    def _event(self, row: Row, prompt: str) -> bool:
        """Take the next message of the websocket; whether the history may have the prompt now."""
        import websocket

        try:
            message = self.socket.recv()
        except websocket.WebSocketTimeoutException:
            return True
        except (websocket.WebSocketException, OSError) as error:
            self.socket = None
            raise ConnectionError(f"ComfyUI at {self.url} closed the connection ({error})") from None
        if isinstance(message, bytes):
            return False  # a preview
        event = json.loads(message)
        data = event.get("data", {})
        if event["type"] == "progress" and data.get("prompt_id") == prompt and self.on_progress:
            self.on_progress(row.id, data["value"], data["max"])
        ended = event["type"] in ("execution_success", "execution_error", "execution_interrupted")
        return ended and data.get("prompt_id") == prompt

    def _fetch(self, entry: Mapping[str, Any]) -> bytes:
        """The one picture of the output node."""
        outputs = {node: found["images"] for node, found in entry["outputs"].items() if found.get("images")}
        images = outputs.get(self.output or next(iter(outputs), ""), [])
        if len(images) != 1:
            raise ValueError(
                f"ComfyUI: expected one picture of node {self.output or 'of the workflow'}, found {len(images)}; "
                "let the workflow make one at a time, and use the column count for more"
            )
        query = urllib.parse.urlencode({name: images[0][name] for name in ("filename", "subfolder", "type")})
        data = self._request(f"/view?{query}")
        if not data.startswith(PNG):
            raise ValueError(f"ComfyUI: expected a PNG, found {images[0]['filename']}; end the workflow in SaveImage")
        return data

    def close(self) -> None:
        """Take what is queued out of the queue, and stop what runs of it."""
        prompts, self.queued, self.coming = list(self.queued.values()), {}, deque()
        with contextlib.suppress(ConnectionError, ValueError):
            if prompts:
                self._post("/queue", {"delete": prompts})
                running = [item[1] for item in self._get("/queue")["queue_running"]]
                for prompt in set(prompts) & set(running):
                    self._post("/interrupt", {"prompt_id": prompt})
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def _connect(self) -> None:
        import websocket

        address = "ws" + self.url.removeprefix("http") + f"/ws?clientId={self.client}"
        try:
            self.socket = websocket.create_connection(address, timeout=EVENT_S)
        except (websocket.WebSocketException, OSError) as error:
            raise ConnectionError(f"ComfyUI at {self.url}: no websocket ({error})") from None

    def _wait_until_back(self) -> None:
        """Wait for the server after a lost connection, whose queue is empty then; ConnectionError if it stays away."""
        self.queued, self.socket = {}, None
        end = time.monotonic() + BACK_S
        while True:
            try:
                self._get("/system_stats")
                return
            except ConnectionError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    def _get(self, path: str) -> dict[str, Any]:
        return json.loads(self._request(path))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return json.loads(self._request(path, json.dumps(body).encode()) or b"{}")

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        """The answer's body, also of a refusal (400); ConnectionError where there is none."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"} if body else {})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_S) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 400:
                return error.read()
            raise ConnectionError(f"{self.url}{path}: {error}; is this ComfyUI?") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ConnectionError(
                f"ComfyUI at {self.url} does not answer ({reason}); start it or mend the URL"
            ) from None


def read_workflow(path: Path) -> dict[str, Any]:
    """A workflow in API form; ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a workflow as JSON ({error})") from None
    nodes = found.values() if isinstance(found, dict) else [None]
    kinds = {"class_type": str, "inputs": dict}
    if not all(isinstance(node, dict) and all(isinstance(node.get(n), t) for n, t in kinds.items()) for node in nodes):
        raise ValueError(f"{path}: expected a workflow in API form; export it in ComfyUI with File > Export (API)")
    return found


def refusal(answer: Mapping[str, Any]) -> str:
    """Why a prompt was refused, in one line."""
    found = [answer.get("error", {}).get("message", "no reason given")]
    for node, errors in (answer.get("node_errors") or {}).items():
        found += [f"node {node}: {error['message']} ({error['details']})" for error in errors["errors"]]
    return "; ".join(found)
