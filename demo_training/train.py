"""Make the bundled demo model: `python demo_training/train.py vae|latents|model|export --work DIR`, in that order.

`vae` trains the autoencoder on scenes and random polygons, `latents` stores encoded scenes with their captions,
`model` trains the text encoder and the transformer together by flow matching (x_t = (1 - sigma) x + sigma noise; the
output is x - noise, as diffusers' model gives it), `export` writes the files. All stages run on a CPU in bf16 autocast,
save to DIR every few minutes and go on from there. Blocks' matrices learn by Muon, the rest by AdamW; what is exported
is the moving average of the weights. See README.md beside this file for the settings used and the measured figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SEED = 20261123
VAE_SIZES = ((16, 32, 64, 64), 1, 16, 4, 1.0, 0.0)


def polygons(size: int, rng: random.Random) -> np.ndarray:
    """Picture (size, size, 3) uint8 of random polygons on a gradient, so that the VAE knows more than flat scenes."""
    ramp = np.linspace(0.0, 1.0, size * 2, dtype=np.float32)
    ramp = ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None]
    ends = [np.array([rng.uniform(0, 255) for _ in range(3)], dtype=np.float32) for _ in range(2)]
    ground = np.broadcast_to(ends[0] + (ends[1] - ends[0]) * ramp * rng.random(), (size * 2, size * 2, 3))
    canvas = Image.fromarray(ground.astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(1, 5)):
        shape = rng.choice(scenes.SHAPES)
        x, y = rng.uniform(0, 2 * size), rng.uniform(0, 2 * size)
        turn, points = rng.uniform(0, 2 * math.pi), scenes.outline(shape, rng.uniform(0.1, 0.5) * size)
        cos, sin = math.cos(turn), math.sin(turn)
        pen.polygon([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in points],
                    fill=tuple(rng.randrange(256) for _ in range(3)))  # fmt: skip
    return np.asarray(canvas.reduce(2))


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) pictures of one size -> (B, 3, H, W) in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def warm_cosine(step: int, steps: int, warm: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to 1%."""
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def save(state: dict, path: Path) -> None:
    """Write a checkpoint under a temporary name, then rename it."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps (Keller Jordan, 2024), for matrices and kernels.

    A parameter of more than two axes is taken as (out, rest); one whose `fused` attribute is n, as n matrices stacked.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1.0 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                x = update.reshape(getattr(p, "fused", 1), -1, p[0].numel()).bfloat16()
                tall = x.shape[1] > x.shape[2]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = (x.mT if tall else x).float()
                scale = 0.2 * max(x.shape[1], x.shape[2]) ** 0.5  # the RMS of an AdamW step, so that rates carry over
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(x.reshape(p.shape), alpha=-group["lr"] * scale)


# --- stage 1: the VAE ---------------------------------------------------------------------------------------------


def vae_batch(step: int, size: int, batch: int) -> torch.Tensor:
    rng = random.Random(SEED * 1000003 + step)
    pictures = []
    for _ in range(batch):
        if rng.random() < 0.35:
            pictures.append(polygons(size, rng))
            continue
        full = rng.choice([128, 128, 192])
        picture = scenes.draw(scenes.training_scene(rng), full, full, rng)
        y, x = rng.randint(0, full - size), rng.randint(0, full - size)
        pictures.append(picture[y : y + size, x : x + size])
    return to_tensor(pictures)


def train_vae(work: Path, small_steps: int, full_steps: int, lr: float) -> None:
    from zimage_core.models.vae import VAE, VAEConfig

    torch.manual_seed(SEED)
    vae = VAE(VAEConfig(*VAE_SIZES))
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:] = -5.0  # start with little posterior noise, else it drowns the picture for long
        for name, parameter in vae.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.zero_()
            elif "conv" in name and parameter.ndim == 4:
                torch.nn.init.orthogonal_(parameter)
    vae.to(memory_format=torch.channels_last)
    kernels = [p for p in vae.parameters() if p.ndim > 1]
    rest = [p for p in vae.parameters() if p.ndim == 1]
    optimizers = [Muon(kernels, lr, 0.9), torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.0)]
    steps, step, path = small_steps + full_steps, 0, work / "vae.pt"
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        for optimizer, stored in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(stored)
        step = state["step"]
    start = time.time()
    while step < steps:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * warm_cosine(step, steps, 50)
        size, batch = (64, 16) if step < small_steps else (128, 8)
        images = vae_batch(step, size, batch).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = vae.encoder(images).chunk(2, dim=1)
            mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(SEED + step))
            out = vae.decoder(mean + (0.5 * logvar).exp() * noise).float()
        l1, l2 = F.l1_loss(out, images), F.mse_loss(out, images)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        (l1 + l2 + 1e-3 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 25 == 0:
            print(f"vae {step} l1 {l1:.4f} l2 {l2:.5f} kl {kl:.3f} {time.time() - start:.0f} s", flush=True)
        if step % 250 == 0 or step == steps:
            save({"model": vae.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}, path)
            with torch.no_grad():
                rows = [images[:8, :, :128, :128], out[:8]]
                sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
            sheet = ((sheet.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
            Image.fromarray(sheet).save(work / "vae.png")


# --- stage 2: tokenizer and latents -------------------------------------------------------------------------------

# (height, width): how many scenes are stored, how many make a batch, and how often such a batch is drawn, at first and
# from step LARGER_FROM on
SIZES = {
    (128, 128): (14000, 48, (0.66, 0.46)),
    (160, 160): (1200, 32, (0.05, 0.05)),
    (192, 192): (1200, 24, (0.06, 0.12)),
    (256, 256): (900, 14, (0.06, 0.15)),
    (128, 192): (1200, 32, (0.04, 0.05)),
    (192, 128): (1200, 32, (0.04, 0.05)),
    (128, 256): (900, 24, (0.03, 0.04)),
    (256, 128): (900, 24, (0.03, 0.04)),
    (192, 256): (700, 18, (0.015, 0.02)),
    (256, 192): (700, 18, (0.015, 0.02)),
}
LARGER_FROM = 1650
TOKENS = 32  # a caption with its template never takes more, so that a batch needs no mask
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(work: Path) -> None:
    """Byte-level BPE in Qwen's manner, learnt from the captions and the template; writes `work/tokenizer`."""
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
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rng = random.Random(SEED)
    captions = [scenes.describe(scenes.training_scene(rng), rng) for _ in range(20000)]
    tokenizer.train_from_iterator(captions + ["user\n", "assistant\n"] * 2000, trainer)
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


