"""torch.compile: blocks of one kind and shape are compiled once, whatever the backend of their linears."""

from __future__ import annotations

import pytest
import torch

from zimage_core.demo import demo_files
from zimage_core.formats.load import load_transformer
from zimage_core.memory.offload import BlockStreamer
from zimage_core.models.transformer import Hooks, ZImageTransformer


@pytest.fixture
def model() -> ZImageTransformer:
    torch.manual_seed(0)
    return load_transformer(demo_files()["model"], dtype=torch.float32, backend="reference", precision="w4a16")


@pytest.fixture
def graphs(monkeypatch) -> list[object]:
    """What dynamo compiled; every graph break is an error."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    return []


def test_blocks_are_compiled_once_for_each_kind_and_shape(model, graphs):
    """The context refiner knows no t; the noise refiner has no captions."""
    streamer = BlockStreamer(model.blocks, model)
    streamer.place("cpu", 1e12)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(streamer.run_block, backend=backend, fullgraph=True)
    latents, t, feats = torch.randn(1, 16, 8, 8), torch.tensor([0.4]), torch.randn(20, model.config.cap_feat_dim)
    found = []
    for hooks in (Hooks(), Hooks(run_block=compiled)):
        with torch.no_grad():
            cond = model.prepare([feats], 64, 64, hooks)
            found.append([model(latents * strength, t, cond, hooks) for strength in (1, 2)])
    assert len(model.blocks) == 7 and len(graphs) == 3
    assert all(torch.equal(a, b) for a, b in zip(*found))
