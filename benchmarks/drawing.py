"""What NAG, variety and tiles do, on the demo: how often they do it, and what they leave as it was asked for.

    python benchmarks/drawing.py                    all figures; about ten minutes on one core
    python benchmarks/drawing.py --only nag --captions 100
    python benchmarks/drawing.py --pictures docs/images     the pictures of docs/drawing.md, and nothing else

Facts are read from the pixels as demo_training/measure.py does it. To be run again after a change of the demo.

nag: captions that leave the colour open; the negative prompt is the caption with the colour that it had without NAG,
from the same seed. How many change it, and how many of the facts that were asked for and right stay so.
variety: complete captions, 16 seeds each; the mean distance of their latents to those without, and facts as above.
tiles: pictures enlarged and redrawn in tiles; the gradient across the tiles' edges to that within 24 pixels of them.
cost: seconds of a step with NAG and without. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo_training")]
import measure  # noqa: E402
import scenes  # noqa: E402

from zimage_core import load_pipeline  # noqa: E402
from zimage_core.cli.generate import contact_sheet  # noqa: E402
from zimage_core.tiles import Tiles  # noqa: E402
from zimage_core.variety import Variety  # noqa: E402

BATCH = 16
NAG = {"nag_scale": 1.2}
VARIETY = Variety(3.0, 1.0, 0.5)
GROUNDS = ("white", "black", "blue", "yellow", "gray")


def captions(count: int, complete: bool, seed: int) -> list[tuple[str, dict[str, object]]]:
    """Captions of one thing, with the facts that they ask for; its colour is one of them if complete."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        shape, place, size = rng.choice(scenes.SHAPES), rng.choice(list(scenes.PLACES)), rng.choice(("", "large "))
        ground, colour = rng.choice(GROUNDS), rng.choice(list(scenes.COLOURS))
        if complete and not scenes._stands_out(scenes.Thing(shape, colour), ("plain", ground)):
            continue
        words = f"a {size}{colour + ' ' if complete else ''}{shape} {scenes._place_words(place, rng)}"
        facts: dict[str, object] = {"shape": shape, "place": place, "ground": ("plain", ground)}
        found.append((f"{words} on a {ground} background", facts | ({"colour": colour} if complete else {})))
    return found


def read(picture: Image.Image) -> dict[str, object]:
    """What the largest thing of a picture is, and its ground."""
    shown = torch.from_numpy(np.asarray(picture).astype(np.float32))
    rows = measure.ground_rows(shown)
    far = (shown - rows[:, None]).square().sum(-1).sqrt()
    parts = [measure.sharpened(part, far) for part in measure.components(far > measure.STANDS_OUT)]
    if not parts:
        return {"ground": measure.read_ground(rows)}
    seen = measure.fit(parts[0], scenes.SHAPES)
    place = measure.place_of(*measure.centroid(parts[0]), *shown.shape[:2])
    colour = measure.read_surface(shown, seen, parts[0])[0]
    return {"ground": measure.read_ground(rows), "shape": seen.shape, "place": place, "colour": colour}


def kept(before: list[dict], after: list[dict], asked: list[dict]) -> float:
    """The share of the facts that were asked for and right before, that are right after."""
    pairs = [(b, a, name, fact) for b, a, facts in zip(before, after, asked) for name, fact in facts.items()]
    return mean(a.get(name) == fact for b, a, name, fact in pairs if b.get(name) == fact)


def coloured(caption: str, colour: str) -> str:
    """A caption that leaves its colour open, with one."""
    start = "a large " if caption.startswith("a large ") else "a "
    return f"{start}{colour} {caption.removeprefix(start)}"


def measure_nag(pipeline, count: int, size: int, seed: int) -> dict[str, float]:
    asked = captions(count, complete=False, seed=seed)
    texts, facts = [caption for caption, _ in asked], [wanted for _, wanted in asked]

    def draw(**options) -> list[dict]:
        found = []
        for i in range(0, count, BATCH):
            part = {name: value[i : i + BATCH] if isinstance(value, list) else value for name, value in options.items()}
            found += map(read, pipeline(texts[i : i + BATCH], size, size, generator=i, **part))
        return found

    plain = draw()
    negative = [coloured(text, str(seen.get("colour", ""))) for text, seen in zip(texts, plain)]
    pipeline.encode([*texts, *negative])
    guided = draw(negative_prompt=negative, **NAG)
    changed = mean(after.get("colour") != before.get("colour") for before, after in zip(plain, guided))
    return {"captions": count, "size": size, "changed": changed, "kept": kept(plain, guided, facts)}


def measure_variety(pipeline, count: int, size: int, seed: int) -> dict[str, float]:
    distances, before, after, wanted = [], [], [], []
    for caption, facts in captions(count, complete=True, seed=seed):
        apart = []
        for variety, found in ((0.0, before), (VARIETY, after)):
            asked = {"generator": 100, "num_images_per_prompt": BATCH, "variety": variety}
            latents = pipeline(caption, size, size, **asked, output_type="latent").images
            apart.append(torch.pdist(latents.flatten(1)).mean().item())
            found += map(read, pipeline(caption, size, size, **asked))
        distances.append(apart)
        wanted += [facts] * BATCH
    plain, varied = (mean(column) for column in zip(*distances))
    rows = {"captions": count, "seeds": BATCH, "size": size, "distance": varied / plain}
    return rows | {"kept": kept(before, after, wanted)}


