"""SVDQuant INT4 files between layouts: nunchaku's, and comfy-kitchen's, in rows or tiles, under ComfyUI's names.

Nothing is rounded: codes, scales, smoothing vectors and low-rank branches are the same numbers in another order.
`smooth_factor_orig`, which nothing reads, is a copy of `smooth_factor` in nunchaku's files and left out of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..failures import one_of
from ..formats.layouts import to_kitchen
from ..formats.load import Sources, build_transformer, match_transformer, open_transformer
from ..formats.names import FUSED_PARTS, comfy_module, diffusers_svdq_module
from ..linear.svdq import SVDQLinear, SVDQWeights
from ..whole import check_target
from .writer import DTYPES, StreamedFile, aligned, check_apart, file_metadata, nunchaku_tensors

LAYOUTS = ("nunchaku", "kitchen", "kitchen-tiles")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def convert(src: str | Path, dst: str | Path, layout: str, progress: Callable[[int, int], None] | None = None) -> None:
    """Write a SVDQuant INT4 file or folder in another layout, one of `LAYOUTS`. progress(done, total).

    ValueError if the source is something else or damaged, or the destination cannot be written.
    """
    one_of("layout", layout, LAYOUTS)
    src, dst = Path(src), Path(dst)
    check_target(dst)
    with open_transformer(src) as (info, files):
        if info.format != "svdq-int4":
            raise ValueError(f"{src}: expected SVDQuant INT4, found {info.format}; other formats have one layout only")
        check_apart(dst, files)
        model = build_transformer(info)
        sources = match_transformer(files, model, info)
        linears = {name for name, module in model.named_modules() if isinstance(module, SVDQLinear)}
        modules: dict[str, list[str]] = {}
        for target in sources.stored:
            modules.setdefault(target.rpartition(".")[0], []).append(target)

        def tensors(module: str, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
            found = {target.rpartition(".")[2]: read(target) for target in modules[module]}
            return _quantized(module, found, layout) if module in linears else _plain(module, found, layout)

        planned = [made for module in modules for made in tensors(module, lambda target: _planned(sources, target))]
        header = aligned({name: (_NAMES[t.dtype], tuple(t.shape)) for name, t in planned})
        metadata = dict(files.metadata)
        if layout == "nunchaku":
            metadata = file_metadata(info.config, info.rank, not info.quantized_refiners) | metadata
        with StreamedFile(dst, header, metadata) as out:
            for done, module in enumerate(modules, 1):
                for name, tensor in tensors(module, lambda target: sources.get(target, "cpu")):
                    if header[name][0] != _NAMES[tensor.dtype]:
                        raise ValueError(
                            f"{src}: {module}: expected a low-rank branch that takes x itself, found one that takes it "
                            "smoothed, which no other layout can say; load the file as it is"
                        )
                    out.write(name, tensor)
                if progress:
                    progress(done, len(modules))


def _planned(sources: Sources, target: str) -> Tensor:
    """A tensor of a file on the meta device."""
    pieces = [(s.shape, DTYPES[sources.files.tensors[s.key][0]]) for s in sources.stored[target]]
    return torch.cat([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in pieces])


def _quantized(module: str, packed: dict[str, Tensor], layout: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a SVDQuant linear under the layout's names."""
    weights = SVDQWeights.from_packed(packed)
    if layout == "nunchaku":
        for leaf, tensor in nunchaku_tensors(weights).items():
            yield f"{diffusers_svdq_module(module)}.{leaf}", tensor
        return
    names = _names(module, layout)
    rows = ("qweight", "wscales", "proj_up", "bias")
    cut = {name: tensor.chunk(len(names)) for name, tensor in weights.tensors().items() if name in rows}
    for i, name in enumerate(names):
        part = replace(weights, **{row: pieces[i] for row, pieces in cut.items()})
        for leaf, tensor in to_kitchen(part, layout == "kitchen-tiles").items():
            yield f"{name}.{leaf}", tensor


def _plain(module: str, tensors: dict[str, Tensor], layout: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of any other module under the layout's names."""
    names = _names(module, layout)
    for leaf, tensor in tensors.items():
        for name, rows in zip(names, tensor.chunk(len(names)), strict=True):
            yield f"{name}.{leaf}" if name else leaf, rows


def _names(module: str, layout: str) -> list[str]:
    """What a layout calls a module, or in order the linears that it is made of."""
    stem, _, last = module.rpartition(".")
    if layout == "nunchaku":
        if last == "to_qkv":
            return [f"{stem}.to_{part}" for part in FUSED_PARTS["attention.to_qkv"]]
        return [diffusers_svdq_module(module)]
    if last == "w3_w1":
        return [f"{stem}.{part}" for part in FUSED_PARTS["feed_forward.w3_w1"]]
    return [comfy_module(module)]
