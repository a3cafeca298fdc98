"""The Triton kernels compile for every GPU generation that the backend takes. tests/slow runs them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
AMD = {"gfx1100": 32, "gfx1201": 32, "gfx942": 64}  # lanes of a wave
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99} | dict.fromkeys(AMD, 64)  # KiB that one block may take


@pytest.mark.parametrize("gpu", SHARED)
def test_kernels_compile_for(gpu):
    from zimage_core.linear.backends import fused
    from zimage_core.linear.backends import triton as backend
    from zimage_core.linear.backends import triton_kernels as kernels

    sm = 80 if gpu in AMD else gpu  # whose tiles and 8-bit type AMD's GPUs get
    half = "*fp16" if sm == 75 else "*bf16"
    byte = "*fp8e4nv" if sm >= 89 else "*i8"
    int4 = {"qweight": "*u8", "wscales": half, "outer_scale": None}
    fp4 = {"qweight": "*u8", "wscales": "*u8", "outer_scale": "*fp32"}
    branch = {"smooth_factor": half, "proj_down": half, "proj_up": half}
    for codes, rank in [(codes, rank) for codes in (int4, fp4) for rank in ((0, 256) if sm >= 80 else (0,))]:
        tiles = backend.dequantize_tiles(3840, rank, sm)
        options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
        signature = codes | branch | {"weight": half, "k": "i32", "r": "i32", "stride": "i32"}
        code = compiled(kernels.dequantize, gpu, signature, tiles, options, fp4=codes is fp4)
        matrix_units = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_wmma|v_mfma"
        assert bool(re.search(matrix_units, code)) == (rank > 0)
        if gpu not in AMD:  # 8 bytes or more at a time
            assert re.search(r"ld\.global\.v[24]|cp\.async", code) and "st.global.v4" in code
    for block_k in (4096, 16384):
        rows = {"x": half, "smooth_factor": half, "codes": byte, "row_scale": "*fp32", "k": "i32", "code_stride": "i32"}
        compiled(kernels.quantize_rows, gpu, rows, {"LIMIT": 448.0, "BLOCK_K": block_k}, {"num_warps": 16})
    ahead = {"x": "*fp32" if sm == 75 else half, "weight": half, "scale": half, "out": half, "smooth": half}
    ahead |= {
        "codes": byte,
        "row_scale": "*fp32",
        "tokens": "i32",
        "scale_stride": "i32",
        "width": "i32",
        "out_stride": "i32",
        "code_stride": "i32",
        "eps": "fp32",
    }
    tiles = dict(fused._row(3840))
    options = {"num_warps": tiles.pop("num_warps")}
    code = compiled(fused._norm_scale, gpu, ahead, {"SCALED": True, "LIMIT": 448.0} | tiles, options)
    if gpu not in AMD:
        assert "st.global.v4" in code and "st.global.v2" in code  # eight activations of two bytes, eight codes of one
    ahead = {"x": half, "out": half, "smooth": half, "codes": byte, "row_scale": "*fp32"}
    ahead |= {"width": "i32", "code_stride": "i32"}
    tiles = dict(fused._head_and_tail(10240))
    options = {"num_warps": tiles.pop("num_warps")}
    assert sum(tiles.values()) == 10240
    compiled(fused._swiglu_codes, gpu, ahead, {"SATURATE": sm == 75, "LIMIT": 448.0} | tiles, options)
    sizes = dict.fromkeys(("k", "stride", "r", "part"), "i32")
    for codes in (int4, fp4):
        up = {"proj_up": None, "rank_scale": None} if byte == "*i8" else {"proj_up": half, "rank_scale": "*fp32"}
        signature = codes | {"channel_scale": "*fp32", "weight": byte} | up | sizes
        tiles = {"TO_CODE": 1.0, "BLOCK_N": 32, "BLOCK_K": 256, "BLOCK_R": backend.PART}
        code = compiled(kernels.requantize, gpu, signature, tiles, {})
        assert gpu in AMD or "f16x2.e4m3x2" not in code, "ptxas of CUDA 12.8 gets that wrong"
    scales = {"row_scale": "*fp32", "channel_scale": "*fp32"}
    if sm == 75:  # where `torch._int_mm` multiplies
        rescale = {"products": "*i32"} | scales | {"y": half, "n": "i32"}
        compiled(kernels.rescale_add, gpu, rescale, {"TO_CODE": 448 / 127, "BLOCK": 1024}, {})
    for rank in (0, 256) if sm >= 80 else ():
        tiles = backend.int8_tiles(3840, rank, sm)
        options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
        branch = dict.fromkeys(("rank", "up", "bias"), half if rank else None)
        sizes = dict.fromkeys(("m", "n", "k", "r"), "i32")
        signature = {"codes": "*i8", "weight": "*i8"} | scales | branch | {"y": half} | sizes
        code = compiled(kernels.multiply_int8, gpu, signature, {"TO_CODE": 448 / 127} | tiles, options)
        assert re.search(r"s32\.s8\.s8|v_wmma_i32\w*iu8|v_mfma_i32\w*i8|tcgen05\.mma.*i8", code), "8-bit matrix units"
    if byte != "*i8":
        branch = {"values": half, "rank_scale": "*fp32", "row_scale": "*fp32", "codes": byte}
        branch |= {"k": "i32", "r": "i32", "part": "i32"}
        code = compiled(kernels.code_branch, gpu, branch, {"BLOCK_R": 512}, {})
        assert gpu in AMD or "f16x2.e4m3x2" not in code, "ptxas of CUDA 12.8 gets that wrong"
        branch = {"x": half, "down": half, "m": "i32"} | {name: branch[name] for name in branch if name != "values"}
        for k in (3840, 192):
            tiles = dict(backend.down_tiles(k, sm))
            options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
            code = compiled(kernels.code_down, gpu, branch, tiles, options)
            assert re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", code) and "f16x2.e4m3x2" not in code


@pytest.mark.parametrize("gpu", SHARED)
def test_kernels_that_dequantize_stored_weights_compile_for(gpu):
    """Each form in the dtype that a model computes in there; rows are written 16 bytes at a time."""
    from zimage_core.linear.backends import dense

    half = "*fp16" if gpu == 75 else "*bf16"
    for form in dense.ROWS:
        rows = {"codes": "*i8" if form == "int8" else "*u8", "scale": None if form == "mxfp8" else "*fp32"}
        rows |= {"block_scale": "*u8" if "fp" in form and "8_" not in form else None, "weight": half, "k": "i32"}
        code = compiled(dense._rows, gpu, rows, {"FORM": form, "TILE": dense.TILE}, {})
        assert gpu in AMD or "st.global.v4" in code
    for form, size in dense.BLOCKS.items():
        blocks = {"codes": "*u8", "weight": half, "groups": "i32"}
        constants = {"BITS": int(form[1]), "KIND": form[3], "SIZE": size, "TILE": dense.TILE // 32}
        compiled(dense._blocks, gpu, blocks, constants, {})


def test_a_compiled_kernel_is_known_by_all_that_it_depends_on_and_takes_addresses(monkeypatch):
    """With a stand-in for what Triton compiles, as there is no GPU: cudaMallocAsync's graphs rest on it."""
    import torch

    from zimage_core.linear.backends import triton_kernels as kernels

    built, ran = [], []

    class Compiled(triton.compiler.CompiledKernel):
        function, packed_metadata, module = "function", "metadata", None

        def __init__(self):
            pass

        def run(self, *given):
            ran.append(given)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: built.append(arguments) or Compiled()

    def launch(x, n, block=64):
        counts = len(built), len(ran)
        kernels.launch(kernel, (2, 3), x, None, n, True, BLOCK=block, num_warps=4)
        return len(built) - counts[0], len(ran) - counts[1]

    kernel = Kernel()
    driver = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(kernels, "DIRECT", True)
    x, other = torch.empty(64), torch.empty(64)
    assert launch(x, 5) == (1, 0) and launch(other, 5) == (0, 1)
    assert ran == [(2, 3, 1, 7, "function", "metadata", None, None, None, other.data_ptr(), None, 5, True, 64)]
    for changed in ((x, 6), (x.half(), 5), (x, 5, 32), (x[1:], 5)):
        assert launch(*changed) == (1, 0) and launch(*changed) == (0, 1)
    assert launch(x.to("meta"), 5) == (0, 0)
    monkeypatch.setattr(kernels, "DIRECT", False)
    assert launch(x, 8) == launch(x, 8) == (1, 0), "Triton before 3.3 takes arguments otherwise"


def compiled(
    kernel, gpu: int | str, arguments: dict[str, str | None], constants: dict, options: dict, fp4=False
) -> str:
    """The assembly of a kernel, pointers and sizes divisible by 16; its shared memory and registers suffice.

    An argument without a type is None. Registers spilled: more than 128 bytes means in the inner loop; the 144 of FP4
    on sm_90 lie behind it (nvdisasm), and so do its 9 registers on gfx1100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: None for name, kind in arguments.items() if kind is None} | constants
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else arguments[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
    target = GPUTarget("hip", gpu, AMD[gpu]) if gpu in AMD else GPUTarget("cuda", gpu, 32)
    built = triton.compile(source, target=target, options=options)
    assert built.metadata.shared <= SHARED[gpu] * 1024
    if gpu in AMD:
        spilled = re.search(r"\.vgpr_spill_count: *(\d+)", built.asm["amdgcn"])
        assert int(spilled.group(1)) <= (9 if fp4 else 0)
        return built.asm["amdgcn"]
    assert stack_bytes(built.asm["cubin"]) <= (144 if fp4 else 128)
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
