"""The strict loader: a model built without memory, and a file whose tensors are matched with it one by one.

What the model needs is read from the module itself, on the meta device. Tensors go one at a time from the
memory-mapped file to the device, so that host memory never holds a second copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from .identify import EXPECTED, FLOATS, STORED, FileInfo, ModelInfo, model_info, open_part, unexpected
from .layouts import TILE, nunchaku_shapes
from .names import FUSED_PARTS, UNUSED, canonical_tensor
from .safetensors import Shape, TensorFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..linear.backends import Backend
    from ..models.transformer import BlockModel, ZImageTransformer
    from .weights import Stored

RANK_TILE = 16
SMALL = 2**22  # numbers: scales, vectors, modulation
HALVES = FLOATS[:2]
CODES = ("I8", "U8")
OPTIONAL = (".wtscale", ".wcscales")  # scales of FP4 beside those of its groups, 1 where there is none
MAGNITUDE = {"int8": -1, "int8_convrot": -1, "float8_e4m3fn": 127, "float8_e5m2": 127, "nvfp4": 119}
"""Kind of form -> the bits of its codes but for signs."""
BlockModelT = TypeVar("BlockModelT", bound="BlockModel")
Rename = Callable[[str], "tuple[str, str | None] | None"]
"""A file's name of a tensor -> the model's, and which part of a fused one it is; None where nothing matches."""


@dataclass(frozen=True)
class Sources:
    """Where each tensor of a model is in an open file: target -> the stored tensors of its rows, in order."""

    files: TensorFiles
    stored: Mapping[str, list[Stored]]

    def get(self, target: str, device: torch.device | str) -> Tensor:
        """A tensor put together from its parts; on the CPU, in the file's dtype, maybe mapped; fp32 where quantized."""
        import torch

        parts = [self._read(source, device) for source in self.stored[target]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, stored: Stored, device: torch.device | str) -> Tensor:
        from .stored import dequantize, is_small
        from .weights import read_parts

        if not is_small(stored.form):
            return self.files.get(stored.key).to(device)
        return dequantize(
            stored.form, {part: tensor.to(device) for part, tensor in read_parts(self.files, stored).items()}
        )


def expected_tensors(model: nn.Module) -> dict[str, tuple[Shape, tuple[str, ...] | None]]:
    """Every tensor that a model on the meta device needs: name -> (shape, dtypes allowed; None for any stored form).

    ValueError for an SVDQuant linear of sizes that its layout cannot have.
    """
    from ..linear.svdq import SVDQLinear
    from .stored import StoredWeight

    expected: dict[str, tuple[Shape, tuple[str, ...] | None]]
    expected = {name: (tuple(p.shape), FLOATS) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, StoredWeight):
            expected[f"{name}.weight"] = (module.shape, None)
        elif isinstance(module, SVDQLinear):
            n, k, rank = module.out_features, module.in_features, module.rank
            if n % TILE or k % TILE or rank % RANK_TILE:
                raise ValueError(
                    f"{name}: the SVDQuant layout needs widths divisible by {TILE} and ranks by {RANK_TILE}, "
                    f"found {n} x {k} at rank {rank}; this file cannot be a SVDQuant model"
                )
            dtypes = {"qweight": CODES} | ({"wscales": ("F8_E4M3",)} if module.fp4 else {})
            for leaf, shape in nunchaku_shapes(n, k, rank, module.fp4).items():
                expected[f"{name}.{leaf}"] = shape, dtypes.get(leaf, HALVES)
            if module.bias is not None:
                expected[f"{name}.bias"] = ((n,), HALVES)
            if module.fp4:
                expected[f"{name}.wtscale"] = (1,), (*FLOATS, "F8_E4M3")
                expected[f"{name}.wcscales"] = (n,), (*FLOATS, "F8_E4M3")
    return expected


