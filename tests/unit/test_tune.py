"""How `auto` chooses: the trial in a process of its own, the timing, the choice, and what is remembered.

There is no GPU here: the same functions run ways of the CPU, plain torch and a small comfy-kitchen of our own in which
faults are planted.
"""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

from zimage_core import cli, trial, tune
from zimage_core.linear import backends
from zimage_core.linear.svdq import SVDQLinear, smoothing
from zimage_core.models import attention, ops
from zimage_core.trial import Outcome

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPES = {(256, 128): 2.0, (128, 256): 1.0}
TORCH, KITCHEN = ("reference", "w4a16"), ("kitchen", "w4a8")
FAULTS = {
    None: "",
    "wrong": "y[7] *= 1.5",  # one row of many
    "raises": "raise RuntimeError('no kernel image is available')",
    "aborts": "os.abort()",
    "hangs": "time.sleep(600)",
}


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """Writes a package comfy_kitchen whose int8_linear has a fault."""

    def write(fault: str | None = None) -> None:
        text = """
            import os, time, types
            import torch

            class registry:
                def get_constraints(form, operator):
                    return types.SimpleNamespace(min_compute_capability=None)

            def list_backends():
                return {"eager": {"available": True, "unavailable_reason": None}}

            def scaled_mm_svdquant_w4a4(*given):
                raise NotImplementedError

            def int8_attention_is_available(device=None):
                return os.environ.get("INT8_ATTENTION") == "1"

            def int8_attention(q, k, v, attn_mask=None):
                q, k, v = ((y * 64).round() / 64 for y in (q, k, v))
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

            def int8_linear(x, weight, weight_scale, bias, out_dtype):
                scale = x.float().abs().amax(1, keepdim=True) / 127
                codes = (x.float() / scale).round()
                y = codes @ weight.float().T * scale * weight_scale.float()
                y = (y + (0 if bias is None else bias.float())).to(out_dtype)
                if len(y) > 7:
                    FAULT
                return y
        """
        (package / "__init__.py").write_text(textwrap.dedent(text).replace("FAULT", FAULTS[fault] or "pass"))
        importlib.invalidate_caches()

    package = tmp_path / "path" / "comfy_kitchen"
    package.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path"), *sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] == "comfy_kitchen"]:
        monkeypatch.delitem(sys.modules, name)
    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "comfy_kitchen"]:
        del sys.modules[name]


@pytest.fixture
def as_gpu(kitchen, tmp_path, monkeypatch):
    """The CPU stands for a GPU on which plain torch and comfy-kitchen's w4a8 run, with a cache folder of its own."""
    kitchen()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "usable", lambda *_: [TORCH, KITCHEN])
    monkeypatch.setattr(tune, "SHAPES", SHAPES)
    monkeypatch.setattr(tune, "ROWS", {"few_ms": 4, "many_ms": 40})
    monkeypatch.setattr(tune, "_known", {})
    plain = tune.measure
    monkeypatch.setattr(tune, "measure", lambda *given: plain(*given, shapes=SHAPES))


def record(**times: tuple[float, float] | str) -> tune.Record:
    """Figures as `measure` returns them: (few, many) ms, or why a way was refused, by backend_precision."""
    ways = {}
    for name, found in times.items():
        refused = {"refused": found} if isinstance(found, str) else None
        ways[name.replace("_", " ")] = refused or {"error": 0.01, "few_ms": found[0], "many_ms": found[1]}
    return {"ways": ways, "seconds": 0.0}


