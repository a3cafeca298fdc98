"""Writing an SVDQ INT4 checkpoint: its header, its metadata, and a writer that streams tensors in any order.

Names, dtypes and shapes follow from the model's configuration alone, so the header is written first and each tensor
goes to its own offset when it is ready: a 4.5 GB file takes the memory of one tensor. The file grows under a temporary
name in the destination's folder and is renamed when it is complete.

Source: the header that nunchaku's `NunchakuZImageTransformer2DModel` expects under strict loading
(nunchaku/models/transformers/transformer_zimage.py@92e4695) and the safetensors format description.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import nn

from ..formats.load import expected_tensors
from ..formats.names import diffusers_svdq_module
from ..linear.adapters import Linear
from ..linear.layout import GROUP
from ..linear.svdq import SVDQLinear
from ..models.config import ZImageConfig
from ..models.transformer import ZImageTransformer
from ..sizes import readable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
ITEM_SIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from network file systems without locks

Header = dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)


def diffusers_config(config: ZImageConfig) -> dict[str, object]:
    """The configuration as diffusers writes it."""
    return {
        "_class_name": "ZImageTransformer2DModel",
        "_diffusers_version": "0.36.0.dev0",
        "all_f_patch_size": [1],
        "all_patch_size": [config.patch_size],
        "axes_dims": list(config.axes_dims),
        "axes_lens": list(config.axes_lens),
        "cap_feat_dim": config.cap_feat_dim,
        "dim": config.dim,
        "in_channels": config.in_channels,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_heads,
        "n_layers": config.n_layers,
        "n_refiner_layers": config.n_refiner_layers,
        "norm_eps": config.norm_eps,
        "qk_norm": True,
        "rope_theta": config.rope_theta,
        "t_scale": config.t_scale,
    }


def block_names(config: ZImageConfig) -> list[str]:
    """Every block's prefix, in the order of the forward pass."""
    refiners = range(config.n_refiner_layers)
    return [
        *(f"context_refiner.{i}" for i in refiners),
        *(f"noise_refiner.{i}" for i in refiners),
        *(f"layers.{i}" for i in range(config.n_layers)),
    ]


def plan_header(config: ZImageConfig, rank: int, skip_refiners: bool = False) -> Header:
    """Every tensor of the INT4 file: name -> (dtype, shape), in the order of the file.

    ValueError if the model's widths or the rank cannot be packed.
    """
    check_packable(config, rank)
    quantized = partial(SVDQLinear, rank=rank)
    with torch.device("meta"):
        model = ZImageTransformer(config, quantized, Linear if skip_refiners else quantized)
    return header_of(model, diffusers_svdq_module)


