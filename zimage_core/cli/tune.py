"""`zimage tune`: time the ways to run linears on this GPU anew."""

from __future__ import annotations

import argparse
import json

from .options import Commands, Parser, add_device
from .output import print_facts


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("tune", help="time the ways to run INT4 linears on this GPU anew, for --backend auto")
    add_device(p)
    p.add_argument("--dtype", help="bfloat16, float16 or float32 (default as the other commands have it)")
    p.add_argument("--json", action="store_true", help="as one JSON object")
    return p


def run(args: argparse.Namespace) -> int:
    """Try and time every way, keep the figures for later runs, and print them."""
    from ..device import choose_device, choose_dtype
    from ..tune import describe, known, select

    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    if device.type != "cuda":
        raise ValueError(f"device {device}: expected a GPU of NVIDIA or AMD; elsewhere plain torch is all that runs")
    record = known(device, dtype, anew=True)
    if record is None:
        raise ValueError(f"device {device}: nothing could be timed there, as the line above says")
    chosen = select(device=device, dtype=dtype)
    if args.json:
        print(json.dumps({**record, "auto": f"{chosen.name} {chosen.precision}"}))
    else:
        auto = f"{chosen.name} {chosen.precision}"
        print_facts({**record["key"], "auto": auto, "ways": describe(record), "seconds": record["seconds"]})
    return 0