@pytest.mark.parametrize(
    "way", [("reference", "w4a16"), ("reference", "w4a4"), ("kitchen", "w4a4"), ("kitchen", "w4a8")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_computes_as_the_reference_passes_its_trial(way, dtype):
    if way[0] == "kitchen":
        pytest.importorskip("comfy_kitchen")
    torch.manual_seed(0)
    outcome = trial.try_linear(way, CPU, dtype)
    # w4a16 rounds operands and result, w4a8 has 127 steps, w4a4 seven.
    assert outcome.refused is None and outcome.error < {"w4a16": 0.01, "w4a8": 0.02, "w4a4": 0.15}[way[1]]


def test_fp4_weights_have_a_trial_of_their_own():
    found = trial.in_child([TORCH], CPU, BF16, fp4=True)
    assert found[TORCH].refused is None and found[TORCH].error < 0.01
    assert tune.measure(CPU, BF16, [TORCH], fp4=True, shapes=SHAPES)["ways"]["reference w4a16"]["many_ms"] > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_way_is_refused_in_a_sentence_and_nothing_else_suffers(fault, kitchen):
    kitchen(fault)
    ways, limit = [("kitchen", "w4a8"), ("reference", "w4a16")], 60.0
    if fault == "hangs":  # several times what a child takes that does not hang, on a machine as busy as this one
        begun = time.perf_counter()
        trial.in_child([TORCH], CPU, BF16)
        limit = 2.0 + 3 * (time.perf_counter() - begun)
    begun = time.perf_counter()
    found = trial.in_child(ways, CPU, BF16, time_limit=limit)
    assert time.perf_counter() - begun < 120
    assert found["reference", "w4a16"].refused is None and found["reference", "w4a16"].error < 0.01
    expected = {
        None: None,
        "wrong": "wrong here: expected an error of up to 0.060 on a small input, found 0.",
        "raises": "failed here: its process ended with code 1: RuntimeError: no kernel image is available",
        "aborts": "failed here: its process ended with code",
        "hangs": f"failed here: did not answer within {limit:.0f} s",
    }[fault]
    refused = found["kitchen", "w4a8"].refused
    assert refused is None if expected is None else expected in refused


def test_no_number_is_no_small_error():
    assert "found nan" in trial.check(float("nan"), 1.0).refused


def test_a_child_without_its_device_is_no_ways_fault():
    with pytest.raises(trial.Untried, match="ended with code 1"):
        trial.in_child([TORCH], torch.device("cuda", 63), BF16)


def test_kernels_between_the_linears_are_tried_too(monkeypatch):
    """Plain torch in their place passes; with a wrong one it is refused."""

    class Fused:
        norm_gate_add, norm_rope = ops.norm_gate_add, ops.norm_rope

        @staticmethod
        def norm_scale(*given, smooth=None, columns=0):
            return Fused.coded(ops.norm_scale(*given), smooth)

        @staticmethod
        def add_norm_scale(*given, smooth=None, columns=0):
            x, y = ops.add_norm_scale(*given)
            return x, Fused.coded(y, smooth)

        @staticmethod
        def swiglu(x, smooth=None, columns=0):
            return Fused.coded(ops.swiglu(x), smooth)

        @staticmethod
        def coded(y, smooth):
            if smooth is None:
                return y
            smoothed = y.flatten(0, 1).float() / smooth.float()
            scale = smoothed.abs().amax(1) / 127
            return backends.Quantized(y, (smoothed / scale[:, None]).round().to(torch.int8), scale)

    for name in ("norm_gate_add", "norm_rope"):
        monkeypatch.setattr(Fused, name, staticmethod(getattr(ops, name)))
    monkeypatch.setattr(backends, "load", lambda name: Fused)
    torch.manual_seed(0)
    assert trial.try_fused(CPU, BF16).refused is None
    monkeypatch.setattr(Fused, "norm_rope", staticmethod(lambda qkv, *rest: qkv.unbind(2)))
    assert "wrong here" in trial.try_fused(CPU, BF16).refused


def test_ways_are_timed_block_by_block_and_a_refused_one_is_not():
    """With a clock that knows what a way takes; the slow one is timed once, the others REPEATS times."""
    asked = []

    def elapsed(call, device):
        way = call.func.__module__.rpartition(".")[2], call.args[2]
        asked.append(way)
        call()
        return {"w4a16": 2.0, "w4a4": 8.0}[way[1]]

    ways = [("reference", "w4a16"), ("reference", "w4a4"), ("kitchen", "w4a8")]
    found = tune.measure(
        CPU, BF16, ways, shapes=SHAPES, elapsed=elapsed, tried=lambda ways, *_: {ways[0]: Outcome(refused="wrong here")}
    )
    assert found["ways"]["reference w4a16"] == {"error": None, "few_ms": 6.0, "many_ms": 6.0}  # 2 ms, three times
    assert found["ways"]["reference w4a4"]["many_ms"] == 24.0
    assert found["ways"]["kitchen w4a8"] == {"refused": "wrong here"}
    assert asked.count(("reference", "w4a16")) == 4 * (1 + tune.REPEATS)
    assert asked.count(("reference", "w4a4")) == 4 * 2


def test_timing_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune.measure(CPU, BF16, [TORCH], shapes=SHAPES)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"triton_w4a16": (2, 4), "triton_w4a8": (1, 2), "reference_w4a16": (3, 6)}, ("triton", "w4a8")),
        ({"triton_w4a16": (1, 2.1), "triton_w4a8": (1.05, 2.0)}, ("triton", "w4a16")),  # alike: the more precise one
        ({"triton_w4a8": (2, 2.1), "kitchen_w4a8": (2, 2)}, ("kitchen", "w4a8")),
        ({"triton_w4a16": (1, 4), "triton_w4a8": (2, 2)}, ("triton", "w4a16+w4a8")),
        ({"triton_w4a16": (1.95, 4), "triton_w4a8": (2, 2)}, ("triton", "w4a8")),  # alike for few rows: one for all
        ({"triton_w4a16": (1, 4), "nunchaku_w4a4": (2, 2)}, ("nunchaku", "w4a4")),  # one form of the weights in memory
        ({"kitchen_w4a4": "wrong here", "reference_w4a16": (3, 6)}, ("reference", "w4a16")),
    ],
)
def test_the_fastest_is_chosen(times, chosen):
    assert tune.pick(record(**times), tune.WAYS) == chosen


