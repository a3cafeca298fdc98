"""The same pictures from several models, side by side, with how far each is from the first model's.

PSNR and SSIM say how little a picture changed, not how good it is: a picture can differ in every leaf and be as
good. The sheet is for the eye, the numbers are for sorting.

Source: SSIM after Wang et al. 2004 (11 x 11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03), mean over channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import Pipeline

WINDOW, SIGMA = 11, 1.5
MARGIN, LINE = 8, 18  # pixels; lines grow with the pictures


@dataclass(frozen=True)
class Score:
    """How near a model's picture is to the first model's: PSNR in dB (inf if equal), SSIM up to 1.

    seed: its seed, or its number among the model's pictures.
    """

    label: str
    seed: int
    psnr: float
    ssim: float


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures of one size. ValueError if the sizes differ."""
    x, y = _pixels(a, b)
    error = (x - y).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity of two RGB pictures of one size. ValueError if sizes differ, or are below 11 x 11."""
    x, y = _pixels(a, b)
    if min(a.size) < WINDOW:
        raise ValueError(
            f"pictures: expected at least {WINDOW} x {WINDOW} pixels, found {a.size}; generate larger ones"
        )
    axis = torch.arange(WINDOW) - WINDOW // 2
    window = torch.exp(-axis.square() / (2 * SIGMA**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def blur(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(z[:, None], window[None, None])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def compare(
    prompt: str,
    models: Mapping[str, Callable[[], Pipeline]],
    seeds: Sequence[int],
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Image.Image, list[Score]]:
    """Generate the prompt for every seed with every model; the first is the reference of the others.

    models: label -> what loads its pipeline, which is dropped before the next one is loaded. Returns the sheet, a
    row for each seed and a column for each model, and the scores of the other models.
    progress(done, total, label) after each picture. ValueError for fewer than two models or no seed.
    """
    if len(models) < 2 or not seeds:
        raise ValueError(f"compare: expected two models or more and a seed, found {len(models)} and {len(seeds)}")
    pictures: dict[str, list[Image.Image]] = {}
    total = len(models) * len(seeds)
    for label, load in models.items():
        pipeline = load()
        pictures[label] = []
        for seed in seeds:
            pictures[label] += pipeline(prompt, height, width, num_inference_steps=steps, generator=seed)
            if progress:
                progress(sum(map(len, pictures.values())), total, label)
        del pipeline
    return side_by_side(list(pictures), list(pictures.values()), [f"seed {seed}" for seed in seeds], seeds)


def side_by_side(
    labels: Sequence[str], columns: Sequence[Sequence[Image.Image]], rows: Sequence[str], seeds: Sequence[int]
) -> tuple[Image.Image, list[Score]]:
    """The sheet of pictures that are there, and the scores of every column but the first, the reference.

    columns: for each label its pictures, one for each row; rows: captions of the first column; seeds: for the scores.
    ValueError where the pictures differ in size.
    """
    first, *others = columns
    scores = [
        [Score(label, seed, psnr(*pair), ssim(*pair)) for seed, *pair in zip(seeds, first, column, strict=True)]
        for label, column in zip(labels[1:], others, strict=True)
    ]
    found = [[f"PSNR {score.psnr:.1f} dB, SSIM {score.ssim:.3f}" for score in column] for column in scores]
    captions = list(zip(rows, *found, strict=True))
    return sheet(labels, list(zip(*columns, strict=True)), captions), [score for column in scores for score in column]


def sheet(
    labels: Sequence[str], rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]]
) -> Image.Image:
    """Rows of pictures of one size on white, a label above each column and a caption under each picture."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = rows[0][0].size
    line = max(LINE, width // 32)
    cell_w, cell_h = max(width, 170) + MARGIN, height + line + MARGIN
    canvas = Image.new("RGB", (MARGIN + cell_w * len(labels), MARGIN + line + cell_h * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = ImageFont.load_default(line * 2 // 3)
    for column, label in enumerate(labels):
        x = MARGIN + column * cell_w
        pen.text((x, MARGIN), _fitted(pen, label, cell_w - MARGIN), fill="black")
        for row, pictures in enumerate(rows):
            y = MARGIN + line + row * cell_h
            canvas.paste(pictures[column], (x, y))
            pen.text((x, y + height + 2), captions[row][column], fill="black")
    return canvas


def _fitted(pen, text: str, width: int) -> str:
    """The end of a text, where file names differ, as far as it fits."""
    if pen.textlength(text) <= width:
        return text
    while text and pen.textlength("..." + text) > width:
        text = text[1:]
    return "..." + text


def _pixels(a: Image.Image, b: Image.Image) -> list[torch.Tensor]:
    """Two pictures as (3, H, W) fp32 in 0..1."""
    if a.size != b.size:
        raise ValueError(f"pictures: expected one size, found {a.size} and {b.size}; generate both at the same size")
    raw = (torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8) for picture in (a, b))
    return [pixels.view(a.height, a.width, 3).permute(2, 0, 1) / 255 for pixels in raw]
