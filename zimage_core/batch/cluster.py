"""Workers on a Ray cluster: the rows are read, checked and handed out by Ray Data and never all in one process.

An actor of the pool holds one GPU and one worker process (`processes`), so a row that kills its process is tried
again and recorded as on one machine. Where a node is lost, Ray gives its rows to others, and what they generate is the
same. The driver holds only digests of the rows. The arithmetic is settled once, by a worker, and binds all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .columns import Cells, Columns, PictureColumns
from .processes import Processes
from .rows import Row, check, digest, expand, parse_json
from .sink import Sink
from .work import Result, Task, pinned

BATCH = 32  # rows that an actor gets at a time; fewer where there are few
SHARES = 4  # of the rows for each actor, so that all end together

Arrays = dict[str, np.ndarray]


def connect(address: str) -> Any:
    """Ray, connected; "local" starts it on this machine. ValueError where there is no cluster or no Ray."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f'--ray needs Ray ({error}); install it: pip install "zimage-int4[ray]"') from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Ray at {address!r}: {error}; start a cluster with `ray start --head`, or take --ray local"
            ) from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


@dataclass(frozen=True)
class Reader:
    """Turns blocks of cells into tasks, wherever Ray likes; keys, ids: Ray's references to the sorted digests of what
    is there (`sink.Done`)."""

    columns: Columns
    defaults: Cells
    facts: Mapping[str, object]
    keys: Any
    ids: Any

    def summary(self, block: Arrays) -> Arrays:
        """For each picture the digest of its id and whether it is missing; for rows that cannot be used why."""
        keys = self._known(self.keys)
        digests: list[int] = []
        missing: list[bool] = []
        complaints: list[str] = []
        for cells in split(block):
            try:
                rows = self._rows(cells)
            except ValueError as error:
                rows = []
                digests.append(0)
                missing.append(False)
                complaints.append(f"row {str(next(iter(cells.values())))[:60]}: {error}")
            for row in rows:
                digests.append(digest(row.id.casefold()))
                missing.append(not among(keys, digest(row.id, row.key(self.facts))))
                complaints.append("")
        arrays = (np.array(digests, np.uint64), np.array(missing, bool), np.array(complaints, object))
        return dict(zip(("digest", "missing", "complaint"), arrays))

    def tasks(self, block: Arrays) -> Arrays:
        """The tasks of what is missing, as JSON."""
        keys, ids = self._known(self.keys), self._known(self.ids)
        found = []
        for cells in split(block):
            for row in self._rows(cells):
                key = row.key(self.facts)
                if not among(keys, digest(row.id, key)):
                    found.append(json.dumps(Task(row, key, among(ids, digest(row.id))).to_json()))
        return {"task": np.array(found, object)}

    def _rows(self, cells: dict[str, Any]) -> list[Row]:
        given: Cells = parse_json(cells["text"], "") if "text" in cells else cells
        given = {name: value for name, value in given.items() if value is not None and value == value}
        if "id" not in given:
            raise ValueError("id: rows that Ray reads have no numbers; give each an id")
        return expand(given, self.columns, self.defaults, "")

    @staticmethod
    def _known(reference: Any) -> np.ndarray:
        import ray

        return ray.get(reference)


def split(block: Arrays) -> Iterator[dict[str, Any]]:
    """The rows of a block of columns."""
    return (dict(zip(block, cells)) for cells in zip(*block.values()))


def among(values: np.ndarray, value: int) -> bool:
    """Whether a sorted array holds a value."""
    place = int(np.searchsorted(values, np.uint64(value)))
    return place < len(values) and int(values[place]) == value


class Actor:
    """One GPU's worker: tasks in, results out, both as JSON."""

    def __init__(self, options: Mapping[str, Any], device: str, exact: bool, sink: str):
        self.processes = Processes(options, [device], exact, Sink(sink))
        self.processes.start()

    def __call__(self, block: Arrays) -> Arrays:
        tasks = [Task.from_json(json.loads(text)) for text in block["task"]]
        results = self.processes.results(iter(tasks), len(tasks))
        return {"result": np.array([json.dumps(asdict(result)) for result in results], object)}


