"""Captioned scenes that the bundled demo model learns to draw: shapes and letters on a plain, graded or parted ground.

A scene is a frozen tuple of facts. `layout` turns it into numbers for one picture size (what a caption does not say,
such as the exact place, is random), `render` turns layouts into pixels, `describe` into one of many phrasings, and
`held_out` keeps one combination of facts in sixteen away from the training, so that `measure.py` can ask for pictures
that were never seen. A caption that leaves out a size, a fill or a place means the default (medium, plain, center); a
colour, a shape or a ground that it leaves out is random. Everything follows from a `random.Random`.

Every outline, letters too, is a tile of signed distances made once from polygons, so that pictures of any size are
sharp and the same on every machine, and a GPU draws thousands a second. `glyphs.json` holds the capitals and digits of
DejaVu Sans Mono Bold 2.37 (free licence, dejavu-fonts.github.io) as polygons two units high.

Units: pixels from the upper left corner; an outline's own coordinates are multiples of its radius, y downwards.
"""

from __future__ import annotations

import functools
import json
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

COLOURS = {
    "red": (220, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 40),
    "green": (30, 150, 60),
    "blue": (30, 80, 225),
    "purple": (130, 40, 170),
    "pink": (255, 150, 190),
    "brown": (120, 70, 30),
    "cyan": (60, 205, 220),
    "gray": (135, 135, 135),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring", "crescent", "arrow")
CONVEX = ("circle", "square", "triangle", "diamond", "heart")  # large enough inside to hold a small one
SOLID = (*CONVEX, "star")  # what may hide another or be hidden
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
FILLS = ("plain", "striped", "dotted", "checked", "shaded")
LIGHT = ("white", "yellow", "pink", "cyan")  # patterned with black, the others with white
SIZES = {"small": 0.12, "medium": 0.17, "large": 0.235}  # radius as a fraction of the picture's shorter side
PLACES = {
    "top left": (0.26, 0.26), "top": (0.5, 0.26), "top right": (0.74, 0.26),
    "left": (0.26, 0.5), "center": (0.5, 0.5), "right": (0.74, 0.5),
    "bottom left": (0.26, 0.74), "bottom": (0.5, 0.74), "bottom right": (0.74, 0.74),
}  # fmt: skip
CORNERS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = {2: ((0.29, 0.5), (0.71, 0.5)), 4: ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72))}
THREE = {"small": ((0.2, 0.5), (0.5, 0.5), (0.8, 0.5)), "medium": ((0.5, 0.27), (0.27, 0.72), (0.73, 0.72))}
INNER, OUTER = 0.1, 0.32  # radii of a thing inside another
LETTERS = {1: 0.3, 2: 0.24, 3: 0.17}  # half a letter's height, by how many there are; beside a shape at most 0.15
PITCH = 1.67  # from letter to letter, in halves of the height
EDGE = 0.03  # of the shorter side stays free at every edge
CONTRAST = 75.0  # least distance in RGB between a thing's tones and what is behind it
DRAWN = 4  # outlines a picture holds at most
TILE, SPAN = 256, 1.4  # a tile's edge in samples, and how far it reaches from the centre


@dataclass(frozen=True)
class Thing:
    """One shape, or a text where `shape` is one to three of CHARACTERS; the rest are keys of the tables above."""

    shape: str
    colour: str
    size: str = "medium"
    fill: str = "plain"
    place: str = "center"

    @property
    def is_text(self) -> bool:
        return self.shape not in SHAPES


@dataclass(frozen=True)
class Scene:
    """What is to be seen.

    kind: "one" thing; "count", two to four of the same; "several", each at its place; "text", with a thing below or
    above it or alone; or a relation of the first thing to the second: "left of", "above", "inside", "behind".
    ground: "plain" and a colour; "graded" and the colours at the top and the bottom; "horizon", above and below it.
    """

    kind: str
    things: tuple[Thing, ...]
    ground: tuple[str, ...]


