"""`zimage verify`: whether a model file, and every way to run it on this machine, is what it should be.

No real file of Z-Image has been at hand when this package was written, so this asks the file itself:

- A linear was made as W * smooth = codes * scales + up @ (down * smooth), the last term the largest singular vectors of
  the left side. So what the codes hold has next to nothing in the directions of `up` and of `down * smooth`, and its
  largest singular value is about the branch's smallest. A tensor that is packed otherwise than we read it, a wrong
  scale or a missing branch breaks one of the three.
- A backend must give what plain torch gives for the inputs that a picture really makes.
- The model must find its own picture again under noise.

Source: SVDQuant, arXiv:2411.05007 section 4.2. Legend: N out, K in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from .bench import every_way
from .formats.identify import model_info
from .formats.safetensors import json_object, open_tensors
from .linear.backends import Quantized
from .linear.svdq import SVDQLinear, SVDQWeights
from .models.transformer import ZImageTransformer
from .pipeline import Pipeline, load_pipeline
from .report import machine

PROMPT = "a large red circle in the top left corner on a blue background"
SEED = 7
POWER_STEPS = 20  # of the power iteration: more than enough for two digits
LARGEST_SHARE = 0.6  # of the codes' part along the branch, 1 for unrelated matrices; 0.1 to 0.2 in our own files
RATIO = (0.7, 1.6)  # largest singular value of the codes' part to the branch's smallest; 0.95 to 1.25 in files seen
ZEROS = (0.02, 0.6)  # share of codes that are 0; 0.14 to 0.26 in our own files
ERRORS = {"w4a16": 0.02, "w4a8": 0.15, "w4a4": 0.4}  # relative error of a linear; twice what outlier-heavy layers show
NOISE = 0.3  # strength of the one step that must find the picture again
LEAST_PSNR = 16.0  # dB of what it finds


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found against what was expected, in words."""

    name: str
    ok: bool
    found: str
    expected: str


@dataclass(frozen=True)
class Report:
    """Facts of the machine and the model, and the checks in the order in which they were made."""

    facts: dict[str, object]
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_json(self) -> dict[str, object]:
        return {**self.facts, "checks": [asdict(check) for check in self.checks], "ok": self.ok}


@dataclass(frozen=True)
class Fingerprint:
    """What shows whether a linear's tensors belong together; see the module's docstring."""

    along_up: float  # the codes' part in the directions of `up`, relative to an unrelated matrix
    along_down: float  # likewise for `down * smooth`
    ratio: float  # largest singular value of the codes' part / smallest of the branch
    zeros: float  # share of codes that are 0
    finite: bool

    def faults(self) -> list[str]:
        """What is out of its range, in words."""
        if not self.finite:
            return ["scales, smoothing or branch: expected finite numbers and no zero smoothing, found others"]
        found = []
        for name, share in (("up", self.along_up), ("down", self.along_down)):
            if share > LARGEST_SHARE:
                found.append(f"codes along proj_{name}: expected at most {LARGEST_SHARE}, found {share:.2f}")
        if not RATIO[0] <= self.ratio <= RATIO[1]:
            found.append(f"scale of codes to branch: expected {RATIO[0]} to {RATIO[1]}, found {self.ratio:.2f}")
        if not ZEROS[0] <= self.zeros <= ZEROS[1]:
            found.append(f"share of zero codes: expected {ZEROS[0]} to {ZEROS[1]}, found {self.zeros:.2f}")
        return found


@torch.no_grad()
def fingerprint(weights: SVDQWeights) -> Fingerprint:
    """How the tensors of one linear relate, in fp32 on their device."""
    smooth, up = weights.smooth_factor.float(), weights.proj_up.float()
    down = weights.proj_down.float() * smooth
    codes = weights.residual()
    finite = all(bool(t.isfinite().all()) for t in (smooth, up, down, codes)) and bool((smooth != 0).all())
    norm = codes.norm()
    if not finite or not norm:
        return Fingerprint(math.inf, math.inf, math.inf, 1.0, finite)
    (left, r_up), (right, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)  # (N, R), (K, R)
    smallest = torch.linalg.svdvals(r_up @ r_down.T)[-1].item()
    return Fingerprint(
        along_up=((left.T @ codes).norm() / norm / math.sqrt(left.shape[1] / left.shape[0])).item(),
        along_down=((codes @ right).norm() / norm / math.sqrt(right.shape[1] / right.shape[0])).item(),
        ratio=largest_singular_value(codes) / smallest if smallest else math.inf,
        zeros=(codes == 0).float().mean().item(),
        finite=True,
    )


def largest_singular_value(matrix: Tensor) -> float:
    """By power iteration from a fixed start."""
    x = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(POWER_STEPS):
        x = matrix.T @ nn.functional.normalize(matrix @ nn.functional.normalize(x, dim=0), dim=0)
    return x.norm().item()


