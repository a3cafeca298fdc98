"""Devices other than CUDA: which is chosen, and what runs on them uses no dtype that they lack.

No such device is at hand: the same code runs on the CPU, where a dispatch mode refuses the dtypes.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zimage_core import load_pipeline
from zimage_core.demo import demo_files
from zimage_core.device import choose_device, choose_dtype
from zimage_core.formats import stored
from zimage_core.formats.encoder import load_text_encoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.models.vae import Decoder
from zimage_core.quantize.run import quantize_checkpoint

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MPS = torch.device("mps")


class Without(TorchDispatchMode):
    """Refuses tensors of some dtypes, as a device does that lacks them."""

    def __init__(self, *dtypes: torch.dtype):
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in self.dtypes:
                raise TypeError(f"{func}: {tensor.dtype}")
        return result


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_a_device_is_chosen_where_it_is_there(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: kind == "xpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
    assert choose_device(None) == choose_device(kind) == torch.device(kind)
    with pytest.raises(ValueError, match="is not there: torch .* sees none; use cpu"):
        choose_device("mps" if kind == "xpu" else "xpu")


@pytest.mark.parametrize(("macos", "dtype"), [(13, torch.float16), (14, torch.bfloat16)])
def test_a_mac_gets_bf16_from_macos_14_on(macos, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor))
    assert choose_dtype(None, MPS) == dtype
    assert choose_dtype(None, torch.device("xpu")) == torch.bfloat16


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_numbers_come_from_a_table_where_there_is_no_such_dtype(dtype, monkeypatch):
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    form, scale = str(dtype).removeprefix("torch."), torch.rand(4, 1)
    expected = stored.dequantize(form, {"codes": codes, "scale": scale})
    monkeypatch.setattr(stored, "WITHOUT_FP8", ("cpu",))
    found = stored.dequantize(form, {"codes": codes, "scale": scale})
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) and torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_picture_needs_neither_float64_nor_fp8_on_the_device(dtype, monkeypatch):
    """The encoder's forward, the steps and the VAE. In fp16 the steps use no bf16 either."""
    pipeline = load_pipeline(**demo_files(), device="cpu", dtype=dtype)
    seen = set()

    def guarded(cls, method):
        plain = getattr(cls, method)
        bf16 = (torch.bfloat16,) if cls is ZImageTransformer and dtype is torch.float16 else ()

        def run(self, *args, **kwargs):
            seen.add(cls.__name__)
            with Without(torch.float64, *FP8, *bf16):
                return plain(self, *args, **kwargs)

        monkeypatch.setattr(cls, method, run)

    for cls in (TextEncoder, ZImageTransformer, Decoder):
        guarded(cls, "forward")
    (picture,) = pipeline("a red circle", 64, 64, num_inference_steps=2, generator=0)
    assert seen == {"TextEncoder", "ZImageTransformer", "Decoder"} and picture.size == (64, 64)


def test_an_fp8_text_encoder_needs_no_fp8_dtype_on_the_device(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    folder = demo_files()["text_encoder"]
    (file,) = folder.glob("*.safetensors")
    tensors = {}
    for name, tensor in load_file(file).items():
        linear = ".layers." in name and tensor.ndim == 2
        scale = tensor.float().abs().max() / 448
        tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn) if linear else tensor
        if linear:
            tensors[name.removesuffix("weight") + "scale_weight"] = scale
    save_file({**tensors, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    encoder = load_text_encoder(tmp_path / "fp8.safetensors", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        expected = encoder(ids)
        monkeypatch.setattr(stored, "WITHOUT_FP8", ("cpu",))
        assert torch.equal(encoder(ids), expected)


def test_quantizing_says_that_it_needs_float64(tmp_path):
    with pytest.raises(ValueError, match="device mps: expected one with float64"):
        quantize_checkpoint(demo_files()["model"], tmp_path / "q", rank=16, device="mps")
