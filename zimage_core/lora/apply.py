"""LoRA files of every kind, read, checked and put beside a model's weights, which stay as they are.

A file becomes a `Lora`: one `Delta` for each module or part of a fused module (q, k, v; w3, w1). `apply` makes the
adapters of a model exactly a list of (Lora, strength), all or nothing; the empty list leaves it bit-identical to never
having had any. A delta D acts as strength * (merged(W) - W), linear in the strength whatever the format:

    LoRA, LoCon   W + s up down                    low rank; pairs of all files are concatenated (see `adapters`)
    LoHa          W + s (a1 b1) * (a2 b2)          exactly low rank (r1 r2) where that is cheaper, else dense
    LoKr          W + s w1 (x) w2                  factored, never expanded
    DoRA          m (W + D) / |W + D|              a diagonal on the output or the input, beside D's own form
    OFT           blockdiag(R) W                   block-diagonal on the output
    diff, diff_b  W + D, b + D                     dense: costs the linear's memory and time once more in 16 bits

s = alpha / rank where the file has alpha, else 1. DoRA divides by the norm of the changed weight, as the paper, PEFT
and LyCORIS do. Norms and pad tokens, which are no linears, take diff only and hold the sum.

Cost of plain LoRAs inside the low-rank branches of the INT4 linears, in FLOPs of the blocks' linears at 16 bits:
rank 32 everywhere (96 on fused qkv, 64 on w3_w1) 2.1 %, four of them 8.4 %; twice that where the linears run in 8 bits.

Legend: N out, K in, r rank, W (N, K) a linear's weight.
Sources: LoRA arXiv:2106.09685, DoRA arXiv:2402.09353; KohakuBlueleaf/LyCORIS `lycoris/functional@4.1.3` for LoHa, LoKr
and diagonal OFT; huggingface/peft `tuners@v0.21.2`; huggingface/diffusers `loaders/lora_base.py@v0.42.1` for metadata.
"""

from __future__ import annotations

import json
import logging
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.names import FUSED_PARTS, is_lora, lora_leaf, lora_refused, lora_target
from ..formats.safetensors import open_tensors
from ..linear.adapters import Rows, Terms

