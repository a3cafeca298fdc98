"""Reading Z-Image transformers from safetensors: the model with its weights, checked tensor by tensor.

Everything is learnt from the file's header (metadata, names, dtypes, shapes), never from its name or the GPU.
Loading is strict and goes tensor by tensor from the memory-mapped file to the device, so that host memory never
holds a second copy. SVDQuant layout: `layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .identify import FLOATS, GROUP_SIZE, model_info, unexpected
from .names import FUSED_PARTS, SVDQ_LEAVES, UNUSED, canonical_tensor
from .safetensors import TensorFiles, open_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..models.controlnet import ControlNet
    from ..models.transformer import ZImageTransformer

TILE = 128
RANK_TILE = 16


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
    from ..linear.svdq import SVDQLinear
    from ..models import ops
    from ..models.transformer import ZImageTransformer

    dtype = dtype or torch.bfloat16
    device = torch.device(device)
    compute_device = torch.device(compute_device or device)
    with open_tensors(path) as files:
        info = model_info(files)
        quantized = info.format == "svdq-int4"

        def svdq(n_in: int, n_out: int, bias: bool) -> nn.Module:
            return SVDQLinear(n_in, n_out, bias, rank=info.rank)

        with torch.device("meta"):
            model = ZImageTransformer(
                info.config,
                linear=svdq if quantized else Linear,
                refiner_linear=svdq if info.quantized_refiners else Linear,
            )
        model.backend = select(backend, precision, device=compute_device, dtype=dtype) if quantized else None
        model.use(ops.select(backend, compute_device, dtype, info.config.head_dim))
        read_weights(model, files, match_tensors(files, expected_tensors(model, info.rank)), device, dtype)
    model.checkpoint = info
    return model.eval()


def read_weights(
    model: ZImageTransformer | ControlNet,
    files: TensorFiles,
    sources: Mapping[str, Sequence[str]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fill a model built on the meta device, whose `backend` is set, from the keys of `match_tensors`."""
    import torch
    from torch import nn

    from ..linear.svdq import SVDQLinear, SVDQWeights

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


def expected_tensors(
    model: ZImageTransformer | ControlNet, rank: int
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Target tensor -> (shape, dtypes allowed) of everything that the model reads from its file."""
    from ..linear.svdq import SVDQLinear

    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        name: (tuple(p.shape), FLOATS) for name, p in model.named_parameters()
    }
    for name, module in model.named_modules():
        if isinstance(module, SVDQLinear):
            n, k = module.out_features, module.in_features
            if n % TILE or k % TILE or rank % RANK_TILE:
                raise ValueError(
                    f"{name}: the SVDQuant layout needs widths divisible by {TILE} and ranks by {RANK_TILE}, "
                    f"found {n} x {k} at rank {rank}; this file cannot be a SVDQuant INT4 model"
                )
            half = FLOATS[:2]
            expected |= {
                f"{name}.qweight": ((n, k // 2), ("I8", "U8")),
                f"{name}.wscales": ((k // GROUP_SIZE, n), half),
                f"{name}.smooth_factor": ((k,), half),
                f"{name}.proj_down": ((k, rank), half),
                f"{name}.proj_up": ((n, rank), half),
            }
            if module.bias is not None:
                expected[f"{name}.bias"] = ((n,), half)
    return expected


def match_tensors(
    files: TensorFiles,
    expected: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]],
    names: Callable[[str], tuple[str, str | None] | None] = canonical_tensor,
    ignore: str = "",
    what: str = "a Z-Image transformer",
) -> dict[str, list[str]]:
    """Target tensor -> its source keys in row order; strict about unmatched, missing and misshapen ones.

    names gives the model's name for a key; keys that begin with `ignore` are not read. what: the model, in errors.
    """
    found: dict[str, dict[str | None, str]] = {}
    for key in files.tensors:
        if ignore and key.startswith(ignore):
            continue
        target = names(key)
        if target is None or (target[0] not in expected and not target[0].endswith(".smooth_factor_orig")):
            if key.endswith(UNUSED):
                continue
            raise unexpected(files.path, key, what)
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
