"""Byte counts and multiples: GiB, sizes in words, rounding up; the edge of a picture. Without torch."""

from __future__ import annotations

GIB = 2**30
MULTIPLE, MAX_SIDE = 16, 2**14  # pixels, of a side that is generated
REAL_SIZE, DEMO_SIZE = 1024, 256  # pixels of an edge where no size is asked for; of the bundled demo


def readable(count: float) -> str:
    """Bytes as "1.25 GiB", below a quarter of that as "200 MiB", below one of those as "13 KiB"."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / GIB:.2f} GiB" if count >= GIB / 4 else f"{count / 2**20:.0f} MiB"


def of_aspect(ratio: float, side: int) -> tuple[int, int]:
    """Width and height, multiples of 16, of about the area of a square of `side`, the first `ratio` of the second."""
    width, height = (round(side * share / MULTIPLE) * MULTIPLE for share in (ratio**0.5, ratio**-0.5))
    return width, height


def check_multiple(name: str, side: int) -> int:
    """A side in pixels. ValueError, under its name, unless it is a positive multiple of 16."""
    if side < MULTIPLE or side % MULTIPLE:
        below = max(side // MULTIPLE, 1) * MULTIPLE
        raise ValueError(
            f"{name}: expected a multiple of {MULTIPLE} pixels, found {side}; the nearest are {below} and "
            f"{below + MULTIPLE}"
        )
    return side


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is not below `count`."""
    return -(-count // multiple) * multiple
