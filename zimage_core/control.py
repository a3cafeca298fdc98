"""What a call asks of ControlNets and masks, at the size that is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .failures import integer, number, within
from .formats.controlnet import control_info
from .models.controlnet import MASKED_CHANNELS, control_context, inpainting_picture
from .models.transformer import PIXELS_PER_CELL
from .pictures import (
    FEATHER,
    check_mask,
    checked_picture,
    control_picture,
    fit,
    mask_tensor,
    repainted_cells,
    soften,
    to_tensor,
)
from .sizes import MAX_SIDE

if TYPE_CHECKING:
    from PIL import Image

MAX_STRENGTH = 100


@dataclass(frozen=True)
class Control:
    """A ControlNet's part in a generation.

    image: the control picture (outlines, depth, a pose ...), stretched to the generated size; None with a ControlNet
    that only repaints what the call's mask marks. model: its file. strength multiplies what it adds, 0 turns it off.
    start, end: the part of the way from noise (0) to picture (1) in which it works. Raises ValueError for numbers
    outside of that.
    """

    image: Image.Image | None
    model: str | Path
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        checked_picture("control", self.image)
        if not isinstance(self.model, str | Path):
            raise ValueError(f"control: expected the file of a ControlNet, found {self.model!r:.100}")
        within("control strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH, "0.6 to 1 are usual")
        if not 0 <= number("control start", self.start) < number("control end", self.end) <= 1:
            raise ValueError(f"control range: expected 0 <= start < end <= 1, found {self.start} to {self.end}")


@dataclass(frozen=True)
class Edit:
    """A picture that is repainted in part, at the generated size.

    mask (1, 1, H, W) is 1 where it is repainted; soft has the edges in which old and new are mixed, and is 0 beyond.
    """

    source: Image.Image
    mask: Tensor
    soft: Tensor

    @property
    def cells(self) -> Tensor:
        """(1, 1, h, w), 1 in the latents' cells that change."""
        return repainted_cells(self.soft)


def make_edit(
    images: Sequence[Image.Image], mask: Image.Image, width: int, height: int, feather: int = FEATHER
) -> Edit:
    """A picture and its mask, cropped and resized to a size. ValueError unless there is one, or as `check_mask`."""
    from PIL import ImageOps

    if len(images) != 1:
        count = f", found {len(images)}" if images else ""
        raise ValueError(f"mask: a picture to repaint is needed with it{count}; name it with --image (image=)")
    (image,) = images
    within("feather", integer("feather", feather), 0, MAX_SIDE)
    gray = check_mask(mask, image)
    found = mask_tensor(ImageOps.fit(gray, (width, height)))
    return Edit(fit(image, width, height), found, soften(found, feather))


def check_controls(controls: Control | Sequence[Control] | None, masked: bool) -> tuple[Control, ...]:
    """The controls that do something. ValueError unless each has a picture, or a mask and the channels for it."""
    given = controls if isinstance(controls, list | tuple) else () if controls is None else (controls,)
    for control in given:
        if not isinstance(control, Control):
            raise ValueError(f"control: expected one Control or several, found {control!r:.100}")
    kept = tuple(control for control in given if control.strength)
    for control in kept:
        info = control_info(control.model)
        if control.image is None and not (masked and info.config.channels == MASKED_CHANNELS):
            needed = "a control picture, or a mask" if info.config.channels == MASKED_CHANNELS else "a control picture"
            raise ValueError(f"{control.model}: ControlNet {info.variant} needs {needed}; name it with --control-image")
    return kept


def control_contexts(
    controls: Iterable[Control], edit: Edit | None, width: int, height: int, encode: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """The control context (1, C, h, w) of each; encode gives latents (1, 16, h, w) of a picture (1, 3, H, W)."""
    size = height // PIXELS_PER_CELL, width // PIXELS_PER_CELL
    kept = None
    contexts = []
    for control in controls:
        latents = None
        if control.image is not None:
            latents = encode(to_tensor(control_picture(control.image, width, height)))
        channels = control_info(control.model).config.channels
        if edit is None or channels != MASKED_CHANNELS:
            contexts.append(control_context(channels, size, latents))
            continue
        if kept is None:
            kept = encode(inpainting_picture(to_tensor(edit.source), edit.mask))
        contexts.append(control_context(channels, size, latents, kept, edit.mask))
    return contexts


@dataclass(frozen=True)
class Given:
    """What sampling starts from, on the host: noise (B, 16, h, w), latents (1, 16, h, w) of a start picture if there is
    one, and the control contexts (1, C, h, w)."""

    noise: Tensor
    clean: Tensor | None = None
    contexts: Sequence[Tensor] = ()

    def start(self, sigma: Tensor) -> Tensor:
        """The latents (B, 16, h, w) at the first sigma."""
        return self.noise if self.clean is None else (1 - sigma) * self.clean + sigma * self.noise

    def hold(self, edit: Edit | None, device: torch.device) -> Callable[[Tensor, float], Tensor] | None:
        """A function for `sampler.denoise` that puts the noisy source back where an edit repaints nothing; or None."""
        if edit is None or self.clean is None:
            return None
        clean, noise, cells = (tensor.to(device) for tensor in (self.clean, self.noise, edit.cells))
        return lambda latents, sigma: torch.where(cells > 0, latents, (1 - sigma) * clean + sigma * noise)
