"""LoRA files of every key style: what a file holds, checked from its header, and its changes of each module.

Keys become modules and leaves by the tables of `formats.names`; one format's tensors of one module are a `Source`,
whose tensors make a `Delta`. Alphas may also be in PEFT's or diffusers' config beside the tensors.

Source: huggingface/diffusers `loaders/lora_base.py@v0.42.1` and huggingface/peft `tuners@v0.21.2` for the configs.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.identify import EXPECTED, other_model
from ..formats.names import is_lora, lora_leaf, lora_refused, lora_target
from ..formats.safetensors import Shape, TensorFiles, open_tensors, read_text
from .deltas import FORMAT_OF, FORMATS, KINDS, OPTIONAL, Bias, Delta, loha_is_low_rank

TRAINING_ADAPTER = re.compile(r"training[_\- ]?adapter", re.IGNORECASE)
ALPHAS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")  # in metadata of trainers
DTYPES = ("BF16", "F16", "F32", "F64")
REMEDY = EXPECTED["lora"][1]

logger = logging.getLogger(__name__)
Shapes = Mapping[str, Shape]


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
    targets: dict[str, tuple[str, str, str | None]] = {}
    unmatched = []
    for key in shapes:
        if refused := lora_refused(key):
            raise ValueError(f"{name}: {key}: {refused} is not read; get the file as LoRA, LoHa, LoKr, DoRA or diff")
        found = lora_leaf(key)
        target = found and lora_target(found[0])
        if not found or not target:
            unmatched.append(key)
            continue
        module, leaf = found
        if (twin := groups.setdefault(module, {}).setdefault(leaf, key)) != key:
            raise ValueError(f"{name}: {key} and {twin}: two adapters in one file; save them separately")
        targets[module] = target
    if not groups:
        other = other_model(shapes)
        what = (f"one for {other}" if other else "none") if is_lora(shapes) else "another kind of file"
        example = f" (keys such as {unmatched[0]!r})" if unmatched else ""
        raise ValueError(f"{name}: expected a LoRA for Z-Image, found {what}{example}; {REMEDY}")

    sources: dict[tuple[str, str, str | None, str], Source] = {}
    ignored: dict[str, str] = {}
    for module, keys in groups.items():
        for source in _sources(name, module, targets[module], keys, shapes):
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


def _sources(
    name: str, module: str, target: tuple[str, str, str | None], keys: Mapping[str, str], shapes: Shapes
) -> Iterable[Source]:
    """The changes of one module, each complete and consistent in its shapes."""
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
        yield Source(module, *target, kind, used)
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
        elif leaf in ("up_bias", "diff_b") and len(shape) != 1:
            fail(leaf, "a vector")
        elif leaf == "diff" and len(shape) > 2:
            fail(leaf, "a matrix or a vector")
        elif (leaf in ("down", "up") or leaf.startswith(("hada_", "lokr_"))) and len(shape) != 2:
            fail(leaf, "a matrix")
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


def _report(
    name: str,
    sources: list[Source],
    unmatched: list[str],
    ignored: Mapping[str, str],
    shapes: Shapes,
    metadata: Mapping[str, str],
) -> Report:
    formats: Counter[str] = Counter()
    dense = elements = transforms = 0
    for source in sources:
        dora = "magnitude" in source.keys
        formats[("DoRA " if dora else "") + source.format] += 1
        transforms += dora or source.format == "OFT"
        sizes = {leaf: _flat(shapes[key]) for leaf, key in source.keys.items()}
        if source.format == "diff" and len(sizes["diff"]) == 2 and not source.target.endswith("_token"):
            dense, elements = dense + 1, elements + math.prod(sizes["diff"])
        elif source.format == "LoHa" and not loha_is_low_rank(*(sizes[leaf] for leaf in FORMATS["LoHa"][0])):
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
    if not any("alpha" in source.keys for source in sources) and "lora_adapter_metadata" not in metadata:
        told = [f"{key} {metadata[key][:20]}" for key in ALPHAS if metadata.get(key)]
        if told:
            warnings.append(
                f"{name}: its metadata say {', '.join(told)}, its tensors hold no alpha: the change is taken as it is"
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


def _checked_plan(files: TensorFiles) -> tuple[list[Source], Report]:
    shapes = {key: shape for key, (_, shape) in files.tensors.items()}
    sources, report = read_plan(str(files.path), shapes, files.metadata)
    for key in report.matched:
        dtype = files.tensors[key][0]
        if dtype not in DTYPES and not key.endswith(".alpha"):
            raise ValueError(f"{files.path}: {key}: expected BF16, F16 or F32, found {dtype}; get such a file")
    return sources, report


@dataclass(frozen=True, eq=False)
class Lora:
    """A checked LoRA: the changes of each module of the transformer and of the text encoder."""

    name: str
    transformer: Mapping[str, Sequence[Delta]]
    text_encoder: Mapping[str, Sequence[Delta]]
    report: Report

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str = "LoRA", metadata: Mapping | None = None) -> Lora:
        """From tensors named as in a file of any style. ValueError like `load_lora`."""
        metadata = metadata or {}
        sources, report = read_plan(name, {key: tuple(t.shape) for key, t in tensors.items()}, metadata)
        return _build(name, sources, report, tensors.__getitem__, PeftConfig.read(metadata, name))

    def deltas(self, model: nn.Module) -> Mapping[str, Sequence[Delta]]:
        """The changes meant for a model: a text encoder's or a transformer's."""
        return self.text_encoder if hasattr(model, "embed_tokens") else self.transformer


Loras = tuple[tuple[Lora, float], ...]
"""LoRAs and their strengths."""


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
                None if alpha is None else _number(alpha),
                None if config.get("r") is None else _number(config["r"]),
                {_literal(k): _number(v) for k, v in (config.get("alpha_pattern") or {}).items()},
                {_literal(k): _number(v) for k, v in (config.get("rank_pattern") or {}).items()},
                bool(config.get("use_rslora")),
            )
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{name}: its PEFT config is damaged ({error}); download it again") from None

    def scale(self, module: str, rank: int | None) -> float:
        """alpha / rank of a module whose file has no alpha of its own."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        width = rank or _by_pattern(self.rank_pattern, module, self.rank)
        if alpha is None or not width:
            return 1.0
        return alpha / (math.sqrt(width) if self.rslora else width)


