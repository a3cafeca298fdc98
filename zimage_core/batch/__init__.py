"""Many prompts: rows from a file to pictures in a folder, on one GPU, all of them, a cluster, or ComfyUI.

What holds at every moment, whoever is killed:

1. A picture depends on its row, the model files and the arithmetic (backend, precision, dtype) only: not on other
   rows, their order, the worker or what was done before. A batch's pictures differ from single ones by rounding;
   `exact` generates them one by one.
2. What lies under a result's name is whole. A line of the manifest comes after its picture, so every line has one.
3. A row is done if the manifest has its id with its key, a hash of all that the picture depends on, and the file is
   there in its size. An edited row has another key. Before its picture is replaced, the old line is taken back.
4. Running again does what is missing or has failed and nothing else. Manifest and journals only gain lines between
   their merges, and a merge can be cut off anywhere and done again.
5. Rows are never held in memory, only 64-bit digests of them.

`columns` and `rows` read, `store` and `sink` keep, `work` is one worker, `pictures` its pipeline, `processes` and
`cluster` many workers, `comfyui` another engine, `driver` puts them together. May import pipeline and below.
"""

from __future__ import annotations

import importlib

_HOME = {"run": "driver", "Run": "driver", "Sink": "sink", "Result": "work", "PictureColumns": "columns"}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
