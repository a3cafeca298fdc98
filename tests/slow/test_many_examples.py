"""The property tests with 2,000 examples of each kind, the same in every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_thousand_of_each_kind():
    command = [sys.executable, "-m", "pytest", "-q", "tests/unit/test_properties.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"FUZZ_EXAMPLES": "2000"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
