"""The SVDQ INT4 checkpoint as a file to be written: its planned header, its metadata, a writer that streams.

Names, dtypes and shapes follow from the model's configuration alone, so the header is written first and each
tensor goes to its own offset whenever it is ready: a 4.5 GB file needs the memory of one tensor. The file
grows under a temporary name in the destination's folder and gets its real name only when it is complete.

Source: the header that nunchaku's `NunchakuZImageTransformer2DModel` expects under strict loading
(nunchaku/models/transformers/transformer_zimage.py@92e4695) and the safetensors format description.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from .config import ZImageConfig
from .layout import GROUP
from .transformer import ADALN_WIDTH, T_EMBED_HIDDEN

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
ITEM_SIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}

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


def quantized_linears(config: ZImageConfig) -> dict[str, tuple[int, int]]:
    """The four quantized linears of a block: name in the file -> (N, K)."""
    dim, ffn = config.dim, config.ffn_dim
    return {
        "attention.to_qkv": (3 * dim, dim),
        "attention.to_out.0": (dim, dim),
        "feed_forward.net.0.proj": (2 * ffn, dim),
        "feed_forward.net.2": (dim, ffn),
    }


def block_names(config: ZImageConfig) -> list[str]:
    """Every block's prefix, in the order in which the model runs them."""
    refiners = range(config.n_refiner_layers)
    return [
        *(f"context_refiner.{i}" for i in refiners),
        *(f"noise_refiner.{i}" for i in refiners),
        *(f"layers.{i}" for i in range(config.n_layers)),
    ]


