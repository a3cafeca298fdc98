"""Where results go, in a `store`:

    ID.png            the pictures; what is under such a name is whole
    manifest.jsonl    one line for each picture that is there, settings, seed and hash with it
    failed.jsonl      one line for each row that failed in the last run
    journal/          what runs have written since the manifest was; it becomes part of it at the next start or end

A picture is written first, its line afterwards, so a line always has its picture. Before a picture is replaced, as its
row was edited, a line without a file takes back the old one. Journals are only ever added to, each by one process.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .rows import Row, digest
from .store import Journal, open_store

MANIFEST, FAILED, JOURNAL = "manifest.jsonl", "failed.jsonl", "journal/"

Record = dict[str, Any]


@dataclass
class Done:
    """What a sink holds: digests of (id, key) of whole results and of all ids; made_with: fields of its last record."""

    keys: set[int] = field(default_factory=set)
    ids: set[int] = field(default_factory=set)
    made_with: Record = field(default_factory=dict)

    def has(self, name: str, key: str) -> bool:
        return digest(name, key) in self.keys

    def stale(self, name: str) -> bool:
        """Whether there is a result of that name, which a new one would replace."""
        return digest(name) in self.ids


class Sink:
    """Pictures and their records. where: a folder or URL; filesystem: an fsspec or pyarrow one that `where` is in."""

    def __init__(self, where: str | Path, filesystem: Any = None):
        self.url = str(where) if filesystem is None else None
        self.store = open_store(str(where), filesystem)
        self._lock = threading.Lock()
        self._journal: Journal | None = None

    @property
    def where(self) -> str:
        return self.store.where

    def begin(self, journal: str) -> None:
        """Begin a journal under a name that no other process uses; SinkError where nothing can be written."""
        self._journal = self.store.journal(f"{JOURNAL}{journal}.jsonl")

    def check(self) -> None:
        """SinkError where nothing can be written."""
        probe = f"{JOURNAL}{uuid.uuid4().hex}.jsonl"
        self.store.write(probe, b"")
        self.store.remove(probe)

    def write(self, name: str, data: bytes) -> None:
        """Put a picture under its name."""
        self.store.write(name, data)

    def record(self, record: Mapping[str, object]) -> None:
        """Add a line to the journal: with `file` a result, with `error` a failure, else the end of an older result."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if self._journal is None:
                raise RuntimeError("no journal has been begun")
            self._journal.write(line)

    def take_back(self, row: Row) -> None:
        """End the older result of a row: first its line, then its picture."""
        self.record({"id": row.id})
        self.store.remove(row.file)

    def flush(self) -> None:
        """Write what the journal still holds."""
        with self._lock:
            if self._journal is not None:
                self._journal.flush()

    def close(self) -> None:
        """End the journal."""
        with self._lock:
            if self._journal is not None:
                self._journal.close()
                self._journal = None

    def merge(self) -> None:
        """Make the journals part of the manifest and list the failures; killed at any moment, it can be done again.

        Of an id's lines in journals a result counts most and a taken-back one least; the manifest's own line counts
        only where no journal has the id.
        """
        journals = sorted(name for name, _ in self.store.files(JOURNAL))
        if not journals:
            return
        best: dict[int, tuple[int, int]] = {}  # digest of id -> rank, place
        for place, record in self._journaled(journals):
            rank = 2 if "file" in record else 1 if "error" in record else 0
            one = digest(record["id"])
            best[one] = max(best.get(one, (-1, -1)), (rank, place))

        def chosen(rank: int) -> Iterator[bytes]:
            if rank == 2:
                for line, record in parse(self.store.read_lines(MANIFEST)):
                    if digest(record["id"]) not in best:
                        yield line
            for place, record in self._journaled(journals):
                if best.get(digest(record["id"])) == (rank, place):
                    yield json.dumps(record, ensure_ascii=False).encode() + b"\n"

        self.store.write_lines(MANIFEST, chosen(2))
        if failures := list(chosen(1)):
            self.store.write_lines(FAILED, failures)
        else:
            self.store.remove(FAILED)
        for name in journals:
            self.store.remove(name)

    def _journaled(self, journals: list[str]) -> Iterator[tuple[int, Record]]:
        place = 0
        for name in journals:
            for _, record in parse(self.store.read_lines(name)):
                yield place, record
                place += 1

    def done(self, exact: bool = False) -> Done:
        """What is there, by the manifest and the files themselves; exact: only what was generated by itself."""
        there = {digest(name, str(size)) for name, size in self.store.files()}
        found = Done()
        for _, record in parse(self.store.read_lines(MANIFEST)):
            found.ids.add(digest(record["id"]))
            found.made_with = record
            file, size, key = (str(record.get(name)) for name in ("file", "bytes", "key"))
            if digest(file, size) in there and not (exact and record.get("together", 1) != 1):
                found.keys.add(digest(record["id"], key))
        return found

    def records(self) -> Iterator[Record]:
        """The lines of the manifest."""
        return (record for _, record in parse(self.store.read_lines(MANIFEST)))


def parse(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Record]]:
    """Lines and their records; a last line that a kill has cut off is passed over."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("id"), str):
                yield line, record