def _number(found: Any) -> float:
    """A number of a config. ValueError for NaN and infinity."""
    number = float(found)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {found}")
    return number


def _literal(pattern: str) -> str:
    """The module that a key of PEFT's patterns names. ValueError for other regular expressions: none is run."""
    name = pattern.removeprefix("^").removeprefix(".*").removeprefix("\\.").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.-]{1,512}", name):
        raise ValueError(f"expected the name of a module as a pattern, found {pattern[:100]!r}")
    return name.strip(".")


def _by_pattern(patterns: Mapping[str, float], module: str, default: float | None) -> float | None:
    """The number of the first name, in the file's order, that a module ends in."""
    parts = module.split(".")
    found = [name for i in range(len(parts)) if (name := ".".join(parts[i:])) in patterns]
    return patterns[min(found, key=list(patterns).index)] if found else default


def load_lora(path: str | Path) -> Lora:
    """Read and check a LoRA file; its tensors stay on the host as they are stored.

    ValueError, naming file and key, for a damaged file, missing halves, ranks that differ, NaN, formats that are not
    read and files for other models; widths are compared with a model's by `Lora.check` and `apply`.
    """
    path = Path(path)
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    own = path.is_dir() or path.name.startswith("adapter_model")
    text = read_text(beside) if own and beside.is_file() else None
    with open_tensors(path) as files:
        sources, report = _checked_plan(files)
        config = PeftConfig.read(files.metadata, str(path), text)
        lora = _build(str(path), sources, report, lambda key: files.get(key).clone(), config)
    level = logging.WARNING if lora.report.unmatched or lora.report.warnings else logging.INFO
    logger.log(level, "%s", lora.report.summary())
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
        report = replace(report, ignored=ignored, matched=matched)
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
