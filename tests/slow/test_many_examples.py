"""The property tests with 2,000 examples of each kind, the same in every run; in two processes, for two cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HALVES = ("number", "not number")


def test_two_thousand_of_each_kind():
    command = [sys.executable, "-m", "pytest", "-q", "tests/unit/test_properties.py", "-k"]
    started = [
        subprocess.Popen(
            [*command, half],
            cwd=ROOT,
            env=os.environ | {"FUZZ_EXAMPLES": "2000", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in HALVES
    ]
    said = [process.communicate()[0][-5000:] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
