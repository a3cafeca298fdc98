"""Captioned scenes that the bundled demo model learns to draw: coloured shapes on a coloured background.

A scene is a frozen tuple of facts (shape, colour, size, place, background). `draw` turns it into pixels, `describe`
into one of many phrasings, and `held_out` keeps one combination of facts in sixteen away from the training, so that
`measure.py` can ask for pictures that were never seen. What a caption leaves out has a plain default (medium size,
centre), except colours and shapes, which are then random. Everything follows from a `random.Random`.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (220, 30, 40),
    "orange": (255, 145, 0),
    "yellow": (255, 230, 40),
    "green": (30, 160, 60),
    "blue": (30, 80, 225),
    "purple": (145, 45, 175),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star")
SIZES = {"small": 0.125, "medium": 0.17, "large": 0.225}  # radius as a fraction of the picture's shorter side
PLACES = {
    "top left": (0.27, 0.27), "top": (0.5, 0.27), "top right": (0.73, 0.27),
    "left": (0.27, 0.5), "center": (0.5, 0.5), "right": (0.73, 0.5),
    "bottom left": (0.27, 0.73), "bottom": (0.5, 0.73), "bottom right": (0.73, 0.73),
}  # fmt: skip
PAIRS = (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))
OPENINGS = (
    "a picture of ", "a photo of ", "a drawing of ", "an image of ", "an illustration of ", "a painting of ",
    "there is ", "draw ", "show me ", "one can see ", "a simple picture of ",
)  # fmt: skip
SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `size` and `place` are keys of SIZES and PLACES."""

    shape: str
    colour: str
    size: str = "medium"
    place: str = "center"


@dataclass(frozen=True)
class Scene:
    """One or two things on a background colour."""

    things: tuple[Thing, ...]
    background: str


def held_out(scene: Scene) -> bool:
    """Whether this combination of facts is kept for measuring (one in sixteen, by a hash)."""
    return zlib.crc32(repr(scene).encode()) % 16 == 0


def outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corner points (x, y) of a shape around the origin; a circle is a polygon of 64 corners."""
    if shape == "square":
        side = radius * 0.86
        return [(-side, -side), (side, -side), (side, side), (-side, side)]
    corners, start, inner = {
        "circle": (64, 0.0, 1.0), "triangle": (3, -90.0, 1.0), "diamond": (4, -90.0, 1.0), "star": (10, -90.0, 0.42),
    }[shape]  # fmt: skip
    radius *= {"triangle": 1.12, "diamond": 1.08, "star": 1.15}.get(shape, 1.0)
    points = []
    for corner in range(corners):
        angle = math.radians(start + 360.0 * corner / corners)
        reach = radius * (inner if corner % 2 else 1.0)
        points.append((reach * math.cos(angle), reach * math.sin(angle)))
    return points


def shape_mask(shape: str, centre: tuple[float, float], radius: float, height: int, width: int) -> np.ndarray:
    """Anti-aliased coverage (height, width) in 0..1 of one shape; centre (x, y) and radius in pixels."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    points = [((centre[0] + x) * SUPERSAMPLE, (centre[1] + y) * SUPERSAMPLE) for x, y in outline(shape, radius)]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32) / 255.0


def draw(scene: Scene, height: int, width: int, rng: random.Random, jitter: float = 0.02) -> np.ndarray:
    """Picture (height, width, 3) uint8 of a scene; `jitter` moves and resizes each thing by that fraction."""
    picture = np.empty((height, width, 3), dtype=np.float32)
    picture[:] = COLOURS[scene.background]
    side = min(height, width)
    for thing in scene.things:
        x, y = PLACES[thing.place]
        radius = SIZES[thing.size] * side * (1.0 + rng.uniform(-jitter, jitter) * 2)
        centre = (x * width + rng.uniform(-jitter, jitter) * side, y * height + rng.uniform(-jitter, jitter) * side)
        alpha = shape_mask(thing.shape, centre, radius, height, width)[..., None]
        picture += alpha * (np.array(COLOURS[thing.colour], dtype=np.float32) - picture)
    return np.round(picture).astype(np.uint8)


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _place_words(place: str, rng: random.Random) -> str:
    if place == "center":
        return rng.choice(["in the center", "in the middle", "at the center", "in the centre"])
    if " " in place:
        return rng.choice([f"in the {place} corner", f"in the {place}", f"at the {place}"])
    if place in ("left", "right"):
        return rng.choice([f"on the {place}", f"on the {place} side", f"at the {place}"])
    return rng.choice([f"at the {place}", f"at the {place}", f"on the {place}"])


