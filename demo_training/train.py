"""Make the bundled demo model on a GPU: `python demo_training/train.py STAGE --work DIR`, one stage after the other.

`vae` trains the autoencoder, `latents` learns the tokenizer and stores encoded scenes with tokenized captions, `model`
trains the text encoder and the transformer together by flow matching (x_t = (1 - sigma) x + sigma noise; the output is
x - noise, as diffusers' model gives it), `distill` teaches them to give at once what they give with guidance (Meng et
al., "On Distillation of Guided Diffusion Models", 2023), `export` writes the files. `vae`, `model` and `distill` take
--minutes, which the learning rate follows, save to DIR and go on from there; --stop-after ends a part earlier; `model
--begin` starts from the exported files. bf16 autocast throughout.
Matrices learn by Muon, the rest by AdamW; what is exported is the moving average of the weights. See README.md beside
this file for the settings used and the measured figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from zimage_core.models.config import ZImageConfig  # noqa: E402
from zimage_core.models.text_encoder import Layer, TextEncoder, TextEncoderConfig  # noqa: E402
from zimage_core.models.tokenizer import load_tokenizer  # noqa: E402
from zimage_core.models.transformer import Block, Conditioning, ZImageTransformer, rope_angles  # noqa: E402
from zimage_core.models.vae import VAE, VAEConfig  # noqa: E402

SEED = 20261127
VAE_SIZES = VAEConfig((24, 48, 64, 64), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0, shift_factor=0.0)
MODEL_SIZES = ZImageConfig(dim=384, n_layers=5, n_refiner_layers=1, n_heads=6, cap_feat_dim=128, axes_dims=(16, 24, 24))
ENCODER_SIZES = TextEncoderConfig(640, 128, 256, 3, 4, 2, 32)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTHS = (32, 64, 96)  # to which captions are padded, template included; a longer one is not trained on
PHRASINGS = 3  # of every scene
SHARD = 256  # scenes that a worker makes at a time

# (height, width): how many scenes are stored, and the share of the steps at the start and at the end
SIZES = {
    (128, 128): (80000, 0.48, 0.22),
    (256, 256): (24000, 0.13, 0.18),
    (192, 192): (12000, 0.05, 0.05),
    (512, 512): (6000, 0.05, 0.13),
    (384, 384): (8000, 0.06, 0.13),
    (128, 256): (8000, 0.02, 0.02),
    (256, 128): (8000, 0.02, 0.02),
    (128, 192): (8000, 0.02, 0.015),
    (192, 128): (8000, 0.02, 0.015),
    (256, 384): (3000, 0.01, 0.02),
    (384, 256): (3000, 0.01, 0.02),
    (256, 512): (2500, 0.01, 0.02),
    (512, 256): (2500, 0.01, 0.02),
    (320, 320): (5000, 0.02, 0.03),
    (192, 256): (5000, 0.015, 0.015),
    (256, 192): (5000, 0.015, 0.015),
    (384, 512): (2000, 0.005, 0.015),
    (512, 384): (2000, 0.005, 0.015),
    (160, 160): (8000, 0.02, 0.02),
    (448, 448): (2000, 0.01, 0.02),
}  # in the order in which they are stored; training starts with the first
VAE_BATCHES = {128: 96, 192: 40, 256: 24, 384: 10}  # edge: pictures of a step
CALIBRATION = 128  # captions for `zimage quantize --prompts`
PIXELS_AT_ONCE = 2**22  # that are rendered and encoded together


def save(state: dict, path: Path) -> None:
    """Write a checkpoint under a temporary name, then rename it."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps (Keller Jordan, 2024), for matrices and kernels.

    A parameter of more than two axes is taken as (out, rest); one whose `fused` attribute is n, as n matrices stacked.
    Matrices of one shape go through together.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            held = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(held, grads, 1.0 - group["momentum"])
            updates = torch._foreach_lerp(grads, held, group["momentum"])
            stacks: dict[tuple, list] = {}
            for p, update in zip(params, updates):
                parts = update.reshape(getattr(p, "fused", 1), -1, p[0].numel())
                tall = parts.shape[1] > parts.shape[2]
                parts = parts.mT if tall else parts
                stacks.setdefault(parts.shape[1:], []).append((p, parts, tall))
            for (rows, columns), members in stacks.items():
                x = torch.cat([parts for _, parts, _ in members]).bfloat16()
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x *= 0.2 * max(rows, columns) ** 0.5  # the RMS of an AdamW step, so that rates carry over
                pieces = x.float().split([len(parts) for _, parts, _ in members])
                steps = [(piece.mT if tall else piece).reshape(p.shape) for (p, _, tall), piece in zip(members, pieces)]
                moved = [p for p, _, _ in members]
                torch._foreach_mul_(moved, 1.0 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(moved, steps, alpha=-group["lr"])


class Schedule:
    """Progress 0..1 by the clock, over all parts of a run; `elapsed` seconds come from a checkpoint."""

    def __init__(self, minutes: float, stop_after: float | None, elapsed: float):
        self.total, self.elapsed, self.started = minutes * 60, elapsed, time.time()
        self.stop = self.started + 60 * (stop_after or minutes)

    @property
    def seconds(self) -> float:
        return self.elapsed + time.time() - self.started

    @property
    def progress(self) -> float:
        return min(self.seconds / self.total, 1.0)

    @property
    def over(self) -> bool:
        return self.progress >= 1.0 or time.time() >= self.stop


def set_rate(optimizers, rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def make_optimizers(model: nn.Module, matrices: list[Tensor], lr: float) -> tuple[list, list[Tensor]]:
    """Muon for a model's matrices, fused ones by their parts, and AdamW for the other parameters, which come too."""
    for name, parameter in model.named_parameters():
        parameter.fused = 3 if "to_qkv" in name else 2 if "w3_w1" in name else 1
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    others = torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr, 0.95, 0.01), others], rest


