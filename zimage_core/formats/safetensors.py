"""Reading safetensors: headers without torch, tensors memory-mapped, one file or a folder of shards.

File format: huggingface/safetensors `README.md#format`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000

_DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
}
_MAGIC = (
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a pickled PyTorch file, which is never opened because it can run code"),
    (b"\x80\x02", "a pickled PyTorch file, which is never opened because it can run code"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<!DOCTYPE", "a web page, not a checkpoint"),
    (b"<html", "a web page, not a checkpoint"),
)


@dataclass(frozen=True)
class Header:
    """One safetensors header: name -> (dtype, shape), and the metadata strings."""

    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str] = field(default_factory=dict)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count * _DTYPE_BYTES.get(dtype, 1)


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors header without torch.

    Raises FileNotFoundError, or ValueError for a file that is truncated or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path, or download the file first")
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(64)
        for magic, what in _MAGIC:
            if start.startswith(magic):
                raise ValueError(f"{path}: expected a safetensors file, found {what}; get the .safetensors version")
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES or start[8:9] != b"{":
            raise ValueError(f"{path}: not a safetensors file ({size} bytes); download it again")
        f.seek(8)
        raw = f.read(length)
    if len(raw) < length:
        raise ValueError(
            f"{path}: truncated inside its header, expected {length} header bytes, found {len(raw)}; download it again"
        )
    try:
        entries: dict[str, Any] = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        tensors = {name: (e["dtype"], tuple(e["shape"])) for name, e in entries.items()}
        end = max((e["data_offsets"][1] for e in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"{path}: its safetensors header is damaged ({e}); download it again") from e
    if size != 8 + length + end:
        raise ValueError(
            f"{path}: {'truncated' if size < 8 + length + end else 'too long'}, expected {8 + length + end} bytes, "
            f"found {size}; download it again"
        )
    return Header(path, tensors, metadata)


class TensorFiles:
    """The tensors of one safetensors file, or of a folder's shards, memory-mapped; a context manager."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.headers = [read_header(p) for p in _shards(self.path)]
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.metadata: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        for header in self.headers:
            self.tensors |= header.tensors
            self.metadata |= header.metadata
            self._file |= dict.fromkeys(header.tensors, header.path)
        config = self.path / "config.json"
        if self.path.is_dir() and config.is_file():
            try:
                text = config.read_text(encoding="utf-8")
            except UnicodeDecodeError as e:
                raise ValueError(f"{config}: expected UTF-8 text, found other bytes ({e}); download it again") from e
            self.metadata.setdefault("config", text)

    def __enter__(self) -> TensorFiles:
        from safetensors import safe_open

        self._stack = ExitStack()
        self._open = {h.path: self._stack.enter_context(safe_open(h.path, framework="pt")) for h in self.headers}
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def get(self, name: str) -> Tensor:
        """The tensor as stored, a view of the mapped file; copy it before the file is closed."""
        return self._open[self._file[name]].get_tensor(name)


def open_tensors(path: str | Path) -> TensorFiles:
    """One safetensors file, a folder with an index of shards, or a folder with one file."""
    return TensorFiles(path)


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"{indices[0]}: expected an index of shards with weight_map, found otherwise ({e}); download it again"
            ) from e
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{indices[0]}: names a file outside its folder, {name!r}; download it again")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        sub = path / "transformer"
        if not files and sub.is_dir():
            return _shards(sub)
        raise ValueError(
            f"{path}: expected one .safetensors file or an index, found {len(files)}; name the file itself"
        )
    return files
