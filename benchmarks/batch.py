"""How fast `zimage batch` is, and what kills do to it. Each part by its own option; all figures of a run come together.

    python benchmarks/batch.py --folder DIR --pace           one GPU, 512 and 1024, against encode + 8 steps + decode
    python benchmarks/batch.py --folder DIR --diffusers      ... against a loop with diffusers' pipeline
    python benchmarks/batch.py --folder DIR --comfyui CHECKOUT   ... against its queue, which our own engine fills
    python benchmarks/batch.py --folder DIR --gpus 1 2 4     processes on so many GPUs of this machine
    python benchmarks/batch.py --folder DIR --ray 2          workers of a local Ray cluster, against as many processes
    python benchmarks/batch.py --kills 200                   a stand-in for generating, killed at random moments
    python benchmarks/batch.py --demo-kills 10               the demo, killed after at least one new picture each time
    python benchmarks/batch.py --folder DIR --batches        batches against single pictures: speed and difference

DIR keeps random files of the real sizes (see image.py), --tiny takes small ones. Every pace is by the times in the
manifest, after the first 4 pictures of each worker, over `--seconds` or `--count` pictures; encoding, PNG files and
manifest are in it. Random weights make noise, whose PNG files are as large and slow as they can be. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from image import random_files

from zimage_core import batch, bench, report
from zimage_core.batch.pictures import PictureGenerator
from zimage_core.pipeline import choose_device, choose_dtype

ROOT = Path(__file__).resolve().parents[1]
STANDIN = ROOT / "tests" / "unit" / "standin.py"
SIZES, TINY_SIZES = (512, 1024), (64,)
WARM = 4  # pictures of each worker before the clock starts
WORDS = ("red fox", "old lighthouse", "quiet harbour", "deep snow", "birch wood", "early light", "photograph", "market")
PACE = {
    "way": "way",
    "size": "pixels",
    "count": "pictures",
    "a_minute": "a minute|.1f",
    "start": "start s|.0f",
    "busy": "busy|.3f",
    "of_parts": "of the parts|.3f",
    "times": "times one GPU|.2f",
    "note": "",
}


def prompts(count: int, take: str) -> Iterator[dict]:
    """Rows with prompts of 8 to 40 of WORDS, short and long in turn, all different."""
    chance = random.Random(take)
    for i in range(count):
        text = " ".join(chance.choices(WORDS, k=8 + 13 * i % 33))
        yield {"id": f"{take}-{i}", "prompt": f"{text}, {i}", "seed": i}


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


class Bench:
    """The options, the files, and the rows of the table so far."""

    def __init__(self, args: argparse.Namespace, device: torch.device, scratch: Path):
        self.args, self.device, self.scratch = args, device, scratch
        self.sizes = args.sizes or (TINY_SIZES if args.tiny else SIZES)
        self.steps, self.warm = (2, 2) if args.tiny else (8, WARM)
        self.rows: list[dict] = []
        self.facts: dict[str, object] = {}
        self.takes = 0
        self.begun = now()

    def options(self) -> dict[str, object]:
        """The files, without a limit on memory, so that everything stays on the device."""
        files = random_files(self.args.folder, self.args.tiny, self.device)
        files = {name.replace("-", "_"): str(path) for name, path in files.items()}
        return {**files, "vram_budget": None}

    def run(self, size: int, count: int, **how: object) -> batch.Run:
        """A batch of new prompts of a size, in a new folder."""
        self.takes += 1
        self.begun = now()
        defaults = {"width": size, "height": size, "steps": self.steps}
        rows = list(prompts(count, f"take{self.takes}"))
        return batch.run(rows, self.scratch / str(self.takes), defaults=defaults, **how)

    def pace(self, results: Iterable[batch.Result], workers: int = 1) -> dict[str, float]:
        """Pictures a minute by the manifest's times, over about `--seconds`: the sum of the workers' own rates.

        They are timed from when each of so many workers has had `warm` pictures until the first of them has had its
        last. start: seconds from the beginning of the run to the last worker's first picture. busy: the part of the
        timed seconds that the workers spent on pictures, by their own clocks.
        """
        begun, warm = time.perf_counter(), False
        seen: dict[tuple[str, int], list[tuple[datetime.datetime, float]]] = {}
        for result in results:
            if result.error is not None:
                raise SystemExit(f"{result.id}: {result.error}")
            record = result.record
            worker = seen.setdefault((record["host"], record["pid"]), [])
            worker.append((datetime.datetime.fromisoformat(record["time"]), record["seconds"]))
            warm = len(seen) == workers and all(len(times) > self.warm for times in seen.values())
            begun = begun if warm else time.perf_counter()
            if time.perf_counter() - begun > self.args.seconds:
                break
        if not warm:
            raise SystemExit("too few pictures to time: more --count")
        begin = max(sorted(times)[self.warm - 1][0] for times in seen.values())
        end = min(max(times)[0] for times in seen.values())
        timed = [sorted(one for one in times if begin <= one[0] <= end) for times in seen.values()]
        if min(map(len, timed)) < 2:
            raise SystemExit("too few pictures to time: more --count")
        took = [(times[-1][0] - times[0][0]).total_seconds() for times in timed]
        rate = sum((len(times) - 1) / seconds for times, seconds in zip(timed, took))
        busy = sum(spent for times in timed for _, spent in times[1:]) / sum(took)
        start = (max(min(times)[0] for times in seen.values()) - self.begun).total_seconds()
        return {"count": sum(map(len, timed)) - workers, "a_minute": 60 * rate, "start": start, "busy": busy}

    def row(self, way: str, size: int, **found: object) -> None:
        self.rows.append({"way": way, "size": size, **found})
        print(report.table(self.rows[-1:], PACE).splitlines()[-1], flush=True)


def parts(generator: PictureGenerator, run: Bench, size: int) -> float:
    """Seconds of encoding a prompt, all steps and decoding, each measured alone and summed; medians of five."""
    pipeline = generator.pipeline
    warm, texts = ([row["prompt"] for row in prompts(32, f"{name}{size}")] for name in ("warm", "parts"))
    pipeline(warm[0], size, size, num_inference_steps=run.steps, generator=0)
    pipeline.encode(warm)
    begun = time.perf_counter()
    pipeline.encode(texts)
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    found = {"encode": [(time.perf_counter() - begun) / len(texts)], "sample": [], "decode": []}
    for seed in range(6):
        pipeline(texts[seed], size, size, num_inference_steps=run.steps, generator=seed)
        for stage in pipeline.stages[-2:]:
            found[stage.name].append(stage.seconds)
    seconds = {name: statistics.median(times[1:] or times) for name, times in found.items()}
    run.facts[f"parts_{size}"] = seconds
    print(f"{size}: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items()), flush=True)
    return sum(seconds.values())


def one_gpu(run: Bench) -> None:
    """A batch in this process against the sum of its parts."""
    generator = PictureGenerator({**run.options(), "device": str(run.device)}, exact=run.args.exact)
    for size in run.sizes:
        alone = parts(generator, run, size)
        found = run.pace(run.run(size, run.args.count, generator=generator))
        run.row("zimage batch", size, **found, of_parts=found["a_minute"] * alone / 60)


def batches(run: Bench) -> None:
    """Pictures made together against the same made one by one: pace, and the largest difference of a pixel."""
    import numpy
    from PIL import Image

    for size in run.sizes:
        folders = []
        for exact in (True, False):
            generator = PictureGenerator({**run.options(), "device": str(run.device)}, exact=exact)
            generator.pipeline("warm", size, size, num_inference_steps=run.steps, generator=0)
            run.begun = now()
            started = batch.run(
                list(prompts(run.args.count, f"both{size}")),
                run.scratch / f"both-{size}-{exact}",
                defaults={"width": size, "height": size, "steps": run.steps},
                generator=generator,
            )
            folders.append(Path(started.sink.where))
            run.row("one by one" if exact else "together", size, **run.pace(list(started)))
            del generator
        worst, means = 0, []
        for path in sorted(folders[0].glob("*.png")):
            with Image.open(path) as one, Image.open(folders[1] / path.name) as other:
                apart = numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(other, dtype=int))
            worst = max(worst, int(apart.max()))
            means.append(float(apart.mean()))
        run.facts[f"apart_{size}"] = {"largest": worst, "mean": statistics.mean(means)}
        print(f"{size}: pixels differ by {statistics.mean(means):.3f} of 255 on average, at most {worst}", flush=True)


def several(run: Bench, counts: list[int], on_ray: list[int]) -> None:
    """Processes on so many GPUs (on the CPU where there is none) in the order given, then Ray's workers."""
    shown = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for size in run.sizes:
        rows: dict[tuple[int, bool], dict] = {}
        processes = ((count, False) for count in dict.fromkeys([*counts, *on_ray]))
        for count, ray in [*processes, *((count, True) for count in on_ray)]:
            devices = shown[:count] if shown else ["cpu"] * count
            if len(devices) < count:
                raise SystemExit(f"{count} GPUs: torch sees {len(shown)}")
            how = {"ray": "local", "workers": (count, count)} if ray else {"devices": devices}
            found = run.pace(run.run(size, run.args.count * count, **how, **run.options()), count)
            run.row(f"{count} workers on Ray" if ray else f"{count} processes", size, **found)
            rows[count, ray] = run.rows[-1]
        least = min(rows)[0]
        for row in rows.values():
            row["times"] = row["a_minute"] / rows[least, False]["a_minute"] * least