EPSILON = torch.finfo(torch.float32).eps
RANK_MULTIPLE = 16  # kernels take low-rank branches in such steps; zeros fill up
OTHER_MODELS = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux"),
    (r"(^|[._])transformer_blocks[._]", "Qwen-Image, Flux or SD3"),
    (r"(down|up|input|output)_blocks[._]|mid_block[._]", "Stable Diffusion"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn", "Wan"),
)
TRAINING_ADAPTER = re.compile(r"training[_\- ]?adapter", re.IGNORECASE)
REMEDY = "get a LoRA that was trained for Z-Image"
FORMATS = {  # the tensors of each format, any of the alternatives
    "LoRA": (("down", "up"),),
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "LoKr": (
        ("lokr_w1", "lokr_w2"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    ),
    "OFT": (("oft_blocks",),),
    "diff": (("diff",),),
    "diff_b": (("diff_b",),),
}
OPTIONAL = {"LoRA": "up_bias", "OFT": "rescale"}
FORMAT_OF = {leaf: name for name, sets in FORMATS.items() for leaves in sets for leaf in leaves}
FORMAT_OF |= {leaf: name for name, leaf in OPTIONAL.items()}
DTYPES = ("BF16", "F16", "F32", "F64")

logger = logging.getLogger(__name__)
Shapes = Mapping[str, tuple[int, ...]]


# ---------------------------------------------------------------- what a file holds


@dataclass(frozen=True)
class Source:
    """One change of one module in a file: the tensors of one format, leaf -> key."""

    module: str  # as the file names it
    space: str  # "transformer" or "text_encoder"
    target: str
    part: str | None
    format: str
    keys: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """What became of a file's keys. formats counts modules by format; costs and warnings are sentences."""

    name: str
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    ignored: Mapping[str, str]  # key -> why
    formats: Mapping[str, int]
    transformer: int  # modules
    text_encoder: int
    costs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """All of it in a few lines."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        lines = [f"{self.name}: {len(self.matched)} keys matched ({kinds}) on {self.transformer} modules"]
        if self.text_encoder:
            lines[0] += f" and {self.text_encoder} of the text encoder"
        for what, keys in (("did not match", self.unmatched), ("ignored", tuple(self.ignored))):
            if keys:
                more = ", ..." if len(keys) > 3 else ""
                lines.append(f"{len(keys)} {what}: {', '.join(keys[:3])}{more}")
        lines += [f"ignored, {why}" for why in dict.fromkeys(self.ignored.values())]
        return "\n".join((*lines, *self.costs, *(f"warning: {text}" for text in self.warnings)))


def read_plan(name: str, shapes: Shapes, metadata: Mapping[str, str]) -> tuple[list[Source], Report]:
    """What a header promises. ValueError, naming file and key, for what is damaged, not read or another model's."""
    groups: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in shapes:
        if refused := lora_refused(key):
            raise ValueError(f"{name}: {key}: {refused} is not read; get the file as LoRA, LoHa, LoKr, DoRA or diff")
        module, leaf = lora_leaf(key) or (None, None)
        if module is None or lora_target(module) is None:
            unmatched.append(key)
        elif leaf in groups.setdefault(module, {}):
            other = groups[module][leaf]
            raise ValueError(f"{name}: {key} and {other}: two adapters in one file; save them separately")
        else:
            groups[module][leaf] = key
    if not groups:
        others = (f"one for {m}" for p, m in OTHER_MODELS if any(re.search(p, key) for key in shapes))
        what = next(others, "none") if is_lora(shapes) else "another kind of file"
        example = f" (keys such as {unmatched[0]!r})" if unmatched else ""
        raise ValueError(f"{name}: expected a LoRA for Z-Image, found {what}{example}; {REMEDY}")

    sources: dict[tuple[str, str, str | None, str], Source] = {}
    ignored: dict[str, str] = {}
    for module, keys in groups.items():
        for source in _sources(name, module, keys, shapes):
            slot = (source.space, source.target, source.part, source.format)
            if slot in sources:
                ignored |= dict.fromkeys(source.keys.values(), "the same module under another name: applied once")
            else:
                sources[slot] = source
        if not any(leaf in FORMAT_OF for leaf in keys):
            ignored |= dict.fromkeys(keys.values(), "an alpha without its tensors")
    for slot in [slot for slot in sources if slot[2] and (*slot[:2], None, slot[3]) in sources]:
        why = "parts of a fused module that is there as a whole: applied once"
        ignored |= dict.fromkeys(sources.pop(slot).keys.values(), why)
    report = _report(name, list(sources.values()), unmatched, ignored, shapes, metadata)
    return list(sources.values()), report


def _sources(name: str, module: str, keys: Mapping[str, str], shapes: Shapes) -> Iterable[Source]:
    """The changes of one module, each complete and consistent in its shapes."""
    space, target, part = lora_target(module)
    for kind in dict.fromkeys(FORMAT_OF[leaf] for leaf in keys if leaf in FORMAT_OF):
        own = {leaf for leaf in keys if FORMAT_OF.get(leaf) == kind}
        complete = [names for names in FORMATS[kind] if set(names) | {OPTIONAL.get(kind)} >= own >= set(names)]
        if not complete:
            best = min(FORMATS[kind], key=lambda names: len(set(names) ^ own))
            missing = ", ".join(sorted(set(best) - own)) or f"only {', '.join(best)}"
            found = ", ".join(keys[leaf] for leaf in sorted(own))
            raise ValueError(f"{name}: {module}: {kind} with {found}: expected {missing} too; download the file again")
        used = {leaf: keys[leaf] for leaf in keys if leaf in own or leaf in ("alpha", "magnitude")}
        if kind in ("OFT", "diff", "diff_b"):
            used.pop("magnitude", None)
        _check_shapes(name, kind, {leaf: shapes[key] for leaf, key in used.items()}, used)
        yield Source(module, space, target, part, kind, used)
    if "magnitude" in keys and not any(FORMAT_OF.get(leaf) in ("LoRA", "LoHa", "LoKr") for leaf in keys):
        raise ValueError(f"{name}: {keys['magnitude']}: DoRA without its LoRA; the file is damaged, download it again")


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """LoCon files store linears as 1 x 1 convolutions."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape


def _check_shapes(name: str, kind: str, shapes: Shapes, keys: Mapping[str, str]) -> None:
    """ValueError unless the tensors of one format fit each other."""

    def fail(leaf: str, expected: str) -> None:
        raise ValueError(f"{name}: {keys[leaf]}: expected {expected}, found shape {shapes[leaf]}; download it again")

    flat = {leaf: _flat(shape) for leaf, shape in shapes.items()}
    for leaf, shape in flat.items():
        if leaf == "alpha":
            if math.prod(shape) != 1:
                fail(leaf, "one number")
        elif 0 in shape:
            fail(leaf, "a tensor that is not empty")
        elif leaf == "oft_blocks" and (len(shape) != 3 or shape[1] != shape[2]):
            fail(leaf, "(blocks, size, size) of diagonal OFT (BOFT is not read)")
        elif leaf in ("down", "up") or leaf.startswith(("hada_", "lokr_")):
            if len(shape) != 2:
                fail(leaf, "a matrix")
        elif leaf in ("up_bias", "diff_b") and len(shape) != 1:
            fail(leaf, "a vector")
        elif leaf == "diff" and len(shape) > 2:
            fail(leaf, "a matrix or a vector")
    for left, right in (("up", "down"), *((f"{w}_a", f"{w}_b") for w in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2"))):
        if left in flat and flat[left][1] != flat[right][0]:
            raise ValueError(
                f"{name}: {keys[left]} {shapes[left]} and {keys[right]} {shapes[right]}: expected one rank, found "
                f"{flat[left][1]} and {flat[right][0]}; download it again"
            )
    if kind == "LoHa" and (flat["hada_w1_a"][0], flat["hada_w1_b"][1]) != (flat["hada_w2_a"][0], flat["hada_w2_b"][1]):
        fail("hada_w2_a", f"the widths of hada_w1, ({flat['hada_w1_a'][0]}, {flat['hada_w1_b'][1]}),")
    if "rescale" in flat and math.prod(flat["rescale"]) != math.prod(flat["oft_blocks"][:2]):
        fail("rescale", f"{math.prod(flat['oft_blocks'][:2])} numbers")


def _report(name, sources: list[Source], unmatched, ignored, shapes: Shapes, metadata: Mapping[str, str]) -> Report:
    formats: Counter[str] = Counter()
    dense = elements = transforms = 0
    for source in sources:
        dora = "magnitude" in source.keys
        formats[("DoRA " if dora else "") + source.format] += 1
        transforms += dora or source.format == "OFT"
        sizes = {leaf: _flat(shapes[key]) for leaf, key in source.keys.items()}
        if source.format == "diff" and len(sizes["diff"]) == 2 and not source.target.endswith("_token"):
            dense, elements = dense + 1, elements + math.prod(sizes["diff"])
        elif source.format == "LoHa" and not _loha_is_low_rank(*(sizes[leaf] for leaf in FORMATS["LoHa"][0])):
            dense, elements = dense + 1, elements + sizes["hada_w1_a"][0] * sizes["hada_w1_b"][1]
        elif source.format == "LoKr" and dora:
            halves = [sizes.get(w) or (sizes[f"{w}_a"][0], sizes[f"{w}_b"][1]) for w in ("lokr_w1", "lokr_w2")]
            dense, elements = dense + 1, elements + math.prod(halves[0]) * math.prod(halves[1])
    costs = []
    if dense:
        costs.append(
            f"{dense} modules take a dense branch: {2 * elements / 2**20:.0f} MiB in 16 bits and, for each of them, "
            "the time of a 16-bit linear"
        )
    if transforms:
        costs.append(f"{transforms} modules take a pass over their output or input (DoRA, OFT)")
    titles = [str(name), *(metadata.get(key, "") for key in ("ss_output_name", "modelspec.title", "name"))]
    warnings = []
    if any(TRAINING_ADAPTER.search(title) for title in titles):
        warnings.append(
            f"{name} is a training adapter, made to be present while a LoRA is trained; it spoils pictures if applied"
        )
    return Report(
        name=str(name),
        matched=tuple(key for source in sources for key in source.keys.values()),
        unmatched=tuple(unmatched),
        ignored=ignored,
        formats=dict(formats),
        transformer=len({s.target for s in sources if s.space == "transformer"}),
        text_encoder=len({s.target for s in sources if s.space == "text_encoder"}),
        costs=tuple(costs),
        warnings=tuple(warnings),
    )


def inspect(path: str | Path) -> Report:
    """What a LoRA file holds, from its header alone. ValueError like `load_lora`, but for the tensors' values."""
    files = open_tensors(path)
    return _checked_plan(files)[1]


def _checked_plan(files) -> tuple[list[Source], Report]:
    shapes = {key: shape for key, (_, shape) in files.tensors.items()}
    sources, report = read_plan(str(files.path), shapes, files.metadata)
    for key in report.matched:
        dtype = files.tensors[key][0]
        if dtype not in DTYPES and not key.endswith(".alpha"):
            raise ValueError(f"{files.path}: {key}: expected BF16, F16 or F32, found {dtype}; get such a file")
    return sources, report


# ---------------------------------------------------------------- the deltas


@dataclass(frozen=True, eq=False)
class Delta:
    """A change of a linear's weight, or of some rows of it; tensors as stored, on the host."""

    key: str  # the module as the file names it
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    part: str | None = None
    magnitude: Tensor | None = None
    gains: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary, repr=False)

    def shape(self) -> tuple[int | None, int | None]:
        """(N, K), None where any fits."""
        raise NotImplementedError

    def pair(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """down (r, K) and up (N, r), scaled, in fp32; None where the change is not of low rank."""
        return None

    def matrix(self, device: torch.device) -> Tensor:
        """The whole change (N, K), scaled, in fp32."""
        down, up = self.pair(device)
        return up @ down

    def get(self, leaf: str, device: torch.device) -> Tensor:
        return self.tensors[leaf].to(device).float()


class LoRA(Delta):
    def shape(self):
        return self.tensors["up"].shape[0], self.tensors["down"].shape[1]

    def pair(self, device):
        return self.get("down", device), self.get("up", device) * self.scale


def _loha_is_low_rank(a1, b1, a2, b2) -> bool:
    n, k, rank = a1[0], b1[1], a1[1] * a2[1]
    return rank * (n + k) < n * k


class LoHa(Delta):
    def shape(self):
        return self.tensors["hada_w1_a"].shape[0], self.tensors["hada_w1_b"].shape[1]

    def pair(self, device):
        """(a1 b1) * (a2 b2) has as up and down all products of a column of a1 and one of a2, and likewise of rows."""
        factors = [self.get(leaf, device) for leaf in FORMATS["LoHa"][0]]
        if not _loha_is_low_rank(*(f.shape for f in factors)):
            return None
        a1, b1, a2, b2 = factors
        return (b1[:, None] * b2).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1) * self.scale

    def matrix(self, device):
        a1, b1, a2, b2 = (self.get(leaf, device) for leaf in FORMATS["LoHa"][0])
        return (a1 @ b1) * (a2 @ b2) * self.scale


