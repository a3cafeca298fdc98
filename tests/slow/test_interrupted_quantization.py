"""Calibrated quantization that is interrupted, killed, or runs out of disk, and goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from dense_files import digest
from safetensors.torch import save_file

from zimage_core.quantize import run as quantize
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