RELATIONS = ("left of", "above", "inside", "behind")


def held_out(scene: Scene) -> bool:
    """Whether this combination of facts is kept for measuring (one in sixteen, by a hash)."""
    return zlib.crc32(repr(scene).encode()) % 16 == 0


# --- outlines -----------------------------------------------------------------------------------------------------


def _arc(radius: float, x: float, start: float, stop: float, points: int = 96) -> np.ndarray:
    angles = np.radians(np.linspace(start, stop, points))
    return np.stack((x + radius * np.cos(angles), radius * np.sin(angles)), 1)


def _spikes(points: int, outer: float, inner: float) -> np.ndarray:
    angles = np.radians(-90 + 360 / points * np.arange(points))
    reach = np.where(np.arange(points) % 2, inner, outer)
    return np.stack((reach * np.cos(angles), reach * np.sin(angles)), 1)


def contours(name: str) -> list[np.ndarray]:
    """The polygons (n, 2) whose even-odd inside is a shape of radius 1 or a character two units high."""
    if name in CHARACTERS:
        return [np.array(polygon) for polygon in _glyphs()[name]]
    if name == "heart":
        t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack((16 * np.sin(t) ** 3, -y - 2.5), 1) / 15.5]
    if name == "crescent":  # a circle without the part of it that a smaller one to its right covers
        reach = math.degrees(math.acos((1 + 0.45**2 - 0.85**2) / (2 * 0.45)))  # where the two meet, from the large one
        low = math.degrees(math.atan2(math.sin(math.radians(reach)), math.cos(math.radians(reach)) - 0.45))
        moon = np.concatenate((_arc(1, 0, reach, 360 - reach), _arc(0.85, 0.45, -low, -360 + low)))
        return [moon + (0.15, 0)]
    return {
        "circle": [_arc(1, 0, 0, 360)],
        "square": [np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)])],
        "triangle": [_spikes(3, 1.12, 1.12)],
        "diamond": [np.array([(0, -1.15), (0.9, 0), (0, 1.15), (-0.9, 0)])],
        "star": [_spikes(10, 1.15, 0.48)],
        "cross": [np.array([(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34), (0.34, 1),
                            (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)])],
        "ring": [_arc(1, 0, 0, 360), _arc(0.55, 0, 0, 360)],
        "arrow": [np.array([(-1, -0.32), (0.05, -0.32), (0.05, -0.85), (1.05, 0), (0.05, 0.85), (0.05, 0.32),
                            (-1, 0.32)])],
    }[name]  # fmt: skip


@functools.cache
def _glyphs() -> dict[str, list]:
    return json.loads((Path(__file__).parent / "glyphs.json").read_text(encoding="utf-8"))


def _distances(polygons: list[np.ndarray]) -> np.ndarray:
    """(TILE, TILE) fp32 signed distances to the outline, negative inside."""
    axis = ((np.arange(TILE) + 0.5) / TILE * 2 - 1).astype(np.float32) * SPAN
    x, y = np.meshgrid(axis, axis)
    nearest, inside = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, bool)
    for polygon in polygons:
        for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0)):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / max(ex * ex + ey * ey, 1e-12), 0, 1)
            nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
            if ay != by:
                inside ^= ((ay > y) != (by > y)) & (x < (y - ay) / (by - ay) * ex + ax)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


NAMES = (*SHAPES, *CHARACTERS)  # of the tiles


@functools.cache
def tiles(device: str = "cpu") -> torch.Tensor:
    """(shapes and characters, TILE, TILE) signed distances."""
    if device != "cpu":
        return tiles().to(device)
    return torch.from_numpy(np.stack([_distances(contours(name)) for name in NAMES]).astype(np.float32))


# --- scenes as numbers, and as pixels -----------------------------------------------------------------------------


