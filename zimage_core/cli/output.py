"""What several commands write: a progress bar, PNG files, tables of facts."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from .. import whole
from ..metadata import FORMATS
from ..sizes import GIB

if TYPE_CHECKING:
    from tqdm import tqdm

MOST_PICTURES, MOST_LETTERS = 10_000, 60  # of a call; of a prompt in a file's name
EVERY = 10.0  # seconds between lines of progress where there is no terminal

logger = logging.getLogger(__name__)


class Progress:
    """The current stage on stderr: a bar on a terminal, elsewhere a line now and then; nothing with --quiet."""

    def __init__(self, layout: str = "{desc:<18} |{bar:28}| {n_fmt}/{total_fmt} {elapsed}"):
        self.layout = layout
        self.quiet = not logger.isEnabledFor(logging.WARNING)
        self.bar: tqdm | None = None
        self.name = self.words = ""
        self.began = self.said = 0.0

    def start(self, name: str, steps: int) -> None:
        self.finish()
        self.name, self.words = name, ""
        self.began = self.said = time.monotonic()
        if sys.stderr.isatty() and not self.quiet:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, desc=name, bar_format=self.layout, file=sys.stderr)

    def step(self, done: int, total: int, *_: object) -> None:
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)
        elif not self.quiet and done < total and (now := time.monotonic()) - self.said >= EVERY:
            self.said = now
            minutes, seconds = divmod(round(now - self.began), 60)
            parts = (f"{self.name} {done}/{total}", f"{minutes}:{seconds:02}", self.words)
            print(f"zimage: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)

    def say(self, words: str) -> None:
        """Show a few words where the layout has `{postfix}`."""
        self.words = words
        if self.bar is not None:
            self.bar.set_postfix_str(words, refresh=False)

    def finish(self) -> None:
        if self.bar is not None:
            self.step(self.bar.total, self.bar.total)
            self.bar.close()
            self.bar = None


def check_outputs(out: Path | None, count: int) -> None:
    """ValueError, before any work, for what is no picture's name, and where its first and last could not be written."""
    if count > MOST_PICTURES:
        raise ValueError(f"--batch: expected up to {MOST_PICTURES} pictures, found {count}; `zimage batch` makes more")
    if out is None:
        return whole.check_target(Path("zimage-0.png"))
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"{out}: pictures are written as PNG, WebP or JPEG; name a file that ends in .png")
    for name in set(re.findall(r"{(.*?)}", out.name)) - {"seed", "index", "prompt"}:
        raise ValueError(f"{out}: expected {{seed}}, {{index}} or {{prompt}} in braces, found {{{name}}}")
    for index in {1, max(count, 1)}:
        whole.check_target(output_path(out, index, count, 0, "prompt"))


def output_path(out: Path, index: int, count: int, seed: int, prompt: str) -> Path:
    """Where picture `index`, from 1 on, of `count` goes: seed, index and the prompt's letters where the name has them.

    Without seed and index in it the name of one of several ends in -INDEX.
    """
    words = re.sub(r"\W+", "-", prompt)[:MOST_LETTERS].strip("-") or "picture"
    name = out.name if count == 1 or re.search("{seed}|{index}", out.name) else f"{out.stem}-{{index}}{out.suffix}"
    for key, value in (("{seed}", seed), ("{index}", index), ("{prompt}", words)):
        name = name.replace(key, str(value))
    return out.with_name(name)


def free_name(seed: int | None) -> Path:
    """`zimage-SEED.png`, or with the first number behind it that is free: what is there stays."""
    names = (Path(f"zimage-{seed}{number}.png") for number in chain([""], (f"-{n}" for n in count(2))))
    return next(name for name in names if not os.path.lexists(name))


def printable(text: str) -> str:
    """A text with its control characters escaped, as they could steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_facts(facts: Mapping[str, object]) -> None:
    """Print a table of names and values, lists and nested tables indented."""
    for name, value in facts.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            print(f"{label}:")
            for key, inner in value.items():
                print(f"  {printable(str(key))}: {printable(str(inner))}")
        elif isinstance(value, list):
            print(f"{label}: {printable('; '.join(map(str, value))) or 'none'}")
        else:
            print(f"{label}: {'none' if value is None else printable(str(value))}")


def gib(count: int | None) -> float | None:
    """Bytes as GiB, for JSON; None for None."""
    return None if count is None else round(count / GIB, 3)
