"""Text encoder files in their small forms: read, kept small in memory, dequantized layer by layer at use.

Every stored form becomes a few tensors, its parts, that all have one row per row of the weight: a Linear can then be
dequantized in slices of rows, and an embedding row by row without the rest of its table. One function per form turns
rows of parts into rows of fp32 weights. Safetensors hold plain floats, ComfyUI's FP8 (older and newer naming) and
NVFP4, ModelOpt's NVFP4, and quanto's INT8; GGUF files are read through the `gguf` package.

ComfyUI's and ModelOpt's NVFP4 have the same names and, since Qwen3-4B's widths fill ComfyUI's tiles of scales, the same
shapes, but lie differently; so a file must say which it is, as the published ones do (`.comfy_quant` on every layer of
Comfy-Org's qwen_3_4b_fp4_mixed and fp8_mixed, `quantization_config` in a config.json of ModelOpt's).

Source: comfy/utils.py `convert_old_quants`, comfy/ops.py, comfy/float.py `to_blocked` and QUANTIZATION.md of
Comfy-Org/ComfyUI@783545f6; qtensor/nvfp4_tensor.py@211c6b34 and export/convert_hf_config.py@0030d2b3 of
NVIDIA/Model-Optimizer; optimum-quanto 0.2.7 (tensor/weights/qbytes.py) and the metadata of mmgp 3.8.2
(safetensors2.py); ggml-quants.c of ggml-org/llama.cpp by way of gguf 0.19 (quants.py).
Legend: N out, K in, n some of the N rows, S blocks of a row.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear.adapters import Adapter, Terms
from ..sizes import round_up
from .safetensors import open_tensors

ENCODER_REMEDY = "get Qwen3-4B in bf16 (the text_encoder folder of Z-Image-Turbo, or qwen_3_4b.safetensors)"
CHUNK = 2**22  # weights dequantized at once
FLOATS = ("BF16", "F16", "F32")
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_MAIN = ("weight", "weight._data", "weight._data._data")
_SCALES = ("weight_scale", "scale_weight", "weight_scale_2", "weight._scale")
_UNUSED = ("weight._shift", "comfy_quant", "input_scale", "output_scale", "scale_input", "k_scale", "v_scale")
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, (*_MAIN, *_SCALES, *_UNUSED)))})")
_READ = "BF16, F16, F32, ComfyUI's FP8 or NVFP4, or quanto INT8"
# What is refused by its tensors' names, other models before other forms: a pattern, what to call it, what is expected.
_REFUSED = (
    (r"(^|\.)encoder\.block\.\d+\.layer\.", "a T5 text encoder", "Qwen3"),
    (r"text_model\.encoder\.layers\.", "a CLIP text encoder", "Qwen3"),
    (r"(^|\.)(visual|vision_tower|vision_model)\.", "a vision-language model", "Qwen3"),
    (r"\.(proj_down|smooth_factor)$", "an SVDQuant transformer", "Qwen3"),
    (r"(^|\.)(noise_refiner|context_refiner|cap_embedder)\.", "a Z-Image transformer", "Qwen3"),
    (r"^decoder\.(up|up_blocks)\.", "a VAE", "Qwen3"),
    (r"\.mlp\.experts\.", "a mixture-of-experts model", "Qwen3"),
    (r"(pre|post)_feedforward_layernorm", "a Gemma model", "Qwen3"),
    (r"\.weight_scale_inv$", "FP8 scaled in blocks", _READ),
    (r"\.(weight_packed|weight_global_scale)$", "compressed-tensors weights", _READ),
    (r"\.(SCB|absmax|quant_map|weight\.quant_state.*)$", "bitsandbytes", _READ),
    (r"\.W_q$", "HQQ", _READ),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ", _READ),
    (r"\.weight\._data\._data$", "quanto INT4 or INT2", _READ),
)
_GGUF_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_OTHERS = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
# transformers' name of a size -> the key of GGUF's metadata after the architecture
_GGUF_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


# ---------------------------------------------------------------- the forms: rows of parts -> rows of weights


def _float(weight: Tensor) -> Tensor:
    return weight


def _int8(codes: Tensor, scale: Tensor) -> Tensor:
    """codes int8 (n, K), scale (n, 1)."""
    return codes.float() * scale.float()


def _fp8(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """codes: the bytes of FP8 values, uint8 (n, K), so that casting a module never casts them; scale fp32 (n, 1)."""
    return lambda codes, scale: codes.view(dtype).float() * scale.float()


def _nvfp4(codes: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """codes uint8 (n, K / 2), earlier column in the high nibble; block_scale FP8 bytes (n, K / 16); scale (n, 1)."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)
    values = torch.cat((magnitudes, -magnitudes))
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), -1)  # (256, 2): a byte's two values
    scales = block_scale.view(torch.float8_e4m3fn).float() * scale.float()
    rows = F.embedding(codes.int(), pairs).reshape(*scales.shape, 16)
    return (rows * scales.unsqueeze(-1)).flatten(1)