def measure_tiles(pipeline, count: int, size: int, factor: int, tile: int, seed: int) -> dict[str, float]:
    """Gradients, in both directions, at the first and last pixels of tiles, to those beside them."""
    found = []
    for i, (caption, _) in enumerate(captions(count, complete=True, seed=seed)):
        first = pipeline(caption, size, size, generator=i)
        (large,) = pipeline.upscale(first, caption, factor, tile=tile)
        pixels = torch.from_numpy(np.asarray(large).astype(np.float32)).mean(-1)
        seams, inside = [], []
        grid = Tiles.over(pixels.shape[0] // 8, pixels.shape[1] // 8, tile // 8)
        for lines, starts, edge in ((pixels, grid.rows, grid.height), (pixels.T, grid.columns, grid.width)):
            steps = lines.diff(dim=0).abs().mean(1)  # [i]: from line i to i + 1
            edges = {8 * at - 1 for start in starts for at in (start, start + edge)} - {-1, len(lines) - 1}
            near = {at + by for at in edges for by in range(-24, 25)} & set(range(len(steps)))
            seams += [steps[at].item() for at in edges]
            inside += [steps[at].item() for at in near - edges]
        found.append(mean(seams) / mean(inside))
    return {"pictures": count, "size": size * factor, "tile": tile, "gradient": mean(found), "median": median(found)}


def measure_cost(pipeline, size: int, steps: int = 6) -> dict[str, float]:
    found = {}
    for name, options in (("plain", {}), ("nag", NAG), ("guidance", {"guidance_scale": 1.0})):
        ticks = [time.perf_counter()]
        asked = {"num_inference_steps": steps, "on_step": lambda *_, ticks=ticks: ticks.append(time.perf_counter())}
        pipeline("a red star", size, size, negative_prompt="a blue circle" if options else None, **asked, **options)
        found[name] = min(after - before for before, after in zip(ticks[1:], ticks[2:]))
    return {"size": size, **{f"{name}_to_plain": found[name] / found["plain"] for name in ("nag", "guidance")}}


def label(picture: Image.Image, words: str) -> Image.Image:
    ImageDraw.Draw(picture).text((6, 4), words, "white", stroke_fill="black", stroke_width=2)
    return picture


def write_pictures(pipeline, folder: Path) -> None:
    """docs/drawing.md's: a row of NAG, of variety, of samplers, and an enlarged picture."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, pictures: list[Image.Image], columns: int) -> None:
        rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
        width, height = pictures[0].size
        sheet = Image.new("RGB", (columns * width, len(rows) * height))
        for y, row in enumerate(rows):
            for x, picture in enumerate(row):
                sheet.paste(picture, (x * width, y * height))
        sheet.save(folder / f"{name}.jpg", quality=88)
        print(folder / f"{name}.jpg")

    prompt = "a large star in the center on a blue background"
    plain = pipeline(prompt, generator=0, num_images_per_prompt=4)
    names = [f"a {read(picture).get('colour')} star" for picture in plain]
    guided = pipeline([prompt] * 4, generator=0, negative_prompt=names, **NAG)
    words = [*(f"seed {i}" for i in range(4)), *(f"not {name}" for name in names)]
    save("nag", [label(*pair) for pair in zip([*plain, *guided], words)], 4)

    prompt = "a small yellow star on a black background"
    rows = [pipeline(prompt, generator=0, num_images_per_prompt=6, variety=variety) for variety in (0.0, VARIETY)]
    save("variety", [label(picture, f"variety {0 if row is rows[0] else 3}") for row in rows for picture in row], 6)

    prompt = "a striped red heart on the left and a small blue crescent on the right, on a white background"
    ways = [("euler", "even"), ("heun", "even"), ("res_multistep", "simple"), ("dpmpp_2m", "beta")]
    asked = {"generator": 3, "num_inference_steps": 8}
    found = [(pipeline(prompt, **asked, sampler=s, schedule=c)[0], f"{s}, {c}") for s, c in ways]
    save("samplers", [label(*pair) for pair in found], 4)

    prompt = "a large striped red heart on a white background"
    first = pipeline(prompt, generator=1)
    large = pipeline.upscale(first, prompt, 2)
    enlarged = first[0].resize(large[0].size, Image.Resampling.LANCZOS)
    save("upscale", [label(enlarged, "enlarged"), label(large[0], "upscaled")], 2)
    contact_sheet([large[0]]).resize((384, 384)).save(ROOT / "example_workflows" / "Z-Image upscale.jpg", quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("nag", "variety", "tiles", "cost"))
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of captions; NAG's scale was chosen with 1's (default)")
    parser.add_argument("--size", type=int, default=256, help="of nag, variety and what tiles enlarge (default 256)")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--tile", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="transformer file; the bundled INT4 one if left out")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the examples' pictures instead")
    args = parser.parse_args()
    pipeline = load_pipeline(args.model, device=args.device)
    if args.pictures:
        return write_pictures(pipeline, args.pictures)
    tasks = {
        "nag": lambda: measure_nag(pipeline, args.captions, args.size, args.seed),
        "variety": lambda: measure_variety(pipeline, max(args.captions // 10, 1), args.size, args.seed),
        "tiles": lambda: measure_tiles(
            pipeline, max(args.captions // 25, 1), args.size, args.factor, args.tile, args.seed
        ),
        "cost": lambda: measure_cost(pipeline, args.size),
    }
    figures = {}
    for name in args.only or tasks:
        figures[name] = {key: round(value, 3) for key, value in tasks[name]().items()}
        print(name, figures[name], flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
