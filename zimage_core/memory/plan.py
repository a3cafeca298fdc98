"""What pictures will take of the device's memory, planned before work starts, and what is streamed to keep a budget.

Text encoder, transformer and VAE are on the device one after the other, so a budget must hold the largest of three
stages: weights that stay, two slots for streamed blocks, and everything that grows with the picture, which `stages`
counts. Only without any limit do models stay for the next picture.
All sizes are bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from torch import nn

from ..models.controlnet import ControlNet, run_order
from ..models.text_encoder import TextEncoder
from ..models.transformer import ZImageTransformer
from ..models.vae import VAE, tile_sizes
from ..sizes import GIB, readable
from .placement import MIB, Weights, allocated, slots, weights
from .stages import Request, decoding_bytes, encoding_bytes, remembered, sampling_bytes

UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": MIB, "mib": MIB, "mb": 10**6}


@dataclass(frozen=True)
class Limits:
    """What may be used of the device.

    budget: None for no limit. host: bytes of the machine, None where unknown; on_host: it computes itself. libraries:
    what cuBLAS and the like hold for good. streamed: models of which no block may stay. stays: models that stay on the
    device through the others' stages; resident: what models have there now, from the picture before.
    """

    budget: int | None = None
    libraries: int = 0
    streamed: Collection[str] = ()
    stays: Collection[str] = ()
    resident: Mapping[str, int] = field(default_factory=dict)
    host: int | None = None
    on_host: bool = False

    @property
    def usable(self) -> int | None:
        """The budget less what is left to the allocator's rounding and the libraries' small workspaces."""
        return None if self.budget is None else self.budget - reserve(self.budget)

    @property
    def available(self) -> float:
        """Bytes for weights and activations."""
        return float("inf") if self.usable is None else self.usable - self.libraries


@dataclass(frozen=True)
class Stage:
    """One model's time on the device.

    on_device: its weights there, with slots or kept codes; activations: what running it takes beside them; other: what
    else lies there; allowance: bytes of weights, as `offload.BlockStreamer.place` takes it; beside: models that stay.
    """

    name: str
    weights: int
    on_device: int
    blocks: int
    resident: int
    activations: int
    other: int
    allowance: float
    beside: tuple[str, ...] = ()
    note: str = ""
    streamed: int = 0  # bytes of the blocks that wait on the host
    codes: int = 0  # bytes of kept 8-bit codes

    @property
    def needed(self) -> int:
        """Bytes of the model alone."""
        return self.on_device + self.activations

    @property
    def peak(self) -> int:
        return self.needed + self.other


@dataclass(frozen=True)
class Plan:
    """What will be on the device when; `budget` and `usable` are None where there is no limit.

    tiling is that of `vae.VAE.decode`.
    """

    title: str
    stages: tuple[Stage, ...]
    budget: int | None
    usable: int | None
    tiling: str | int

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    def table(self) -> str:
        """The plan for people, a few lines."""
        limit = "no limit" if self.budget is None else f"budget {readable(self.budget)}"
        unit, count, digits = ("MiB", MIB, 1) if self.peak < GIB / 4 else ("GiB", GIB, 2)
        rows: list[tuple[str, ...]] = [(unit, "weights", "on device", "activations", "other", "peak", "")]
        for stage in self.stages:
            parts = (stage.weights, stage.on_device, stage.activations, stage.other, stage.peak)
            streamed = stage.blocks - stage.resident
            notes = [f"{streamed} of {stage.blocks} blocks streamed"] if streamed else []
            notes += ["8-bit codes kept"] if stage.codes else []
            note = ", ".join((*notes, *filter(None, (stage.note,)), *(f"{other} stays" for other in stage.beside)))
            rows.append((stage.name, *(f"{part / count:.{digits}f}" for part in parts), note))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [f"{self.title}, {limit}, predicted peak {readable(self.peak)}"]
        for name, *numbers, note in rows:
            cells = [n.rjust(w) for n, w in zip(numbers, widths[1:])]
            lines.append("  ".join((f"  {name:<{widths[0]}}", *cells, note)).rstrip())
        return "\n".join(lines)

    def facts(self) -> dict:
        """The plan for `--json`, in GiB."""
        stages = []
        for stage in self.stages:
            found = asdict(stage) | {"peak": stage.peak}
            del found["allowance"]
            sizes = ("weights", "on_device", "activations", "other", "peak", "streamed", "codes")
            stages.append({k: round(v / GIB, 4) if k in sizes else v for k, v in found.items()})
        budget = None if self.budget is None else round(self.budget / GIB, 4)
        return {"budget_gib": budget, "peak_gib": round(self.peak / GIB, 4), "stages": stages}


def parse_budget(text: str | int | float | None) -> int | str | None:
    """ "4GiB", "4096 MiB", "4GB", a number of GiB -> bytes; "auto" and None stay. ValueError for anything else."""
    if text is None or text == "auto":
        return text
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f"vram budget: expected auto or a size such as 4GiB or 3500MiB, found {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def reserve(budget: int) -> int:
    """What of a budget the plan leaves free, for the allocator's rounding and the libraries' small workspaces."""
    return budget // 32 + 32 * MIB


def fragmentation(activations: int) -> int:
    """What torch's allocator may hold in freed memory that the next activations do not fit into.

    Blocks are streamed rather than let that break the budget, but nothing is refused for it. The share is measured
    (benchmarks/README.md, "Memory budgets").
    """
    return activations * 7 // 8


def plan_pictures(
    request: Request,
    limits: Limits,
    *,
    transformer: ZImageTransformer,
    encoder: TextEncoder | None,
    vae: VAE,
    controls: Sequence[ControlNet] = (),
) -> Plan:
    """Share a budget out between the stages of a request.

    The models may be on the meta device; encoder is None where all prompts are known. controls: a ControlNet for each
    control picture, run beside the transformer. ValueError where the budget does not hold a stage even with every block
    streamed.
    """
    size = (request.height, request.width, request.pictures)
    there = {name: count for name, count in limits.resident.items() if name in limits.stays}
    stages = []
    if encoder is not None:
        activations = encoding_bytes(encoder, request.encoded)
        sizes = remembered(encoder, "sizes", lambda: _sizes(encoder.layers, encoder.layers))
        stage = _stage("text encoder", *sizes, activations, limits, there)
        stages.append(_checked(stage, request, limits))
    activations = sampling_bytes(transformer, request, controls)
    nets = list(dict.fromkeys(controls))

    def whole() -> tuple[Weights, int]:
        return _sizes(nn.ModuleList([transformer, *nets]), run_order(transformer, nets))

    sizes = whole() if nets else remembered(transformer, "sizes", whole)
    stage = _stage("transformer", *sizes, activations, limits, there)
    stages.append(_checked(stage, request, limits))
    down = vae.config.downscale
    sizes = remembered(vae, "sizes", lambda: _sizes(vae, ()))
    for tile in tile_sizes(request.height // down, request.width // down, down):
        stage = _stage("VAE", *sizes, decoding_bytes(vae, *size, tile), limits, there)
        if stage.needed <= min(limits.available, (limits.on_host and limits.host) or math.inf):
            break
    stages.append(_checked(replace(stage, note=f"in tiles of {tile} cells") if tile else stage, request, limits))
    return Plan(str(request), tuple(stages), limits.budget, limits.usable, tile or "auto")


def _sizes(model: nn.Module, blocks: Iterable[nn.Module]) -> tuple[Weights, int]:
    """The bytes of a model, and what the allocator takes beyond those of its tensors."""
    sizes = [tensor.numel() * tensor.element_size() for _, _, tensor in slots(model)]
    return weights(blocks, model), sum(map(allocated, sizes)) - sum(sizes)


def _stage(
    name: str,
    found: Weights,
    rounding: int,
    activations: int,
    limits: Limits,
    there: dict[str, int],
) -> Stage:
    """The stage of a model (`_sizes`) whose blocks are streamed as far as they must be.

    there: bytes of the models that stay on the device; this one is added if it does.
    """
    allowance = limits.available - activations - fragmentation(activations) - rounding
    allowance = 0 if name in limits.streamed else allowance
    resident, on_device = found.within(allowance)
    on_device += rounding * resident // max(len(found.blocks), 1)
    others = {other: count for other, count in there.items() if other != name}
    if name in limits.stays:
        there[name] = on_device
    return Stage(
        name=name,
        weights=found.total,
        on_device=on_device,
        blocks=len(found.blocks),
        resident=resident,
        activations=activations,
        other=limits.libraries + sum(others.values()),
        allowance=allowance,
        beside=tuple(others),
        streamed=sum(found.blocks) - sum(found.kept(allowance)),
        codes=found.kept_codes(allowance),
    )


def _checked(stage: Stage, request: Request, limits: Limits) -> Stage:
    """The stage; ValueError where the budget or the machine cannot hold it."""
    if stage.needed > limits.available:
        raise _too_small(stage, request, limits)
    if limits.host is not None and limits.on_host and stage.needed > limits.host:
        raise ValueError(
            f"memory: the {stage.name} needs {readable(stage.needed)} for {request}, this machine has "
            f"{readable(limits.host)}; generate smaller or fewer pictures at a time"
        )
    if limits.host is not None and stage.streamed > limits.host:
        raise ValueError(
            f"memory: {stage.blocks - stage.resident} of {stage.blocks} blocks of the {stage.name} would wait in "
            f"{readable(stage.streamed)} of host memory, this machine has {readable(limits.host)}; give a larger vram "
            "budget, or a smaller file"
        )
    return stage


def _too_small(stage: Stage, request: Request, limits: Limits) -> ValueError:
    needed = stage.needed + limits.libraries
    least = next(b for b in range(2**26, 2**50, 2**26) if b - reserve(b) >= needed)
    return ValueError(
        f"vram budget {readable(limits.budget or 0)}: the {stage.name} needs {readable(needed)} for {request} even "
        f"with every block streamed, and {readable(reserve(least))} stay free; give at least {readable(least)}, or "
        "generate smaller or fewer pictures at a time"
    )
