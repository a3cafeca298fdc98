"""What test_triton.py runs in a process of its own, where TRITON_INTERPRET is set before triton is imported.

Without a GPU the kernels run in Triton's interpreter, which truncates where a GPU rounds (to bf16, and to fp8 without
the carry into the exponent) and multiplies the bits of bf16 operands as integers; both are mended here.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zimage_core import trial
from zimage_core.formats.gguf import QUANTIZED
from zimage_core.formats.stored import FORMS, StoredLinear
from zimage_core.formats.stored import dequantize as plainly_dequantized
from zimage_core.linear import layout
from zimage_core.linear.adapters import Linear, Terms
from zimage_core.linear.backends import Backend, dense, fused, reference
from zimage_core.linear.backends import triton as backend
from zimage_core.linear.svdq import SVDQLinear, SVDQWeights, smoothing
from zimage_core.memory.offload import BlockStreamer
from zimage_core.models import ops
from zimage_core.models.config import ZImageConfig
from zimage_core.models.transformer import Block, rope_angles

DATA = Path(__file__).parent.parent / "data"
GOLDEN = sorted((DATA / "linear").glob("*.safetensors"))
GOLDEN_FP4 = sorted((DATA / "linear_nvfp4").glob("*.safetensors"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FP8, INT8 = torch.float8_e4m3fn, torch.int8
WIDTHS = [(128, 3840), (128, 10240)] if INTERPRETED else [(11520, 3840), (3840, 3840), (20480, 3840), (3840, 10240)]
RANK = 64 if INTERPRETED else 256


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def golden(path: Path) -> tuple[dict[str, torch.Tensor], SVDQWeights]:
    tensors = {name: tensor.to(DEVICE) for name, tensor in load_file(path).items()}
    return tensors, SVDQWeights.from_packed(tensors, "packed.")


def wide_weights(n: int, k: int, dtype: torch.dtype = torch.bfloat16, rank: int = RANK) -> SVDQWeights:
    """A real layer's width (in the interpreter N and the rank are cut), both branches of about equal norms."""
    draw = torch.Generator().manual_seed(n + k)
    codes = (torch.randn(n, k, generator=draw) * 2.6).round_().clamp_(-8, 7).to(torch.int8)
    return SVDQWeights(
        layout.pack_nibbles(codes),
        (torch.rand(n, k // 64, generator=draw) * 0.002 + 0.002),
        (torch.randn(k, generator=draw) * 0.3).exp_(),
        (torch.randn(rank, k, generator=draw) * 0.1),
        (torch.randn(n, rank, generator=draw) * 0.08 / rank**0.5),
    ).to(DEVICE, dtype)


def fp4_weights(n: int, k: int) -> SVDQWeights:
    """`wide_weights` with FP4 codes: every code, and scales from the smallest subnormal e4m3 on."""
    draw, plain = torch.Generator().manual_seed(n + k), wide_weights(n, k).tensors()
    codes = torch.randint(-8, 8, (n, k), generator=draw, dtype=torch.int8)
    scales = (torch.rand(n, k // 16, generator=draw) * 8 - 4).exp2().to(FP8)
    scales[:, 0] = 2**-9
    outer = torch.rand(n, generator=draw) * 1e-4 + 1e-4
    fp4 = {"qweight": layout.pack_nibbles(codes), "wscales": scales.view(torch.uint8), "outer_scale": outer}
    return SVDQWeights(**plain | {name: tensor.to(DEVICE) for name, tensor in fp4.items()})


def rows(m: int, weights: SVDQWeights, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Activations that the smoothing vector levels, a few channels aside."""
    x = torch.randn(m, weights.in_features, generator=torch.Generator().manual_seed(m))
    x[:, ::97] *= 8
    return (x.to(DEVICE) * weights.smooth_factor).to(dtype)


@pytest.fixture(params=[FP8, INT8], ids=["fp8", "int8"])
def codes(request, monkeypatch):
    """Make the backend take one of its two 8-bit forms."""
    if not INTERPRETED and request.param == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm_89")
    monkeypatch.setattr(backend, "capability", lambda device: 90 if request.param == FP8 else 80)
    return request.param


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("path", GOLDEN + GOLDEN_FP4, ids=lambda path: path.stem)
def test_w4a16_equals_the_golden_output(path, wide):
    tensors, weights = golden(path)
    x, prepared = tensors["x"], backend.prepare(weights, "w4a16")
    assert backend.smoothing(prepared, "w4a16", backend.FEW_ROWS + 1) == (None, 0)
    smooth, columns = backend.smoothing(prepared, "w4a16", len(x))
    assert smooth is None and columns == (weights.rank if x.dtype is torch.bfloat16 else 0)
    if wide:  # what the preceding kernel leaves there is anything
        x = torch.cat((x, x.new_full((len(x), columns), torch.nan)), 1)
    y = backend.linear(x, prepared, "w4a16")
    assert y.dtype == x.dtype
    rounding = 5e-4 if x.dtype == torch.float16 else 4e-3  # of the weight and of y
    assert relative(y, tensors["y_w4a16"]) < rounding


@pytest.mark.parametrize("make", [wide_weights, fp4_weights])
@pytest.mark.parametrize(("n", "k"), WIDTHS)
def test_dequantized_weight_over_the_real_widths(n, k, make, monkeypatch):
    weights = make(n, k)
    for sm in (80, 90, 75) if k == 3840 else (90,):  # 75: without the low-rank product in the kernel
        monkeypatch.setattr(backend, "capability", lambda device, sm=sm: sm)
        dense = backend.dequantize(weights.tensors())
        assert dense.dtype == torch.bfloat16
        assert relative(dense, weights.dequantize()) < (2.5e-3 if sm == 75 else 1.8e-3)  # rounded twice or once


@pytest.mark.parametrize("rank", [16, 48, 128])
def test_any_rank_that_the_format_allows(rank):
    weights = SVDQWeights.from_packed(
        {
            "qweight": torch.randint(-128, 128, (128, 192), dtype=torch.int8),
            "wscales": torch.rand(6, 128),
            "smooth_factor": torch.rand(384) + 0.5,
            "proj_down": torch.randn(384, rank),
            "proj_up": torch.randn(128, rank),
        }
    ).to(DEVICE, torch.float16)
    assert relative(backend.dequantize(weights.tensors()), weights.dequantize()) < 3e-4


@pytest.mark.parametrize("make", [wide_weights, fp4_weights])
def test_requantized_weight_is_the_nearest_code(make, codes):
    weights = make(64, 3840)
    prepared = backend.prepare(weights, "w4a8")
    found = backend.requantize(prepared, codes).float()
    scale = prepared["wide_scale" if codes == FP8 else "channel_scale"][:, None] * 448 / backend.LIMITS[codes]
    exact = weights.residual() / scale
    step = 1.0 if codes == INT8 else 2.0 ** exact.abs().clamp(min=2**-6).log2().floor().sub(3)
    assert ((found[:, :3840] - exact).abs() / step).max() < 0.501
    assert (found.abs().amax(1) == backend.LIMITS[codes]).all()
    if not backend.columns(prepared, codes):  # of int8, and these FP4 weights are far smaller than their branch
        assert (codes == INT8 or make is fp4_weights) and found.shape[1] == 3840
        return
    high, again, low = found[:, 3840:].split(RANK, 1)
    exact = weights.proj_up.float() * prepared["rank_scale"] / scale
    assert torch.equal(high, again)
    step = 2.0 ** exact.abs().clamp(min=2**-6).log2().floor().sub(3)
    assert ((high - exact).abs() / step).max() < 0.501
    assert ((high + low - exact).abs() <= exact.abs() * 2**-8 + 2**-10).all()  # as a bf16, and half the smallest code


def test_rows_are_the_nearest_codes(codes):
    weights = wide_weights(64, 3840)
    x = rows(5, weights)
    x[3] = 0
    found, scale = backend.quantize_rows(x, weights.smooth_factor, codes)
    smoothed = x.float() / weights.smooth_factor.float()
    largest = smoothed.abs().amax(1)
    assert relative(scale, largest / backend.LIMITS[codes]) < 1e-6
    exact = smoothed / largest.clamp(min=1e-12)[:, None] * backend.LIMITS[codes]
    step = 1.0 if codes == INT8 else 2.0 ** exact.abs().clamp(min=2**-6).log2().floor().sub(3)
    assert ((found.float() - exact).abs() / step).max() < 0.501
    assert not found[3].float().any()


@pytest.mark.parametrize(("n", "k"), WIDTHS)
def test_w4a8_error_over_the_real_widths_is_at_most_two_fifths_of_w4a4s(n, k, codes):
    weights = wide_weights(64 if INTERPRETED else n, k)
    x = rows(8, weights)
    y = backend.linear(x, backend.prepare(weights, "w4a8"), "w4a8")
    exact = x.float() @ weights.dequantize().T
    w4a4 = reference.linear(x, weights.tensors(), "w4a4")
    assert y.dtype == torch.bfloat16
    assert relative(y, exact) <= 0.40 * relative(w4a4, exact)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_w4a8_error_on_the_golden_linears_is_below_w4a4s(path, codes):
    tensors, weights = golden(path)
    y = backend.linear(tensors["x"], backend.prepare(weights, "w4a8"), "w4a8")
    assert y.dtype == tensors["x"].dtype
    ratio = relative(y, tensors["y_w4a16"]) / relative(tensors["y_w4a4"], tensors["y_w4a16"])
    print(f"{path.stem} {codes}: {ratio:.2f}")
    assert ratio < 1  # the `range` cases hold scales that differ 100-fold within a channel


def w4a8_error(x: torch.Tensor, weights: SVDQWeights, prepared: dict[str, torch.Tensor]) -> float:
    exact = x.double() @ weights.dequantize().double().T + (0 if weights.bias is None else weights.bias.double())
    return relative(backend.linear(x, prepared, "w4a8"), exact)


def without_columns(prepared: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return prepared | {"rank_scale": prepared["rank_scale"][:0], "wide_scale": prepared["channel_scale"]}


@pytest.fixture
def fp8(monkeypatch):
    if not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm_89")
    monkeypatch.setattr(backend, "capability", lambda device: 90)


@pytest.mark.parametrize(("n", "k"), WIDTHS)
@pytest.mark.parametrize("rank", [32, 128, 256])
def test_the_branch_as_columns_is_as_precise_as_in_16_bits(n, k, rank, fp8):
    """Over the real widths 0.0252 either way: two fp8 have a bf16's bits, and the codes lose none to the scale."""
    weights = wide_weights(64 if INTERPRETED else n, k, rank=rank)
    x, prepared = rows(40, weights), backend.prepare(weights, "w4a8")
    assert prepared["rank_scale"].shape == (rank,)
    growth = prepared["wide_scale"] / prepared["channel_scale"]
    assert 1 < growth.max() <= backend.MOST_GROWTH
    found, plain = w4a8_error(x, weights, prepared), w4a8_error(x, weights, without_columns(prepared))
    assert found < 1.04 * plain and max(found, plain) < 0.0265  # 40 x 64 numbers: 2 % of chance


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_branch_as_columns_on_the_golden_linears(path, fp8):
    """Their K is 128 to 640: a channel's few products do not average out what a larger scale rounds."""
    tensors, weights = golden(path)
    x, prepared = tensors["x"], backend.prepare(weights, "w4a8")
    found, plain = w4a8_error(x, weights, prepared), w4a8_error(x, weights, without_columns(prepared))
    assert found <= 1.35 * plain and found < 0.03, f"{found:.4f}, {plain:.4f}"


def test_the_residuals_codes_bear_a_large_branch(fp8):
    """Near the largest growth of a channel's scale that is allowed; from there on small codes are subnormal."""
    weights = wide_weights(64, 3840, rank=32)
    weights = replace(weights, proj_up=weights.proj_up * 7)
    prepared, errors = backend.prepare(weights, "w4a8"), []
    assert 0.8 < (prepared["wide_scale"] / prepared["channel_scale"]).max() / backend.MOST_GROWTH < 1
    for one in (prepared, without_columns(prepared)):
        codes = backend.requantize(one, FP8)[:, :3840].float()
        errors.append(relative(codes * one["wide_scale"][:, None], weights.residual()))
    assert errors[0] < 1.05 * errors[1]


def test_no_code_of_the_branch_overflows(fp8):
    """Rows that are the worst for one rank: every channel at the row's maximum, with the sign of `down`."""
    weights = wide_weights(64, 3840)
    signs = weights.proj_down[:5].sign()
    x, prepared = (signs * weights.smooth_factor * 3).bfloat16(), backend.prepare(weights, "w4a8")
    assert w4a8_error(x, weights, prepared) < 0.027


def test_a_branch_too_large_for_the_codes_stays_in_16_bits(fp8):
    weights = wide_weights(64, 3840)
    weights = replace(weights, proj_up=weights.proj_up * 64)
    x, prepared = rows(8, weights), backend.prepare(weights, "w4a8")
    assert not len(prepared["rank_scale"]) and torch.equal(prepared["wide_scale"], prepared["channel_scale"])
    assert backend.smoothing(prepared, "w4a8", 4)[1] == 0 and w4a8_error(x, weights, prepared) < 0.027


def test_an_adapter_in_the_branch_takes_columns_too(fp8):
    weights = wide_weights(64, 3840)
    prepared, x = backend.prepare(weights, "w4a8"), rows(8, weights)
    pair = torch.randn(16, 3840).to(x) / 10, torch.randn(64, 16).to(x) / 100
    joined = prepared | backend.join(prepared, RANK, pair)
    larger = replace(weights, **{name: joined[name] for name in ("proj_down", "proj_up")})
    assert len(joined["rank_scale"]) == RANK + 16 and w4a8_error(x, larger, joined) < 0.027
    parted = joined | backend.join(joined, RANK, None)
    assert all(torch.equal(parted[name], tensor) for name, tensor in prepared.items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows_", [1, 40])
def test_weights_stored_in_8_bits_are_multiplied_as_they_are(codes, rows_, bias):
    """Three pieces of a fused linear; what differs is the rounding of x: 2.5 % in fp8, 127 steps in int8."""
    generator = torch.Generator().manual_seed(0)
    linear = StoredLinear(384, 3 * 128, bias=bias).to(DEVICE, torch.bfloat16)
    linear.requires_grad_(False)
    if bias:
        linear.bias.copy_(torch.randn(384, generator=generator))
    for _ in range(3):
        weight = torch.randn(128, 384, generator=generator)
        scale = weight.abs().amax(1, keepdim=True) / backend.LIMITS[codes]
        exact = weight / scale
        stored = exact.round().to(INT8) if codes == INT8 else exact.to(FP8).view(torch.uint8)
        form = "int8" if codes == INT8 else "float8_e4m3fn"
        linear.load(form, {"codes": stored.to(DEVICE), "scale": scale.to(DEVICE)})
    x = torch.randn(2, rows_, 384, generator=generator).to(DEVICE, torch.bfloat16)
    expected = linear(x)
    linear.products = {form: backend.multiply_8bit}
    found = linear(x)
    assert found.dtype == torch.bfloat16 and found.shape == (2, rows_, 384)
    assert 0 < relative(found, expected) < (0.01 if codes == INT8 else 0.04)
    assert torch.equal(linear(x[:1, :1]), linear(x[:1, :1])), "the bias of one row stays what it is"
    linear.set_adapter(Terms(torch.ones(8, 384).to(x), torch.ones(384, 8).to(x)))
    assert relative(linear(x), found) > 0.5


@pytest.mark.parametrize("sm", [75, 80, 90])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 128, 384, 16), (130, 384, 160, 48), (300, 640, 256, 64)])
def test_the_int8_product_is_that_of_its_codes(m, n, k, rank, sm, monkeypatch):
    """Against fp64, edges that fill no tile; rounded to bf16 once, which errs by 0.0017 on average, as sm_75 twice."""
    monkeypatch.setattr(backend, "capability", lambda device: sm)
    draw = torch.Generator().manual_seed(m)
    codes, weight = (torch.randint(-127, 128, (rows, k), dtype=INT8, generator=draw).to(DEVICE) for rows in (m, n))
    row_scale, scale = (torch.rand(rows, generator=draw).to(DEVICE) * 1e-3 for rows in (m, n))
    x, up, bias = (torch.randn(size, generator=draw).to(DEVICE, torch.bfloat16) for size in [(m, rank), (n, rank), n])
    product = (codes.double() @ weight.double().T) * row_scale.double()[:, None] * scale.double() * 3.5
    scales = row_scale, weight, scale, 3.5, torch.bfloat16
    found = backend.multiply_int8(codes, *scales, x, up, bias)
    expected = product + x.double() @ up.double().T + bias.double()
    assert found.shape == (m, n) and found.dtype == torch.bfloat16
    limit = 2.5e-3 if sm == 75 else 1.8e-3
    assert relative(found, expected) < limit
    assert relative(backend.multiply_int8(codes, *scales), product) < limit


def stored_parts(form: str, n: int, k: int) -> dict[str, torch.Tensor]:
    """Any bytes as the parts of a weight (n, K), NaN and infinity among its scales and codes; scales fp32."""
    draw = torch.Generator().manual_seed(n + k)

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).to(DEVICE)

    if form in QUANTIZED:
        block, size = QUANTIZED[form]
        return {"codes": some(n, k // block * size)}
    codes = some(n, k // 2) if form == "nvfp4" else some(n, k)
    found = {"codes": codes.view(INT8) if form == "int8" else codes}
    if form == "nvfp4" or form == "mxfp8":
        found["block_scale"] = some(n, k // (16 if form == "nvfp4" else 32))
    return found if form == "mxfp8" else found | {"scale": torch.rand(n, 1, generator=draw).to(DEVICE) / 99}


SMALL_FORMS = [form for form in FORMS if form != "float"]
SIZES = [(3, 2304), (70, 256)] if INTERPRETED else [(3, 2304), (11520, 3840), (3840, 10240)]  # not all fill the tiles


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, signs of zeros too; any NaN is one."""
    numbers = ~expected.isnan()
    bits = torch.int32 if found.element_size() == 4 else torch.int16
    return torch.equal(found.isnan(), ~numbers) and torch.equal(found.view(bits)[numbers], expected.view(bits)[numbers])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, on NaN and infinity in the interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", SMALL_FORMS)
def test_stored_weights_are_dequantized_bit_for_bit_as_in_plain_torch(form, dtype):
    assert dense.knows(form)
    for n, k in SIZES:
        parts = stored_parts(form, n, k)
        if "scale" in parts and (n, k) == SIZES[0]:
            parts["scale"] = parts["scale"].to(torch.bfloat16)  # as quanto has it
        found = torch.empty(n, k, dtype=dtype, device=DEVICE)
        dense.dequantize(form, parts, found)
        assert same_bits(found, plainly_dequantized(form, parts).to(dtype)), (n, k)


def test_a_linear_of_several_stored_forms_runs_by_the_kernels():
    """Fused of pieces, one of them not quantized; what is multiplied is the same, bit for bit."""
    linear = StoredLinear(256, 5 * 32, bias=False)
    for form in ("int8", "float8_e4m3fn", "nvfp4", "mxfp8"):
        parts = stored_parts(form, 32, 256)
        codes = parts["codes"]
        linear.load(form, parts | {"codes": codes if codes.dtype is INT8 else codes & 119})  # no NaN
        if form in ("nvfp4", "mxfp8"):
            linear.get_buffer(f"block_scale_{len(linear.pieces) - 1}").clamp_(max=126)
    linear.load("float", {"weight": torch.randn(32, 256).to(DEVICE, torch.bfloat16)})
    x = torch.randn(2, 3, 256).to(DEVICE, torch.bfloat16)
    expected = linear(x)
    linear.kernels = True
    assert torch.equal(linear(x), expected) and expected.isfinite().all()


def test_the_trial_of_stored_weights_passes():
    device, dtype = torch.device(DEVICE), torch.float16 if INTERPRETED else torch.bfloat16
    assert trial.try_dense(device, dtype).refused is None
    kinds = ["int8"] + ["fp8"] * (not INTERPRETED and torch.cuda.get_device_capability() >= (8, 9))
    for kind in kinds:
        found = trial.try_product(("triton", kind), device, dtype)
        assert found.refused is None and found.error > 0


def test_the_quality_benchmark_computes_w4a8_as_this_does(monkeypatch):
    """In plain torch and fp32; what differs is bf16's rounding, a fraction of w4a8's own error."""
    if not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm_89")
    monkeypatch.setattr(backend, "capability", lambda device: 90)
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import quality

    weights = wide_weights(128, 3840)
    linear = SVDQLinear(3840, 128, rank=RANK)
    linear.load(weights.to(dtype=torch.float32), Backend("triton", "w4a16", backend, ""))
    quality.use_fp8(linear)
    x = rows(8, weights)
    found = backend.linear(x, backend.prepare(weights, "w4a8"), "w4a8")
    exact = x.float() @ weights.dequantize().T
    assert relative(found, linear(x.float())) < 0.2 * relative(found, exact)


def test_w4a8_of_fp4_weights(codes):
    """Against exact activations; the limit is w4a4's error on INT4 weights of this kind, 0.07."""
    weights = fp4_weights(128, 3840)
    x = rows(8, weights)
    y = backend.linear(x, backend.prepare(weights, "w4a8"), "w4a8")
    assert relative(y, x.float() @ weights.dequantize().T) < 0.07
    for path in GOLDEN_FP4:
        tensors, weights = golden(path)
        y = backend.linear(tensors["x"], backend.prepare(weights, "w4a8"), "w4a8")
        assert relative(y, tensors["y_w4a16"]) < 0.07


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_what_is_prepared_on_the_cpu_to_be_streamed_is_the_same():
    weights = wide_weights(128, 3840)
    there, here = backend.prepare(weights, "w4a8"), backend.prepare(weights.to("cpu"), "w4a8")
    assert all(torch.equal(there[name].cpu(), tensor) for name, tensor in here.items())


@pytest.mark.parametrize("make", [wide_weights, fp4_weights])
def test_prepared_form_restores_and_repeats_bit_for_bit(make, codes):
    weights = make(64, 3840)
    prepared, x = backend.prepare(weights, "w4a8"), rows(3, weights)
    kept = backend.restore(prepared)
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights.tensors().items())
    once, again = (backend.linear(x, prepared, "w4a8") for _ in range(2))
    assert torch.equal(once, again)


DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]  # of activations and residual stream


@pytest.mark.parametrize(("dtype", "stream"), DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("width", [256, 1152, 3840, 10240])
def test_the_kernels_in_front_make_the_codes_of_quantize_rows(codes, dtype, stream, width):
    draw = torch.Generator().manual_seed(width)
    random = lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE)  # noqa: E731
    smooth, weight = (random(width) * 0.3).exp().to(dtype), random(width).to(dtype)
    x, gated = random(2, 3, width).to(stream), random(2, 3, 2 * width).to(dtype) * 5
    x[1, 1], gated[1, 1], x[0, 2, -1], gated[0, 2, -1] = 0, 0, 300, 60
    asked = [lambda *smooth: fused.swiglu(gated, *smooth)]
    for scale in (None, random(1, 1, width).to(dtype), random(2, 1, 2 * width).to(dtype)[..., width:]):
        asked.append(lambda *smooth, scale=scale: fused.norm_scale(x, weight, 1e-5, scale, *smooth))
        between = x, gated[..., :width], weight, weight + 1, 1e-5, scale, scale
        asked.append(lambda *smooth, between=between: fused.add_norm_scale(*between, *smooth)[1])
    for make in asked:
        plain, found = make(), make(smooth, 48)
        assert torch.equal(found.x, plain) and found.shape == (2, 3, width) and plain.dtype == dtype
        expected, row_scale = backend.quantize_rows(plain.flatten(0, 1), smooth, codes, 48)
        assert found.codes.dtype == codes and found.codes.shape == expected.shape == (6, width + 48)
        made, expected = found.codes[:, :width], expected[:, :width]
        assert torch.equal(made.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(found.row_scale, row_scale) and made.float().abs().amax(1)[:4].all()


def narrow_block(dtype: torch.dtype, precision: str = "w4a8") -> Block:
    """A block of linears in a precision, its other parameters random."""
    torch.manual_seed(0)
    block = Block(ZImageConfig(384, n_heads=3), functools.partial(SVDQLinear, rank=RANK), True)
    block.to(DEVICE, dtype).requires_grad_(False)
    for norm in (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2):
        norm.weight.normal_(1, 0.2)
    for linear in block.modules():
        if isinstance(linear, SVDQLinear):
            weights = wide_weights(linear.out_features, linear.in_features, dtype)
            linear.load(weights, Backend("triton", precision, backend, ""))
    return block


def use(block: Block, chosen: ops.Ops) -> None:
    for module in (block, block.attention, block.feed_forward):
        module.ops = chosen


FUSED = ops.Ops(*(getattr(fused, name) for name in ops.Ops._fields))
APART = FUSED._replace(
    norm_scale=lambda *args: fused.norm_scale(*args[:4]),
    add_norm_scale=lambda *args: fused.add_norm_scale(*args[:7]),
    swiglu=lambda x, *_: fused.swiglu(x),
)


def test_a_block_is_the_same_bit_for_bit_with_codes_from_the_kernels_in_front(codes, monkeypatch):
    """Alone, with adapters in the low-rank branch and beside the linears, and streamed; in a batch of two pictures."""
    dtype, stream = DTYPES[codes == INT8]
    block, config, quantized, plain = narrow_block(dtype), ZImageConfig(384, n_heads=3), [], backend.quantize_rows
    requantized, slow = {}, backend.requantize  # by shape, once: most of the time in the interpreter

    def quantize_rows(x, *args):
        quantized.append(x.shape)
        return plain(x, *args)

    def requantize(prepared, dtype):
        shape = prepared["qweight"].shape, prepared["proj_up"].shape
        if shape not in requantized:
            requantized[shape] = slow(prepared, dtype)
        return requantized[shape]

    monkeypatch.setattr(backend, "quantize_rows", quantize_rows)
    monkeypatch.setattr(backend, "requantize", requantize)
    x, t_emb = torch.randn(2, 9, 384).to(DEVICE, stream), torch.randn(2, 256).to(DEVICE, dtype)
    angles = [y.to(DEVICE) for y in rope_angles(torch.arange(27.0).view(1, 9, 3), config)]

    def check(alone: int) -> torch.Tensor:
        """`alone` of the four linears are left to `quantize_rows`."""
        made = []
        for chosen, left in ((FUSED, alone), (APART, 4)):
            use(block, chosen)
            quantized.clear()
            made.append(block(x, *angles, None, t_emb))
            assert len(quantized) == left
        assert torch.equal(*made) and made[0].isfinite().all() and made[0].dtype == stream
        return made[0]

    expected = check(1)
    use(block, ops.TORCH)
    assert relative(block(x, *angles, None, t_emb), expected) < 0.05  # other roundings, and so other codes
    use(block, FUSED)
    streamer = BlockStreamer([block])
    streamer.place(DEVICE, 0)
    assert torch.equal(streamer.run_block("layers", 0, block, x, *angles, None, t_emb), expected)
    streamer.place(DEVICE, 2**40)
    w2, to_qkv = block.feed_forward.w2, block.attention.to_qkv
    pair = torch.randn(16, 384).to(DEVICE, dtype), torch.randn(1152, 16).to(DEVICE, dtype) / 10  # of LoRAs' multiple
    to_qkv.set_adapter(Terms(*pair))
    assert to_qkv.adapter is None and not torch.equal(check(1), expected)
    to_qkv.set_adapter(Terms(inputs=[((0, 1152), torch.rand(384).to(DEVICE, dtype))]))
    w2.set_adapter(Terms(bias=torch.randn(384).to(DEVICE, dtype)))
    assert not torch.equal(check(3), expected)


@pytest.mark.parametrize("precision", ["w4a8", "w4a16"])
def test_a_compiled_block_is_the_same_bit_for_bit(precision, codes):
    """By dynamo and functionalization in one graph: the kernels and linears are operators with fakes that fit them."""
    dtype, stream = DTYPES[codes == INT8]
    block = narrow_block(dtype, precision)
    use(block, FUSED)
    x, t_emb = torch.randn(1, 5, 384).to(DEVICE, stream), torch.randn(1, 256).to(DEVICE, dtype)
    angles = [y.to(DEVICE) for y in rope_angles(torch.arange(15.0).view(1, 5, 3), ZImageConfig(384, n_heads=3))]
    with torch.no_grad():
        expected = block(x, *angles, None, t_emb)
        if precision == "w4a16":  # where rows have columns, they are used, and nothing else changes
            use(block, APART)
            apart = block(x, *angles, None, t_emb)
            assert relative(expected, apart) < 0.01 and torch.equal(expected, apart) is (dtype is torch.float16)
            use(block, FUSED)
        found = torch.compile(block, backend="aot_eager", fullgraph=True)(x, *angles, None, t_emb)
    assert torch.equal(found, expected)


def test_what_linears_ask_of_the_preceding_kernel():
    linear, weights = SVDQLinear(384, 128, rank=RANK), wide_weights(128, 384)
    ask, x = {}, torch.empty(3, 384)
    for name, module, precision in (("w4a8", backend, "w4a8"), ("w4a16", backend, "w4a16"), ("cpu", reference, "w4a4")):
        linear.load(weights, Backend("", precision, module, ""))
        ask[name] = smoothing(linear, x)
    smooth, columns = ask["w4a8"]
    assert torch.equal(smooth, weights.smooth_factor) and columns in (0, 3 * RANK)  # of int8, of fp8
    assert ask["w4a16"] == (None, RANK)
    assert ask["cpu"] == smoothing(Linear(384, 128), x) == (None, 0)


if INTERPRETED:
    from triton.runtime import interpreter

    TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": FP8}
    BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding_convert(data, source, target, rounding):
        if source.name not in TORCH or target.name not in TORCH:
            return convert(data, source, target, rounding)
        bits = torch.from_numpy(np.ascontiguousarray(data).view(f"i{data.itemsize}" if data.itemsize > 1 else "u1"))
        value = bits.view(TORCH[source.name]).to(TORCH[target.name])
        return value.view(BITS[value.element_size()]).numpy().view(f"u{value.element_size()}")

    def float_dot(self, a, b, d, *rest):
        widened = [self.cast_impl(t, interpreter.tl.float32) if t.dtype.name == "bf16" else t for t in (a, b)]
        return dot(self, *widened, d, *rest)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = rounding_convert, float_dot
