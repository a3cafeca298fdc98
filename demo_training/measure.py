"""How well the demo model follows its captions, from the pixels: `python demo_training/measure.py [--model FILE]`.

Asks for 200 held-out scenes of one shape (seeds 0, 1, 2 ...), 8 steps at 128 x 128, and reads colour of the shape,
colour of the background, place and kind of shape back from each picture. Last line: the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scenes

NAMES = tuple(scenes.COLOURS)
PALETTE = np.array(list(scenes.COLOURS.values()), dtype=np.float32)
BATCH = 8
LIMITS = {"colour": 0.95, "background": 0.95, "place": 0.90}


def read(picture: np.ndarray) -> scenes.Scene | None:
    """The scene of one thing that a picture (H, W, 3) uint8 shows, None where there is only background.

    Each pixel counts as the palette's nearest colour. The border's most frequent colour is the background, the most
    frequent other colour the thing; its place is the cell of a 3 x 3 grid that holds its centroid, its kind the
    outline that overlaps best.
    """
    height, width, _ = picture.shape
    nearest = np.square(picture[:, :, None].astype(np.float32) - PALETTE).sum(-1).argmin(-1)
    edge = max(1, min(height, width) // 32)
    inner = nearest[edge:-edge, edge:-edge]
    border = np.bincount(nearest.ravel(), minlength=8) - np.bincount(inner.ravel(), minlength=8)
    background = int(border.argmax())
    counts = np.bincount(nearest.ravel(), minlength=8)
    counts[background] = 0
    colour = int(counts.argmax())
    mask = nearest == colour
    area = mask.sum()
    if area < 0.004 * mask.size:
        return None
    rows, columns = np.nonzero(mask)
    x, y = columns.mean() + 0.5, rows.mean() + 0.5
    column, row = (int(np.digitize(v, (0.385, 0.615))) for v in (x / width, y / height))
    place = list(scenes.PLACES)[3 * row + column]
    best = (-1.0, "")
    for shape in scenes.SHAPES:
        for radius in np.sqrt(area) * np.array([0.5, 0.57, 0.65, 0.72, 0.8, 0.88, 0.95]):
            for lift in (0.0, -0.14 * radius):  # a triangle's centroid lies on its centre, a star's nearly
                like = scenes.shape_mask(shape, (x, y + lift), radius, height, width) > 0.5
                best = max(best, ((like & mask).sum() / (like | mask).sum(), shape))
    fraction = np.sqrt(area / np.pi) / min(height, width)
    size = min(scenes.SIZES, key=lambda name: abs(scenes.SIZES[name] - fraction))
    return scenes.Scene((scenes.Thing(best[1], NAMES[colour], size, place),), NAMES[background])


def check(picture: np.ndarray, scene: scenes.Scene) -> dict[str, bool]:
    """Which of the asked facts a picture shows: colour, background, place, shape."""
    found = read(picture)
    if found is None:
        return dict.fromkeys(("colour", "background", "place", "shape"), False)
    seen, asked = found.things[0], scene.things[0]
    return {
        "colour": seen.colour == asked.colour,
        "background": found.background == scene.background,
        "place": seen.place == asked.place,
        "shape": seen.shape == asked.shape,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="transformer file; the bundled INT4 one if left out")
    parser.add_argument("--text-encoder")
    parser.add_argument("--vae")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), help="height and width")
    parser.add_argument("--sheet", type=Path, help="write the first 40 pictures to this PNG")
    args = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from PIL import Image

    from zimage_core import load_pipeline

    pipeline = load_pipeline(args.model, args.text_encoder, args.vae, device="cpu")
    asked = scenes.held_out_captions(args.captions)
    results, pictures = [], []
    for seed in range(0, len(asked), BATCH):
        captions = [caption for caption, _ in asked[seed : seed + BATCH]]
        images = pipeline(captions, height=args.size[0], width=args.size[1], generator=seed)  # picture i has seed + i
        pictures += [np.asarray(image) for image in images]
    for seed, (picture, (caption, scene)) in enumerate(zip(pictures, asked)):
        results.append(check(picture, scene))
        if missed := [fact for fact, right in results[-1].items() if not right]:
            print(f"seed {seed}: {caption!r} misses {', '.join(missed)}")
    if args.sheet:
        rows = [np.concatenate(pictures[i : i + 8], axis=1) for i in range(0, min(40, len(pictures)), 8)]
        Image.fromarray(np.concatenate(rows)).save(args.sheet, optimize=True)
    figures = {key: sum(r[key] for r in results) / len(results) for key in results[0]}
    passed = all(figures[key] >= limit for key, limit in LIMITS.items())
    print(json.dumps({"captions": len(results), **figures, "passed": passed}))


if __name__ == "__main__":
    main()
