"""The counter of live storages on the meta device: what it sees, what it leaves out, repeats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zimage_core.memory.meta import META, allocated, on_meta, peak_bytes
from zimage_core.memory.placement import slots

MIB = 2**20


def made(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=META)


def test_what_is_alive_at_once_counts():
    def run(live):
        first = made(1000)
        first = first + 1  # beside the other: 2000
        del first
        made(1500)

    assert peak_bytes(run) == 2000


def test_views_and_what_was_there_before_do_not_count():
    weight = torch.empty(100, 100, device=META)

    def run(live):
        x = torch.empty(7, 100, device=META)
        x.add_(1)
        return x @ weight.T[:50].T

    assert peak_bytes(run) == 4 * (7 * 100 + 7 * 50)
    assert peak_bytes(lambda live: torch.empty(1000)) == 0, "on the host"


def test_attention_makes_no_matrix_of_all_pairs():
    q, k, v = (torch.empty(2, 8, 1000, 64, device=META, dtype=torch.bfloat16) for _ in range(3))
    taken = peak_bytes(lambda live: F.scaled_dot_product_attention(q, k, v))
    assert taken == 2 * 8 * 1000 * (64 * 2 + 4)


def test_the_allocators_rounding():
    """Segments of 2 MiB from 10 MiB on, of which no more than 1 MiB is left unsplit."""
    assert allocated(10 * MIB - 1) == 10 * MIB - 1
    assert allocated(10 * MIB) == 10 * MIB
    assert allocated(11 * MIB) == 12 * MIB
    assert allocated(11 * MIB - 1) == 11 * MIB - 1


class Doubling(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return (x + x) * 2 + self.weight


def test_a_repeated_block_runs_once_and_takes_the_same():
    """Also where more is alive around the repeat; another shape or form is run."""
    blocks = [Doubling(1000).to(META) for _ in range(3)]

    def run(live, once):
        kept, x = [], torch.empty(1000, device=META)
        for i, block in enumerate(blocks):
            x = live.run_block("layers", i, block, x) if once else block(x)
            kept.append(x)

    plain = peak_bytes(lambda live: run(live, once=False))
    assert [block.runs for block in blocks] == [1, 1, 1]
    assert peak_bytes(lambda live: run(live, once=True)) == plain
    assert [block.runs for block in blocks] == [2, 1, 1]

    def others(live):
        live.run_block("layers", 0, blocks[0], torch.empty(1000, device=META))
        live.run_block("layers", 1, blocks[1], torch.empty(5, 1000, device=META))
        live.run_block("layers", 2, Doubling(1).to(META), torch.empty(1000, device=META))

    peak_bytes(others)
    assert [block.runs for block in blocks] == [3, 2, 1]


def test_a_copy_on_the_meta_device_leaves_the_module_alone_and_is_not_counted():
    module = nn.Sequential(Doubling(8), nn.BatchNorm1d(8))
    twin = on_meta(module)
    assert {tensor.device.type for _, _, tensor in slots(twin)} == {"meta"}
    assert {tensor.device.type for _, _, tensor in slots(module)} == {"cpu"}
    assert isinstance(twin[0].weight, nn.Parameter) and not isinstance(twin[1].running_mean, nn.Parameter)
    assert peak_bytes(lambda live: on_meta(module)) == 0
