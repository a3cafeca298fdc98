"""Text encoder files: the sizes that their config, metadata or shapes tell, and the strict load.

Source: transformers/models/qwen3/configuration_qwen3.py@v5.23.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..linear.adapters import Linear
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from .stored import ENCODER_REMEDY, HostEmbedding, Stored, StoredLinear, StoredWeight, open_encoder

# A number in transformers' config: its kind, and the largest that is built.
_NUMBERS = {
    "vocab_size": (int, 10**6),
    "hidden_size": (int, 10**5),
    "intermediate_size": (int, 10**6),
    "num_hidden_layers": (int, 1000),
    "num_attention_heads": (int, 10**4),
    "num_key_value_heads": (int, 10**4),
    "head_dim": (int, 10**4),
    "rope_theta": (float, 10**12),
    "rms_norm_eps": (float, 1),
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

    def number(name: str, default: float | None = None) -> float:
        return _number(name, default if data.get(name) is None else data[name], where)

    return _checked_config(
        where,
        vocab_size=number("vocab_size"),
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        num_layers=number("num_hidden_layers") - 1,
        num_heads=number("num_attention_heads"),
        num_kv_heads=number("num_key_value_heads", data["num_attention_heads"]),
        head_dim=number("head_dim", 128),
        rope_theta=number("rope_theta", 1e6),
        rms_norm_eps=_number("rms_norm_eps", data.get("rms_norm_eps", 1e-6), where),
    )


def _number(name: str, found: object, where: str) -> float:
    """A number of a config; ValueError unless it is of its kind and in the range that is built."""
    kind, most = _NUMBERS[name]
    if type(found) not in (int, kind) or not 0 < found <= most:
        what = "an integer" if kind is int else "a number"
        raise ValueError(
            f"{where}: {name}: expected {what} above 0 and up to {most}, found {found!r}; {ENCODER_REMEDY}"
        )
    return kind(found)


def config_from_shapes(weights: Mapping[str, Stored], where: str) -> TextEncoderConfig:
    """Sizes from the shapes of weights named without `model.`; all N layers are taken to be there."""

    def rows(name: str, axes: int = 2) -> tuple[int, ...]:
        shape = weights[name].shape if name in weights else ()
        if len(shape) != axes or 0 in shape:
            raise ValueError(f"{where}: {name}: expected {axes} axes, found shape {shape or None}; {ENCODER_REMEDY}")
        return shape

    vocab_size, hidden_size = rows("embed_tokens.weight")
    (head_dim,) = rows("layers.0.self_attn.q_norm.weight", axes=1)
    indices = [int(name.split(".")[1]) for name in weights if re.match(r"layers\.\d+\.", name)]
    return _checked_config(
        where,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=rows("layers.0.mlp.gate_proj.weight")[0],
        num_layers=_number("num_hidden_layers", 1 + max(indices), where) - 1,
        num_heads=rows("layers.0.self_attn.q_proj.weight")[0] // head_dim,
        num_kv_heads=rows("layers.0.self_attn.k_proj.weight")[0] // head_dim,
        head_dim=head_dim,
    )


def _checked_config(where: str, **sizes) -> TextEncoderConfig:
    try:
        return TextEncoderConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; {ENCODER_REMEDY}") from None


def load_text_encoder(path, *, device="cpu", dtype: torch.dtype | None = None) -> TextEncoder:
    """Qwen3 encoder from a transformers folder (sharded or not), one safetensors file or a GGUF file, for inference.

    The sizes come from config.json or the file's metadata, else from the shapes; names may begin with `model.`;
    dtype, in which it computes, is bf16 unless given. Weights that are stored small (see encoder_formats) stay so.
    Tensors go to the device one at a time (on the CPU, where nothing is to be converted, they stay memory-mapped);
    the token table stays on the host, and what lies past the hidden state that is needed is not read. Raises
    ValueError for other models and stored forms, and for missing, misshapen or unknown tensors.
    """
    dtype = dtype or torch.bfloat16
    with open_encoder(_encoder_path(path)) as file:
        config, expected = _checked_file(file)
        dense = all(file.weights[name].form == "float" for name in expected if not name.startswith("embed_tokens."))
        linear = Linear if dense else StoredLinear
        encoder = TextEncoder(config, linear, device="meta", dtype=dtype, embedding=HostEmbedding)
        for name, module in encoder.named_modules():
            if isinstance(module, StoredWeight):
                weight = f"{name}.weight"
                place = "cpu" if isinstance(module, HostEmbedding) else device
                parts = {part: tensor.to(place) for part, tensor in file.read(weight).items()}
                module.load(file.weights[weight].form, parts)
        state = {name: file.read(name)["weight"].to(device, dtype) for name in encoder.state_dict()}
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False)


def check_text_encoder(path) -> tuple[TextEncoderConfig, Mapping[str, Stored]]:
    """The sizes and the stored form of every weight of an encoder, from headers alone.

    ValueError unless load_text_encoder would take the file or folder.
    """
    with open_encoder(_encoder_path(path)) as file:
        return _checked_file(file)[0], file.weights


def _encoder_path(path) -> Path:
    """The encoder's own folder in a whole diffusers model, else the path."""
    path = Path(path)
    return path / "text_encoder" if (path / "text_encoder").is_dir() else path


