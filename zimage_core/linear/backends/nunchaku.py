"""nunchaku's kernels, which take the stored layout unchanged: INT4 on sm_75 to sm_89, FP4 on sm_120.

Its engine is not on PyPI: `pip install nunchaku` installs a statistics library.

The kernels check little: more than MAX_RANK ranks give wrong results, no rows an error, more than MAX_ELEMENTS
elements an illegal access, other dtypes garbage or an abort. So all of that is checked here. For K of 384 or more they
add up in varying order, so that pictures of one seed may differ in the last bits from run to run.

Legend: M rows, N out, K in, R rank, G = K / 64 groups (K / 16 of FP4).
Source: nunchaku/ops/{quantize.py,gemm.py} and nunchaku/models/linear.py@92e4695.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import layout
from . import allocate_w4a4, capability, guard
from .reference import FIELDS

if TYPE_CHECKING:
    from ..svdq import SVDQWeights

PRECISIONS = ("w4a4",)
FP4 = PRECISIONS
INT4_KERNELS = (75, 80, 86, 87, 89)
FP4_KERNELS = (120,)
ENGINE = "https://github.com/nunchaku-ai/nunchaku/releases"
MAX_RANK = 1024  # 64 scales, one for 16 ranks
MAX_ELEMENTS = 2**31 - 1  # of x and of y: they are indexed in 32 bits
PAD_ROWS = 256  # a multiple of which the activations are padded to


def unavailable(
    device: torch.device, dtype: torch.dtype, fp4: bool = False, precision: str | None = None
) -> str | None:
    """Why it cannot run there: the engine is missing, or refuses the GPU or the dtype."""
    spec = importlib.util.find_spec("nunchaku")
    if spec is None:
        return f"the engine is not installed; its wheels are at {ENGINE} (not on PyPI)"
    if not any((Path(folder) / "ops").is_dir() for folder in spec.submodule_search_locations or ()):
        return (
            "the package nunchaku that is installed is PyPI's statistics library, not the engine; "
            f"pip uninstall nunchaku, then install a wheel from {ENGINE}"
        )
    sm = capability(device)
    if sm is None:
        return f"needs an NVIDIA GPU, the device is {device.type}"
    if fp4 and sm not in FP4_KERNELS:
        return f"its FP4 kernels need sm_120, the GPU is sm_{sm}"
    if not fp4 and sm not in INT4_KERNELS:
        why = "its INT4 kernels refuse Blackwell" if sm >= 100 else "it refuses a GPU without 4-bit tensor cores"
        return f"{why} (sm_{sm}); they take sm_75 to sm_89"
    if dtype not in ((torch.float16,) if sm < 80 else (torch.bfloat16, torch.float16)):
        return f"takes {'float16' if sm < 80 else 'bfloat16 or float16'} on sm_{sm}, asked for {dtype}"
    try:
        import nunchaku.ops.gemm
        import nunchaku.ops.quantize  # noqa: F401
    except (ImportError, OSError) as error:
        return f"the engine cannot be imported ({error}); install the wheel for this torch from {ENGINE}"
    return None


def prepare(weights: SVDQWeights, precision: str) -> dict[str, torch.Tensor]:
    """The tensors as a file stores them, of FP4 every scale of the rows as `wcscales` in the dtype of activations.

    ValueError for a rank above MAX_RANK."""
    if weights.rank > MAX_RANK:
        raise ValueError(f"rank: expected up to {MAX_RANK} for nunchaku, found {weights.rank}; choose another backend")
    packed = weights.to_packed()
    if weights.outer_scale is not None:
        packed["wcscales"] = packed["wcscales"].to(weights.smooth_factor.dtype)
        packed["outer_scale"] = weights.outer_scale  # exact, for `restore`
    return packed


def restore(prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The fields of SVDQWeights."""
    packed = {name: prepared[name] for name in FIELDS if name in prepared}
    return layout.unpack_linear(packed) | {name: t for name, t in packed.items() if name == "outer_scale"}


def join(
    prepared: Mapping[str, torch.Tensor], rank: int, pair: tuple[torch.Tensor, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """The low-rank branch with a pair behind its first `rank`, or without; None above MAX_RANK together."""
    if pair is not None and rank + len(pair[0]) > MAX_RANK:
        return None
    down = layout.unpack_proj_down(prepared["proj_down"])[:rank]
    up = layout.unpack_proj_up(prepared["proj_up"])[:, :rank]
    if pair is not None:
        down, up = torch.cat((down, pair[0])), torch.cat((up, pair[1]), 1)
    return {"proj_down": layout.pack_proj_down(down), "proj_up": layout.pack_proj_up(up)}


def linear(x: torch.Tensor, prepared: Mapping[str, torch.Tensor], precision: str) -> torch.Tensor:
    """x (M, K) -> (M, N). ValueError if x has another dtype than the weights."""
    n = len(prepared["qweight"])
    if x.is_meta:
        return allocate_w4a4(x, prepared["proj_down"].shape[1], n, "wcscales" in prepared)
    if x.dtype != prepared["smooth_factor"].dtype:
        raise ValueError(f"nunchaku: expected activations in {prepared['smooth_factor'].dtype}, found {x.dtype}")
    y, x = x.new_empty(len(x), n), x.contiguous()
    rows = MAX_ELEMENTS // max(n, x.shape[1]) // PAD_ROWS * PAD_ROWS
    with guard(x.device):
        for start in range(0, len(x), rows):
            _linear(x[start : start + rows], prepared, y[start : start + rows])
    return y


def _linear(x: torch.Tensor, prepared: Mapping[str, torch.Tensor], y: torch.Tensor) -> None:
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    fp4 = "wcscales" in prepared
    codes, ascales, rank = svdq_quantize_w4a4_act_fuse_lora_cuda(
        x, lora_down=prepared["proj_down"], smooth=prepared["smooth_factor"], fp4=fp4, pad_size=PAD_ROWS
    )
    svdq_gemm_w4a4_cuda(
        act=codes,
        wgt=prepared["qweight"],
        out=y,
        ascales=ascales,
        wscales=prepared["wscales"],
        lora_act_in=rank,
        lora_up=prepared["proj_up"],
        bias=prepared.get("bias"),
        fp4=fp4,
        wcscales=prepared.get("wcscales"),
    )
