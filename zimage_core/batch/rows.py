"""Rows of prompts from JSONL, CSV, text or Python, checked strictly: what a batch is asked for.

A row of a file becomes one `Row` for each picture: `count` 3 gives the ids `ID-1` to `ID-3` with seeds that follow each
other. A row without an id is numbered (`000001`); one without a seed gets a seed that depends on its id alone.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .columns import Cells, Columns, identifier, whole

SEEDS = 2**64
MAX_COUNT = 100_000
SHOWN = 5  # complaints of one message
SAMPLED, SAMPLES, SAMPLE = 2**26, 64, 2**20  # bytes: larger files are hashed at so many places


@dataclass(frozen=True)
class Row:
    """One picture to make: the name of its file without .png, and all that it depends on in the input."""

    id: str
    settings: dict[str, Any]

    @property
    def file(self) -> str:
        return f"{self.id}.png"

    def key(self, engine: Mapping[str, object]) -> str:
        """Hash of everything that the picture depends on; files by content, whatever they are called."""
        effective = dict(self.settings)
        for name in {"image", "mask"} & effective.keys():
            effective[name] = fingerprint(effective[name])
        for name in {"loras", "controls"} & effective.keys():
            effective[name] = [
                [fingerprint(part) if isinstance(part, str) else part for part in parts] for parts in effective[name]
            ]
        text = json.dumps([effective, engine], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Rows:
    """The rows of a source, which can be read again and again and is never held in memory.

    source: a file (.jsonl, .csv, .txt), "-" for standard input, or an iterable of mappings (a one-way iterator is
    read into memory). defaults: cells of the rows that do not have them.
    """

    def __init__(self, source: str | Path | Iterable[Cells], columns: Columns, defaults: Cells | None = None):
        self.columns = columns
        self.defaults = {name: value for name, value in (defaults or {}).items() if value is not None}
        self._spooled = None
        self.name = "rows"
        if isinstance(source, str | Path):
            self.name = "standard input" if str(source) == "-" else str(source)
            if str(source) == "-":
                self._spooled = spool(sys.stdin.buffer)
            self._source: Path | Iterable[Cells] = Path(self._spooled.name if self._spooled else source)
        else:
            self._source = list(source) if isinstance(source, Iterator) else source

    def __iter__(self) -> Iterator[Row]:
        """Rows in order; ValueError at the first that cannot be used."""
        for number, cells in self._cells():
            yield from self.expand(number, cells)

    def expand(self, number: int, cells: Cells) -> list[Row]:
        """The pictures of one row; ValueError names the row and what is wrong with it."""
        try:
            return expand(cells, self.columns, self.defaults, f"{number:06}")
        except ValueError as error:
            raise ValueError(f"{self.name}, row {number}: {error}") from None

    def check(self) -> int:
        """The number of pictures; ValueError with the first few complaints, duplicate ids among them."""
        return check(self._checked())

    def _checked(self) -> Iterator[tuple[int, list[int], str]]:
        for number, cells in self._cells():
            try:
                rows = self.expand(number, cells)
            except ValueError as error:
                yield number, [], str(error)
            else:
                yield number, [digest(row.id.casefold()) for row in rows], ""

    def _cells(self) -> Iterator[tuple[int, Cells]]:
        source = self._source
        return enumerate(read_cells(source, self.name) if isinstance(source, Path) else map(dict, source), 1)


def check(found: Iterable[tuple[int, list[int], str]]) -> int:
    """The number of pictures of (row number, digests of ids, complaint); ValueError with the first complaints."""
    seen: dict[int, int] = {}
    complaints = []
    for number, ids, complaint in found:
        for one in ids:
            first = seen.setdefault(one, number)
            if first != number:
                complaint = f"row {number} has an id that row {first} has, too; ids must differ in more than case"
        if complaint:
            complaints.append(complaint)
        if len(complaints) > SHOWN:
            break
    if complaints:
        more = " (and more)" if len(complaints) > SHOWN else ""
        raise ValueError("; ".join(complaints[:SHOWN]) + more)
    if not seen:
        raise ValueError("no rows: expected at least one prompt")
    return len(seen)


def expand(cells: Cells, columns: Columns, defaults: Cells, number: str) -> list[Row]:
    """One `Row` for each picture of a row's cells; number: its id where it has none."""
    known = columns.names | {"id", "count"}
    if unknown := [name for name in cells if name not in known]:
        raise ValueError(
            f"column {unknown[0]!r} is unknown; columns are {', '.join(sorted(known))}. "
            "Leave out or rename what is not meant for this command"
        )
    given = {**defaults, **{name: value for name, value in cells.items() if value is not None}}
    name = identifier(given.pop("id", number))
    count = whole("count", given.pop("count", 1), 1, MAX_COUNT)
    first = whole("seed", given.pop("seed"), 0, SEEDS - 1) if "seed" in given else seed_of(name)
    found = [columns.settings(given, (first + i) % SEEDS) for i in range(count)]
    return [Row(f"{name}-{i}" if count > 1 else name, settings) for i, settings in enumerate(found, 1)]


