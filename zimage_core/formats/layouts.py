"""SVDQuant linears in other layouts than nunchaku's fused one: seen as that one, and put into comfy-kitchen's.

comfy-kitchen's `svdquant_w4a4` is the same arithmetic with rows as they are, or in tiles of 128. q, k, v and w3, w1
may be linears of their own, in that layout or in nunchaku's (diffusers' Nunchaku Lite). They are one linear where they
share smoothing vector and `proj_down`, as those do that were split from one. All of it is exact.

Legend: N out, K in, R rank, G = K / 64 groups.
Source: comfy-kitchen 0.2.40 `backends/eager/svdquant.py`; Comfy-Org/comfy-quants
`docs/formats/svdquant_w4a4_kitchen_tilepack.md`, which also says what a layer's description means; diffusers 0.42.1
`quantizers/nunchaku/utils.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from .names import FUSED_PARTS, canonical_module
from .safetensors import Shape, TensorFiles, Tensors, json_object

if TYPE_CHECKING:
    from torch import Tensor

    from ..linear.svdq import SVDQWeights

TILE, GROUP, MICRO_GROUP, INTERLEAVE = 128, 64, 16, 4
FORMAT, TILES = "svdquant_w4a4", "kitchen_tile_packed_w4a4"
REMEDY = "get the file that nunchaku published, or quantize the BF16 model"
_KEY = re.compile(
    r"(.+)\.(qweight|wscales|wtscale|wcscales|smooth_factor_orig|weight_scale|weight|bias|comfy_quant"
    r"|(?:weight_)?(?:smooth_factor|proj_down|proj_up))"
)
Keys = Mapping[str, str]  # a linear's tensors: leaf -> key of the file


def present(files: TensorFiles) -> None:
    """Show a file's SVDQuant linears under nunchaku's names and shapes, fused; their tensors are made when asked for.

    ValueError where the tensors of a linear do not fit together.
    """
    linears: dict[str, dict[str | None, dict[str, str]]] = {}  # module -> part -> leaf -> key
    for key in files.tensors:
        if (match := _KEY.fullmatch(key)) and (found := canonical_module(match[1])):
            leaf = match[2] if match[2] == "weight_scale" else match[2].removeprefix("weight_")
            linears.setdefault(found[0], {}).setdefault(found[1], {})[leaf] = key
    fused = _Fused(files)
    for module, parts in linears.items():
        quantized = [keys for keys in parts.values() if "proj_down" in keys]
        if not quantized or (len(parts) == 1 and "qweight" in parts.get(None, {})):
            continue
        names: tuple[str | None, ...] = (None,)
        if None not in parts:
            names = next(order for suffix, order in FUSED_PARTS.items() if module.endswith(suffix))
        if set(parts) != set(names) or len(quantized) < len(names):
            found_parts = ", ".join(str(part or "whole") for part in parts)
            _refuse(files, module, f"SVDQuant in each of {', '.join(map(str, names))}", found_parts)
        fused.parts[module] = [parts[part] for part in names]
        shown = _shapes(files, module, fused.parts[module])
        for keys in parts.values():
            if "comfy_quant" in keys:
                files.checks.append(partial(_described, files, keys["comfy_quant"]))
            for key in keys.values():
                del files.tensors[key]
        files.tensors |= {f"{module}.{leaf}": entry for leaf, entry in shown.items()}
        files.derived |= {f"{module}.{leaf}": partial(fused.get, module, leaf) for leaf in shown}


def nunchaku_shapes(n: int, k: int, rank: int, fp4: bool) -> dict[str, Shape]:
    """The tensors of a linear that nunchaku's files always have: leaf -> shape."""
    return {
        "qweight": (n, k // 2),
        "wscales": (k // (MICRO_GROUP if fp4 else GROUP), n),
        "smooth_factor": (k,),
        "proj_down": (k, rank),
        "proj_up": (n, rank),
    }


class _Fused:
    """Linears as nunchaku stores them; the one made last is kept, as its tensors are asked for one after the other."""

    def __init__(self, files: TensorFiles):
        self.files = files
        self.parts: dict[str, list[Keys]] = {}
        self._last: tuple[str, dict[str, Tensor]] | None = None

    def get(self, module: str, leaf: str) -> Tensor:
        """One tensor of a linear. ValueError where its parts cannot be one linear."""
        if self._last is None or self._last[0] != module:
            self._last = module, self._read(module).to_packed()
        return self._last[1][leaf]

    def _read(self, module: str) -> SVDQWeights:
        import torch

        from ..linear.svdq import SVDQWeights

        found = [self._part(keys) for keys in self.parts[module]]
        first = found[0]
        for keys, other in zip(self.parts[module], found, strict=True):
            for leaf in ("smooth_factor", "proj_down"):
                if not torch.equal(getattr(first, leaf), getattr(other, leaf)):
                    key = keys[leaf]
                    _refuse(self.files, key, f"the {leaf} of the linears beside it, which makes them one", "another")
        by_rows = {name: [one.tensors()[name] for one in found] for name in first.tensors()}
        shared = {"smooth_factor": first.smooth_factor, "proj_down": first.proj_down}
        return SVDQWeights(**{name: torch.cat(rows) for name, rows in by_rows.items()} | shared)

    def _part(self, keys: Keys) -> SVDQWeights:
        from ..linear.svdq import SVDQWeights

        tensors = {leaf: self.files.stored(key) for leaf, key in keys.items() if leaf != "smooth_factor_orig"}
        if "qweight" in keys:
            return SVDQWeights.from_packed(tensors)
        described: dict[str, object] = {}
        if "comfy_quant" in keys:
            described = _described(self.files, keys["comfy_quant"])
        return from_kitchen(tensors, described.get("lowrank_branch_input_basis") == "post_smoothing")


def from_kitchen(tensors: Mapping[str, Tensor], post_smoothing: bool = False) -> SVDQWeights:
    """comfy-kitchen's tensors of one linear, of either layout -> its weights.

    post_smoothing: the low-rank branch takes x / smooth; `proj_down` is divided by it then, in fp32.
    """
    from ..linear import layout
    from ..linear.svdq import SVDQWeights

    codes, scales, up = tensors["weight"], tensors["weight_scale"], tensors["proj_up"]
    if codes.ndim == 4:
        n, groups = codes.shape[0] * TILE, codes.shape[1]
        tiles = codes.view(-1, groups, TILE // INTERLEAVE, INTERLEAVE, GROUP // 2)
        codes = tiles.permute(0, 2, 3, 1, 4).reshape(n, -1)
        scales, up = scales.permute(1, 0, 2).reshape(groups, n), up.permute(0, 2, 1).reshape(n, -1)
    down, smooth = tensors["proj_down"].t(), tensors["smooth_factor"]
    return SVDQWeights(
        layout.pack_nibbles(layout.unpack_pairs(codes).flatten(1)),
        scales.t().contiguous(),
        smooth,
        down.float() / smooth.float() if post_smoothing else down.contiguous(),
        up.contiguous(),
        tensors.get("bias"),
    )


def to_kitchen(weights: SVDQWeights, tiles: bool) -> dict[str, Tensor]:
    """INT4 weights of one linear -> comfy-kitchen's tensors, in rows as they are or in tiles."""
    import torch

    from ..linear import layout

    n, groups = weights.wscales.shape
    codes = layout.pack_pairs(layout.unpack_nibbles(weights.qweight).view(n, -1, 2))
    scales, up = weights.wscales.t(), weights.proj_up
    if tiles:
        rows = codes.view(-1, TILE // INTERLEAVE, INTERLEAVE, groups, GROUP // 2).permute(0, 3, 1, 2, 4)
        codes = rows.reshape(n // TILE, groups, TILE // INTERLEAVE, INTERLEAVE * GROUP // 2)
        scales, up = (
            weights.wscales.view(-1, TILE, groups).transpose(1, 2),
            up.view(n // TILE, TILE, -1).transpose(1, 2),
        )
    described: dict[str, object] = {"format": FORMAT}
    if tiles:
        described["layout"] = TILES
    described |= {"lowrank_branch_input_basis": "raw", "proj_down_smooth_folded": True}
    found = {
        "weight": codes,
        "weight_scale": scales,
        "smooth_factor": weights.smooth_factor,
        "proj_down": weights.proj_down.t(),
        "proj_up": up,
        "comfy_quant": torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8),
    }
    return found if weights.bias is None else found | {"bias": weights.bias}


def _shapes(files: TensorFiles, module: str, parts: list[Keys]) -> Tensors:
    """The tensors of a fused linear as nunchaku stores them, leaf -> (dtype, shape), from the headers of its parts."""
    columns, ranks, rows = set(), set(), 0
    shown: dict[str, str] = {}  # leaf -> dtype
    for keys in parts:
        n, k, rank, expected = _part_shapes(files, module, keys)
        for leaf, shape in expected.items():
            if leaf not in keys:
                _refuse(files, f"{module}.{leaf}", f"a tensor of shape {shape} beside proj_down", "none")
            dtype, found = files.tensors[keys[leaf]]
            if found != shape:
                _refuse(files, keys[leaf], f"shape {shape}", found)
            if leaf in ("weight", "qweight") and dtype not in ("I8", "U8"):
                _refuse(files, keys[leaf], "codes in bytes", dtype)
        columns.add(k)
        ranks.add(rank)
        rows += n
        shown |= {leaf: files.tensors[key][0] for leaf, key in keys.items()}
    if len(columns) > 1 or len(ranks) > 1:
        _refuse(files, module, "one width and one rank of its parts", f"{sorted(columns)} and {sorted(ranks)}")
    (k,), (rank,) = columns, ranks
    fp4 = _is_fp4(shown)
    shown |= {"qweight": "I8", "wscales": shown.get("wscales") or shown["weight_scale"]}
    tensors: Tensors = {leaf: (shown[leaf], shape) for leaf, shape in nunchaku_shapes(rows, k, rank, fp4).items()}
    if "bias" in shown:
        tensors["bias"] = shown["bias"], (rows,)
    return tensors | ({"wcscales": ("F32", (rows,))} if fp4 else {})


def _part_shapes(files: TensorFiles, module: str, keys: Keys) -> tuple[int, int, int, dict[str, Shape]]:
    """N, K and R of one part, and the shapes that its tensors must have."""
    down = files.tensors[keys["proj_down"]][1]
    main = keys.get("qweight") or keys.get("weight")
    if len(down) != 2 or main is None:
        _refuse(files, keys["proj_down"], "shape (K, R) beside the codes of a linear", down if main else "no codes")
    (k, rank), shape = down, files.tensors[main][1]
    count, groups = shape[0] if shape else 0, k // GROUP
    n = count * TILE if len(shape) == 4 else count
    expected = nunchaku_shapes(n, k, rank, _is_fp4(keys))
    if "qweight" not in keys:
        del expected["qweight"], expected["wscales"]
        expected |= {"weight": (n, k // 2), "weight_scale": (groups, n)}
        if len(shape) == 4:
            expected["weight"] = (count, groups, TILE // INTERLEAVE, INTERLEAVE * GROUP // 2)
            expected |= {"weight_scale": (count, groups, TILE), "proj_up": (count, rank, TILE)}
    for leaf, size in (("bias", n), ("wcscales", n), ("wtscale", 1)):
        if leaf in keys:
            expected[leaf] = (size,)
    if "comfy_quant" in keys:
        expected["comfy_quant"] = files.tensors[keys["comfy_quant"]][1][:1]
    return n, k, rank, expected


def _is_fp4(leaves: Container[str]) -> bool:
    return "wtscale" in leaves or "wcscales" in leaves


def _described(files: TensorFiles, key: str) -> dict[str, object]:
    """What a layer says of itself. ValueError unless it is SVDQuant with signed activations in a known layout."""
    import torch

    found = json_object(bytes(files.stored(key).view(torch.uint8).tolist()))
    if found is None or found.get("format") != FORMAT:
        _refuse(files, key, f"the format {FORMAT} beside proj_down", found)
    if found.get("act_unsigned") or found.get("layout", TILES) not in (TILES, "natural"):
        _refuse(files, key, f"signed activations, natural or in {TILES}", found)
    return found


def _refuse(files: TensorFiles, key: str, expected: object, found: object) -> NoReturn:
    raise ValueError(f"{files.path}: {key}: expected {expected}, found {found}; {REMEDY}")
