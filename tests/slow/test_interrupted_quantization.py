"""Calibrated quantization that is interrupted, killed, or runs out of disk, and goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from dense_files import digest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_core.formats.identify import model_info
from zimage_core.formats.safetensors import read_header
from zimage_core.quantize import run as quantize
from zimage_core.quantize.controlnet import quantize_controlnet
from zimage_core.quantize.run import quantize_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.* tokens to calibrate linears of:UserWarning")

LEFTOVERS = [".q.zimage-done", ".q.zimage-lock", ".q.zimage-part"]
SECOND_BLOCK = "block 2/2, attention.to_qkv"


def assert_resumes(outliers, captions, calibrated, folder) -> None:
    """The same call goes on from the last finished block and writes the file of an undisturbed run."""
    assert sorted(os.listdir(folder)) == LEFTOVERS
    reports = []
    quantize_checkpoint(
        outliers, folder / "q", rank=32, cap_feats=captions, size=96, progress=lambda *call: reports.append(call)
    )
    names = [report[2] for report in reports]
    assert names[:2] == ["resumed after block 1/2", "resumed block 1/2, attention.to_qkv"]
    assert names[5] == SECOND_BLOCK and reports[-1][0] == reports[-1][1]
    assert sorted(os.listdir(folder)) == [".q.zimage-lock", "q"]
    assert digest(folder / "q") == digest(calibrated)


def test_interrupted_calibration_goes_on_from_the_last_finished_block(outliers, captions, calibrated, tmp_path):
    def interrupt(done: int, total: int, name: str) -> None:
        if name == SECOND_BLOCK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(outliers, tmp_path / "q", rank=32, cap_feats=captions, size=96, progress=interrupt)
    assert_resumes(outliers, captions, calibrated, tmp_path)


def test_killed_half_way_it_goes_on_too(outliers, captions, calibrated, tmp_path):
    """A process that gets no chance to clean up leaves nothing under the final name, and what it finished serves."""
    save_file({str(i): features for i, features in enumerate(captions)}, tmp_path / "captions")
    code = (
        "import os, signal, sys\n"
        "from safetensors.torch import load_file\n"
        "from zimage_core.quantize.run import quantize_checkpoint\n"
        "def kill(done, total, name):\n"
        f"    if name == {SECOND_BLOCK!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "captions = [features for _, features in sorted(load_file(sys.argv[3]).items())]\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], rank=32, cap_feats=captions, size=96, progress=kill)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", code, str(outliers), str(out / "q"), str(tmp_path / "captions")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -9
    assert_resumes(outliers, captions, calibrated, out)


def test_a_disk_that_fills_up_half_way_gets_a_sentence_and_the_run_goes_on_later(
    outliers, captions, calibrated, tmp_path, monkeypatch
):
    """Where the file system could not reserve the space; the full disk is played by the flush of the second block."""
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:  # the list's first line, the folder, and the first block's: the file and the list
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device; free 5 MiB there or choose another folder"):
        quantize_checkpoint(outliers, tmp_path / "q", rank=32, cap_feats=captions, size=96)
    monkeypatch.undo()
    assert_resumes(outliers, captions, calibrated, tmp_path)


def test_another_version_does_not_go_on_with_the_blocks_of_this_one(outliers, captions, tmp_path, monkeypatch):
    def interrupt(done: int, total: int, name: str) -> None:
        if name == SECOND_BLOCK:
            raise KeyboardInterrupt

    for version, warns in (("0.0.1", nullcontext()), ("0.0.2", pytest.warns(UserWarning, match="cannot be used"))):
        monkeypatch.setattr(quantize, "__version__", version)
        with warns, pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(outliers, tmp_path / "q", rank=32, cap_feats=captions, size=96, progress=interrupt)


def test_a_failure_in_the_last_second_costs_nothing(outliers, captions, calibrated, tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        ValueError, match=r"cannot be put in place \(Permission denied\); .* goes on from .q.zimage-part"
    ):
        quantize_checkpoint(outliers, tmp_path / "q", rank=32, cap_feats=captions, size=96)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == LEFTOVERS
    reports = []
    quantize_checkpoint(
        outliers, tmp_path / "q", rank=32, cap_feats=captions, size=96, progress=lambda *call: reports.append(call)
    )
    assert [report[2] for report in reports] == ["resumed after block 2/2", "q"]
    assert reports[-1][0] == reports[-1][1]
    assert sorted(os.listdir(tmp_path)) == [".q.zimage-lock", "q"]
    assert digest(tmp_path / "q") == digest(calibrated)


def test_weights_that_changed_in_one_value_are_another_source(outliers, captions, tmp_path):
    """Interrupted, one number changed, the same call: the file is that of the changed weights, not a mixture."""
    source = tmp_path / "source.safetensors"
    shutil.copy(outliers, source)

    def stop(done, total, what):
        if what.startswith("block 2"):
            raise KeyboardInterrupt

    options = {"rank": 16, "cap_feats": captions, "size": 96}
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "q", **options, progress=stop)
    tensors = load_file(source)
    key = next(key for key in tensors if key.endswith("layers.0.attention.to_q.weight"))
    tensors[key][1, 3] += 0.5
    save_file(tensors, source, read_header(source).metadata)
    with pytest.warns(UserWarning, match="are of a run with other settings"):
        quantize_checkpoint(source, tmp_path / "q", **options)
    quantize_checkpoint(source, tmp_path / "fresh", **options)
    assert digest(tmp_path / "q") == digest(tmp_path / "fresh")


def test_an_interrupted_calibration_of_a_controlnet_is_resumed(dense_nets, tiny_files, tmp_path):
    """The file of an undisturbed run; another base is another run."""
    gen, width = torch.Generator().manual_seed(0), model_info(tiny_files["model"]).config.cap_feat_dim
    feats = [torch.randn(20, width, generator=gen) for _ in range(2)]
    contexts = [torch.randn(33, 8, 8, generator=gen) for _ in feats]
    options = {"rank": 16, "cap_feats": feats, "contexts": contexts, "size": 64}
    other = tmp_path / "other.safetensors"
    tensors = load_file(tiny_files["model"])
    tensors["cap_pad_token"] += 1
    with safe_open(tiny_files["model"], "pt") as file:
        save_file(tensors, other, file.metadata())
    seen = []

    def run(name, base, stop=False):
        def progress(done, total, what):
            seen.append(what)
            assert done <= total
            if stop and what == "layers.0.attention.to_qkv":
                raise KeyboardInterrupt

        quantize_controlnet(dense_nets["2.1 lite"], tmp_path / name, base=base, **options, progress=progress)
        return (tmp_path / name).read_bytes()

    whole = run("whole", tiny_files["model"])
    for again in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run("net", tiny_files["model"], stop=True)
        seen.clear()
        if again:
            with pytest.warns(UserWarning, match="are of a run with other settings"):
                assert run("net", other) != whole
        else:
            assert run("net", tiny_files["model"]) == whole
            resumed = [what for what in seen if what.startswith("resumed")]
            assert resumed and all(what.startswith("resumed noise_refiner.0.") for what in resumed)
            assert "a step" not in seen


def test_what_an_interrupted_calibration_of_a_controlnet_left_is_checked(dense_nets, tiny_files, tmp_path):
    """A byte that flipped in a finished part: it is made afresh, the file is that of an undisturbed run."""
    gen, width = torch.Generator().manual_seed(0), model_info(tiny_files["model"]).config.cap_feat_dim
    feats = [torch.randn(20, width, generator=gen) for _ in range(2)]
    contexts = [torch.randn(33, 8, 8, generator=gen) for _ in feats]
    options = {"rank": 16, "cap_feats": feats, "contexts": contexts, "size": 64, "base": tiny_files["model"]}

    def stop(done, total, what):
        if what == "layers.0.attention.to_qkv":
            raise KeyboardInterrupt

    quantize_controlnet(dense_nets["2.1 lite"], tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize_controlnet(dense_nets["2.1 lite"], tmp_path / "net", **options, progress=stop)
    left = tmp_path / ".net.zimage-part"
    name = "control_noise_refiner.0.attention.to_qkv.qweight"
    raw = bytearray(left.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]] ^= 1
    left.write_bytes(raw)
    with pytest.warns(UserWarning, match="are damaged"):
        quantize_controlnet(dense_nets["2.1 lite"], tmp_path / "net", **options)
    assert (tmp_path / "net").read_bytes() == (tmp_path / "whole").read_bytes()