def comfyui(run: Bench) -> None:
    """The rows in a ComfyUI server's queue, with the pack's own nodes."""
    sys.path.insert(0, str(ROOT / "tests" / "host"))
    from comfyui import model_files, workflow
    from comfyui_server import Server

    from zimage_core.batch.comfyui import ComfyUI, WorkflowColumns

    models = model_files(run.args.folder.resolve(), run.args.tiny, run.device)
    base = run.scratch / "comfyui"
    front = base / "frontend"
    front.mkdir(parents=True)
    (front / "index.html").write_text("none")
    options = ["--front-end-root", str(front), *(["--cpu"] if run.device.type == "cpu" else [])]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    server = Server(run.args.comfyui.resolve(), base, *options, python=python, models=models)
    try:
        for size in run.sizes:
            graph = workflow("zimage_text_to_image", 0, size, run.steps)
            for probe in ("20", "21"):
                del graph[probe]
            text = "prompt" if "prompt" in graph["4"]["inputs"] else "text"
            graph["5"]["inputs"] |= {"model": ["1", 0], "positive": ["4", 0]}
            graph["6"]["inputs"]["latent" if "latent" in graph["6"]["inputs"] else "samples"] = ["5", 0]
            path = run.scratch / f"workflow-{size}.json"
            path.write_text(json.dumps(graph))
            columns = WorkflowColumns(graph, [f"4.{text}=prompt", "5.seed=seed"])
            run.takes += 1
            run.begun = now()
            rows = list(prompts(run.args.count, f"take{run.takes}"))
            where = run.scratch / str(run.takes)
            started = batch.run(rows, where, generator=ComfyUI(server.url, path), columns=columns)
            run.row("ComfyUI's queue", size, **run.pace(started))
    finally:
        server.stop()