def take_step(loss: Tensor, optimizers: list, rest: list[Tensor]) -> None:
    """A step of every optimizer, the gradients of what is not Muon's clipped."""
    loss.backward()
    nn.utils.clip_grad_norm_(rest, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# --- stage 1: the VAE ---------------------------------------------------------------------------------------------


def _vae_layouts(task: tuple[int, int]) -> np.ndarray:
    """SHARD layouts of random scenes for the VAE; 40 % of the outlines and grounds have colours of no palette."""
    size, shard = task
    rng, colours = random.Random(f"{SEED} vae {size} {shard}"), np.random.default_rng(SEED + shard)
    rows = np.stack([scenes.layout(scenes.training_scene(rng), size, size, rng, 0.1) for _ in range(SHARD)])
    for name in ("tones", "colours"):
        strange = colours.random(rows[name].shape[:-2]) < 0.4
        rows[name][strange] = colours.uniform(0, 255, rows[name][strange].shape)
    return rows


def train_vae(
    work: Path, minutes: float, stop_after: float | None, lr: float, device: str, shards: int, decoder_only: bool
) -> None:
    """Autoencoder; decoder_only, the latents stay what they are."""
    with multiprocessing.Pool() as pool:
        tasks = {size: [(size, shard) for shard in range(shards)] for size in VAE_BATCHES}
        kept = {size: np.concatenate(pool.map(_vae_layouts, of_it)) for size, of_it in tasks.items()}
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True
    vae = VAE(VAE_SIZES)
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:] = -5.0  # start with little posterior noise, else it drowns the picture for long
        for name, parameter in vae.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.zero_()
            elif "conv" in name and parameter.ndim == 4:
                nn.init.orthogonal_(parameter)
    vae.to(device, memory_format=torch.channels_last)
    kernels = [p for p in vae.parameters() if p.ndim > 1]
    rest = [p for p in vae.parameters() if p.ndim == 1]
    optimizers = [Muon(kernels, lr, 0.9), torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.0)]
    step, path, elapsed = 0, work / "vae.pt", 0.0
    if path.exists():
        state = torch.load(path, map_location=device)
        vae.load_state_dict(state["model"])
        for optimizer, stored in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(stored)
        step, elapsed = state["step"], state["elapsed"]
    vae.encoder.requires_grad_(not decoder_only)
    clock, rng = Schedule(minutes, stop_after, elapsed), np.random.default_rng(SEED + step)
    sizes = list(VAE_BATCHES)
    figures = []
    while not clock.over:
        done = clock.progress
        set_rate(optimizers, lr * min((step + 1) / 50, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))))
        size = sizes[rng.choice(len(sizes), p=(0.4, 0.2, 0.25, 0.15))]
        rows = kept[size][rng.integers(len(kept[size]), size=VAE_BATCHES[size])]
        images = scenes.render(rows, size, size, device).to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            mean, logvar = vae.encoder(images).float().chunk(2, dim=1)
            logvar = logvar.clamp(-20, 10)
            out = vae.decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
        l1, l2 = F.l1_loss(out, images), F.mse_loss(out, images)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        (l1 + l2 + 1e-3 * kl).backward()
        nn.utils.clip_grad_norm_([p for p in vae.parameters() if p.grad is not None], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            figures.append(torch.stack((l1.detach(), l2.detach(), kl.detach())))
        if step % 500 == 0:
            recent = torch.stack(figures[-10:]).mean(0).tolist()
            print("vae {} l1 {:.4f} l2 {:.5f} kl {:.3f} {:.0f} s".format(step, *recent, clock.seconds), flush=True)
    state = {"model": vae.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    save(state | {"elapsed": clock.seconds}, path)
    print(f"vae: {step} steps, {clock.seconds:.0f} s")


# --- stage 2: tokenizer and latents -------------------------------------------------------------------------------


def train_tokenizer(work: Path) -> None:
    """Byte-level BPE in Qwen's manner, learnt from captions without letters to draw, so that these stay apart."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENCODER_SIZES.vocab_size, special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    rng = random.Random(SEED)
    drawn = [scenes.training_scene(rng) for _ in range(12000)]
    captions = [scenes.describe(scene, rng) for scene in drawn if scene.kind != "text"]
    nouns = ["the letter", "the letters", "the digit", "the digits", "the number", "the character", "the characters",
             "the text"]  # fmt: skip
    tokenizer.train_from_iterator(captions + (nouns + ["user\n", "assistant\n"]) * 500, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(work / "tokenizer", save_jinja_files=False)
    path = work / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # known to all versions
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
    print(f"tokenizer: {len(fast)} tokens")


def captioned_layouts(task: tuple[str, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SHARD layouts, and of each PHRASINGS captions' tokens (SHARD, PHRASINGS, longest) int16 and their numbers; a
    number of 0 marks a caption that is too long. 4 % of the captions are empty, 4 % have a stray word."""
    tokenizer, height, width, shard = task
    rng, tokenize = random.Random(f"{SEED} {height} {width} {shard}"), load_tokenizer(tokenizer)
    rows = np.zeros(SHARD, scenes.Layout)
    ids = np.zeros((SHARD, PHRASINGS, LENGTHS[-1]), np.int16)
    lengths = np.zeros((SHARD, PHRASINGS), np.int16)
    for i in range(SHARD):
        scene = scenes.training_scene(rng)
        rows[i] = scenes.layout(scene, height, width, rng)
        for k in range(PHRASINGS):
            caption, drawn = scenes.describe(scene, rng), rng.random()
            caption = "" if drawn < 0.04 else scenes.with_stray_word(caption, rng) if drawn < 0.08 else caption
            tokens = tokenize(caption)
            if len(tokens) <= LENGTHS[-1]:
                ids[i, k, : len(tokens)], lengths[i, k] = tokens, len(tokens)
    return rows, ids, lengths


def store_latents(work: Path, device: str, share: float) -> None:
    """Encode the scenes of every size: a file for each holds raw latents (n, 16, h, w) bf16 and captions' tokens."""
    with multiprocessing.Pool(max(1, os.cpu_count() * 2 // 3)) as pool:  # before the device is in use: they are forks
        if not (work / "tokenizer").exists():
            train_tokenizer(work)
        vae = VAE(VAE_SIZES).eval().requires_grad_(False)
        vae.load_state_dict(torch.load(work / "vae.pt", map_location="cpu")["model"])
        encoder = vae.encoder.to(device, torch.bfloat16, memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
        (work / "latents").mkdir(exist_ok=True)
        started = time.time()
        for (height, width), (count, _, _) in SIZES.items():
            path = work / "latents" / f"{height}x{width}.pt"
            if path.exists():
                continue
            shards = max(1, round(count * share / SHARD))
            tasks = [(str(work / "tokenizer"), height, width, shard) for shard in range(shards)]
            latents, ids, lengths = [], [], []
            for rows, tokens, numbers in pool.imap(captioned_layouts, tasks):
                for part in np.array_split(rows, max(1, SHARD * height * width // PIXELS_AT_ONCE)):
                    images = scenes.render(part, height, width, device).bfloat16()
                    with torch.no_grad():
                        encoded = encoder(images.to(memory_format=torch.channels_last))[:, :16]
                    latents.append(encoded.contiguous())
                ids.append(torch.from_numpy(tokens))
                lengths.append(torch.from_numpy(numbers))
            save({"latents": torch.cat(latents).cpu(), "ids": torch.cat(ids), "lengths": torch.cat(lengths)}, path)
            print(f"latents {path.name} {shards * SHARD} {time.time() - started:.0f} s", flush=True)


# --- stage 3: text encoder and transformer ------------------------------------------------------------------------


def build_models() -> nn.ModuleDict:
    """The text encoder and the transformer, initialized so that every block starts gently."""
    torch.manual_seed(SEED)
    encoder, model = TextEncoder(ENCODER_SIZES), ZImageTransformer(MODEL_SIZES)
    nn.init.normal_(encoder.embed_tokens.weight, std=0.5)
    with torch.no_grad():
        for block in (*model.noise_refiner, *model.layers):
            linear = block.adaLN_modulation[0]
            linear.weight.normal_(std=0.02)
            linear.bias.zero_().unflatten(0, (4, -1))[1::2] = 0.3  # the gates
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.zero_()
        model.cap_pad_token.normal_(std=0.5)
        model.x_pad_token.normal_(std=0.5)
    return nn.ModuleDict({"encoder": encoder, "model": model})


class Data:
    """Stored latents by size on the device, as far as they are there yet, and batches drawn from them."""

    def __init__(self, work: Path, device: str):
        self.folder, self.device, self.sizes = work / "latents", device, {}
        self.groups: dict[tuple, list[tuple[int, Tensor]]] = {}  # size -> (padded length, captions' numbers)
        self.look()
        first = self.sizes[next(iter(SIZES))][0].float()
        self.shift, self.scale = first.mean().item(), 1.0 / first.std().item()

    def look(self) -> None:
        """Read the files that have come since."""
        for size in SIZES:
            path = self.folder / f"{size[0]}x{size[1]}.pt"
            if size in self.sizes or not path.exists():
                continue
            held = torch.load(path)
            lengths = held["lengths"].flatten().to(self.device)
            padded = torch.full_like(lengths, LENGTHS[-1])
            for length in LENGTHS[-2::-1]:
                padded[lengths <= length] = length
            padded[lengths == 0] = 0
            self.groups[size] = [(n, found) for n in LENGTHS if len(found := (padded == n).nonzero().flatten())]
            self.sizes[size] = (held["latents"].to(self.device), held["ids"].flatten(0, 1).to(self.device), lengths)

    def batch(self, rng: random.Random, progress: float, tokens: int):
        """(size, token ids (B, L), lengths (B,), latents (B, 16, h, w), noise, sigma (B,)) of one step, of about so
        many tokens in all."""
        shares = [SIZES[size][1] + (SIZES[size][2] - SIZES[size][1]) * min(progress / 0.5, 1) for size in self.sizes]
        (size,) = rng.choices(list(self.sizes), shares)
        latents, ids, lengths = self.sizes[size]
        groups = self.groups[size]
        ((length, members),) = rng.choices(groups, [len(members) for _, members in groups])
        count = max(1, tokens // (size[0] * size[1] // 256 + length))
        chosen = members[torch.randint(len(members), (count,), device=self.device)]
        clean = (latents[chosen // PHRASINGS].float() - self.shift) * self.scale
        # Evenly over the sampler's steps, its first, sigma 1, included.
        s = (torch.rand(count, device=self.device) * 1.06).clamp(max=1.0)
        sigma = 3.0 * s / (1.0 + 2.0 * s)
        return size, ids[chosen, :length].long(), lengths[chosen], clean, torch.randn_like(clean), sigma


@functools.cache
def _angles(length: int, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    """Rotary angles of [image, caption] tokens, as `ZImageTransformer.prepare` makes them."""
    grid = (size[0] // 16, size[1] // 16)
    positions = ZImageTransformer._positions([length], length, grid, _image_tokens(size), None)
    return tuple(y.to(device) for y in rope_angles(positions, MODEL_SIZES))


def _image_tokens(size: tuple[int, int]) -> int:
    return -(-size[0] * size[1] // 256 // 32) * 32


def conditioning(both: nn.ModuleDict, ids: Tensor, lengths: Tensor, size: tuple[int, int]) -> Conditioning:
    """What `ZImageTransformer.prepare` gives, for a batch of token ids (B, L) of which `lengths` (B,) count."""
    model, length = both["model"], ids.shape[1]
    image_tokens = _image_tokens(size)
    cos, sin = _angles(length, size, str(ids.device))
    told = torch.arange(length, device=ids.device) < lengths[:, None]
    embedded = model.cap_embedder(both["encoder"](ids))
    context = torch.where(told[..., None], embedded, model.cap_pad_token.to(embedded.dtype))
    for block in model.context_refiner:
        context = block(context, cos[:, image_tokens:], sin[:, image_tokens:], None)
    return Conditioning(context, cos, sin, None, (size[0] // 16, size[1] // 16), image_tokens)


def compile_blocks() -> None:
    """Have both kinds of blocks run as compiled graphs that hold for every size; takes about a minute once."""
    torch.fx.experimental._config.use_duck_shape = False  # lengths that happen to equal a width stay free
    options = {"dynamic": True, "fullgraph": True}
    plain = Block.forward

    @torch.compile(**options)
    def block(self: Block, x: Tensor, cos: Tensor, sin: Tensor, t_emb: Tensor | None) -> Tensor:
        return plain(self, x, cos[None], sin[None], None, t_emb)

    def forward(self: Block, x: Tensor, cos: Tensor, sin: Tensor, mask: None, t_emb=None, attend=None) -> Tensor:
        return block(self, x, cos[0], sin[0], t_emb)  # without an outer axis, whose stride the graph would depend on

    Block.forward, Layer.forward = forward, torch.compile(Layer.forward, **options)


def load_exported(both: nn.ModuleDict, model_file: Path, folder: Path) -> None:
    """Fill both models from the files that `export` wrote."""
    from safetensors.torch import load_file

    from zimage_core.formats.load import load_transformer

    both["model"].load_state_dict(load_transformer(model_file, dtype=torch.float32).state_dict())
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    both["encoder"].load_state_dict({key: encoder[f"model.{key}"] for key in both["encoder"].state_dict()})


class Teacher:
    """The trained average, whose output with guidance (in diffusers' form, 0 is none) `distill` learns."""

    def __init__(self, work: Path, guidance: float, device: str):
        self.guidance, self.both = guidance, build_models().to(device).requires_grad_(False)
        self.average = torch.load(work / "model.pt", map_location=device)["average"]
        torch._foreach_copy_(list(self.both.parameters()), self.average)
        empty = torch.tensor(load_tokenizer(work / "tokenizer")(""), device=device)
        self.empty, self.length = F.pad(empty, (0, LENGTHS[0] - len(empty))), torch.tensor(len(empty), device=device)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, ids: Tensor, lengths: Tensor, size: tuple[int, int]) -> Tensor:
        """Its output (B, 16, h, w) for the captions, moved away from that for empty ones."""
        empty = conditioning(self.both, self.empty.expand(len(ids), -1), self.length.expand(len(ids)), size)
        told = self.both["model"](x, t, conditioning(self.both, ids, lengths, size)).float()
        return told + self.guidance * (told - self.both["model"](x, t, empty).float())


def train_model(
    work: Path, minutes: float, stop_after: float | None, lr: float, tokens: int, device: str, compiled: bool,
    teacher: Teacher | None, begin: tuple[Path, Path] | None,
) -> None:  # fmt: skip
    """Joint training of encoder and transformer; the rate is even for 45 % of the time, then falls linearly.

    With a teacher they begin as it and learn its outputs, not the scenes. `begin` names exported files to begin from.
    """
    data, both = Data(work, device), build_models().to(device)
    print(f"latents: shift {data.shift:.4f} scale {data.scale:.4f}", flush=True)
    if compiled:
        compile_blocks()
    matrices = [
        p for name, p in both.named_parameters()
        if p.ndim == 2 and ".layers." in name.replace("_refiner.", ".layers.") and "adaLN" not in name
    ]  # fmt: skip
    optimizers, rest = make_optimizers(both, matrices, lr)
    params = list(both.parameters())
    if teacher:
        torch._foreach_copy_([p.data for p in params], teacher.average)
    elif begin:
        load_exported(both, *begin)
    average = [p.detach().clone() for p in params]
    step, path, elapsed, log, torn = 0, work / ("distilled.pt" if teacher else "model.pt"), 0.0, [], []
    if path.exists():
        state = torch.load(path, map_location=device)
        both.load_state_dict(state["model"])
        average, step, elapsed, log = state["average"], state["step"], state["elapsed"], state["log"]
        for optimizer, stored in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(stored)
    clock, rng, saved = Schedule(minutes, stop_after, elapsed), random.Random(SEED + step), time.time()
    torch.manual_seed(SEED + step)

    def checkpoint() -> None:
        state = {"model": both.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "average": average}
        state |= {"step": step, "elapsed": clock.seconds, "log": log, "shift": data.shift, "scale": data.scale}
        save(state, path)

    while not clock.over:
        done = clock.progress
        rate = lr * min(1.0, (step + 1) / 300, (1.0 - done) / 0.55)
        set_rate(optimizers, rate)
        size, ids, lengths, clean, noise, sigma = data.batch(rng, done, tokens)
        mix = sigma[:, None, None, None]
        x = (1 - mix) * clean + mix * noise
        with torch.autocast(device, torch.bfloat16):
            target = teacher(x, 1 - sigma, ids, lengths, size) if teacher else clean - noise
            out = both["model"](x, 1 - sigma, conditioning(both, ids, lengths, size)).float()
        loss = F.mse_loss(out, target)
        take_step(loss, optimizers, rest)
        step += 1
        if step % 10 == 0:  # the average reaches over some 2000 steps, or 500
            with torch.no_grad():
                torch._foreach_lerp_(average, params, max(0.02 if teacher else 0.005, 1 / (step / 10 + 1)))
        torn.append(loss.detach())
        if step % 100 == 0:
            if len(data.sizes) < len(SIZES):
                data.look()
            log.append((step, round(clock.seconds, 1), torch.stack(torn).mean().item()))
            torn.clear()
            if step % 500 == 0:
                recent = np.mean([loss for _, _, loss in log[-5:]])
                print(f"{path.stem} {step} loss {recent:.4f} rate {rate:.2e} {clock.seconds:.0f} s", flush=True)
            if time.time() - saved > 120:
                checkpoint()
                saved = time.time()
    checkpoint()
    print(f"{path.stem}: {step} steps, {clock.seconds:.0f} s")


# --- stage 4: files -----------------------------------------------------------------------------------------------

FUSED = {"attention.to_qkv": ("to_q", "to_k", "to_v"), "feed_forward.w3_w1": ("w3", "w1")}


def official_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors in bf16 under the names of the official files."""
    named = {}
    for key, tensor in state.items():
        tensor = tensor.detach().bfloat16()
        fused = next((name for name in FUSED if name in key), None)
        if fused:
            for part, rows in zip(FUSED[fused], tensor.chunk(len(FUSED[fused]))):
                named[key.replace(fused.split(".")[1], part)] = rows.contiguous()
            continue
        key = key.replace("attention.to_out.", "attention.to_out.0.")
        for ours in ("x_embedder", "final_layer"):
            if key.startswith(ours + "."):
                key = f"all_{ours}.2-1{key[len(ours) :]}"
        named[key] = tensor.contiguous()
    return named


def export(work: Path, model_file: Path, folder: Path) -> None:
    """Write the averaged weights: the bf16 transformer to `model_file`, VAE, encoder and tokenizer into `folder`."""
    from safetensors.torch import save_file

    state = torch.load(work / "distilled.pt", map_location="cpu")
    names = [name for name, _ in build_models().named_parameters()]
    average = dict(zip(names, state["average"]))
    model_file.parent.mkdir(parents=True, exist_ok=True)
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    sizes = MODEL_SIZES
    config = {
        "_class_name": "ZImageTransformer2DModel", "all_f_patch_size": [1], "all_patch_size": [2],
        "axes_dims": sizes.axes_dims, "axes_lens": sizes.axes_lens, "cap_feat_dim": sizes.cap_feat_dim,
        "dim": sizes.dim, "in_channels": 16, "n_heads": sizes.n_heads, "n_kv_heads": sizes.n_heads,
        "n_layers": sizes.n_layers, "n_refiner_layers": sizes.n_refiner_layers, "norm_eps": 1e-05, "qk_norm": True,
        "rope_theta": 256.0, "t_scale": 1000.0,
    }  # fmt: skip
    tensors = official_tensors({k[6:]: v for k, v in average.items() if k.startswith("model.")})
    save_file(tensors, model_file, {"format": "pt", "config": json.dumps(config)})

    vae = {k: v.bfloat16().contiguous() for k, v in torch.load(work / "vae.pt", map_location="cpu")["model"].items()}
    config = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": VAE_SIZES.block_out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3,
        "latent_channels": 16, "layers_per_block": VAE_SIZES.layers_per_block, "mid_block_add_attention": True,
        "norm_num_groups": VAE_SIZES.norm_num_groups, "out_channels": 3, "sample_size": 256,
        "scaling_factor": round(state["scale"], 6), "shift_factor": round(state["shift"], 6),
        "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": False, "use_quant_conv": False,
    }  # fmt: skip
    save_file(vae, folder / "vae.safetensors", {"format": "pt", "config": json.dumps(config)})

    sizes = ENCODER_SIZES
    encoder = {k[8:]: v.detach().bfloat16() for k, v in average.items() if k.startswith("encoder.")}
    for key in [k for k in encoder if k.startswith("layers.0.")]:  # a last layer that nobody runs, and the final norm
        encoder[key.replace("layers.0.", f"layers.{sizes.num_layers}.")] = torch.zeros_like(encoder[key])
    encoder["norm.weight"] = torch.ones(sizes.hidden_size, dtype=torch.bfloat16)
    tensors = {f"model.{k}": v.contiguous() for k, v in encoder.items()}
    save_file(tensors, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 2, "head_dim": sizes.head_dim, "hidden_act": "silu", "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02, "intermediate_size": sizes.intermediate_size, "max_position_embeddings": 40960,
        "model_type": "qwen3", "num_attention_heads": sizes.num_attention_heads,
        "num_hidden_layers": sizes.num_layers + 1, "num_key_value_heads": sizes.num_key_value_heads,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": sizes.vocab_size,
    }  # fmt: skip
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copytree(work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    rng = random.Random(SEED)
    prompts = [scenes.describe(scenes.training_scene(rng), rng) for _ in range(CALIBRATION)]
    (model_file.parent / "calibration.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def plot_losses(work: Path, path: Path) -> None:
    """The loss over the minutes of training, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name, label in (("model", "flow matching"), ("distilled", "distance to the teacher")):
        steps, seconds, losses = zip(*torch.load(work / f"{name}.pt", map_location="cpu")["log"])
        axes.plot(np.array(seconds) / 60, losses, linewidth=0.4, color="C0", alpha=0.5)
        smooth = np.convolve(losses, np.ones(5) / 5, "valid")
        axes.plot(np.array(seconds[4:]) / 60, smooth, label=f"{label} ({steps[-1]} steps)")
    axes.set(xlabel="minutes", ylabel="loss", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "latents", "model", "distill", "export", "plot"))
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and latents")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=20, help="vae, model, distill: of training in all")
    parser.add_argument("--stop-after", type=float, help="likewise: minutes of this part of it")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=49152, help="model: of a step")
    parser.add_argument("--shards", type=int, default=80, help="vae: of 256 scenes at each size")
    parser.add_argument("--decoder-only", action="store_true", help="vae: go on with a latent space that is in use")
    parser.add_argument("--share", type=float, default=1.0, help="latents: of the scenes in SIZES")
    parser.add_argument("--begin", action="store_true", help="model: begin from --model-file and --folder")
    parser.add_argument("--guidance", type=float, default=1.0, help="distill: in diffusers' form, 0 is none")
    parser.add_argument("--compile", action="store_true", help="model: torch.compile the blocks, a minute")
    parser.add_argument("--model-file", type=Path, default=ROOT / "demo_training" / "z-image-demo-bf16.safetensors")
    parser.add_argument("--folder", type=Path, default=ROOT / "zimage_core" / "demo", help="for VAE and encoder")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        given = (args.minutes, args.stop_after, args.lr, args.device, args.shards, args.decoder_only)
        train_vae(args.work, *given)
    elif args.stage == "latents":
        store_latents(args.work, args.device, args.share)
    elif args.stage in ("model", "distill"):
        given = (args.minutes, args.stop_after, args.lr, args.tokens, args.device, args.compile)
        teacher = Teacher(args.work, args.guidance, args.device) if args.stage == "distill" else None
        train_model(args.work, *given, teacher, (args.model_file, args.folder) if args.begin else None)
    elif args.stage == "export":
        export(args.work, args.model_file, args.folder)
    else:
        plot_losses(args.work, ROOT / "demo_training" / "loss.png")


if __name__ == "__main__":
    main()