def header_of(model: nn.Module, stored_name: Callable[[str], str]) -> Header:
    """Every tensor of a model on the meta device as an INT4 file stores it: name -> (dtype, shape), in file order.

    stored_name: from the model's name of a module to the file's.
    """
    header: Header = {}
    for name, (shape, _) in expected_tensors(model).items():
        module, _, leaf = name.rpartition(".")
        stored = stored_name(module)
        if stored.endswith("to_qkv") and leaf == "weight":  # of a refiner that stays dense
            n, k = shape
            header |= {f"{stored.removesuffix('qkv')}{part}.weight": ("BF16", (n // 3, k)) for part in "qkv"}
            continue
        key = f"{stored}.{leaf}" if stored else leaf
        header[key] = ("I8" if leaf == "qweight" else "BF16", shape)
        if leaf == "smooth_factor":
            header[f"{key}_orig"] = ("BF16", shape)
    return aligned(header)


def aligned(header: Header) -> Header:
    """The tensors in file order: the widest dtypes first, so that each is aligned."""
    return dict(sorted(header.items(), key=lambda item: (-ITEM_SIZE[item[1][0]], item[0])))


def four_bits(rank: int, **more: object) -> str:
    """The metadata `quantization_config` of INT4 weights and activations in groups."""
    four_bit = {"dtype": "int4", "scale_dtype": None, "group_size": GROUP}
    return json.dumps({"method": "svdquant", "weight": four_bit, "activation": four_bit, "rank": rank, **more})


def file_metadata(config: ZImageConfig, rank: int, skip_refiners: bool = False) -> dict[str, str]:
    """The metadata by which nunchaku and compatible loaders recognize the file."""
    return {
        "model_class": "NunchakuZImageTransformer2DModel",
        "quantization_config": four_bits(rank, skip_refiners=skip_refiners),
        "config": json.dumps(diffusers_config(config), indent=2),
        "comfy_config": "{}",
    }


def check_destination(path: Path) -> None:
    """ValueError unless the path is a file's or free, in a folder that exists."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: expected a file in a folder, found no {path.parent}; choose another folder")
    if path.exists() and not path.is_file():
        found = "a folder; name a .safetensors file in it" if path.is_dir() else "a device; choose another name"
        raise ValueError(f"{path}: expected a file to write, found {found}")


class StreamedFile:
    """A safetensors file written tensor by tensor, in any order, and renamed to its path when complete.

    A context manager. Leaving it normally checks that every planned tensor was written, flushes the file to the disk
    and renames it. After a failure or an exception the temporary file is removed, unless the write is resumable and
    has a finished section: a later StreamedFile with the same header and metadata then resumes from it. The path is
    locked meanwhile, within this process and against others.
    """

    def __init__(self, path: Path, header: Header, metadata: Mapping[str, str], notes: Header | None = None):
        """Reserve the whole file. ValueError if it cannot be written there, is being written, or does not fit.

        notes: tensors for the caller's own use, stored behind the file's until it is complete. Passing notes, even
        `{}`, makes the write resumable.
        """
        check_destination(path)
        self.path = path
        self.header = header | (notes or {})
        self.partial = path.with_name(path.name + ".partial")
        self.finished: list[str] = []
        self._resumable = notes is not None
        self._missing = set(header)
        encoded, self._offsets, self.size = _encode_header(header, metadata)
        behind, self._full_size = _placed(notes or {}, self.size)
        self._offsets |= behind
        try:
            self._record = path.with_name(path.name + ".partial.finished").open("a+b")
            if not _lock(self._record):
                self._record.close()
                raise ValueError(f"{path}: another run is writing it; wait until it is done, or choose another name")
            sections = self._earlier(encoded)
            self._file = self.partial.open("r+b" if sections else "w+b")
        except OSError as error:
            raise ValueError(f"{path}: cannot write ({error.strerror}); choose another folder") from error
        if sections:
            for section in sections:
                self._mark(section)
            return
        try:
            self._record.truncate(0)
            _reserve(self._file.fileno(), self._full_size)
            self._file.write(encoded)
        except OSError as error:
            self._close(keep=False)
            raise self._no_space(error) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its offset. ValueError if it is not planned or of another shape or dtype."""
        found = next((name for name, kind in DTYPES.items() if kind == tensor.dtype), str(tensor.dtype))
        planned = self.header.get(name)
        if planned != (found, tuple(tensor.shape)):
            expected = f"{planned[0]} {list(planned[1])}" if planned else "no such tensor"
            raise ValueError(f"{self.path}: {name}: expected {expected}, found {found} {list(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            self._file.seek(self._offsets[name])
            self._file.write(data.data)
        except OSError as error:
            raise self._no_space(error) from error
        self._missing.discard(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor written by this object or by the run that it resumes. ValueError if the file was truncated."""
        dtype, shape = self.header[name]
        self._file.seek(self._offsets[name])
        expected = _bytes(dtype, shape)
        data = bytearray(self._file.read(expected))
        if len(data) < expected:
            raise ValueError(f"{self.partial}: {name}: expected {expected} bytes, found {len(data)}; delete the file")
        return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)

    def finish(self, section: str) -> None:
        """Flush to the disk, and record that every tensor whose name starts with `section` and a dot is written."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._record.write(f"{section}\n".encode())
            self._record.flush()
            os.fsync(self._record.fileno())
        except OSError as error:
            raise self._no_space(error) from error
        self._mark(section)

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        keep = self._resumable and bool(self.finished)
        try:
            if error is None:
                self._complete(keep)
                keep = False
        finally:
            self._close(keep)

    def _complete(self, resumable: bool) -> None:
        """Check that nothing is missing, and rename the file to its path."""
        if self._missing:
            raise ValueError(f"{self.path}: {len(self._missing)} tensors missing: {min(self._missing)}")
        try:
            self._file.truncate(self.size)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
        except OSError as error:
            then = f"run the same again, which goes on from {self.partial.name}" if resumable else "run it again"
            raise ValueError(
                f"{self.path}: cannot be put in place ({error.strerror}); see that it can be written there and that "
                f"nothing has it open, then {then}"
            ) from error

    def _earlier(self, encoded: bytes) -> list[str]:
        """The sections that an earlier run with the same header, so the same settings and source, finished."""
        if not self.partial.is_file():
            return []
        self._record.seek(0)
        recorded = self._record.read().decode(errors="replace").splitlines()
        sections = [s for s in dict.fromkeys(recorded) if any(name.startswith(s + ".") for name in self._missing)]
        if sections and not (self._resumable and self._is_whole(encoded)):
            warnings.warn(
                f"{self.partial}: is damaged or of a run with other settings, so its {len(sections)} finished parts "
                "cannot be used; everything is made afresh",
                stacklevel=4,
            )
            return []
        return sections

    def _is_whole(self, encoded: bytes) -> bool:
        """Whether the temporary file has the expected header and size, with notes or, once complete, without."""
        if self.partial.stat().st_size not in (self.size, self._full_size):
            return False
        with self.partial.open("rb") as file:
            return file.read(len(encoded)) == encoded

    def _mark(self, section: str) -> None:
        self.finished.append(section)
        self._missing = {name for name in self._missing if not name.startswith(section + ".")}

    def _close(self, keep: bool) -> None:
        """Close the files, the locked one last, and remove them unless they are kept."""
        try:
            self._file.close()
        finally:
            if not keep:
                self.partial.unlink(missing_ok=True)
            self._record.close()
            if not keep:
                Path(self._record.name).unlink(missing_ok=True)

    def _no_space(self, error: OSError) -> ValueError:
        needed = readable(self._full_size)
        return ValueError(f"{self.path}: {error.strerror}; free {needed} there or choose another folder")


def check_packable(config: ZImageConfig, rank: int) -> None:
    """ValueError unless a block's linears of these sizes can be packed with a low-rank branch of this rank."""
    for name, (n, k) in config.linears.items():
        if n % 128 or k % 128:
            raise ValueError(f"{name}: expected multiples of 128, found {n} x {k}; it cannot be packed")
        if rank < 16 or rank % 16 or rank > min(n, k):
            raise ValueError(f"rank: expected a multiple of 16 up to {min(n, k)}, found {rank}; try 32")


def _encode_header(header: Header, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Length and JSON of the header -> (bytes, each tensor's absolute offset, size of the whole file)."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    relative, size = _placed(header, 0)
    for name, (dtype, shape) in header.items():
        place = [relative[name], relative[name] + _bytes(dtype, shape)]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + at for name, at in relative.items()}
    return struct.pack("<Q", len(text)) + text, offsets, start + size


def _placed(header: Header, position: int) -> tuple[dict[str, int], int]:
    """Offsets of tensors stored one after the other from a position on, and the end of the last."""
    offsets = {}
    for name, (dtype, shape) in header.items():
        offsets[name] = position
        position += _bytes(dtype, shape)
    return offsets, position


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEM_SIZE[dtype] * math.prod(shape)


def _lock(file: BinaryIO) -> bool:
    """Lock an open file until it is closed; False if another has it, True on file systems without locks."""
    try:
        if sys.platform == "win32":
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the whole file where the file system can, so that a full disk fails before the work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, size)