def check_header(path: Path, model: ZImageTransformer) -> Check:
    """What the header says, its metadata against its tensors. Loading has compared every name, dtype and shape."""
    info = model_info(path)
    tensors = len(open_tensors(path).tensors)
    found = f"{info.format}, {len(model.blocks)} blocks, {tensors} tensors"
    if not info.rank:
        return Check("header", True, found, "a Z-Image transformer")
    said = json_object(info.metadata.get("quantization_config") or "{}")
    if said is None:
        return Check("header", False, "metadata quantization_config that is no JSON object", "a JSON object")
    rank, dense_refiners = said.get("rank", info.rank), bool(said.get("skip_refiners", not info.quantized_refiners))
    expected = f"rank {info.rank}, skip_refiners {not info.quantized_refiners}, as the tensors have it"
    found += f", metadata: rank {rank}, skip_refiners {dense_refiners}"
    return Check("header", (rank, dense_refiners) == (info.rank, not info.quantized_refiners), found, expected)


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, SVDQLinear]]:
    """The INT4 linears by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SVDQLinear))


def check_weights(model: nn.Module, device: torch.device) -> list[Check]:
    """One check for each group of tensors that a fault can hide in, over all INT4 linears."""
    prints = {name: fingerprint(linear.weights().to(device)) for name, linear in quantized_linears(model)}
    if not prints:
        return []
    faults = [f"{name}: {fault}" for name, found in prints.items() for fault in found.faults()]
    worst = {
        "along up": max(p.along_up for p in prints.values()),
        "along down": max(p.along_down for p in prints.values()),
        "scale, least": min(p.ratio for p in prints.values()),
        "scale, most": max(p.ratio for p in prints.values()),
    }
    extremes = ", ".join(f"{what} {value:.2f}" for what, value in worst.items())
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    found = f"{faults[0]}{more}" if faults else f"{len(prints)} linears agree: {extremes}"
    return [Check("codes, scales, smoothing and branch", not faults, found, "tensors that belong together")]


class Inputs:
    """Records, while open, the first input (M, K) of each of some linears."""

    def __init__(self, linears: dict[str, SVDQLinear]):
        self.linears = linears
        self.rows: dict[str, Tensor] = {}

    def __enter__(self) -> Inputs:
        self._handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: self._keep(name, args[0]))
            for name, linear in self.linears.items()
        ]
        return self

    def _keep(self, name: str, x: Tensor | Quantized) -> None:
        x = x.x if isinstance(x, Quantized) else x
        self.rows.setdefault(name, x.detach().reshape(-1, x.shape[-1]).clone())

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def check_ways(linears: dict[str, SVDQLinear], inputs: dict[str, Tensor], device: torch.device) -> list[Check]:
    """A check for every backend and precision that runs here: its error on real inputs against fp32."""
    checks = []
    ways = every_way(device, next(iter(inputs.values())).dtype) if inputs else {}
    for way, backend in ways.items():
        errors = {}
        for name, x in inputs.items():
            weights = linears[name].weights().to(device)
            expected = nn.functional.linear(x.float(), weights.dequantize())
            found = backend.linear(x, backend.prepare(weights)).float()
            errors[name] = ((found - expected).norm() / expected.norm()).item()
        worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
        limit = ERRORS[backend.precision]
        text = f"error {errors[worst]:.4f} at {worst}"
        checks.append(Check(f"{way} on real inputs", errors[worst] <= limit, text, f"at most {limit}"))
    return checks


def check_picture(pipeline: Pipeline, size: int | None) -> list[Check]:
    """A picture, and whether the model finds it again under noise in one step."""
    import numpy

    picture = pipeline(PROMPT, height=size, width=size, generator=SEED)[0]
    again = pipeline(PROMPT, image=picture, strength=NOISE, num_inference_steps=1, generator=SEED + 1)[0]
    first, second = (numpy.asarray(p, dtype=numpy.float64) for p in (picture, again))
    error = ((first - second) ** 2).mean()
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    flat = first.std() < 1
    return [
        Check("a picture", not flat, "one even colour" if flat else f"{picture.width} x {picture.height}", "a picture"),
        Check("noise removed from it", psnr >= LEAST_PSNR, f"{psnr:.1f} dB", f"at least {LEAST_PSNR:.0f} dB"),
    ]


def verify(
    model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    size: int | None = None,
) -> Report:
    """Check a model and every way to run it here; a failed check stops nothing.

    size: pixels of an edge of the picture. Raises ValueError for files that cannot be read.
    """
    pipeline = load_pipeline(model, text_encoder, vae, tokenizer=tokenizer, device=device)
    pipeline(PROMPT, height=64, width=64, num_inference_steps=1, generator=SEED)  # has the model read
    transformer = cast("ZImageTransformer", pipeline.transformer)
    block = f"layers.{len(transformer.layers) // 2}."
    linears = {name: linear for name, linear in quantized_linears(transformer) if name.startswith(block)}
    checks = [check_header(pipeline.files.model, transformer), *check_weights(transformer, pipeline.device)]
    with Inputs(linears) as inputs:
        checks += check_picture(pipeline, size)
    checks += check_ways(linears, inputs.rows, pipeline.device)
    backend = transformer.backend
    runs = f"{backend.name} {backend.precision}" if backend else "dense"
    return Report(
        {**machine(pipeline.device, pipeline.dtype), "model": pipeline.files.model.name, "runs": runs}, checks
    )
