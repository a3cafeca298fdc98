"""How well the demo model follows its captions, from the pixels: `python demo_training/measure.py [--model FILE]`.

Asks for held-out scenes (picture i from the noise of seed i), 8 steps, and reads every fact back from each picture: the
ground from the columns along its edges, the things from what differs from it. A thing's outline is the one of
`scenes.py` that overlaps it best; its colour and fill are those whose drawing comes closest to its pixels. Last line:
the figures as JSON. `--scenes` reads the scenes as they are drawn, which tells how far the reader itself can be
trusted.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scenes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from zimage_core import load_pipeline

LIMITS = {
    "colour": 0.97, "fill": 0.97, "background": 0.97, "place": 0.95, "shape": 0.95, "count": 0.85, "relation": 0.85,
    "letters": 0.80, "outline": 0.88,
}  # fmt: skip
BATCH = 16
PALETTE = torch.tensor(list(scenes.COLOURS.values()), dtype=torch.float32)
COLOURS = tuple(scenes.COLOURS)
STANDS_OUT = 38.0  # distance in RGB from the ground, about half of the least contrast in scenes.py
LEAST_AREA = 0.0016  # of the picture; a small crescent takes 0.008 of a square one, of one twice as long 0.004
GRID = 64  # samples along the longer edge of what outlines are compared on
PLACE_EDGES = (0.38, 0.62)  # between the rows and the columns of places


class Seen(NamedTuple):
    """An outline read from a picture: centre and radius in pixels, and the overlap (IoU) of the best of each shape."""

    shape: str
    x: float
    y: float
    radius: float
    overlaps: dict[str, float]


# --- the ground ---------------------------------------------------------------------------------------------------


def ground_rows(picture: Tensor) -> Tensor:
    """The ground's colour in each row (H, 3) of a picture (H, W, 3): the median of a few columns at both edges."""
    columns = max(2, round(0.02 * min(picture.shape[:2])))
    return torch.cat((picture[:, :columns], picture[:, -columns:]), 1).median(1).values


def read_ground(rows: Tensor) -> tuple[str, ...]:
    """The kind and the colours of a ground from its rows (H, 3): what differs least in squares."""
    height, count = len(rows), len(PALETTE)
    far = (rows[:, None] - PALETTE).square().sum(-1)  # (H, colours)
    plain = far.mean(0)
    ramp = ((torch.arange(height) + 0.5) / height)[:, None, None, None]
    blend = PALETTE[:, None] + ramp * (PALETTE[None] - PALETTE[:, None])  # (H, top, bottom, 3)
    graded = (rows[:, None, None] - blend).square().sum(-1).mean(0)
    above = F.pad(far.cumsum(0), (0, 0, 1, 0))[round(0.4 * height) : round(0.75 * height)]  # (lines, colours)
    below = far.sum(0) - above
    horizon = ((above[:, :, None] + below[:, None]) / height).min(0).values
    for table in (graded, horizon):
        table.fill_diagonal_(torch.inf)
    kinds = {"plain": plain.min(), "graded": graded.min(), "horizon": horizon.min()}
    kind = min(kinds, key=kinds.get)
    if kind == "plain":
        return kind, COLOURS[int(plain.argmin())]
    first, second = divmod(int((graded if kind == "graded" else horizon).argmin()), count)
    return kind, COLOURS[first], COLOURS[second]


# --- the things ---------------------------------------------------------------------------------------------------


def components(mask: Tensor) -> list[Tensor]:
    """The connected parts of a mask (H, W) as masks, the largest first; found at about 128 pixels along the shorter
    side, so that gaps narrower than a pixel there do not part."""
    shrink = max(1, round(min(mask.shape) / 128))
    small = F.max_pool2d(mask.float()[None], shrink, ceil_mode=True)[0] > 0
    labels = torch.arange(1, small.numel() + 1, dtype=torch.float32).view(small.shape) * small
    while True:
        spread = F.max_pool2d(labels[None], 3, 1, 1)[0] * small
        if torch.equal(spread, labels):
            break
        labels = spread
    full = labels.repeat_interleave(shrink, 0).repeat_interleave(shrink, 1)[: mask.shape[0], : mask.shape[1]] * mask
    values, areas = full[full > 0].unique(return_counts=True)
    order = areas.argsort(descending=True)
    return [full == values[i] for i in order if areas[i] >= LEAST_AREA * mask.numel()]


