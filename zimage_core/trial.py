"""Whether a way to run linears computes here what plain torch does, found out in a process of its own.

On a card that nobody has tried, a kernel may give wrong numbers, abort its process, poison its CUDA context or hang.
So whatever is compiled first runs a small random linear in a child, whose death is a sentence.

A way is (backend, precision); FUSED stands for the kernels beside the linears, ATTENTION for that in 8 bits, and
"int8" and "fp8" in the place of a precision for products of weights that are stored so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import backends, layout
from .linear.backends import reference
from .linear.svdq import SVDQWeights
from .models import attention, ops

Way = tuple[str, str]
FUSED: Way = ("triton", "fused")
ATTENTION: Way = ("kitchen", "attention")
N, K, RANK = 384, 512, 32
ROWS = (1, 40, 259)  # one after the other
LIMITS = {
    "w4a16": 0.02,
    "w4a8": 0.06,
    "int8": 0.06,
    "fp8": 0.06,
    "fused": 0.02,
    "attention": 0.06,
}  # of a row's or column's relative error; two to four times what
# bf16 and 8-bit codes show
W4A4_LIMIT = 1.2  # times the reference's own error: codes may fall the other way, sums be rounded elsewhere
FP4_W4A4_LIMIT = 0.25  # of which there is no reference
TIME_LIMIT_S = 60.0
CHILD = "import json, sys; sys.path = json.loads(sys.argv[1]); from zimage_core.trial import main; main(*sys.argv[2:])"


class Untried(Exception):
    """No process could be started that uses the device."""


@dataclass(frozen=True)
class Outcome:
    """The largest relative error of a row or column, or why the way is not to be used."""

    error: float | None = None
    refused: str | None = None


def random_weights(
    n: int, k: int, rank: int, device: torch.device, dtype: torch.dtype, fp4: bool = False
) -> SVDQWeights:
    """An INT4 or FP4 linear whose residual and low-rank branch have about equal norms."""
    codes = (torch.randn(n, k, device=device) * 2.6).round_().clamp_(-7, 7).to(torch.int8)
    scales = torch.rand(n, k // (layout.MICRO_GROUP if fp4 else layout.GROUP), device=device) * 0.002 + 0.002
    return SVDQWeights(
        layout.pack_nibbles(codes),
        (scales * 256).to(torch.float8_e4m3fn).view(torch.uint8) if fp4 else scales,
        (torch.randn(k, device=device) * 0.3).exp_(),
        torch.randn(rank, k, device=device) * 0.1,
        torch.randn(n, rank, device=device) * 0.08 / rank**0.5,
        outer_scale=torch.full((n,), 1 / 256, device=device) if fp4 else None,
    ).to(dtype=dtype)


def random_8bit(kind: str, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights stored in "int8" or "fp8" codes (N, K) with scales (N, 1) fp32 that make them about 1 / sqrt(K)."""
    values = torch.randn(n, k, device=device).mul_(30)
    codes = values.round_().clamp_(-127, 127).to(torch.int8) if kind == "int8" else values.to(torch.float8_e4m3fn)
    return codes, torch.rand(n, 1, device=device).add_(0.5).mul_(k**-0.5 / 30)


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row or a column (M, N), in fp32 on the CPU; NaN if there is one."""
    found, expected = found.float().cpu(), expected.float().cpu()
    shares = [(found - expected).norm(dim=d) / expected.norm(dim=d) for d in (0, 1)]
    return torch.cat(shares).max().item()


def check(error: float, limit: float) -> Outcome:
    """The outcome of an error against its limit."""
    if error <= limit:  # not so for NaN
        return Outcome(error)
    return Outcome(error, f"wrong here: expected an error of up to {limit:.3f} on a small input, found {error:.3f}")


@torch.no_grad()
def try_linear(way: Way, device: torch.device, dtype: torch.dtype, fp4: bool = False) -> Outcome:
    """Run a small random linear and compare it with the reference in fp32."""
    name, precision = way
    weights = random_weights(N, K, RANK, torch.device("cpu"), dtype, fp4)
    weights = replace(weights, bias=torch.randn(N).to(dtype))
    x = torch.randn(sum(ROWS), K).to(dtype)
    exact = weights.to(dtype=torch.float32).tensors()
    expected = reference.linear(x.float(), exact, "w4a16")
    if precision == "w4a4" and fp4:
        limit = FP4_W4A4_LIMIT
    elif precision == "w4a4":
        limit = W4A4_LIMIT * worst(reference.linear(x.float(), exact, "w4a4"), expected)
    else:
        limit = LIMITS[precision]
    module = backends.load(name)
    prepared = module.prepare(weights.to(device), precision)
    found = torch.cat([module.linear(part, prepared, precision) for part in x.to(device).split(ROWS)])
    return check(worst(found, expected), limit)


@torch.no_grad()
def try_product(way: Way, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Multiply a small weight that is stored in 8 bits and compare it with the exact product."""
    name, kind = way
    codes, scale = random_8bit(kind, N, K, torch.device("cpu"))
    x, bias = torch.randn(sum(ROWS), K).to(dtype), torch.randn(N).to(dtype)
    given = codes.to(device), scale.flatten().to(device), bias.to(device)
    multiply = backends.load(name).multiply_8bit
    found = torch.cat([multiply(part, *given) for part in x.to(device).split(ROWS)])
    return check(worst(found, F.linear(x.float(), codes.float() * scale, bias.float())), LIMITS[kind])


