"""The columns of a row and their values: texts or JSON from outside, checked, to the settings of one picture."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .. import notation
from ..sizes import MAX_SIDE, MULTIPLE, check_multiple

MAX_STEPS = 100
ID = re.compile(r"[\w][\w.\- ()+,@=]*(/[\w][\w.\- ()+,@=]*)*")
MAX_ID = 200
Cells = Mapping[str, object]
STEERING = ("sampler", "schedule", "shift", "nag_scale", "nag_tau", "nag_alpha", "variety")
"""Columns that the pipeline's call takes as they are, and checks."""


class Columns(Protocol):
    """What an engine takes of a row."""

    names: frozenset[str]

    def settings(self, cells: Cells, seed: int) -> dict[str, Any]:
        """The settings of a picture; ValueError for values that cannot be used."""
        ...


class PictureColumns:
    """The columns of `zimage generate`. folder: where relative names of files begin; size: edge where none is asked."""

    names = frozenset(
        ("prompt", "negative_prompt", "width", "height", "steps", "guidance", "seed", "lora")
        + ("image", "strength", "mask", "feather", "pad", "control", "control_image", "canny", *STEERING)
    )

    def __init__(self, folder: str | Path = ".", size: int = 1024):
        self.folder = Path(folder)
        self.size = size

    def settings(self, cells: Cells, seed: int) -> dict[str, Any]:
        """All that one picture depends on, defaults filled in and what has no effect left out."""
        if "prompt" not in cells:
            raise ValueError("prompt: every row needs one")
        found: dict[str, Any] = {"prompt": text("prompt", cells["prompt"]), "seed": seed}
        edited, (width, height) = self._edited(cells)
        found["width"] = side("width", cells.get("width", width))
        found["height"] = side("height", cells.get("height", height))
        found["steps"] = whole("steps", cells.get("steps", 8), 1, MAX_STEPS)
        found["guidance"] = number("guidance", cells.get("guidance", 0.0))
        if found["guidance"] < 0:
            raise ValueError(f"guidance: expected 0 or more, found {found['guidance']}")
        negative = text("negative_prompt", cells.get("negative_prompt", ""))
        for name in STEERING:
            if name in cells:
                read = text if name in ("sampler", "schedule") else number
                found[name] = read(name, cells[name])
        if found["guidance"] or found.get("nag_scale"):
            found["negative_prompt"] = negative
        loras = [
            [self._file("lora", name), number("lora", strength)]
            for name, strength in map(notation.lora, listed("lora", cells.get("lora", [])))
        ]
        return found | edited | ({"loras": loras} if loras else {}) | self._controls(cells)

    def _edited(self, cells: Cells) -> tuple[dict[str, Any], tuple[int, int]]:
        """The settings of a picture that starts from another, and its size in whole multiples."""
        if "image" not in cells:
            for name in ("mask", "pad"):
                if name in cells:
                    raise ValueError(f"{name}: there is no picture for it; name one in the column image")
            return {}, (self.size, self.size)
        found: dict[str, Any] = {"image": self._file("image", text("image", cells["image"]))}
        width, height = picture_size("image", found["image"])
        if "mask" in cells and "pad" in cells:
            raise ValueError("mask, pad: expected one of them, found both")
        if "mask" in cells:
            found["mask"] = self._file("mask", text("mask", cells["mask"]))
            if (size := picture_size("mask", found["mask"])) != (width, height):
                raise ValueError(f"mask: expected the picture's size {width} x {height}, found {size[0]} x {size[1]}")
        if "pad" in cells:
            found["pad"] = left, top, right, bottom = notation.borders(str(cells["pad"]))
            width, height = width + left + right, height + top + bottom
        repaints = "mask" in found or "pad" in found
        if repaints:
            found["feather"] = whole("feather", cells.get("feather", 8), 0, 2**14)
        found["strength"] = number("strength", cells.get("strength", 1.0 if repaints else 0.6))
        if not 0 < found["strength"] <= 1:
            raise ValueError(f"strength: expected above 0 and up to 1, found {found['strength']}")
        return found, (width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE)

    def _controls(self, cells: Cells) -> dict[str, Any]:
        """ControlNets as [file, strength, start, end, its picture or None]."""
        controls = [notation.control(part) for part in listed("control", cells.get("control", []))]
        images = [self._file("control_image", name) for name in listed("control_image", cells.get("control_image", []))]
        if images and not controls:
            raise ValueError("control_image: there is no ControlNet for it; name one in the column control")
        if len(images) not in (0, 1, len(controls)):
            raise ValueError(f"control_image: expected one, or {len(controls)} as control has, found {len(images)}")
        for image in images:
            picture_size("control_image", image)
        canny = str(cells.get("canny", "false")).lower()
        if canny not in ("true", "false"):
            raise ValueError(f"canny: expected true or false, found {cells['canny']!r}")
        if not controls:
            return {}
        pictures: list[str] | list[None] = images or [None]
        if len(pictures) == 1:
            pictures = pictures * len(controls)
        pairs = zip(controls, pictures)
        found = [[self._file("control", name), *numbers, picture] for (name, *numbers), picture in pairs]
        return {"controls": found} | ({"canny": True} if canny == "true" else {})

    def _file(self, column: str, name: str) -> str:
        path = self.folder / name
        if not os.path.isfile(path):  # also of names that no system takes
            raise ValueError(f"{column}: {path}: no such file; relative names begin in {self.folder}")
        return str(path)


def listed(column: str, value: object) -> list[str]:
    """The parts of "a; b", or of a list of texts."""
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{column}: expected texts such as FILE:STRENGTH with ; between them, found {value!r}")
    return [part.strip() for part in parts if part.strip()]


def picture_size(column: str, path: str) -> tuple[int, int]:
    """Width and height of a picture file; ValueError where it is none."""
    from ..pictures import file_size

    try:
        return file_size(path)
    except ValueError as error:
        raise ValueError(f"{column}: {error}") from None


# ---- values ---------------------------------------------------------------------------------------------------


def identifier(value: object) -> str:
    """An id as a relative path without suffix; ValueError for what is no safe file name everywhere."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"id: expected a text, found {value!r}")
    text = str(value).strip()
    parts = text.split("/")
    if not ID.fullmatch(text) or len(text.encode()) > MAX_ID or any(part != part.rstrip(" .") for part in parts):
        raise ValueError(
            f"id: expected at most {MAX_ID} bytes of letters, digits and ._-()+,@=, with / between folders, "
            f"found {text!r}"
        )
    return text


def whole(name: str, value: object, least: int, most: int) -> int:
    """A whole number within limits, also from text."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, found {value!r}")
    return value


def number(name: str, value: object) -> float:
    """A finite number, also from text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e308 <= value <= 1e308:
        raise ValueError(f"{name}: expected a number, found {value!r:.100}")
    return float(value)


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, found {value!r}")
    return value


def side(name: str, value: object) -> int:
    """An edge in pixels."""
    return check_multiple(name, whole(name, value, 1, MAX_SIDE))
