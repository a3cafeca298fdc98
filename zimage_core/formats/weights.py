"""Which tensors of a file make up a weight, in which form, and its parts as `stored.py` takes them.

Safetensors hold plain floats, ComfyUI's FP8 (older and newer naming), MXFP8, NVFP4, INT8 and rotated forms (ConvRot),
ModelOpt's NVFP4, and quanto's INT8; GGUF files hold ggml's blocks. ComfyUI's and ModelOpt's NVFP4 have the same names
and, since Qwen3-4B's widths fill ComfyUI's tiles of scales, the same shapes, but lie differently; so a file must say
which it is, as the published ones do (`.comfy_quant` on every layer of Comfy-Org's qwen_3_4b_fp4_mixed and fp8_mixed,
`quantization_config` in a config.json of ModelOpt's).

Source: comfy/utils.py `convert_old_quants`, comfy/ops.py, comfy/float.py `to_blocked` and QUANTIZATION.md of
Comfy-Org/ComfyUI@783545f6; qtensor/nvfp4_tensor.py@211c6b34 and export/convert_hf_config.py@0030d2b3 of
NVIDIA/Model-Optimizer; optimum-quanto 0.2.7 (tensor/weights/qbytes.py).
Legend: N out, K in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sizes import round_up
from . import kitchen
from .gguf import QUANTIZED
from .identify import FLOATS
from .safetensors import Shape, TensorFiles, read_object
from .stored import FORMS

READ = "BF16, F16, F32, ComfyUI's FP8, NVFP4 or INT8, or quanto INT8"
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_MAIN = ("weight", "weight._data", "weight._data._data")
_SCALES = ("weight_scale", "scale_weight", "weight_scale_2", "weight._scale", "weight_s_rel")
_MORE = ("weight_s_channel", "weight_codebook")  # beside weight_s_rel
_UNUSED = ("weight._shift", "comfy_quant", "input_scale", "output_scale", "scale_input", "k_scale", "v_scale")
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, (*_MAIN, *_SCALES, *_MORE, *_UNUSED)))})")
_MARK = "scaled_fp8"
COMFY = (*FP8.values(), "mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")
"""ComfyUI's names of forms that are read."""


@dataclass(frozen=True)
class Stored:
    """A tensor or weight in a file: its form, its own shape, and where its parts are (part -> key).

    form: a name that `stored.dequantize` knows, or the dtype of a tensor that is no weight and no float.
    plain: NVFP4 as ModelOpt has it, the earlier column in the low nibble and the scales in rows.
    """

    form: str
    shape: Shape
    keys: Mapping[str, str]
    plain: bool = False

    @property
    def key(self) -> str:
        """The tensor that holds the values."""
        return next(iter(self.keys.values()))


def find_weights(files: TensorFiles, remedy: str) -> dict[str, Stored]:
    """Every tensor of an open file by name, those that make up a quantized weight as one, `X.weight`.

    ValueError, ending in the remedy, where the tensors of a weight do not fit together or their form is not read.
    """
    return _Finder(files, remedy).found()


def read_parts(files: TensorFiles, stored: Stored) -> dict[str, Tensor]:
    """The parts of a weight, one row each per row of the weight; what needs no change stays memory-mapped."""
    raw = {part: files.get(key) for part, key in stored.keys.items()}
    return row_parts(stored, raw)