def sharpened(part: Tensor, far: Tensor) -> Tensor:
    """A part's mask cut where half of its own contrast to the ground is reached, not where STANDS_OUT is."""
    return part & (far > 0.5 * far[part].quantile(0.3))


def centroid(mask: Tensor) -> tuple[float, float]:
    """Its x and y in pixels."""
    y, x = mask.nonzero().float().mean(0).tolist()
    return x + 0.5, y + 0.5


@functools.cache
def _moments() -> tuple[Tensor, Tensor]:
    """Area and centroid (x, y) of every tile, in units of the radius."""
    inside = (scenes.tiles() < 0).float()
    axis = ((torch.arange(scenes.TILE) + 0.5) / scenes.TILE * 2 - 1) * scenes.SPAN
    area = inside.sum((1, 2))
    x, y = ((inside * grid).sum((1, 2)) / area for grid in (axis[None], axis[:, None]))
    return area * (2 * scenes.SPAN / scenes.TILE) ** 2, torch.stack((x, y), 1)


def fit(mask: Tensor, names, unknown: Tensor | None = None, wide: bool = False) -> Seen:
    """The outline that overlaps a mask (H, W) best among some, moved and resized to its best.

    unknown: pixels that do not count, where something else is in front; then the search is `wide`.
    """
    ys, xs = mask.nonzero().T
    reach = 0.75 * (max(ys.max() - ys.min(), xs.max() - xs.min()).item() + 1) * (1.5 if wide else 1.0)
    middle = ((xs.max() + xs.min()).item() / 2 + 0.5, (ys.max() + ys.min()).item() / 2 + 0.5)
    axis = ((torch.arange(GRID) + 0.5) / GRID * 2 - 1) * reach
    y, x = torch.meshgrid(axis + middle[1], axis + middle[0], indexing="ij")  # pixels
    size = torch.tensor((mask.shape[1], mask.shape[0]), dtype=torch.float32)
    where = torch.stack((x, y), -1) / size * 2 - 1

    def sampled(field: Tensor) -> Tensor:
        return F.grid_sample(field.float()[None, None], where[None], "bilinear", "zeros", align_corners=False)[0, 0]

    held, counted = sampled(mask), torch.ones_like(x) if unknown is None else 1 - sampled(unknown)
    chosen = [scenes.NAMES.index(name) for name in names]
    areas, centres = (table[chosen] for table in _moments())
    tiles = scenes.tiles()[chosen][:, None]
    area = mask.sum().item()
    radius = (area / areas).sqrt()
    at = torch.stack((*(torch.tensor(centroid(mask))[:, None] - radius * centres.T), radius), 1)  # (names, 3)
    span = 0.5 if wide else 0.05
    ordered = list(names)
    found: dict[str, float] = {}
    for turn in range(4 if wide else 3):
        coarse = slice(None, None, 2 if turn == 0 else 1)  # every second sample, to choose those worth a closer look
        shown, weight, gx, gy = (t[coarse, coarse] for t in (held * counted, counted, x, y))
        pixel = 2 * reach / len(gx)
        moves = torch.linspace(-span, span, 5 if wide else 3)
        scales = 1 + torch.linspace(-1, 1, 5 if wide else 3) * min(span, 0.3)
        dx, dy, scale = (t.flatten() for t in torch.meshgrid(moves, moves, scales, indexing="ij"))
        tried = at[:, None] + torch.stack((dx, dy, torch.zeros_like(dx)), 1) * at[:, None, 2:]
        tried[..., 2] *= scale  # (names, candidates, 3)
        cx, cy, size = (tried[..., i, None, None] for i in range(3))
        u = torch.empty(*tried.shape[:2], *gx.shape, 2)
        torch.sub(gx, cx, out=u[..., 0])
        torch.sub(gy, cy, out=u[..., 1])
        u /= (size * scenes.SPAN)[..., None]
        far = F.grid_sample(tiles, u.flatten(1, 2), "bilinear", "border", align_corners=False)[:, 0].view(u.shape[:-1])
        like = far.mul_(-size / pixel).add_(0.5).clamp_(0, 1).mul_(weight)
        both = torch.minimum(like, shown).sum((2, 3))
        overlap = both / (like.sum((2, 3)) + shown.sum() - both).clamp(min=1e-6)
        best, index = overlap.max(1)
        at = tried[torch.arange(len(best)), index]
        found |= dict(zip(ordered, best.tolist()))
        span /= 2.5
        if turn == 0:  # the others are out of the race
            kept = best.topk(min(4, len(best))).indices
            at, best, tiles, ordered = at[kept], best[kept], tiles[kept], [ordered[i] for i in kept]
    top = int(best.argmax())
    return Seen(ordered[top], *at[top].tolist(), found)


