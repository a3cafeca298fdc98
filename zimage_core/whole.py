"""Writing files so that a name never holds half a file: temporary names, syncs to the disk, and locks."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from platform import node
from typing import BinaryIO

from filelock import FileLock, Timeout

LONGEST_NAME = 200  # bytes, of the 255 that file systems take, as a suffix and `beside` add some
DEVICES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    "CONIN$",
    "CONOUT$",
    *(f"{port}{i}" for port in ("COM", "LPT") for i in range(10)),
}


def beside(path: Path, ending: str) -> Path:
    """A hidden name in the folder of a file, which only this program uses."""
    return path.with_name(f".{path.name}.zimage-{ending}")


def lock(path: Path) -> FileLock:
    """Take the lock for writing a path, which holds between processes and within this one; its empty file stays.

    ValueError if another run holds it. A network file system that has no locks is written without one.
    """
    name = beside(path, "lock")
    refuse_link(name)
    held = FileLock(name, timeout=0)
    try:
        held.acquire()
    except NotImplementedError:
        pass
    except Timeout:
        raise ValueError(f"{path}: another run is writing it; wait until it is done, or choose another name") from None
    return held


def refuse_link(path: Path) -> None:
    """ValueError for a link: this program makes none, so it is someone else's."""
    if path.is_symlink():
        raise ValueError(f"{path}: expected a name that is free or this program's own, found a link; move it away")


def create(path: Path) -> BinaryIO:
    """Create a file and open it to write and read. FileExistsError if the name is taken, by a link too."""
    return path.open("x+b")


def reopen(path: Path) -> BinaryIO:
    """Open an existing file to write and read. OSError for a link."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags), "r+b")


def sync(file: BinaryIO) -> None:
    """Flush what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk. Windows has no such call, and nothing is done there."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def place(part: Path, path: Path) -> None:
    """Rename a closed, flushed file to its final name, and flush the name, too."""
    sync_folder(path.parent)
    os.replace(part, path)
    sync_folder(path.parent)


def check_target(path: Path) -> None:
    """ValueError unless a file can be written there: the folder is there, the name free or a file's, rights suffice."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder; make it first, or choose another folder")
    try:
        if path.exists() and not path.is_file():
            found = "a folder; name a file in it" if path.is_dir() else "a device; choose another name"
            raise ValueError(f"{path}: expected a file to write, found {found}")
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _refused(path, error) from None
    part = _part(path)
    _clean_up(path)
    try:
        create(part).close()
        part.unlink()
    except OSError as error:
        raise _refused(path, error) from None


def write(path: Path, data: bytes) -> None:
    """Write a whole file. ValueError, which names it, where it cannot be written."""
    part = _part(path)
    _clean_up(path)
    try:
        try:
            with create(part) as file:
                file.write(data)
                sync(file)
            place(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _refused(path, error) from error


def check_name(name: str) -> None:
    """ValueError unless a text is a file's name on Linux, Windows and macOS, without folders."""
    stem = name.partition(".")[0].strip().upper()
    wrong = (
        "a folder" if {"/", "\\"} & set(name) else
        "a character that Windows does not allow" if set(name) & set('<>:"|?*') or not name.isprintable() else
        "a name that Windows keeps for a device" if stem in DEVICES else
        "a point or a space at an end" if name.strip(" .") != name else
        "a dash at the start" if name.startswith("-") else
        f"{len(name.encode(errors='replace'))} bytes" if len(name.encode(errors="replace")) > LONGEST_NAME else ""
    )  # fmt: skip
    if wrong:
        raise ValueError(f"{name!r}: expected a plain file name of up to {LONGEST_NAME} bytes, found {wrong}")


def _refused(path: Path, error: OSError) -> ValueError:
    words = (error.strerror or str(error)).lower()
    return ValueError(f"{path}: cannot be written ({words}); free space or rights there, or choose another place")


def _part(path: Path, process: str = "") -> Path:
    """The temporary name that a process of this machine writes a file under; short, whatever the file's name is."""
    file, machine = (f"{zlib.crc32(text.encode(errors='replace')):08x}" for text in (path.name, node()))
    return path.with_name(f".{file}.{machine}.{process or os.getpid()}.zimage-part")


def _clean_up(path: Path) -> None:
    """Remove the temporary files that killed processes of this machine left beside a path."""
    for part in path.parent.glob(_part(path, "*").name):
        process = part.name.split(".")[3]
        if process.isdecimal() and not _runs(int(process)):
            try:
                part.unlink()
            except OSError:  # of another user, or on Windows still open
                continue


def _runs(process: int) -> bool:
    """Whether a process is running. On Windows only our own is known, but an open file cannot be removed there."""
    if sys.platform == "win32":
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
