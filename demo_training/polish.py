"""Train the exported demo's decoder on, above all for 128 x 128: `python demo_training/polish.py --work DIR`, on a GPU.

Its latents are as the transformer leaves them: those of a scene, noised to one of the sampler's last levels and
denoised again by the BF16 model or by its INT4 file, so that they still belong to the scene's pixels. Encoder and
transformer stay as they are. The learning rate follows the clock. See README.md for the settings used and the measured
figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
from pathlib import Path

import numpy as np
import scenes
import torch
import train
from torch import Tensor, nn

from zimage_core.formats.load import load_transformer
from zimage_core.models.transformer import Conditioning
from zimage_core.models.vae import VAE
from zimage_core.sampler import get_sigmas

PRECISIONS = ("w4a16", "w4a8", "w4a4")
# edge: share of the decoder's steps, shards of 256 scenes, pictures of a step
SIZES = {128: (0.62, 160, 96), 256: (0.13, 16, 24), 192: (0.08, 12, 40), 384: (0.1, 6, 10), 512: (0.07, 3, 6)}
STEPS = 8
SIGMAS = get_sigmas(STEPS).tolist()
LEVELS, SHARES = (7, 6, 5, 4), (0.3, 0.3, 0.22, 0.18)  # steps of the sampler that are done already, how often
FIRST_SHARD = 5000  # scenes that no other stage has seen


def noised(latents: Tensor, level: int) -> Tensor:
    return (1 - SIGMAS[level]) * latents + SIGMAS[level] * torch.randn_like(latents)


def denoise(model: nn.Module, x: Tensor, level: int, cond: Conditioning) -> Tensor:
    """The sampler's steps from a level on."""
    for i in range(level, STEPS):
        flow = model(x, torch.full((len(x),), 1 - SIGMAS[i], device=x.device), cond).float()
        x = x + (SIGMAS[i] - SIGMAS[i + 1]) * flow
    return x


