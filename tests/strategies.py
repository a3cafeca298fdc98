"""What the property tests share: how many examples, values of every kind, changed bytes.

FUZZ_EXAMPLES is how many of each kind: `tests/slow` has 2,000, `benchmarks/fuzz.py` as many as asked for, which are
others in each run (FUZZ_RANDOM).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_RANDOM" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
third = settings(many, max_examples=EXAMPLES // 3 + 1)  # of what is tried on three parts, with a picture each
commands = settings(many, max_examples=max(EXAMPLES // 5, 50))

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 64, 10**9, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), True]),
)
scalars = st.one_of(st.none(), numbers, st.text(max_size=20))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def changed_bytes(raw: bytes, place: float, data: bytes, cut: bool = False) -> bytes:
    """Other bytes at a place, as a part of all, or the end cut off there."""
    start = int(place * len(raw))
    return raw[:start] if cut else raw[:start] + data + raw[start + len(data) :]


def write_controlnet(path: Path, model: Path, control_tensors) -> Path:
    """A dense ControlNet for a model, one that takes masks; control_tensors is the fixture."""
    from safetensors.torch import save_file

    from zimage_core.formats.identify import model_info
    from zimage_core.models.config import ControlNetConfig

    base = model_info(model).config
    config = {"n_layers": base.n_layers, "axes_dims": base.axes_dims, "control_layers_places": [0]}
    save_file(control_tensors(ControlNetConfig(base, (0,), 33, "hints")), path, {"config": json.dumps(config)})
    return path
