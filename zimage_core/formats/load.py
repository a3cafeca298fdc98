"""Reading Z-Image transformers from safetensors: what a file holds, and the model with its weights.

Everything is learnt from the file's header (metadata, names, dtypes, shapes), never from its name or the GPU.
Loading is strict and goes tensor by tensor from the memory-mapped file to the device, so that host memory never
holds a second copy. SVDQuant layout: `layout.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.config import ZImageConfig
from .names import FUSED_PARTS, SVDQ_LEAVES, UNUSED, canonical_tensor, is_lora
from .safetensors import TensorFiles, open_tensors, tensor_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..models.transformer import ZImageTransformer

GROUP_SIZE = 64
TILE = 128
RANK_TILE = 16

_DENSE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a transformer checkpoint is. format: "svdq-int4" or "dense"; rank 0 and no refiners where dense."""

    path: Path
    format: str
    rank: int
    quantized_refiners: bool
    config: ZImageConfig
    dtype: str
    tensors: int
    payload_bytes: int
    metadata: Mapping[str, str]


def identify(source: str | Path | TensorFiles) -> CheckpointInfo:
    """What a transformer checkpoint is, from its header alone.

    Raises ValueError naming the kind of file where it is not one that `load_transformer` reads.
    """
    files = source if isinstance(source, TensorFiles) else TensorFiles(source)
    kind = describe(files.tensors, files.metadata)
    if kind not in ("svdq-int4", "dense"):
        raise ValueError(
            f"{files.path}: expected a Z-Image transformer in SVDQuant INT4, BF16 or FP16, found {kind}; "
            f"{_remedy(kind)}"
        )
    shapes = {}
    for key, (_, shape) in files.tensors.items():
        if target := canonical_tensor(key):
            shapes[target[0]] = shape
    rank, refiners = 0, False
    if kind == "svdq-int4":
        downs = {n: s for n, s in shapes.items() if n.endswith(".proj_down")}
        if not downs:
            raise ValueError(f"{files.path}: expected proj_down tensors beside qweight, found none; download it again")
        rank = next(iter(downs.values()))[-1]
        refiners = any(n.startswith(("noise_refiner", "context_refiner")) for n in downs)
    config = ZImageConfig(**_config_fields(files, shapes))
    dtypes = sorted({d for d, _ in files.tensors.values() if d in _DENSE_DTYPES})
    payload = sum(tensor_bytes(d, s) for d, s in files.tensors.values())
    return CheckpointInfo(
        files.path,
        kind,
        rank,
        refiners,
        config,
        "/".join(dtypes),
        len(files.tensors),
        payload,
        files.metadata,
    )


