"""Reading GGUF: the header without torch or the `gguf` package, tensors memory-mapped.

Source: ggml-org/ggml `docs/gguf.md`; gguf 0.19 (constants.py) for the sizes of blocks.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..sizes import round_up
from .safetensors import Header, TensorFiles, check_file, check_stamp, stamp

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
# ggml's number of a type -> its name, weights of a block, bytes of a block
# fmt: off
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
# fmt: on
QUANTIZED = {name: (block, size) for name, block, size in _TYPES.values() if block > 1}
"""Types of several weights in a block: name -> (weights, bytes)."""
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?QqdQ"))
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_SHAPE = "comfy.gguf.orig_shape."  # before a tensor's name: the shape that ComfyUI-GGUF's converter gave another


class GGUFFile(TensorFiles):
    """The tensors of a GGUF file by their own names; a tensor of blocks is read as rows of bytes.

    fields: the metadata but for arrays, which are passed over: a vocabulary's strings are not used. Shapes that a
    converter changed are as they were.
    """

    def __init__(self, path: str | Path):
        self.path = check_file(path)
        before = stamp(self.path)
        self.fields: dict[str, object] = {}
        self.prefix, self.derived, self.checks = "", {}, []
        self.tensors = {}
        self._place: dict[str, tuple[int, int]] = {}
        try:
            with self.path.open("rb") as file:
                # Copy-on-write, because torch warns of read-only memory; nothing is written.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._read()
        except (ValueError, KeyError, OverflowError, struct.error) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{self.path}: its GGUF data are damaged or cut off ({text}); download it again") from None
        self.metadata = {key: str(value) for key, value in self.fields.items()}
        self.headers = [Header(self.path, self.tensors, self.metadata, before)]
        if self.fields.get("split.count", 1) not in (0, 1):
            raise ValueError(f"{self.path}: expected one GGUF file, found a part of a split one; merge its parts")

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        pass  # the tensors read from it keep it mapped

    def get(self, name: str) -> Tensor:
        """The tensor as stored, (N, bytes of a row) where it has blocks."""
        import torch

        check_stamp(self.headers[0])
        dtype, shape = self.tensors[name]
        start, size = self._place[self.prefix + name]
        data = torch.frombuffer(self._data, dtype=torch.uint8, count=size, offset=start)
        if dtype in QUANTIZED:
            return data.view(*shape[:-1], -1)
        return data.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]).view(shape)

    def _read(self) -> None:
        """Fields and tensors; struct.error, KeyError or ValueError where the file is damaged."""
        cursor = _Cursor(self._data, len(MAGIC))
        version = cursor.number("I")
        if version & 0xFFFF == 0:
            raise ValueError("it is big-endian, get a little-endian one")
        tensors, fields = cursor.number("Q"), cursor.number("Q")
        shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(fields):
            key = cursor.text()
            found = cursor.value(cursor.number("I"), keep=key.startswith(_SHAPE))
            if isinstance(found, tuple):
                shapes[key.removeprefix(_SHAPE)] = found
            elif found is not None:
                self.fields[key] = found
        entries = [self._entry(cursor, shapes) for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"alignment {alignment}")
        start = round_up(cursor.place, alignment)
        for name, offset, size in entries:
            if offset % alignment:
                raise ValueError(f"{name}: offset {offset}, which is no multiple of {alignment}")
            if start + offset + size > len(self._data):
                raise ValueError(f"{name} goes past the end")
            self._place[name] = start + offset, size

    def _entry(self, cursor: _Cursor, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int, int]:
        """The next tensor: its name, and its offset and size in bytes."""
        name, axes = cursor.text(), cursor.number("I")
        if axes > _MOST_AXES or name in self._place:
            raise ValueError(f"{name}: {axes} axes, or there twice")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        number = cursor.number("I")
        if number not in _TYPES:
            raise ValueError(f"{name}: a type numbered {number}, which is not known")
        kind, block, size = _TYPES[number]
        if shape and shape[-1] % block:
            raise ValueError(f"{name}: rows of {shape[-1]} weights in blocks of {block}")
        self._place[name] = 0, 0
        offset = cursor.number("Q")
        original = shapes.get(name, shape)
        if prod(original) != prod(shape) or original and original[-1] % block:
            raise ValueError(f"{name}: {shape} in blocks of {block} cannot have been {original}")
        self.tensors[name] = kind, original
        return name, offset, prod(shape) // block * size


class _Cursor:
    """Reads a GGUF header from a place on; struct.error, KeyError or ValueError past the end."""

    def __init__(self, data: mmap.mmap, place: int):
        self.data, self.place = data, place

    def number(self, kind: str) -> int:
        """A number by its letter in `struct`."""
        (found,) = struct.unpack_from(f"<{kind}", self.data, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return found

    def text(self) -> str:
        size = self.number("Q")
        self.place += size
        if self.place > len(self.data):
            raise ValueError("a name goes past the end")
        return self.data[self.place - size : self.place].decode("utf-8")

    def value(self, kind: int, keep: bool) -> object:
        """The next value; arrays are passed over (None) unless a short one is to be kept."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):
                self.place += 8 + struct.unpack_from("<Q", self.data, self.place)[0]
        elif inner == _ARRAY:
            raise ValueError("an array of arrays")
        elif keep and count <= _MOST_AXES:
            return tuple(self.number(_SCALARS[inner]) for _ in range(count))
        else:
            self.place += count * struct.calcsize(f"<{_SCALARS[inner]}")
        return None
