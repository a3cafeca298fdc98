"""Reading safetensors: headers without torch, tensors memory-mapped, one file or a folder of shards.

The `safetensors` package itself reads every header, so what it refuses is refused here, and nothing else is.
File format: huggingface/safetensors `README.md#format`.
"""

from __future__ import annotations

import json
import stat
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]

_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16}
_BITS |= {"I16": 16, "U16": 16, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}  # every other type has 8
MOST_AXES, MOST_TEXT = 64, 2**26
SUFFIXES = (".safetensors", ".sft", ".gguf", ".json")  # of a model's files in a folder
_PICKLE = "a pickled PyTorch file, which is never opened because it can run code"
_MAGIC = (
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", _PICKLE),
    (b"\x80\x02", _PICKLE),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<!DOCTYPE", "a web page, not a checkpoint"),
    (b"<html", "a web page, not a checkpoint"),
)


class MissingFile(FileNotFoundError, ValueError):
    """No file at a path. A ValueError too, so that one `except ValueError` covers every unusable file."""


@dataclass(frozen=True)
class Header:
    """One safetensors header: name -> (dtype, shape), and the metadata strings."""

    path: Path
    tensors: Tensors
    metadata: dict[str, str] = field(default_factory=dict)
    stamp: tuple[object, ...] = ()  # of the file before it was read


def tensor_bytes(dtype: str, shape: Shape) -> int:
    """Bytes of a stored tensor."""
    return prod(shape) * _BITS.get(dtype, 8) // 8


def check_file(path: str | Path) -> Path:
    """The path of a regular file; ValueError for a folder, a pipe or a device, MissingFile where nothing is."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise MissingFile(f"{path}: {found}; check the path, or download the file first") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, found {'a folder' if stat.S_ISDIR(mode) else 'a pipe or device'}")
    return path


def stamp(path: Path) -> tuple[object, ...]:
    """Names, sizes and times of a file, or of the model's files in a folder; empty if there is none."""
    try:
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        found = [(file.name, file.stat()) for file in files]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found)


def check_stamp(header: Header) -> None:
    """ValueError if a file has changed since its header was read."""
    if stamp(header.path) != header.stamp:
        raise ValueError(f"{header.path}: changed since its header was read; wait until it is whole, then start again")


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors header without torch.

    Raises MissingFile, or ValueError for a file that is truncated, not safetensors or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = check_file(path)
    before = stamp(path)
    try:
        with safe_open(path, framework="np") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: {_fault(path, str(error))}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); check its permissions") from None
    return Header(path, tensors, metadata, before)


