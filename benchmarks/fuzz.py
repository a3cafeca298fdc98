"""The property tests of tests/unit/test_propert*.py with many more examples, other ones in each run.

    python benchmarks/fuzz.py 20000 [-k headers ...]

The first argument is the number of examples of each kind; all else goes to pytest. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    import pytest

    examples, *options = sys.argv[1:] or ["2000"]
    os.environ |= {"FUZZ_EXAMPLES": examples, "FUZZ_RANDOM": "1"}
    os.chdir(ROOT)
    started = time.perf_counter()
    tests = [f"tests/unit/{name}.py" for name in ("test_properties", "test_property_calls")]
    code = pytest.main(["-q", *tests, *options])
    print(json.dumps({"examples": int(examples), "passed": code == 0, "seconds": round(time.perf_counter() - started)}))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