def tones(colour: str, fill: str) -> tuple[np.ndarray, np.ndarray]:
    """The two colours (3,) that a fill shows: of a pattern, or at the lit and the dark end of a shade."""
    first = np.array(COLOURS[colour], dtype=np.float32)
    if fill == "shaded":
        return first + 0.45 * (255 - first), first * 0.4
    other = "black" if colour in LIGHT else "white"
    return first, np.array(COLOURS[other], dtype=np.float32) if fill != "plain" else first


def placed(scene: Scene, height: int, width: int, rng: random.Random, jitter: float = 0.025) -> list[tuple]:
    """(name of a tile, thing, x, y, radius) of every outline, from behind to the front; jitter moves and resizes each
    by that fraction of the shorter side and of the radius."""
    side = min(height, width)

    def at(thing: Thing, place: tuple[float, float], radius: float, dx: float = 0.0, dy: float = 0.0) -> list[tuple]:
        radius *= side * (1 + rng.uniform(-2, 2) * jitter)
        count = len(thing.shape) if thing.is_text else 1
        wide, high = radius * (1 + PITCH / 2 * (count - 1)) * 1.15, radius * 1.15
        edge = EDGE * side
        x = place[0] * width + (dx + rng.uniform(-1, 1) * jitter) * side
        y = place[1] * height + (dy + rng.uniform(-1, 1) * jitter) * side
        x = min(max(x, wide + edge), max(width - wide - edge, width / 2))
        y = min(max(y, high + edge), max(height - high - edge, height / 2))
        if not thing.is_text:
            return [(thing.shape, thing, x, y, radius)]
        first = x - PITCH * radius * (count - 1) / 2
        return [(name, thing, first + PITCH * radius * i, y, radius) for i, name in enumerate(thing.shape)]

    first, *rest = scene.things
    if scene.kind == "one":
        return at(first, PLACES[first.place], SIZES[first.size])
    if scene.kind == "text":
        half = LETTERS[len(first.shape)]
        drawn = at(first, PLACES[first.place], min(half, 0.15) if rest else half)
        return drawn + [one for thing in rest for one in at(thing, PLACES[thing.place], SIZES[thing.size])]
    if scene.kind == "count":
        spots = THREE[first.size] if len(scene.things) == 3 else COUNTS[len(scene.things)]
        return [at(thing, spot, SIZES[thing.size])[0] for thing, spot in zip(scene.things, spots)]
    if scene.kind == "several":
        return [at(thing, PLACES[thing.place], SIZES[thing.size])[0] for thing in scene.things]
    second = rest[0]
    if scene.kind == "inside":
        (outer,) = at(second, (0.5, 0.5), OUTER)
        return [outer, (first.shape, first, *outer[2:4], INNER * side * (1 + rng.uniform(-2, 2) * jitter))]
    if scene.kind == "behind":
        radius, aside = SIZES[first.size], rng.choice((-1, 1))
        reach = 0.4 * radius
        return at(first, (0.5, 0.5), radius, aside * reach, -reach) + at(
            second, (0.5, 0.5), radius, -aside * reach, reach
        )
    spots = ("left", "right") if scene.kind == "left of" else ("top", "bottom")
    return [at(thing, PLACES[spot], SIZES[thing.size])[0] for thing, spot in zip(scene.things, spots)]


# What `render` takes, one row a picture; DRAWN rows of outlines, of which tile -1 draws nothing.
Layout = np.dtype([
    ("tile", np.int16, DRAWN), ("fill", np.int16, DRAWN), ("at", np.float32, (DRAWN, 3)),  # x, y, radius
    ("tones", np.float32, (DRAWN, 2, 3)), ("ground", np.int16), ("line", np.float32), ("colours", np.float32, (2, 3)),
])  # fmt: skip
GROUNDS = ("plain", "graded", "horizon")


