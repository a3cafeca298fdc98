"""The codec against golden vectors packed by deepcompressor and unpacked by Wan2GP, in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zimage_core.linear import layout

GOLDEN = sorted((Path(__file__).parent.parent / "data" / "linear").glob("*.safetensors"))


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    return layout.unpack_nibbles(layout.compact_qweight(packed))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_golden_linear_unpacks_and_packs_exactly(path):
    golden = load_file(path)
    cases = {
        "qweight": ("q", unpack_codes, layout.pack_qweight),
        "wscales": ("scale", layout.unpack_wscales, layout.pack_wscales),
        "smooth_factor": ("smooth", layout.unpack_vector, layout.pack_vector),
        "proj_down": ("down", layout.unpack_proj_down, layout.pack_proj_down),
        "proj_up": ("up", layout.unpack_proj_up, layout.pack_proj_up),
        "bias": ("bias", layout.unpack_vector, layout.pack_vector),
    }
    seen = 0
    for stored, (logical, unpack, pack) in cases.items():
        if f"packed.{stored}" not in golden:
            continue
        packed, plain = golden[f"packed.{stored}"], golden[f"logical.{logical}"]
        assert torch.equal(unpack(packed), plain), stored
        assert torch.equal(pack(plain), packed), stored
        assert pack(plain).dtype == packed.dtype
        seen += 1
    assert seen >= 5
    compact = layout.pack_nibbles(golden["logical.q"])
    assert compact.dtype == torch.uint8 and compact.shape == golden["packed.qweight"].shape
    assert torch.equal(layout.unpack_nibbles(compact), golden["logical.q"])
    assert torch.equal(layout.compact_qweight(golden["packed.qweight"]), compact)


def test_golden_vectors_are_there():
    assert len(GOLDEN) == 8


def test_compact_byte_order():
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, 64 + 5], codes[0, 64 + 32 + 5] = -8, 7
    compact = layout.pack_nibbles(codes)
    assert compact[0, 32 + 5] == 0x78
    assert compact.count_nonzero() == 1


def test_views_of_a_larger_tensor_pack_the_same():
    codes = torch.randint(-8, 8, (128, 256), dtype=torch.int8)
    wide = torch.cat([codes, codes], 1)[:, :256].clone()
    assert torch.equal(unpack_codes(layout.pack_qweight(wide)), codes)


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (127, 64)])
def test_a_shape_outside_the_format_is_named(shape):
    with pytest.raises(ValueError, match="qweight: expected"):
        unpack_codes(torch.zeros(shape, dtype=torch.int8))
    with pytest.raises(ValueError, match="found"):
        layout.unpack_proj_up(torch.zeros(24, 16))