class LoKr(Delta):
    def shape(self):
        w1, up, down = self.factors(torch.device("cpu"))
        return w1.shape[0] * up.shape[0], w1.shape[1] * (up if down is None else down).shape[1]

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """w1 (a, b), scaled, up (N/a, r) and down (r, K/b); down None where w2 (N/a, K/b) is whole."""
        whole = "lokr_w1" in self.tensors
        w1 = self.get("lokr_w1", device) if whole else self.get("lokr_w1_a", device) @ self.get("lokr_w1_b", device)
        if "lokr_w2" in self.tensors:
            return w1 * self.scale, self.get("lokr_w2", device), None
        return w1 * self.scale, self.get("lokr_w2_a", device), self.get("lokr_w2_b", device)

    def matrix(self, device):
        w1, up, down = self.factors(device)
        return torch.kron(w1, up if down is None else up @ down)


class Diff(Delta):
    def shape(self):
        return tuple(self.tensors["diff"].shape) if self.tensors["diff"].ndim == 2 else (None, None)

    def matrix(self, device):
        return self.get("diff", device)


class Bias(Delta):
    def shape(self):
        return self.tensors["diff_b"].shape[0], None


class OFT(Delta):
    """scale is the limit of the rotation's norm per output channel, 0 for none."""

    def shape(self):
        return math.prod(self.tensors["oft_blocks"].shape[:2]), None

    def blocks(self, device: torch.device) -> Tensor:
        """R - 1 (blocks, size, size) as `adapters.transform` takes it: [block, from, to]."""
        blocks = self.get("oft_blocks", device)
        skew = blocks - blocks.transpose(1, 2)
        limit, norm = self.scale * math.prod(blocks.shape[:2]), skew.norm() + 1e-8
        if limit > 0:
            skew = torch.where(norm > limit, skew * (limit / norm), skew)
        one = torch.eye(blocks.shape[1], device=device)
        rotation = torch.linalg.solve(one - skew, one + skew, left=False)  # (1 + Q) (1 - Q)^-1, [block, from, to]
        if "rescale" in self.tensors:
            rotation = rotation * self.get("rescale", device).view(len(blocks), 1, -1)
        return rotation - one