def layout(scene: Scene, height: int, width: int, rng: random.Random, jitter: float = 0.025) -> np.ndarray:
    """A scene as one row of `Layout`."""
    row = np.zeros((), Layout)
    row["tile"] = -1
    for i, (name, thing, *at) in enumerate(placed(scene, height, width, rng, jitter)):
        row["tile"][i], row["fill"][i], row["at"][i] = NAMES.index(name), FILLS.index(thing.fill), at
        row["tones"][i] = tones(thing.colour, thing.fill)
    row["ground"], row["line"] = GROUNDS.index(scene.ground[0]), rng.uniform(0.5, 0.65)
    row["colours"] = COLOURS[scene.ground[1]], COLOURS[scene.ground[-1]]
    return row


def pattern(fill: torch.Tensor, u: torch.Tensor, v: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """How much of the second tone there is (0..1) at u, v (B, H, W) of outlines with fills (B,), radii in pixels."""

    def wave(t: torch.Tensor) -> torch.Tensor:  # -1..1, by halves of a period of 1, a straight line between
        return 4 * (t - t.floor() - 0.5).abs() - 1

    def spots(t: torch.Tensor) -> torch.Tensor:
        return t - t.round()

    fill, radius = fill[:, None, None], radius[:, None, None]
    stripes = wave((u + v) * 1.2) * radius / 1.2 / 4 / math.sqrt(2)  # pixels to the nearest edge
    dots = 0.29 * radius / 1.7 - (spots(u * 1.7).square() + spots(v * 1.7).square()).sqrt() * radius / 1.7
    checks = (wave(u * 1.1 + 0.25) * radius / 4.4).clamp(-1, 1) * (wave(v * 1.1 + 0.25) * radius / 4.4).clamp(-1, 1)
    shade = 0.4 * (u + v)
    edge = torch.where(fill == 1, stripes, torch.where(fill == 2, dots, torch.where(fill == 3, checks * 0.5, shade)))
    return (edge + 0.5).clamp(0, 1) * (fill > 0)


@torch.no_grad()
def render(layouts: np.ndarray, height: int, width: int, device: str = "cpu") -> torch.Tensor:
    """Pictures (B, 3, H, W) fp32 in -1..1 of rows of `Layout`."""

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(layouts[name].copy()).to(device)

    y = torch.arange(height, device=device, dtype=torch.float32)[None, :, None] + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32)[None, None] + 0.5
    ground, line, colours = get("ground")[:, None, None], get("line")[:, None, None], get("colours")
    mix = torch.where(ground == 1, y / height, (ground == 2) * (y - line * height + 0.5).clamp(0, 1))[:, None]
    top, bottom = (colours[:, i, :, None, None] for i in (0, 1))
    picture = (top + mix * (bottom - top)).expand(-1, -1, -1, width)
    tile, fill, at, shown = get("tile").long(), get("fill"), get("at"), get("tones")
    for i in range(DRAWN):
        if not (layouts["tile"][:, i] >= 0).any():
            continue
        cx, cy, radius = (at[:, i, k, None, None].clamp(min=1e-3) for k in range(3))
        u, v = ((x - cx) / radius).expand(-1, height, -1), ((y - cy) / radius).expand(-1, -1, width)
        grid = torch.stack((u, v), -1) / SPAN
        held = tiles(device)[tile[:, i].clamp(min=0)][:, None]
        far = F.grid_sample(held, grid, "bilinear", "border", align_corners=False)[:, 0]
        cover = (0.5 - far * radius).clamp(0, 1) * (tile[:, i] >= 0)[:, None, None]
        first, second = (shown[:, i, k, :, None, None] for k in (0, 1))
        colour = first + pattern(fill[:, i], u, v, at[:, i, 2])[:, None] * (second - first)
        picture = picture + cover[:, None] * (colour - picture)
    return picture / 127.5 - 1


def draw(scene: Scene, height: int, width: int, rng: random.Random, jitter: float = 0.025) -> np.ndarray:
    """Picture (height, width, 3) uint8 of a scene."""
    picture = render(layout(scene, height, width, rng, jitter)[None], height, width)[0]
    return ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


