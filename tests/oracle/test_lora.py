"""LoRA formats against the weights that PEFT and LyCORIS themselves merge."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zimage_core.linear.adapters import Linear
from zimage_core.lora import apply as lora
from zimage_core.lora.read import Lora, load_lora

MODULE = "layers.0.feed_forward.w2"
N, K = 48, 96


def scrambled(module: nn.Module) -> nn.Module:
    """No adapter starts at zero."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "org" not in name and "base_layer" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return module


def change(loaded: Lora, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """What our adapter adds to a linear's weight, read off its outputs."""
    linear = Linear(K, N, bias=False)
    linear.weight.data.copy_(weight)
    x = torch.eye(K)
    with torch.no_grad():
        before = linear(x)
        deltas = [(delta, strength) for delta in loaded.transformer[MODULE]]
        linear.set_adapter(lora.compose(deltas, linear, MODULE, torch.float32))
        return (linear(x) - before).T


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0.01
    assert (found - expected).norm() / expected.norm() < 1e-5


class Net(nn.Module):
    """One linear under one of Z-Image's names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        block = nn.Module()
        block.feed_forward = nn.Module()
        block.feed_forward.w2 = nn.Linear(K, N, bias=False)
        self.layers = nn.ModuleList([block])

    @property
    def weight(self) -> torch.Tensor:
        return self.get_submodule(MODULE).weight.detach()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("Lora", {"r": 4, "lora_alpha": 6}),
        ("Lora", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
        ("Lora", {"r": 4, "lora_alpha": 6, "use_dora": True}),
        ("Lora", {"r": 4, "rank_pattern": {"w2": 7}, "alpha_pattern": {"feed_forward.w2": 3}}),
        ("LoHa", {"r": 3, "alpha": 2}),
        ("LoKr", {"r": 2, "alpha": 3}),
        ("LoKr", {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 12}),
        ("LoKr", {"r": 64, "alpha": 32}),
    ],
    ids=str,
)
def test_peft(tmp_path, kind, options):
    peft = pytest.importorskip("peft")
    net = Net()
    before = net.weight.clone()
    config = getattr(peft, f"{kind}Config")(target_modules=["w2"], **options)
    tuned = scrambled(peft.get_peft_model(net, config))
    tuned.save_pretrained(tmp_path)
    found = change(load_lora(tmp_path / "adapter_model.safetensors"), before)
    merged = tuned.merge_and_unload().get_submodule(MODULE).weight.detach()
    assert_close(found, merged - before)


# LyCORIS is asked for its outputs: in 4.1.3 `get_merged_weight` of LoHa and LoKr scales twice, its forward once.
@pytest.mark.parametrize(
    "kind, options",
    [
        ("LoConModule", {"alpha": 2}),
        ("LoConModule", {"alpha": 2, "rs_lora": True}),
        ("LoConModule", {"weight_decompose": True, "wd_on_out": True}),
        ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
        ("LohaModule", {"alpha": 2}),
        ("LohaModule", {"alpha": 2, "weight_decompose": True}),
        ("LokrModule", {"alpha": 2, "factor": 4}),
        ("LokrModule", {"alpha": 2, "factor": 12, "decompose_both": True}),
        ("LokrModule", {"factor": 4, "full_matrix": True}),
        ("LokrModule", {"factor": 4, "unbalanced_factorization": True, "weight_decompose": True}),
        ("DiagOFTModule", {"constraint": 0}),
        ("DiagOFTModule", {"constraint": 1e-3, "rescaled": True}),
    ],
    ids=str,
)
def test_lycoris(tmp_path, kind, options):
    modules = pytest.importorskip("lycoris.modules")
    base = nn.Linear(K, N, bias=False)
    before = base.weight.detach().clone()
    module = scrambled(getattr(modules, kind)(f"lycoris_{MODULE.replace('.', '_')}", base, 1.0, 4, **options))
    state = module.custom_state_dict() or module.state_dict()
    names = [name for name in state if name not in ("scalar", "dtype_tensor")]
    tensors = {f"{module.lora_name}.{name}": state[name].detach().clone().contiguous() for name in names}
    save_file(tensors, tmp_path / "lora.safetensors")
    module.apply_to()
    with torch.no_grad():
        expected = base(torch.eye(K)).T - before
    assert_close(change(load_lora(tmp_path / "lora.safetensors"), before), expected)