def test_where_every_way_asked_for_was_refused_the_reasons_are_said():
    found = record(kitchen_w4a4="failed here: did not answer within 60 s", reference_w4a16=(3, 6))
    with pytest.raises(ValueError, match="kitchen w4a4: failed here: did not answer within 60 s; choose backend"):
        tune.pick(found, [("kitchen", "w4a4")])


def test_figures_are_kept_and_are_the_same_at_every_later_run(as_gpu, monkeypatch):
    first = tune.known(CPU, BF16)
    assert set(first["ways"]) == {"reference w4a16", "kitchen w4a8"} and first["ways"]["kitchen w4a8"]["many_ms"] > 0
    monkeypatch.setattr(tune, "_known", {})  # a new process
    monkeypatch.setattr(tune, "measure", None)
    assert tune.known(CPU, BF16) == first
    (file,) = tune.cache_folder().iterdir()
    assert json.loads(file.read_text())["key"]["torch"] == torch.__version__


def test_what_other_versions_measured_is_measured_again(as_gpu, monkeypatch):
    first = tune.known(CPU, BF16)
    monkeypatch.setattr(tune, "_known", {})
    monkeypatch.setattr(tune, "driver", lambda: "another driver")
    assert tune.known(CPU, BF16)["key"] != first["key"]
    for file in tune.cache_folder().iterdir():
        file.write_text("{")  # a damaged file
    monkeypatch.setattr(tune, "_known", {})
    assert tune.known(CPU, BF16)["ways"]


def test_of_two_processes_that_measure_at_once_both_use_what_is_kept_first(as_gpu, tmp_path):
    key = {"device": "one"}
    first, second = {"key": key, **record(triton_w4a8=(1, 2))}, {"key": key, **record(triton_w4a8=(3, 4))}
    path = tmp_path / "cache" / "ways.json"
    assert tune.keep(path, first, anew=False) == first
    assert tune.keep(path, second, anew=False) == first
    assert tune.keep(path, second, anew=True) == second == tune.read(path, key)
    assert [file.name for file in path.parent.iterdir()] == ["ways.json"]


