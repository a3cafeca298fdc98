"""The fused kernels against plain torch, on a GPU or in Triton's interpreter, and compiled for every GPU generation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def check_kernels(device: str):
    """Each kernel against `ops` in fp32, on rounded 16-bit inputs; on the CPU under TRITON_INTERPRET=1."""
    from zimage_core.linear.backends import fused
    from zimage_core.models import ops

    gen = torch.Generator().manual_seed(0)

    def random(*shape, dtype, scale=1.0):
        return (torch.randn(*shape, generator=gen) * scale).to(device, dtype)

    for dtype, stream in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        rounding = torch.finfo(dtype).eps

        def check(found, expected, what, rounding=rounding):
            error = (found.double() - expected.double()).norm() / expected.double().norm()
            assert error <= rounding, f"{what}: {error:.2e} over the {rounding:.0e} of one rounding"

        for width, batch, modulations in ((384, 2, 2), (3840, 1, 1), (256, 3, 1)):
            x, h = random(batch, 3, width, dtype=stream), random(batch, 3, width, dtype=dtype, scale=3)
            weight = random(width, dtype=dtype)
            scale = random(modulations, 1, 4 * width, dtype=dtype).chunk(4, -1)[1]
            wide = [y.float() for y in (x, h, weight, scale)]
            out = fused.norm_scale(x, weight, 1e-5, scale)
            assert out.dtype == dtype
            check(out, ops.norm_scale(wide[0], wide[2], 1e-5, wide[3]), "norm_scale")
            check(fused.norm_scale(x, weight, 1e-5, None), ops.norm_scale(wide[0], wide[2], 1e-5, None), "norm")
            out = fused.norm_gate_add(x, h, weight, 1e-5, scale)
            assert out.dtype == stream
            check(out, ops.norm_gate_add(wide[0], wide[1], wide[2], 1e-5, wide[3]), "norm_gate_add")
            out = fused.norm_gate_add(x, h, weight, 1e-5, None)
            check(out, ops.norm_gate_add(wide[0], wide[1], wide[2], 1e-5, None), "norm_add")
            both = fused.add_norm_scale(x, h, weight, weight + 1, 1e-5, scale, scale)
            expected = ops.add_norm_scale(*wide[:3], wide[2] + 1, 1e-5, wide[3], wide[3])
            assert [y.dtype for y in both] == [stream, dtype]
            check(both[0], expected[0], "add_norm_scale, x")
            check(both[1], ops.norm_scale(both[0].float(), wide[2] + 1, 1e-5, wide[3]), "add_norm_scale")
            check(fused.swiglu(h), ops.swiglu(h.float()), "swiglu")
            for name, *given in (
                ("norm_scale", x, weight, 1e-5, scale),
                ("add_norm_scale", x, h, weight, weight, 1e-5, None, scale),
                ("swiglu", h),
            ):  # in rows with columns behind them
                plain, wide = getattr(fused, name)(*given), getattr(fused, name)(*given, columns=32)
                plain, wide = (made[1] if isinstance(made, tuple) else made for made in (plain, wide))
                assert wide.shape[-1] == plain.shape[-1] + 32 and torch.equal(wide[..., :-32], plain), name
        for batch, angles, heads, width in ((1, 1, 3, 128), (2, 2, 6, 64), (2, 1, 6, 64)):
            qkv = random(batch, 5, 3, heads, width, dtype=dtype)
            norms = random(width, dtype=dtype), random(width, dtype=dtype)
            angle = random(angles, 5, 1, width // 2, dtype=torch.float32)
            expected = ops.norm_rope(qkv.float(), *(n.float() for n in norms), 1e-5, angle.cos(), angle.sin())
            found = fused.norm_rope(qkv, *norms, 1e-5, angle.cos(), angle.sin())
            for name, a, b in zip("qkv", found, expected, strict=True):
                check(a, b, name)

    big = torch.full((1, 1, 256), 300.0, dtype=torch.float16, device=device)
    assert fused.swiglu(torch.cat((big, big), -1)).isfinite().all()
    qkv = random(1, 5, 3, 2, 64, dtype=torch.float16)
    qkv[0, 0, :, 0, 0] = torch.inf
    angle = torch.zeros(1, 5, 1, 32, device=device)
    plain = ops.norm_rope(qkv, *[big[0, 0, :64] / 300] * 2, 1e-5, angle.cos(), angle.sin())
    for a, b in zip(fused.norm_rope(qkv.clone(), *[big[0, 0, :64] / 300] * 2, 1e-5, angle.cos(), angle.sin()), plain):
        assert a.isfinite().all() and torch.allclose(a, b, rtol=2e-3, atol=2e-3)
    assert fused.norm_gate_add(big, big / 0.0, big[0, 0], 1e-5, None).isfinite().all()


def test_kernels_equal_torch():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['check_kernels'](sys.argv[2])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-c", code, __file__, device]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("gpu", [75, 80, 90, 120, "gfx1100", "gfx1201", "gfx942"])
def test_kernels_compile(gpu):
    """Ahead of time, without a GPU: what Triton or an assembler refuses for a generation fails here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zimage_core.linear.backends import fused

    amd, old = isinstance(gpu, str), gpu == 75
    target = GPUTarget("hip", gpu, 64 if gpu == "gfx942" else 32) if amd else GPUTarget("cuda", gpu, 32)
    half, stream = ("*fp16", "*fp32") if old else ("*bf16", "*bf16")
    row = {"tokens": "i32", "width": "i32", "out_stride": "i32", "eps": "fp32"}
    kernels = (
        (fused._norm_scale, {"x": stream, "weight": half, "scale": half, "out": half, "scale_stride": "i32", **row},
         {"SCALED": True, "BLOCK": 4096, **dict.fromkeys(("smooth", "codes", "row_scale", "code_stride", "LIMIT"))}),
        (fused._norm_gate_add,
         {"x": stream, "h": half, "weight": half, "gate": half, "out": stream, "gate_stride": "i32", **row},
         {"GATED": True, "SATURATE": old, "BLOCK": 4096}),
        (fused._add_norm_scale,
         {"x": stream, "h": half, "weight": half, "gate": half, "total": stream, "next_weight": half, "scale": half,
          "out": half, "gate_stride": "i32", "scale_stride": "i32", **row},
         {"GATED": True, "SATURATE": old, "SCALED": True, "BLOCK": 4096,
          **dict.fromkeys(("smooth", "codes", "row_scale", "code_stride", "LIMIT"))}),
        (fused._norm_rope,
         {"qkv": half, "norm_q": half, "norm_k": half, "cos": "*fp32", "sin": "*fp32", "tokens": "i32",
          "angle_tokens": "i32", "heads": "i32", "eps": "fp32"}, {"SATURATE": old, "BLOCK_H": 32, "K": 128}),
        (fused._swiglu, {"x": half, "out": half, "width": "i32", "out_stride": "i32"},
         {"SATURATE": old, "BLOCK": 2048}),
    )  # fmt: skip
    for kernel, types, constants in kernels:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=target)
        assert "spill" not in compiled.asm and compiled.asm["hsaco" if amd else "cubin"]