def seed_of(name: str) -> int:
    """The seed of a row that names none: 32 bits of its id's hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def digest(*texts: str) -> int:
    """64 bits of a hash, by which rows are remembered."""
    return int.from_bytes(hashlib.sha256("\0".join(texts).encode()).digest()[:8], "big")


# ---- reading --------------------------------------------------------------------------------------------------


def read_cells(path: Path, name: str) -> Iterator[Cells]:
    """The cells of each row of a JSONL, CSV or text file, told apart by the suffix, else by the first line."""
    if not path.is_file():
        raise ValueError(f"{name}: no such file; expected .jsonl, .csv or .txt, or - for standard input")
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            kind = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".txt": "txt"}.get(path.suffix.lower())
            kind = kind or sniff(file.readline())
            file.seek(0)
            yield from {"jsonl": read_jsonl, "csv": read_csv, "txt": read_text}[kind](file, name)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: expected UTF-8, found byte {error.object[error.start]:#x}; save it so") from None


def sniff(line: str) -> str:
    """What rows without a file name are: JSON objects, CSV with a header that has `prompt`, else one prompt a line."""
    if line.lstrip().startswith("{"):
        return "jsonl"
    header = next(csv.reader([line]), [])
    return "csv" if "prompt" in header and all(name.isidentifier() for name in header) else "txt"


def read_text(lines: Iterable[str], name: str) -> Iterator[Cells]:
    """A prompt a line; empty lines are passed over."""
    return ({"prompt": line.strip()} for line in lines if line.strip())


def read_jsonl(lines: Iterable[str], name: str) -> Iterator[Cells]:
    """A JSON object a line; empty lines are passed over."""
    for number, line in enumerate((line for line in lines if line.strip()), 1):
        yield parse_json(line, f"{name}, row {number}")


def parse_json(line: str, where: str) -> Cells:
    """The object of a line; ValueError for anything else, and for names that are there twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError(f"{where}: a name is there twice; each column may be there once")
        return found

    try:
        found = json.loads(line.strip(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: expected one JSON object a line, found a fault at character {error.pos + 1} ({error.msg})"
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: expected one JSON object a line, found one nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, found {line.strip()[:40]}")
    return found


def read_csv(lines: Iterable[str], name: str) -> Iterator[Cells]:
    """Rows under a header, None for empty cells; ValueError where a row has more or fewer cells."""
    reader = csv.reader(lines, strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        if len(set(header)) < len(header):
            raise ValueError(f"{name}: the header has a column twice: {', '.join(header)}")
        for number, cells in enumerate((row for row in reader if row), 1):
            if len(cells) != len(header):
                raise ValueError(f"{name}, row {number}: expected {len(header)} cells, found {len(cells)}")
            yield {column: cell or None for column, cell in zip(header, cells)}
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}; quote cells that hold commas or quotes") from None


def spool(stream: IO[bytes]) -> IO[bytes]:
    """A temporary file of what a stream holds, so that it can be read twice."""
    file = tempfile.NamedTemporaryFile(prefix="zimage-rows-")  # noqa: SIM115  it is deleted when nobody needs it
    shutil.copyfileobj(stream, file)
    file.flush()
    return file


# ---- files by content -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _fingerprint(path: str, size: int, changed: int) -> str:
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= SAMPLED:
            for block in iter(lambda: file.read(SAMPLE), b""):
                found.update(block)
        else:
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                found.update(file.read(SAMPLE))
    return found.hexdigest()[:32]


def fingerprint(path: str | Path) -> str:
    """Hash of a file, or of all files of a folder with their names; of a file above 64 MiB it reads 64 MiB."""
    path = Path(path)
    if path.is_dir():
        parts = sorted(part for part in path.rglob("*") if part.is_file())
        named = itertools.chain.from_iterable((str(part.relative_to(path)), fingerprint(part)) for part in parts)
        return hashlib.sha256("\0".join(named).encode()).hexdigest()[:32]
    stat = path.stat()
    return _fingerprint(str(path), stat.st_size, stat.st_mtime_ns)
