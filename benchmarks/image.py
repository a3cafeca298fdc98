"""A whole picture from a cold start: load, encode, 8 steps, decode, in a process of its own.

    python benchmarks/image.py --folder DIR              1024 x 1024 from random files of the real sizes, written to DIR
    python benchmarks/image.py --folder DIR --check      twice, and the pictures must be the same bit by bit
    python benchmarks/image.py --folder DIR --tiny       small files, to see that it runs

DIR keeps the files for the next time: an r256 INT4 transformer (4.5 GB), a BF16 Qwen3-4B (8 GB), a BF16 VAE and a
tokenizer of single bytes, so that a character of the prompt is a token. `zimage generate --json` draws and tells the
stages' times and peaks. The files are read once before, so that they come from the page cache, and Triton begins with
an empty compilation cache; --check's second run finds it filled. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from make_synthetic import write_synthetic

from zimage_core import bench
from zimage_core.config import ZImageConfig
from zimage_core.pipeline import choose_device, choose_dtype
from zimage_core.svdq_file import StreamedFile
from zimage_core.text_encoder import TextEncoder, TextEncoderConfig
from zimage_core.vae import VAE, VAEConfig

PROMPT = "A red fox in deep snow before a birch wood, early morning light, photograph"
SEED = 7
TINY = ZImageConfig(384, 1, 1, 6, cap_feat_dim=64, axes_dims=(16, 24, 24))
TINY_ENCODER = TextEncoderConfig(512, 64, 128, 2, 2, 1, 32)
TINY_VAE = VAEConfig((8, 8, 8, 8), 1, norm_num_groups=4)
COLUMNS = {
    "name": "stage",
    "seconds": "s|.2f",
    "device_peak_gib": "device peak GiB|.2f",
    "process_peak_gib": "process peak GiB|.2f",
}


def write_random(path: Path, model: torch.nn.Module, prefix: str, metadata: dict[str, str]) -> None:
    """Write a model that is on the meta device in BF16, with weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with StreamedFile(path, {prefix + name: ("BF16", shape) for name, shape in shapes.items()}, metadata) as out:
        for name, shape in shapes.items():
            value = torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
            if len(shape) > 1:
                value.normal_(0, math.prod(shape[1:]) ** -0.5, generator=generator)
            out.write(prefix + name, value.to(torch.bfloat16))


def write_tokenizer(path: Path) -> None:
    """A tokenizer.json of single bytes and the template's special tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(path))


def random_files(folder: Path, tiny: bool) -> dict[str, Path]:
    """The options of `zimage generate` and their files, written where they are not there yet."""
    folder = folder / ("tiny" if tiny else "full")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("model", "text-encoder", "vae", "tokenizer")
    files = {name: folder / f"{name}.safetensors" for name in names} | {"tokenizer": folder / "tokenizer.json"}
    if not files["model"].exists():
        write_synthetic(files["model"], TINY if tiny else ZImageConfig(), bench.DEMO_RANK if tiny else bench.RANK)
    with torch.device("meta"):
        encoder = TextEncoder(TINY_ENCODER if tiny else TextEncoderConfig())
        vae = VAE(TINY_VAE if tiny else VAEConfig())
    if not files["text-encoder"].exists():
        sizes = encoder.config
        config = {"model_type": "qwen3", "num_hidden_layers": sizes.num_layers + 1}
        config |= {
            name: getattr(sizes, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
        }
        config |= {"num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_kv_heads}
        write_random(files["text-encoder"], encoder, "model.", {"config": json.dumps(config)})
    if not files["vae"].exists():
        names = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        write_random(files["vae"], vae, "", {"config": json.dumps({name: getattr(vae.config, name) for name in names})})
    if not files["tokenizer"].exists():
        write_tokenizer(files["tokenizer"])
    return files


def draw(files: dict[str, Path], out: Path, cache: Path, options: list[str]) -> dict:
    """One picture in a new process: what `zimage generate --json` tells, and the seconds from start to end."""
    command = [sys.executable, "-m", "zimage_core", "generate", PROMPT, f"--seed={SEED}", f"--out={out}", "--json"]
    command += [f"--{name}={path}" for name, path in files.items()] + options
    begun = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": str(cache)}, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": seconds}


def pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random files are kept (13 GB)")
    parser.add_argument("--size", type=int, help="pixels of an edge (default 1024, 64 with --tiny)")
    parser.add_argument("--device", help="default: a GPU if torch sees one")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--check", action="store_true", help="draw twice and compare")
    parser.add_argument("--tiny", action="store_true", help="small files and a small picture")
    args = parser.parse_args()
    files = random_files(args.folder, args.tiny)
    size = args.size or (64 if args.tiny else 1024)
    device = choose_device(args.device)
    options = [f"--width={size}", f"--height={size}", f"--device={device}"]
    options += [f"--backend={args.backend}", f"--precision={args.precision}"]
    for path in files.values():
        with path.open("rb") as file:
            while file.read(2**26):
                pass
    with tempfile.TemporaryDirectory() as scratch:
        pictures = [Path(scratch) / f"{i}.png" for i in range(1 + args.check)]
        runs = [draw(files, picture, Path(scratch) / "triton", options) for picture in pictures]
        same = pixels(pictures[0]) == pixels(pictures[1]) if args.check else None
    machine = bench.machine(device, choose_dtype(None, device))
    print(f"{machine['device']}, torch {machine['torch']}, {machine['date']}")
    print(f"{size} x {size}, {runs[0]['steps']} steps, {runs[0]['backend']} {runs[0]['precision']}")
    for i, run in enumerate(runs):
        total = {"name": "process, start to end", "seconds": run["process_seconds"]}
        print(f"\n{'second' if i else 'first'} start\n\n{bench.table([*run['stages'], total], COLUMNS)}")
    if args.check:
        print(f"\nthe same seed twice: {'bit-identical' if same else 'DIFFERENT PICTURES'}")
    bench.print_json("image", machine, size=size, runs=runs, identical=same)
    sys.exit(same is False)


if __name__ == "__main__":
    main()
