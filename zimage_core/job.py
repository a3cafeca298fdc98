"""What one call of a pipeline asks for, and what it returns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from . import sampler
from .captions import Caption
from .control import Control, Edit
from .failures import integer, number, within
from .linear.backends import Backend
from .lora.read import Lora, Loras, load_lora
from .memory import plan as planning
from .models.config import SHIFT, ZImageConfig
from .models.guidance import Nag
from .models.tokenizer import MAX_TOKENS
from .models.transformer import PIXELS_PER_CELL
from .recorder import Recorder, StageRecord
from .sizes import MAX_SIDE, MULTIPLE, check_multiple
from .tiles import Tiles
from .variety import Variety, seed_of

if TYPE_CHECKING:
    import numpy
    from PIL import Image

MAX_PIXELS = 2**31  # of all pictures of a call, whose noise is then 2 GiB
MIN_TILE, MIN_TOKENS, MAX_GUIDANCE = 128, 16, 100
MAX_UPSCALE, LARGEST_WHOLE, TILE = 8, 2048, 1024
"""Of enlarged pictures: the factor; pixels of an edge up to which one is sampled whole, and of its tiles beyond."""
OUTPUTS = ("pil", "np", "pt", "latent")
OnStep: TypeAlias = "Callable[[int, int, Tensor], bool | None]"
LoraChoice = Iterable[tuple[str | Path | Lora, float]]


logger = logging.getLogger(__name__)

T = TypeVar("T")


class Pictures(list[Any]):
    """The pictures of one call, PIL's unless it asked for others, and what the call did.

    seeds: one for each picture, None where generators or latents were given. stages: what each took. plan: as it was in
    the end. backend: that of the transformer, None for a dense one.
    """

    def __init__(
        self,
        pictures: list[Image.Image] | numpy.ndarray | Tensor,
        seeds: list[int] | None,
        stages: list[StageRecord],
        plan: planning.Plan,
        backend: Backend | None,
    ):
        super().__init__(pictures)
        self._whole = pictures
        self.seeds, self.stages, self.plan, self.backend = seeds, stages, plan, backend

    @property
    def images(self) -> list[Image.Image] | numpy.ndarray | Tensor:
        """The pictures as diffusers gives them: a list, or one array or tensor of all."""
        return self if isinstance(self._whole, list) else self._whole


@dataclass
class Job:
    """What one call asks for, and what has been computed for it so far.

    noise (B, 16, H/8, W/8) and seeds: as `sampler.starting_noise` gives them. images: pictures to start from. negative:
    with guidance or nag, one for all prompts or one for each. each: pictures of every prompt. sampler: one of
    `sampler.SAMPLERS`; shift: that of the sigmas. tile: pixels of an edge, None for whole pictures. limit: tokens of a
    prompt. output: one of OUTPUTS. on_step, on_step_end: as `sampler.denoise` takes them. feats: cap_feats (L, C) on
    the host of the prompts that are encoded; tokens: token ids of the others.
    """

    positive: Sequence[Caption]
    each: int
    height: int
    width: int
    loras: Loras
    record: Recorder
    noise: Tensor = field(default_factory=lambda: torch.empty(0))
    seeds: list[int] | None = None
    images: Sequence[Image.Image] = ()
    negative: Sequence[Caption] = ()
    guidance: float = 0.0
    nag: Nag | None = None
    variety: Variety | None = None
    sampler: str = "euler"
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0))
    shift: float = SHIFT
    tile: int | None = None
    limit: int = MAX_TOKENS
    controls: tuple[Control, ...] = ()
    edit: Edit | None = None
    output: str = "pil"
    on_step: OnStep | None = None
    on_step_end: Callable[[int, Tensor, Tensor], Tensor] | None = None
    feats: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    plan: planning.Plan = field(init=False)

    @property
    def texts(self) -> list[str]:
        """The prompts that are text."""
        return [caption for caption in (*self.positive, *self.negative) if isinstance(caption, str)]

    @property
    def pictures(self) -> int:
        return len(self.positive) * self.each

    @property
    def pixels(self) -> int:
        """Of all pictures."""
        return self.pictures * self.height * self.width

    @property
    def controlnets(self) -> list[Path]:
        """The file of each control's ControlNet."""
        return [Path(control.model) for control in self.controls]

    def request(self) -> planning.Request:
        """The call's sizes, for a plan."""
        known: dict[str, Tensor | list[int]] = {**self.tokens, **self.feats}
        positive, negative = (
            [len(known[one] if isinstance(one, str) else one) for one in captions]
            for captions in (self.positive, self.negative)
        )
        return planning.Request(
            height=self.height,
            width=self.width,
            pictures=self.pictures,
            captions=self._for_each(positive),
            negative=self._for_each(negative),
            encoded=max(map(len, self.tokens.values()), default=0),
            guided=self.guidance > 0,
            nag=self.nag,
            varied=self.variety is not None,
            tile=self.tile and self.tile // PIXELS_PER_CELL,
        )

    def check_embeds(self, width: int) -> None:
        """ValueError if features that the call was given have another width."""
        for one in (*self.positive, *self.negative):
            if isinstance(one, Tensor) and one.shape[1] != width:
                raise ValueError(f"prompt embeds: expected (tokens, {width}), found {tuple(one.shape)}")

    def features(self, captions: Sequence[Caption]) -> list[Tensor]:
        """cap_feats of captions: one for all pictures, or one for each."""
        return self._for_each([self.feats[one] if isinstance(one, str) else one for one in captions])

    def varied(self, variety: Variety) -> list[Tensor]:
        """Perturbed cap_feats of the prompts, one for each picture, whose noise they follow."""
        found = self.features(self.positive)
        found = found * self.pictures if len(found) == 1 else found
        return [variety.vary(feats, seed_of(one)) for feats, one in zip(found, self.noise)]

    @property
    def tiles(self) -> Tiles:
        """The tiles of a picture, in cells; a single one where it is sampled whole."""
        height, width = self.height // PIXELS_PER_CELL, self.width // PIXELS_PER_CELL
        return Tiles.over(height, width, (self.tile or MAX_SIDE) // PIXELS_PER_CELL)

    def _for_each(self, found: list[T]) -> list[T]:
        return found if len(found) < 2 else [one for one in found for _ in range(self.each)]


def enlarged_size(width: int, height: int, factor: float) -> tuple[int, int, int | None]:
    """Height and width of an enlarged picture, and the edge of its tiles, None if it is sampled whole.

    ValueError for a factor outside 1 to 8 and sides above `picture_size`'s.
    """
    within("upscale", factor, 1, MAX_UPSCALE)
    tall, wide = (max(round(side * factor / MULTIPLE), 1) * MULTIPLE for side in (height, width))
    height, width = picture_size(tall, wide, (width, height))
    return height, width, TILE if max(height, width) > LARGEST_WHOLE else None


def enlarged(job: Job, factor: float, sigmas: Tensor) -> Job:
    """The job that redraws another job's pictures, still without them, at a larger size.

    Errors are those of `enlarged_size` and `check_count`.
    """
    height, width, tile = enlarged_size(job.width, job.height, factor)
    count = check_count(len(job.positive), job.each, height, width)
    noise, seeds = sampler.starting_noise(job.seeds, count, height, width)
    job = replace(job, height=height, width=width, tile=tile)
    return replace(job, noise=noise, seeds=seeds, sigmas=sigmas, edit=None, images=())


def load_loras(loras: LoraChoice) -> Loras:
    """LoRAs with their strengths; files are read. ValueError for anything but pairs of the two."""
    try:
        pairs: list[Any] = list(loras)
    except TypeError:
        pairs = [loras]
    found = []
    for pair in pairs:
        try:
            lora, strength = pair if isinstance(pair, tuple | list) else ()
            strength = float(strength)
        except (TypeError, ValueError, OverflowError):
            lora = None
        if not isinstance(lora, Lora | str | Path):
            raise ValueError(f"loras: expected pairs of a file or Lora and its strength, found {pair!r:.100}")
        found.append((lora if isinstance(lora, Lora) else load_lora(lora), strength))
    return tuple(found)


def choose_noise(
    generator: sampler.Seeds, latents: Any, count: int, height: int, width: int
) -> tuple[Tensor, list[int] | None]:
    """The noise of a call and its seeds (see `sampler.starting_noise`), or the latents that it was given and None.

    ValueError unless such latents are finite and of the call's shape.
    """
    if latents is None:
        return sampler.starting_noise(generator, count, height, width)
    if generator is not None:
        logger.warning("generator: has no effect beside latents")
    shape = (count, ZImageConfig.in_channels, height // PIXELS_PER_CELL, width // PIXELS_PER_CELL)
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape or not latents.isfinite().all():
        found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents: expected a finite tensor {shape}, found {found}")
    return latents.detach().float().cpu(), None


def choose_sigmas(
    steps: int, sigmas: Iterable[float] | None, strength: float, image: bool, masked: bool, shift: float, schedule: str
) -> Tensor:
    """The sigmas of a call. image, masked: whether it starts from a picture, and has a mask.

    Logs a warning if strength or picture has no effect.
    """
    within("strength", strength, 0, 1, "0.6 keeps much of the picture, 1 nothing", above=True)
    if strength != 1 and (sigmas is not None or not image):
        logger.warning(
            "strength %g: has no effect %s", strength, "beside sigmas" if image else "without a picture to start from"
        )
    if image and strength == 1 and sigmas is None and not masked:
        logger.warning("image: nothing of it is kept at strength 1; 0.6 keeps much of it")
    if sigmas is not None:
        integer("steps", steps)  # their number has no effect then, another type is a mistake all the same
        return sampler.read_sigmas(sigmas, shift)
    return sampler.get_sigmas(steps, strength if image else 1.0, shift, schedule)


def read_variety(asked: float | Variety) -> Variety | None:
    """A `Variety`, also from its strength alone; None for a strength of 0."""
    found = asked if isinstance(asked, Variety) else Variety(number("variety", asked))
    return found if found.strength else None


def check_tile(edge: object) -> int | None:
    """The most pixels of a tile's edge, None for whole pictures. ValueError unless a multiple of 16 from 128 on."""
    if edge is None:
        return None
    if (pixels := integer("tile", edge)) < MIN_TILE or pixels % MULTIPLE:
        raise ValueError(f"tile: expected a multiple of {MULTIPLE} pixels from {MIN_TILE} on, found {edge}")
    return pixels


def check_limit(tokens: object) -> int:
    """The most tokens of a prompt. ValueError unless from 16 to what the model's positions hold."""
    name, most = "max_sequence_length", ZImageConfig.axes_lens[0]
    within(name, integer(name, tokens), MIN_TOKENS, most, f"{MAX_TOKENS} tokens are what the model was made for")
    return integer(name, tokens)


def check_call(name: str, found: T) -> T:
    """A function that a call was given, or None. ValueError, under its name, for anything else."""
    if found is not None and not callable(found):
        raise ValueError(f"{name}: expected a function, found {found!r:.100}")
    return found


def check_count(positive: int, each: int, height: int, width: int, images: Sequence[Image.Image] = ()) -> int:
    """The number of pictures of a call. ValueError for none, for more than their noise may take, and where there are
    images to start from, but neither one for all nor one for each."""
    if integer("num_images_per_prompt", each) < 1 or not positive:
        raise ValueError(f"pictures: expected at least 1, found {each} of {positive} prompts")
    most = max(MAX_PIXELS // (height * width), 1)
    if positive * each > most:
        raise ValueError(f"pictures: expected up to {most} of {width} x {height} in a call, found {positive * each}")
    if len(images) > 1 and len(images) != positive * each:
        raise ValueError(f"image: expected 1, or {positive * each} as there are pictures, found {len(images)}")
    return positive * each


def own_size(images: Sequence[Image.Image], latents: Any, side: int) -> tuple[int, int]:
    """Width and height of the picture or latents that a call starts from, else the model's own `side` twice."""
    if images:
        return images[0].size
    if isinstance(latents, Tensor) and latents.ndim == 4:
        return PIXELS_PER_CELL * latents.shape[3], PIXELS_PER_CELL * latents.shape[2]
    return side, side


def picture_size(height: int | None, width: int | None, own: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels; left out, those of `own` (width, height), cut to multiples of 16.

    Raises ValueError for others than positive multiples of 16.
    """
    sides = []
    for name, side, default in (("height", height, own[1]), ("width", width, own[0])):
        side = check_multiple(name, default // MULTIPLE * MULTIPLE if side is None else integer(name, side))
        if side > MAX_SIDE:
            raise ValueError(
                f"{name}: expected up to {MAX_SIDE} pixels, found {side}; 1024 is what the model was made for"
            )
        sides.append(side)
    return sides[0], sides[1]
