"""Short texts on the command line and in rows of batches: a file with its numbers, borders. Without torch."""

from __future__ import annotations

import re

_CONTROL = re.compile(
    r"(?P<file>.+?)(?::(?P<strength>[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|(?i:nan|inf)))"
    r"(?::(?P<start>\d*\.?\d+)-(?P<end>\d*\.?\d+))?)?"
)


def lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH -> (file, strength); what follows the last colon counts only if it is a number."""
    path, colon, number = text.rpartition(":")
    try:
        return (path, float(number)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def control(text: str) -> tuple[str, float, float, float]:
    """FILE, FILE:STRENGTH or FILE:STRENGTH:START-END -> (file, strength, start, end)."""
    match = _CONTROL.fullmatch(text)
    if match is None:
        return text, 1.0, 0.0, 1.0
    return match["file"], float(match["strength"] or 1), float(match["start"] or 0), float(match["end"] or 1)


def variety(text: str) -> tuple[float, ...]:
    """STRENGTH, STRENGTH:SHARE or STRENGTH:SHARE:UNTIL -> these numbers; ValueError for anything else."""
    try:
        found = tuple(float(part) for part in text.split(":"))
    except ValueError:
        found = ()
    if not 1 <= len(found) <= 3:
        raise ValueError(f"expected STRENGTH or STRENGTH:SHARE:UNTIL, found {text!r}")
    return found


def aspect(text: str) -> float:
    """WIDTH:HEIGHT, 16:9 say -> width / height; ValueError for anything but 1:4 to 4:1."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d+)?):(\d{1,4}(?:\.\d+)?)", text)
    ratio = float(match[1]) / float(match[2]) if match and float(match[2]) else 0.0
    if not 0.25 <= ratio <= 4:
        raise ValueError(f"expected WIDTH:HEIGHT from 1:4 to 4:1, 16:9 say, found {text!r}")
    return ratio


def borders(text: str) -> tuple[int, int, int, int]:
    """PIXELS or LEFT,TOP,RIGHT,BOTTOM -> the four borders; ValueError for anything else."""
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in (1, 4):
        raise ValueError(f"expected PIXELS or LEFT,TOP,RIGHT,BOTTOM, found {text!r}")
    left, top, right, bottom = found * (4 // len(found))
    return left, top, right, bottom