def _halves(blocks: Tensor) -> Tensor:
    """The fp16 numbers in bytes (n, S, 2 j) -> fp32 (n, S, j)."""
    return blocks.contiguous().view(torch.float16).float()


def _q8_0(codes: Tensor) -> Tensor:
    """Blocks of 32: fp16 scale, 32 int8."""
    blocks = codes.unflatten(1, (-1, 34))
    return (blocks[..., 2:].contiguous().view(torch.int8).float() * _halves(blocks[..., :2])).flatten(1)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K: 12 bytes (n, S, 12) -> two of fp32 (n, S, 8, 1)."""
    low, mid, high = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((low & 63, (high & 15) | (low >> 2 & 48)), -1)
    minima = torch.cat((mid & 63, (high >> 4) | (mid >> 2 & 48)), -1)
    return scales.float().unsqueeze(-1), minima.float().unsqueeze(-1)


def _nibbles(packed: Tensor, width: int) -> Tensor:
    """Bytes (n, S, j) -> 4-bit numbers (n, S, 2 j / width, width): of every `width` bytes, low nibbles come first."""
    runs = packed.unflatten(-1, (-1, width))
    return torch.stack((runs & 15, runs >> 4), -2).flatten(2, 3)


def _q4_k(codes: Tensor) -> Tensor:
    """Blocks of 256: fp16 scale of scales, of minima, 12 bytes of both, 128 bytes of nibbles."""
    blocks = codes.unflatten(1, (-1, 144))
    d, dmin = _halves(blocks[..., :4]).unsqueeze(-1).split(1, -2)  # (n, S, 1, 1)
    scales, minima = _k_scales(blocks[..., 4:16])
    return (d * scales * _nibbles(blocks[..., 16:], 32).float() - dmin * minima).flatten(1)


def _q5_k(codes: Tensor) -> Tensor:
    """Q4_K with 32 bytes of fifth bits before the nibbles."""
    blocks = codes.unflatten(1, (-1, 176))
    d, dmin = _halves(blocks[..., :4]).unsqueeze(-1).split(1, -2)
    scales, minima = _k_scales(blocks[..., 4:16])
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    fifth = (blocks[..., 16:48].unsqueeze(-2) >> shifts) & 1  # (n, S, 8, 32)
    q = _nibbles(blocks[..., 48:], 32) | fifth << 4
    return (d * scales * q.float() - dmin * minima).flatten(1)


def _q6_k(codes: Tensor) -> Tensor:
    """Blocks of 256: 128 bytes of low nibbles, 64 of upper bit pairs, 16 int8 scales, fp16 scale of scales."""
    blocks = codes.unflatten(1, (-1, 210))
    low, pairs, scales, d = blocks.split((128, 64, 16, 2), -1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    high = (pairs.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(2)  # (n, S, 256)
    q = (_nibbles(low, 64).flatten(2) | high << 4).float() - 32
    scales = _halves(d) * scales.contiguous().view(torch.int8).float()  # (n, S, 16)
    return (scales.unsqueeze(-1) * q.unflatten(-1, (16, 16))).flatten(1)


FORMS: dict[str, Callable[..., Tensor]] = {
    "float": _float,
    "int8": _int8,
    "float8_e4m3fn": _fp8(torch.float8_e4m3fn),
    "float8_e5m2": _fp8(torch.float8_e5m2),
    "nvfp4": _nvfp4,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def dequantize(form: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Rows of parts -> rows (n, K) of the weight, fp32 (a float weight: as it is).

    A GGUF type without a function here goes through the `gguf` package, on the CPU.
    """
    if form in FORMS:
        return FORMS[form](**parts)
    import gguf

    codes = parts["codes"]
    if codes.is_meta:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
        return torch.empty(len(codes), codes.shape[1] // size * block, device="meta")
    rows = gguf.quants.dequantize(codes.cpu().numpy(), gguf.GGMLQuantizationType[form])
    return torch.from_numpy(rows).to(codes.device)


class StoredWeight(nn.Module):
    """A weight (N, K) kept as the parts of its stored form, buffers with one row each per row of the weight."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype | None):
        super().__init__()
        self.shape = (rows, columns)
        self.dtype = dtype or torch.get_default_dtype()
        self.form = ""
        self.part_names: tuple[str, ...] = ()

    def load(self, form: str, parts: Mapping[str, Tensor]) -> None:
        """Take the parts of a stored form; a weight can be loaded once."""
        self.form, self.part_names = form, tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)

    def rows(self, index: slice | Tensor) -> Tensor:
        """The weight's rows at an index or slice, in fp32 or as stored."""
        return dequantize(self.form, {name: self.get_buffer(name)[index] for name in self.part_names})


class StoredLinear(StoredWeight):
    """A Linear without bias whose weight is dequantized, in slices of rows, whenever it is called."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, device=None, dtype=None):
        if bias:
            raise ValueError("StoredLinear: expected no bias, found bias=True; Qwen3 has none")
        super().__init__(out_features, in_features, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.register_module("adapter", None)

    def set_adapter(self, terms: Terms | None) -> None:
        """Carry these terms and no others."""
        self.adapter = Adapter(terms, self.out_features) if terms else None

    def dense_weight(self) -> Tensor:
        """The weight (N, K) in fp32."""
        return self.rows(slice(None)).float()

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return self._linear(x)
        return self.adapter(x.flatten(0, -2), self._linear, None).view(*x.shape[:-1], self.out_features)

    def _linear(self, x: Tensor) -> Tensor:
        n, k = self.shape
        weight = torch.empty(n, k, dtype=x.dtype, device=x.device)
        step = max(1, CHUNK // k)
        for start in range(0, n, step):
            weight[start : start + step] = self.rows(slice(start, start + step))
        return F.linear(x, weight)


class HostEmbedding(StoredWeight):
    """An embedding whose table stays on the host, mapped in its stored form; only the rows asked for are read."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, dtype)

    def _apply(self, fn, recurse=True):
        return self  # .to(device) leaves the table where it is

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (..., K) of ids (...), on the ids' device in the module's dtype."""
        rows = self.rows(ids.reshape(-1).cpu()).to(self.dtype)
        return rows.view(*ids.shape, -1).to(ids.device)


# ---------------------------------------------------------------- the files


@dataclass(frozen=True)
class Stored:
    """A weight in a file: its form, its own shape, and where its parts are (part -> key).

    plain: NVFP4 as ModelOpt has it, the earlier column in the low nibble and the scales in rows.
    """

    form: str
    shape: tuple[int, ...]
    keys: dict[str, str]
    plain: bool = False


class SafetensorsEncoder:
    """The weights of a safetensors file or folder under transformers' names without `model.`; a context manager."""

    def __init__(self, path: Path):
        self.where = str(path)
        self.files = open_tensors(path)
        self.paths = [header.path for header in self.files.headers]

    def __enter__(self) -> SafetensorsEncoder:
        self.files.__enter__()
        try:
            self.config = _config_text(self.files.metadata, self.where)
            self.weights, self.others = self._plan()
        except BaseException:
            self.files.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.files.__exit__(*exc)

    def read(self, name: str) -> dict[str, Tensor]:
        """The parts of a weight, one row each per row of the weight; plain bytes stay memory-mapped."""
        stored = self.weights[name]
        raw = {part: self.files.get(key) for part, key in stored.keys.items()}
        return _row_parts(stored, raw)

    def _plan(self) -> tuple[dict[str, Stored], set[str]]:
        """The weights, and the names that belong to none."""
        for pattern, found, expected in _REFUSED:
            if key := next(filter(re.compile(pattern).search, self.files.tensors), None):
                raise self._refuse(key, expected, found)
        layers: dict[str, dict[str, str]] = {}
        others = set()
        for key in self.files.tensors:
            name = key.removeprefix("model.")
            if match := _KEY.fullmatch(name):
                layers.setdefault(match[1], {})[match[2]] = key
            elif name != "scaled_fp8":
                others.add(name)
        formats = self._comfy_formats(layers)
        return {f"{layer}.weight": self._stored(keys, formats.get(layer)) for layer, keys in layers.items()}, others

    def _comfy_formats(self, layers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """ComfyUI's name for each quantized layer's form, from the file's metadata and the layers' own JSON."""
        found = {}
        if text := self.files.metadata.get("_quantization_metadata"):
            described = _json_object(text, f"{self.where}: _quantization_metadata").get("layers")
            if not isinstance(described, dict):
                raise ValueError(f"{self.where}: _quantization_metadata: expected layers, found none; {ENCODER_REMEDY}")
            found = {layer.removeprefix("model."): info for layer, info in described.items()}
        for layer, keys in layers.items():
            if key := keys.get("comfy_quant"):
                text = bytes(self.files.get(key).flatten().view(torch.uint8).tolist())
                found[layer] = _json_object(text, f"{self.where}: {key}")
        formats = {}
        for layer, info in found.items():
            form = info.get("format") if isinstance(info, dict) else info
            if form not in (*_FP8.values(), "nvfp4"):
                expected = "float8_e4m3fn, float8_e5m2 or nvfp4"
                raise ValueError(f"{self.where}: {layer}: expected {expected}, found {form}; {ENCODER_REMEDY}")
            formats[layer] = form
        return formats

    def _stored(self, keys: Mapping[str, str], comfy: str | None) -> Stored:
        """The form of one layer from the keys it has; ValueError unless its parts fit together."""
        header = self.files.tensors
        mains = [suffix for suffix in _MAIN if suffix in keys]
        if len(mains) != 1:
            found = "none" if not mains else "several forms of it"
            raise self._refuse(next(iter(keys.values())), "its weight once beside it", found)
        main = mains[0]
        key = keys[main]
        dtype, shape = header[key]
        scales = [suffix for suffix in _SCALES if suffix in keys]
        if main == "weight" and dtype in FLOATS and not scales:
            return Stored("float", shape, {"weight": key})
        if dtype in FLOATS:
            raise self._refuse(key, f"FP8 because of its .{scales[0]}" if scales else _READ, dtype)
        if len(shape) != 2 or 0 in shape:
            raise self._refuse(key, _READ, f"{dtype} of shape {shape}")
        one, each = ((), (1,), (1, 1)), ((), (1,), (1, 1), shape[:1], (shape[0], 1))

        def part(suffix: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...] = FLOATS) -> str:
            scale = keys.get(suffix)
            if scale is None:
                raise self._refuse(key, f".{suffix} beside it", "none")
            if header[scale][0] not in dtypes or header[scale][1] not in shapes:
                expected = f"{' or '.join(dtypes)} of shape {' or '.join(map(str, dict.fromkeys(shapes)))}"
                raise self._refuse(scale, expected, f"{header[scale][0]} of shape {header[scale][1]}")
            return scale

        if main == "weight._data" and dtype in ("I8", *_FP8):
            return Stored(_FP8.get(dtype, "int8"), shape, {"codes": key, "scale": part("weight._scale", each)})
        plain = comfy is None and "weight_scale_2" in scales
        if plain and not self._by_modelopt():
            expected = "ComfyUI's .comfy_quant beside it or ModelOpt's config.json to tell the layouts of NVFP4 apart"
            raise self._refuse(keys["weight_scale_2"], expected, "neither")
        if (plain or comfy == "nvfp4") and dtype == "U8" and shape[1] % 8 == 0:
            n, blocks = shape[0], shape[1] // 8
            tiled = (round_up(n, 128), round_up(blocks, 4))  # padded, see `_unblocked`
            parts = {
                "codes": key,
                "block_scale": part("weight_scale", ((n, blocks) if plain else tiled,), ("F8_E4M3", "U8")),
                "scale": part("weight_scale_2", one),
            }
            return Stored("nvfp4", (n, 2 * shape[1]), parts, plain)
        form = comfy if dtype == "U8" else _FP8.get(dtype)
        if main == "weight" and form in _FP8.values() and comfy in (None, form) and "weight_scale_2" not in scales:
            scale = {"scale": part(scales[0], each)} if scales else {}
            return Stored(form, shape, {"codes": key, **scale})
        raise self._refuse(key, f"{comfy} as described" if comfy else _READ, f"{dtype} of shape {shape}")

    def _by_modelopt(self) -> bool:
        """Whether the config says that NVIDIA's ModelOpt quantized the model."""
        found = _json_object(self.config or "{}", f"{self.where}: config").get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == "modelopt"

    def _refuse(self, key: str, expected: str, found: str) -> ValueError:
        return ValueError(f"{self.where}: {key}: expected {expected}, found {found}; {ENCODER_REMEDY}")


class GGUFEncoder:
    """The weights of a GGUF file under transformers' names without `model.`; a context manager."""

    def __init__(self, path: Path):
        self.where, self.paths = str(path), [path]
        try:
            import gguf
        except ImportError:
            raise ValueError(f"{path}: is a GGUF file, which needs the gguf package; pip install gguf") from None
        try:
            # Copy-on-write, because torch warns of read-only memory; nothing is written.
            self.reader = _gguf_reader(gguf)(path, "c")
        except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{path}: its GGUF data are damaged or cut off ({text}); download it again") from None
        if self.reader.byte_order == "S":
            raise ValueError(f"{path}: expected a little-endian GGUF file, found a big-endian one; download another")
        self.tensors = {_gguf_name(tensor.name): tensor for tensor in self.reader.tensors}
        self.others: set[str] = set()
        self.weights = {}
        for name, tensor in self.tensors.items():
            form = tensor.tensor_type.name
            self._check_form(name, form)
            shape = tuple(reversed(tensor.shape.tolist()))
            part = "weight" if form in FLOATS else "codes"
            self.weights[name] = Stored("float" if form in FLOATS else form, shape, {part: tensor.name})
        self.config = json.dumps(self._config())

    def __enter__(self) -> GGUFEncoder:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def read(self, name: str) -> dict[str, Tensor]:
        """The parts of a weight, memory-mapped, one row each per row of the weight."""
        tensor = self.tensors[name]
        data = torch.from_numpy(tensor.data)
        if tensor.tensor_type.name == "BF16":
            data = data.view(torch.bfloat16)
        return dict.fromkeys(self.weights[name].keys, data)

    def _check_form(self, name: str, form: str) -> None:
        """ValueError for a GGUF type that even the `gguf` package cannot dequantize."""
        import gguf
        import numpy

        if form in FLOATS or form in FORMS:
            return
        kind = gguf.GGMLQuantizationType[form]
        try:
            gguf.quants.dequantize(numpy.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), numpy.uint8), kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.where}: {name}: expected a readable GGUF type, found {form}; get the Q8_0 or Q4_K_M file"
            ) from None

    def _field(self, key: str):
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def _config(self) -> dict:
        """The sizes as a transformers config; ValueError for other architectures and for parts of a split file."""
        kind = self._field("general.architecture")
        if kind != "qwen3":
            raise ValueError(f"{self.where}: architecture: expected qwen3, found {kind}; {ENCODER_REMEDY}")
        if (self._field("split.count") or 1) > 1:
            raise ValueError(f"{self.where}: expected one GGUF file, found a part of a split one; merge its parts")
        found = {name: self._field(f"{kind}.{key}") for name, key in _GGUF_SIZES.items()}
        embedding = self.weights.get("embed_tokens.weight")
        found["vocab_size"] = embedding.shape[0] if embedding else None
        found["rope_scaling"] = {"rope_type": self._field(f"{kind}.rope.scaling.type") or "default"}
        if found["rope_scaling"]["rope_type"] == "none":
            found["rope_scaling"] = {"rope_type": "default"}
        return {"model_type": kind, **{name: value for name, value in found.items() if value is not None}}