def _checked_file(file) -> tuple[TextEncoderConfig, list[str]]:
    """The sizes of an open file's model, and the names of the weights that it needs."""
    check_model(file.weights, file.where)
    config = read_config(file.config, file.weights, file.where)
    body = TextEncoder(config, device="meta", embedding=HostEmbedding)  # on meta, nn.Embedding takes seconds
    shapes = {"embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    shapes |= {name: tuple(t.shape) for name, t in body.state_dict().items()}
    check_weights(file.weights, file.others, shapes, file.where)
    return config, list(shapes)


def check_model(weights: Mapping[str, Stored], where: str) -> None:
    """ValueError where the tensors' names are those of a model of Qwen3's kind without its norms."""
    q_norm = "layers.0.self_attn.q_norm.weight"
    if "layers.0.self_attn.q_proj.weight" in weights and q_norm not in weights:
        found = "Qwen2, Llama or the like without it"
        raise ValueError(f"{where}: {q_norm}: expected Qwen3, found {found}; {ENCODER_REMEDY}")


def read_config(text: str | None, weights: Mapping[str, Stored], where: str) -> TextEncoderConfig:
    """Sizes from a JSON config, or from the weights' shapes where there is none."""
    if text is None:
        return config_from_shapes(weights, where)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: config: expected JSON, found otherwise ({error}); {ENCODER_REMEDY}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: config: expected a JSON object, found {type(data).__name__}; {ENCODER_REMEDY}")
    return config_from_json(data, where)


def check_weights(
    weights: Mapping[str, Stored], others: Iterable[str], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """ValueError unless every expected weight is there and well shaped, norms as floats, and nothing unknown is.

    Tensors that Qwen3 has and this body does not need (later layers, final norm, head) may be there or not.
    """
    for name, shape in expected.items():
        stored = weights.get(name)
        if stored is None or stored.shape != shape:
            found = f"shape {stored.shape}" if stored else "none"
            raise ValueError(f"{where}: {name}: expected shape {shape}, found {found}; {ENCODER_REMEDY}")
        if len(shape) == 1 and stored.form != "float":
            raise ValueError(f"{where}: {name}: expected BF16, F16 or F32, found {stored.form}; {ENCODER_REMEDY}")
    unneeded = {re.sub(r"^layers\.0\.", "", name) for name in expected} | {"norm.weight", "lm_head.weight"}
    for name in (weights.keys() | others) - expected.keys():
        if re.sub(r"^layers\.\d+\.", "", name) not in unneeded and "rotary_emb" not in name:
            raise ValueError(f"{where}: {name}: expected Qwen3's tensors, found this unknown one; {ENCODER_REMEDY}")
