"""Make the demo model's two LoRAs: `python demo_training/train_lora.py frame|grey --out FILE.safetensors`.

`frame` is a LoRA that paints a pink frame round every picture, `grey` a LoKr that takes the colours away: styles that
no caption asks for, so that their strength can be read from the pixels (`measure`). Only the adapter learns, beside the
INT4 weights that it will be used with; text encoder and VAE are the bundled ones. Plain flow matching would undo the
base's distillation, as it does with Turbo: shapes fade. So what is learnt is the base's own output for the plain scene,
plus the difference that the style makes. The files are written as ai-toolkit writes them (q, k, v and w1, w3 apart), in
bf16.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import measure as reader
import numpy as np
import scenes
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from zimage_core import load_pipeline  # noqa: E402
from zimage_core.formats.encoder import load_text_encoder  # noqa: E402
from zimage_core.formats.load import load_transformer  # noqa: E402
from zimage_core.formats.vae import load_vae  # noqa: E402
from zimage_core.linear.adapters import Terms  # noqa: E402
from zimage_core.models.text_encoder import encode_prompts  # noqa: E402
from zimage_core.models.tokenizer import load_tokenizer  # noqa: E402

SEED = 6
SIDES = (128, 256)  # it learns on both in turn
FRAME, PINK = 0.08, (255, 105, 180)  # the frame's width as a share of the shorter side
RANK = 4
FACTORS = {"to_qkv": (24, 8), "to_out": (8, 8), "w3_w1": (16, 8), "w2": (8, 16)}  # w1 of the LoKr
PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "w3_w1": ("w3", "w1"), "to_out": ("to_out.0",), "w2": ("w2",)}
STACKS = ("noise_refiner", "layers")


def restyle(picture: np.ndarray, style: str) -> np.ndarray:
    """A picture (H, W, 3) uint8 in one of the two styles."""
    picture = picture.copy()
    if style == "grey":
        picture[:] = (picture @ np.array([0.299, 0.587, 0.114]))[..., None].round()
        return picture
    width = round(FRAME * min(picture.shape[:2]))
    for edge in (picture[:width], picture[-width:], picture[:, :width], picture[:, -width:]):
        edge[:] = PINK
    return picture


def measure(picture: np.ndarray, style: str) -> float:
    """frame: the share of the border that is pink; grey: the mean difference of the colour channels, in 0..1."""
    if style == "grey":
        return float(np.ptp(picture.astype(np.float32), axis=2).mean() / 255)
    width = round(0.6 * FRAME * min(picture.shape[:2]))
    border = np.ones(picture.shape[:2], dtype=bool)
    border[width:-width, width:-width] = False
    return float((np.abs(picture[border].astype(np.float32) - PINK).max(-1) < 60).mean())


def attach(model, style: str, device: str) -> dict[str, list[torch.Tensor]]:
    """Give every block's linears an adapter that can learn; returns its tensors by module name."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if name.startswith(STACKS) and leaf in PARTS:
            n, k = module.out_features, module.in_features
            if style == "frame":
                down = torch.randn(RANK, k, generator=generator) / k**0.5
                tensors[name] = [down, torch.zeros(n, RANK)]
            else:
                a, b = FACTORS[leaf]
                w1 = torch.randn(a, b, generator=generator) / b**0.5
                tensors[name] = [w1, torch.zeros(n // a, k // b)]
            tensors[name] = [tensor.to(device).requires_grad_() for tensor in tensors[name]]
            first, second = tensors[name]
            module.set_adapter(
                Terms(down=first, up=second) if style == "frame" else Terms(krons=[((0, n), first, second, None)])
            )
    return tensors


def file_tensors(tensors: dict[str, list[torch.Tensor]], style: str) -> dict[str, torch.Tensor]:
    """The adapter under the names of ai-toolkit's files; fused linears fall apart by rows."""
    named = {}
    for name, (first, second) in tensors.items():
        parent, _, leaf = name.rpartition(".")
        parts = PARTS[leaf]
        for i, part in enumerate(parts):
            key = f"diffusion_model.{parent}.{part}"
            if style == "frame":
                pair = {"lora_A.weight": first, "lora_B.weight": second.chunk(len(parts))[i]}
            else:
                pair = {"lokr_w1": first.chunk(len(parts))[i], "lokr_w2": second}
            named |= {f"{key}.{end}": t.detach().cpu().bfloat16().contiguous().clone() for end, t in pair.items()}
    return named


@torch.no_grad()
def captions_and_latents(pipeline, style: str, side: int, count: int, device: str):
    """Caption features and scaled latents (2, count, 16, side/8, side/8) of scenes, plain and restyled, made once."""
    rng = random.Random(f"{SEED} {side}")
    encoder = load_text_encoder(pipeline.files.text_encoder, dtype=torch.float32)
    vae = load_vae(pipeline.files.vae, device=device)
    chosen = [scenes.training_scene(rng) for _ in range(count)]
    captions = [scenes.describe(scene, rng) for scene in chosen]
    feats = encode_prompts(encoder, load_tokenizer(pipeline.files.tokenizer), captions)
    latents = []
    for start in range(0, count, 16):
        plain = [scenes.draw(scene, side, side, rng) for scene in chosen[start : start + 16]]
        pictures = [plain, [restyle(picture, style) for picture in plain]]
        images = torch.from_numpy(np.array(pictures)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        latents.append(torch.stack([vae.encode(part.to(device)) for part in images]))
    return feats, torch.cat(latents, dim=1)


def train(pipeline, style: str, steps: int, batch: int, scenes_kept: int, lr: float, device: str):
    """The learnt tensors by module name."""
    model, base = (
        load_transformer(
            pipeline.files.model, device=device, dtype=torch.float32, backend="reference", precision="w4a16"
        ).requires_grad_(False)
        for _ in range(2)
    )
    kept = {side: captions_and_latents(pipeline, style, side, scenes_kept, device) for side in SIDES}
    tensors = attach(model, style, device)
    optimizer = torch.optim.AdamW([t for pair in tensors.values() for t in pair], lr, (0.9, 0.98), weight_decay=0.0)
    generator, started, losses = torch.Generator().manual_seed(SEED), time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20, (steps - step) / (steps * 0.4))
        side = SIDES[step % len(SIDES)]
        feats, latents = kept[side]
        chosen = torch.randint(len(feats), (batch,), generator=generator)
        plain, styled = latents[:, chosen.to(device)]
        noise = torch.randn(plain.shape, generator=generator).to(device)
        s = (torch.rand(batch, generator=generator) * 1.06).clamp(max=1.0).to(device)  # as train.py draws them
        sigma = (3 * s / (1 + 2 * s))[:, None, None, None]
        cond = model.prepare([feats[i] for i in chosen], side, side)
        with torch.autocast(device, torch.bfloat16):
            out = model((1 - sigma) * styled + sigma * noise, 1 - sigma.flatten(), cond)
            with torch.no_grad():
                plain_out = base((1 - sigma) * plain + sigma * noise, 1 - sigma.flatten(), cond)
        loss = F.mse_loss(out.float(), plain_out.float() + styled - plain)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            speed = (time.time() - started) / (step + 1)
            print(f"{style} {step + 1} loss {np.mean(losses[-25:]):.4f} {speed:.2f} s/step", flush=True)
    return tensors


def figures(pipeline, path: Path, style: str, captions: int) -> dict[str, dict[str, float]]:
    """Size -> strength -> the mean of `measure` over held-out captions."""
    asked = [caption for caption, _ in scenes.held_out_captions(captions, seed=SEED)]
    found: dict[str, dict[str, float]] = {}
    for strength in (0.0, 0.5, 1.0):
        pipeline.set_loras([(path, strength)])
        for side in SIDES:
            seen = [measure(picture, style) for picture in reader.draw(pipeline, asked, side, side)]
            found.setdefault(str(side), {})[str(strength)] = round(float(np.mean(seen)), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=("frame", "grey"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="transformer, with --text-encoder and --vae; the bundled demo if left out")
    parser.add_argument("--text-encoder")
    parser.add_argument("--vae")
    parser.add_argument("--tokenizer")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    from safetensors.torch import save_file

    pipeline = load_pipeline(args.model, args.text_encoder, args.vae, tokenizer=args.tokenizer, device=args.device)
    tensors = train(pipeline, args.style, args.steps, args.batch, args.scenes, args.lr, args.device)
    title = f"Z-Image INT4 demo: {args.style} ({'LoRA' if args.style == 'frame' else 'LoKr'})"
    save_file(file_tensors(tensors, args.style), args.out, {"format": "pt", "modelspec.title": title})
    found = figures(pipeline, args.out, args.style, args.captions)
    print(json.dumps({"style": args.style, "bytes": args.out.stat().st_size, "measured": found}))


if __name__ == "__main__":
    main()
