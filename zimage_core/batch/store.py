"""Named bytes in a folder or in any file system that fsspec or pyarrow knows (s3://, gs://, sftp:// ...).

A write is whole under its name or not there at all. Journals take lines one by one; each belongs to one process.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..whole import place

LOCK, PART = ".lock", ".part"
BLOCK = 2**22
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "memory"}  # write all or nothing
LINES, SECONDS = 32, 30.0  # of a journal in an object store: after so many, or so long, it is written


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
                place(part, path)
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


# ---- which one --------------------------------------------------------------------------------------------------


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
    remedy = ""
    if scheme in ("s3", "gs", "gcs", "hdfs", "abfs", "abfss"):
        remedy = '; or pip install "zimage-int4[arrow]", which has it, too'
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
        raise ValueError(f"{scheme}:// address: {error}{remedy if isinstance(error, ImportError) else ''}") from None