def read_surface(picture: Tensor, seen: Seen, mask: Tensor) -> tuple[str, str]:
    """Colour and fill of an outline: of all that are possible, those that come closest to the pixels inside."""
    height, width = mask.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    eroded = F.max_pool2d(1 - mask.float()[None], 3, 1, 1)[0] == 0
    mask = eroded if eroded.sum() > 30 else mask
    shown = picture[mask]  # (pixels, 3)
    radius = torch.tensor([seen.radius])
    u, v = ((x - seen.x) / seen.radius)[mask][None, None], ((y - seen.y) / seen.radius)[mask][None, None]
    best = (torch.inf, "", "")
    for number, fill in enumerate(scenes.FILLS):
        share = scenes.pattern(torch.tensor([number]), u, v, radius)[0, 0][:, None]
        for colour in COLOURS:
            first, second = (torch.from_numpy(tone) for tone in scenes.tones(colour, fill))
            off = (first + share * (second - first) - shown).abs().mean().item()
            best = min(best, (off, colour, fill))
    return best[1:]


def nearest_colour(picture: Tensor, mask: Tensor) -> str:
    """The palette's colour nearest to the median of a mask's pixels."""
    return COLOURS[int((picture[mask].median(0).values - PALETTE).square().sum(-1).argmin())]


def place_of(x: float, y: float, height: int, width: int) -> str:
    column, row = (int(np.digitize(v, PLACE_EDGES)) for v in (x / width, y / height))
    return list(scenes.PLACES)[3 * row + column]


# --- the facts ----------------------------------------------------------------------------------------------------

Facts = dict[str, list[float]]
"""A fact -> one value for each time that a scene holds it: 1 right, 0 wrong; for "outline" the overlap, 0..1."""


def check(picture: np.ndarray, scene: scenes.Scene) -> Facts:
    """What a picture (H, W, 3) uint8 shows of a scene."""
    shown = torch.from_numpy(picture.astype(np.float32))
    rows = ground_rows(shown)
    facts: Facts = {"background": [float(read_ground(rows) == scene.ground)]}
    far = (shown - rows[:, None]).square().sum(-1).sqrt()
    parts = [sharpened(part, far) for part in components(far > STANDS_OUT)]
    things = list(scene.things)
    if scene.kind in ("inside", "behind"):
        _check_pair(shown, parts, scene, facts)
        return facts
    if scene.kind == "text":
        parts = _check_text(shown, parts, scene, facts)
        things = things[1:]
        if not things:
            return facts
    seen = [fit(part, scenes.SHAPES) for part in parts[: len(things) + 2]]
    surfaces = [read_surface(shown, one, part) for one, part in zip(seen, parts)]
    if scene.kind == "count":
        facts["count"] = [float(len(parts) == len(things))]
    height, width = picture.shape[:2]

    def likeness(i: int, thing: scenes.Thing) -> float:
        near = place_of(*centroid(parts[i]), height, width) == thing.place
        return seen[i].overlaps[thing.shape] + (surfaces[i][0] == thing.colour) + (surfaces[i][1] == thing.fill) + near

    found: tuple = (None,) * len(things)
    if seen:
        slots = [*range(len(seen)), *[None] * max(0, len(things) - len(seen))]
        found = max(
            itertools.permutations(slots, len(things)),
            key=lambda chosen: sum(likeness(i, thing) for i, thing in zip(chosen, things) if i is not None),
        )
    for i, thing in zip(found, things):
        right = i is not None and seen[i].shape == thing.shape
        _add(facts, shape=right, outline=0.0 if i is None else seen[i].overlaps[thing.shape])
        _add(facts, colour=i is not None and surfaces[i][0] == thing.colour)
        _add(facts, fill=i is not None and surfaces[i][1] == thing.fill)
        if scene.kind in ("one", "several"):
            _add(facts, place=i is not None and place_of(*centroid(parts[i]), height, width) == thing.place)
    if scene.kind in ("left of", "above"):
        right = None not in found
        if right:
            (ax, ay), (bx, by) = (centroid(parts[i]) for i in found)
            dx, dy = (bx - ax) / width, (by - ay) / height
            right = dx > max(0.1, abs(dy)) if scene.kind == "left of" else dy > max(0.1, abs(dx))
        _add(facts, relation=right)
    return facts


