"""The benchmarks: that they run anywhere and end in JSON, and what their figures are made of. No timing is judged."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from zimage_core import bench, cli, report
from zimage_core.formats.load import load_transformer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(bench, "LIMIT_S", 0.0)


@pytest.fixture
def script(monkeypatch):
    """Run a script of benchmarks/ in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)

    def run(name: str, *arguments: str) -> None:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()

    return run


def last_line(capsys) -> dict:
    out = capsys.readouterr().out
    assert "| way" in out or "| stage" in out, "the table for people"
    return json.loads(out.splitlines()[-1])


def test_zimage_bench_on_a_cpu(capsys):
    assert cli.main(["bench", "--device=cpu", "--size=32"]) == 0
    found = last_line(capsys)
    assert found.keys() == {"bench", "machine", "peak", "linears", "totals", "model", "steps", "busy"}
    assert {"date", "zimage", "device", "dtype", "torch", "threads", "clock", "unavailable"} <= found["machine"].keys()
    assert {row["layer"] for row in found["linears"]} == {"qkv", "out", "w3_w1", "w2"}
    errors = {row["what"]: row["error"] for row in found["linears"]}
    assert errors["float32"] < errors["reference w4a16"] < 0.01 < errors["reference w4a4"] < 0.15
    steps = {row["what"]: row for row in found["steps"]}
    assert {"dense bfloat16", "reference w4a16", "reference w4a4"} <= steps.keys()
    assert all(row["ms"] > 0 and row["size"] == 32 for row in steps.values())
    assert steps["dense bfloat16"]["vs_dense"] == 1.0


@pytest.mark.filterwarnings("ignore:2 prompts at 32 x 32")  # it is about time
def test_quantizing(capsys, script):
    script("quantize", "--small", "--device=cpu", "--rank=16", "--prompts=2", "--size=32")
    out = capsys.readouterr().out
    assert "| solver, s |" in out and "3 blocks, rank 16, 2 prompts of 32 x 32" in out
    found = json.loads(out.splitlines()[-1])
    assert [row["linear"] for row in found["linears"]] == ["qkv", "out", "w3_w1", "w2"]
    assert all(0 < row["branch_s"] < row["solver_s"] for row in found["linears"])
    run = found["run"]
    assert run["drawn_blocks"] == 17 and len(run["linear_s"]) == 4
    assert run["drawing_s"] + 3 * sum(run["linear_s"].values()) < run["seconds"]
    assert run["projected_s"] == pytest.approx(run["seconds"] * 34 / 3)


def test_a_busy_machine_is_said():
    """Ceilings that moved by more than a quarter, or a linear beyond them; not what a quiet machine shows."""
    before, rows = {"tflops": 10.0, "gbps": 100.0}, [{"of_gemm": 0.9}, {"of_copy": 3.0}]
    assert bench.disturbed(before, {"tflops": 9.0, "gbps": 110.0}, rows) is None
    assert "moved by 100% during the run)" in bench.disturbed(before, {"tflops": 5.0, "gbps": 100.0}, rows)
    assert "busy (a linear reached 437% of" in bench.disturbed(before, before, [*rows, {"of_gemm": 4.37}])


def test_zimage_bench_of_a_file(capsys, tiny_files):
    assert cli.main(["bench", "--device=cpu", "--size=32", f"--model={tiny_files['model']}"]) == 0
    found = last_line(capsys)
    assert found["model"] == tiny_files["model"].name
    assert cli.main(["bench", "--device=cpu", "--size=100"]) == 2
    assert cli.main(["bench", "--device=cpu", f"--model={tiny_files['vae']}"]) == 2
    complaints = capsys.readouterr().err.strip().splitlines()
    assert len(complaints) == 2
    assert "multiple of 16" in complaints[0]
    assert "found a VAE" in complaints[1]


def test_step(capsys, script, tiny_files):
    script("step", "--tiny", "--device=cpu", "--repeats=1", "--batches", "1", "2", "--only", "dense", "w4a16")
    found = last_line(capsys)
    assert [(row["batch"], row["what"]) for row in found["steps"]] == [
        (batch, what) for batch in (1, 2) for what in ("dense bfloat16", "reference w4a16")
    ]
    assert found["weights"] == "random"
    file = f"--model={tiny_files['model']}"
    script("step", file, "--device=cpu", "--repeats=0", "--sizes=32", "--batches=1", "--only", "w4a16")
    found = last_line(capsys)
    assert found["load"].keys() >= {"seconds", "processor_seconds", "model_gib"}


def test_step_of_diffusers(capsys, script):
    pytest.importorskip("diffusers")
    script("step", "--tiny", "--device=cpu", "--repeats=0", "--batches=1", "--only", "diffusers")
    assert [row["what"] for row in last_line(capsys)["steps"]] == ["diffusers"]