@pytest.mark.parametrize("lost", ["w8_ms", "w16_ms", "few_ms", "many_ms"])
def test_figures_that_lack_one_of_a_pair_are_measured_anew(lost, as_gpu, tmp_path):
    key, path = {"device": "one"}, tmp_path / "ways.json"
    kept = {"key": key, **record(triton_w4a8=(1, 2))}
    kept["ways"]["triton fp8"] = {"error": 0.02, "w8_ms": 1.0, "w16_ms": 2.0}
    assert tune.keep(path, kept, anew=True) == tune.read(path, key) == kept
    for facts in kept["ways"].values():
        facts.pop(lost, None)
    path.write_text(json.dumps(kept))
    assert tune.read(path, key) is None


def test_a_cache_that_cannot_be_written_is_said_and_no_error(as_gpu, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert tune.known(CPU, BF16)["ways"]
    assert "cannot be written" in caplog.text


def test_auto_takes_the_fastest_and_a_named_way_is_not_measured(as_gpu, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda *_: record(reference_w4a16=(9, 9), kitchen_w4a8=(1, 1)))
    chosen = tune.select(device="cpu", dtype=BF16)
    assert (chosen.name, chosen.precision) == KITCHEN
    assert "the fastest of reference w4a16: 9.00 ms for 4 rows" in chosen.reason
    assert tune.select(precision="w4a16", device="cpu", dtype=BF16).name == "reference"
    monkeypatch.setattr(tune, "known", None)
    for backend, precision in (("kitchen", "w4a8"), ("reference", "auto"), ("torch", "w4a4")):
        assert tune.select(backend, precision, device="cpu", dtype=BF16)


def test_where_nothing_can_be_timed_the_first_that_runs_is_taken(as_gpu, monkeypatch, caplog):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune, "measure", full)
    assert tune.select(device="cpu", dtype=BF16).name == "reference"
    assert "could not be timed (CUDA out of memory)" in caplog.text
    assert not tune.cache_folder().exists()


def test_a_picture_is_the_same_from_the_cache(as_gpu, tiny_files, monkeypatch):
    from zimage_core import load_pipeline

    monkeypatch.setattr(tune, "measure", lambda *_: record(reference_w4a16=(9, 9), kitchen_w4a8=(1, 1)))
    pictures = []
    for _ in range(2):
        pipeline = load_pipeline(**tiny_files, device="cpu", dtype="bfloat16")
        found = pipeline("a red circle", 64, 64, num_inference_steps=1, generator=0)
        assert (found.backend.name, found.backend.precision) == KITCHEN
        pictures.append(found[0].tobytes())
        monkeypatch.setattr(tune, "_known", {})
    assert pictures[0] == pictures[1]


def test_kernels_that_failed_their_trial_are_not_used_between_the_linears(as_gpu, monkeypatch):
    ours = ops.Ops(*[lambda: None] * len(ops.Ops._fields))
    monkeypatch.setattr(ops, "select", lambda *_: ours)
    monkeypatch.setattr(tune, "measure", lambda *_: record(reference_w4a16=(9, 9), triton_fused="wrong here"))
    assert tune.select_ops("auto", CPU, BF16, 64) is ops.TORCH
    assert tune.select_ops("triton", CPU, BF16, 64) is ours