def _add(facts: Facts, **found: float) -> None:
    for name, value in found.items():
        facts.setdefault(name, []).append(float(value))


def _check_text(shown: Tensor, parts: list[Tensor], scene: scenes.Scene, facts: Facts) -> list[Tensor]:
    """Reads the text, from the half of the picture where it belongs if there is something else; returns the rest."""
    text, height = scene.things[0], shown.shape[0]
    rest: list[Tensor] = []
    if len(scene.things) > 1:
        above = [centroid(part)[1] < height / 2 for part in parts]
        wanted = text.place == "top"
        rest = [part for part, high in zip(parts, above) if high != wanted]
        parts = [part for part, high in zip(parts, above) if high == wanted]
        facts["relation"] = [float(bool(parts and rest))]
    columns: list[Tensor] = []  # parts over one another, as the dot in a zero, are one character
    for part in sorted(parts, key=lambda part: centroid(part)[0]):
        if columns and (columns[-1].any(0) & part.any(0)).sum() > 0.5 * part.any(0).sum():
            columns[-1] = columns[-1] | part
        else:
            columns.append(part)
    read = "".join(fit(column, scenes.CHARACTERS).shape for column in columns[:4])
    colour = bool(columns) and nearest_colour(shown, torch.stack(columns).any(0)) == text.colour
    _add(facts, letters=read == text.shape, colour=colour)
    if len(scene.things) == 1:
        middle = bool(columns) and place_of(*centroid(torch.stack(columns).any(0)), *shown.shape[:2]) == "center"
        _add(facts, place=middle)
    return rest


def _check_pair(shown: Tensor, parts: list[Tensor], scene: scenes.Scene, facts: Facts) -> None:
    """One plain thing inside another, or behind it: parted by colour, the back one judged by what is to be seen."""
    things = scene.things
    wrong = dict.fromkeys(("shape", "colour", "fill", "outline"), 0.0)
    whole = torch.stack(parts).any(0) if parts else torch.zeros(shown.shape[:2], dtype=torch.bool)
    nearest = (shown[whole][:, None] - PALETTE).square().sum(-1).argmin(-1)
    masks = []
    for thing in things:
        mask = torch.zeros_like(whole)
        mask[whole] = nearest == COLOURS.index(thing.colour)
        kept = components(mask)
        masks.append(torch.stack(kept).any(0) if kept else mask)
    if not all(mask.sum() > LEAST_AREA * mask.numel() for mask in masks):
        for mask in masks:
            _add(facts, **wrong | {"colour": mask.sum() > LEAST_AREA * mask.numel()})
        return _add(facts, relation=0)
    first, second = masks
    if scene.kind == "inside":
        seen = fit(first, scenes.SHAPES), fit(whole, scenes.SHAPES)
        (ya, xa), (yb, xb) = (mask.nonzero().T for mask in masks)
        relation = xb.min() < xa.min() and xa.max() < xb.max() and yb.min() < ya.min() and ya.max() < yb.max()
    else:
        seen = fit(first, scenes.SHAPES, unknown=second, wide=True), fit(second, scenes.SHAPES)
        whole_fit = fit(first, scenes.SHAPES)  # as if nothing hid it: then it must be worse than the front one's
        apart = ((seen[0].x - seen[1].x) ** 2 + (seen[0].y - seen[1].y) ** 2) ** 0.5
        touching = apart < 0.95 * (seen[0].radius + seen[1].radius)
        relation = touching and whole_fit.overlaps[things[0].shape] < seen[1].overlaps[things[1].shape]
    for one, thing, mask in zip(seen, things, masks):
        if scene.kind == "inside" and thing is things[1]:
            mask = mask & ~first
        fill = read_surface(shown, one, mask)[1] == "plain"
        _add(facts, shape=one.shape == thing.shape, outline=one.overlaps[thing.shape], colour=1, fill=fill)
    _add(facts, relation=relation)


