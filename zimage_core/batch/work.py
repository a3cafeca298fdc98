"""One worker: takes chunks of rows, generates them batch by batch, and writes results while the next are generated.

A worker is the same in this process, in a process of its own for each GPU, and on a Ray cluster. `Generator` is what
makes its pictures: a pipeline, a ComfyUI server, or a test's stand-in.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .. import metadata
from .rows import Row
from .sink import Record, Sink
from .store import SinkError

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 128  # rows whose prompts are encoded at once
WRITERS = 4  # threads that encode and write pictures
WAITING = 16  # pictures that may wait for them
FAILURES = (ValueError, OSError, RuntimeError)


@dataclass(frozen=True)
class Task:
    """A row to be done; stale: it takes the place of an older result under its id."""

    row: Row
    key: str
    stale: bool = False

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Task:
        return cls(Row(**found["row"]), found["key"], found["stale"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """What became of a row: its record in the manifest, or the error that kept it from being generated."""

    id: str
    record: Record
    error: str | None = None


class Generator(Protocol):
    """What turns rows into pictures."""

    def facts(self) -> dict[str, object]:
        """What every picture depends on beside its row, for the rows' keys."""
        ...

    def made_with(self) -> dict[str, object]:
        """What the manifest's lines say about the models and the machine."""
        ...

    def plan(self) -> str:
        """How pictures are generated, in a few words."""
        ...

    def group(self, row: Row) -> Hashable:
        """Rows of one group may be generated together."""
        ...

    def together(self, row: Row) -> int:
        """How many pictures like this one at a time."""
        ...

    def prepare(self, rows: Sequence[Row]) -> None:
        """Do what is better done for all rows of a chunk at once."""
        ...

    def generate(self, rows: Sequence[Row]) -> Sequence[Image | bytes]:
        """A picture, or the bytes of a PNG, for each row of a group; ValueError, OSError or RuntimeError."""
        ...

    def close(self) -> None:
        """Give up what has been begun."""
        ...


class Worker:
    """Generates and writes. told(event) is called, from any thread, with what happens: `begin` before a batch with
    the ids, `result` for each row that is done or has failed."""

    def __init__(self, generator: Generator, sink: Sink, journal: str, told: Callable[[dict[str, Any]], None]):
        self.generator = generator
        self.sink = sink
        self.told = told
        self.made_with = {**generator.made_with(), "host": platform.node(), "pid": os.getpid()}
        self._writers = ThreadPoolExecutor(WRITERS)
        self._free = threading.BoundedSemaphore(WAITING)
        self._broken: SinkError | None = None
        sink.begin(journal)

    def run(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Do a chunk of rows, with a stop after each batch; results may come later. SinkError where they cannot be
        written."""
        self.told({"begin": [task.row.id for task in tasks]})
        begun = time.perf_counter()
        try:
            self.generator.prepare([task.row for task in tasks])
        except FAILURES as error:
            reraise_if_lost(error)  # else each row will tell
        ready = time.perf_counter()
        share = (ready - begun) / len(tasks)
        for batch in batches(tasks, self.generator):
            self._do(batch, share)
            yield

    def _do(self, batch: Sequence[Task], share: float) -> None:
        """Generate a batch, one by one where it fails as a whole, and hand its pictures to the writers."""
        self.told({"begin": [task.row.id for task in batch]})
        for task in batch:
            if task.stale:
                self.sink.take_back(task.row)
        begun = time.perf_counter()
        try:
            pictures = self.generator.generate([task.row for task in batch])
        except FAILURES as error:
            reraise_if_lost(error)
            if len(batch) > 1:
                for task in batch:
                    self._do([task], share)
            else:
                self._fail(batch[0], error)
            return
        seconds = (time.perf_counter() - begun) / len(batch) + share
        for task, picture in zip(batch, pictures, strict=True):
            facts: dict[str, object] = {"seconds": round(seconds, 4), "together": len(batch)}
            self._free.acquire()
            self._writers.submit(self._write, task, picture, facts).add_done_callback(self._written)
        if self._broken:
            raise self._broken

    def _write(self, task: Task, picture: Image | bytes, facts: dict[str, object]) -> None:
        """Write a picture, then its line."""
        row = task.row
        data = picture if isinstance(picture, bytes) else png(picture, row, self.made_with)
        self.sink.write(row.file, data)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        digest = hashlib.sha256(data).hexdigest()
        record = {"id": row.id, "file": row.file, **row.settings, "sha256": digest, "bytes": len(data), **facts}
        record |= {**self.made_with, "time": now, "key": task.key}
        self.sink.record(record)
        self.told({"result": asdict(Result(row.id, record))})

    def _written(self, future: Future[None]) -> None:
        self._free.release()
        error = future.exception()
        if isinstance(error, SinkError):
            self._broken = error
        elif error is not None:
            self._broken = SinkError(f"{self.sink.where}: a picture could not be written: {error}")

    def _fail(self, task: Task, error: Exception) -> None:
        found = failure(task, " ".join(str(error).split()))
        self.sink.record(found.record)
        self.told({"result": asdict(found)})

    def close(self) -> None:
        """Wait until all is written; SinkError where something could not be."""
        self.generator.close()
        self._writers.shutdown()
        self.sink.close()
        if self._broken:
            raise self._broken


def journal_name() -> str:
    """A name that no other process uses."""
    return f"{int(time.time())}-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def pinned(record: Mapping[str, object]) -> dict[str, object]:
    """The options of `load_pipeline` that compute as a record, or facts, say."""
    if "backend" not in record:
        return {}
    dense = record["backend"] == "dense"
    chosen = {} if dense else {"backend": record["backend"], "precision": record["precision"]}
    return {**chosen, "dtype": record["dtype"], "attention": record.get("attention", "sdpa")}


def reraise_if_lost(error: Exception) -> None:
    """Raise errors after which nothing more can be generated in this process: a broken sink, a lost GPU."""
    lost = isinstance(error, SinkError | ConnectionError) or "CUDA error" in str(error) or "HIP error" in str(error)
    if lost:
        raise error


def failure(task: Task, error: str) -> Result:
    """The result and record of a row that failed."""
    return Result(task.row.id, {"id": task.row.id, "error": error, "key": task.key, **task.row.settings}, error)


def batches(tasks: Sequence[Task], generator: Generator) -> Iterator[list[Task]]:
    """The tasks in groups that can be generated together, of as many as may be at a time."""
    groups: dict[Hashable, list[Task]] = {}
    for task in tasks:
        groups.setdefault(generator.group(task.row), []).append(task)
    for group in groups.values():
        size = generator.together(group[0].row)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def png(picture: Image, row: Row, made_with: Mapping[str, object]) -> bytes:
    """A PNG that holds prompt, seed and settings, as `zimage generate` writes it."""
    kept = {name: value for name, value in made_with.items() if name not in ("host", "pid", "device")}
    return metadata.png(picture, row.settings | kept)
