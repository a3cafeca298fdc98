"""A whole picture from a cold start: load, encode, 8 steps, decode, in a process of its own.

    python benchmarks/image.py --folder DIR              1024 x 1024 from random files of the real sizes, written to DIR
    python benchmarks/image.py --folder DIR --check      twice, and the pictures must be the same bit by bit
    python benchmarks/image.py --folder DIR --tiny       small files, to see that it runs

DIR keeps the files for the next time: an r256 INT4 transformer (4.5 GB), a Qwen3-4B in FP8 (4.4 GB), a VAE; the
tokenizer is the demo's. `zimage generate --json` draws and tells the stages' times and peaks. The files are read once
before, so that they come from the page cache, and Triton begins with an empty compilation cache; --check's second run
finds it filled. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import write_synthetic

from zimage_core import bench, report
from zimage_core.device import choose_device, choose_dtype
from zimage_core.models.config import ZImageConfig
from zimage_core.models.text_encoder import TextEncoderConfig
from zimage_core.models.vae import VAEConfig

PROMPT = "A red fox in deep snow before a birch wood, early morning light, photograph"
SEED = 7
TINY = ZImageConfig(384, 1, 1, 6, cap_feat_dim=64, axes_dims=(16, 24, 24))
TINY_ENCODER = TextEncoderConfig(4096, 64, 128, 2, 2, 1, 32)
TINY_VAE = VAEConfig((32, 32, 32, 32), 1)
COLUMNS = {
    "name": "stage",
    "seconds": "s|.2f",
    "device_peak_gib": "device peak GiB|.2f",
    "host_peak_gib": "host peak GiB|.2f",
}


def random_files(folder: Path, tiny: bool, device: torch.device | str = "cpu") -> dict[str, Path]:
    """The options of `zimage generate` and their files, drawn on a device where they are not there yet."""
    sizes = (TINY, TINY_ENCODER, TINY_VAE, bench.DEMO_RANK) if tiny else ()
    paths = write_synthetic(folder / ("tiny" if tiny else "full"), *sizes, device=device)
    return {part.replace("_", "-"): path for part, path in paths.items()}


def draw(files: dict[str, Path], out: Path, cache: Path, options: list[str]) -> dict:
    """One picture in a new process: what `zimage generate --json` tells, and the seconds from start to end.

    Not where it lies, which is of no use later."""
    command = [sys.executable, "-m", "zimage_core", "generate", PROMPT, f"--seed={SEED}", f"--out={out}", "--json"]
    command += [f"--{name}={path}" for name, path in files.items()] + options
    begun = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": str(cache)}, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(done.returncode)
    told = json.loads(done.stdout.splitlines()[-1])
    del told["images"]
    return told | {"process_seconds": seconds}


def pixels(path: Path) -> bytes:
    """The picture's bytes; it must show something, as a black one would equal any other."""
    from PIL import Image

    with Image.open(path) as picture:
        if all(low == high for low, high in picture.getextrema()):
            raise SystemExit(f"{path}: a picture of one colour")
        return picture.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random files are kept (9 GB)")
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
    for path in (path for path in files.values() if path.is_file()):
        with path.open("rb") as file:
            while file.read(2**26):
                pass
    with tempfile.TemporaryDirectory() as scratch:
        pictures = [Path(scratch) / f"{i}.png" for i in range(1 + args.check)]
        runs = [draw(files, picture, Path(scratch) / "triton", options) for picture in pictures]
        same = pixels(pictures[0]) == pixels(pictures[1]) if args.check else None
    machine = report.machine(device, choose_dtype(None, device))
    print(f"{machine['device']}, torch {machine['torch']}, {machine['date']}")
    print(f"{size} x {size}, {runs[0]['steps']} steps, {runs[0]['backend']} {runs[0]['precision']}")
    for i, run in enumerate(runs):
        total = {"name": "process, start to end", "seconds": run["process_seconds"]}
        print(f"\n{'second' if i else 'first'} start\n\n{report.table([*run['stages'], total], COLUMNS)}")
    if args.check:
        print(f"\nthe same seed twice: {'bit-identical' if same else 'DIFFERENT PICTURES'}")
    report.print_json("image", machine, size=size, runs=runs, identical=same)
    sys.exit(same is False)


if __name__ == "__main__":
    main()
