"""What a file or folder is, from its header alone and without torch: by the names, types and shapes of its tensors.

A new kind of file gets a row here: a stored form in `FORMATS`, a kind in `KINDS` or `OTHER_MODELS` (both before the
rows that it would match by accident), and what to do with it in `PLACES`. Whether a file holds every tensor that its
model needs is for the strict loader (`load`).

Sources of names: huggingface/diffusers `loaders/single_file_utils.py@v0.42.1`, ComfyUI
`comfy/model_detection.py@v0.33.0` and QUANTIZATION.md, nunchaku `models/linear.py@92e4695`, Disty0/sdnq
`sdnq/detection.py`, optimum-quanto 0.2.7.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..models.config import PRESETS, ZImageConfig
from .gguf import QUANTIZED
from .layouts import GROUP, present
from .names import UNUSED, canonical_tensor, is_lora, unwrapped
from .safetensors import Shape, TensorFiles, Tensors, json_object, open_tensors

FLOATS = ("BF16", "F16", "F32")
LATENT_CHANNELS = 16
MOST_RANK = 2**14

# A stored form by the name of a tensor that only it has: id, in words, pattern. `dense` and `FP8` have none.
FORMATS = (
    ("quanto-int4", "quanto INT4 or INT2", r"\.weight\._data\._data$"),
    ("quanto-int8", "quanto INT8", r"\.weight\._data$"),
    ("fp8-blocks", "FP8 scaled in blocks", r"\.weight_scale_inv$"),
    ("compressed-tensors", "compressed-tensors", r"\.(weight_packed|weight_global_scale)$"),
    ("bitsandbytes", "bitsandbytes", r"\.(SCB|absmax|quant_map|weight\.quant_state.*)$"),
    ("hqq", "HQQ", r"\.W_q$"),
    ("gptq", "GPTQ or AWQ", r"\.(qzeros|g_idx)$"),
    ("awq", "SVDQuant with AWQ W4A16", r"\.(wzeros|weight_zero)$"),
    ("svdq-fp4", "SVDQuant NVFP4", r"\.(wtscale|wcscales)$"),
    ("svdq-int4", "SVDQuant INT4", r"\.qweight$"),
    ("sdnq", "SDNQ", r"\.(zero_point|svd_up)$|\.(to_(q|k|v|out\.0)|w[123])\.scale$"),
    ("comfy-svdq", "ComfyUI SVDQuant W4A4", r"\.(weight_)?(proj_down|smooth_factor)$"),
    ("comfy-w4a8", "ComfyUI 4-bit W4A8", r"\.weight_s_(rel|channel)$"),
    ("nvfp4", "NVFP4", r"\.weight_scale_2$"),
)
STORED = ("fp8", "int8", "nvfp4", "quanto-int8", "convrot-w4a4", "comfy-w4a8", "gguf")
"""Formats of transformers that are kept small in memory and dequantized layer by layer."""
READ = ("svdq-int4", "svdq-fp4", "dense", *STORED)
"""Formats of transformers that are loaded."""
# A kind by the names of tensors that only it has, all of the patterns: role, in words, patterns.
KINDS = (
    ("controlnet", "a Z-Image ControlNet", (r"^control_layers\.0\.", r"^control_(all_)?x_embedder\b")),
    ("other", "a ControlNet for another model", (r"^(control_model|controlnet_\w+)\.",)),
    ("other", "another model (Z-Image Omni or Edit, which read pictures through SigLIP)", (r"(^|\.)siglip_\w+\b",)),
    ("other", "another model (Z-Image L2P, which works on pixels)", (r"(^|\.)dec_net\.", r"(^|\.)cap_embedder\.")),
    ("other", "another model (TwinFlow, with two time embeddings)", (r"(^|\.)t_embedder_2\.",)),
    ("other", "another model (Lumina 2)", (r"(^|\.)layers\.0\.adaLN_modulation\.1\.", r"(^|\.)cap_embedder\.")),
    ("other", "a T5 text encoder", (r"(^|\.)encoder\.block\.\d+\.layer\.",)),
    ("other", "a CLIP text encoder", (r"(^|\.)text_model\.encoder\.layers\.|^transformer\.resblocks\.",)),
    ("other", "a vision-language model", (r"(^|\.)(visual|vision_tower|vision_model)\.",)),
    ("other", "a mixture-of-experts language model", (r"\.mlp\.experts\.",)),
    ("other", "a Gemma text encoder", (r"(pre|post)_feedforward_layernorm",)),
    ("text encoder", "a text encoder", (r"\.self_attn\.q_proj\.weight|(^|\.)(embed_tokens|token_embd)\.",)),
    ("other", "a video autoencoder (Wan, Qwen-Image)", (r"(^|\.)decoder\.(middle|upsamples)\.\d+\.residual\.",)),
    (
        "other",
        "a tiny autoencoder (taef1, TAESD) for live previews",
        (r"^(taesd_)?((encoder|decoder)\.layers\.|(encoder\.|decoder\.)?\d+\.)",),
    ),
    ("other", "an autoencoder with quant_conv (Stable Diffusion, FLUX.2)", (r"^(post_)?quant_conv\.",)),
    ("vae", "a VAE", (r"^encoder\.conv_in\.", r"^decoder\.conv_in\.")),
    ("other", "the encoder of an autoencoder only", (r"^encoder\.conv_in\.",)),
    ("other", "the decoder of an autoencoder only", (r"^decoder\.conv_in\.",)),
)
# Other models and LoRAs for them, where "_" may stand for ".": name, pattern.
OTHER_MODELS = (
    ("HunyuanVideo", r"individual_token_refiner"),
    ("HiDream", r"double_stream_blocks"),
    ("Flux", r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]"),
    ("SDXL", r"(^|\.)label_emb\.0\.0\.|^add_embedding\.linear_1\."),
    ("Stable Diffusion", r"(^|[._])((down|up|input|output)_blocks|mid_block|middle_block)[._]"),
    ("Wan", r"(^|[._])blocks[._]\d+[._](self|cross)_attn"),
    ("SD3", r"(^|[._])joint_blocks[._]"),
    ("Qwen-Image", r"(^|[._])transformer_blocks[._]\d+[._](img|txt)_(mod|mlp)"),
    ("Qwen-Image, Flux or SD3", r"(^|[._])transformer_blocks[._]"),
)
PARTS = (r"^model\.diffusion_model\.", r"^(text_encoders|cond_stage_model|conditioner|vae|first_stage_model)\.")
"""Names of a whole checkpoint: the diffusion model, and another part beside it."""
WITHIN = {
    "model": PARTS[0],
    "text encoder": r"^(text_encoders\.\w+\.|cond_stage_model\.\w+\.)(transformer\.)?(?=model\.)",
    "vae": r"^(vae|first_stage_model)\.",
}
"""Role -> the prefix of its names in a whole checkpoint."""

PLACES = {
    "model": "it goes into models/diffusion_models and is loaded with the model loader or --model",
    "controlnet": "put it into models/model_patches and load it with the ControlNet loader or --control",
    "text encoder": "put it into models/text_encoders and load it with the text encoder loader or --text-encoder",
    "vae": "put it into models/vae and load it with the VAE loader or --vae",
    "lora": "put it into models/loras and load it with a LoRA loader or --lora",
    "checkpoint": "name it with --model, which takes its text encoder and VAE too",
}
EXPECTED = {
    "model": (
        "a Z-Image transformer in SVDQuant INT4 or FP4, BF16, FP16, FP8, INT8, NVFP4 or GGUF",
        "get svdq-int4_r256-z-image-turbo.safetensors or a BF16 file of Z-Image",
    ),
    "text encoder": (
        "Qwen3",
        "get Qwen3-4B in bf16 (the text_encoder folder of Z-Image-Turbo, or qwen_3_4b.safetensors)",
    ),
    "vae": (
        "the 16-channel autoencoder of Z-Image",
        "get ae.safetensors, or the folder vae of Tongyi-MAI/Z-Image-Turbo",
    ),
    "lora": ("a LoRA for Z-Image", "get a LoRA that was trained for Z-Image"),
    "controlnet": (
        "a Fun ControlNet for Z-Image in SVDQuant INT4, BF16, FP16, FP8 or INT8",
        "get Z-Image-Turbo-Fun-Controlnet-Union-2.1-8steps.safetensors, or what `zimage quantize` makes of it",
    ),
}
"""Role -> what a loader asks for, and where a user gets one."""


class Form(NamedTuple):
    """How a file's weights are stored: an id ("dense", "fp8", "int8", "gguf", "other" or one of `FORMATS`), in words,
    and the tensor that shows it."""

    id: str
    words: str
    key: str = ""


@dataclass(frozen=True)
class Identity:
    """What a file is. role: a key of `PLACES`, or "other"."""

    path: Path
    role: str
    what: str  # in words, with an article
    form: Form

    def require(self, role: str) -> None:
        """ValueError, with what to do, unless the file has a role."""
        if self.role != role:
            expected, remedy = EXPECTED[role]
            todo = "; ".join(filter(None, (PLACES.get(self.role), remedy)))
            raise ValueError(f"{self.path}: expected {expected}, found {self.what}; {todo}")


@dataclass(frozen=True)
class FileInfo:
    """What the header of a model of blocks says. format: one of `READ`; rank 0, no refiners without SVDQuant."""

    path: Path
    format: str
    rank: int
    quantized_refiners: bool
    dtype: str
    metadata: Mapping[str, str]

    @property
    def fp4(self) -> bool:
        """Whether its SVDQuant linears have FP4 codes."""
        return self.format == "svdq-fp4"


@dataclass(frozen=True)
class ModelInfo(FileInfo):
    """A Z-Image transformer that can be loaded."""

    config: ZImageConfig


def likely_variant(source: str | Path | TensorFiles) -> str | None:
    """ "turbo" or "base" as a file's metadata or its name suggest, for advice only: the tensors are the same.

    None where nothing suggests either, or the file cannot be read.
    """
    try:
        files = source if isinstance(source, TensorFiles) else open_tensors(source)
    except (OSError, ValueError):
        return None
    if (said := files.metadata.get("variant")) in PRESETS:
        return said
    path = files.path.parent if files.path.name == "transformer" else files.path
    name = path.stem.lower() if path.is_file() else path.name.lower()
    if "turbo" in name:
        return "turbo"
    words = r"(base|bf16|fp16|fp8\w*|int8\w*|int4\w*|nvfp4|mxfp8|r\d+|q\d\w*|convrot|scaled|mixed)"
    if re.fullmatch(rf"(svdq[-_]int4[-_](r\d+[-_])?)?z[-_]?image([-_.]{words})*", name):
        return "base"
    return None


def identify(source: str | Path | TensorFiles) -> Identity:
    """What any file or folder is. ValueError only where it cannot be read."""
    files = source if isinstance(source, TensorFiles) else open_tensors(source)
    form = stored_form(files.tensors, files.metadata)
    return Identity(files.path, *_kind(files.tensors, form), form)


def open_part(path: str | Path, role: str) -> TensorFiles:
    """A file or folder, or of a whole checkpoint the part with a role, under names of its own.

    A checkpoint's config is that of its transformer, if it has one. A transformer's SVDQuant linears are seen as
    nunchaku stores them (`layouts`).
    """
    files = open_tensors(path)
    if identify(files).role == "checkpoint":
        first = next(filter(None, (re.match(WITHIN[role], key) for key in files.tensors)), None)
        if first is None:
            raise ValueError(f"{path}: expected a checkpoint with a {role}, found none in it; {EXPECTED[role][1]}")
        files.narrow(first[0])
        if role != "model":
            files.metadata.pop("config", None)
    if role == "model":
        present(files)
    return files


def _kind(tensors: Tensors, form: Form) -> tuple[str, str]:
    """Role and words of a file with these tensors."""
    tensors = {unwrapped(key): entry for key, entry in tensors.items()}
    if not tensors:
        return "other", "a file without tensors"
    if all(_first(pattern, tensors) for pattern in PARTS):
        inner = {re.sub(PARTS[0], "", key): entry for key, entry in tensors.items() if re.match(PARTS[0], key)}
        role, what = _kind(inner, form)
        whole = "Z-Image checkpoint" if role == "model" else f"checkpoint of {what}"
        found = f"a whole {whole} (diffusion model, text encoder and VAE in one file)"
        return "checkpoint" if role == "model" else "other", found
    if is_lora(tensors):
        return "lora", "a LoRA"
    for role, what, patterns in KINDS:
        if all(_first(pattern, tensors) for pattern in patterns):
            shape = tensors.get("decoder.conv_in.weight", ("", ()))[1]
            if "conv_in" in patterns[-1] and len(shape) == 4 and shape[1] != LATENT_CHANNELS:
                return "other", f"an autoencoder of {shape[1]} latent channels"
            return role, what
    if any(canonical_tensor(key) for key in tensors):
        return "model", "a Z-Image transformer" if form.id == "dense" else f"{_article(form.words)} {form.words} model"
    if other := other_model(tensors):
        return "other", f"another model ({other})"
    return "other", f"another kind of file (keys such as {next(iter(tensors))!r})"


def other_model(keys: Iterable[str]) -> str | None:
    """The name of another diffusion model that these names, or a LoRA's, belong to."""
    return next((name for name, pattern in OTHER_MODELS if _first(pattern, keys)), None)