class Scenes:
    """Captioned scenes of one edge with latents (n, 16, h, w), as encoded and as the transformer leaves them (`left`).

    One in six has colours of no palette, and no true caption. `often` is how often each is chosen, those more that are
    hard in few pixels.
    """

    def __init__(self, edge: int, parts: list, encoder: nn.Module, norm: tuple[float, float], device: str):
        rows, ids, lengths = (np.concatenate(column) for column in zip(*parts))
        kept = lengths[:, 0] > 0
        self.edge, self.device, self.rows = edge, device, rows[kept]
        self.ids, self.lengths = (torch.from_numpy(t[kept, 0]).to(device).long() for t in (ids, lengths))
        text = (self.rows["tile"] >= len(scenes.SHAPES)).any(1)
        filled = (self.rows["fill"] > 0).any(1)
        often = 1.0 + 1.5 * text + 0.7 * filled + 0.7 * (self.rows["ground"] == scenes.GROUNDS.index("horizon"))
        self.strange = np.arange(len(self.rows)) % 6 == 0
        rng = np.random.default_rng(edge)
        for name in ("tones", "colours"):
            column = self.rows[name]
            changed = (rng.random(column.shape[:-2]) < 0.6) & self.strange.reshape(-1, *[1] * (column.ndim - 3))
            column[changed] = rng.uniform(0, 255, column[changed].shape)
        self.often = often / often.sum()
        latents, numbers = [], np.arange(len(self.rows))
        for chosen in np.array_split(numbers, -(-len(numbers) * edge**2 // train.PIXELS_AT_ONCE)):
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                mean = encoder(self.images(chosen))[:, :16].float()
            latents.append(((mean - norm[0]) * norm[1]).bfloat16())
        self.latents = torch.cat(latents)
        self.left = self.latents.clone()

    def images(self, chosen: np.ndarray) -> Tensor:
        images = scenes.render(self.rows[chosen], self.edge, self.edge, self.device)
        return images.to(memory_format=torch.channels_last)

    def conditioning(self, both: nn.ModuleDict, chosen: Tensor) -> Conditioning:
        lengths = self.lengths[chosen]
        length = next(n for n in train.LENGTHS if n >= int(lengths.max()))
        return train.conditioning(both, self.ids[chosen, :length], lengths, (self.edge, self.edge))

    @torch.no_grad()
    def leave(self, models: list[nn.ModuleDict], rng: np.random.Generator, batch: int) -> None:
        """Have the models leave eight in nine of the latents that have true captions."""
        order = rng.permutation(np.flatnonzero(~self.strange))
        for number, numbers in enumerate(np.array_split(order, max(1, len(order) // batch))):
            if number % 9 == 0:
                continue
            both, level = models[number % len(models)], int(rng.choice(LEVELS, p=SHARES))
            chosen = torch.from_numpy(numbers).to(self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=both["model"].dtype == torch.float32):
                x = noised(self.latents[chosen].float(), level)
                left = denoise(both["model"], x, level, self.conditioning(both, chosen))
            self.left[chosen] = left.bfloat16()


def distance(out: Tensor, images: Tensor) -> Tensor:
    """L1 + 2 MSE, four times in the outermost columns, from which the ground is read; and L1 of what changes from pixel
    to pixel."""
    off = out.float() - images
    weight = torch.ones(off.shape[-1], device=off.device)
    weight[:3], weight[-3:] = 4.0, 4.0
    loss = ((off.abs() + 2 * off.square()) * weight).mean()
    return loss + 0.5 * (off.diff(dim=2).abs().mean() + off.diff(dim=3).abs().mean())


class Decoding:
    """The decoder for latents as the transformer has them; compiled for 128 x 128 if asked."""

    def __init__(self, vae: VAE, norm: tuple[float, float], device: str, compiled: bool):
        self.plain, self.norm, self.device = vae.decoder, norm, device
        self.small = torch.compile(vae.decoder, dynamic=False) if compiled else vae.decoder

    def __call__(self, latents: Tensor) -> Tensor:
        latents = (latents / self.norm[1] + self.norm[0]).to(memory_format=torch.channels_last)
        with torch.autocast(self.device, torch.bfloat16):
            return (self.small if latents.shape[2:] == (16, 16) else self.plain)(latents)


def decoder_optimizers(vae: VAE, lr: float) -> tuple[list, list[Tensor]]:
    """Muon for the kernels, AdamW for the rest, which comes too."""
    kernels = [p for p in vae.decoder.parameters() if p.ndim > 1]
    rest = [p for p in vae.decoder.parameters() if p.ndim == 1]
    return [train.Muon(kernels, lr, 0.95), torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.0)], rest


def train_decoder(pools: dict[int, Scenes], decoding: Decoding, vae: VAE, minutes: float, lr: float) -> None:
    optimizers, rest = decoder_optimizers(vae, lr)
    rng, clock, step, seen = np.random.default_rng(train.SEED), train.Schedule(minutes, None, 0.0), 0, []
    shares = np.array([SIZES[edge][0] for edge in pools])
    while not clock.over:
        train.set_rate(optimizers, lr * min((step + 1) / 50, 0.005 + 0.995 * (1 - clock.progress) ** 1.2))
        pool = pools[int(rng.choice(list(pools), p=shares / shares.sum()))]
        chosen = rng.choice(len(pool.rows), SIZES[pool.edge][2], p=pool.often)
        loss = distance(decoding(pool.left[torch.from_numpy(chosen).to(pool.device)].float()), pool.images(chosen))
        train.take_step(loss, optimizers, rest)
        step += 1
        if pool.edge == min(pools):
            seen.append(loss.detach())
        if step % 250 == 0:
            print(f"decoder {step} loss {torch.stack(seen).mean():.4f} {clock.seconds:.0f} s", flush=True)
            seen.clear()
    print(f"decoder: {step} steps, {clock.seconds:.0f} s", flush=True)


def write_like(source: Path, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file with the metadata and the tensors of another, some of them replaced by new ones in bf16."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    new = {name: tensor.detach().cpu().bfloat16().contiguous() for name, tensor in tensors.items()}
    save_file(load_file(source) | new, path, metadata)


def load_vae(path: Path) -> tuple[VAE, tuple[float, float]]:
    """The VAE in fp32, and its shift and scale."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    vae = VAE(train.VAE_SIZES).requires_grad_(False)
    vae.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    return vae, (config["shift_factor"], config["scaling_factor"])


def load_models(model_file: Path, folder: Path, device: str) -> list[nn.ModuleDict]:
    """Encoder and transformer: of the BF16 file in fp32, and of the INT4 file in each precision."""
    both = train.build_models()
    train.load_exported(both, model_file, folder)
    models = [both.to(device).requires_grad_(False)]
    encoder = copy.deepcopy(both["encoder"]).bfloat16()
    for precision in PRECISIONS:
        int4 = load_transformer(next(folder.glob("svdq*")), device=device, precision=precision)
        models.append(nn.ModuleDict({"encoder": encoder, "model": int4}))
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the new files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=3.2)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--share", type=float, default=1.0, help="of the scenes in SIZES")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder for 128 x 128")
    parser.add_argument("--model-file", type=Path, default=train.ROOT / "demo_training/z-image-demo-bf16.safetensors")
    parser.add_argument("--folder", type=Path, default=train.ROOT / "zimage_core" / "demo")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    layouts = {}
    with multiprocessing.Pool() as pool:  # before the device is in use, since they are forks
        for edge, (_, shards, _) in SIZES.items():
            numbers = range(FIRST_SHARD, FIRST_SHARD + max(1, round(shards * args.share)))
            tasks = [(str(args.folder / "tokenizer"), edge, edge, number) for number in numbers]
            layouts[edge] = pool.map(train.captioned_layouts, tasks, chunksize=1)
    torch.manual_seed(train.SEED)
    torch.backends.cudnn.benchmark = True
    vae, norm = load_vae(args.folder / "vae.safetensors")
    vae.to(args.device, memory_format=torch.channels_last)
    models, rng, pools = load_models(args.model_file, args.folder, args.device), np.random.default_rng(train.SEED), {}
    for edge, parts in layouts.items():
        pools[edge] = Scenes(edge, parts, vae.encoder, norm, args.device)
        pools[edge].leave(models, rng, 2 * SIZES[edge][2])
    decoding = Decoding(vae, norm, args.device, args.compile)
    vae.decoder.requires_grad_(True)

    train_decoder(pools, decoding, vae, args.minutes, args.lr)
    tensors = {f"decoder.{key}": tensor for key, tensor in vae.decoder.state_dict().items()}
    write_like(args.folder / "vae.safetensors", args.work / "vae.safetensors", tensors)


if __name__ == "__main__":
    main()
