"""`--from PICTURE`: the options of `zimage generate` that a picture's facts hold, applied again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import metadata

PLAIN = (
    *("negative_prompt", "width", "height", "steps", "guidance", "seed", "batch"),
    *("model", "text_encoder", "tokenizer", "vae", "image", "strength", "mask"),
    *("feather", "sampler", "schedule", "shift", "nag_scale", "nag_tau", "nag_alpha"),
    *("max_tokens", "upscale", "device", "vram_budget", "dtype", "backend", "precision"),
)
LISTS = ("lora", "control", "control_image", "pad", "variety")


def options(args: argparse.Namespace, **resolved: object) -> list[str]:
    """The options that make the same pictures again, as `--name=value`, with files as they were named.

    resolved: the values that `auto` took in this run.
    """
    values = vars(args) | {name: value for name, value in resolved.items() if value is not None}
    found = [f"--{name.replace('_', '-')}={values[name]}" for name in PLAIN if values[name] is not None]
    found += [f"--lora={path}:{strength}" for path, strength in args.lora]
    found += [f"--control={path}:{strength}:{start}-{end}" for path, strength, start, end in args.control]
    found += [f"--control-image={path}" for path in args.control_image]
    found += ["--pad=" + ",".join(map(str, args.pad))] if args.pad else []
    found += ["--variety=" + ":".join(map(str, args.variety))] if args.variety else []
    return found + ["--canny"] * args.canny


class Restore(argparse.Action):
    """`--from PICTURE`: takes its prompts and options, except those given on the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            prompts, stored = read(Path(str(values)))
            found = parser.parse_args(stored)
        except ValueError as error:
            parser.error(f"{option_string} {error}")
        for name, value in vars(found).items():
            if getattr(namespace, name, None) == parser.get_default(name):
                setattr(namespace, name, value)
        namespace.restored = prompts


def read(path: Path) -> tuple[list[str], list[str]]:
    """The prompts and options stored in a picture. ValueError if there are none, or options of another program."""
    from ..pictures import open_picture

    with open_picture(path) as picture:
        text = metadata.text(picture)
    try:
        facts = metadata.parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    prompts, stored = facts.get("prompts", [facts.get("prompt")]), facts.get("options")
    known = [f"--{name.replace('_', '-')}=" for name in (*PLAIN, *LISTS)]
    texts = [*prompts, *stored] if isinstance(prompts, list) and isinstance(stored, list) else [None]
    if not all(isinstance(text, str) for text in texts) or not stored:
        raise ValueError(f"{path}: expected a picture that tells how `zimage generate` made it, found another")
    for option in stored:
        if option != "--canny" and not option.startswith(tuple(known)):
            raise ValueError(f"{path}: expected options of `zimage generate`, found {option!r:.60}")
    return prompts, stored
