"""What one call of a pipeline asks for, and what it returns."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .control import Control, Edit
from .linear.backends import Backend
from .lora.read import Lora, load_lora
from .memory import plan as planning
from .recorder import Recorder, StageRecord
from .residents import Loras

if TYPE_CHECKING:
    from PIL import Image

PIXELS_MULTIPLE = 16
MAX_SIDE, MAX_PIXELS = 2**14, 2**31
"""Of one picture's edge, and of all pictures of a call, whose noise is then 2 GiB."""
LoraChoice = Iterable[tuple[str | Path | Lora, float]]


class Pictures(list["Image.Image"]):
    """The pictures (PIL) of one call, and what the call did.

    seeds: one for each picture, None where a generator was given. stages: what each took. plan: as it was in the end.
    backend: that of the transformer, None for a dense one.
    """

    def __init__(
        self,
        pictures: Iterable[Image.Image],
        seeds: list[int] | None,
        stages: list[StageRecord],
        plan: planning.Plan,
        backend: Backend | None,
    ):
        super().__init__(pictures)
        self.seeds, self.stages, self.plan, self.backend = seeds, stages, plan, backend

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, under the name that diffusers gives them."""
        return self


@dataclass
class Job:
    """What one call asks for, and what is known of it so far.

    texts: the prompts, `positive` many, and behind them the negative one where there is guidance. each: pictures of
    every prompt. feats: cap_feats (L, C) on the host of the texts that are known; tokens: token ids of the others.
    """

    texts: list[str]
    positive: int
    each: int
    height: int
    width: int
    loras: Loras
    record: Recorder
    controls: tuple[Control, ...] = ()
    edit: Edit | None = None
    feats: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    plan: planning.Plan = field(init=False)

    @property
    def guided(self) -> bool:
        return len(self.texts) > self.positive

    @property
    def pictures(self) -> int:
        return self.positive * self.each

    def request(self) -> planning.Request:
        """The call's sizes, for a plan."""
        counts = [len(self.feats[text] if text in self.feats else self.tokens[text]) for text in self.texts]
        return planning.Request(
            height=self.height,
            width=self.width,
            pictures=self.pictures,
            captions=counts[: self.positive] * (self.each if self.positive > 1 else 1),
            negative=counts[-1] if self.guided else None,
            encoded=max(map(len, self.tokens.values()), default=0),
        )

    @property
    def captions(self) -> list[Tensor]:
        """cap_feats of the prompts: one for all pictures, or one for each."""
        found = [self.feats[text] for text in self.texts[: self.positive]]
        return found if len(found) == 1 else [feats for feats in found for _ in range(self.each)]


def load_loras(loras: LoraChoice) -> Loras:
    """LoRAs and their strengths, read where files are given. ValueError for anything but pairs of the two."""
    found = []
    for pair in loras:
        try:
            lora, strength = pair
            number = float(strength)
            wrong = isinstance(pair, str)
        except (TypeError, ValueError):
            wrong = True
        if wrong or not isinstance(lora, Lora | str | Path):
            raise ValueError(f"loras: expected pairs of a file or Lora and its strength, found {pair!r}")
        found.append((lora if isinstance(lora, Lora) else load_lora(lora), number))
    return tuple(found)


def check_texts(prompt: Any, negative: Any) -> list[str]:
    """The prompts as a list. ValueError unless they and the negative prompt, if any, are text that is Unicode."""
    prompts = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
    others = [] if negative is None else [("negative prompt", negative)]
    for name, text in [*(("prompt", text) for text in prompts), *others]:
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected text, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}: expected UTF-8 text, found other bytes; save or type it as UTF-8") from None
    return prompts


def integer(name: str, found: object) -> int:
    """An integer. ValueError, under its name, for anything else."""
    try:
        return operator.index(found)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}: expected an integer, found {found!r}") from None


def number(name: str, found: object) -> float:
    """A finite number. ValueError, under its name, for anything else."""
    if not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"{name}: expected a number, found {found!r}")
    return found


def encoder_loras(loras: Loras) -> Loras:
    """Those that change the text encoder."""
    return tuple((found, strength) for found, strength in loras if found.text_encoder)


def picture_size(height: int | None, width: int | None, own: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels; left out, those of `own` (width, height), cut to multiples of 16.

    Raises ValueError for others than positive multiples of 16.
    """
    sides = []
    for name, side, default in (("height", height, own[1]), ("width", width, own[0])):
        side = default // PIXELS_MULTIPLE * PIXELS_MULTIPLE if side is None else integer(name, side)
        if side < PIXELS_MULTIPLE or side % PIXELS_MULTIPLE:
            below = max(side // PIXELS_MULTIPLE, 1) * PIXELS_MULTIPLE
            raise ValueError(
                f"{name}: expected a multiple of {PIXELS_MULTIPLE} pixels, found {side}; the nearest are {below} "
                f"and {below + PIXELS_MULTIPLE}"
            )
        if side > MAX_SIDE:
            raise ValueError(
                f"{name}: expected up to {MAX_SIDE} pixels, found {side}; 1024 is what the model was made for"
            )
        sides.append(side)
    return sides[0], sides[1]