def stored_form(tensors: Tensors, metadata: Mapping[str, str]) -> Form:
    """How the weights of a file with these tensors are stored."""
    dtypes = {dtype for dtype, _ in tensors.values()}
    for form, words, pattern in FORMATS:
        if key := _first(pattern, tensors):
            described = (json_object(metadata.get("quantization_config")) or {}).get("weight")
            weight = described if isinstance(described, dict) else {}
            kind, group = weight.get("dtype", "int4"), weight.get("group_size", GROUP)
            if form == "svdq-int4" and (any(d.startswith("F8_") for d in dtypes) or "fp4" in str(kind)):
                return Form("svdq-fp4", "SVDQuant NVFP4", key)
            if form == "svdq-int4" and (kind, group) != ("int4", GROUP):
                return Form("svdq-other", f"SVDQuant (weights {kind} in groups of {group})", key)
            if form == "quanto-int8" and any(d.startswith("F8_") for d in dtypes):
                return Form(form, "quanto FP8", key)
            return Form(form, words, key)
    if blocks := sorted(dtypes & QUANTIZED.keys()):
        return Form("gguf", f"GGUF {'/'.join(blocks)}")
    for key, (dtype, shape) in tensors.items():  # a square matrix, of which a packed one has half the columns
        if dtype == "I8" and re.search(r"\.attention\.(to_)?out(\.0)?\.weight$", key) and shape[0] == 2 * shape[-1]:
            return Form("convrot-w4a4", "ComfyUI ConvRot W4A4", key)
    if any(d.startswith("F8_") for d in dtypes) or _first(r"\.(weight_scale|scale_weight)$", tensors):
        return Form("int8", "INT8") if "I8" in dtypes else Form("fp8", "FP8")
    if "I8" in dtypes:
        return Form("int8", "INT8")
    if not dtypes <= set(FLOATS):
        return Form("other", ", ".join(sorted(dtypes - set(FLOATS))))
    return Form("dense", "/".join(sorted(dtypes)))