def row_parts(stored: Stored, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts as a file has them -> parts with one row each per row of the weight."""
    parts = dict(raw)
    if "codes" not in raw:
        return parts
    n, k = stored.shape
    if stored.form in QUANTIZED:  # rows of another length may have been blocked (`comfy.gguf.orig_shape`)
        return {"codes": raw["codes"].reshape(n, -1)}
    if raw["codes"].dtype is not torch.int8:
        parts["codes"] = raw["codes"].view(torch.uint8)
    if stored.form == "mxfp8":
        return parts | {"block_scale": _unblocked(raw["block_scale"].view(torch.uint8), n, k // 32)}
    if kitchen.knows(stored.form):
        parts["codes"] = raw["codes"].view(torch.int8)
        if "block_scale" in raw:
            parts["block_scale"] = raw["block_scale"].view(torch.uint8)
        if "codebook" in raw:
            parts["codebook"] = raw["codebook"].float().reshape(1, -1).repeat(n, 1)
    if stored.form == "nvfp4":
        scales = raw["block_scale"].view(torch.uint8)
        parts["block_scale"] = scales if stored.plain else _unblocked(scales, n, k // 16)
        if stored.plain:
            parts["codes"] = parts["codes"] << 4 | parts["codes"] >> 4
    scale = raw.get("scale", torch.ones(()))
    parts["scale"] = scale.reshape(-1, 1).expand(n, 1).contiguous()
    return parts


def blocked(scales: Tensor) -> Tensor:
    """Scales (R, C) in the order of NVIDIA's tensor cores: tiles of 128 x 4, padded, shape as padded.

    In a tile, 32 rows of 16: row r holds the four scales of rows r, 32 + r, 64 + r and 96 + r.
    """
    rows, columns = scales.shape
    padded = F.pad(scales, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // 4, 4)  # tile row, quarter, row, tile column, column
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape)


def _unblocked(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `blocked`."""
    split = tiles.reshape(tiles.shape[0] // 128, tiles.shape[1] // 4, 32, 4, 4)
    return split.permute(0, 3, 2, 1, 4).reshape(tiles.shape)[:rows, :columns].contiguous()


class _Finder:
    """The tensors of one file, put together layer by layer."""

    def __init__(self, files: TensorFiles, remedy: str):
        self.files = files
        self.tensors = files.tensors
        self.remedy = remedy

    def found(self) -> dict[str, Stored]:
        layers: dict[str, dict[str, str]] = {}
        found = {}
        for key, (dtype, shape) in self.tensors.items():
            if match := _KEY.fullmatch(key):
                layers.setdefault(match[1], {})[match[2]] = key
            elif key != _MARK:
                form = "float" if dtype in FLOATS or dtype in FP8 else dtype
                found[key] = Stored(form, shape, {"codes" if dtype in QUANTIZED else "weight": key})
        described = self._described(layers)
        return found | {
            f"{layer}.weight": self._weight(keys, described.get(layer, {})) for layer, keys in layers.items()
        }

    def _described(self, layers: Mapping[str, Mapping[str, str]]) -> dict[str, dict]:
        """ComfyUI's description of each quantized layer's form, from the file's metadata and the layers' own JSON."""
        found: dict[str, object] = {}
        if text := self.files.metadata.get("_quantization_metadata"):
            where = "_quantization_metadata"
            described = self._json(text, where).get("layers")
            if not isinstance(described, dict):
                self._refuse(where, "layers", "none")
            found |= {layer.removeprefix(self.files.prefix): info for layer, info in described.items()}
        for layer, keys in layers.items():
            if key := keys.get("comfy_quant"):
                found[layer] = self._json(bytes(self.files.get(key).flatten().view(torch.uint8).tolist()), key)
        formats = {}
        for layer, info in found.items():
            described = info if isinstance(info, dict) else {"format": info}
            if described.get("format") not in COMFY:
                self._refuse(layer, f"one of {', '.join(COMFY)}", described.get("format"))
            params = described.get("params")
            formats[layer] = (params if isinstance(params, dict) else {}) | described
        return formats

    def _weight(self, keys: Mapping[str, str], described: Mapping[str, Any]) -> Stored:
        """The form of one layer from the keys it has and what the file says of it."""
        comfy = described.get("format")
        mains = [suffix for suffix in _MAIN if suffix in keys]
        if len(mains) != 1:
            found = "several forms of it" if mains else "none"
            self._refuse(next(iter(keys.values())), "its weight once beside it", found)
        main = mains[0]
        key = keys[main]
        dtype, shape = self.tensors[key]
        scales = [suffix for suffix in _SCALES if suffix in keys]
        if dtype in FLOATS or (dtype in FP8 and len(shape) != 2):
            if main == "weight" and not scales:
                return Stored("float", shape, {"weight": key})
            self._refuse(key, f"FP8 because of its .{scales[0]}" if scales else READ, dtype)
        if dtype in QUANTIZED:
            self._check_block_type(key, dtype)
            return Stored(dtype, shape, {"codes": key})
        if len(shape) != 2 or 0 in shape:
            self._refuse(key, READ, f"{dtype} of shape {shape}")
        one, each = ((), (1,), (1, 1)), ((), (1,), (1, 1), shape[:1], (shape[0], 1))
        if main == "weight._data" and dtype in ("I8", *FP8):
            parts = {"codes": key, "scale": self._part(keys, "weight._scale", each)}
            return Stored(FP8.get(dtype, "int8"), shape, parts)
        plain = comfy is None and "weight_scale_2" in scales
        if plain and not self._by_modelopt():
            expected = "ComfyUI's .comfy_quant beside it or ModelOpt's config.json to tell the layouts of NVFP4 apart"
            self._refuse(keys["weight_scale_2"], expected, "neither")
        if (plain or comfy == "nvfp4") and dtype == "U8" and shape[1] % 8 == 0:
            n, blocks = shape[0], shape[1] // 8
            tiled = (round_up(n, 128), round_up(blocks, 4))  # padded, see `_unblocked`
            parts = {
                "codes": key,
                "block_scale": self._part(keys, "weight_scale", ((n, blocks) if plain else tiled,), ("F8_E4M3", "U8")),
                "scale": self._part(keys, "weight_scale_2", one),
            }
            return Stored("nvfp4", (n, 2 * shape[1]), parts, plain)
        if main == "weight" and (stored := self._by_comfyui(keys, described, one, each)):
            return stored
        form = comfy if dtype == "U8" else FP8.get(dtype)
        if main == "weight" and form in FP8.values() and comfy in (None, form) and "weight_scale_2" not in scales:
            parts = {"codes": key}
            if scales:
                parts["scale"] = self._part(keys, scales[0], each)
            return Stored(str(form), shape, parts)
        expected = f"{comfy} as described" if comfy else READ
        if dtype == "I8":
            expected = "ComfyUI's .comfy_quant beside it, which says how INT8 is meant"
        self._refuse(key, expected, f"{dtype} of shape {shape}")

    def _by_comfyui(
        self,
        keys: Mapping[str, str],
        described: Mapping[str, Any],
        one: tuple[Shape, ...],
        each: tuple[Shape, ...],
    ) -> Stored | None:
        """MXFP8, INT8 and the rotated forms as ComfyUI stores them; None for every other form."""
        comfy, key = described.get("format"), keys["weight"]
        dtype, (n, columns) = self.tensors[key]
        if comfy == "mxfp8" and dtype in ("F8_E4M3", "U8") and columns % 32 == 0:
            tiled = (round_up(n, 128), round_up(columns // 32, 4))
            scale = self._part(keys, "weight_scale", (tiled,), ("F8_E8M0", "U8"))
            return Stored(comfy, (n, columns), {"codes": key, "block_scale": scale})
        if dtype != "I8" or comfy not in ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"):
            return None
        rotated = comfy != "int8_tensorwise" or described.get("convrot")
        if not rotated:
            return Stored("int8", (n, columns), {"codes": key, "scale": self._part(keys, "weight_scale", each)})
        size = self._number(key, described, "convrot_groupsize", 256)
        if comfy == "asym_w4a8_int8":
            group = self._number(key, described, "group_size", 16)
            _, relative = self.tensors.get(keys.get("weight_s_rel", ""), ("", ()))
            if len(relative) != 2:
                self._refuse(keys.get("weight_s_rel", key), f"scales of shape ({n}, groups)", relative or "none")
            groups = relative[1]
            k = groups * group
            shapes = ((n, k // 2), (n, k // 4 * 3))
            if k == 0 or (n, columns) not in shapes:
                self._refuse(key, f"shape {shapes[0]} beside its .weight_s_rel", f"{(n, columns)}")
            parts = {
                "codes": key,
                "block_scale": self._part(keys, "weight_s_rel", ((n, groups),), ("F8_E4M3", "U8")),
                "scale": self._part(keys, "weight_s_channel", ((n,),)),
            }
            if "weight_codebook" in keys:
                parts["codebook"] = self._part(keys, "weight_codebook", ((16,),))
            form = f"{comfy} {group} {size}"
        else:
            k = columns if comfy == "int8_tensorwise" else 2 * columns
            parts = {"codes": key, "scale": self._part(keys, "weight_scale", each)}
            form = f"{'int8_convrot' if comfy == 'int8_tensorwise' else comfy} {size}"
        if size not in kitchen.ROTATIONS or k % size:
            self._refuse(key, f"a convrot_groupsize that is a power of 4 and divides {k}", size)
        if reason := kitchen.missing():
            raise ValueError(f"{self.files.path}: {key}: {comfy} {reason}, or {self.remedy}")
        return Stored(form, (n, k), parts)

    def _number(self, key: str, described: Mapping[str, Any], name: str, default: int) -> int:
        """A positive integer of a layer's description."""
        found = described.get(name, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            self._refuse(key, f"a positive integer as {name}", found)
        return found

    def _part(
        self, keys: Mapping[str, str], suffix: str, shapes: tuple[Shape, ...], dtypes: tuple[str, ...] = FLOATS
    ) -> str:
        """The key of a weight's scale, of one of these shapes and dtypes."""
        key = keys.get(suffix)
        if key is None:
            self._refuse(next(iter(keys[main] for main in _MAIN if main in keys)), f".{suffix} beside it", "none")
        dtype, shape = self.tensors[key]
        if dtype not in dtypes or shape not in shapes:
            expected = f"{' or '.join(dtypes)} of shape {' or '.join(map(str, dict.fromkeys(shapes)))}"
            self._refuse(key, expected, f"{dtype} of shape {shape}")
        return key

    def _check_block_type(self, key: str, dtype: str) -> None:
        """ValueError for a GGUF type that even the `gguf` package cannot dequantize."""
        if dtype in FORMS:
            return
        try:
            import gguf
            import numpy
        except ImportError:
            where = f"{self.files.path}: {key}"
            raise ValueError(f"{where}: {dtype} needs the gguf package; pip install gguf, or {self.remedy}") from None
        try:
            gguf.quants.dequantize(numpy.zeros((1, QUANTIZED[dtype][1]), numpy.uint8), gguf.GGMLQuantizationType[dtype])
        except (NotImplementedError, KeyError):
            self._refuse(key, "a readable GGUF type", f"{dtype}; get the Q8_0 or Q4_K_M file")

    def _by_modelopt(self) -> bool:
        """Whether the config says that NVIDIA's ModelOpt quantized the model."""
        found = self._json(self.files.metadata.get("config", "{}"), "config").get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == "modelopt"

    def _json(self, text: str | bytes, where: str) -> dict:
        return read_object(text, f"{self.files.path}: {where}", self.remedy)

    def _refuse(self, key: str, expected: str, found: object) -> NoReturn:
        raise ValueError(f"{self.files.path}: {key}: expected {expected}, found {found}; {self.remedy}")
