"""`zimage verify`: whether a model file and every way to run it here are right."""

from __future__ import annotations

import argparse
import json

from .options import Commands, Parser, add_device

EXIT_FAULT = 1


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("verify", help="check a model file and every backend on it, to be pasted into an issue")
    p.add_argument("model", nargs="?", help="transformer file or folder, or a whole diffusers folder (default: demo)")
    p.add_argument("--text-encoder", help="Qwen3-4B folder or safetensors file")
    p.add_argument("--tokenizer", help="tokenizer.json or its folder (default: beside the text encoder)")
    p.add_argument("--vae", help="VAE file or folder")
    p.add_argument("--size", type=int, help="pixels of an edge of the picture (default 1024; 256 with the demo)")
    add_device(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Print the report, as the last line the same as JSON; 1 where a check failed."""
    from ..verify import verify

    report = verify(
        args.model, args.text_encoder, args.vae, tokenizer=args.tokenizer, device=args.device, size=args.size
    )
    facts = report.facts
    print(f"{facts['model']} on {facts['device']}, {facts['runs']}, torch {facts['torch']}, {facts['date']}")
    for check in report.checks:
        print(f"{'ok   ' if check.ok else 'FAULT'} {check.name}: {check.found} (expected {check.expected})")
    print("everything is as it should be" if report.ok else "something is wrong: please report all of this")
    print(json.dumps({"benchmark": "verify", **report.as_json()}))
    return 0 if report.ok else EXIT_FAULT
