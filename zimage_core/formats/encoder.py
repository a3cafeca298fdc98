"""Text encoder files: their sizes, from a config, metadata or shapes, and the strict load.

Source: transformers/models/qwen3/configuration_qwen3.py@v5.23.0.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..linear.adapters import Linear
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from .gguf import GGUFFile
from .identify import EXPECTED, FORMATS, identify, open_part
from .load import Sources, expected_tensors, fill, match_tensors
from .names import encoder_tensor
from .safetensors import TensorFiles, read_object
from .stored import HostEmbedding, StoredLinear, choose_arithmetic
from .weights import READ, Stored, find_weights

ENCODER_REMEDY = EXPECTED["text encoder"][1]
_READ_FORMATS = ("quanto-int8", "nvfp4")  # of those that identify knows by name; the others are refused
HEADS = "num_attention_heads"
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


def config_from_json(data: Mapping, where: str) -> TextEncoderConfig:
    """Sizes from the config of a transformers Qwen3 model; ValueError where it asks for what this body lacks."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(data.get(name), dict | None):
            raise ValueError(f"{where}: {name}: expected a JSON object, found {data[name]!r}; {ENCODER_REMEDY}")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    fixed = {
        "model_type": (data.get("model_type", "qwen3"), "qwen3"),
        "hidden_act": (data.get("hidden_act", "silu"), "silu"),
        "attention_bias": (data.get("attention_bias", False), False),
        "use_sliding_window": (data.get("use_sliding_window", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for name, (found, expected) in fixed.items():
        if found != expected:
            raise ValueError(f"{where}: {name}: expected {expected!r}, found {found!r}; {ENCODER_REMEDY}")
    if rope.get("rope_theta") is not None:
        data = {**data, "rope_theta": rope["rope_theta"]}

    left_out = {name for name in ("num_key_value_heads", "head_dim", "rope_theta") if data.get(name) is None}
    sizes = {name: data[name] for name in TextEncoderConfig.__dataclass_fields__ if name in data.keys() - left_out}
    layers = data.get("num_hidden_layers")
    sizes["num_layers"] = layers - 1 if type(layers) is int else layers
    sizes |= {name: data.get(name) for name in ("vocab_size", "hidden_size", "intermediate_size", HEADS)}
    return _checked_config(where, **{"num_key_value_heads": sizes[HEADS], **sizes})


def config_from_shapes(weights: Mapping[str, Stored], where: str) -> TextEncoderConfig:
    """Sizes from the shapes of weights named without `model.`; all N layers are taken to be there."""

    def rows(name: str, axes: int = 2) -> tuple[int, ...]:
        shape = weights[name].shape if name in weights else ()
        if len(shape) != axes or 0 in shape:
            raise ValueError(f"{where}: {name}: expected {axes} axes, found shape {shape or None}; {ENCODER_REMEDY}")
        return shape

    vocab_size, hidden_size = rows("embed_tokens.weight")
    (head_dim,) = rows("layers.0.self_attn.q_norm.weight", axes=1)
    indices = [int(name.split(".")[1]) for name in weights if re.match(r"layers\.\d{1,9}\.", name)]
    return _checked_config(
        where,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=rows("layers.0.mlp.gate_proj.weight")[0],
        num_layers=max(indices),
        num_attention_heads=rows("layers.0.self_attn.q_proj.weight")[0] // head_dim,
        num_key_value_heads=rows("layers.0.self_attn.k_proj.weight")[0] // head_dim,
        head_dim=head_dim,
    )


def _checked_config(where: str, **sizes) -> TextEncoderConfig:
    try:
        return TextEncoderConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; {ENCODER_REMEDY}") from None


@dataclass(frozen=True)
class EncoderFile:
    """An open text encoder file: its weights under transformers' names without `model.`, and its sizes."""

    files: TensorFiles
    weights: Mapping[str, Stored]
    data: Mapping[str, Any] | None  # transformers' config, where the file brought one
    config: TextEncoderConfig

    def match(self) -> Sources:
        """Where each weight that a TextEncoder needs is; ValueError as `load.match_tensors`.

        Tensors that Qwen3 has and this body does not need (later layers, final norm, head) may be there or not.
        """
        with torch.device("meta"):
            body = TextEncoder(self.config, StoredLinear, HostEmbedding)
        later = {re.sub(r"^layers\.0\.", "", name) for name in expected_tensors(body)}
        later |= {"norm.weight", "lm_head.weight"}

        def unneeded(name: str) -> bool:
            return re.sub(r"^layers\.\d+\.", "", name) in later or "rotary_emb" in name

        return match_tensors(
            self.files, self.weights, body, lambda name: (name, None), ENCODER_REMEDY, unneeded, "Qwen3"
        )


@contextmanager
def open_encoder(path: str | Path) -> Iterator[EncoderFile]:
    """The encoder in a safetensors or GGUF file, a transformers folder, or a whole diffusers model.

    MissingFile, or ValueError where the file is something else, is damaged, or stores weights in a form not read.
    """
    path = Path(path)
    path = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    with open_part(path, "text encoder") as files:
        found = identify(files)
        found.require("text encoder")
        form = found.form
        if form.id in {row[0] for row in FORMATS} - set(_READ_FORMATS):
            raise ValueError(f"{path}: {form.key}: expected {READ}, found {form.words}; {ENCODER_REMEDY}")
        weights = {encoder_tensor(key)[0]: one for key, one in find_weights(files, ENCODER_REMEDY).items()}
        data = _gguf_config(files, weights) if isinstance(files, GGUFFile) else _config(files.metadata, str(path))
        q_norm = "layers.0.self_attn.q_norm.weight"
        if "layers.0.self_attn.q_proj.weight" in weights and q_norm not in weights:
            without = "Qwen2, Llama or the like without it"
            raise ValueError(f"{path}: {q_norm}: expected Qwen3, found {without}; {ENCODER_REMEDY}")
        config = config_from_shapes(weights, str(path)) if data is None else config_from_json(data, str(path))
        yield EncoderFile(files, weights, data, config)


def load_text_encoder(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    compute_device: str | torch.device | None = None,
) -> TextEncoder:
    """Qwen3 encoder from a transformers folder (sharded or not), one safetensors file or a GGUF file, for inference.

    The sizes come from config.json or the file's metadata, else from the shapes; names may begin with `model.`;
    dtype, in which it computes, is bf16 unless given; compute_device is where it will run, if its weights wait
    elsewhere. Weights that are stored small (see `stored`) stay so.
    Tensors go to the device one at a time (on the CPU, where nothing is to be converted, they stay memory-mapped);
    the token table stays on the host, and what lies past the hidden state that is needed is not read. Raises
    ValueError for other models and stored forms, and for missing, misshapen or unknown tensors.
    """
    dtype = dtype or torch.bfloat16
    with open_encoder(path) as file:
        sources = file.match()
        layers = [stored for name, stored in sources.stored.items() if not name.startswith("embed_tokens.")]
        linear = Linear if all(one.form == "float" for stored in layers for one in stored) else StoredLinear
        with torch.device("meta"):
            encoder = TextEncoder(file.config, linear, HostEmbedding)
        fill(encoder, sources, device, dtype, copy=False)
        choose_arithmetic(encoder, torch.device(compute_device or device), dtype)
    return encoder


def check_text_encoder(path) -> tuple[TextEncoderConfig, Mapping[str, Stored]]:
    """The sizes and the stored form of every weight of an encoder, from headers alone.

    ValueError unless load_text_encoder would take the file or folder.
    """
    with open_encoder(path) as file:
        file.match()
        return file.config, file.weights


def check_width(found: int, wanted: int, encoder: Path | str, model: Path | str) -> None:
    """ValueError unless a text encoder's features are as wide as a model's captions."""
    if found != wanted:
        raise ValueError(
            f"{encoder}: expected a text encoder of width {wanted}, as {model} takes, found {found}; use the encoder "
            f"that the model was made for, or {ENCODER_REMEDY}"
        )


def _config(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    """The config of transformers in a file's metadata, plain or, as mmgp writes it, in base64; None without one."""
    text: str | bytes | None = metadata.get("config")
    if not text and (encoded := metadata.get("config_base64")) is not None:
        try:
            text = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            message = f"{where}: config_base64: expected base64, found otherwise ({error}); {ENCODER_REMEDY}"
            raise ValueError(message) from None
    return read_object(text, f"{where}: config", ENCODER_REMEDY) if text else None


def _gguf_config(files: GGUFFile, weights: Mapping[str, Stored]) -> dict[str, Any]:
    """The sizes in a GGUF file's metadata as a transformers config; ValueError for other architectures."""
    fields = files.fields
    kind = fields.get("general.architecture")
    if kind != "qwen3":
        raise ValueError(f"{files.path}: architecture: expected qwen3, found {kind}; {ENCODER_REMEDY}")
    found = {name: fields.get(f"{kind}.{key}") for name, key in _GGUF_SIZES.items()}
    embedding = weights.get("embed_tokens.weight")
    scaling = fields.get(f"{kind}.rope.scaling.type", "default")
    found["vocab_size"] = embedding.shape[0] if embedding else None
    found["rope_scaling"] = {"rope_type": "default" if scaling == "none" else scaling}
    return {"model_type": kind, **{name: value for name, value in found.items() if value is not None}}
