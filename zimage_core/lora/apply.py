"""LoRAs put beside a model's weights, which stay as they are.

`apply` makes the adapters of a model exactly a list of (Lora, strength), all or nothing; the empty list leaves it
bit-identical to never having had any. What each change costs at run time is in `linear.adapters`.

Legend: N out, K in, r rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..linear.adapters import Adapted, Carrier, Linear, Rows, Terms
from ..models.text_encoder import TextEncoder
from .deltas import OFT, Bias, Delta, Diff, LoKr, span
from .read import REMEDY, Lora

EPSILON = torch.finfo(torch.float32).eps
MAX_STRENGTH = 100
RANK_MULTIPLE = 16  # kernels take low-rank branches in such steps; zeros fill up

logger = logging.getLogger(__name__)


def check(lora: Lora, model: Adapted) -> dict[str, tuple[Delta, ...]]:
    """The changes that the model has modules for, each of which fits. ValueError names what does not.

    The encoder's last layers, which Z-Image does not run, may be in the file."""
    found = {}
    for target, deltas in lora.deltas(model).items():
        module = _module(model, target)
        if module is None:
            if isinstance(model, TextEncoder) and int(target.split(".")[1]) >= len(model.layers):
                continue
            raise ValueError(
                f"{lora.name}: {deltas[0].key}: expected a model with {target}, found none; {REMEDY} of this size"
            )
        for delta in deltas:
            _check_fit(lora.name, delta, target, module)
        found[target] = tuple(deltas)
    return found


def _check_fit(name: str, delta: Delta, target: str, module: nn.Module) -> None:
    if not isinstance(module, Carrier):
        parameter = getattr(module, target if target.endswith("_token") else "weight", None)
        if not isinstance(delta, Diff) or parameter is None or delta.tensors["diff"].numel() != parameter.numel():
            wanted = "a diff" if parameter is None else f"a diff of {parameter.numel()} numbers"
            raise ValueError(f"{name}: {delta.key}: expected {wanted}, found {_words(delta)}; {REMEDY}")
        return
    start, stop = span(delta, target, module.out_features)
    expected = (stop - start, module.in_features)
    if any(size not in (None, wanted) for size, wanted in zip(delta.size(), expected)) or (
        isinstance(delta, Diff) and delta.tensors["diff"].ndim != 2
    ):
        raise ValueError(
            f"{name}: {delta.key}: expected a change of {expected}, found {_words(delta)}; "
            f"this LoRA is for another model, {REMEDY}"
        )
    sizes = {expected[0], expected[1]}
    if delta.magnitude is not None and delta.magnitude.numel() not in sizes:
        raise ValueError(
            f"{name}: {delta.key}: expected a DoRA magnitude of {expected[0]} or {expected[1]} numbers, found "
            f"{tuple(delta.magnitude.shape)}; {REMEDY}"
        )


def _words(delta: Delta) -> str:
    shape = delta.tensors["diff"].shape if isinstance(delta, Diff) else delta.size()
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


@torch.no_grad()
def apply(model: Adapted, loras: Iterable[tuple[Lora, float]]) -> None:
    """Make a transformer's or text encoder's adapters exactly these LoRAs at these strengths.

    Modules whose changes stay the same are left alone. Where something changes, `model.adapter_version` grows: what was
    prepared before (`Conditioning`, caption features) is out of date. ValueError, with nothing changed, for a LoRA
    that does not fit or a strength that is no number; after any other failure no adapter is left.
    """
    wanted = tuple((lora, float(strength)) for lora, strength in loras if strength != 0)
    if wanted == model.adapters:
        return
    plan: dict[str, list[tuple[Delta, float]]] = {}
    for lora, strength in wanted:
        if not abs(strength) <= MAX_STRENGTH:
            raise ValueError(f"{lora.name}: expected a strength of up to {MAX_STRENGTH} either way, found {strength}")
        found = check(lora, model)
        for target in lora.deltas(model).keys() - found.keys():
            logger.warning("%s: %s: ignored, Z-Image does not run this layer of the text encoder", lora.name, target)
        for target, deltas in found.items():
            plan.setdefault(target, []).extend((delta, strength) for delta in deltas)
    old = model.adapter_plan
    changed = [target for target in {**old, **plan} if old.get(target) != plan.get(target)]
    done = False
    try:
        for target in changed:
            _set(model, target, plan.get(target, []))
        done = True
    finally:
        if not done:
            for target in {**old, **plan}:
                _set(model, target, [])
        model.adapters, model.adapter_plan = (wanted, plan) if done else ((), {})
        model.adapter_version += bool(changed)


def _module(model: Adapted, target: str) -> nn.Module | None:
    """The module that holds a target, None where the model has none; pad tokens are the model's own."""
    try:
        return model if target.endswith("_token") else model.get_submodule(target)
    except AttributeError:
        return None


