"""The Triton backend: every call dequantizes the weight into a temporary buffer, then runs one GEMM.

w4a16: up to FEW_ROWS rows one kernel writes q * s / smooth, and the GEMM takes the low-rank branch as R more channels
of x and of the weight, which costs M * (N + K) * R products; `fused` leaves space for them behind the rows that it
writes. For more rows, and where x has no such space, the kernel adds up @ down to the weight, which costs N * K * R
products for any M.

w4a8: activations x / smooth in 8 bits with a scale per row, weights in 8 bits with a scale per output channel, fp8
(e4m3) from sm_89 on and int8 before. In a block `quantize_rows` is left for the attention's result only: `fused` writes
the codes for the other three linears. Times of each part and their lower bounds: benchmarks/README.md.

In fp8 the low-rank branch is 3 R more channels of the same product, so that it needs no pass over y of its own. One fp8
for a number would raise the error by half, so each is two that add up to it, with the bits of a bf16: x @ down.T takes
the columns hi, lo, hi, and up hi, hi, lo. Three scales meet there: a row's (from x), an output channel's, and
`rank_scale` of each rank, the most that x @ down.T can be of the row's, so that no code overflows. In int8 the kernel
of the product adds the branch in 16 bits before it rounds.

FP4 weights take the same kernels, which read their codes and scales otherwise.

Legend: M rows, N out, K in, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from ...sizes import round_up
from . import Quantized, Smoothing, amd_architecture, capability, load, reference
from .reference import restore

if TYPE_CHECKING:
    from ..svdq import SVDQWeights

__all__ = ["PRECISIONS", "FP4", "MIXED", "unavailable", "prepare", "restore", "join", "smoothing", "linear"]
PRECISIONS = FP4 = MIXED = ("w4a8", "w4a16")
LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # the largest code
TO_FP8 = 1 / LIMITS[torch.float8_e4m3fn]
AMD = ("gfx90a", "gfx942", "gfx950", "gfx11", "gfx12")  # with matrix units; the kernels are compiled for some, unrun
OLDEST_TRITON = (3, 2)  # comes with torch 2.6; before it the kernels fail to compile or to compute
PART = 32  # columns of the low-rank branch come in so many: K of a tensor core's instruction
MOST_GROWTH = 4096.0  # of a channel's scale by the low-rank columns: its smallest codes are subnormal beyond
FEW_ROWS = 2048  # up to so many the low-rank branch is cheaper by the row than by the weight


def unavailable(
    device: torch.device, dtype: torch.dtype, fp4: bool = False, precision: str | None = None
) -> str | None:
    """Why it cannot run there: no triton, no GPU with matrix units that it compiles for, or a dtype without them."""
    sm, amd = capability(device), amd_architecture(device)
    if sm is None and amd is None:
        return f"needs an NVIDIA or AMD GPU, the device is {device.type}"
    if amd is not None and not amd.startswith(AMD):
        return f"needs {', '.join(AMD)}, the GPU is {amd}"
    if sm is not None and sm < 75:
        return f"needs sm_75 or later, the GPU is sm_{sm}"
    if sm is not None and sm < 80 and dtype is not torch.float16:
        return f"takes float16 on sm_{sm}, asked for {dtype}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16, asked for {dtype}"
    try:
        import triton

        from . import triton_kernels  # noqa: F401
    except (ImportError, OSError) as error:
        return f"triton cannot be imported ({error}); install it with pip install triton (triton-windows on Windows)"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"needs triton {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or later, found {triton.__version__}; update torch"
    return None


def prepare(weights: SVDQWeights, precision: str) -> dict[str, torch.Tensor]:
    """The weights' tensors; for w4a8 also `channel_scale` and what `branch_scales` makes."""
    prepared = weights.tensors()
    if precision == "w4a8":
        prepared["channel_scale"] = channel_scale(weights)
        prepared |= branch_scales(prepared)
    return prepared


def channel_scale(weights: SVDQWeights) -> torch.Tensor:
    """Each row's largest |q * s| / 448, (N,) fp32."""
    largest = (weights.largest_codes() * weights.scales().abs()).amax(1)
    # Multiplied, not divided: CUDA rounds a division by a constant differently from the CPU, and a model prepared on
    # the CPU for streaming must be equal.
    return largest.clamp_(min=1e-12) * TO_FP8


