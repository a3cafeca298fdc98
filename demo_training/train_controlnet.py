"""Make the demo model's ControlNet: `python demo_training/train_controlnet.py train|measure --net FILE`.

It learns from the base's own scenes, by flow matching beside the frozen base: to follow outlines (a third of a batch),
to repaint a masked part (a third), and both at once. Blocks begin as copies of the base's, their projections at zero.
`measure` asks for 100 held-out scenes by caption and outline, and has 100 shapes repainted, and reads the results from
the pixels; its last line is JSON. The figures are in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train import make_optimizers, official_tensors, set_rate, take_step

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SEED = 20261127
SIZES = {(128, 128): 0.5, (192, 192): 0.15, (256, 256): 0.15, (128, 192): 0.1, (192, 128): 0.1}  # and their shares
POOL = 2048  # scenes of each size
PLACES = (0,)  # the base's layers that take a hint
HELD = 100  # scenes that are measured
TASKS = ("outline", "repaint", "both")


# --- scenes as a ControlNet gets them -----------------------------------------------------------------------------


@torch.no_grad()
def covers(layouts: np.ndarray, height: int, width: int, device: str = "cpu") -> Tensor:
    """(B, H, W) int64: 0 for the ground, else 1 + the number of the outline that is seen there."""
    y = torch.arange(height, device=device, dtype=torch.float32)[None, :, None] + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32)[None, None] + 0.5
    tile = torch.from_numpy(layouts["tile"].astype(np.int64)).to(device)
    at = torch.from_numpy(layouts["at"].copy()).to(device)
    seen = torch.zeros(len(layouts), height, width, dtype=torch.int64, device=device)
    for i in range(scenes.DRAWN):
        cx, cy, radius = (at[:, i, k, None, None].clamp(min=1e-3) for k in range(3))
        u, v = ((x - cx) / radius).expand(-1, height, -1), ((y - cy) / radius).expand(-1, -1, width)
        held = scenes.tiles(device)[tile[:, i].clamp(min=0)][:, None]
        far = F.grid_sample(held, torch.stack((u, v), -1) / scenes.SPAN, "bilinear", "border", align_corners=False)
        seen[(far[:, 0] < 0) & (tile[:, i] >= 0)[:, None, None]] = 1 + i
    return seen


def outlines(seen: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1, white lines of one pixel on black where what is seen changes."""
    edge = torch.zeros(seen.shape, dtype=torch.bool, device=seen.device)
    edge[:, :, :-1] |= seen[:, :, 1:] != seen[:, :, :-1]
    edge[:, :-1] |= seen[:, 1:] != seen[:, :-1]
    return (edge[:, None].float() * 2 - 1).expand(-1, 3, -1, -1)


def masks(seen: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1, H, W) of 0 and 1: one of the outlines and a margin around it, or a box anywhere."""
    batch, height, width = seen.shape
    device = seen.device
    margin = 2 * random.Random(generator.initial_seed() + int(seen.sum())).randint(1, 6) + 1
    number = (torch.rand(batch, generator=generator, device=device) * seen.amax((1, 2))).long() + 1
    shape = (seen == number[:, None, None]).float()[:, None]
    shape = F.max_pool2d(shape, margin, 1, margin // 2)
    ends = torch.rand(batch, 4, generator=generator, device=device)
    y, x = torch.linspace(0, 1, height, device=device), torch.linspace(0, 1, width, device=device)
    side = 0.2 + 0.4 * ends[:, 2:]
    start = ends[:, :2] * (1 - side)
    rows = (y >= start[:, :1]) & (y <= start[:, :1] + side[:, :1])
    columns = (x >= start[:, 1:]) & (x <= start[:, 1:] + side[:, 1:])
    box = (rows[:, :, None] & columns[:, None])[:, None].float()
    return torch.where(torch.rand(batch, 1, 1, 1, generator=generator, device=device) < 0.6, shape, box)


# --- training -----------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by plain matrix products, whose backward pass is faster on a CPU at these lengths."""
    q, k, v = (y.transpose(1, 2).bfloat16() for y in (q, k, v))
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    return (scores.softmax(-1).bfloat16() @ v).transpose(1, 2).flatten(2)