def test_linear(capsys, script, monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda *_: {"tflops": 1.0, "gbps": 1.0})
    script("linear", "--device=cpu", "--rows=8", "--rank=16", "--repeats=1")
    found = last_line(capsys)
    assert {"reference w4a16", "torch int4pack w4a16"} <= {row["what"] for row in found["demo"]}


def test_a_picture_from_a_cold_start(capsys, script, tmp_path):
    with pytest.raises(SystemExit) as end:
        script("image", f"--folder={tmp_path}", "--tiny", "--device=cpu", "--check")
    assert end.value.code == 0
    found = last_line(capsys)
    assert found["identical"] is True
    stages = [stage["name"] for stage in found["runs"][0]["stages"]]
    assert stages == ["load text encoder", "encode prompt", "load transformer", "sample", "load VAE", "decode"]


def test_random_models_keep_their_size(tiny_files):
    """A random model has the tensors of a loaded one, and its output is finite."""
    real = load_transformer(tiny_files["model"])
    made = bench.random_model(real.config, CPU, torch.bfloat16, real.backend, real.checkpoint.rank)
    shapes = [
        {name: (t.shape, t.dtype) for name, t in (*m.named_parameters(), *m.named_buffers())} for m in (real, made)
    ]
    assert shapes[0] == shapes[1]
    with torch.inference_mode():
        assert bench.step_of(made, CPU, torch.bfloat16)(32, 1)().isfinite().all()


def test_every_call_is_timed(monkeypatch):
    """Slow ones once, out of turn; none is lost."""
    monkeypatch.setattr(bench, "elapsed_ms", lambda call, device: call())
    called = []
    calls = {
        name: lambda name=name, ms=ms: called.append(name) or ms for name, ms in (("a", 1.0), ("b", 2.0), ("c", 9.0))
    }
    monkeypatch.setattr(bench, "LIMIT_S", 60.0)
    assert bench.medians_ms(calls, CPU, 3, warm_up=1) == {"a": 1.0, "b": 2.0, "c": 9.0}
    assert called[:3] == ["a", "b", "c"]
    assert called[-3:] == ["c"] * 3
    assert sorted(called[3:-3]) == ["a"] * 3 + ["b"] * 3
    called.clear()
    assert bench.medians_ms(calls, CPU, 1, warm_up=0).keys() == calls.keys()
    assert sorted(called) == ["a", "b", "c"]


def test_a_side_that_runs_out_of_memory_has_no_time():
    def build():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    rows = bench.bench_steps({"big": build}, [32], [1], CPU, 1)
    bench.add_ratios(rows, {"ratio": "big"}, ["size"])
    times = dict.fromkeys(("ms", "host_ms", "peak_gib", "ratio"))
    assert rows == [{"what": "big", "size": 32, "batch": 1, **times}]
    assert report.table(rows, bench.STEP_COLUMNS).splitlines()[-1].split("|")[4].strip() == ""


def test_host_memory_sees_what_was_held_and_let_go():
    with bench.host_memory() as found:
        torch.ones(2**26)
        kept = torch.ones(2**25)
    if not found:
        pytest.skip("this system does not tell")
    assert 0.2 < found["peak_gib"] < 0.5
    assert 0.1 < found["kept_gib"] < 0.2
    del kept


def test_encoder_measures_every_form(script, capsys):
    script("encoder", "--captions=2", "--layers=3")
    out = capsys.readouterr().out
    assert out.count("| form") == 3
    rows = json.loads(out.splitlines()[-1])["rows"]
    demo = {row["form"]: row for row in rows if row["layers"] == 3 and row["width"] == 128}
    int8, fp8, nvfp4 = (demo[name] for name in ("INT8, quanto", "FP8 scaled (e4m3)", "NVFP4, ComfyUI"))
    assert 1 > int8["mean"] > fp8["mean"] > nvfp4["mean"] > 0.99
    assert int8["weights"] < 0.01 < fp8["weights"] < 0.03 < nvfp4["weights"] < 0.1
    assert all(row["worst"] <= row["mean"] for row in rows)


def test_a_prompt_s_time_in_every_form(capsys, script):
    script("encoder", "--times", "--layers=1")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows[0]["form"] == "float" and len(rows) == 6 and all(row["ms"] > 0 for row in rows)


def test_eight_bit_files_stay_close_to_bf16(script, capsys):
    """The aims are for the median of 20 pictures (benchmarks/README.md); five are as many as a test has time for.

    Whether 8 or 16 bits come closer to BF16 in five pictures is chance; the flow's error over 40 steps is not."""
    source = BENCHMARKS.parent / "demo_training" / "z-image-demo-bf16.safetensors"
    script("quality", "demo-formats", f"--source={source}", "--captions=5")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    found = {(row["form"], row["activations"]): row for row in rows}
    for form, aim in (("INT8", 50), ("FP8", 40)):
        full, rounded = found[form, "16"], found[form, "8"]
        assert full["median PSNR"] >= aim and rounded["median PSNR"] >= aim
        assert full["flow error"] < rounded["flow error"] < 2 * full["flow error"]