def branch_scales(prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`rank_scale` (R,) and `wide_scale` (N,), the channels' with the low-rank columns, both fp32.

    rank_scale is empty, and there are no such columns, where they would raise a channel's scale beyond MOST_GROWTH.
    In fp64 and rounded up to 4 bits, so that CPU and GPU, which sum in another order, agree."""
    channel, down = prepared["channel_scale"], prepared["proj_down"].double().abs()
    mantissa, exponent = torch.frexp(1.01 * (down @ prepared["smooth_factor"].double().abs()))
    power = (exponent.long() + 1023 << 52).view(torch.float64)  # torch.ldexp faults where another GPU is current
    rank_scale = ((16 * mantissa).ceil() / 16 * power).float().clamp_(min=1e-12)
    largest = (prepared["proj_up"].float().abs() * rank_scale).amax(1)
    wide = torch.maximum(channel, largest * TO_FP8)
    if not wide.is_meta and not bool((wide <= MOST_GROWTH * channel).all()):
        return {"rank_scale": rank_scale[:0], "wide_scale": channel}
    return {"rank_scale": rank_scale, "wide_scale": wide}


def join(
    prepared: Mapping[str, torch.Tensor], rank: int, pair: tuple[torch.Tensor, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """`reference.join`, for w4a8 with the scales of the new branch."""
    branch = reference.join(prepared, rank, pair)
    if branch is None or "channel_scale" not in prepared:
        return branch
    return branch | branch_scales({**prepared, **branch})


def smoothing(prepared: Mapping[str, torch.Tensor], precision: str, rows: int) -> Smoothing:
    """The smoothing vector for w4a8, and the columns of the low-rank branch."""
    if precision != "w4a8":
        up = prepared["proj_up"]
        joins = rows <= FEW_ROWS and up.dtype is torch.bfloat16  # in fp16 x @ down.T might overflow
        return None, up.shape[1] if joins else 0
    smooth = prepared["smooth_factor"]
    return smooth, columns(prepared, eight_bit(smooth.device))


def columns(prepared: Mapping[str, torch.Tensor], dtype: torch.dtype) -> int:
    """How many columns of the 8-bit product are the low-rank branch's."""
    return 3 * round_up(prepared["rank_scale"].shape[0], PART) if dtype is torch.float8_e4m3fn else 0


def codes(prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`requantize` in the device's 8-bit type."""
    return requantize(prepared, eight_bit(prepared["qweight"].device))


def linear(x: torch.Tensor | Quantized, prepared: Mapping[str, torch.Tensor], precision: str) -> torch.Tensor:
    """x (M, K), as the preceding kernel wrote it (M, K + R) or with w4a8 `Quantized` -> (M, N)."""
    return _w4a8(x, prepared) if precision == "w4a8" else _w4a16(cast(torch.Tensor, x), prepared)


def dequantize(prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The dense weight (N, K) in the dtype of the scales: q * s / smooth + up @ down."""
    down, up = prepared["proj_down"], prepared["proj_up"]
    weight = torch.empty(len(up), down.shape[1], dtype=down.dtype, device=down.device)
    if (capability(down.device) or 80) < 80:  # triton has no tensor cores for the product there
        _dequantize(prepared, weight, False)
        return weight.addmm_(up, down)
    _dequantize(prepared, weight, True)
    return weight


def dequantize_tiles(k: int, r: int, sm: int) -> dict[str, int]:
    """Tile sizes for K, the rank (0: no product) and a compute capability, within its shared memory.

    Those of sm_80 serve AMD GPUs: 32 KiB of 64."""
    if r == 0:
        sizes = {"BLOCK_N": 32, "BLOCK_K": channel_tile(k), "BLOCK_R": 128, "num_warps": 4, "num_stages": 1}
    elif sm in (90, 100):
        sizes = {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_R": min(r & -r, 64), "num_warps": 4, "num_stages": 3}
    else:
        sizes = {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_R": min(r & -r, 32), "num_warps": 8, "num_stages": 3}
    return {"PRODUCT": r > 0} | sizes


def channel_tile(k: int) -> int:
    """How many channels the kernels that only write take at once."""
    return 256 if k % 256 == 0 else 128


def int8_tiles(k: int, r: int, sm: int) -> dict[str, int]:
    """Tile sizes of the int8 product, as `dequantize_tiles`."""
    if sm in (90, 100):
        sizes = {"BLOCK_K": min(k & -k, 128), "BLOCK_R": min(r & -r, 64), "num_warps": 4, "num_stages": 3}
    else:
        sizes = {"BLOCK_K": min(k & -k, 64), "BLOCK_R": min(r & -r, 32), "num_warps": 8, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128} | sizes | {"GROUP": 8}


def launch(kernel: str, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run one of `triton_kernels`."""
    kernels = _kernels()
    kernels.launch(getattr(kernels, kernel), grid, *arguments, **options)


@cache
def _kernels() -> ModuleType:
    """The kernels, which need triton to import."""
    return load("triton_kernels")


def _dequantize(prepared: Mapping[str, torch.Tensor], weight: torch.Tensor, product: bool) -> None:
    """Write q * s / smooth into weight, with the product + up @ down; without, a weight (N, K + R) gets up behind K."""
    r, k = prepared["proj_down"].shape
    n, width = weight.shape
    tiles = dequantize_tiles(k, r if product else 0, capability(weight.device) or 80)
    names = ("qweight", "wscales", "outer_scale", "smooth_factor", "proj_down", "proj_up")
    grid = k // tiles["BLOCK_K"] + (width > k), n // tiles["BLOCK_N"]
    launch("dequantize", grid, *(prepared.get(name) for name in names), weight, k, r, width, **tiles)


def eight_bit(device: torch.device) -> torch.dtype:
    """fp8 on NVIDIA GPUs whose tensor cores have it, else int8."""
    return torch.float8_e4m3fn if (capability(device) or 0) >= 89 else torch.int8


def empty_codes(
    rows: int, width: int, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized codes (rows, width), of the device's 8-bit type if none is given, and scales (rows,)."""
    codes = torch.empty(rows, width, dtype=dtype or eight_bit(device), device=device)
    return codes, torch.empty(rows, dtype=torch.float32, device=device)


def quantize_rows(
    x: torch.Tensor, smooth_factor: torch.Tensor, dtype: torch.dtype, columns: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) -> codes (M, K + columns) fp8 or int8 of x / smooth and their scales (M,) fp32."""
    (m, k), x = x.shape, x.contiguous()
    codes, scale = empty_codes(m, k + columns, x.device, dtype)
    block = 1 << (k - 1).bit_length()
    warps = min(16, max(4, block // 512))
    given = x, smooth_factor, codes, scale, k, k + columns
    launch("quantize_rows", (m,), *given, LIMITS[dtype], block, num_warps=warps)
    return codes, scale


def requantize(prepared: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight of the 8-bit product: q * s (N, K) and the low-rank branch's columns behind it.

    Its scale is channel_scale * 448 / the largest code, of fp8 wide_scale."""
    weight = _empty_weight(prepared, dtype, columns(prepared, dtype))
    _requantize(prepared, weight)
    return weight


def _empty_weight(prepared: Mapping[str, torch.Tensor], dtype: torch.dtype, extra: int) -> torch.Tensor:
    """What `_requantize` fills, with so many columns for the low-rank branch."""
    n, half = prepared["qweight"].shape
    return torch.empty(n, 2 * half + extra, dtype=dtype, device=prepared["qweight"].device)


def _requantize(prepared: Mapping[str, torch.Tensor], weight: torch.Tensor) -> None:
    """Write `requantize`'s result into weight."""
    qweight, (n, width), up, dtype = prepared["qweight"], weight.shape, prepared["proj_up"], weight.dtype
    k = 2 * qweight.shape[1]
    extra, block_k = width - k, channel_tile(k)
    scale = prepared["wide_scale" if dtype is torch.float8_e4m3fn else "channel_scale"]
    branch = (up, prepared["rank_scale"]) if extra else (None, None)
    given = qweight, prepared["wscales"], prepared.get("outer_scale"), scale, weight, *branch
    given += k, width, up.shape[1], extra // 3
    launch("requantize", (k // block_k + (extra > 0), n // 32), *given, to_code(dtype), 32, block_k, PART)


def _w4a16(x: torch.Tensor, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    down, bias = prepared["proj_down"], prepared.get("bias")
    (r, k), width = down.shape, x.shape[1]
    if width != k + r:
        return F.linear(x, dequantize(prepared), bias)
    # [x, x @ down.T] @ [q * s / smooth, up].T
    weight = torch.empty(len(prepared["proj_up"]), width, dtype=x.dtype, device=x.device)
    _dequantize(prepared, weight, False)
    torch.mm(x[:, :k], down.T, out=x[:, k:])
    return F.linear(x, weight, bias)


def _w4a8(x: torch.Tensor | Quantized, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
    down, up, bias = prepared["proj_down"], prepared["proj_up"], prepared.get("bias")
    dtype = eight_bit(up.device)
    extra = columns(prepared, dtype)
    if "codes" in prepared:
        weight, join = prepared["codes"], None
    else:
        weight = _empty_weight(prepared, dtype, extra)
        join = _aside(up.device, partial(_requantize, prepared, weight))
    if not isinstance(x, Quantized):
        x = Quantized(x, *quantize_rows(x, prepared["smooth_factor"], dtype, extra))
    x, codes, row_scale = x
    if extra:
        _code_down(x, prepared, row_scale, codes, extra // 3)
    else:
        rank = F.linear(x, down)
    if join:
        join()
    if dtype is torch.float8_e4m3fn:
        scales = row_scale.unsqueeze(1), prepared["wide_scale"].unsqueeze(0)
        y = torch._scaled_mm(codes, weight.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        if x.dtype is not torch.bfloat16:
            y = y.to(x.dtype)
        if not extra:
            y.addmm_(rank, up.T)
        return y if bias is None else y.add_(bias)
    return multiply_int8(codes, row_scale, weight, prepared["channel_scale"], to_code(dtype), x.dtype, rank, up, bias)


def multiply_8bit(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K), rounded to 8 bits row by row, times weights that are stored in them -> (M, N).

    codes (N, K) fp8 (e4m3) or int8, scale (N,) fp32.
    """
    rows, row_scale = quantize_rows(x, x.new_ones(x.shape[1]), codes.dtype)
    if codes.dtype == torch.float8_e4m3fn:
        y = torch._scaled_mm(
            rows, codes.T, row_scale[:, None], scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(x.dtype)
        return y if bias is None else y.add_(bias)
    return multiply_int8(rows, row_scale, codes, scale, 1.0, x.dtype, bias=bias)


def multiply_int8(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    to_code: float,
    dtype: torch.dtype,
    rank: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """codes (M, K) @ weight (N, K).T * row_scale * scale * to_code + rank @ up.T + bias -> (M, N) in a 16-bit dtype."""
    (m, k), n, sm = codes.shape, len(weight), capability(codes.device) or 80
    if sm < 80 or k % 32:  # triton has no tensor cores there, and takes 32 channels at least
        if rank is not None and up is not None:
            y = F.linear(rank, up, bias)
        else:
            y = codes.new_zeros(m, n, dtype=dtype) if bias is None else bias.repeat(m, 1)
        if m < 17:  # _int_mm takes no fewer
            codes = F.pad(codes, (0, 0, 0, 32 - m))
        products = torch._int_mm(codes, weight.T)
        launch("rescale_add", (m, -(-n // 1024)), products, row_scale, scale, y, n, to_code, 1024)
        return y
    r = 0 if rank is None else rank.shape[1]
    y, tiles = codes.new_empty(m, n, dtype=dtype), int8_tiles(k, r, sm)
    grid = (-(-m // tiles["BLOCK_M"]) * -(-n // tiles["BLOCK_N"]),)
    given = codes, row_scale, weight, scale, rank, up, bias, y, m, n, k, r
    launch("multiply_int8", grid, *given, to_code, **tiles)
    return y


def _code_down(
    x: torch.Tensor, prepared: Mapping[str, torch.Tensor], row_scale: torch.Tensor, codes: torch.Tensor, part: int
) -> None:
    """Write the columns of codes (M, K + 3 part) that x @ down.T has, for few rows in one kernel."""
    down, (m, k) = prepared["proj_down"], x.shape
    r = down.shape[0]
    if m > FEW_ROWS:
        given = F.linear(x, down), prepared["rank_scale"], row_scale, codes, k, r, part
        launch("code_branch", (m,), *given, 1 << (part - 1).bit_length())
        return
    tiles = down_tiles(k, capability(x.device) or 80)
    grid = -(-m // tiles["BLOCK_M"]), -(-part // tiles["BLOCK_R"])
    launch("code_down", grid, x.contiguous(), down, prepared["rank_scale"], row_scale, codes, m, k, r, part, **tiles)


@cache
def down_tiles(k: int, sm: int) -> dict[str, int]:
    """Tile sizes of `code_down` for K and a compute capability, within its shared memory."""
    block_k = 128 if sm in (90, 100) and k % 128 == 0 else 64
    return {"BLOCK_M": 64, "BLOCK_R": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}


def _aside(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """Run work on a side stream inside a CUDA graph; returns a function that joins the streams again.

    What it writes is allocated before: cudaMallocAsync frees on the stream of the allocation, where nothing waits for
    what reads it. Outside a graph it runs in order: launching on two streams takes the host longer than it saves.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        work()
        return _nothing
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        work()
    return partial(main.wait_stream, side)


def _nothing() -> None:
    pass


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One side stream per device."""
    return torch.cuda.Stream(device)


def to_code(dtype: torch.dtype) -> float:
    """What channel_scale is multiplied by for codes of a dtype."""
    return LIMITS[torch.float8_e4m3fn] / LIMITS[dtype]
