"""`zimage doctor`: what this machine can run, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..sizes import GIB
from .options import Commands, Parser
from .output import print_facts

if TYPE_CHECKING:
    import torch

PACKAGES = ("safetensors", "transformers", "huggingface_hub", "diffusers", "triton", "comfy-kitchen", "nunchaku")


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("doctor", help="what this machine can run, and why not")
    p.add_argument("--json", action="store_true", help="as one JSON object")
    return p


def run(args: argparse.Namespace) -> int:
    """Print what this machine has and can run."""
    facts = diagnose()
    if args.json:
        print(json.dumps(facts))
    else:
        print_facts(facts)
    return 0 if facts["torch"] else 1


def diagnose() -> dict[str, object]:
    """Python, torch, GPUs, packages, and every backend with the reason why it cannot be used."""
    facts: dict[str, object] = {
        "zimage-int4": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": None,
        "packages": {name: package_state(name) for name in PACKAGES},
    }
    if importlib.util.find_spec("torch") is None:
        facts["remedy"] = "torch is missing; install it as https://pytorch.org says for this machine"
        return facts
    import torch

    from ..device import choose_device, choose_dtype, dtype_name
    from ..linear.backends import report

    device = choose_device(None)
    dtype = choose_dtype(None, device)
    facts["torch"] = torch.__version__
    facts["cuda"] = torch.version.cuda
    facts["gpus"] = [gpu_state(i) for i in range(torch.cuda.device_count())]
    facts["device"] = str(device)
    facts["dtype"] = dtype_name(dtype)
    facts["backends"] = {
        name: reason or f"available ({', '.join(precisions)})" for name, reason, precisions in report(device, dtype)
    }
    if torch.version.cuda is None and torch.version.hip is None and (card := nvidia_card()):
        facts["remedy"] = (
            f"NVIDIA card, CPU-only torch ({card}): pip install torch --index-url "
            "https://download.pytorch.org/whl/cu130 --force-reinstall"
        )
    facts["auto"] = what_runs(quantized=True)
    if ways := timed_ways(device, dtype):
        facts["ways"] = ways
    return facts


def what_runs(quantized: bool, fp4: bool = False) -> str:
    """The device, backend and precision that `auto` would choose on this machine."""
    from ..device import choose_device, choose_dtype, dtype_name

    device = choose_device(None)
    dtype = choose_dtype(None, device)
    where = f"on {device} in {dtype_name(dtype)}"
    if not quantized:
        return where
    from ..tune import select

    backend = select("auto", "auto", device=device, dtype=dtype, fp4=fp4)
    return f"{backend.name} {backend.precision} {where}"


def timed_ways(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """How each way to run the linears did on a GPU, from which `auto` takes the fastest."""
    from ..tune import describe, known

    record = known(device, dtype) if device.type == "cuda" else None
    return describe(record) if record else {}


def nvidia_card() -> str | None:
    """The name of an NVIDIA card that the driver reports, even if torch does not see it."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    first = listed.partition("\n")[0]
    return first.partition(": ")[2].partition(" (UUID")[0] or None


def gpu_state(index: int) -> str:
    """Name, compute capability and memory of a GPU."""
    import torch

    gpu = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def package_state(name: str) -> str:
    """A package's version, or why it is of no use here."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    if name == "nunchaku" and not is_nunchaku_engine():
        return (
            f"{version}, but this is the unrelated statistics library of that name from PyPI, "
            "not the inference engine; it is not used"
        )
    return version


def is_nunchaku_engine() -> bool:
    """Whether the installed package called nunchaku is the inference engine, by its files."""
    spec = importlib.util.find_spec("nunchaku")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return any((folder / "models").is_dir() or any(folder.glob("_C.*")) for folder in folders)