def plan_header(config: ZImageConfig, rank: int, skip_refiners: bool = False) -> Header:
    """Every tensor of the INT4 file: name -> (dtype, shape), in the order in which safetensors lays them out.

    ValueError if the model's widths or the rank cannot be packed.
    """
    _check_packable(config, rank)
    dim, caption, pixels = config.dim, config.cap_feat_dim, config.patch_dim
    modulation = min(dim, ADALN_WIDTH)
    key = f"{config.patch_size}-1"
    plain: dict[str, tuple[int, ...]] = {
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        f"all_x_embedder.{key}.weight": (dim, pixels),
        f"all_x_embedder.{key}.bias": (dim,),
        f"all_final_layer.{key}.linear.weight": (pixels, dim),
        f"all_final_layer.{key}.linear.bias": (pixels,),
        f"all_final_layer.{key}.adaLN_modulation.1.weight": (dim, modulation),
        f"all_final_layer.{key}.adaLN_modulation.1.bias": (dim,),
        "t_embedder.mlp.0.weight": (T_EMBED_HIDDEN, ADALN_WIDTH),
        "t_embedder.mlp.0.bias": (T_EMBED_HIDDEN,),
        "t_embedder.mlp.2.weight": (modulation, T_EMBED_HIDDEN),
        "t_embedder.mlp.2.bias": (modulation,),
        "cap_embedder.0.weight": (caption,),
        "cap_embedder.1.weight": (dim, caption),
        "cap_embedder.1.bias": (dim,),
    }
    header: Header = {}
    for block in block_names(config):
        for name in ("norm_q", "norm_k"):
            plain[f"{block}.attention.{name}.weight"] = (config.head_dim,)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            plain[f"{block}.{name}.weight"] = (dim,)
        if not block.startswith("context_refiner"):
            plain[f"{block}.adaLN_modulation.0.weight"] = (4 * dim, modulation)
            plain[f"{block}.adaLN_modulation.0.bias"] = (4 * dim,)
        for name, (n, k) in quantized_linears(config).items():
            linear = f"{block}.{name}"
            if skip_refiners and "refiner" in block:
                if name == "attention.to_qkv":
                    plain |= {f"{block}.attention.to_{part}.weight": (dim, k) for part in "qkv"}
                else:
                    plain[f"{linear}.weight"] = (n, k)
                continue
            header[f"{linear}.qweight"] = ("I8", (n, k // 2))
            plain |= {
                f"{linear}.wscales": (k // GROUP, n),
                f"{linear}.smooth_factor": (k,),
                f"{linear}.smooth_factor_orig": (k,),
                f"{linear}.proj_down": (k, rank),
                f"{linear}.proj_up": (n, rank),
            }
    header |= {name: ("BF16", shape) for name, shape in plain.items()}
    return dict(sorted(header.items(), key=lambda item: (-ITEM_SIZE[item[1][0]], item[0])))


def file_metadata(config: ZImageConfig, rank: int, skip_refiners: bool = False) -> dict[str, str]:
    """The metadata by which nunchaku and the loaders made after it recognize the file."""
    four_bit = {"dtype": "int4", "scale_dtype": None, "group_size": GROUP}
    quantization = {"method": "svdquant", "weight": four_bit, "activation": four_bit}
    return {
        "model_class": "NunchakuZImageTransformer2DModel",
        "quantization_config": json.dumps(quantization | {"rank": rank, "skip_refiners": skip_refiners}),
        "config": json.dumps(diffusers_config(config), indent=2),
        "comfy_config": "{}",
    }


class StreamedFile:
    """A safetensors file written tensor by tensor, in any order, which gets its name only when complete.

    A context manager: leaving it normally checks that every planned tensor was written, flushes the file to
    the disk and renames it; leaving it by an exception removes the temporary file, unless the file is resumable
    and a section of it is finished. A later one with the same header and metadata then goes on from there.
    """

    def __init__(self, path: Path, header: Header, metadata: Mapping[str, str], resumable: bool = False):
        """Reserve the whole file. ValueError if the folder is missing, not writable or too full."""
        self.path = path
        self.header = header
        self.partial = path.with_name(path.name + ".partial")
        self.notes = path.with_name(path.name + ".partial.notes")  # for the caller's own use, removed at the end
        self.finished: list[str] = []
        self._record = path.with_name(path.name + ".partial.finished")
        self._resumable = resumable
        self._missing = set(header)
        encoded, self._offsets, self.size = _encode_header(header, metadata)
        if path.is_dir():
            raise ValueError(f"{path}: expected a file to write, found a folder; name a .safetensors file in it")
        if resumable and self._is_continued(encoded):
            self._file = self.partial.open("r+b")
            for section in self._record.read_text(encoding="utf-8").splitlines():
                self._mark(section)
            return
        try:
            self._file = self.partial.open("w+b")
        except OSError as error:
            raise ValueError(f"{path}: cannot write ({error.strerror}); choose another folder") from error
        try:
            self._record.unlink(missing_ok=True)
            _reserve(self._file.fileno(), self.size)
            self._file.write(encoded)
        except OSError as error:
            self._discard()
            raise self._no_space(error) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place. ValueError if it is not planned, misshapen or of another dtype."""
        dtype, shape = self.header.get(name, (None, None))
        found = next((name for name, kind in DTYPES.items() if kind == tensor.dtype), str(tensor.dtype))
        if (found, tuple(tensor.shape)) != (dtype, shape):
            expected = f"{dtype} {list(shape)}" if dtype else "no such tensor"
            raise ValueError(f"{self.path}: {name}: expected {expected}, found {found} {list(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            self._file.seek(self._offsets[name])
            self._file.write(data)
        except OSError as error:
            raise self._no_space(error) from error
        self._missing.discard(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor that was written, by this object or before it was resumed."""
        dtype, shape = self.header[name]
        self._file.seek(self._offsets[name])
        data = bytearray(self._file.read(ITEM_SIZE[dtype] * math.prod(shape)))
        return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)

    def finish(self, section: str) -> None:
        """Record that all quantized linears whose names start with `section` and a dot are on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            with self._record.open("a", encoding="utf-8") as record:
                record.write(section + "\n")
        except OSError as error:
            raise self._no_space(error) from error
        self._mark(section)

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            if self._resumable and self.finished:
                self._file.close()
            else:
                self._discard()
            return
        try:
            if self._missing:
                raise ValueError(f"{self.path}: {len(self._missing)} tensors missing: {min(self._missing)}")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
        finally:
            self._discard()

    def _is_continued(self, encoded: bytes) -> bool:
        """Whether an earlier run left a file for the same header, that is with the same settings and source."""
        if not (self.partial.is_file() and self._record.is_file() and self.partial.stat().st_size == self.size):
            return False
        with self.partial.open("rb") as file:
            return file.read(len(encoded)) == encoded

    def _mark(self, section: str) -> None:
        self.finished.append(section)
        self._missing = {name for name in self._missing if not name.startswith(section + ".")}

    def _discard(self) -> None:
        self._file.close()
        for path in (self.partial, self._record, self.notes):
            path.unlink(missing_ok=True)

    def _no_space(self, error: OSError) -> ValueError:
        needed = f"{self.size / 2**30:.1f} GiB"
        return ValueError(f"{self.path}: {error.strerror}; free {needed} there or choose another folder")


def _check_packable(config: ZImageConfig, rank: int) -> None:
    for name, (n, k) in quantized_linears(config).items():
        if n % 128 or k % 128:
            raise ValueError(f"{name}: expected multiples of 128, found {n} x {k}; it cannot be packed")
        if rank < 16 or rank % 16 or rank > min(n, k):
            raise ValueError(f"rank: expected a multiple of 16 up to {min(n, k)}, found {rank}; try 32")


def _encode_header(header: Header, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Length and JSON of the header -> (bytes, each tensor's absolute offset, size of the whole file)."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    relative, position = {}, 0
    for name, (dtype, shape) in header.items():
        size = ITEM_SIZE[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        relative[name] = position
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + at for name, at in relative.items()}
    return struct.pack("<Q", len(text)) + text, offsets, start + position


def _reserve(descriptor: int, size: int) -> None:
    """Claim the space at once where the file system can: a full disk shows before the work, not after it."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, size)