KINDS: Mapping[str, type[Delta]] = {"LoRA": LoRA, "LoHa": LoHa, "LoKr": LoKr, "OFT": OFT, "diff": Diff, "diff_b": Bias}


# ---------------------------------------------------------------- a file


@dataclass(frozen=True, eq=False)
class Lora:
    """A checked LoRA: the changes of each module of the transformer and of the text encoder."""

    name: str
    transformer: Mapping[str, Sequence[Delta]]
    text_encoder: Mapping[str, Sequence[Delta]]
    report: Report

    @classmethod
    def from_pairs(cls, pairs: Mapping[str, tuple[Tensor, Tensor]], name: str = "LoRA") -> Lora:
        """From {module in any style: (down (r, K), up (N, r), scaled)}. ValueError like `load_lora`."""
        tensors = {}
        for module, (down, up) in pairs.items():
            tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        return cls.from_tensors(tensors, name)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str = "LoRA", metadata: Mapping | None = None) -> Lora:
        """From tensors named as in a file of any style. ValueError like `load_lora`."""
        metadata = metadata or {}
        sources, report = read_plan(name, {key: tuple(t.shape) for key, t in tensors.items()}, metadata)
        return _build(name, sources, report, tensors.__getitem__, PeftConfig.read(metadata, name))

    def summary(self) -> str:
        """The report in a few lines."""
        return self.report.summary()

    def deltas(self, model: nn.Module) -> Mapping[str, Sequence[Delta]]:
        """The changes meant for a model: a text encoder's or a transformer's."""
        return self.text_encoder if hasattr(model, "embed_tokens") else self.transformer

    def check(self, model: nn.Module) -> dict[str, tuple[Delta, ...]]:
        """The changes that the model has modules for, each of which fits. ValueError names what does not.

        The encoder's last layers, which Z-Image does not run, may be in the file."""
        found = {}
        for target, deltas in self.deltas(model).items():
            module = _module(model, target)
            if module is None:
                if hasattr(model, "embed_tokens") and int(target.split(".")[1]) >= len(model.layers):
                    continue
                raise ValueError(
                    f"{self.name}: {deltas[0].key}: expected a model with {target}, found none; {REMEDY} of this size"
                )
            for delta in deltas:
                self._check_fit(delta, target, module)
            found[target] = tuple(deltas)
        return found

    def _check_fit(self, delta: Delta, target: str, module: nn.Module) -> None:
        if not hasattr(module, "set_adapter"):
            parameter = getattr(module, target if target.endswith("_token") else "weight", None)
            if not isinstance(delta, Diff) or parameter is None or delta.tensors["diff"].numel() != parameter.numel():
                wanted = "a diff" if parameter is None else f"a diff of {parameter.numel()} numbers"
                raise ValueError(f"{self.name}: {delta.key}: expected {wanted}, found {_words(delta)}; {REMEDY}")
            return
        start, stop = span(delta, target, module.out_features)
        expected = (stop - start, module.in_features)
        if any(size not in (None, wanted) for size, wanted in zip(delta.shape(), expected)) or (
            isinstance(delta, Diff) and delta.tensors["diff"].ndim != 2
        ):
            raise ValueError(
                f"{self.name}: {delta.key}: expected a change of {expected}, found {_words(delta)}; "
                f"this LoRA is for another model, {REMEDY}"
            )
        sizes = {expected[0], expected[1]}
        if delta.magnitude is not None and delta.magnitude.numel() not in sizes:
            raise ValueError(
                f"{self.name}: {delta.key}: expected a DoRA magnitude of {expected[0]} or {expected[1]} numbers, found "
                f"{tuple(delta.magnitude.shape)}; {REMEDY}"
            )


