"""A stand-in for generating pictures, and a batch with it in a process that a test can kill.

python standin.py ROWS OUT SECONDS     a run; each picture takes so long
"""

from __future__ import annotations

import hashlib
import sys
import time


class StandIn:
    """Bytes that depend on the row alone; rows whose prompt begins with "fail" fail."""

    def __init__(self, seconds: float = 0.0, together: int = 1):
        self.seconds = seconds
        self.size = together
        self.generated: list[str] = []
        self.prepared: list[int] = []

    def facts(self):
        return {"model": "stand-in"}

    def made_with(self):
        return {"device": "none"}

    def plan(self):
        return "a stand-in"

    def group(self, row):
        return row.settings["width"]

    def together(self, row):
        return self.size

    def prepare(self, rows):
        self.prepared.append(len(rows))

    def generate(self, rows):
        time.sleep(self.seconds)
        for row in rows:
            if row.settings["prompt"].startswith("fail"):
                raise ValueError(f"{row.id}: asked to fail")
        self.generated += [row.id for row in rows]
        return [b"\x89PNG" + hashlib.sha512(repr(sorted(row.settings.items())).encode()).digest() * 9 for row in rows]

    def close(self):
        pass


if __name__ == "__main__":
    from zimage_core import batch

    for _ in batch.run(sys.argv[1], sys.argv[2].removeprefix("--out="), generator=StandIn(*map(float, sys.argv[3:]))):
        pass