def _fault(path: Path, reason: str) -> str:
    """What is wrong with a file that `safetensors` refuses for a reason."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        for magic, what in _MAGIC:
            if start.startswith(magic):
                return f"expected a safetensors file, found {what}; get the .safetensors version"
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if start[8:9] != b"{":
            return f"not a safetensors file ({size} bytes); download it again"
        if size < 8 + length:
            found = f"expected {length} header bytes, found {size - 8}"
            return f"truncated inside its header, {found}; download it again"
        try:
            file.seek(8)
            entries = json.loads(file.read(length))
            end = 8 + length + max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            end = size
    if size != end:
        what = "truncated" if size < end else "too long"
        return f"{what}, expected {end} bytes, found {size}; download it again"
    return f"its safetensors header is damaged ({' '.join(reason.split())}); download it again"


class TensorFiles:
    """The tensors of one safetensors file, or of a folder's shards, memory-mapped; a context manager.

    tensors: name -> (dtype, shape). A folder's config.json is metadata "config". ValueError as `read_header`, and for
    an index that does not say where each tensor is.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.headers: list[Header] = []
        self.tensors: Tensors = {}
        self.metadata: dict[str, str] = {}
        self.prefix = ""  # taken off the names, see `narrow`
        self.derived: dict[str, Callable[[], Tensor]] = {}  # tensors that are made of others, see `layouts.present`
        self.checks: list[Callable[[], object]] = []  # of values, for `load.check_transformer`
        self._file: dict[str, Path] = {}
        folder = self.path if self.path.is_dir() else None
        if folder and not list(folder.glob("*.safetensors*")) and (folder / "transformer").is_dir():
            folder = folder / "transformer"
        index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None) if folder else None
        if index:
            self._read_shards(index)
        else:
            self._add(read_header(_only_file(folder) if folder else self.path))
        config = folder / "config.json" if folder else None
        if config and config.is_file():
            self.metadata.setdefault("config", read_text(config))

    def _add(self, header: Header) -> None:
        self.headers.append(header)
        self.tensors |= header.tensors
        self.metadata |= header.metadata
        self._file |= dict.fromkeys(header.tensors, header.path)

    def _read_shards(self, index: Path) -> None:
        """Take each tensor from the shard that the index names for it."""
        try:
            weight_map = json.loads(read_text(index))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(
                f"{index}: expected an index of shards with weight_map, found otherwise ({e}); download it again"
            ) from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
                raise ValueError(f"{index}: names a file outside its folder, {name!r}; download it again")
        shards = {name: read_header(index.parent / name) for name in names}
        for header in shards.values():
            if extra := next((key for key in header.tensors if key not in weight_map), None):
                raise ValueError(f"{header.path}: tensor {extra!r} is not in {index.name}; download both again")
            self._add(header)
        for key, name in weight_map.items():
            if key not in shards[name].tensors:
                raise ValueError(
                    f"{shards[name].path}: expected tensor {key!r}, as {index.name} says, found none; "
                    "download both again"
                )
            self.tensors[key], self._file[key] = shards[name].tensors[key], shards[name].path

    def __enter__(self) -> TensorFiles:
        from safetensors import safe_open

        self._stack = ExitStack()
        self._headers = {h.path: h for h in self.headers}
        self._open = {h.path: self._stack.enter_context(safe_open(h.path, framework="pt")) for h in self.headers}
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def get(self, name: str) -> Tensor:
        """The tensor as stored, a view of the mapped file; copy it before the file is closed.

        ValueError for one of more axes than torch has.
        """
        if name in self.derived:
            return self.derived[name]()
        if (axes := len(self.tensors[name][1])) > MOST_AXES:
            raise ValueError(f"{self.path}: {name!r}: expected up to {MOST_AXES} axes, found {axes}; download it again")
        return self.stored(name)

    def stored(self, name: str) -> Tensor:
        """A tensor of the file itself, which others may be made of."""
        path = self._file[self.prefix + name]
        check_stamp(self._headers[path])
        return self._open[path].get_tensor(self.prefix + name)

    def narrow(self, prefix: str) -> None:
        """Keep only the tensors whose names begin with a prefix, and drop it: one model of a file of several."""
        self.prefix += prefix
        self.tensors = {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}


def open_tensors(path: str | Path) -> TensorFiles:
    """One safetensors or GGUF file, a folder with an index of shards, or a folder with one file."""
    from .gguf import MAGIC, GGUFFile

    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:  # more than the longest header of a safetensors file
                return GGUFFile(path)
    return TensorFiles(path)


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"{folder}: expected one .safetensors file or an index, found {len(files)}; name the file itself"
        )
    return files[0]


def json_object(text: str | bytes | None) -> dict[str, Any] | None:
    """The object that a text holds as JSON, or None for anything else."""
    try:
        found = json.loads(text or "")
    except (ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_object(text: str | bytes, where: object, remedy: str = "download it again") -> dict[str, Any]:
    """The object that a text holds as JSON. ValueError, naming its place, for anything else."""
    if (found := json_object(text)) is None:
        raise ValueError(f"{where}: expected a JSON object, found otherwise; {remedy}")
    return found


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. ValueError for other bytes, more than 64 MiB, or a file that cannot be read."""
    try:
        if check_file(path).stat().st_size > MOST_TEXT:
            raise ValueError(f"{path}: expected up to {MOST_TEXT >> 20} MiB of text, found more; download it again")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: expected UTF-8 text, found other bytes ({e}); download it again") from None
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror}); check its permissions") from None
