"""The property tests with 2,000 examples of each kind, the same in every run; two processes at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES, CALLS = "tests/unit/test_properties.py", "tests/unit/test_property_calls.py"
KINDS = ("number", "header", "not number and not header")  # about as long each
PARTS = [*([FILES, "-k", kind] for kind in KINDS), [CALLS]]


def run(part: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FUZZ_EXAMPLES": "2000", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", *part]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_two_thousand_of_each_kind():
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, PARTS))
    assert [process.returncode for process in done] == [0] * len(PARTS), "\n".join(p.stdout[-5000:] for p in done)
