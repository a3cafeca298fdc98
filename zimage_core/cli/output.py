"""What several commands write: a progress bar, PNG files, tables of facts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..sizes import GIB

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

MOST_PICTURES = 10_000


class Progress:
    """A bar on stderr for the current stage; silent where stderr is no terminal."""

    def __init__(self, layout: str = "{desc:<18} |{bar:28}| {n_fmt}/{total_fmt} {elapsed}"):
        self.layout = layout
        self.bar: tqdm | None = None

    def start(self, name: str, steps: int) -> None:
        from tqdm import tqdm

        self.finish()
        self.bar = tqdm(total=steps, desc=name, bar_format=self.layout, disable=None, file=sys.stderr)

    def step(self, done: int, total: int, *_: object) -> None:
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

    def say(self, words: str) -> None:
        """Show a few words where the layout has `{postfix}`."""
        if self.bar is not None:
            self.bar.set_postfix_str(words, refresh=False)

    def finish(self) -> None:
        if self.bar is not None:
            self.step(self.bar.total, self.bar.total)
            self.bar.close()
            self.bar = None


def output_paths(out: Path | None, batch: int) -> list[Path]:
    """Where the pictures of a batch go, empty where each is named after its seed. Raises ValueError before any work."""
    if batch > MOST_PICTURES:
        raise ValueError(f"--batch: expected up to {MOST_PICTURES} pictures, found {batch}; `zimage batch` makes more")
    if out is None:
        return []
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: pictures are written as PNG; name a file that ends in .png")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it first")
    if batch == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(batch)]


def save_png(picture: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Write a PNG with text chunks under a temporary name, then rename it."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in {**texts, "Software": f"zimage-int4 {__version__}"}.items():
        info.add_text(name, text)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(part, format="PNG", pnginfo=info)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
