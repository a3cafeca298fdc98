"""The Triton kernels against plain torch, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def test_kernels_compute_what_the_reference_does():
    """triton_kernels_check.py: on the GPU, or where there is none in the interpreter."""
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/triton_kernels_check.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_checks_for_older_cards_hold_in_the_interpreter():
    """benchmarks/ptx_forward.py without its GPU: small, in fp16, which the interpreter rounds rightly."""
    command = [sys.executable, "benchmarks/ptx_forward.py", "75", "--device", "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("True") == 16, done.stdout + done.stderr[-2000:]
