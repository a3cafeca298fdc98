"""Writing an SVDQ INT4 checkpoint: its header, its metadata, and a writer that streams tensors in any order.

Names, dtypes and shapes follow from the model's configuration alone, so the header is written first and each tensor
goes to its own offset when it is ready: a 4.5 GB file takes the memory of one tensor. The file grows under a temporary
name in the destination's folder and is renamed when it is complete.

Source: the header that nunchaku's `NunchakuZImageTransformer2DModel` expects under strict loading
(nunchaku/models/transformers/transformer_zimage.py@92e4695) and the safetensors format description.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from .. import whole
from ..formats.load import expected_tensors
from ..formats.names import diffusers_svdq_module
from ..formats.safetensors import TensorFiles
from ..linear.adapters import Linear
from ..linear.layout import GROUP
from ..linear.svdq import SVDQLinear, SVDQWeights
from ..models.config import ZImageConfig
from ..models.transformer import ZImageTransformer
from ..sizes import readable

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
OURS = "zimage-int4, unfinished"  # begins the list of finished sections

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


class StreamedFile:
    """A safetensors file written tensor by tensor, in any order, and renamed to its path when complete.

    A context manager. Leaving it normally checks that every planned tensor was written, flushes the file to the disk
    and renames it. After a failure or an exception the temporary file is removed, unless the write is resumable and
    has a finished section: a later StreamedFile with the same header and metadata then resumes from it. The path is
    locked meanwhile, within this process and against others.

    Beside the path it uses three hidden names: `.NAME.zimage-part` is the file itself, `.NAME.zimage-done` says whose
    it is and has a line for every finished section with the SHA-256 of what was written, `.NAME.zimage-lock` stays.
    """

    def __init__(self, path: Path, header: Header, metadata: Mapping[str, str], notes: Header | None = None):
        """Reserve the whole file. ValueError if it cannot be written there, is being written, or does not fit.

        notes: tensors for the caller's own use, stored behind the file's until it is complete. Passing notes, even
        `{}`, makes the write resumable.
        """
        whole.check_target(path)
        self.path = path
        self.header = header | (notes or {})
        self.partial, self._done = whole.beside(path, "part"), whole.beside(path, "done")
        self.finished: list[str] = []
        self._notes = notes
        self._missing = set(header)
        self._digests: dict[str, str] = {}  # of what was written since the last section
        encoded, self._offsets, self.size = _encode_header(header, metadata)
        behind, self._full_size = _placed(notes or {}, self.size)
        self._offsets |= behind
        try:
            self._lock = whole.lock(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot write ({error.strerror}); choose another folder") from error
        try:
            self._open(encoded)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, encoded: bytes) -> None:
        """Go on with an earlier run's file, or begin one."""
        first = json.dumps({OURS: hashlib.sha256(encoded).hexdigest()}).encode() + b"\n"
        try:
            sections = self._earlier(first)
            if sections:
                self._file, self._record = whole.reopen(self.partial), whole.reopen(self._done)
                self._file.seek(0)
                kept = self._verified(sections, self._file.read(len(encoded)) == encoded)
                self._record.truncate(len(first) + sum(map(len, sections[:kept])))
                self._record.seek(0, os.SEEK_END)
                if kept:
                    return
                self._file.close()
                self._record.close()
            self.partial.unlink(missing_ok=True)
            self._done.unlink(missing_ok=True)
            self._record = whole.create(self._done)
            self._record.write(first)
            whole.sync(self._record)
            self._file = whole.create(self.partial)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot write ({error.strerror}); choose another folder") from error
        try:
            _reserve(self._file.fileno(), self._full_size)
            self._file.write(encoded)
            whole.sync_folder(self.path.parent)
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
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            self._file.seek(self._offsets[name])
            self._file.write(data)
        except OSError as error:
            raise self._no_space(error) from error
        if self._notes is not None:
            self._digests[name] = hashlib.sha256(data).hexdigest()
        self._missing.discard(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor written by this object or by the run that it resumes. ValueError if the file was truncated."""
        dtype, shape = self.header[name]
        expected, data = _bytes(dtype, shape), self._read(name)
        if len(data) < expected:
            raise ValueError(f"{self.partial}: {name}: expected {expected} bytes, found {len(data)}; delete the file")
        return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)

    def _read(self, name: str) -> bytearray:
        self._file.seek(self._offsets[name])
        return bytearray(self._file.read(_bytes(*self.header[name])))

    def finish(self, section: str) -> None:
        """Flush to the disk, and record that every tensor whose name starts with `section` and a dot is written."""
        line = json.dumps({"section": section, "sha256": self._digests}).encode() + b"\n"
        try:
            whole.sync(self._file)
            self._record.write(line)
            whole.sync(self._record)
        except OSError as error:
            raise self._no_space(error) from error
        self._digests = {}
        self._mark(section)

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        keep = self._notes is not None and bool(self.finished)
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
            whole.sync(self._file)
            self._file.close()
            whole.place(self.partial, self.path)
        except OSError as error:
            then = f"run the same again, which goes on from {self.partial.name}" if resumable else "run it again"
            raise ValueError(
                f"{self.path}: cannot be put in place ({error.strerror}); see that it can be written there and that "
                f"nothing has it open, then {then}"
            ) from error

    def _earlier(self, first: bytes) -> list[bytes]:
        """The lines of the sections that an earlier run with the same header, so with the same source, finished.

        ValueError where one of the names is taken by something that no run has made.
        """
        for path in (self.partial, self._done):
            whole.refuse_link(path)
        lines = self._done.read_bytes().splitlines(keepends=True) if self._done.exists() else []
        ours = not lines or lines[0].startswith(first[: len(OURS) + 2])
        if not ours or (self.partial.exists() and not self._done.exists()):
            taken = self.partial if ours else self._done
            raise ValueError(f"{taken}: expected a free name or an unfinished run's, found another file; move it away")
        sections = [line for line in lines[1:] if line.endswith(b"}\n")] if self.partial.exists() else []
        if sections and (self._notes is None or lines[0] != first):
            self._warn(f"are of a run with other settings, so its {len(sections)} finished parts cannot be used")
            return []
        return sections

    def _verified(self, sections: list[bytes], same_header: bool) -> int:
        """How many of an earlier run's sections are as they were written, up to the first that is not."""
        size = os.fstat(self._file.fileno()).st_size
        if same_header and size in (self.size, self._full_size):
            gone = self._notes if size == self.size else ()  # notes go when all is finished
            for line in sections:
                if (section := self._intact(line, gone or ())) is None:
                    break
                self._mark(section)
        if len(self.finished) < len(sections):
            self._warn(f"are damaged; of {len(sections)} finished parts {len(self.finished)} are used")
        return len(self.finished)

    def _intact(self, line: bytes, gone: Collection[str]) -> str | None:
        """The section of a line of the list, if all that was written for it is in the file."""
        try:
            found = json.loads(line)
            digests = {name: digest for name, digest in found["sha256"].items() if name not in gone}
            same = all(hashlib.sha256(self._read(name)).hexdigest() == digest for name, digest in digests.items())
            return str(found["section"]) if same else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.partial}: the leftovers {what}; the rest is made afresh", stacklevel=6)

    def _mark(self, section: str) -> None:
        self.finished.append(section)
        self._missing = {name for name in self._missing if not name.startswith(section + ".")}

    def _close(self, keep: bool) -> None:
        """Close the files, remove them unless they are kept, and release the lock."""
        try:
            self._file.close()
        finally:
            self._record.close()
            if not keep:
                self.partial.unlink(missing_ok=True)
                self._done.unlink(missing_ok=True)
            self._lock.release()

    def _no_space(self, error: OSError) -> ValueError:
        needed = readable(self._full_size)
        return ValueError(f"{self.path}: {error.strerror}; free {needed} there or choose another folder")


def nunchaku_tensors(weights: SVDQWeights) -> dict[str, torch.Tensor]:
    """The tensors of a linear by their names in nunchaku's files."""
    packed = weights.to_packed()
    return packed | {"smooth_factor_orig": packed["smooth_factor"]}


def check_apart(dst: Path, files: TensorFiles) -> None:
    """ValueError where a destination is a file of the source."""
    if dst.exists() and any(dst.samefile(header.path) for header in files.headers):
        raise ValueError(f"{dst}: is the source itself; choose another destination")


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


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the whole file where the file system can, so that a full disk fails before the work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, size)