def store_latents(work: Path, part: int, parts: int) -> None:
    """Encode the scenes of every size; a file per size and part holds scenes and raw latents (n, 16, h, w) bf16."""
    from zimage_core.models.vae import VAE, VAEConfig

    vae = VAE(VAEConfig(*VAE_SIZES)).to(memory_format=torch.channels_last).eval()
    vae.load_state_dict(torch.load(work / "vae.pt")["model"])
    (work / "latents").mkdir(exist_ok=True)
    start = time.time()
    for (height, width), (count, _, _) in SIZES.items():
        path = work / "latents" / f"{height}x{width}.{part}.pt"
        if path.exists():
            continue
        rng = random.Random(f"{SEED} {height} {width} {part}")
        kept, latents = [], []
        for _ in range(count // parts // 8 + 1):
            batch = [scenes.training_scene(rng) for _ in range(8)]
            images = to_tensor([scenes.draw(scene, height, width, rng) for scene in batch])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                moments = vae.encoder(images.to(memory_format=torch.channels_last))
            kept += batch
            latents.append(moments[:, :16].bfloat16().contiguous())
        save({"scenes": kept, "latents": torch.cat(latents)}, path)
        print(f"latents {path.name} {len(kept)} {time.time() - start:.0f} s", flush=True)


# --- stage 3: text encoder and transformer ------------------------------------------------------------------------


def build_models():
    """The text encoder and the transformer, initialized so that every block starts gently."""
    from zimage_core.models.config import ZImageConfig
    from zimage_core.models.text_encoder import TextEncoder, TextEncoderConfig
    from zimage_core.models.transformer import ZImageTransformer

    torch.manual_seed(SEED)
    encoder = TextEncoder(TextEncoderConfig(512, 128, 384, 2, 4, 2, 32))
    model = ZImageTransformer(
        ZImageConfig(dim=384, n_layers=4, n_refiner_layers=1, n_heads=6, cap_feat_dim=128, axes_dims=(16, 24, 24))
    )
    torch.nn.init.normal_(encoder.embed_tokens.weight, std=0.5)
    with torch.no_grad():
        for block in (*model.noise_refiner, *model.layers):
            linear = block.adaLN_modulation[0]
            linear.weight.normal_(std=0.02)
            linear.bias.zero_().unflatten(0, (4, -1))[1::2] = 0.3  # the gates
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.zero_()
        model.cap_pad_token.normal_(std=0.5)
        model.x_pad_token.normal_(std=0.5)
        for name, parameter in model.named_parameters():
            fused = 3 if "to_qkv" in name else 2 if "w3_w1" in name else 1
            parameter.fused = fused
    return encoder, model


def attention(q, k, v, mask):
    """Attention by plain matrix products, whose backward pass is faster on a CPU at these lengths."""
    q, k, v = (y.transpose(1, 2).bfloat16() for y in (q, k, v))
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    return (scores.softmax(-1).bfloat16() @ v).transpose(1, 2).flatten(2)


class Data:
    """Stored latents by size, and batches drawn from them."""

    def __init__(self, work: Path):
        from zimage_core.models.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(work / "tokenizer")
        self.sizes = {}
        for size in SIZES:
            paths = sorted((work / "latents").glob(f"{size[0]}x{size[1]}.*.pt"))
            parts = [torch.load(path, weights_only=False) for path in paths]
            self.sizes[size] = ([s for p in parts for s in p["scenes"]], torch.cat([p["latents"] for p in parts]))
        square = self.sizes[128, 128][1].float()
        self.shift, self.scale = square.mean().item(), 1.0 / square.std().item()

    def batch(self, step: int):
        """(size, token ids (B, 32), lengths, latents (B, 16, h, w), noise, sigma (B,)) of one step."""
        rng, generator = random.Random(SEED * 7919 + step), torch.Generator().manual_seed(SEED * 7919 + step)
        (size,) = rng.choices(list(SIZES), [shares[step >= LARGER_FROM] for _, _, shares in SIZES.values()])
        kept, stored = self.sizes[size]
        count = SIZES[size][1]
        chosen = [rng.randrange(len(kept)) for _ in range(count)]
        ids = torch.zeros(count, TOKENS, dtype=torch.long)
        lengths = []
        for row, index in enumerate(chosen):
            caption = scenes.describe(kept[index], rng)
            draw = rng.random()
            caption = "" if draw < 0.04 else scenes.with_stray_word(caption, rng) if draw < 0.08 else caption
            tokens = self.tokenizer(caption)[:TOKENS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            lengths.append(len(tokens))
        latents = (stored[chosen].float() - self.shift) * self.scale
        noise = torch.randn(latents.shape, generator=generator)
        s = torch.sigmoid(torch.randn(count, generator=generator))
        s = torch.where(torch.rand(count, generator=generator) < 0.1, torch.rand(count, generator=generator), s)
        return size, ids, lengths, latents, noise, 3.0 * s / (1.0 + 2.0 * s)


def predict(encoder, model, size, ids, lengths, latents, t):
    """The transformer's output (fp32) for a batch, under bf16 autocast."""
    from zimage_core.models.transformer import Hooks

    hooks = Hooks(attention=attention)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(ids)
        cond = model.prepare([f[:n] for f, n in zip(features, lengths)], *size, hooks)
        return model(latents, t, cond, hooks).float()


def train_model(work: Path, steps: int, decay: int, lr: float, compiled: bool) -> None:
    """Joint training of encoder and transformer; the last `decay` of `steps` lower the rate linearly to zero."""
    from zimage_core.models import ops

    data = Data(work)
    print(f"latents: shift {data.shift:.4f} scale {data.scale:.4f}", flush=True)
    encoder, model = build_models()
    both = torch.nn.ModuleDict({"encoder": encoder, "model": model})
    if compiled:
        model.use(ops.Ops(*(torch.compile(function, dynamic=True) for function in ops.TORCH)))
    matrices = [
        p for name, p in both.named_parameters()
        if p.ndim == 2 and ".layers." in name.replace("_refiner.", ".layers.") and "adaLN" not in name
    ]  # fmt: skip
    chosen = {id(p) for p in matrices}
    rest = [p for p in both.parameters() if id(p) not in chosen]
    optimizers = [Muon(matrices, lr, 0.95, 0.01), torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.0)]
    average = {name: p.detach().clone() for name, p in both.named_parameters()}
    step, path = 0, work / "model.pt"
    if path.exists():
        state = torch.load(path)
        both.load_state_dict(state["model"])
        average, step = state["average"], state["step"]
        for optimizer, stored in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(stored)
    start, first, losses, saved = time.time(), step, [], time.time()
    while step < steps:
        factor = min(1.0, (step + 1) / 150, max(0.01, (steps - step) / decay))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * factor
        size, ids, lengths, latents, noise, sigma = data.batch(step)
        mix = sigma[:, None, None, None]
        out = predict(encoder, model, size, ids, lengths, (1 - mix) * latents + mix * noise, 1 - sigma)
        loss = F.mse_loss(out, latents - noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        weight = 1.0 - min(0.997, step / (step + 30.0))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in both.parameters()], weight)
        losses.append(loss.item())
        if step % 25 == 0:
            seconds = time.time() - start
            speed = seconds / (step - first)
            print(f"model {step} loss {np.mean(losses):.4f} {seconds:.0f} s {speed:.2f} s/step", flush=True)
            losses = []
        if time.time() - saved > 150 or step == steps:
            save({"model": both.state_dict(), "average": average, "step": step, "shift": data.shift,
                  "scale": data.scale, "optimizers": [o.state_dict() for o in optimizers]}, path)  # fmt: skip
            saved = time.time()