def _thing_words(thing: Thing, rng: random.Random, size: bool = True, colour: bool = True, shape: bool = True) -> str:
    words = []
    if size and thing.size != "medium":
        words.append(rng.choice({"small": ["small", "small", "little", "tiny"],
                                 "large": ["large", "large", "big", "huge"]}[thing.size]))  # fmt: skip
    if colour:
        words.append(thing.colour)
    words.append(thing.shape if shape else "shape")
    return " ".join(words)


def _finish(caption: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        caption = caption[0].upper() + caption[1:]
    return caption + "." if rng.random() < 0.2 else caption


def describe(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """One phrasing of a scene; unless `complete`, it may leave out colours and shapes (never size or place)."""
    keep = (lambda p: True) if complete else (lambda p: rng.random() < p)
    background = keep(0.85)
    ground = f"{scene.background} {rng.choice(['background', 'background', 'background', 'backdrop'])}"
    if len(scene.things) == 2:
        first, second = (_thing_words(t, rng) for t in scene.things)
        where = scene.things[0].place
        relation = {"left": ["left of", "to the left of"], "right": ["right of", "to the right of"],
                    "top": ["above", "over"], "bottom": ["below", "under"]}[where]  # fmt: skip
        forms = [f"{_with_article(first)} {rng.choice(relation)} {_with_article(second)}",
                 f"{_with_article(first)} {_place_words(where, rng)} and {_with_article(second)} "
                 f"{_place_words(scene.things[1].place, rng)}"]  # fmt: skip
        if where == "left":
            forms += [f"{_with_article(first)} and {_with_article(second)}", f"{first} and {second}"]
        words = rng.choice(forms)
        forms = [f"{words} on {_with_article(ground)}", f"{words}, {ground}"]
        return _finish(rng.choice(forms) if background else words, rng)
    (thing,) = scene.things
    words = _thing_words(thing, rng, colour=keep(0.93), shape=keep(0.95))
    place = _place_words(thing.place, rng) if thing.place != "center" or rng.random() < 0.4 else ""
    placed = f"{words} {place}" if place else words
    plain = f", {thing.place}" if place else ""
    opening = rng.choice(OPENINGS) if rng.random() < 0.5 else ""
    if not background:
        return _finish(rng.choice([f"{opening}{_with_article(placed)}", placed, words + plain]), rng)
    ground_a = _with_article(ground)
    forms = [
        f"{opening}{_with_article(placed)} on {ground_a}",
        f"{opening}{_with_article(words)} on {ground_a}{', ' + place if place else ''}",
        f"{_with_article(placed)}, {ground}",
        f"{words} on {scene.background}{plain}",
        f"{words}{plain}, {ground}",
        f"{ground_a} with {_with_article(placed)}",
        f"{ground}, {words}{plain}",
        f"on {ground_a}, {_with_article(placed)}",
    ]
    return _finish(rng.choice(forms), rng)


def with_stray_word(caption: str, rng: random.Random) -> str:
    """The caption with a word of random letters somewhere in it, which says nothing about the scene."""
    words = caption.split(" ")
    stray = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))
    words.insert(rng.randint(0, len(words)), stray)
    return " ".join(words)


def random_scene(rng: random.Random, pairs: float = 0.15) -> Scene:
    """A scene of one thing, or with probability `pairs` of two."""
    names = list(COLOURS)
    background = rng.choice(names)
    rest = [name for name in names if name != background]
    if rng.random() < pairs:
        return Scene(
            tuple(Thing(rng.choice(SHAPES), rng.choice(rest), place=place) for place in rng.choice(PAIRS)), background
        )
    size = rng.choice(["small", "medium", "large"])
    return Scene((Thing(rng.choice(SHAPES), rng.choice(rest), size, rng.choice(list(PLACES))),), background)


def training_scene(rng: random.Random) -> Scene:
    """A scene that is not held out."""
    while held_out(scene := random_scene(rng)):
        pass
    return scene


def held_out_captions(count: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """`count` complete captions of different held-out scenes of one thing, with the scenes."""
    rng = random.Random(f"held out {seed}")
    found: dict[Scene, str] = {}
    while len(found) < count:
        scene = random_scene(rng, pairs=0.0)
        if held_out(scene) and scene not in found:
            found[scene] = describe(scene, rng, complete=True)
    return [(caption, scene) for scene, caption in found.items()]
