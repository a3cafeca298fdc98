"""A stand-in for nunchaku's engine, whose kernels need a GPU of a few kinds: its two functions through `reference`.

They check what the real ones take; `install` writes the package, `forget` has the next import look for it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

QUANTIZE = """
import torch

def svdq_quantize_w4a4_act_fuse_lora_cuda(input, output=None, oscales=None, lora_down=None,
        lora_act_out=None, smooth=None, fuse_glu=False, fp4=False, pad_size=256):
    rows = -(-len(input) // pad_size) * pad_size
    assert input.is_contiguous() and lora_down.shape[0] == input.shape[1]
    return (input, smooth, fp4), torch.zeros(input.shape[1] // 64, rows), (lora_down, rows)
"""
GEMM = """
from zimage_core.linear.backends import reference
from zimage_core.linear.svdq import SVDQWeights

def svdq_gemm_w4a4_cuda(act, wgt, out=None, ascales=None, wscales=None, lora_act_in=None, lora_up=None,
        bias=None, fp4=False, alpha=1.0, wcscales=None):
    (x, smooth, quantized_fp4), (down, rows) = act, lora_act_in
    assert fp4 is quantized_fp4 is (wcscales is not None) and alpha == 1.0
    assert rows % 256 == 0 and ascales.shape[1] == rows
    assert out.shape == (len(x), len(wgt)) and out.dtype == x.dtype
    packed = dict(qweight=wgt, wscales=wscales, smooth_factor=smooth, proj_down=down, proj_up=lora_up)
    packed |= {} if bias is None else {"bias": bias}
    if fp4:
        assert str(wscales.dtype) == "torch.float8_e4m3fn" and wcscales.dtype == x.dtype
        packed["wcscales"] = wcscales
    precision = "w4a16" if fp4 else "w4a4"
    out.copy_(reference.linear(x, SVDQWeights.from_packed(packed).tensors(), precision))
"""


def install(folder: Path) -> None:
    """The package in a folder that `sys.path` is to name."""
    package = folder / "nunchaku" / "ops"
    package.mkdir(parents=True)
    files = {"../__init__": "", "__init__": "", "quantize": QUANTIZE, "gemm": GEMM}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)


def forget() -> None:
    """Drop an imported nunchaku."""
    for name in [name for name in sys.modules if name.split(".")[0] == "nunchaku"]:
        del sys.modules[name]