def describe(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    """Name the kind of file that a header belongs to: "svdq-int4", "dense", or words for anything else."""
    names = list(tensors)
    dtypes = {d for d, _ in tensors.values()}
    ends = {n.rpartition(".")[2] for n in names}
    if is_lora(names):
        return "a LoRA"
    ours = sum(canonical_tensor(n.removesuffix("._data").removesuffix("._scale")) is not None for n in names)
    if ours < len(names) // 2 or not ours:
        if any(n.endswith("self_attn.q_proj.weight") for n in names):
            return "a text encoder"
        if any(n.startswith(("decoder.", "first_stage_model.", "encoder.down")) for n in names):
            return "a VAE"
        if any(
            n.startswith(("double_blocks.", "model.diffusion_model.double_blocks.", "transformer_blocks."))
            for n in names
        ):
            return "another model (Flux or Qwen-Image)"
        if any("input_blocks." in n or "down_blocks." in n for n in names):
            return "another model (Stable Diffusion)"
        return f"another kind of file (keys such as {names[0]!r})" if names else "a file without tensors"
    if "_data" in ends:
        return "a quanto INT8 model"
    if "qweight" in ends:
        weight = _quantization(metadata).get("weight") or {}
        if "wtscale" in ends or "wcscales" in ends or "F8_E4M3" in dtypes or "fp4" in str(weight.get("dtype", "")):
            return "an SVDQuant NVFP4 model"
        if weight.get("dtype", "int4") != "int4" or weight.get("group_size", GROUP_SIZE) != GROUP_SIZE:
            return f"an SVDQuant model with weights {weight.get('dtype')} in groups of {weight.get('group_size')}"
        return "svdq-int4"
    if any(d.startswith("F8_") for d in dtypes) or "scale_weight" in ends or "weight_scale" in ends:
        return "an FP8 model"
    if not dtypes <= set(_DENSE_DTYPES):
        return f"a model with tensors of {', '.join(sorted(dtypes - set(_DENSE_DTYPES)))}"
    return "dense"


def _remedy(kind: str) -> str:
    if kind == "a LoRA":
        return "put it into models/loras and load it with a LoRA loader or --lora"
    if kind == "a text encoder":
        return "put it into models/text_encoders and load it with the text encoder loader or --text-encoder"
    if kind == "a VAE":
        return "put it into models/vae and load it with the VAE loader or --vae"
    if "NVFP4" in kind:
        return "this format is not read yet, get svdq-int4_r256-z-image-turbo.safetensors"
    return "get svdq-int4_r256-z-image-turbo.safetensors or a BF16 file of Z-Image"


def _quantization(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get("quantization_config") or "{}")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _config_fields(files: TensorFiles, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes from the shapes; the numbers that no shape shows from the metadata's diffusers config, where given."""
    try:
        dim, _ = shapes["x_embedder.weight"]
        head_dim = shapes["layers.0.attention.norm_q.weight"][0]
        cap_feat_dim = shapes["cap_embedder.1.weight"][1]
    except KeyError as e:
        raise ValueError(f"{files.path}: expected tensor {e.args[0]!r}, found none; download the file again") from e
    quarter = head_dim // 4
    found: dict[str, Any] = {
        "dim": dim,
        "n_heads": dim // head_dim,
        "n_layers": _count(shapes, "layers."),
        "n_refiner_layers": _count(shapes, "noise_refiner."),
        "cap_feat_dim": cap_feat_dim,
        "axes_dims": (quarter, (head_dim - quarter) // 2, (head_dim - quarter) // 2),
    }
    raw = files.metadata.get("config")
    if not raw:
        return found
    try:
        config = json.loads(raw)
    except ValueError as e:
        raise ValueError(f"{files.path}: its metadata 'config' is not JSON ({e}); download the file again") from e
    for name in (f.name for f in fields(ZImageConfig)):
        if name in config:
            value = tuple(config[name]) if isinstance(config[name], list) else config[name]
            if name in found and name != "axes_dims" and found[name] != value:
                raise ValueError(
                    f"{files.path}: metadata says {name} = {value}, the tensors {found[name]}; download the file again"
                )
            found[name] = value
    for name, value in (("all_patch_size", [2]), ("all_f_patch_size", [1]), ("qk_norm", True)):
        if config.get(name, value) != value:
            raise ValueError(f"{files.path}: metadata {name}: expected {value}, found {config[name]}; another model")
    return found


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return 1 + max((int(n.split(".")[1]) for n in shapes if n.startswith(prefix)), default=-1)


def load_transformer(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    precision: str = "auto",
    compute_device: str | torch.device | None = None,
) -> ZImageTransformer:
    """The model of a checkpoint (SVDQ INT4 of any rank, BF16, FP16, FP32; one file or a folder) on a device.

    dtype is that of everything not quantized (default bf16). backend and precision choose the INT4 arithmetic for
    compute_device (default `device`), where the model will run if its weights wait elsewhere; see
    `backends.select`. Raises ValueError naming file, key, expected and found.
    """
    import torch
    from torch import nn

    from ..linear.adapters import Linear
    from ..linear.backends import select
    from ..linear.svdq import SVDQLinear, SVDQWeights
    from ..models import ops
    from ..models.transformer import ZImageTransformer

    dtype = dtype or torch.bfloat16
    device = torch.device(device)
    compute_device = torch.device(compute_device or device)
    with open_tensors(path) as files:
        info = identify(files)
        quantized = info.format == "svdq-int4"

        def svdq(n_in: int, n_out: int, bias: bool) -> nn.Module:
            return SVDQLinear(n_in, n_out, bias, rank=info.rank)

        with torch.device("meta"):
            model = ZImageTransformer(
                info.config,
                linear=svdq if quantized else Linear,
                refiner_linear=svdq if info.quantized_refiners else Linear,
            )
        sources = match_tensors(files, expected_tensors(model, info.rank))
        model.backend = select(backend, precision, device=compute_device, dtype=dtype) if quantized else None
        model.use(ops.select(backend, compute_device, dtype, info.config.head_dim))

        def fetch(target: str) -> Tensor:
            parts = [files.get(key).to(device) for key in sources[target]]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        for name, module in list(model.named_modules()):
            if isinstance(module, SVDQLinear):
                leaves = [leaf for leaf in (*SVDQ_LEAVES, "bias") if f"{name}.{leaf}" in sources]
                packed = {leaf: fetch(f"{name}.{leaf}") for leaf in leaves if leaf != "smooth_factor_orig"}
                packed = {k: v if k == "qweight" else v.to(dtype) for k, v in packed.items()}
                module.load(SVDQWeights.from_packed(packed), model.backend)
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                value = fetch(f"{name}.{leaf}".lstrip(".")).to(dtype, copy=True).reshape(parameter.shape)
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    model.checkpoint = info
    return model.eval()


def expected_tensors(model: ZImageTransformer, rank: int) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Target tensor -> (shape, dtypes allowed) of everything that the model reads from its file."""
    from ..linear.svdq import SVDQLinear

    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        name: (tuple(p.shape), _DENSE_DTYPES) for name, p in model.named_parameters()
    }
    for name, module in model.named_modules():
        if isinstance(module, SVDQLinear):
            n, k = module.out_features, module.in_features
            if n % TILE or k % TILE or rank % RANK_TILE:
                raise ValueError(
                    f"{name}: the SVDQuant layout needs widths divisible by {TILE} and ranks by {RANK_TILE}, "
                    f"found {n} x {k} at rank {rank}; this file cannot be a SVDQuant INT4 model"
                )
            half = _DENSE_DTYPES[:2]
            expected |= {
                f"{name}.qweight": ((n, k // 2), ("I8", "U8")),
                f"{name}.wscales": ((k // GROUP_SIZE, n), half),
                f"{name}.smooth_factor": ((k,), half),
                f"{name}.proj_down": ((k, rank), half),
                f"{name}.proj_up": ((n, rank), half),
            }
    return expected


def match_tensors(
    files: TensorFiles, expected: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
) -> dict[str, list[str]]:
    """Target tensor -> its source keys in row order; strict about unmatched, missing and misshapen ones."""
    found: dict[str, dict[str | None, str]] = {}
    for key in files.tensors:
        target = canonical_tensor(key)
        if target is None or (target[0] not in expected and not target[0].endswith(".smooth_factor_orig")):
            if key.endswith(UNUSED):
                continue
            raise ValueError(
                f"{files.path}: unexpected tensor {key!r}, which a Z-Image transformer does not have; "
                "this is another model or a damaged conversion"
            )
        parts = found.setdefault(target[0], {})
        if target[1] in parts:
            raise ValueError(f"{files.path}: {key!r} and {parts[target[1]]!r} are the same tensor; download it again")
        parts[target[1]] = key

    sources = {}
    for target, (shape, dtypes) in expected.items():
        parts = found.get(target, {})
        order: tuple[str | None, ...] = (None,)
        if None not in parts:
            order = next((p for m, p in FUSED_PARTS.items() if target.endswith(f"{m}.weight")), order)
        missing = [p for p in order if p not in parts]
        if missing:
            what = target if missing == [None] else f"{target} (part {missing[0]})"
            raise ValueError(
                f"{files.path}: expected tensor {what!r} of shape {shape}, found none; "
                "the file is incomplete, download it again"
            )
        keys = [parts[p] for p in order]
        rows = 0
        for key in keys:
            dtype, stored = files.tensors[key]
            if dtype not in dtypes:
                raise ValueError(
                    f"{files.path}: {key!r}: expected dtype {' or '.join(dtypes)}, found {dtype}; "
                    "this format is not read, get the INT4 or BF16 file"
                )
            whole = len(keys) == 1
            fits = stored == shape or (target.endswith("pad_token") and stored == shape[1:])
            if not (fits if whole else len(stored) == len(shape) and stored[1:] == shape[1:]):
                raise _misshapen(files.path, key, shape, stored)
            rows += stored[0]
        if len(keys) > 1 and (rows != shape[0] or any(files.tensors[k][1][0] != shape[0] // len(keys) for k in keys)):
            raise _misshapen(files.path, keys[0], (shape[0] // len(keys), *shape[1:]), files.tensors[keys[0]][1])
        sources[target] = keys
    return sources


def _misshapen(path: Path, key: str, expected: tuple[int, ...], found: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{path}: {key!r}: expected shape {expected}, found {found}; "
        "the file belongs to another model or is damaged, download it again"
    )
