"""The Triton kernels compile for every GPU generation that the backend takes. tests/slow runs them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB that one block may take


@pytest.mark.parametrize("sm", SHARED)
def test_kernels_compile_for(sm):
    from zimage_core.linear.backends import fused
    from zimage_core.linear.backends import triton as backend
    from zimage_core.linear.backends import triton_kernels as kernels

    half = "*fp16" if sm == 75 else "*bf16"
    byte = "*fp8e4nv" if sm >= 89 else "*i8"
    weight = {"qweight": "*u8", "wscales": half}
    branch = {"smooth_factor": half, "proj_down": half, "proj_up": half}
    for rank in (0, 256) if sm >= 80 else (0,):
        tiles = backend.dequantize_tiles(3840, rank, sm)
        options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
        signature = weight | branch | {"weight": half, "k": "i32", "r": "i32", "stride": "i32"}
        ptx = compiled(kernels.dequantize, sm, signature, tiles, options)
        assert bool(re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)) == (rank > 0)  # on the tensor cores
        assert re.search(r"ld\.global\.v[24]|cp\.async", ptx) and "st.global.v4" in ptx  # 8 bytes or more at a time
    for block_k in (4096, 16384):
        rows = {"x": half, "smooth_factor": half, "codes": byte, "row_scale": "*fp32", "k": "i32"}
        compiled(kernels.quantize_rows, sm, rows, {"LIMIT": 448.0, "BLOCK_K": block_k}, {"num_warps": 16})
    ahead = {"x": "*fp32" if sm == 75 else half, "weight": half, "scale": half, "out": half, "smooth": half}
    ahead |= {
        "codes": byte,
        "row_scale": "*fp32",
        "tokens": "i32",
        "scale_stride": "i32",
        "width": "i32",
        "eps": "fp32",
    }
    tiles = fused._row(3840)
    options = {"num_warps": tiles.pop("num_warps")}
    ptx = compiled(fused._norm_scale, sm, ahead, {"SCALED": True, "LIMIT": 448.0} | tiles, options)
    assert "st.global.v4" in ptx and "st.global.v2" in ptx  # eight activations of two bytes, eight codes of one
    ahead = {"x": half, "out": half, "smooth": half, "codes": byte, "row_scale": "*fp32", "width": "i32"}
    tiles = fused._head_and_tail(10240)
    options = {"num_warps": tiles.pop("num_warps")}
    assert sum(tiles.values()) == 10240
    compiled(fused._swiglu_codes, sm, ahead, {"SATURATE": sm == 75, "LIMIT": 448.0} | tiles, options)
    weight |= {"channel_scale": "*fp32", "weight": byte, "k": "i32"}
    compiled(kernels.requantize, sm, weight, {"TO_CODE": 1.0, "BLOCK_N": 32, "BLOCK_C": 128}, {})
    rescale = {"products": "*i32", "row_scale": "*fp32", "channel_scale": "*fp32", "y": half, "n": "i32"}
    compiled(kernels.rescale_add, sm, rescale, {"TO_CODE": 448 / 127, "BLOCK": 1024}, {})


def compiled(kernel, sm: int, arguments: dict[str, str], constants: dict, options: dict) -> str:
    """The PTX of a kernel, pointers and sizes divisible by 16; its shared memory and registers suffice."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [*arguments, *constants]
    source = ASTSource(
        fn=kernel,
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(arguments))},
    )
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    assert built.metadata.shared <= SHARED[sm] * 1024
    assert stack_bytes(built.asm["cubin"]) <= 128  # more means registers spilled in the inner loop
    return built.asm["ptx"]


def stack_bytes(cubin: bytes) -> int:
    """Bytes of registers spilled per thread, as the cuobjdump beside triton's ptxas tells; 0 where there is none."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return 0
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"zimage-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    path.unlink()
    return int(re.search(r"STACK:(\d+)", text).group(1))