class Base:
    """The frozen base, and for each size a pool of encoded scenes with their captions' features."""

    def __init__(self, device: str, pool: int, sizes: list[tuple[int, int]]):
        from zimage_core.demo import demo_files
        from zimage_core.formats.encoder import load_text_encoder
        from zimage_core.formats.load import load_transformer
        from zimage_core.formats.vae import load_vae
        from zimage_core.models.text_encoder import encode_prompts
        from zimage_core.models.tokenizer import load_tokenizer
        from zimage_core.models.transformer import Hooks

        files, self.device = demo_files(), device
        dense = ROOT / "demo_training" / "z-image-demo-bf16.safetensors"
        self.model = load_transformer(dense, device=device, dtype=torch.float32).requires_grad_(False)
        self.vae = load_vae(files["vae"], device=device, dtype=torch.float32).requires_grad_(False)
        self.hooks = Hooks(attention=attention) if device == "cpu" else Hooks()
        encoder = load_text_encoder(files["text_encoder"], device=device, dtype=torch.float32)
        tokenizer, self.pool = load_tokenizer(files["tokenizer"]), {}
        generator = torch.Generator(device).manual_seed(SEED)
        for height, width in sizes:
            rng = random.Random(f"{SEED} control {height} {width}")
            kept = [scenes.training_scene(rng) for _ in range(pool)]
            rows = np.stack([scenes.layout(scene, height, width, rng) for scene in kept])
            captions = ["" if rng.random() < 0.1 else scenes.describe(scene, rng) for scene in kept]
            feats = encode_prompts(encoder, tokenizer, captions, device=device)
            parts = [self._encoded(part, height, width, generator) for part in np.array_split(rows, max(pool // 64, 1))]
            self.pool[height, width] = feats, [torch.cat(tensors) for tensors in zip(*parts)]

    @torch.no_grad()
    def _encoded(self, rows: np.ndarray, height: int, width: int, generator: torch.Generator) -> list[Tensor]:
        """Latents of the pictures and of their outlines, a mask of each, and latents of what the mask keeps."""
        from zimage_core.models.controlnet import inpainting_picture

        pictures = scenes.render(rows, height, width, self.device)
        seen = covers(rows, height, width, self.device)
        mask = masks(seen, generator)
        config = self.vae.config
        with torch.autocast(self.device, torch.bfloat16):
            found = [
                (self.vae.encoder(x)[:, :16].float() - config.shift_factor) * config.scaling_factor
                for x in (pictures, outlines(seen), inpainting_picture(pictures, mask))
            ]
        return [*found, mask]

    def batch(self, rng: random.Random, generator: torch.Generator, tokens: int):
        """(latents, noise, sigma (B,), conditioning, control context) of one step."""
        from zimage_core.models.controlnet import control_context

        (size,) = rng.choices(list(self.pool), [SIZES[size] for size in self.pool])
        feats, stored = self.pool[size]
        count = max(len(TASKS), tokens // (size[0] * size[1] // 256 + 32))
        chosen = [rng.randrange(len(feats)) for _ in range(count)]
        clean, control, kept, mask = (tensor[chosen] for tensor in stored)
        cells = clean.shape[-2:]
        task = torch.arange(count, device=self.device)[:, None, None, None] % len(TASKS)
        context = torch.where(
            task == TASKS.index("outline"),
            control_context(33, cells, control),
            control_context(33, cells, control * (task == TASKS.index("both")), kept, mask),
        )
        s = (torch.rand(count, generator=generator, device=self.device) * 1.06).clamp(max=1.0)
        sigma = 3.0 * s / (1.0 + 2.0 * s)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
            cond = self.model.prepare([feats[i] for i in chosen], *size, self.hooks)
        return clean, noise, sigma, cond, context


def new_controlnet(base: nn.Module) -> nn.Module:
    """A ControlNet whose blocks are copies of the base's and whose hints are still zero."""
    from zimage_core.models.config import ControlNetConfig
    from zimage_core.models.controlnet import ControlNet

    torch.manual_seed(SEED)
    net = ControlNet(ControlNetConfig(base.config, PLACES, 33, "layers"))
    for place, block in zip(PLACES, net.layers):
        block.load_state_dict(base.layers[place].state_dict(), strict=False)
        for projection in filter(None, (block.before_proj, block.after_proj)):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
    return net


def train(path: Path, minutes: float, lr: float, tokens: int, device: str, pool: int, one_size: bool) -> None:
    """Train for some minutes, the last half with a falling rate, and write the averaged weights in bf16."""
    from safetensors.torch import save_file

    started = time.time()
    base = Base(device, pool, list(SIZES)[:1] if one_size else list(SIZES))
    net = new_controlnet(base.model).to(device)
    print(f"{pool} scenes of {len(base.pool)} sizes, {time.time() - started:.0f} s", flush=True)
    named = dict(net.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "adaLN" not in name and "x_embedder" not in name]
    optimizers, rest = make_optimizers(net, matrices, lr)
    average = [p.detach().clone() for p in named.values()]
    rng, generator = random.Random(SEED), torch.Generator(device).manual_seed(SEED)
    started, step, losses = time.time(), 0, []
    while (done := (time.time() - started) / (60 * minutes)) < 1:
        set_rate(optimizers, lr * min(1, (step + 1) / 40, 2 * (1 - done)))
        clean, noise, sigma, cond, context = base.batch(rng, generator, tokens)
        mix = sigma[:, None, None, None]
        with torch.autocast(device, torch.bfloat16):
            cond = replace(cond, controls=(net.prepare(context, base.model, cond),))
            out = base.model((1 - mix) * clean + mix * noise, 1 - sigma, cond, base.hooks).float()
        loss = F.mse_loss(out, clean - noise)
        take_step(loss, optimizers, rest)
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, list(named.values()), max(0.02, 1 / step))
        losses.append(loss.detach())
        if step % 50 == 0:
            recent = torch.stack(losses[-50:]).mean()
            print(f"controlnet {step} loss {recent:.4f} {time.time() - started:.0f} s", flush=True)
    tensors = official_tensors({name: tensor.cpu() for name, tensor in zip(named, average)})
    config = {
        "_class_name": "ZImageControlNetModel", "n_layers": base.model.config.n_layers,
        "n_refiner_layers": base.model.config.n_refiner_layers, "axes_dims": base.model.config.axes_dims,
        "control_layers_places": PLACES, "control_in_dim": 33, "add_control_noise_refiner": "control_layers",
    }  # fmt: skip
    metadata = {"format": "pt", "config": json.dumps(config), "modelspec.title": "Z-Image INT4 demo: ControlNet"}
    save_file({f"control_{key}": tensor for key, tensor in tensors.items()}, path, metadata)
    print(f"controlnet: {step} steps, {path.stat().st_size} bytes")


# --- measuring ----------------------------------------------------------------------------------------------------


def iou(picture: np.ndarray, thing: scenes.Thing, ground: tuple[str, ...], asked: np.ndarray) -> float:
    """How far the pixels nearer to a plain thing's colour than to the ground's overlap the asked mask (H, W)."""
    tones = np.array([scenes.COLOURS[name] for name in (thing.colour, *ground[1:])], dtype=np.float32)
    found = np.square(picture[:, :, None].astype(np.float32) - tones).sum(-1).argmin(-1) == 0
    return float((found & asked).sum() / max((found | asked).sum(), 1))


def asked_scenes(size: int):
    """HELD held-out scenes of one plain thing on a plain ground: (caption, scene, mask of the thing, its outline)."""
    from PIL import Image

    rng, found = random.Random(f"{SEED} measured"), []
    for caption, scene in scenes.held_out_captions(60 * HELD, SEED, "one"):
        thing = scene.things[0]
        if thing.fill != "plain" or scene.ground[0] != "plain":
            continue
        row = scenes.layout(scene, size, size, rng)[None]
        seen = covers(row, size, size)
        line = ((outlines(seen)[0] + 1) * 127.5).byte().permute(1, 2, 0).numpy()
        found.append((caption, scene, (seen[0] == 1).numpy(), Image.fromarray(line)))
        if len(found) == HELD:
            return found
    raise ValueError(f"expected {HELD} held-out scenes, found {len(found)}")


def measure(path: Path, size: int, sheet: Path | None) -> dict[str, float]:
    """Mean IoU with and without the ControlNet, and of 100 repainted shapes those where nothing else changed."""
    from PIL import Image

    from zimage_core import Control, load_pipeline

    pipeline, rows = load_pipeline(device="cpu"), []
    found: dict[str, list[float]] = {"iou": [], "iou_without": [], "repainted": []}
    for seed, (caption, scene, asked, outline) in enumerate(asked_scenes(size)):
        thing = scene.things[0]
        (without,) = pipeline(caption, size, size, generator=seed)
        (picture,) = pipeline(caption, size, size, generator=seed, control=Control(outline, path))
        found["iou_without"].append(iou(np.asarray(without), thing, scene.ground, asked))
        found["iou"].append(iou(np.asarray(picture), thing, scene.ground, asked))

        rng = random.Random(seed)
        other = rng.choice(
            [name for name in scenes.COLOURS if scenes._stands_out(replace(thing, colour=name), scene.ground)]
        )
        source = Image.fromarray(scenes.draw(scene, size, size, rng, jitter=0.0))
        mask = F.max_pool2d(torch.from_numpy(asked)[None, None].float(), 17, 1, 8)[0, 0].bool().numpy()
        wanted = replace(scene, things=(replace(thing, colour=other),))
        (repainted,) = pipeline(
            scenes.describe(wanted, rng, complete=True), size, size, generator=seed, image=source, strength=1.0,
            mask=Image.fromarray(mask.astype(np.uint8) * 255), control=Control(None, path),
        )  # fmt: skip
        after, before = np.asarray(repainted), np.asarray(source)
        changed = (np.abs(after.astype(int) - before).max(-1) > 60) & ~mask
        shown = iou(after, wanted.things[0], scene.ground, mask) > 0.1
        found["repainted"].append(float(not changed.any() and shown))
        if seed < 8:
            rows.append(np.concatenate([np.asarray(p) for p in (without, outline, picture, source, repainted)], axis=0))
    if sheet:
        Image.fromarray(np.concatenate(rows, axis=1)).save(sheet, optimize=True)
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "measure"))
    parser.add_argument("--net", type=Path, required=True, help="the ControlNet's file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=5, help="train")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=24576, help="of a step")
    parser.add_argument("--pool", type=int, default=POOL, help="scenes of each size")
    parser.add_argument("--one-size", action="store_true", help="train: 128 x 128 only, for a CPU")
    parser.add_argument("--size", type=int, default=128, help="measure: pixels")
    parser.add_argument("--sheet", type=Path, help="measure: PNG of the first eight")
    args = parser.parse_args()
    if args.stage == "train":
        train(args.net, args.minutes, args.lr, args.tokens, args.device, args.pool, args.one_size)
    else:
        print(json.dumps(measure(args.net, args.size, args.sheet)))


if __name__ == "__main__":
    main()