def _words(delta: Delta) -> str:
    shape = delta.tensors["diff"].shape if isinstance(delta, Diff) else delta.shape()
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


@dataclass(frozen=True)
class PeftConfig:
    """What PEFT and diffusers keep beside the tensors: alpha and rank, by pattern of module name."""

    alpha: float | None = None
    rank: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    @classmethod
    def read(cls, metadata: Mapping[str, str], name: str, text: str | None = None) -> PeftConfig:
        """From `lora_adapter_metadata` in a file's metadata, or from an adapter_config.json's text."""
        raw = text or metadata.get("lora_adapter_metadata")
        if not raw:
            return cls()
        try:
            config: dict[str, Any] = {key.removeprefix("transformer."): v for key, v in json.loads(raw).items()}
            alpha = config.get("lora_alpha", config.get("alpha"))
            return cls(
                None if alpha is None else float(alpha),
                None if config.get("r") is None else float(config["r"]),
                {str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
                {str(k): float(v) for k, v in (config.get("rank_pattern") or {}).items()},
                bool(config.get("use_rslora")),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{name}: its PEFT config is damaged ({error}); download it again") from None

    def scale(self, module: str, rank: int | None) -> float:
        """alpha / rank of a module whose file has no alpha of its own."""
        alpha, rank = (
            _by_pattern(self.alpha_pattern, module, self.alpha),
            rank or _by_pattern(self.rank_pattern, module, self.rank),
        )
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float | None) -> float | None:
    return next((value for p, value in patterns.items() if re.match(rf"(?:.*\.)?(?:{p})$", module)), default)


def load_lora(path: str | Path) -> Lora:
    """Read and check a LoRA file; its tensors stay on the host as they are stored.

    ValueError, naming file and key, for a damaged file, missing halves, ranks that differ, NaN, formats that are not
    read and files for other models; widths are compared with a model's by `Lora.check` and `apply`.
    """
    path = Path(path)
    config = path.parent / "adapter_config.json"
    text = config.read_text(encoding="utf-8") if path.name.startswith("adapter_model") and config.is_file() else None
    with open_tensors(path) as files:
        sources, report = _checked_plan(files)
        config = PeftConfig.read(files.metadata, str(path), text)
        lora = _build(str(path), sources, report, lambda key: files.get(key).clone(), config)
    level = logging.WARNING if lora.report.unmatched or lora.report.warnings else logging.INFO
    logger.log(level, "%s", lora.summary())
    return lora


def _build(name: str, sources: list[Source], report: Report, get: Callable[[str], Tensor], config: PeftConfig) -> Lora:
    spaces: dict[str, dict[str, list[Delta]]] = {"transformer": {}, "text_encoder": {}}
    ignored = dict(report.ignored)
    for source in sources:
        tensors = {}
        for leaf, key in source.keys.items():
            tensor = get(key)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: {key}: expected numbers, found NaN or infinity; the file is damaged")
            tensors[leaf] = tensor.reshape(_flat(tuple(tensor.shape)))
        alpha = float(tensors.pop("alpha")) if "alpha" in tensors else None
        magnitude = tensors.pop("magnitude", None)
        scale = _scale(source, tensors, alpha, config)
        if scale == 0 and source.format != "OFT":
            ignored |= dict.fromkeys(source.keys.values(), "alpha is 0: without effect")
            continue
        deltas = spaces[source.space].setdefault(source.target, [])
        up_bias = tensors.pop("up_bias", None)
        deltas.append(KINDS[source.format](source.module, tensors, scale, source.part, magnitude))
        if up_bias is not None:
            deltas.append(Bias(source.module, {"diff_b": up_bias * scale}, part=source.part))
    if len(ignored) > len(report.ignored):
        matched = tuple(key for key in report.matched if key not in ignored)
        report = Report(**{**vars(report), "ignored": ignored, "matched": matched})
    return Lora(name, spaces["transformer"], spaces["text_encoder"], report)


def _scale(source: Source, tensors: Mapping[str, Tensor], alpha: float | None, config: PeftConfig) -> float:
    """alpha / rank; whole LoKr factors have no rank, and OFT's alpha is its limit."""
    if source.format in ("diff", "diff_b"):
        return 1.0
    if source.format == "OFT":
        return alpha or 0.0
    rank = next(
        (tensors[leaf].shape[0] for leaf in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if leaf in tensors), None
    )
    if alpha is not None:
        return alpha / rank if rank else 1.0
    return config.scale(source.module, rank)


# ---------------------------------------------------------------- on a model


def span(delta: Delta, target: str, out_features: int) -> Rows:
    """The rows of the model's linear that a change is for."""
    for module, parts in FUSED_PARTS.items():
        if delta.part is not None and target.endswith(module):
            size = out_features // len(parts)
            start = parts.index(delta.part) * size
            return start, start + size
    return 0, out_features


@torch.no_grad()
def apply(model: nn.Module, loras: Iterable[tuple[Lora, float]]) -> None:
    """Make a transformer's or text encoder's adapters exactly these LoRAs at these strengths.

    Modules whose changes stay the same are left alone. Where something changes, `model.adapter_version` grows: what was
    prepared before (`Conditioning`, caption features) is out of date. ValueError, with nothing changed, for a LoRA
    that does not fit or a strength that is no number; after any other failure no adapter is left.
    """
    wanted = tuple((lora, float(strength)) for lora, strength in loras if strength != 0)
    if wanted == getattr(model, "adapters", ()):
        return
    plan: dict[str, list[tuple[Delta, float]]] = {}
    for lora, strength in wanted:
        if not math.isfinite(strength):
            raise ValueError(f"{lora.name}: expected a finite strength, found {strength}")
        found = lora.check(model)
        for target in lora.deltas(model).keys() - found.keys():
            logger.warning("%s: %s: ignored, Z-Image does not run this layer of the text encoder", lora.name, target)
        for target, deltas in found.items():
            plan.setdefault(target, []).extend((delta, strength) for delta in deltas)
    old = getattr(model, "adapter_plan", {})
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
        model.adapter_version = getattr(model, "adapter_version", 0) + bool(changed)


def _module(model: nn.Module, target: str) -> nn.Module | None:
    """The module that holds a target, None where the model has none; pad tokens are the model's own."""
    try:
        return model if target.endswith("_token") else model.get_submodule(target)
    except AttributeError:
        return None


def _set(model: nn.Module, target: str, deltas: list[tuple[Delta, float]]) -> None:
    """Give one module these changes and no others."""
    module, leaf = _module(model, target), target if target.endswith("_token") else "weight"
    if hasattr(module, "set_adapter"):
        module.set_adapter(compose(deltas, module, target, _dtype(model)) if deltas else None)
        return
    own = f"own_{leaf}"  # what the file holds, while the parameter is the sum
    parameter = module._parameters[leaf]
    if own in module._buffers:
        parameter = nn.Parameter(module._buffers.pop(own), requires_grad=False)
        module._parameters[leaf] = parameter
    if deltas:
        total = parameter.float()
        for delta, strength in deltas:
            total = total + strength * delta.get("diff", parameter.device).view_as(parameter)
        module.register_buffer(own, parameter.detach(), persistent=False)
        module._parameters[leaf] = nn.Parameter(total.to(parameter.dtype), requires_grad=False)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def compose(deltas: list[tuple[Delta, float]], linear: nn.Module, target: str, dtype: torch.dtype) -> Terms:
    """The terms of several changes of one linear, on its device: pairs concatenated, dense ones summed."""
    device = _device(linear)
    n, k = linear.out_features, linear.in_features
    terms, downs, ups = Terms(), [], []
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
        gain, on_output = (None, False) if delta.magnitude is None else dora_gain(delta, linear, rows)
        if gain is not None:
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
            w1, up, down = delta.factors(device)
            down = None if down is None else down.to(dtype)
            terms.krons.append((rows, (strength * w1).to(dtype), up.to(dtype), down))
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


def dora_gain(delta: Delta, linear: nn.Module, rows: Rows) -> tuple[Tensor, bool]:
    """m / |W + D| in fp32, and whether it stands on the output (N,) or on the input (K,).

    Needs the dense weight once for each linear; kept from then on, as it does not depend on the strength."""
    on_output = delta.magnitude.shape != (1, linear.in_features) and delta.magnitude.numel() == rows[1] - rows[0]
    kept = delta.gains.get(linear)
    if kept is None:
        weight = linear.dense_weight()[rows[0] : rows[1]]
        merged = weight + delta.matrix(weight.device)
        norm = merged.norm(dim=1 if on_output else 0).clamp_min(EPSILON)
        kept = delta.magnitude.to(weight.device).float().flatten() / norm
        delta.gains[linear] = kept
    return kept.to(_device(linear)), on_output


def _device(linear: nn.Module) -> torch.device:
    return next(t.device for t in (*linear.parameters(), *linear.buffers()))