# --- captions -----------------------------------------------------------------------------------------------------

OPENINGS = (
    "a picture of ", "a photo of ", "a drawing of ", "an image of ", "an illustration of ", "a painting of ",
    "there is ", "draw ", "show me ", "one can see ", "a simple picture of ", "a clean flat illustration that shows ",
)  # fmt: skip
TAILS = (
    ", flat colours", ", clean edges", ", simple and clear", ", nothing else",
    ", minimal poster, flat design, sharp edges",
    ", vector graphic with flat colours, sharp outlines and nothing else in the picture",
)  # fmt: skip
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
FILL_WORDS = {"striped": ("striped",), "dotted": ("dotted", "dotted", "spotted"), "checked": ("checked", "checkered"),
              "shaded": ("shaded",)}  # fmt: skip
NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
MIDDLE = ("in the center", "in the middle", "at the center", "in the centre")


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _place_words(place: str, rng: random.Random) -> str:
    if place == "center":
        return rng.choice(MIDDLE)
    if " " in place:
        return rng.choice([f"in the {place} corner", f"in the {place}", f"at the {place}"])
    if place in ("left", "right"):
        return rng.choice([f"on the {place}", f"on the {place} side", f"at the {place}"])
    return rng.choice([f"at the {place}", f"at the {place}", f"on the {place}"])


def _thing_words(thing: Thing, rng: random.Random, keep, plural: bool = False) -> str:
    """A thing without article; `keep(p)` says whether a fact that may be left out is told, with probability p."""
    if thing.is_text:
        return _text_words(thing, rng, keep)
    words = [rng.choice(SIZE_WORDS[thing.size])] if thing.size != "medium" else []
    seen = [thing.colour] if keep(0.95) else []
    if thing.fill != "plain":
        seen.insert(rng.randint(0, len(seen)), rng.choice(FILL_WORDS[thing.fill]))
    shape = thing.shape if keep(0.96) else "shape"
    return " ".join([*words, *seen, shape + plural * ("es" if shape.endswith("s") else "s")])


def _text_words(thing: Thing, rng: random.Random, keep) -> str:
    single = len(thing.shape) == 1
    noun = "letter" if thing.shape.isalpha() else "digit" if thing.shape.isdigit() else "character"
    nouns = [noun] if single else [noun + "s", noun + "s", "text"]
    if thing.shape.isdigit():
        nouns.append("number")
    noun, quoted = rng.choice(nouns), f'"{thing.shape}"'
    colour = thing.colour if keep(0.95) else ""
    return rng.choice(
        [
            f"{colour} {noun} {quoted}".strip(),
            f"{noun} {quoted}{' in ' + colour if colour else ''}",
            f"large {colour} {noun} {quoted}".replace("  ", " "),
        ]  # fmt: skip
    )


def _a(words: str, thing: Thing) -> str:
    """With an article: "the" for texts, which may be plural."""
    return "the " + words if thing.is_text else _with_article(words)