def model_info(source: str | Path | TensorFiles) -> ModelInfo:
    """Format, rank and sizes of a transformer. ValueError names what the file is otherwise."""
    files = source if isinstance(source, TensorFiles) else open_part(source, "model")
    found = identify(files)
    found.require("model")
    form = found.form.id
    if form not in READ:
        expected, remedy = EXPECTED["model"]
        raise ValueError(f"{files.path}: expected {expected}, found {found.what}; this format is not read, {remedy}")
    shapes: dict[str, Shape] = {}
    for key, (_, shape) in files.tensors.items():
        if target := canonical_tensor(key):
            shapes[target[0].removesuffix("._data")] = shape
        elif not key.endswith(UNUSED):
            raise unexpected(files.path, key, "a Z-Image transformer", EXPECTED["model"][1])
    facts = header_facts(files, form, shapes)
    if form.startswith("svdq") and not facts["rank"]:
        raise ValueError(f"{files.path}: expected proj_down tensors beside qweight, found none; download it again")
    try:
        config = ZImageConfig(**_config_fields(files, shapes))
    except ValueError as error:
        raise ValueError(f"{files.path}: {error}; download the file again") from None
    return ModelInfo(**facts, config=config)


def header_facts(files: TensorFiles, form: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of a `FileInfo`. ValueError for low-rank branches (K, R) of no such shape."""
    downs = {name: shape for name, shape in shapes.items() if name.endswith(".proj_down")}
    name, shape = next(iter(downs.items()), ("", (0, 0)))
    if downs and (len(shape) != 2 or not 0 < shape[1] <= MOST_RANK):
        raise ValueError(
            f"{files.path}: {name!r}: expected a rank from 1 to {MOST_RANK}, found {shape}; download it again"
        )
    return {
        "path": files.path,
        "format": form,
        "rank": shape[1],
        "quantized_refiners": any("refiner" in name for name in downs),
        "dtype": "/".join(sorted({dtype for dtype, _ in files.tensors.values() if dtype in FLOATS})),
        "metadata": files.metadata,
    }


def block_count(names: Iterable[str], stack: str) -> int:
    """How many blocks a stack, "layers" say, has by the names of its tensors."""
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith(f"{stack}.")), default=-1)


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """`ZImageConfig.axes_dims` as every published model has them."""
    quarter = head_dim // 4
    return quarter, (head_dim - quarter) // 2, (head_dim - quarter) // 2


def unexpected(path: Path, key: str, what: str, remedy: str) -> ValueError:
    """The refusal of a tensor that a model does not have."""
    return ValueError(
        f"{path}: unexpected tensor {key!r}, which {what} does not have; this is another model or a damaged "
        f"conversion, {remedy}"
    )


def _config_fields(files: TensorFiles, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Sizes from the shapes; the numbers that no shape shows from the metadata's diffusers config, where given."""

    def shape(name: str, axes: int) -> Shape:
        if len(shapes.get(name, ())) != axes or 0 in shapes[name]:
            found = shapes.get(name, "none")
            raise ValueError(f"expected tensor {name!r} of {axes} axes, found {found}")
        return shapes[name]

    dim = shape("x_embedder.weight", 2)[0]
    head_dim = shape("layers.0.attention.norm_q.weight", 1)[0]
    found: dict[str, Any] = {
        "dim": dim,
        "n_heads": dim // head_dim,
        "n_layers": block_count(shapes, "layers"),
        "n_refiner_layers": block_count(shapes, "noise_refiner"),
        "cap_feat_dim": shape("cap_embedder.0.weight", 1)[0],
        "axes_dims": rotary_axes(head_dim),
    }
    config = json_object(files.metadata.get("config") or "{}")
    if config is None:
        raise ValueError("metadata config: expected a JSON object, found otherwise")
    for name in (f.name for f in fields(ZImageConfig)):
        if name in config:
            value = tuple(config[name]) if isinstance(config[name], list) else config[name]
            if name in found and name != "axes_dims" and found[name] != value:
                raise ValueError(f"metadata says {name} = {value}, the tensors {found[name]}")
            found[name] = value
    for name, value in (("all_patch_size", [2]), ("all_f_patch_size", [1]), ("qk_norm", True)):
        if config.get(name, value) != value:
            raise ValueError(f"metadata {name}: expected {value}, found {config[name]}: another model")
    return found


def _first(pattern: str, keys: Iterable[str]) -> str | None:
    """The first name that a pattern is found in."""
    return next(filter(re.compile(pattern).search, keys), None)


def _article(words: str) -> str:
    return "an" if words[0] in "AEFHILMNORSX" else "a"
