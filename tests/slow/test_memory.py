"""benchmarks/memory.py: its dry run on the bundled demo, and the synthetic files that it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from zimage_core import load_pipeline
from zimage_core.models.config import ZImageConfig
from zimage_core.models.text_encoder import TextEncoderConfig
from zimage_core.models.vae import VAEConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARKS / "memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_the_dry_run_streams_the_demo(monkeypatch, capsys):
    benchmark = load_benchmark(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["memory.py", "--dry-run"])
    monkeypatch.setattr(benchmark, "DRIFT", 0.5)  # host memory of a test process says nothing
    assert benchmark.main() == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["ok"] and [row["size"] for row in facts["rows"]] == [128, 64]
    assert all(row["identical"] and row["streamed"] >= 3 for row in facts["rows"])
    assert facts["in_a_row"]["pictures"] == 4


def test_synthetic_files_can_be_drawn_with(monkeypatch, tmp_path):
    benchmark = load_benchmark(monkeypatch)
    paths = benchmark.write_synthetic(
        tmp_path,
        ZImageConfig(dim=384, n_heads=6, n_layers=1, n_refiner_layers=1, cap_feat_dim=64, axes_dims=(16, 24, 24)),
        TextEncoderConfig(
            vocab_size=2000, hidden_size=64, intermediate_size=96, num_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32,
        ),
        VAEConfig((32, 32, 32, 32), 1),
        rank=16,
    )  # fmt: skip
    draw = load_pipeline(**paths, device="cpu", dtype="float32")
    (picture,) = found = draw("a cat", height=32, width=32, num_inference_steps=1, generator=0)
    assert picture.getextrema() != ((0, 0),) * 3 and picture.size == (32, 32)
    assert [stage.name for stage in found.plan.stages] == ["text encoder", "transformer", "VAE"]
