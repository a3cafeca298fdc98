"""Where results go: a folder, or a prefix of any file system that fsspec or pyarrow knows (s3://, gs://, sftp:// ...).

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
import os
import posixpath
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .rows import Row, digest

MANIFEST, FAILED, JOURNAL, LOCK = "manifest.jsonl", "failed.jsonl", "journal/", ".lock"
PART = ".part"
BLOCK = 2**22
OBJECT_STORES = {
    "s3",
    "s3a",
    "gs",
    "gcs",
    "abfs",
    "abfss",
    "az",
    "adl",
    "oci",
    "memory",
}  # a write is whole or not there
LINES, SECONDS = 32, 30.0  # of a journal in an object store: after so many, or so long, it is written

Record = dict[str, Any]


class SinkError(ValueError):
    """The results cannot be kept: no space, no permission, no such bucket."""


class Store(Protocol):
    """Named bytes. A write is whole under its name or not there at all."""

    where: str

    def write(self, name: str, data: bytes) -> None: ...

    def write_lines(self, name: str, lines: Iterable[bytes]) -> None: ...

    def read_lines(self, name: str) -> Iterator[bytes]:
        """The lines of a file, none where it is not there."""
        ...

    def files(self, under: str = "") -> Iterator[tuple[str, int]]:
        """Names and sizes."""
        ...

    def remove(self, name: str) -> None: ...

    def journal(self, name: str) -> Journal: ...

    def free(self) -> int | None:
        """Bytes that are free there, None where that is not known."""
        ...

    def lock(self) -> contextlib.AbstractContextManager[object]:
        """Held by the one run that works here; ValueError where another does."""
        ...


class Journal(Protocol):
    """Lines that outlive the process as soon as they are written (in object stores a little later)."""

    def write(self, line: bytes) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def complaints(where: str) -> Iterator[None]:
    """OSErrors inside as a SinkError that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        words = (error.strerror or str(error).strip().splitlines()[0]).lower()
        raise SinkError(
            f"{where}: {words}; results cannot be written there. Mend it and run the same command again: it goes on"
        ) from None


# ---- a local folder -------------------------------------------------------------------------------------------