# --- stage 4: files -----------------------------------------------------------------------------------------------

FUSED = {"attention.to_qkv": ("to_q", "to_k", "to_v"), "feed_forward.w3_w1": ("w3", "w1")}


def official_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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

    state = torch.load(work / "model.pt")
    average = state["average"]
    print(f"step {state['step']}")
    model_file.parent.mkdir(parents=True, exist_ok=True)
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": "ZImageTransformer2DModel", "all_f_patch_size": [1], "all_patch_size": [2],
        "axes_dims": [16, 24, 24], "axes_lens": [1536, 512, 512], "cap_feat_dim": 128, "dim": 384, "in_channels": 16,
        "n_heads": 6, "n_kv_heads": 6, "n_layers": 4, "n_refiner_layers": 1, "norm_eps": 1e-05, "qk_norm": True,
        "rope_theta": 256.0, "t_scale": 1000.0,
    }  # fmt: skip
    tensors = official_tensors({k[6:]: v for k, v in average.items() if k.startswith("model.")})
    save_file(tensors, model_file, {"format": "pt", "config": json.dumps(config)})

    vae = {k: v.bfloat16().contiguous() for k, v in torch.load(work / "vae.pt")["model"].items()}
    channels, layers, latent, groups, _, _ = VAE_SIZES
    config = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3,
        "latent_channels": latent,
        "layers_per_block": layers, "mid_block_add_attention": True, "norm_num_groups": groups, "out_channels": 3,
        "sample_size": 128, "scaling_factor": round(state["scale"], 6), "shift_factor": round(state["shift"], 6),
        "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": False, "use_quant_conv": False,
    }  # fmt: skip
    save_file(vae, folder / "vae.safetensors", {"format": "pt", "config": json.dumps(config)})

    encoder = {k[8:]: v.detach().bfloat16() for k, v in average.items() if k.startswith("encoder.")}
    for key in [k for k in encoder if k.startswith("layers.1.")]:  # a last layer that nobody runs, and the final norm
        encoder[key.replace("layers.1.", "layers.2.")] = torch.zeros_like(encoder[key])
    encoder["norm.weight"] = torch.ones(128, dtype=torch.bfloat16)
    tensors = {f"model.{k}": v.contiguous() for k, v in encoder.items()}
    save_file(tensors, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 2, "head_dim": 32, "hidden_act": "silu", "hidden_size": 128, "initializer_range": 0.02,
        "intermediate_size": 384, "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 4,
        "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 512,
    }  # fmt: skip
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copytree(work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "latents", "model", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and latents")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vae-steps", type=int, nargs=2, default=(2000, 500), help="at 64 and at 128 pixels")
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="latents: which part of how many")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--decay", type=int, default=900, help="how many of the last steps lower the rate")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--compile", action="store_true", help="torch.compile what lies between the linears")
    parser.add_argument("--model-file", type=Path, default=ROOT / "demo_training" / "z-image-demo-bf16.safetensors")
    parser.add_argument("--folder", type=Path, default=ROOT / "zimage_core" / "demo", help="for VAE and encoder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        train_vae(args.work, *args.vae_steps, lr=args.vae_lr)
    elif args.stage == "latents":
        if args.part[0] == 0:
            train_tokenizer(args.work)
        store_latents(args.work, *args.part)
    elif args.stage == "model":
        train_model(args.work, args.steps, args.decay, args.lr, args.compile)
    elif args.stage == "export":
        export(args.work, args.model_file, args.folder)


if __name__ == "__main__":
    main()
