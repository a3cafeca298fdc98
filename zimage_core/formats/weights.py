"""Which tensors of a file make up a weight, in which form, and its parts as `stored.py` takes them.

Safetensors hold plain floats, ComfyUI's FP8 (older and newer naming) and NVFP4, ModelOpt's NVFP4, and quanto's INT8;
GGUF files hold ggml's blocks. ComfyUI's and ModelOpt's NVFP4 have the same names and, since Qwen3-4B's widths fill
ComfyUI's tiles of scales, the same shapes, but lie differently; so a file must say which it is, as the published ones
do (`.comfy_quant` on every layer of Comfy-Org's qwen_3_4b_fp4_mixed and fp8_mixed, `quantization_config` in a
config.json of ModelOpt's).

Source: comfy/utils.py `convert_old_quants`, comfy/ops.py, comfy/float.py `to_blocked` and QUANTIZATION.md of
Comfy-Org/ComfyUI@783545f6; qtensor/nvfp4_tensor.py@211c6b34 and export/convert_hf_config.py@0030d2b3 of
NVIDIA/Model-Optimizer; optimum-quanto 0.2.7 (tensor/weights/qbytes.py).
Legend: N out, K in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sizes import round_up
from .gguf import QUANTIZED
from .identify import FLOATS
from .safetensors import Shape, TensorFiles
from .stored import FORMS

READ = "BF16, F16, F32, ComfyUI's FP8 or NVFP4, or quanto INT8"
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_MAIN = ("weight", "weight._data", "weight._data._data")
_SCALES = ("weight_scale", "scale_weight", "weight_scale_2", "weight._scale")
_UNUSED = ("weight._shift", "comfy_quant", "input_scale", "output_scale", "scale_input", "k_scale", "v_scale")
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, (*_MAIN, *_SCALES, *_UNUSED)))})")
_MARK = "scaled_fp8"


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
    if stored.form in QUANTIZED or "codes" not in raw:
        return parts
    n, k = stored.shape
    if stored.form != "int8":
        parts["codes"] = raw["codes"].view(torch.uint8)
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
                form = "float" if dtype in FLOATS else dtype
                found[key] = Stored(form, shape, {"codes" if dtype in QUANTIZED else "weight": key})
        described = self._described(layers)
        return found | {f"{layer}.weight": self._weight(keys, described.get(layer)) for layer, keys in layers.items()}

    def _described(self, layers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """ComfyUI's name for each quantized layer's form, from the file's metadata and the layers' own JSON."""
        found: dict[str, object] = {}
        if text := self.files.metadata.get("_quantization_metadata"):
            where = "_quantization_metadata"
            described = self._json(text, where).get("layers")
            if not isinstance(described, dict):
                self._refuse(where, "layers", "none")
            found |= described
        for layer, keys in layers.items():
            if key := keys.get("comfy_quant"):
                found[layer] = self._json(bytes(self.files.get(key).flatten().view(torch.uint8).tolist()), key)
        formats = {}
        for layer, info in found.items():
            form = info.get("format") if isinstance(info, dict) else info
            if form not in (*FP8.values(), "nvfp4"):
                self._refuse(layer, "float8_e4m3fn, float8_e5m2 or nvfp4", form)
            formats[layer] = form
        return formats

    def _weight(self, keys: Mapping[str, str], comfy: str | None) -> Stored:
        """The form of one layer from the keys it has."""
        mains = [suffix for suffix in _MAIN if suffix in keys]
        if len(mains) != 1:
            found = "several forms of it" if mains else "none"
            self._refuse(next(iter(keys.values())), "its weight once beside it", found)
        main = mains[0]
        key = keys[main]
        dtype, shape = self.tensors[key]
        scales = [suffix for suffix in _SCALES if suffix in keys]
        if dtype in FLOATS:
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
        form = comfy if dtype == "U8" else FP8.get(dtype)
        if main == "weight" and form in FP8.values() and comfy in (None, form) and "weight_scale_2" not in scales:
            parts = {"codes": key}
            if scales:
                parts["scale"] = self._part(keys, scales[0], each)
            return Stored(str(form), shape, parts)
        self._refuse(key, f"{comfy} as described" if comfy else READ, f"{dtype} of shape {shape}")

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
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self._refuse(where, "a JSON object", "otherwise")
        return found

    def _refuse(self, key: str, expected: str, found: object) -> NoReturn:
        raise ValueError(f"{self.files.path}: {key}: expected {expected}, found {found}; {self.remedy}")