def _set(model: Adapted, target: str, deltas: list[tuple[Delta, float]]) -> None:
    """Give one module, which the model has, these changes and no others."""
    module, leaf = _module(model, target), target if target.endswith("_token") else "weight"
    if isinstance(module, Carrier):
        module.set_adapter(compose(deltas, module, target, _dtype(model)) if deltas else None)
        return
    assert module is not None
    own = f"own_{leaf}"  # what the file holds, while the parameter is the sum
    parameter = module.get_parameter(leaf)
    if (kept := module._buffers.pop(own, None)) is not None:
        parameter = nn.Parameter(kept, requires_grad=False)
        module._parameters[leaf] = parameter
    if deltas:
        total: Tensor = parameter.float()
        for delta, strength in deltas:
            total = total + strength * delta.get("diff", parameter.device).view_as(parameter)
        module.register_buffer(own, parameter.detach(), persistent=False)
        module._parameters[leaf] = nn.Parameter(total.to(parameter.dtype), requires_grad=False)


def unadapted(module: nn.Module, leaf: str) -> Tensor:
    """A tensor of a dense module as its file holds it, without what `apply` has summed into it."""
    own = module._buffers.get(f"own_{leaf}")
    return module.get_parameter(leaf) if own is None else own


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def compose(deltas: list[tuple[Delta, float]], linear: Carrier, target: str, dtype: torch.dtype) -> Terms:
    """The terms of several changes of one linear, on its device: pairs concatenated, dense ones summed."""
    device = _device(linear)
    n, k = linear.out_features, linear.in_features
    terms = Terms()
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    dense: dict[Rows, Tensor] = {}
    bias = None
    for delta, strength in deltas:
        rows = start, stop = span(delta, target, n)
        if isinstance(delta, Bias):
            bias = torch.zeros(n, device=device) if bias is None else bias
            bias[start:stop] += strength * delta.get("diff_b", device)
            continue
        if isinstance(delta, OFT):
            terms.outputs.append((rows, (strength * delta.blocks(device)).to(dtype)))
            continue
        gain, on_output = None, False
        if delta.magnitude is not None:
            gain, on_output = dora_gain(delta, delta.magnitude, linear, rows)
            (terms.outputs if on_output else terms.inputs).append((rows, (strength * (gain - 1)).to(dtype)))
            gain = gain[:, None] if on_output else gain
        if pair := delta.pair(device):
            down, up = pair
            if gain is not None:
                down, up = (down, up * gain) if on_output else (down * gain, up)
            wide = up.new_zeros(n, up.shape[1])
            wide[start:stop] = strength * up
            downs.append(down.to(dtype))
            ups.append(wide.to(dtype))
        elif isinstance(delta, LoKr) and gain is None:
            w1, up, inner = delta.factors(device)
            inner = None if inner is None else inner.to(dtype)
            terms.krons.append((rows, (strength * w1).to(dtype), up.to(dtype), inner))
        else:
            change = strength * delta.matrix(device) * (1 if gain is None else gain)
            dense[rows] = dense[rows] + change if rows in dense else change
    if downs:
        rank = sum(map(len, downs))
        if spare := -rank % RANK_MULTIPLE:
            downs.append(downs[0].new_zeros(spare, k))
            ups.append(ups[0].new_zeros(n, spare))
        terms.down, terms.up = torch.cat(downs), torch.cat(ups, 1)
    terms.dense = [(rows, change.to(dtype)) for rows, change in dense.items()]
    terms.bias = None if bias is None else bias.to(dtype)
    return terms


def merged(tensor: Tensor, target: str, leaf: str, changes: list[tuple[Delta, float]]) -> Tensor:
    """A dense module's tensor with the changes of the module added, in fp32; biases take those of biases alone."""
    tensor, device = tensor.float(), tensor.device
    shifts = [(delta, strength) for delta, strength in changes if isinstance(delta, Bias)]
    if leaf == "bias":
        return tensor + sum(strength * delta.get("diff_b", device) for delta, strength in shifts)
    if tensor.ndim == 1 or leaf != "weight":
        return tensor + sum(s * delta.get("diff", device).view_as(tensor) for delta, s in changes)
    linear = Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    terms = compose([change for change in changes if change not in shifts], linear, target, torch.float32)
    if terms.pair and not (terms.dense or terms.krons):
        down, up = terms.pair
        return torch.addmm(tensor, up, down)
    linear.set_adapter(terms)  # applied to the identity, it gives the weight
    return torch.cat([linear(rows) for rows in torch.eye(tensor.shape[1], device=device).split(1024)]).T


def dora_gain(delta: Delta, magnitude: Tensor, linear: Carrier, rows: Rows) -> tuple[Tensor, bool]:
    """m / |W + D| in fp32 for DoRA's magnitude m, and whether it scales the output (N,) or the input (K,).

    Needs the dense weight once for each linear; kept from then on, as it does not depend on the strength."""
    on_output = magnitude.shape != (1, linear.in_features) and magnitude.numel() == rows[1] - rows[0]
    kept = delta.gains.get(linear)
    if kept is None:
        weight = linear.dense_weight()[rows[0] : rows[1]]
        merged = weight + delta.matrix(weight.device)
        norm = merged.norm(dim=1 if on_output else 0).clamp_min(EPSILON)
        kept = magnitude.to(weight.device).float().flatten() / norm
        delta.gains[linear] = kept
    return kept.to(_device(linear)), on_output


def _device(linear: Carrier) -> torch.device:
    return next(t.device for t in (*linear.parameters(), *linear.buffers()))
