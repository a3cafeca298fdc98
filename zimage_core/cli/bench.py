"""`zimage bench`: timings of this machine."""

from __future__ import annotations

import argparse

from .options import Commands, Parser, add_device


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("bench", help="time linears and a step on this machine, to be pasted into an issue")
    p.add_argument("--model", help="transformer file (default: random weights, of the demo's size on a CPU)")
    add_device(p)
    p.add_argument("--size", type=int, help="pixels of an edge (default 1024, 256 on a CPU)")
    return p


def run(args: argparse.Namespace) -> int:
    """Print tables of timings, and as the last line the same as JSON."""
    from ..bench import bench

    bench(args.model, args.device, args.size)
    return 0