def test_few_rows_may_go_another_way_than_many(monkeypatch):
    monkeypatch.setattr(backends, "FEW_ROWS", 4)
    seen = []

    class Module:
        PRECISIONS = MIXED = ("w4a16", "w4a8")
        prepare = staticmethod(
            lambda weights, level: {**weights.tensors(), **({"extra": torch.ones(1)} if level == "w4a8" else {})}
        )
        smoothing = staticmethod(
            lambda prepared, level, rows: (prepared["smooth_factor"] if level == "w4a8" else None, 0)
        )

        @staticmethod
        def linear(x, prepared, level):
            seen.append((len(x), level))
            return x.new_zeros(len(x), 128)

    backend = backends.Backend("triton", "w4a16+w4a8", Module, "")
    linear = SVDQLinear(128, 128, rank=16)
    linear.load(trial.random_weights(128, 128, 16, CPU, BF16), backend)
    for rows in (4, 5):
        x = torch.zeros(1, rows, 128, dtype=BF16)
        assert (smoothing(linear, x)[0] is not None) is (rows == 5)
        linear(x)
    assert seen == [(4, "w4a16"), (5, "w4a8")] and "extra" in dict(linear.named_buffers())


def test_a_mixed_precision_can_be_named_where_its_backend_has_it():
    with pytest.raises(ValueError, match=r"reference: has no w4a4\+w4a16"):
        backends.select("reference", "w4a4+w4a16", device="cpu", dtype=BF16)
    with pytest.raises(ValueError, match="precision: expected auto or one of"):
        backends.select("auto", "w4a4+int4", device="cpu", dtype=BF16)


@pytest.mark.parametrize(("int8_ms", "chosen"), [(0.8, "int8"), (0.95, "sdpa"), (2.0, "sdpa")])
def test_attention_in_eight_bits_is_taken_where_allowed_and_faster(int8_ms, chosen, as_gpu, monkeypatch):
    monkeypatch.setenv("INT8_ATTENTION", "1")
    found = record(reference_w4a16=(9, 9))
    found["ways"]["kitchen attention"] = {"error": 0.02, "w16_ms": 1.0, "w8_ms": int8_ms}
    monkeypatch.setattr(tune, "measure", lambda *_: found)
    assert tune.select_attention("auto", CPU, BF16) == chosen
    assert tune.select_attention("sdpa", CPU, BF16) == "sdpa"
    assert tune.select_attention("int8", CPU, BF16) == "int8"
    with pytest.raises(ValueError, match="attention: expected auto, sdpa or int8, found 'flash'"):
        tune.select_attention("flash", CPU, BF16)
    monkeypatch.delenv("INT8_ATTENTION")
    assert tune.select_attention("auto", CPU, BF16) == "sdpa"
    with pytest.raises(ValueError, match="attention 'int8' cannot run here: comfy-kitchen has no int8 attention"):
        tune.select_attention("int8", CPU, BF16)


def test_attention_in_eight_bits_is_tried_and_timed(kitchen, monkeypatch):
    kitchen()
    monkeypatch.setenv("INT8_ATTENTION", "1")
    monkeypatch.setattr(tune, "ROWS", {"few_ms": 4, "many_ms": 40})
    found = tune.measure(CPU, BF16, [TORCH], shapes=SHAPES)["ways"]["kitchen attention"]
    assert 0 < found["error"] < 0.03 and found["w16_ms"] > 0 and found["w8_ms"] > 0


def test_a_picture_with_attention_in_eight_bits(kitchen, tiny_files, monkeypatch):
    """Every block computes it so, the plan knows it, and the picture is near that of torch's attention."""
    from zimage_core import load_pipeline
    from zimage_core.memory.meta import META

    kitchen()
    monkeypatch.setenv("INT8_ATTENTION", "1")
    pictures = {}
    for name in ("sdpa", "int8"):
        pipeline = load_pipeline(**tiny_files, device="cpu", attention=name)
        pictures[name] = pipeline("a red circle", 64, 64, num_inference_steps=1, generator=0)[0]
        planned = pipeline.sources.transformer(META)
        assert pipeline.transformer.attention is attention.KINDS[name] is planned.attention
    a, b = (torch.tensor(list(pictures[name].tobytes())).float() for name in ("sdpa", "int8"))
    assert 0 < (a - b).abs().mean() < 8


