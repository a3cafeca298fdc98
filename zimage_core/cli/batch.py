"""`zimage batch`: pictures for many prompts, one GPU or many, resumed by the same command."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    Commands,
    Parser,
    add_budget,
    add_models,
    add_precision,
    add_preset,
    add_runtime,
    add_size,
    pipeline_options,
    take_preset,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tqdm import tqdm

    from ..batch.cluster import ClusterRun
    from ..batch.driver import Run
    from ..batch.work import Result

EXIT_FAILED = 1
QUIET_S = 60.0  # between lines where stderr is no terminal
DEFAULTS = ("negative_prompt", "width", "height", "steps", "guidance", "seed", "strength")


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser(
        "batch",
        help="generate pictures for a file of prompts; the same command again does what is missing",
        description="Columns of a row: prompt, id, count, seed, width, height, steps, guidance, negative_prompt, lora "
        "(FILE:STRENGTH; ...), image, strength. Options of the same names hold for rows that lack them. Exit code 1 "
        "where rows failed.",
    )
    p.add_argument("file", help=".jsonl, .csv or .txt (a prompt a line), or - for standard input")
    p.add_argument("--out", required=True, help="folder, or a URL such as s3://bucket/folder")
    p.add_argument("--negative-prompt", help="what to avoid; needs guidance above 0")
    add_size(p)
    add_preset(p)
    p.add_argument("--seed", type=int, help="0 to 2^64 - 1, of every row without one (default: from the row's id)")
    p.add_argument("--guidance", type=float, help="0 to 100, ComfyUI's cfg less 1 (default as --preset)")
    p.add_argument("--strength", type=float, help="how far to go from a row's image, above 0 to 1 (default 0.6)")
    p.add_argument("--lora", action="append", metavar="FILE[:STRENGTH]", help="of rows without one; may be repeated")
    add_models(p)
    p.add_argument("--exact", action="store_true", help="one picture at a time, bit for bit what `generate` makes")
    p.add_argument("--gpus", metavar="all|0,1", help="a process for each of these GPUs (default: one GPU)")
    p.add_argument("--ray", metavar="auto|ADDRESS", help="workers on this Ray cluster; local starts one here")
    p.add_argument("--workers", type=pool, metavar="N|MIN-MAX", help="on Ray (default: as many as it has GPUs)")
    p.add_argument("--comfyui", metavar="URL", help="queue the rows in this ComfyUI, with the next three options")
    p.add_argument("--workflow", type=Path, metavar="API.json", help="exported in ComfyUI with File > Export (API)")
    p.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=COLUMN", help="where columns go; 5.seed=seed, say"
    )
    p.add_argument("--output", metavar="NODE", help="whose picture counts (default: the only one that shows any)")
    add_budget(p)
    add_runtime(p)
    add_precision(p)
    p.add_argument("--json", action="store_true", help="end with a line of counts")
    return p


def run(args: argparse.Namespace) -> int:
    """Generate what is missing, report failures, end with a summary."""
    begun = time.perf_counter()
    progress = Progress()
    started = start(args, progress)
    there = started.rows - started.missing
    if not args.quiet:
        print(
            f"{started.rows} pictures, {there} of them are there, {started.missing} to generate; {started.note}",
            file=sys.stderr,
        )
    generated = 0
    progress.begin(0 if args.quiet else started.missing)
    try:
        for result in started:
            generated += result.error is None
            progress.step(result)
    finally:
        progress.close()
    seconds = time.perf_counter() - begun
    rate = 60 * generated / seconds
    facts = {"rows": started.rows, "there": there, "generated": generated, "failed": started.failed}
    print(
        f"{args.out}: {generated} pictures generated in {seconds:.0f} s ({rate:.1f} a minute), {there} were there, "
        f"{started.failed} failed"
    )
    if args.json:
        print(json.dumps({**facts, "seconds": round(seconds, 2), "a_minute": round(rate, 2)}))
    return EXIT_FAILED if started.failed else 0


def start(args: argparse.Namespace, progress: Progress) -> Run | ClusterRun:
    """The run that the options ask for; all input is checked."""
    from ..batch import run

    if sum(map(bool, (args.ray, args.gpus, args.comfyui))) > 1:
        raise ValueError("--gpus, --ray and --comfyui are three ways to do the work; choose one")
    if args.workers and not args.ray:
        raise ValueError("--workers is for --ray; --gpus 0,1 starts a process for each of these GPUs")
    if args.comfyui:
        return start_comfyui(args, progress)
    if args.workflow or args.set or args.output:
        raise ValueError("--workflow, --set and --output are for --comfyui URL, whose queue they fill")
    take_preset(args)
    defaults: dict[str, Any] = {name: getattr(args, name) for name in DEFAULTS}
    if args.lora:
        defaults["lora"] = [str(Path(name).absolute()) for name in args.lora]
    return run(
        args.file,
        args.out,
        defaults=defaults,
        exact=args.exact,
        devices=gpus(args.gpus) if args.gpus else None,
        ray=args.ray,
        workers=args.workers,
        **pipeline_options(args),
    )


def start_comfyui(args: argparse.Namespace, progress: Progress) -> Run | ClusterRun:
    """The run in a ComfyUI server; options of the pipeline mean nothing there."""
    from ..batch import run
    from ..batch.comfyui import ComfyUI, WorkflowColumns, read_workflow

    if args.workflow is None:
        raise ValueError("--comfyui needs --workflow, a workflow exported in ComfyUI with File > Export (API)")
    given = [f"--{name}" for name in ("model", "lora", "preset", *DEFAULTS) if getattr(args, name) is not None]
    if given:
        raise ValueError(
            f"{given[0].replace('_', '-')} has no effect in ComfyUI; set it in the workflow, or by a column"
        )
    columns = WorkflowColumns(read_workflow(args.workflow), args.set)
    generator = ComfyUI(args.comfyui, args.workflow, args.output, progress.say)
    return run(args.file, args.out, generator=generator, columns=columns)


def pool(text: str) -> tuple[int, int]:
    """ "4" or "1-8" -> the least and the most workers."""
    least, dash, most = text.partition("-")
    found = int(least), int(most if dash else least)
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"expected N or MIN-MAX workers, found {text!r}")
    return found


def gpus(text: str) -> Sequence[str]:
    """ "all" or "0,2" -> devices; ValueError for anything else, and where there is no GPU."""
    import torch

    count = torch.cuda.device_count()
    if text == "all":
        if not count:
            raise ValueError("--gpus all: torch sees no GPU here; `zimage doctor` says why, without --gpus a CPU works")
        return [f"cuda:{i}" for i in range(count)]
    chosen = text.split(",")
    if not all(part.strip().isdigit() for part in chosen):
        raise ValueError(f"--gpus: expected all or numbers such as 0,1, found {text!r}")
    return [f"cuda:{int(part)}" for part in chosen]


class Progress:
    """Progress on stderr with rate and time left: a bar in a terminal, else a line a minute; failures as they come."""

    def __init__(self) -> None:
        self.bar: tqdm[None] | None = None

    def begin(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit=" pictures", file=sys.stderr, disable=total == 0)
        if not sys.stderr.isatty():
            self.bar.mininterval = self.bar.maxinterval = QUIET_S
            self.bar.ncols = 0

    def step(self, result: Result) -> None:
        if self.bar is not None:
            if result.error is not None:
                self.bar.write(f"zimage: {result.id}: {result.error}", file=sys.stderr)
            self.bar.update()

    def say(self, name: str, done: int, total: int) -> None:
        """How far the picture at hand is."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"{name} {done}/{total}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