# --- many pictures ------------------------------------------------------------------------------------------------


def _check(task: tuple[np.ndarray, scenes.Scene]) -> Facts:
    torch.set_num_threads(1)
    return check(*task)


def figures(results: list[Facts]) -> dict[str, float]:
    """The mean of every fact over all times that it was asked for."""
    names = dict.fromkeys([*LIMITS, *(name for facts in results for name in facts)])
    found = {name: [value for facts in results for value in facts.get(name, ())] for name in names}
    return {name: round(float(np.mean(values)), 4) for name, values in found.items() if values}


def draw(pipeline, captions: list[str], height: int, width: int, batch: int = BATCH) -> list[np.ndarray]:
    """Pictures (H, W, 3) uint8; the i-th from the noise of seed i."""
    pictures = []
    for seed in range(0, len(captions), batch):
        images = pipeline(captions[seed : seed + batch], height=height, width=width, generator=seed)
        pictures += [np.asarray(image) for image in images]
    return pictures


def sheet(pictures: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """Pictures of one size side by side in full rows."""
    full = len(pictures) // columns * columns
    return np.concatenate([np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, full, columns)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="transformer file; the bundled INT4 one if left out")
    parser.add_argument("--text-encoder")
    parser.add_argument("--vae")
    parser.add_argument("--tokenizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", nargs="+", default=["auto"], help="one table row for each, and for each size")
    parser.add_argument("--size", nargs="+", default=["128"], help="of the picture's edge, or heightxwidth")
    parser.add_argument("--captions", type=int, default=400)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--workers", type=int, default=2, help="processes that read pictures")
    parser.add_argument("--scenes", action="store_true", help="read the scenes themselves, no model's pictures")
    parser.add_argument("--sheet", type=Path, help="write the first 64 pictures of the last row to this PNG")
    args = parser.parse_args()

    asked = scenes.held_out_captions(args.captions)
    captions, waiting = [caption for caption, _ in asked], []
    with multiprocessing.Pool(args.workers) as pool:  # before a device is in use, since they are forks
        for precision in ["scenes"] if args.scenes else args.precision:
            if not args.scenes:
                pipeline = load_pipeline(
                    args.model, args.text_encoder, args.vae, tokenizer=args.tokenizer, device=args.device,
                    precision=precision,
                )  # fmt: skip
            for size in args.size:
                height, width = (int(edge) for edge in (size.split("x") * 2)[:2])
                if args.scenes:
                    rng = random.Random(0)
                    pictures = [scenes.draw(scene, height, width, rng) for _, scene in asked]
                else:
                    pictures = draw(pipeline, captions, height, width, args.batch)
                tasks = [(picture, scene) for picture, (_, scene) in zip(pictures, asked)]
                waiting.append((precision, size, pool.map_async(_check, tasks, chunksize=4)))
        for precision, size, answer in waiting:
            results = answer.get()
            for seed, (facts, caption) in enumerate(zip(results, captions)):
                limits = {name: 0.8 if name == "outline" else 1 for name in facts}
                if missed := [name for name, values in facts.items() if min(values) < limits[name]]:
                    print(f"{precision} {size} seed {seed}: {caption!r} misses {', '.join(missed)}")
            found = figures(results)
            passed = all(found.get(name, 1.0) >= limit for name, limit in LIMITS.items())
            row = {"precision": precision, "size": size, "captions": len(results), **found, "passed": passed}
            print(json.dumps(row))
    if args.sheet:
        from PIL import Image

        Image.fromarray(sheet(pictures[:64])).save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