FP8, INT8 = "float8_e4m3fn", "int8"


@pytest.mark.parametrize(
    ("precision", "backend", "times", "chosen"),
    [
        ("auto", "auto", {"triton fp8": (1, 2), "triton int8": (1, 2)}, {FP8: "triton", INT8: "triton"}),
        ("auto", "auto", {"triton fp8": (1, 1.05), "triton int8": (2, 1)}, {}),
        ("auto", "auto", {"triton int8": (2, 3), "kitchen int8": (1, 3)}, {INT8: "kitchen"}),
        ("auto", "auto", {}, {}),  # as after a trial that failed
        ("w8a8", "auto", {"triton int8": (2, 1), "kitchen int8": (1.5, 1)}, {FP8: "triton", INT8: "kitchen"}),
        ("w8a8", "triton", {"kitchen int8": (1, 9)}, {FP8: "triton", INT8: "triton"}),
        ("w8a16", "auto", {"triton fp8": (1, 9)}, {}),
        ("auto", "torch", {"triton fp8": (1, 9)}, {}),
    ],
)
def test_what_is_stored_in_8_bits_is_multiplied_so_where_that_is_faster(
    precision, backend, times, chosen, as_gpu, monkeypatch
):
    """(ms, ms in 16 bits); what is named need not be faster."""
    ways = {name: {"error": 0.02, "w8_ms": eight, "w16_ms": sixteen} for name, (eight, sixteen) in times.items()}
    monkeypatch.setattr(tune, "product_refusal", lambda *_: None)
    monkeypatch.setattr(tune, "measure", lambda *_: {"ways": ways, "seconds": 0.0})
    assert tune.select_products([FP8, INT8], backend, precision, CPU, BF16) == chosen


@pytest.mark.parametrize("fault", [None, "wrong", "aborts"])
def test_products_in_8_bits_are_tried_and_timed(kitchen, fault, monkeypatch):
    """comfy-kitchen's; dequantizing in plain torch stands for the kernel."""
    from zimage_core.formats import stored

    kitchen(fault)
    dense = SimpleNamespace(dequantize=lambda form, parts, weight: weight.copy_(stored.dequantize(form, parts)))
    plain = tune.backends.load
    monkeypatch.setattr(tune.backends, "load", lambda name: dense if name == "dense" else plain(name))
    monkeypatch.setattr(tune, "product_refusal", lambda way, *_: None if way[0] == "kitchen" else "not here")
    monkeypatch.setattr(tune, "SHAPES", SHAPES)
    monkeypatch.setattr(tune, "ROWS", {"few_ms": 4, "many_ms": 40})
    found = tune.measure(CPU, BF16, [TORCH], shapes=SHAPES)["ways"]
    assert set(found) == {"reference w4a16", "kitchen int8"}
    if fault:
        assert "wrong here" in found["kitchen int8"]["refused"] or "failed here" in found["kitchen int8"]["refused"]
    else:
        assert 0 < found["kitchen int8"]["error"] < 0.03
        assert found["kitchen int8"]["w8_ms"] > 0 and found["kitchen int8"]["w16_ms"] > 0


def test_the_command_wants_a_gpu(capsys):
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert (
        "device cpu: expected a GPU of NVIDIA or AMD; elsewhere plain torch is all that runs" in capsys.readouterr().err
    )


def test_what_was_found_is_said(as_gpu):
    found = record(kitchen_w4a4="wrong here", triton_w4a8=(1, 2))
    found["ways"] |= {
        "triton fused": {"error": 0.003},
        "kitchen attention": {"error": 0.02, "w16_ms": 1, "w8_ms": 2},
    }
    assert tune.describe(found) == {
        "kitchen w4a4": "wrong here",
        "triton w4a8": "1.00 ms for 4 rows, 2.00 ms for 40, error 0.010",
        "triton fused": "runs, error 0.003",
        "kitchen attention": "2.00 ms, in 16 bits 1.00 ms, error 0.020",
    }
