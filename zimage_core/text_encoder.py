"""The text encoder: chat template, tokenizer and the Qwen3 body whose hidden state conditions Z-Image.

Z-Image was trained on the second-to-last hidden state of Qwen3-4B, so of a file's N layers only the first N - 1
are read and run, and the final norm and the language-model head never. The body is ours so that its Linears come
from the same kind of factory as the transformer's.

Source: transformers/models/qwen3/modeling_qwen3.py@v5.23.0, diffusers/pipelines/z_image/pipeline_z_image.py@v0.42.1.
Legend: B batch, L tokens, C width, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import Linear
from .encoder_formats import ENCODER_REMEDY, HostEmbedding, Stored, StoredLinear, StoredWeight, open_encoder

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MAX_TOKENS = 512
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
COMFYUI_TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")
HUB_TOKENIZERS = (("Tongyi-MAI/Z-Image-Turbo", "tokenizer/"), ("Qwen/Qwen3-4B", ""))

_TOKENIZER_REMEDY = (
    "put Qwen3's tokenizer.json, or its vocab.json, merges.txt and tokenizer_config.json, there"
)
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


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the encoder, by default Qwen3-4B's; `num_layers` are the layers run, one less than the model has."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_layers: int = 35
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"expected {name} above 0, found {value}")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"expected heads divisible by key/value heads and an even head width, found "
                f"{self.num_heads}, {self.num_kv_heads} and {self.head_dim}"
            )


def rotary_table(length: int, config: TextEncoderConfig, device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, D) fp32 of positions 0 .. length - 1, each frequency twice (halves, not pairs)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)  # (L, D)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, L, D) by the table's angles (L, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in fp32, returned in x's dtype (promoted by the weight's)."""

    def __init__(self, width: int, eps: float, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with normed queries and keys."""

    def __init__(self, config: TextEncoderConfig, linear, device=None, dtype=None):
        super().__init__()
        c, d, kw = config.hidden_size, config.head_dim, {"device": device, "dtype": dtype}
        self.groups = config.num_heads // config.num_kv_heads
        self.head_dim = d
        self.q_proj = linear(c, config.num_heads * d, bias=False, **kw)
        self.k_proj = linear(c, config.num_kv_heads * d, bias=False, **kw)
        self.v_proj = linear(c, config.num_kv_heads * d, bias=False, **kw)
        self.o_proj = linear(config.num_heads * d, c, bias=False, **kw)
        self.q_norm = RMSNorm(d, config.rms_norm_eps, **kw)
        self.k_norm = RMSNorm(d, config.rms_norm_eps, **kw)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        v = v.transpose(1, 2)  # (B, G, L, D)
        q = apply_rotary(self.q_norm(q).transpose(1, 2), cos, sin).to(v.dtype)  # (B, H, L, D)
        k = apply_rotary(self.k_norm(k).transpose(1, 2), cos, sin).to(v.dtype)  # (B, G, L, D)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, L, C)


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextEncoderConfig, linear, device=None, dtype=None):
        super().__init__()
        c, f, kw = config.hidden_size, config.intermediate_size, {"device": device, "dtype": dtype}
        self.gate_proj = linear(c, f, bias=False, **kw)
        self.up_proj = linear(c, f, bias=False, **kw)
        self.down_proj = linear(f, c, bias=False, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: TextEncoderConfig, linear, device=None, dtype=None):
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kw)
        self.self_attn = Attention(config, linear, **kw)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kw)
        self.mlp = MLP(config, linear, **kw)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


def run_block(stage: str, index: int, block: nn.Module, x: Tensor, *args: object) -> Tensor:
    """Run one layer; stage is "layers"."""
    return block(x, *args)


class TextEncoder(nn.Module):
    """Qwen3 up to its second-to-last hidden state; parameters are named as in transformers' Qwen3Model.

    `linear(in_features, out_features, bias=False, device=, dtype=)` builds every projection and
    `embedding(rows, width, device=, dtype=)` the token table, which may stay on the host.
    """

    def __init__(self, config: TextEncoderConfig, linear=Linear, device=None, dtype=None, embedding=nn.Embedding):
        super().__init__()
        self.config = config
        kw = {"device": device, "dtype": dtype}
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, **kw)
        self.layers = nn.ModuleList(Layer(config, linear, **kw) for _ in range(config.num_layers))

    @property
    def device(self) -> torch.device:
        """Where the layers are, which is where the hidden state comes out."""
        return self.layers[0].input_layernorm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].input_layernorm.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        run_block: Callable[..., Tensor] = run_block,
        device: torch.device | None = None,
    ) -> Tensor:
        """Hidden state (B, L, C) of token ids (B, L) on any device, without the final norm.

        `attention_mask` (B, L) is 1 on tokens and 0 on padding, which must be on the right: there the causal
        mask alone keeps tokens from seeing it. The hidden state is zero on padding. ValueError for other masks.
        run_block replaces the function of that name; device is where it runs layers that wait elsewhere.
        """
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            if (attention_mask[:, 1:] & ~attention_mask[:, :-1]).any():
                raise ValueError("attention_mask: expected padding on the right, found a token after padding")
        x = self.embed_tokens(input_ids).to(device or self.device, self.dtype)
        cos, sin = (t.to(x.dtype) for t in rotary_table(input_ids.shape[1], self.config, x.device))
        for i, layer in enumerate(self.layers):
            x = run_block("layers", i, layer, x, cos, sin)
        return x if attention_mask is None else x * attention_mask.unsqueeze(-1).to(x.device)


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


class Tokenizer:
    """Token ids of a prompt: chat template, then byte-pair encoding, cut at 512 tokens.

    The prompt goes in as it is, so that, as in diffusers, special-token strings inside it become those tokens.
    """

    def __init__(self, encode: Callable[[str], list[int]], where: str):
        self.encode = encode
        self.where = where
        if len(encode("<|im_start|>")) != 1:
            raise ValueError(
                f"{where}: expected Qwen's tokenizer, found no <|im_start|>; {_TOKENIZER_REMEDY}"
            )

    def __call__(self, prompt: str) -> list[int]:
        """Token ids of one prompt, unpadded; warns where a long prompt loses its end."""
        ids = self.encode(TEMPLATE.format(prompt))
        if len(ids) > MAX_TOKENS:
            message = (
                f"the prompt takes {len(ids)} tokens and only the first {MAX_TOKENS} are used; shorten it"
            )
            warnings.warn(message, stacklevel=2)
        return ids[:MAX_TOKENS]


def load_tokenizer(path) -> Tokenizer:
    """Tokenizer from a folder with tokenizer.json, or with vocab.json and merges.txt, or from a tokenizer.json.

    Never uses the network. Raises ValueError where the files are missing, damaged or not Qwen's.
    """
    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file():
        import tokenizers

        check_json(file, "model")
        fast = _opened(file, tokenizers.Tokenizer.from_file)
        fast.no_truncation()
        fast.no_padding()
        return Tokenizer(lambda text: fast.encode(text, add_special_tokens=False).ids, str(file))
    if not has_tokenizer(path):
        raise ValueError(f"{path}: expected a tokenizer, found none of its files; {_TOKENIZER_REMEDY}")
    import transformers

    check_json(path / "vocab.json", "a")
    slow = _opened(path, transformers.Qwen2Tokenizer.from_pretrained, local_files_only=True)
    return Tokenizer(lambda text: slow(text, add_special_tokens=False)["input_ids"], str(path))


def _opened(path: Path, read: Callable, **options: object):
    """What a tokenizer library reads from a file or folder; ValueError where it cannot."""
    try:
        return read(str(path), **options)
    except Exception as error:  # tokenizers has no narrower class, and transformers meets broken files with many
        words = " ".join(str(error).split())
        message = f"{path}: expected Qwen's tokenizer, found a broken one ({words}); {_TOKENIZER_REMEDY}"
        raise ValueError(message) from error


def check_json(path: Path, key: str) -> None:
    """ValueError unless a file holds a JSON object with a key (a Git LFS pointer, say, does not)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or key not in found:
        raise ValueError(f"{path}: expected a JSON object with {key!r}, found otherwise; download it again")


def has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def find_tokenizer(encoder_path, comfyui=None) -> Path:
    """The folder of the tokenizer for an encoder file or folder, from what is on this machine.

    Looks beside the encoder, in `tokenizer/` there and one folder up, in the ComfyUI install (its root `comfyui`,
    or the one around the encoder), then in the hub's cache. Raises ValueError where there is none.
    """
    path = Path(encoder_path).absolute()
    folder = path if path.is_dir() else path.parent
    roots = [*([Path(comfyui)] if comfyui else []), *path.parents, *path.resolve().parents]
    places = [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    for place in (*places, *(root / COMFYUI_TOKENIZER for root in roots)):
        if has_tokenizer(place):
            return place
    if cached := cached_tokenizer():
        return cached
    raise ValueError(
        f"{folder}: expected a tokenizer beside the text encoder, in ComfyUI or in the hub's cache, found none; "
        f"{_TOKENIZER_REMEDY}"
    )


def cached_tokenizer() -> Path | None:
    """The folder of Qwen3's tokenizer in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    for repo, prefix in HUB_TOKENIZERS:
        for names in TOKENIZER_FILES:
            found = [try_to_load_from_cache(repo, prefix + name) for name in names]
            if all(isinstance(file, str) for file in found):
                return Path(found[0]).parent
    return None


@torch.no_grad()
def encode_prompts(
    encoder: TextEncoder, tokenizer: Tokenizer, prompts: str | Sequence[str], **options: object
) -> list[Tensor]:
    """Caption features (L, C) of each prompt, run one by one and unpadded, on the encoder's device in its dtype.

    options go to the encoder (`run_block`, `device`). Raises ValueError where the tokenizer's ids exceed the
    encoder's vocabulary.
    """
    features = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        ids = tokenizer(prompt)
        if max(ids) >= encoder.config.vocab_size:
            raise ValueError(
                f"{tokenizer.where}: expected token ids below {encoder.config.vocab_size}, the text encoder's "
                f"vocabulary, found {max(ids)}; use the tokenizer that belongs to the encoder"
            )
        features.append(encoder(torch.tensor([ids], device=encoder.device), **options)[0])
    return features