class Folder:
    """A folder of this machine, or one that is mounted here."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.where = str(folder)

    def write(self, name: str, data: bytes) -> None:
        self.write_lines(name, [data])

    def write_lines(self, name: str, lines: Iterable[bytes]) -> None:
        path = self.folder / name
        with complaints(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.parent / f".{uuid.uuid4().hex}{PART}"
            try:
                with part.open("xb") as file:
                    file.writelines(lines)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def read_lines(self, name: str) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError), (self.folder / name).open("rb") as file:
            yield from file

    def files(self, under: str = "") -> Iterator[tuple[str, int]]:
        for folder, _, names in os.walk(self.folder / under):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield path.relative_to(self.folder).as_posix(), path.stat().st_size

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def journal(self, name: str) -> Journal:
        return LocalJournal(self.folder / name)

    def free(self) -> int | None:
        return shutil.disk_usage(self.folder).free

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        with complaints(self.where):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                for name, _ in self.files():
                    if name.endswith(PART):  # of a run that was killed
                        self.remove(name)
                yield
        except Timeout:
            raise ValueError(
                f"{self.where}: another run is working there; wait for it or take another folder"
            ) from None


class LocalJournal:
    """A file that each line is added to at once. One that was cut off by a kill ends the file, as nobody goes on."""

    def __init__(self, path: Path):
        self.path = path
        with complaints(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("xb", buffering=0)

    def write(self, line: bytes) -> None:
        with complaints(str(self.path)):
            if self.file.write(line) != len(line):
                raise OSError("no space left on device")

    def flush(self) -> None:
        """Nothing: every line is written at once."""

    def close(self) -> None:
        self.file.close()


# ---- any other file system ------------------------------------------------------------------------------------


class Remote:
    """A prefix of an fsspec file system."""

    def __init__(self, filesystem: Any, prefix: str, where: str):
        self.fs = filesystem
        self.prefix = prefix.rstrip("/")
        self.where = where
        protocol = filesystem.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self.whole = bool(names & OBJECT_STORES) or getattr(filesystem, "type_name", "") in OBJECT_STORES

    def path(self, name: str) -> str:
        return posixpath.join(self.prefix, name)

    def write(self, name: str, data: bytes) -> None:
        self._place(name, lambda target: self.fs.pipe_file(target, data))

    def write_lines(self, name: str, lines: Iterable[bytes]) -> None:
        with tempfile.TemporaryDirectory() as scratch:  # they may be too many for memory, and reading them may fail
            path = Path(scratch, "lines")
            with path.open("wb") as file:
                file.writelines(lines)
            self._place(name, lambda target: self.fs.put_file(str(path), target))

    def _place(self, name: str, send: Callable[[str], object]) -> None:
        """Have `send` write a file so that it is whole when its name is there."""
        target = self.path(name)
        with complaints(f"{self.where}/{name}"):
            if self.whole:
                send(target)
                return
            folder = posixpath.dirname(target)
            part = posixpath.join(folder, f".{uuid.uuid4().hex}{PART}")
            self.fs.makedirs(folder, exist_ok=True)
            send(part)
            self.fs.mv(part, target)

    def read_lines(self, name: str) -> Iterator[bytes]:
        rest = b""
        with contextlib.suppress(FileNotFoundError), self.fs.open(self.path(name), "rb") as file:
            while block := file.read(BLOCK):  # some of pyarrow's files ask the server anew for every line
                *lines, rest = (rest + block).split(b"\n")
                yield from (line + b"\n" for line in lines)
        if rest:
            yield rest

    def files(self, under: str = "") -> Iterator[tuple[str, int]]:
        self.fs.invalidate_cache()
        root = self.path(under).rstrip("/")
        with contextlib.suppress(FileNotFoundError):
            for path, info in self.fs.find(root, detail=True).items():
                name = path.strip("/").removeprefix(self.prefix.strip("/")).lstrip("/")
                if not name.endswith(PART):
                    yield name, info["size"]

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def journal(self, name: str) -> Journal:
        return RemoteJournal(self, name)

    def free(self) -> int | None:
        return None

    def lock(self) -> contextlib.AbstractContextManager[object]:
        """None: object stores have no locks. Two runs at a time do the work twice and spoil nothing."""
        return contextlib.nullcontext()


class RemoteJournal:
    """A file of its own for every few lines, since object stores cannot add to one."""

    def __init__(self, store: Remote, name: str):
        self.store = store
        self.stem = name.removesuffix(".jsonl")
        self.lines: list[bytes] = []
        self.count = 0
        self.begun = time.monotonic()

    def write(self, line: bytes) -> None:
        if not self.lines:
            self.begun = time.monotonic()
        self.lines.append(line)
        if len(self.lines) >= LINES or time.monotonic() - self.begun > SECONDS:
            self.flush()

    def close(self) -> None:
        self.flush()

    def flush(self) -> None:
        if self.lines:
            self.store.write(f"{self.stem}-{self.count:06}.jsonl", b"".join(self.lines))
            self.count += 1
            self.lines = []


# ---- results --------------------------------------------------------------------------------------------------


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
            if digest(record["file"], str(record["bytes"])) in there and not (exact and record.get("together", 1) > 1):
                found.keys.add(digest(record["id"], record["key"]))
        return found

    def records(self) -> Iterator[Record]:
        """The lines of the manifest."""
        return (record for _, record in parse(self.store.read_lines(MANIFEST)))


def parse(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Record]]:
    """Lines and their records; a last line that a kill has cut off is passed over."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("id"), str):
                yield line, record


def open_store(where: str, filesystem: Any = None) -> Store:
    """The store of a folder, a URL, or a path of a given file system; ValueError for one that cannot be reached."""
    scheme, mark, _ = where.partition("://")
    if filesystem is None and (not mark or scheme == "file"):
        return Folder(Path(where.removeprefix("file://")))
    if filesystem is None:
        filesystem, path = from_url(where, scheme)
    else:
        path = where
    if type(filesystem).__module__.partition(".")[0] == "pyarrow":
        from fsspec.implementations.arrow import ArrowFSWrapper

        wrapped = ArrowFSWrapper(filesystem)
        wrapped.type_name = filesystem.type_name
        filesystem = wrapped
    shown = re.sub(r"://[^/@]*@", "://", where.partition("?")[0]).rstrip("/")  # without secrets
    return Remote(filesystem, path, shown)


def from_url(url: str, scheme: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it: pyarrow's own where it has one, else fsspec's."""
    if scheme in ("s3", "gs", "gcs", "hdfs", "abfs", "abfss"):
        with contextlib.suppress(ImportError):
            from pyarrow import ArrowInvalid, fs

            try:
                return fs.FileSystem.from_uri(url)
            except ArrowInvalid as error:
                raise ValueError(f"{scheme}:// address: {error}") from None
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{scheme}:// address: {error}") from None