def _ground_words(ground: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    """A ground after a thing ("on a red background"), and by itself ("red background")."""
    kind, first, *others = ground
    if kind == "plain":
        words = f"{first} {rng.choice(['background', 'background', 'background', 'backdrop'])}"
        return f"on {_with_article(words)}", words
    second = others[0]
    if kind == "graded":
        words = rng.choice([f"{first} to {second} gradient", f"gradient from {first} to {second}",
                            f"background graded from {first} to {second}"])  # fmt: skip
        return f"on {_with_article(words)}", words
    words = rng.choice([f"{first} sky above {second} ground", f"horizon between {first} sky and {second} ground"])
    return rng.choice([f"on {second} ground under {_with_article(first)} sky", f"with {_with_article(words)}",
                       f"before {_with_article(words)}"]), words  # fmt: skip


def _body(scene: Scene, rng: random.Random, keep) -> tuple[str, bool]:
    """The things in words, and whether an opening such as "a picture of" may go in front."""
    things = scene.things
    first = things[0]
    if scene.kind == "count":
        return f"{rng.choice(NUMBERS[len(things)])} {_thing_words(first, rng, keep, plural=True)}", True
    words = [_a(_thing_words(thing, rng, keep), thing) for thing in things]
    if scene.kind == "one" or (scene.kind == "text" and len(things) == 1):
        if first.place == "center" and rng.random() < 0.6:
            return words[0], True
        place = _place_words(first.place, rng)
        return rng.choice([f"{words[0]} {place}", f"{words[0]} {place}", f"{words[0]}, {first.place}"]), True
    if scene.kind == "several":
        order = list(range(len(things)))
        rng.shuffle(order)
        parts = [f"{words[i]} {_place_words(things[i].place, rng)}" for i in order]
        if rng.random() < 0.2:
            return ". ".join(part[0].upper() + part[1:] for part in parts), False
        return ", ".join(parts[:-1]) + rng.choice([" and ", ", and "]) + parts[-1], True
    relation = scene.kind
    if relation == "text":
        relation = "above"
        words = words if first.place == "top" else words[::-1]
    a, b = words
    forward, backward = {
        "left of": (("left of", "to the left of"), ("right of", "to the right of")),
        "above": (("above", "over"), ("below", "under")),
        "inside": (("inside", "in", "within"), ("around",)),
        "behind": (("behind", "partly behind"), ("in front of",)),
    }[relation]
    return rng.choice([f"{a} {rng.choice(forward)} {b}", f"{b} {rng.choice(backward)} {a}"]), True


def describe(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """One phrasing of a scene; unless `complete`, it may leave out colours, shapes and the ground."""

    def keep(probability: float) -> bool:
        return complete or rng.random() < probability

    body, opens = _body(scene, rng, keep)
    opening = rng.choice(OPENINGS) if opens and rng.random() < 0.4 else ""
    caption = opening + body
    if keep(0.88):
        after, alone = _ground_words(scene.ground, rng)
        forms = [f"{caption} {after}", f"{caption}, {alone}", f"{caption}, {after}"]
        if opens:
            forms += [f"{alone}, {body}", f"{_with_article(alone)} with {body}", f"{after}, {body}"]
        caption = rng.choice(forms)
    if rng.random() < 0.15:
        caption += rng.choice(TAILS)
    if rng.random() < 0.5:
        caption = caption[0].upper() + caption[1:]
    return caption + "." if rng.random() < 0.2 else caption


def with_stray_word(caption: str, rng: random.Random) -> str:
    """The caption with a word of random letters somewhere in it, which says nothing about the scene."""
    words = caption.split(" ")
    stray = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))
    words.insert(rng.randint(0, len(words)), stray)
    return " ".join(words)


# --- random scenes ------------------------------------------------------------------------------------------------


def _far(tone: np.ndarray, start: np.ndarray, end: np.ndarray) -> bool:
    """Whether a tone (3,) lies further than CONTRAST from every colour between two others."""
    line = end - start
    along = np.clip(((tone - start) @ line) / max(float(line @ line), 1.0), 0, 1)
    return float(np.linalg.norm(tone - start - along * line)) > CONTRAST


def _stands_out(thing: Thing, ground: tuple[str, ...]) -> bool:
    """Whether every tone of a thing differs from every colour of the ground."""
    first, second = tones(thing.colour, thing.fill)
    ends = [np.array(COLOURS[name], dtype=np.float32) for name in (ground[1], ground[-1])]
    shown = [first, (first + second) / 2, second] if thing.fill == "shaded" else [first, second]
    pairs = [(ends[0], ends[1])] if ground[0] == "graded" else [(ends[0], ends[0]), (ends[1], ends[1])]
    return all(_far(tone, *pair) for tone in shown for pair in pairs)