class ClusterRun:
    """A run on a cluster, with the attributes of `driver.Run`. workers: least and most actors."""

    def __init__(
        self,
        rows: str | Path | Iterable[Cells],
        sink: Sink,
        columns: Columns,
        defaults: Cells,
        address: str,
        workers: tuple[int, int] | None,
        exact: bool,
        options: Mapping[str, Any],
    ):
        if sink.url is None:
            raise ValueError("a cluster needs a shared folder or a URL to write to, not a file system object")
        self.ray = connect(address)
        self.sink = sink
        self.exact = exact
        self.failed = 0
        gpus = int(self.ray.cluster_resources().get("GPU", 0))
        self.on_gpu = bool(gpus) and not str(options.get("device") or "cuda").startswith("cpu")
        self.device = "cuda" if self.on_gpu else "cpu"
        most = gpus if self.on_gpu else int(self.ray.cluster_resources().get("CPU", 1))
        self.workers = workers or (1, max(1, most))
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(sink.store.lock())
        try:
            sink.check()
            sink.merge()
            self._begin(read(self.ray, rows), columns, defaults, options)
        except BaseException:
            self._stack.close()
            raise

    def _begin(self, cells: Any, columns: Columns, defaults: Cells, options: Mapping[str, Any]) -> None:
        earlier = next(self.sink.records(), {})
        options = {**options, **{k: v for k, v in pinned(earlier).items() if options.get(k) in (None, "auto")}}
        resources = {"num_gpus": 1} if self.on_gpu else {"num_cpus": 1}
        settle = self.ray.remote(**resources)(settle_arithmetic)
        try:
            facts, plan = self.ray.get(settle.remote(options, self.device, self.exact, self.sink.url))
        except self.ray.exceptions.RayTaskError as error:
            raise ValueError(str(error.cause) if isinstance(error.cause, ValueError) else str(error)) from None
        self.options = {**options, **pinned(facts)}
        done = self.sink.done(self.exact)
        known = [self.ray.put(np.array(sorted(values), np.uint64)) for values in (done.keys, done.ids)]
        given = {name: value for name, value in defaults.items() if value is not None}
        reader = Reader(columns, given, facts, *known)
        self._tasks = cells.map_batches(reader.tasks, batch_format="numpy")
        self.missing = 0
        self.rows = check(self._count(cells.map_batches(reader.summary, batch_format="numpy")))
        self.note = f"up to {self.workers[1]} workers on Ray: {plan}"

    def _count(self, summaries: Any) -> Iterator[tuple[int, list[int], str]]:
        number = 0
        for block in summaries.iter_batches(batch_format="numpy", batch_size=4096):
            for one, complaint, missing in zip(block["digest"], block["complaint"], block["missing"]):
                number += 1
                self.missing += bool(missing)
                yield number, [] if complaint else [int(one)], str(complaint)

    def __iter__(self) -> Iterator[Result]:
        least, most = self.workers
        size = max(1, min(BATCH, self.missing // (SHARES * most)))
        with self._stack:
            self._stack.callback(self.sink.merge)
            if not self.missing:
                return
            results = self._tasks.repartition(target_num_rows_per_block=size).map_batches(
                Actor,
                fn_constructor_args=(self.options, self.device, self.exact, self.sink.url),
                batch_format="numpy",
                batch_size=size,
                compute=self.ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
                # On CPUs they hold none, as those who read the rows would wait for one for ever.
                **({"num_gpus": 1} if self.on_gpu else {"num_cpus": 0}),
            )
            for block in results.iter_batches(batch_format="numpy", batch_size=None, prefetch_batches=0):
                for text in block["result"]:
                    result = Result(**json.loads(text))
                    self.failed += result.error is not None
                    yield result

    def close(self) -> None:
        """End without doing the rest."""
        self._stack.close()


def settle_arithmetic(options: Mapping[str, Any], device: str, exact: bool, sink: str) -> tuple[dict[str, object], str]:
    """The facts that a worker finds for everybody, and how it will work."""
    processes = Processes(options, [device], exact, Sink(sink))
    try:
        return processes.start(), processes.plan
    finally:
        processes.close()


def read(ray: Any, rows: str | Path | Iterable[Cells]) -> Any:
    """A Ray dataset of cells, or of one column `text` with JSON, from a file or URL that all see."""
    if not isinstance(rows, str | Path):
        return ray.data.from_items([{"text": json.dumps(dict(cells))} for cells in rows])
    name = str(rows)
    suffix = re.sub(r".*\.", ".", name.lower())
    if suffix not in (".jsonl", ".ndjson", ".csv"):
        raise ValueError(f"{name}: Ray reads .jsonl and .csv, whose rows have ids; not standard input or plain text")
    if "://" not in name:
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file")
        name = str(Path(name).absolute())
    if suffix != ".csv":
        return ray.data.read_text(name, drop_empty_lines=True)
    import pyarrow as pa
    from pyarrow.csv import ConvertOptions

    texts = dict.fromkeys([*PictureColumns.names, "id", "count"], pa.string())
    return ray.data.read_csv(name, convert_options=ConvertOptions(column_types=texts, strings_can_be_null=True))
