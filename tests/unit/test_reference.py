"""The SVDQ linear: the reference backend against golden vectors, the module, the choice of a backend, its peers.

Golden y_w4a16 is float64 arithmetic on the stored tensors; y_w4a4_kernel16 is an emulation of nunchaku's kernels and
nunchaku_int4_outputs what the kernels themselves gave on a GPU.
"""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine import forget
from safetensors.torch import load_file

from zimage_core import tune
from zimage_core.linear import backends, layout
from zimage_core.linear.adapters import Terms
from zimage_core.linear.backends import kitchen, nunchaku, reference, select
from zimage_core.linear.svdq import SVDQLinear, SVDQWeights

DATA = Path(__file__).parent.parent / "data"
GOLDEN = sorted((DATA / "linear").glob("*.safetensors"))
GOLDEN_FP4 = sorted((DATA / "linear_nvfp4").glob("*.safetensors"))
WIDTHS = [(11520, 3840), (3840, 3840), (20480, 3840), (3840, 10240)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def golden(path: Path) -> tuple[dict[str, torch.Tensor], SVDQWeights]:
    tensors = load_file(path)
    return tensors, SVDQWeights.from_packed(tensors, "packed.")


def random_weights(n: int, k: int, rank: int = 256, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> SVDQWeights:
    """A linear whose residual and low-rank branch have about equal norms."""
    draw = torch.Generator().manual_seed(seed)
    codes = (torch.randn(n, k, generator=draw) * 2.6).round_().clamp_(-8, 7).to(torch.int8)
    return SVDQWeights(
        layout.pack_nibbles(codes),
        (torch.rand(n, k // 64, generator=draw) * 0.002 + 0.002).to(dtype),
        (torch.randn(k, generator=draw) * 0.3).exp_().to(dtype),
        (torch.randn(rank, k, generator=draw) * 0.1).to(dtype),
        (torch.randn(n, rank, generator=draw) * 0.08 / rank**0.5).to(dtype),
    )


def cpu(name: str = "reference", precision: str = "auto") -> backends.Backend:
    return select(name, precision, device="cpu", dtype=torch.bfloat16)


def linear(weights: SVDQWeights, backend: backends.Backend | None = None) -> SVDQLinear:
    module = SVDQLinear(weights.in_features, weights.out_features, weights.bias is not None, rank=weights.rank)
    module.load(weights, backend or cpu())
    return module


@pytest.mark.parametrize("dense", [0, reference.DENSE], ids=["dequantized", "kept dense"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_w4a16_equals_the_golden_output(path, dense, monkeypatch):
    monkeypatch.setattr(reference, "DENSE", dense)
    monkeypatch.setattr(reference, "CHUNK", 2**14)  # several chunks of rows
    tensors, weights = golden(path)
    x, y = tensors["x"], tensors["y_w4a16"]
    assert relative(linear(weights.to(dtype=torch.float32))(x.float()), y) < 1e-6
    assert relative(linear(weights)(x), y) < (1e-3 if x.dtype == torch.float16 else 5e-3)  # rounding of W, x / s, y
    bias = 0 if weights.bias is None else weights.bias.double()
    assert relative(x.double() @ weights.dequantize().double().T + bias, y) < 1e-6


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_w4a4_equals_the_golden_output_and_the_kernels_own(path, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2**14)
    tensors, weights = golden(path)
    kernels = load_file(DATA / "nunchaku_int4_outputs.safetensors")
    x, name = tensors["x"], path.stem
    codes, scale = reference.quantize_activations(x, weights.smooth_factor)
    assert torch.equal(codes, tensors["act.q"])
    assert torch.equal(scale.to(x.dtype), tensors["act.scale"])
    assert torch.equal(scale.to(x.dtype), kernels[f"{name}/act.scale"])
    assert (codes.int() - kernels[f"{name}/act.q"].int()).abs().sum() <= 1  # a tie may fall the other way
    y = linear(weights, cpu(precision="w4a4"))(x)
    assert y.dtype == x.dtype
    assert relative(y, tensors["y_w4a4_kernel16"]) < 1e-6
    assert relative(y, kernels[f"{name}/y"]) < 2e-3  # one code flipped
    assert relative(y, tensors["y_w4a4"]) < 6e-3  # 16-bit accumulation


def test_w4a4_of_a_zero_row_is_the_bias():
    tensors, weights = golden(GOLDEN[-3])
    assert weights.bias is not None
    y = linear(weights, cpu(precision="w4a4"))(torch.zeros(2, weights.in_features, dtype=torch.bfloat16))
    assert torch.equal(y, weights.bias.expand(2, -1))


@pytest.mark.parametrize(("n", "k"), WIDTHS)
def test_w4a16_over_the_real_widths_is_within_bf16_rounding_of_fp32(n, k):
    weights = random_weights(512, k, seed=n)
    x = torch.randn(24, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    exact = x.float() @ weights.dequantize().T
    assert relative(linear(weights)(x), exact) < 5e-3
    assert relative(linear(weights, cpu(precision="w4a4"))(x), exact) < 0.15


def test_codes_stay_four_bits_wide():
    weights = random_weights(256, 8192, rank=16)
    module = linear(weights)
    module(torch.zeros(1, 8192, dtype=torch.bfloat16))
    held = sum(t.numel() * t.element_size() for t in module.buffers())
    assert held < 0.35 * 2 * 256 * 8192  # of a dense bf16 weight, low-rank branch included
    assert module.qweight.data_ptr() == weights.qweight.data_ptr()  # not a copy
    assert "dense" not in dict(module.named_buffers())  # only small weights keep one


def test_packed_tensors_survive_the_round_trip():
    tensors, weights = golden(GOLDEN[1])
    packed = weights.to_packed()
    assert packed.keys() == {"qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "bias"}
    assert all(torch.equal(packed[name], tensors[f"packed.{name}"]) for name in packed)


def test_a_missing_or_misshapen_tensor_is_named():
    tensors, _ = golden(GOLDEN[0])
    tensors = {name.replace("packed.", "layers.0.w2."): t for name, t in tensors.items() if "packed" in name}
    with pytest.raises(ValueError, match=r"layers\.0\.w2\.proj_up: expected an SVDQ INT4 linear"):
        SVDQWeights.from_packed({k: t for k, t in tensors.items() if "proj_up" not in k}, "layers.0.w2.")
    with pytest.raises(ValueError, match=r"layers\.0\.w2\.wscales: expected \(128, 2\), found \(128, 4\)"):
        SVDQWeights.from_packed(tensors | {"layers.0.w2.wscales": torch.zeros(4, 128)}, "layers.0.w2.")
    with pytest.raises(ValueError, match="expected \\(in, out, rank, FP4\\)"):
        SVDQLinear(128, 128, rank=32).load(golden(GOLDEN[0])[1], cpu())


def test_module_is_born_on_meta_and_moves_as_one(monkeypatch):
    monkeypatch.setattr(reference, "DENSE", 0)
    with torch.device("meta"):
        module = SVDQLinear(128, 128, rank=16)
    assert {t.device.type for t in module.buffers()} == {"meta"}
    assert not module.state_dict() and not list(module.parameters())
    tensors, weights = golden(GOLDEN[0])
    module.load(weights, cpu())
    assert module(tensors["x"].view(3, 1, -1)).shape == (3, 1, 128)
    kept = module.weights()
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors().values(), weights.tensors().values()))
    module.to(torch.float32)
    assert module.wscales.dtype == torch.float32 and module.qweight.dtype == torch.uint8
    assert relative(module(tensors["x"].float()), tensors["y_w4a16"]) < 1e-6
    assert "rank=16, backend=reference, precision=w4a16" in repr(module)


def test_module_dtype_is_that_asked_for():
    tensors, weights = golden(GOLDEN[0])
    module = SVDQLinear(128, 128, rank=16, dtype=torch.float16)
    module.load(weights, cpu())
    assert {t.dtype for t in module.buffers()} == {torch.uint8, torch.float16}
    assert module(tensors["x"].half()).dtype == torch.float16


def test_a_small_linear_keeps_its_dense_form_beside_the_codes():
    """Counted and moved with the module; the codes stay what `weights()` gives back."""
    tensors, weights = golden(GOLDEN[0])
    module = linear(weights)
    assert module.dense.shape == (128, 128) and module.dense.dtype == weights.wscales.dtype
    assert relative(module(tensors["x"]), tensors["y_w4a16"]) < 5e-3
    assert "dense" not in dict(linear(weights, cpu(precision="w4a4")).named_buffers())
    assert torch.equal(module.weights().qweight, weights.qweight)


def test_auto_on_the_cpu_is_the_reference_and_says_so_once(caplog):
    tune._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="zimage_core.tune"):
        first, second = (tune.select(device="cpu", dtype=torch.bfloat16) for _ in range(2))
    assert (first.name, first.precision) == ("reference", "w4a16")
    assert second == first
    assert len([r for r in caplog.records if r.message.startswith("SVDQ backend: reference w4a16 on cpu")]) == 1
    assert "triton: needs an NVIDIA or AMD GPU" in first.reason


def test_torch_is_another_name_of_the_reference():
    assert cpu("torch").name == "reference"


@pytest.mark.parametrize(("name", "precision"), [("triton", "auto"), ("reference", "w4a8"), ("nunchaku", "w4a4")])
def test_a_named_backend_is_refused_with_its_own_reason(name, precision, no_engine):
    with pytest.raises(ValueError, match="cannot run on cpu.*; choose backend auto") as refusal:
        select(name, precision, device="cpu", dtype=torch.bfloat16)
    assert [backend for backend in backends.BACKENDS if f"{backend}: " in str(refusal.value)] == [name]


def test_a_precision_that_nothing_runs_is_refused_with_every_backends_reason(no_engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    with pytest.raises(ValueError, match="cannot run on cpu.*; choose precision auto") as refusal:
        select("auto", "w4a8", device="cpu", dtype=torch.bfloat16)
    for backend in backends.BACKENDS:
        assert f"{backend}: " in str(refusal.value)
    assert "not on PyPI" in str(refusal.value)


@pytest.mark.parametrize("asked", [("fast", "auto"), ("auto", "int4")])
def test_unknown_names_are_refused(asked):
    with pytest.raises(ValueError, match="expected auto"):
        select(*asked, device="cpu", dtype=torch.bfloat16)


def test_report_has_a_row_for_every_backend(no_engine):
    rows = {name: (reason, runs) for name, reason, runs in backends.report("cpu", torch.bfloat16)}
    assert rows.keys() == set(backends.BACKENDS)
    assert rows["reference"] == (None, ("w4a16", "w4a4"))
    assert "not installed" in rows["nunchaku"][0]


@pytest.mark.parametrize(
    ("sm", "dtype", "installed", "expected"),
    [
        (75, torch.float16, True, ("nunchaku", "w4a4")),
        (75, torch.float16, False, ("triton", "w4a8")),
        (75, torch.bfloat16, True, ("reference", "w4a16")),
        (86, torch.bfloat16, True, ("nunchaku", "w4a4")),
        (86, torch.bfloat16, False, ("triton", "w4a8")),
        (89, torch.bfloat16, True, ("nunchaku", "w4a4")),
        (90, torch.bfloat16, True, ("triton", "w4a8")),
        (120, torch.bfloat16, True, ("triton", "w4a8")),
        (90, torch.float32, True, ("reference", "w4a16")),
        (70, torch.float16, True, ("reference", "w4a16")),
    ],
)
def test_the_order_where_nothing_is_measured(sm, dtype, installed, expected, gpu, request, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.6.0")
    request.getfixturevalue("engine" if installed else "no_engine")
    gpu(sm)
    chosen = select(device="cuda", dtype=dtype)
    assert (chosen.name, chosen.precision) == expected
    for precision, names in {"w4a16": ("triton", "reference"), "w4a4": ("nunchaku", "kitchen", "reference")}.items():
        assert select("auto", precision, device="cuda", dtype=dtype).name in names


@pytest.mark.parametrize(("architecture", "expected"), [("gfx1100", "triton"), ("gfx942", "triton"), ("gfx1030", None)])
def test_amd_gpus_with_matrix_units_get_triton(architecture, expected, no_engine, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.6.0")
    for module in (backends, backends.load("triton")):
        monkeypatch.setattr(module, "amd_architecture", lambda device: architecture)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    chosen = select(device="cuda", dtype=torch.bfloat16)
    assert (chosen.name, chosen.precision) == ((expected, "w4a8") if expected else ("reference", "w4a16"))
    assert expected or "triton: needs gfx90a, gfx942, gfx950, gfx11, gfx12, the GPU is gfx1030" in chosen.reason
    assert f"a GPU ({architecture})" in chosen.reason


def test_an_old_triton_is_refused(gpu, no_engine, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.1.0")
    gpu(89)
    chosen = select(device="cuda", dtype=torch.bfloat16)
    assert chosen.name == "reference" and "triton: needs triton 3.2 or later, found 3.1.0" in chosen.reason


def test_no_triton_leaves_the_reference(gpu, no_engine, monkeypatch):
    monkeypatch.delitem(sys.modules, "zimage_core.linear.backends.triton_kernels", raising=False)
    monkeypatch.delattr(backends, "triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu(89)
    chosen = select(device="cuda", dtype=torch.bfloat16)
    assert (chosen.name, chosen.precision) == ("reference", "w4a16")
    assert "triton cannot be imported" in chosen.reason
    with pytest.raises(ValueError, match="triton cannot be imported"):
        select("triton", device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("sm", "fp4", "reason"),
    [
        (90, False, "without 4-bit tensor cores"),
        (120, False, "refuse Blackwell"),
        (86, False, None),
        (89, True, "FP4 kernels need sm_120"),
        (100, True, "FP4 kernels need sm_120"),
        (120, True, None),
    ],
)
def test_the_engine_is_not_asked_on_hardware_it_refuses(sm, fp4, reason, gpu, engine):
    gpu(sm)
    found = nunchaku.unavailable(torch.device("cuda"), torch.bfloat16, fp4)
    assert found is None if reason is None else reason in found
    if fp4 and reason is None:
        assert select(device="cuda", dtype=torch.bfloat16, fp4=True).name == "nunchaku"


def test_the_statistics_library_of_pypi_is_told_from_the_engine(tmp_path, monkeypatch):
    forget()
    (tmp_path / "nunchaku").mkdir()
    (tmp_path / "nunchaku" / "__init__.py").write_text("raise AssertionError('never imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert "statistics library" in nunchaku.unavailable(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_nunchaku_gets_what_its_kernels_take(path, engine):
    tensors, weights = golden(path)
    backend = backends.Backend("nunchaku", "w4a4", nunchaku, "")
    module, x = linear(weights, backend), tensors["x"]
    assert torch.equal(module.qweight, tensors["packed.qweight"])
    assert torch.equal(module(x), linear(weights, cpu(precision="w4a4"))(x))
    assert all(torch.equal(a, b) for a, b in zip(module.weights().tensors().values(), weights.tensors().values()))


@pytest.mark.parametrize("path", GOLDEN_FP4, ids=lambda path: path.stem)
def test_nunchaku_gets_what_its_fp4_kernels_take(path, engine):
    """Codes and scales as stored; every scale of the rows, wtscale or wcscales, as wcscales in 16 bits."""
    tensors = load_file(path)
    weights = SVDQWeights.from_packed(tensors, "packed.")
    backend = backends.Backend("nunchaku", "w4a4", nunchaku, "")
    module = SVDQLinear(weights.in_features, weights.out_features, rank=weights.rank, fp4=True)
    module.load(weights, backend)
    assert torch.equal(module.qweight, tensors["packed.qweight"])
    assert torch.equal(module.wscales.view(torch.uint8), tensors["packed.wscales"].view(torch.uint8))
    outer = tensors.get("packed.wcscales", tensors.get("packed.wtscale"))
    assert torch.equal(module.wcscales, outer.expand(weights.out_features))
    assert relative(module(tensors["x"]), tensors["y_w4a16"]) < 5e-3  # the engine of this test rounds to bf16 only
    assert all(torch.equal(a, b) for a, b in zip(module.weights().tensors().values(), weights.tensors().values()))
    module.set_adapter(
        Terms(torch.ones(16, weights.in_features).bfloat16(), torch.ones(weights.out_features, 16).bfloat16())
    )
    assert module.adapter is None and module.proj_down.shape[1] == weights.rank + 16
    module.set_adapter(None)
    assert relative(module(tensors["x"]), tensors["y_w4a16"]) < 5e-3
    x = torch.empty(3, weights.in_features, device="meta", dtype=torch.bfloat16)
    assert backend.linear(x, backend.prepare(weights.to("meta"))).shape == (3, weights.out_features)


def test_nunchaku_is_kept_from_what_its_kernels_get_wrong(engine, monkeypatch):
    """More ranks than its table of scales, no rows, more elements than 32 bits count, another dtype."""
    weights = random_weights(128, 128, rank=32)
    module = linear(weights, backends.Backend("nunchaku", "w4a4", nunchaku, ""))
    plain = linear(weights, cpu(precision="w4a4"))
    x = torch.randn(600, 128).bfloat16()
    for rank, beside in ((992, False), (1008, True)):
        terms = Terms(torch.randn(rank, 128).bfloat16(), torch.randn(128, rank).bfloat16())
        for one in (module, plain):
            one.set_adapter(terms)
        assert (module.adapter is not None) is beside
        # The pair beside the linear is rounded once more than in its branch.
        assert torch.dist(module(x).float(), plain(x).float()) < 4e-3 * plain(x).float().norm()
    with pytest.raises(ValueError, match="rank: expected up to 1024 for nunchaku, found 1040"):
        wide = replace(weights, proj_down=torch.zeros(1040, 128), proj_up=torch.zeros(128, 1040))
        nunchaku.prepare(wide, "w4a4")
    for one in (module, plain):
        one.set_adapter(None)
    assert module(x[:0]).shape == (0, 128)
    whole = module(x)
    monkeypatch.setattr(nunchaku, "MAX_ELEMENTS", 128 * 300)
    assert torch.equal(module(x), whole) and torch.equal(whole, plain(x))
    with pytest.raises(ValueError, match="nunchaku: expected activations in torch.bfloat16, found torch.float16"):
        module(x.half())


@pytest.mark.parametrize("real", [True, False], ids=["installed", "emulated"])
def test_kitchen_agrees_with_the_reference(real, request):
    if real:
        pytest.importorskip("comfy_kitchen")
    else:
        request.getfixturevalue("fake_kitchen")
    for path in GOLDEN:
        tensors, weights = golden(path)
        if tensors["x"].dtype == torch.float16 and real:
            continue
        module = linear(weights, cpu("kitchen", "w4a4"))
        kept = module.weights().tensors()
        assert all(torch.equal(kept[name], t) for name, t in weights.tensors().items())
        # bf16 rounding of the sum, of dequantized operands, and codes that fall the other way
        assert relative(module(tensors["x"]), tensors["y_w4a4"]) < 2e-2
    for _, k in WIDTHS[2:]:
        weights = random_weights(128, k)
        x = torch.randn(8, k, generator=torch.Generator().manual_seed(0)).bfloat16()
        y = linear(weights, cpu(precision="w4a4"))(x)
        assert relative(linear(weights, cpu("kitchen", "w4a4"))(x), y) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kitchen_with_eight_bit_activations_is_near_the_exact_result(dtype):
    """Its own int8 linear, our low-rank branch; with and without an adapter in it."""
    pytest.importorskip("comfy_kitchen")
    for path in GOLDEN:
        tensors, weights = golden(path)
        weights = weights.to(dtype=dtype)
        x, backend = tensors["x"].to(dtype), select("kitchen", "w4a8", device="cpu", dtype=dtype)
        module = linear(weights, backend)
        kept = module.weights().tensors()
        assert all(torch.equal(kept[name], t) for name, t in weights.tensors().items())
        assert relative(module(x), tensors["y_w4a16"]) < 6e-2  # 127 steps for a row, some of which have outliers
        pair = torch.randn(8, x.shape[-1]).to(dtype), torch.randn(module.out_features, 8).to(dtype)
        module.set_adapter(Terms(*pair))
        change = x.double() @ pair[0].double().T @ pair[1].double().T
        assert module.adapter is None
        assert relative(module(x), tensors["y_w4a16"].double() + change) < 4e-2


def test_eight_bit_weights_are_those_of_triton():
    """q * s over a row's largest weight, in 127 steps."""
    _, weights = golden(GOLDEN[0])
    prepared = kitchen.prepare(weights, "w4a8")
    codes, scale = kitchen.codes(prepared), prepared["channel_scale"] * 448 / 127
    assert codes.dtype == torch.int8 and codes.abs().max() == 127
    assert (codes * scale[:, None] - weights.residual()).abs().max() <= 0.51 * scale.max()


@pytest.mark.parametrize(
    ("sm", "amd", "w4a4", "w4a8"),
    [
        (90, None, "w4a4 needs INT4 tensor cores", None),
        (86, None, None, None),
        (75, None, "needs sm_80 or later, the GPU is sm_75", None),
        (70, None, "needs sm_80 or later", "int8_linear needs sm_75 or later, the GPU is sm_70"),
        (None, "gfx1100", None, None),
        (None, "gfx1030", None, "its hip kernels have no int8_linear for this GPU"),
        (None, "gfx906", "its hip kernels are unavailable: no matrix units", "its hip kernels are unavailable"),
    ],
)
def test_kitchens_registry_says_what_runs(sm, amd, w4a4, w4a8, gpu, fake_kitchen, monkeypatch):
    gpu(sm)
    monkeypatch.setattr(kitchen, "amd_architecture", lambda device: amd)
    if amd == "gfx1030":
        monkeypatch.delitem(fake_kitchen.registry.rules, ("hip", "int8_linear"))
    if amd == "gfx906":
        fake_kitchen.states["hip"] = {"available": False, "unavailable_reason": "no matrix units"}
    for precision, expected in (("w4a4", w4a4), ("w4a8", w4a8)):
        found = kitchen.unavailable(torch.device("cuda"), torch.bfloat16, precision=precision)
        assert found is None if expected is None else expected in found
    assert (kitchen.unavailable(torch.device("cuda"), torch.bfloat16) is None) is (None in (w4a4, w4a8))
    assert "the device is mps" in kitchen.unavailable(torch.device("mps"), torch.bfloat16)


def test_kitchen_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", types.ModuleType("comfy_kitchen"))
    assert "update it" in kitchen.unavailable(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert "pip install comfy-kitchen" in kitchen.unavailable(torch.device("cpu"), torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that every device is an NVIDIA GPU of the given compute capability."""

    def pretend(sm: int) -> None:
        for module in (backends, backends.load("triton"), kitchen, nunchaku):
            monkeypatch.setattr(module, "capability", lambda device: sm)
        monkeypatch.setattr(backends, "describe", lambda device: f"a GPU (sm_{sm})")

    return pretend


@pytest.fixture
def no_engine(monkeypatch):
    """No package called nunchaku."""
    forget()
    find = backends.nunchaku.importlib.util.find_spec
    monkeypatch.setattr(
        nunchaku.importlib.util, "find_spec", lambda name, *rest: None if name == "nunchaku" else find(name, *rest)
    )


@pytest.fixture
def fake_kitchen(monkeypatch):
    """A comfy_kitchen whose two operators follow its documented formula and layouts in fp32."""
    module = types.ModuleType("comfy_kitchen")

    def quantize(x, smooth, lora_down, pad_size=256):
        assert x.is_contiguous() and lora_down.shape[0] == x.shape[1]
        groups = (x / smooth).float().view(len(x), -1, 64)
        scale = groups.abs().amax(-1).clamp(min=1e-10) / 7
        codes = (groups / scale[:, :, None]).round().clamp(-7, 7).to(torch.int8).view(len(x), -1, 2)
        padded = [0, 0, 0, -len(x) % pad_size]
        parts = layout.pack_pairs(codes), scale.to(x.dtype), x.float() @ lora_down.float()
        packed, scale, rank = (torch.nn.functional.pad(part, padded) for part in parts)
        return packed, scale.t().contiguous(), rank

    def multiply(act, wgt, ascales, wscales, lora_act_in, lora_up, bias=None):
        assert wscales.shape == (2 * wgt.shape[1] // 64, len(wgt)) and len(act) % 256 == 0
        dense = [
            (layout.unpack_pairs(packed).view(len(packed), -1, 64).float() * scale.t().float()[:, :, None]).flatten(1)
            for packed, scale in ((act, ascales), (wgt, wscales))
        ]
        y = dense[0] @ dense[1].T + lora_act_in @ lora_up.float().T
        return (y if bias is None else y + bias.float()).to(lora_up.dtype)

    module.quantize_svdquant_w4a4, module.scaled_mm_svdquant_w4a4 = quantize, multiply
    module.int8_linear = None
    module.states = {form: {"available": True, "unavailable_reason": None} for form in ("eager", "cuda", "hip")}
    module.list_backends = lambda: module.states
    rules = {(form, name): None for form in module.states for name in kitchen.OPERATORS.values()}
    rules |= {("cuda", "quantize_svdquant_w4a4"): (8, 0), ("cuda", "int8_linear"): (7, 5)}
    rules = {key: types.SimpleNamespace(min_compute_capability=least) for key, least in rules.items()}
    module.registry = types.SimpleNamespace(rules=rules, get_constraints=lambda *key: rules.get(key))
    monkeypatch.setitem(sys.modules, "comfy_kitchen", module)
    return module
