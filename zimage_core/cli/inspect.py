"""`zimage inspect`: what a safetensors file is, from its header."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sizes import readable
from .doctor import what_runs
from .options import Commands, Parser
from .output import gib, print_facts, printable

if TYPE_CHECKING:
    from ..formats.identify import Form


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("inspect", help="what a safetensors file is, from its header")
    p.add_argument("file", type=Path, help="model or LoRA, file or folder")
    p.add_argument("--json", action="store_true", help="as one JSON object")
    return p


def run(args: argparse.Namespace) -> int:
    """Print what a file or folder holds, from its header alone, and what would run it here."""
    facts = inspect_file(args.file)
    if args.json:
        print(json.dumps(facts))
        return 0
    runs = facts.pop("runs_here", None)
    metadata = facts.pop("metadata")
    by_dtype = {name: readable(count) for name, count in facts.pop("bytes_by_dtype").items()}
    sizes = {"size": readable(facts.pop("bytes")), "by dtype": by_dtype}
    print_facts({name: value for name, value in (facts | sizes).items() if not name.startswith("gib")})
    if metadata:
        print("metadata:")
        for name, value in metadata.items():
            print(f"  {printable(name)}: {printable(value if len(value) <= 300 else value[:300] + ' ...')}")
    if runs:
        sys.stdout.flush()
        print(f"runs here: {runs} (by its header; values are checked when it is loaded)")
    return 0


def inspect_file(path: Path) -> dict[str, Any]:
    """What a safetensors file or folder is: kind, sizes, metadata, and what its kind has beside."""
    from ..formats.identify import READ, identify, likely_variant
    from ..formats.safetensors import open_tensors, tensor_bytes

    files = open_tensors(path)
    found = identify(files)
    dtypes: dict[str, int] = {}
    for dtype, shape in files.tensors.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + tensor_bytes(dtype, shape)
    variant = likely_variant(files) if found.role == "model" else None
    facts: dict[str, Any] = {
        "file": str(path),
        "format": found.what,
        **({"likely": f"Z-Image {variant}"} if variant else {}),
        "tensors": len(files.tensors),
        "bytes": sum(dtypes.values()),
        "bytes_by_dtype": dtypes,
        "gib": gib(sum(dtypes.values())),
        "gib_by_dtype": {name: gib(count) for name, count in dtypes.items()},
        "metadata": {name: " ".join(value.split()) for name, value in files.metadata.items()},
    }
    if found.role == "lora":
        facts |= lora_facts(path)
    elif found.role == "controlnet":
        facts |= control_facts(path, found.form.words)
    elif found.role == "model" and found.form.id in (*READ, "comfy-svdq"):
        facts |= model_facts(path, found.form)
    return facts


def lora_facts(path: Path) -> dict[str, Any]:
    """Which modules a LoRA changes, by which formats, and what of it is not used."""
    from ..lora.read import inspect as inspect_lora

    report = inspect_lora(path)
    return {
        "modules": report.transformer,
        "text_encoder_modules": report.text_encoder,
        "by_format": dict(report.formats),
        "keys_matched": len(report.matched),
        "unmatched": list(report.unmatched),
        "ignored": [f"{key} ({why})" for key, why in report.ignored.items()],
        "costs": list(report.costs),
        "warnings": list(report.warnings),
    }


def control_facts(path: Path, form: str) -> dict[str, Any]:
    """Variant, rank and sizes of a ControlNet, and what would run it here."""
    from ..formats.controlnet import build_controlnet, control_info, match_controlnet
    from ..formats.safetensors import open_tensors

    with open_tensors(path) as files:
        control = control_info(files)
        match_controlnet(files, control, build_controlnet(control))
    return {
        "format": f"ControlNet {control.variant}, {form}",
        "rank": control.rank or None,
        "places": " ".join(map(str, control.config.places)),
        "channels": control.config.channels,
        "width": control.config.base.dim,
        "runs_here": what_runs(quantized=bool(control.rank)),
    }


def model_facts(path: Path, form: Form) -> dict[str, Any]:
    """Rank and sizes of a transformer, and what would run it here."""
    from ..formats.load import check_transformer

    info = check_transformer(path)
    config = info.config
    words = {
        "svdq-int4": "SVDQuant INT4, group 64",
        "svdq-fp4": "SVDQuant NVFP4, group 16",
        "dense": f"dense {info.dtype}",
    }
    return {
        "format": words.get(form.id, form.words),
        "rank": info.rank or None,
        "quantized_refiners": info.quantized_refiners,
        "layers": config.n_layers,
        "refiner_layers": config.n_refiner_layers,
        "width": config.dim,
        "heads": config.n_heads,
        "ffn_width": config.ffn_dim,
        "caption_width": config.cap_feat_dim,
        "runs_here": what_runs(quantized=bool(info.rank), fp4=info.fp4),
    }
