"""The colours of the demo's latents, for live previews: `python demo_training/preview.py` prints them.

A linear fit from the 16 channels of a latent cell to the mean colour (-1..1) of its 8 x 8 pixels, by least squares over
the latents that the demo's VAE gives pictures of `scenes.py`. `zimage_core/demo/__init__.py` holds the numbers.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scenes

PICTURES, SIDE = 96, 128


def fit() -> tuple[torch.Tensor, float]:
    """(17, 3) factors, the last row the bias, and the root mean square of what they miss."""
    from zimage_core.demo import demo_files
    from zimage_core.formats.vae import load_vae

    rng = random.Random(0)
    drawn = [scenes.draw(scenes.random_scene(rng), SIDE, SIDE, rng) for _ in range(PICTURES)]
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = load_vae(demo_files()["vae"]).encode(pictures)
    cells = latents.movedim(1, -1).reshape(-1, latents.shape[1]).double()
    cells = torch.cat([cells, torch.ones(len(cells), 1)], 1)
    colours = torch.nn.functional.avg_pool2d(pictures, 8).movedim(1, -1).reshape(-1, 3).double()
    factors = torch.linalg.lstsq(cells, colours).solution
    return factors, (cells @ factors - colours).square().mean().sqrt().item()


if __name__ == "__main__":
    found, missed = fit()
    for row in found.tolist():
        print("    ({:.4f}, {:.4f}, {:.4f}),".format(*row))
    print(f"misses {missed:.3f} of a range of 2")