def diffusers_loop(run: Bench) -> None:
    """diffusers' pipeline in a loop: random weights in bf16, captions given, so without its text encoder."""
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed: no loop with it")
        return
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    from zimage_core.formats.identify import model_info

    config = model_info(Path(str(run.options()["model"]))).config
    dtype = choose_dtype(None, run.device)
    sizes = {name: getattr(config, name) for name in ("dim", "n_layers", "n_refiner_layers", "n_heads", "norm_eps")}
    sizes |= {name: getattr(config, name) for name in ("cap_feat_dim", "in_channels", "rope_theta", "t_scale")}
    axes = {"axes_dims": list(config.axes_dims), "axes_lens": list(config.axes_lens), "n_kv_heads": config.n_heads}
    channels = [32] * 4 if run.args.tiny else [128, 256, 512, 512]
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(**sizes, **axes)
        vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=16, **kinds)
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        bench.randomize(vae, run.device, dtype),
        None,
        None,
        bench.randomize(transformer, run.device, dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    for size in run.sizes:
        begun = ended = 0.0
        counted = 0
        for i in range(run.args.count):
            caption = [torch.randn(bench.CAPTION_TOKENS, config.cap_feat_dim, device=run.device, dtype=dtype)]
            options = {"height": size, "width": size, "num_inference_steps": run.steps, "guidance_scale": 0.0}
            picture = pipeline(prompt=None, prompt_embeds=caption, **options).images[0]
            picture.save(run.scratch / f"diffusers-{size}-{i}.png")
            ended = time.perf_counter()
            counted += bool(begun)
            begun = begun or ended
            if ended - begun > run.args.seconds:
                break
        found = {"count": counted, "a_minute": 60 * counted / (ended - begun)}
        run.row("diffusers in a loop, bf16, no encoder", size, **found)


# ---- kills ----------------------------------------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, str]:
    """id -> hash of the file by the manifest; SystemExit where an id is there twice or a file is not what it says."""
    found: dict[str, str] = {}
    for record in batch.Sink(folder).records():
        data = (folder / record["file"]).read_bytes()
        if record["id"] in found or hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise SystemExit(f"{folder}: {record['id']} is there twice, or its file is not what the manifest says")
        found[record["id"]] = record["sha256"]
    return found


def kills(run: Bench, command: list[str], rows: Path, total: int, times: int) -> dict:
    """Run a command over so many rows undisturbed, and in another folder with kills at random moments, each after a
    new picture; SystemExit where the results differ."""
    chance = random.Random(0)
    peak = 0.0

    def start(folder: Path) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*command, str(rows), f"--out={folder}"], env=environment, stdout=subprocess.DEVNULL)

    def finish(folder: Path) -> tuple[float, float]:
        """Seconds and peak of a run that nobody kills."""
        begun, highest, process = time.perf_counter(), 0.0, start(folder)
        while process.poll() is None:
            highest = max(highest, host_peak(process.pid))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit("a run that was not killed failed")
        return time.perf_counter() - begun, highest

    aim, out = run.scratch / f"aim-{rows.stem}", run.scratch / f"out-{rows.stem}"
    seconds, whole = finish(aim)
    for i in range(times):
        there = count(out)
        wanted = there + chance.randint(1, max(1, 2 * (total - there) // (times - i + 1)))
        process = start(out)
        while count(out) < min(wanted, total) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        peak = max(peak, host_peak(process.pid))
        process.kill()
        process.wait()
        if i % 20 == 19:
            print(f"killed {i + 1} times, {count(out)} pictures", flush=True)
    finish(out)
    found, aimed = hashes(out), hashes(aim)
    if found != aimed or len(found) != total:
        raise SystemExit(f"{out}: {len(found)} pictures of {total}, or other ones than undisturbed")
    memory = {"undisturbed_mib": whole, "killed_mib": peak}
    print(f"{times} kills: {total} ids once each, files as undisturbed; peak memory in MiB {memory}", flush=True)
    half = len(list(out.rglob("*.part")))
    return {"rows": total, "kills": times, "undisturbed_s": seconds, "half_written": half, **memory}


def host_peak(pid: int) -> float:
    """Peak of a process's resident memory in MiB, 0 when it has ended."""
    with contextlib.suppress(OSError, StopIteration), open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
    return 0.0


def count(folder: Path) -> int:
    """PNG files in a folder."""
    with contextlib.suppress(FileNotFoundError):
        return sum(entry.name.endswith(".png") for entry in os.scandir(folder))
    return 0


def standin_kills(run: Bench) -> None:
    """A stand-in for generating, many rows, kills at random moments; also a tenth of the rows, for memory."""
    few = write_rows(run.scratch / "few.jsonl", run.args.rows // 10)
    many = write_rows(run.scratch / "many.jsonl", run.args.rows)
    command = [sys.executable, str(STANDIN)]
    run.facts["tenth"] = kills(run, command, few, run.args.rows // 10, 0)
    run.facts["kills"] = kills(run, command, many, run.args.rows, run.args.kills)


def demo_kills(run: Bench) -> None:
    """The demo by the command line on the CPU or a GPU, killed after at least one new picture each time."""
    rows = write_rows(run.scratch / "demo.jsonl", run.args.demo_rows)
    script = "import sys; from zimage_core.cli import main; sys.exit(main(['batch', *sys.argv[1:]]))"
    command = [sys.executable, "-c", script, "--steps=2", "--exact", f"--device={run.device}"]
    run.facts["demo_kills"] = kills(run, command, rows, run.args.demo_rows, run.args.demo_kills)


def write_rows(path: Path, number: int) -> Path:
    rows = ({**row, "width": 64, "height": 64} for row in prompts(number, path.stem))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the random files are kept (9 GB)")
    parser.add_argument("--pace", action="store_true", help="one GPU against the sum of its parts")
    parser.add_argument("--batches", action="store_true", help="together against one by one")
    parser.add_argument("--diffusers", action="store_true", help="a loop with diffusers, where it is installed")
    parser.add_argument("--comfyui", type=Path, metavar="CHECKOUT", help="ComfyUI's queue")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[], metavar="N", help="so many processes, one after the other"
    )
    parser.add_argument(
        "--ray", type=int, nargs="+", default=[], metavar="N", help="so many workers on Ray, and processes"
    )
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="of a stand-in over --rows rows")
    parser.add_argument("--demo-kills", type=int, default=0, metavar="N", help="of the demo over --demo-rows")
    parser.add_argument("--rows", type=int, default=10_000, help="of the stand-in (default 10,000)")
    parser.add_argument("--demo-rows", type=int, default=300, help="of the demo (default 300)")
    parser.add_argument("--count", type=int, default=64, help="pictures to generate for each pace and GPU (default 64)")
    parser.add_argument("--seconds", type=float, default=60.0, help="to time a pace at most (default 60)")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels of an edge (default 512 1024)")
    parser.add_argument("--exact", action="store_true", help="one picture at a time in --pace")
    parser.add_argument("--device", help="default: a GPU if torch sees one")
    parser.add_argument("--tiny", action="store_true", help="small files and pictures, to see that it runs")
    args = parser.parse_args()
    device = choose_device(args.device)
    asked = [args.pace, args.batches, args.diffusers, args.comfyui, args.gpus, args.ray]
    if any(asked) and args.folder is None:
        parser.error("--folder must say where the random files are kept")
    with tempfile.TemporaryDirectory(prefix="zimage-batch-") as scratch:
        run = Bench(args, device, Path(scratch))
        if args.pace:
            one_gpu(run)
        if args.batches:
            batches(run)
        if args.diffusers:
            diffusers_loop(run)
        if args.comfyui:
            comfyui(run)
        if args.gpus or args.ray:
            several(run, args.gpus, args.ray)
        if args.kills:
            standin_kills(run)
        if args.demo_kills:
            demo_kills(run)
    machine = report.machine(device, choose_dtype(None, device))
    print(f"\n{machine['device']}, torch {machine['torch']}, {machine['date']}")
    if run.rows:
        print(f"\n{report.table(run.rows, PACE)}")
    report.print_json("batch", machine, rows=run.rows, **run.facts)


if __name__ == "__main__":
    main()