@torch.no_grad()
def try_dense(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Dequantize small weights of two stored forms and compare them with plain torch, bit by bit."""
    codes, scale = random_8bit("int8", 3, K, torch.device("cpu"))
    halves = torch.rand(3, K // 32, 1).half()
    blocks = torch.cat((halves.view(torch.int8), codes.unflatten(1, (-1, 32))), -1)
    expected = {
        "int8": ({"codes": codes, "scale": scale}, codes * scale),
        "Q8_0": ({"codes": blocks.flatten(1).view(torch.uint8)}, (blocks[..., 2:] * halves.float()).flatten(1)),
    }
    for form, (parts, weight) in expected.items():
        found = torch.empty(3, K, device=device, dtype=dtype)
        backends.load("dense").dequantize(form, {part: tensor.to(device) for part, tensor in parts.items()}, found)
        if not torch.equal(found.cpu(), weight.to(dtype)):
            return Outcome(refused=f"wrong here: weights stored as {form} are dequantized to others")
    return Outcome()


@torch.no_grad()
def try_fused(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Run the kernels between the linears and compare them with plain torch, 8-bit codes with their rows."""
    batch, tokens, heads, head_dim = 2, 37, 4, 128
    width = heads * head_dim
    fused = backends.load("fused")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, h, gate, weight = (
        random(batch, tokens, width),
        random(batch, tokens, width),
        random(batch, 1, width),
        random(width),
    )
    angles = torch.randn(1, tokens, 1, head_dim // 2)
    smooth = (torch.randn(width) * 0.3).exp_().to(dtype)
    norms = random(head_dim), random(head_dim)
    calls = {
        "norm_scale": (x, weight, 1e-5, gate),
        "norm_gate_add": (x, h, weight, 1e-5, gate),
        "add_norm_scale": (x, h, weight, weight, 1e-5, gate, gate),
        "norm_rope": (random(batch, tokens, 3, heads, head_dim), *norms, 1e-5, angles.cos(), angles.sin()),
        "swiglu": (random(batch, tokens, 2 * width),),
    }
    errors = []
    for name, given in calls.items():
        expected = getattr(ops.TORCH, name)(*(v.float() if isinstance(v, Tensor) else v for v in given))
        given = tuple(v.to(device) if isinstance(v, Tensor) else v for v in given)
        found = getattr(fused, name)(*given)
        pairs = zip(found, expected) if isinstance(expected, tuple) else [(found, expected)]
        errors += [worst(a.flatten(0, 1).flatten(1), b.flatten(0, 1).flatten(1)) for a, b in pairs]
        if name in ("norm_scale", "add_norm_scale", "swiglu"):
            coded = getattr(fused, name)(*given, smooth=smooth.to(device))
            y, codes, scale = coded[1] if name == "add_norm_scale" else coded
            expected = expected[1] if name == "add_norm_scale" else expected
            errors.append(worst(y.flatten(0, 1), expected.flatten(0, 1)))
            plain = y.flatten(0, 1).float()
            restored = codes.float() * scale[:, None] * smooth.to(device).float()
            if not (restored - plain).norm() <= LIMITS["w4a8"] * plain.norm():
                return Outcome(refused=f"wrong here: the 8-bit codes of {name} are not those of its result")
    return check(max(errors, key=lambda error: error if error == error else torch.inf), LIMITS["fused"])


@torch.no_grad()
def try_attention(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Run attention in 8 bits, with and without a mask, and compare it with torch's in fp32."""
    q, k, v = (torch.randn(2, 333, 3, 128).to(dtype) for _ in range(3))
    mask = torch.arange(333)[None, None, None] < torch.tensor([333, 300])[:, None, None, None]
    errors = []
    for given in (None, mask):
        expected = attention.sdpa(q.float(), k.float(), v.float(), given)
        found = attention.int8(q.to(device), k.to(device), v.to(device), None if given is None else given.to(device))
        errors.append(((found.float().cpu() - expected).norm() / expected.norm()).item())
    return check(sum(errors) / 2, LIMITS["attention"])


def main(device: str, dtype: str, weights: str, *ways: str) -> None:
    """What a child does: "ready" once it has the device, then a line of JSON for every way, "backend precision"."""
    torch.manual_seed(0)
    place, kind = torch.device(device), getattr(torch, dtype)
    torch.zeros(1, device=place)
    print(json.dumps("ready"), flush=True)
    for name in ways:
        way = name.split(" ")[0], name.split(" ")[1]
        if way == FUSED:
            dense = try_dense(place, kind)
            outcome = try_fused(place, kind) if dense.refused is None else dense
        elif way[1] in ("int8", "fp8"):
            outcome = try_product(way, place, kind)
        elif way == ATTENTION:
            outcome = try_attention(place, kind)
        else:
            outcome = try_linear(way, place, kind, weights == "FP4")
        print(json.dumps([*way, outcome.error, outcome.refused]), flush=True)


def in_child(
    ways: Sequence[Way],
    device: torch.device,
    dtype: torch.dtype,
    fp4: bool = False,
    *,
    time_limit: float = TIME_LIMIT_S,
) -> dict[Way, Outcome]:
    """The outcome of every way; a child that dies or hangs is the fault of the way that it was at.

    Untried if a child gets no hold of the device."""
    found: dict[Way, Outcome] = {}
    while left := [way for way in ways if way not in found]:
        # In ComfyUI this package has another name, and the path is what ComfyUI made of it.
        path = json.dumps([str(Path(__file__).parents[1]), *sys.path])
        given = [str(device), str(dtype).removeprefix("torch."), "FP4" if fp4 else "INT4", *map(" ".join, left)]
        command = [sys.executable, "-c", CHILD, path, *given]
        try:
            ended = subprocess.run(command, capture_output=True, timeout=time_limit)
            output, last = ended.stdout, ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            why = f"its process ended with code {ended.returncode}{': ' + last if last else ''}"
        except subprocess.TimeoutExpired as error:
            output, why = error.stdout or b"", f"did not answer within {time_limit:.0f} s"
        lines = [json.loads(line) for line in output.splitlines() if line.startswith((b'"ready', b"["))]
        if not lines:
            raise Untried(why)
        found |= {(line[0], line[1]): Outcome(line[2], line[3]) for line in lines[1:]}
        if left[-1] not in found:
            found[next(way for way in left if way not in found)] = Outcome(refused=f"failed here: {why}")
    return found