def match_tensors(
    files: TensorFiles,
    found: Mapping[str, Stored],
    model: nn.Module,
    rename: Rename,
    remedy: str,
    unneeded: Callable[[str], bool] = lambda name: False,
    what: str = "the model",
    any_form: bool = False,
) -> Sources:
    """Where each tensor that a model on the meta device needs is in a file.

    rename: a tensor's name in the file -> the model's name and part. unneeded: whether a name may be there though the
    model lacks it. any_form: whether every tensor may be stored small.
    ValueError, ending in the remedy, for tensors that are unknown, doubled, missing, misshapen or of another type.
    """
    expected = expected_tensors(model)
    named: dict[str, dict[str | None, str]] = {}
    for key, stored in found.items():
        target, part = rename(key) or (key, None)
        if target not in expected:
            if unneeded(target):
                continue
            raise unexpected(files.path, stored.key, what, remedy)
        parts = named.setdefault(target, {})
        if part in parts:
            twin = found[parts[part]].key
            raise ValueError(
                f"{files.path}: {stored.key!r} and {twin!r} are the same tensor, expected only one; {remedy}"
            )
        parts[part] = key

    sources = {}
    for target, (shape, dtypes) in expected.items():
        parts = named.get(target, {})
        if not parts and target.endswith(OPTIONAL):
            continue
        order: tuple[str | None, ...] = (None,)
        if None not in parts:
            order = next((p for m, p in FUSED_PARTS.items() if target.endswith(f"{m}.weight")), order)
        missing = [part for part in order if part not in parts]
        if missing:
            name = repr(f"{target} (part {missing[0]})" if missing[0] else target)
            raise ValueError(
                f"{files.path}: expected tensor {name} of shape {shape}, found none; the file is incomplete "
                f"or laid out otherwise, download it again or {remedy}"
            )
        sources[target] = [found[parts[part]] for part in order]
        each = (shape[0] // len(order), *shape[1:]) if len(order) > 1 else shape
        for stored in sources[target]:
            _check(files, stored, each, None if any_form else dtypes, remedy)
    return Sources(files, sources)


def _check(files: TensorFiles, stored: Stored, shape: Shape, dtypes: tuple[str, ...] | None, remedy: str) -> None:
    """ValueError unless a tensor has a shape, but for axes of length 1, and a type."""
    from .stored import is_small

    dtype = files.tensors[stored.key][0]
    if dtypes is None and stored.form != "float" and not is_small(stored.form):
        dtypes = FLOATS
    if dtypes and (dtype not in dtypes or stored.form not in (dtype, "float")):
        expected = " or ".join(", ".join(dtypes).rsplit(", ", 1))
        raise ValueError(f"{files.path}: {stored.key!r}: expected dtype {expected}, found {dtype}; {remedy}")
    if stored.shape != shape and [n for n in stored.shape if n != 1] != [n for n in shape if n != 1]:
        raise ValueError(
            f"{files.path}: {stored.key!r}: expected shape {shape}, found {stored.shape}; the file belongs to another "
            f"model or is damaged, {remedy}"
        )


def fill(
    model: nn.Module,
    sources: Sources,
    device: torch.device | str,
    dtype: torch.dtype,
    copy: bool = True,
) -> None:
    """Give a model on the meta device its tensors, for inference; what is not quantized in dtype.

    The model's `backend` prepares SVDQuant linears. Without copy, what the CPU takes as it is stays memory-mapped.
    """
    import torch
    from torch import nn

    from ..linear.svdq import SVDQLinear, SVDQWeights
    from .stored import HostEmbedding, StoredWeight
    from .weights import read_parts

    backend = cast("Backend", getattr(model, "backend", None))

    for name, module in list(model.named_modules()):
        if isinstance(module, StoredWeight):
            place = "cpu" if isinstance(module, HostEmbedding) else device
            for stored in sources.stored[f"{name}.weight"]:
                parts = read_parts(sources.files, stored)
                _check_scales(sources, stored, parts)
                kind = dtype if stored.form == "float" and not isinstance(module, HostEmbedding) else None
                module.load(stored.form, {part: t.to(place, kind or t.dtype, copy=copy) for part, t in parts.items()})
        elif isinstance(module, SVDQLinear):
            leaves = [key.rpartition(".")[2] for key in sources.stored if key.startswith(f"{name}.")]
            packed = {leaf: sources.get(f"{name}.{leaf}", device) for leaf in leaves}
            kept = {leaf for leaf, t in packed.items() if t.element_size() == 1 or f".{leaf}" in OPTIONAL}
            packed = {leaf: t if leaf in kept else t.to(dtype) for leaf, t in packed.items()}
            floats = [leaf for leaf, tensor in packed.items() if tensor.is_floating_point()]
            small = [leaf for leaf in floats if packed[leaf].numel() <= SMALL or dtype is torch.float16]
            _check_numbers(sources, {sources.stored[f"{name}.{leaf}"][0].key: packed[leaf] for leaf in small})
            module.load(SVDQWeights.from_packed(packed), backend)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            target = f"{name}.{leaf}".lstrip(".")
            value = sources.get(target, device).to(dtype, copy=copy).reshape(parameter.shape)
            if value.numel() <= SMALL or dtype is torch.float16:
                _check_numbers(sources, {sources.stored[target][0].key: value})
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    model.eval().requires_grad_(False)


def _check_scales(sources: Sources, stored: Stored, parts: Mapping[str, Tensor]) -> None:
    """ValueError where a weight's scales are no numbers, or 0 for weights that are not."""
    import torch

    if "scale" not in stored.keys or parts["scale"].is_meta:
        return
    key, scale = stored.keys["scale"], parts["scale"]
    _check_numbers(sources, {key: scale})
    if stored.form.startswith("asym_w4a8_int8"):  # comfy-kitchen takes what is no number for 0
        _check_numbers(sources, {stored.keys["block_scale"]: parts["block_scale"].view(torch.float8_e4m3fn)})
    codes, kind = parts["codes"][scale.flatten() == 0], stored.form.split(" ")[0]
    if kind in MAGNITUDE and (codes & MAGNITUDE[kind]).any():
        raise ValueError(
            f"{sources.files.path}: {key!r}: expected a scale other than 0 for weights that are not 0, found 0; "
            "download the file again"
        )


def _check_numbers(sources: Sources, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where tensors hold NaN or infinity, or a smoothing factor is 0.

    Small tensors are checked, where a gate's tanh would hide it, and all in fp16, where saturation would. Larger ones
    are not read for it: the result of each stage is checked instead.
    """
    for key, tensor in tensors.items():
        if tensor.is_meta:
            continue
        if not tensor.float().isfinite().all():  # torch has no isfinite of FP8
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{sources.files.path}: {key!r}: expected finite numbers in {dtype}, found NaN or infinity; download "
                "the file again"
            )
        if key.endswith(".smooth_factor") and not tensor.all():
            raise ValueError(f"{sources.files.path}: {key!r}: expected no zero, found one; download the file again")


def build(kind: Callable[..., BlockModelT], info: FileInfo, config: object) -> BlockModelT:
    """A model of blocks, as a file stores their linears, on the meta device."""
    import torch

    from ..linear.adapters import Linear
    from ..linear.svdq import SVDQLinear
    from .stored import StoredLinear

    def svdq(n_in: int, n_out: int, bias: bool) -> nn.Module:
        return SVDQLinear(n_in, n_out, bias, rank=info.rank, fp4=info.fp4)

    plain = StoredLinear if info.format in STORED else Linear
    with torch.device("meta"):
        return kind(
            config, linear=svdq if info.rank else plain, refiner_linear=svdq if info.quantized_refiners else plain
        )


def fill_blocks(
    model: BlockModel,
    sources: Sources,
    info: FileInfo,
    head_dim: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    precision: str = "auto",
    compute_device: str | torch.device | None = None,
) -> None:
    """`fill` a model of blocks, for the backend that runs it; options as of `load_transformer`."""
    import torch

    from ..tune import select, select_ops
    from .stored import choose_arithmetic

    dtype = dtype or torch.bfloat16
    compute_device = torch.device(compute_device or device)
    if info.rank:
        model.backend = select(backend, precision, device=compute_device, dtype=dtype, fp4=info.fp4)
    model.use(select_ops(backend, compute_device, dtype, head_dim, info.fp4))
    fill(model, sources, torch.device(device), dtype)
    if not info.rank:
        try:
            model.backend = choose_arithmetic(model, compute_device, dtype, backend, precision)
        except ValueError as error:
            raise ValueError(f"{sources.files.path}: precision {precision}: {error}; take auto") from None


# ---------------------------------------------------------------- transformers


@contextmanager
def open_transformer(path: str | Path) -> Iterator[tuple[ModelInfo, TensorFiles]]:
    """What a transformer file is, and the file opened; `match_transformer` checks its tensors."""
    with open_part(path, "model") as files:
        yield model_info(files), files


def match_transformer(files: TensorFiles, model: ZImageTransformer, info: ModelInfo) -> Sources:
    """Where each of a transformer's tensors is in an open file. ValueError as `match_tensors`."""
    from .weights import find_weights

    remedy = EXPECTED["model"][1]
    unneeded = (*UNUSED, ".smooth_factor_orig")
    return match_tensors(
        files,
        find_weights(files, remedy),
        model,
        canonical_tensor,
        remedy,
        lambda name: name.endswith(unneeded),
        "a Z-Image transformer",
        any_form=info.format in STORED,
    )


def build_transformer(info: ModelInfo) -> ZImageTransformer:
    """The model of a transformer file, on the meta device."""
    from ..models.transformer import ZImageTransformer

    return build(ZImageTransformer, info, info.config)


def check_transformer(path: str | Path) -> ModelInfo:
    """Format, rank and sizes of a file, from its header; ValueError unless `load_transformer` would take it."""
    with open_transformer(path) as (info, files):
        match_transformer(files, build_transformer(info), info)
        for check in files.checks:
            check()
    return info


def load_transformer(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    precision: str = "auto",
    compute_device: str | torch.device | None = None,
) -> ZImageTransformer:
    """The model of a checkpoint (a file or folder in a form of `identify.READ`) on a device.

    dtype is that of everything not quantized (default bf16). backend and precision choose the INT4 arithmetic for
    compute_device (default `device`), where the model will run if its weights wait elsewhere; see `tune.select`.
    A file's INT8 and FP8 linears are multiplied as they are stored with precision "w8a8", and with "auto" where that is
    faster. Raises ValueError naming file, key, expected and found.
    """
    with open_transformer(path) as (info, files):
        model = build_transformer(info)
        fill_blocks(
            model,
            match_transformer(files, model, info),
            info,
            info.config.head_dim,
            device=device,
            dtype=dtype,
            backend=backend,
            precision=precision,
            compute_device=compute_device,
        )
    model.checkpoint = info
    return model
