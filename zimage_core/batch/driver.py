"""A batch from its rows to its results: what is missing is found out, generated and handed back as it is done."""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..files import is_demo_like
from ..sizes import DEMO_SIZE, REAL_SIZE, readable
from .columns import Cells, Columns, PictureColumns
from .rows import Rows
from .sink import Done, Sink
from .work import CHUNK, Generator, Result, Task, Worker, journal_name, pinned

if TYPE_CHECKING:
    from .cluster import ClusterRun

BYTES_A_PIXEL = 1.6  # of a PNG of a photograph

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What does tasks; device and plan say where and how, once it has started."""

    device: str
    plan: str

    def start(self) -> Mapping[str, object]:
        """Get ready; returns the facts for the rows' keys."""
        ...

    def results(self, tasks: Iterator[Task], total: int) -> Iterator[Result]: ...

    def close(self) -> None: ...


class Here:
    """A worker in this process."""

    def __init__(self, generator: Generator, sink: Sink):
        self.generator = generator
        self.sink = sink
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.worker: Worker | None = None
        self.device = str(generator.made_with().get("device", ""))
        self.plan = generator.plan()

    def start(self) -> Mapping[str, object]:
        return self.generator.facts()

    def results(self, tasks: Iterator[Task], total: int) -> Iterator[Result]:
        self.worker = Worker(self.generator, self.sink, journal_name(), self.events.put)
        while chunk := list(islice(tasks, CHUNK)):
            for _ in self.worker.run(chunk):
                yield from self._told()
        self.close()
        yield from self._told()

    def _told(self) -> Iterator[Result]:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self.events.get_nowait()
                if "result" in event:
                    yield Result(**event["result"])

    def close(self) -> None:
        if self.worker is not None:
            worker, self.worker = self.worker, None
            worker.close()


class Run:
    """A run over checked rows, to be iterated once: a `Result` for every row that was missing, as it is done.

    rows: pictures asked for; missing: those that are not there yet; failed: those that could not be generated so far;
    note: how it goes about them, and what to know before.
    """

    def __init__(self, rows: Rows, sink: Sink):
        self.sink = sink
        self._source = rows
        self._stack = contextlib.ExitStack()
        self.done = Done()
        self.missing = self.failed = 0
        self.note = ""
        self.rows = rows.check()
        self._stack.enter_context(sink.store.lock())
        try:
            sink.check()
            sink.merge()
        except BaseException:
            self._stack.close()
            raise

    def begin(self, engine: Engine, exact: bool) -> None:
        """Start the engine, and find out which rows are missing."""
        self.engine = engine
        self._stack.callback(self._end)
        try:
            self.facts = engine.start()
            self.done = self.sink.done(exact)
            self.missing = pixels = 0
            for task in self._tasks():
                self.missing += 1
                pixels += task.row.settings.get("width", 0) * task.row.settings.get("height", 0)
            self.note = self._note(BYTES_A_PIXEL * pixels)
        except BaseException:
            self._stack.close()
            raise

    def _note(self, needed: float) -> str:
        """The engine's plan, and what the user should know before it begins."""
        notes = [self.engine.plan]
        earlier = self.done.made_with.get("device")
        if earlier and self.missing and self.engine.device != earlier:
            notes.append(f"what is there comes from {earlier}, whose rounding may differ")
        free = self.sink.store.free()
        if free is not None and free < needed:
            notes.append(f"up to {readable(int(needed))} of pictures may come, {readable(free)} are free there")
        return "; ".join(notes)

    def _tasks(self) -> Iterator[Task]:
        for row in self._source:
            key = row.key(self.facts)
            if not self.done.has(row.id, key):
                yield Task(row, key, self.done.stale(row.id))

    def __iter__(self) -> Iterator[Result]:
        with self._stack:
            for result in self.engine.results(self._tasks(), self.missing) if self.missing else ():
                self.failed += result.error is not None
                yield result

    def close(self) -> None:
        """End without doing the rest."""
        self._stack.close()

    def _end(self) -> None:
        try:
            self.engine.close()
        finally:
            self.sink.merge()


def run(
    rows: str | Path | Iterable[Cells],
    sink: str | Path | Sink,
    *,
    defaults: Cells | None = None,
    exact: bool = False,
    devices: Sequence[str] | None = None,
    generator: Generator | None = None,
    columns: Columns | None = None,
    ray: str | None = None,
    workers: tuple[int, int] | None = None,
    **options: Any,
) -> Run | ClusterRun:
    """Generate what is missing of the rows; an iterator of results with counts (`Run`).

    rows: a .jsonl, .csv or .txt file, "-" for standard input, or mappings, with the columns of `PictureColumns`, `id`
    and `count`. sink: a folder, a URL, or a `Sink`. defaults: cells for rows that lack them. exact: every picture by
    itself. devices: a worker process on each; left out, one pipeline in this process. options: those of
    `load_pipeline`. generator, columns: another engine's. ray: the address of a cluster, "auto" or "local"; workers:
    the least and the most workers there, by default as many as it has GPUs.
    All input is checked before this returns: ValueError for rows, files, devices and places that cannot be used.
    """
    sink = sink if isinstance(sink, Sink) else Sink(sink)
    if columns is None:
        folder = Path(rows).parent if isinstance(rows, str | Path) and str(rows) != "-" else Path()
        columns = PictureColumns(folder, DEMO_SIZE if is_demo_like(options.get("model")) else REAL_SIZE)
    if ray is not None:
        from .cluster import ClusterRun

        return ClusterRun(rows, sink, columns, defaults or {}, ray, workers, exact, options)
    started = Run(Rows(rows, columns, defaults), sink)
    try:
        engine = choose_engine(generator, devices, exact, sink, options)
    except BaseException:
        started.close()
        raise
    started.begin(engine, exact)
    return started


def choose_engine(
    generator: Generator | None, devices: Sequence[str] | None, exact: bool, sink: Sink, options: Mapping[str, Any]
) -> Engine:
    """The engine, which computes as the sink's pictures were computed where the options leave that open."""
    if generator is not None:
        return Here(generator, sink)
    earlier = next(sink.records(), {})
    options = {**options, **{k: v for k, v in pinned(earlier).items() if options.get(k) in (None, "auto")}}
    if devices is not None:
        from .processes import Processes

        return Processes(options, devices, exact, sink)
    from .pictures import PictureGenerator

    return Here(PictureGenerator(options, exact), sink)
