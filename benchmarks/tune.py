"""What choosing the way to run linears costs, and that later runs make the same picture from what is remembered.

    python benchmarks/tune.py                 on a GPU; with a cache folder of its own, the user's stays as it is
    python benchmarks/tune.py --cpu           the same functions on the CPU, small, to see that it runs

The choice is made twice, which should agree; then two processes generate a picture of the demo. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from zimage_core import report, tune
from zimage_core.device import choose_device, choose_dtype
from zimage_core.sizes import GIB

PROMPT = "a large red circle on a blue background"


def first_choice(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Seconds, GiB and result of trying and timing every way."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    if on_gpu:
        record = tune.known(device, dtype, anew=True)
        if record is None:
            raise SystemExit("nothing could be timed")
    else:
        record = tune.measure(device, dtype, [("reference", "w4a16"), ("reference", "w4a4")], shapes={(256, 256): 1.0})
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None
    chosen = " ".join(tune.pick(record, (tuple(way.split(" ")) for way in record["ways"])))
    return {"chosen": chosen, "all_seconds": seconds, "seconds": record["seconds"], "gib": peak, "ways": record["ways"]}


def picture(device: torch.device, folder: Path, name: str) -> dict[str, object]:
    """Seconds of a new process that generates a picture, the picture's hash, and its way."""
    from PIL import Image

    path = folder / name
    command = [sys.executable, "-m", "zimage_core", "generate", PROMPT, "--seed=7", "--out", str(path), "--json"]
    begun = time.perf_counter()
    ended = subprocess.run([*command, f"--device={device}"], check=True, stdout=subprocess.PIPE)
    seconds, used = time.perf_counter() - begun, json.loads(ended.stdout.splitlines()[-1])
    with Image.open(path) as found:
        digest = hashlib.sha256(found.tobytes()).hexdigest()[:16]
    return {"seconds": seconds, "picture": digest, "way": f"{used['backend']} {used['precision']}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a dry run without a GPU")
    args = parser.parse_args()
    device = choose_device("cpu" if args.cpu else None)
    dtype = choose_dtype(None, device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.environ["LOCALAPPDATA"] = folder
        choices = [first_choice(device, dtype) for _ in range(2)]
        for made in choices:
            print(
                f"chosen: {made['chosen']}, {made['all_seconds']:.1f} s in all, {made['seconds']} s of timing", end=""
            )
            print(f", {made['gib']:.2f} GiB" if made["gib"] else "")
            for way, words in tune.describe({"ways": made["ways"]}).items():
                print(f"  {way}: {words}")
        later = [picture(device, Path(folder), f"{i}.png") for i in range(2)]
        for run in later:
            print(f"a later run: {run['way']}, picture {run['picture']}, {run['seconds']:.1f} s")
        same = later[0]["picture"] == later[1]["picture"]
        print("the same picture" if same else "DIFFERENT PICTURES")
    report.print_json("tune", report.machine(device, dtype), choices=choices, later=later, same=same)


if __name__ == "__main__":
    main()