def open_encoder(path: str | Path) -> SafetensorsEncoder | GGUFEncoder:
    """The encoder in a safetensors file or folder, or in a GGUF file; open it with `with`.

    FileNotFoundError, or ValueError where the file is neither, is damaged, or stores weights in another form.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return GGUFEncoder(path)
    return SafetensorsEncoder(path)


def _gguf_reader(gguf) -> type:
    """A GGUFReader that passes over arrays: the vocabulary's 300,000 strings would take seconds and are not used."""

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs, raw_type):
            if gguf.GGUFValueType(raw_type) != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            data = memoryview(self.data)
            kind, count = struct.unpack_from("<IQ", data, orig_offs)
            kind, end = gguf.GGUFValueType(kind), orig_offs + 12
            if kind == gguf.GGUFValueType.STRING:
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", data, end)[0]
            else:
                end += count * self.gguf_scalar_to_np[kind]().nbytes
            return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]

    return Reader


def _gguf_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight; unknown names stay as they are."""
    stem, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        return f"layers.{match[1]}.{_GGUF_LAYERS.get(match[2], match[2])}.{leaf}"
    return f"{_GGUF_OTHERS.get(stem, stem)}.{leaf}"


def _row_parts(stored: Stored, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts as a safetensors file has them -> parts with one row each per row of the weight."""
    if stored.form == "float":
        return dict(raw)
    n, k = stored.shape
    parts = dict(raw)
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


def _json_object(text: str | bytes, where: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, found otherwise; {ENCODER_REMEDY}")
    return found


def _config_text(metadata: Mapping[str, str], where: str) -> str | None:
    """The config of transformers in a file's metadata, plain or, as mmgp writes it, in base64; None without one."""
    if text := metadata.get("config"):
        return text
    if (encoded := metadata.get("config_base64")) is None:
        return None
    try:
        return base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as error:
        message = f"{where}: config_base64: expected base64, found otherwise ({error}); {ENCODER_REMEDY}"
        raise ValueError(message) from None