@functools.cache
def _grounds(colour: str, fill: str) -> dict[str, dict[tuple[str, ...], None]]:
    """The grounds of each kind, in order, on which a thing of that colour and fill stands out."""
    thing = Thing("circle", colour, fill=fill)
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    grounds = {"plain": [("plain", a) for a in COLOURS]}
    grounds |= {kind: [(kind, a, b) for a, b in pairs] for kind in ("graded", "horizon")}
    return {kind: {ground: None for ground in of_it if _stands_out(thing, ground)} for kind, of_it in grounds.items()}


def _some(rng: random.Random, shapes: Sequence[str], sizes: Sequence[str], place: str = "center", fills=FILLS) -> Thing:
    fill = rng.choice(fills) if rng.random() < 0.6 else "plain"
    return Thing(rng.choice(shapes), rng.choice(list(COLOURS)), rng.choice(sizes), fill, place)


def _things(kind: str, rng: random.Random) -> tuple[Thing, ...]:
    both, all_sizes = ("small", "medium"), tuple(SIZES)
    if kind == "one":
        return (_some(rng, SHAPES, all_sizes, rng.choice(list(PLACES))),)
    if kind == "count":
        return (_some(rng, SHAPES, both),) * rng.randint(2, 4)
    if kind == "several":
        places = rng.choice([("left", "right"), ("top", "bottom"), CORNERS, CORNERS, CORNERS])
        chosen = sorted(rng.sample(places, rng.randint(2, len(places))), key=list(PLACES).index)
        return tuple(_some(rng, SHAPES, both, place) for place in chosen)
    if kind == "inside":
        inner = _some(rng, SHAPES, ("small",), fills=("plain",))
        return inner, _some(rng, CONVEX, ("large",), fills=("plain",))
    if kind == "behind":
        size = rng.choice(("medium", "large"))
        return tuple(_some(rng, SOLID, (size,), fills=("plain",)) for _ in range(2))
    if kind == "text":
        text = "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 3)))
        beside = rng.random() < 0.3
        places = rng.choice([("top", "bottom"), ("bottom", "top")]) if beside else ("center",)
        colour = rng.choice(list(COLOURS))
        return (Thing(text, colour, "large", place=places[0]), *(_some(rng, SHAPES, both, p) for p in places[1:]))
    return tuple(_some(rng, SHAPES, both) for _ in range(2))


KINDS = {"one": 0.3, "count": 0.14, "several": 0.16, "text": 0.18, **dict.fromkeys(RELATIONS, 0.055)}


def random_scene(rng: random.Random, kind: str | None = None) -> Scene:
    """A scene in which every thing stands out from the ground and from what overlaps it."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    ground_kind = rng.choices(GROUNDS, (0.5, 0.25, 0.25))[0]
    while True:
        things = _things(kind, rng)
        if kind not in ("one", "count") and len({thing.colour for thing in things}) < len(things):
            continue
        choices = list(_grounds(things[0].colour, things[0].fill)[ground_kind])
        for thing in things[1:]:
            allowed = _grounds(thing.colour, thing.fill)[ground_kind]
            choices = [ground for ground in choices if ground in allowed]
        if choices:
            return Scene(kind, things, rng.choice(choices))


def training_scene(rng: random.Random) -> Scene:
    """A scene that is not held out."""
    while held_out(scene := random_scene(rng)):
        pass
    return scene


def held_out_captions(count: int, seed: int = 0, kind: str | None = None) -> list[tuple[str, Scene]]:
    """`count` complete captions of different held-out scenes, of one kind if asked, with the scenes."""
    rng = random.Random(f"held out {seed}")
    found: dict[Scene, str] = {}
    while len(found) < count:
        scene = random_scene(rng, kind)
        if held_out(scene) and scene not in found:
            found[scene] = describe(scene, rng, complete=True)
    return [(caption, scene) for scene, caption in found.items()]
