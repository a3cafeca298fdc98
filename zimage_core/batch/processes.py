"""Workers in processes of their own, one for each GPU, which take rows from one queue.

A process that dies is started again. The rows that it was at when it died are tried once more, each by itself, and
fail if they meet the same end; its other rows go back into the queue. Parent and child speak JSON, a line a message;
no lock is shared, so a kill at any moment stops nobody else.

    parent -> child   {options, exact, sink, journal}, {tasks: [...]} when the child is idle, {flush}; any time {stop}
    child -> parent   {facts, device, plan} or {refused}, then {begin: [ids]}, {result}, {idle}, {flushed}
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from .sink import Record, Sink
from .work import CHUNK, Result, Task, Worker, failure, journal_name, pinned

ATTEMPTS = 2
BARREN = 3  # processes in a row that died before they did anything
STOP_S = 60.0
MODULE = "zimage_core.batch.processes"
Event = tuple["Child", "dict[str, Any] | None"]


class Child:
    """A worker process and the rows that it has; begun: those that it was at last; loading: it knows what to load."""

    def __init__(self, device: str | None, events: queue.SimpleQueue[Event]):
        self.device = device
        self.tasks: dict[str, Task] = {}
        self.begun: list[str] = []
        self.loading = self.idle = False
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        # Beside a GPU torch's threads have little to do, and wait for one another where PNG files take their cores.
        given = {} if device == "cpu" else {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**given, **os.environ, "PYTHONPATH": path},
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.SimpleQueue[Event]) -> None:
        for line in cast("IO[bytes]", self.process.stdout):
            if line.endswith(b"\n"):
                events.put((self, json.loads(line)))
        self.process.wait()
        events.put((self, None))

    def send(self, message: Mapping[str, object]) -> None:
        """Send a message. One that does not reach it is no loss: its end comes as an event."""
        with contextlib.suppress(OSError):
            stdin = cast("IO[bytes]", self.process.stdin)
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()

    def begin(self, spec: Mapping[str, Any]) -> None:
        """Have it load its pipeline."""
        self.loading = True
        self.send({**spec, "options": {**spec["options"], "device": self.device}, "journal": journal_name()})

    def give(self, tasks: Sequence[Task]) -> None:
        self.idle = False
        self.tasks |= {task.row.id: task for task in tasks}
        self.send({"tasks": [task.to_json() for task in tasks]})


class Processes:
    """Workers on devices ("cuda:0", "cpu" ...), each with a pipeline of `options`."""

    def __init__(self, options: Mapping[str, Any], devices: Sequence[str | None], exact: bool, sink: Sink):
        if sink.url is None:
            raise ValueError("several processes need a folder or URL to write to, not a file system object")
        plain = {k: v if isinstance(v, str | int | float | None) else words(v) for k, v in options.items()}
        self.spec: dict[str, Any] = {"options": plain, "exact": exact, "sink": sink.url}
        self.sink = sink
        self.devices = list(devices)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.children: list[Child] = []
        self.attempts: Counter[str] = Counter()
        self.again: deque[list[Task]] = deque()
        self.barren = 0
        self.left = 0
        self.device = self.plan = ""

    def start(self) -> dict[str, object]:
        """Start all processes, and have the first load its pipeline; returns its facts for the rows' keys.

        They bind the others, which load theirs with the work.

        ValueError with what it refuses, RuntimeError where processes cannot live.
        """
        self.sink.begin(journal_name())
        self.children = [Child(device, self.events) for device in self.devices]
        self.children[0].begin(self.spec)
        while True:
            child, event = self.events.get()
            if event is None:
                for _ in self._bury(child):
                    pass
            elif "facts" in event:
                child.idle = True
                self.device, self.plan = event["device"], f"{len(self.devices)} processes: {event['plan']}"
                self.spec["options"] |= pinned(event["facts"])
                return event["facts"]
            elif "refused" in event:
                raise ValueError(event["refused"])

    def results(self, tasks: Iterator[Task], total: int) -> Iterator[Result]:
        """Do the tasks, `total` of them; results in the order in which they come. Errors as in `start`."""
        self.left = total
        for child in self.children:
            if not child.loading:
                child.begin(self.spec)
        while True:
            for child in self.children:
                if child.idle and (chunk := self._chunk(tasks)):
                    child.give(chunk)
            if self.left <= 0 and not self.again and not any(child.tasks for child in self.children):
                break
            yield from self._heed(*self.events.get())
        self._flush()

    def _flush(self) -> None:
        """Have all journals written, so that the results so far outlive everybody."""
        for child in self.children:
            child.send({"flush": True})
        waiting = set(self.children)
        while waiting:
            child, event = self.events.get()
            if event is None or "flushed" in event:
                waiting.discard(child)
            if event is None or "flushed" not in event:
                for _ in self._heed(child, event):
                    pass
        self.sink.flush()

    def _chunk(self, tasks: Iterator[Task]) -> list[Task]:
        """The next rows for a process: fewer towards the end, so that all processes end together."""
        if self.again:
            return self.again.popleft()
        workers = len(self.devices)
        size = self.left if workers == 1 else self.left // (3 * workers)
        chunk = list(islice(tasks, max(1, min(CHUNK, size)))) if self.left > 0 else []
        self.left = self.left - len(chunk) if chunk else 0
        return chunk

    def _heed(self, child: Child, event: dict[str, Any] | None) -> Iterator[Result]:
        """Take in what a child told; None is its end."""
        if event is None:
            yield from self._bury(child)
        elif "refused" in event:
            raise ValueError(event["refused"])
        elif "begin" in event:
            child.begun = event["begin"]
        elif "result" in event:
            self.barren = 0
            found = Result(**event["result"])
            if child.tasks.pop(found.id, None):
                yield found
        else:  # ready, or done with its chunk
            child.idle = True

    def _bury(self, child: Child) -> Iterator[Result]:
        """Start another process in a dead one's place; its rows go back into the queue."""
        code = child.process.returncode
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        blamed = [child.tasks.pop(name) for name in child.begun if name in child.tasks]
        self.barren += 1
        if self.barren > BARREN + len(self.devices):
            raise RuntimeError(f"worker processes on {child.device or 'the GPU'} end before they do anything ({end})")
        if child.tasks:
            self.again.append(list(child.tasks.values()))
        for task in blamed:
            self.attempts[task.row.id] += 1
            if self.attempts[task.row.id] < ATTEMPTS:
                self.again.append([task])
            else:
                found = failure(task, f"the process that generated it ended {ATTEMPTS} times ({end})")
                self.sink.record(found.record)
                self.barren = 0
                yield found
        self.children.remove(child)
        self.children.append(Child(child.device, self.events))
        if child.loading:
            self.children[-1].begin(self.spec)

    def close(self) -> None:
        """Let all processes end after their batches, and write the journal."""
        for child in self.children:
            child.send({"stop": True})
        for child in self.children:
            try:
                child.process.wait(STOP_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                child.process.kill()
                child.process.wait()
        self.children = []
        self.sink.close()


def words(value: object) -> str:
    """A path or a torch dtype as text that `load_pipeline` takes."""
    return str(value).removeprefix("torch.")


# ---- inside a child -------------------------------------------------------------------------------------------


def main() -> int:
    """A worker that speaks with its parent through stdin and stdout; exit code 2 where it refuses."""
    from .pictures import PictureGenerator

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and says stop
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no message
    lock = threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        with lock:
            pipe.write(json.dumps(event) + "\n")
            pipe.flush()

    messages: queue.SimpleQueue[Record] = queue.SimpleQueue()
    stopped = threading.Event()

    def listen() -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "stop" in message:
                stopped.set()
            messages.put(message)
        if not stopped.is_set():
            os._exit(1)  # the parent is gone

    threading.Thread(target=listen, daemon=True).start()
    spec = messages.get()
    if "stop" in spec:
        return 0
    try:
        generator = PictureGenerator(spec["options"], spec["exact"])
        facts = generator.facts()
        worker = Worker(generator, Sink(spec["sink"]), spec["journal"], tell)
    except (ValueError, OSError) as error:
        tell({"refused": " ".join(str(error).split())})
        return 2
    tell({"facts": facts, "device": generator.made_with()["device"], "plan": generator.plan()})
    try:
        while "stop" not in (message := messages.get()):
            if "flush" in message:
                worker.sink.flush()
                tell({"flushed": True})
                continue
            for _ in worker.run([Task.from_json(task) for task in message["tasks"]]):
                if stopped.is_set():
                    break
            tell({"idle": True})
        worker.close()
    except ValueError as error:  # a sink that nothing can be written to
        tell({"refused": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    os._exit(main())  # without waiting for the thread that reads stdin
