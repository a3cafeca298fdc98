"""Does the pack work in a real ComfyUI server? Streaming, budgets, interrupts, LoRAs, encoders, many prompts in a row.

    python benchmarks/comfyui.py --comfyui CHECKOUT --folder DIR    full size with random weights, 1024 x 1024, on a GPU
    python benchmarks/comfyui.py --comfyui CHECKOUT --folder DIR --tiny --device cpu    small files: tries the script

DIR keeps the random files for the next time (see image.py); COMFYUI_PATH may name the checkout and COMFYUI_PYTHON the
interpreter that runs it. The server starts with its defaults (on NVIDIA with dynamic VRAM) in a temporary base folder,
with the pack and `comfyui_probe.py` as custom nodes and without its frontend, and is asked over HTTP and websocket for
the pack's own example workflows. Each part has its own time limit; one that fails leaves a new server to the next. The
server's logs go to --out. "same": the latents are those of the first picture bit by bit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import controlnet as nets
import torch
from image import TINY_ENCODER, random_files
from make_synthetic import write_comfyui
from memory import free
from safetensors.torch import load_file, save_file

from zimage_core import report
from zimage_core.device import choose_device, choose_dtype
from zimage_core.formats.identify import model_info
from zimage_core.models.config import ZImageConfig
from zimage_core.models.text_encoder import TextEncoderConfig
from zimage_core.quantize.writer import block_names

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "host"))
from comfyui_server import Server  # noqa: E402

GIB = 2**30
PROMPT = "A small wooden boat on a calm mountain lake at sunrise, mist over the water"
SEED = 1
FREE_GIB = 2.5  # what is left of the card when it is "nearly full"
BUDGETS = (4.0, 2.5)
TINY_BUDGETS = (0.04,)
LORA_RANK = 16
IN_A_ROW = 10
TAKES = 3
MOST_ADDED = 0.65  # by a ControlNet to the time of sampling
STOCK = {"BF16": None, "FP8": "float8_e4m3fn", "INT8": "int8_tensorwise"}  # files for ComfyUI's own loader
DRIFT = 0.01
ROUNDING = 0.01  # relative, for sigmas that differ in their last bit: about what bf16's rounding gives
LEFT_GIB = 0.5  # that kernels and workspaces may keep of the device after a model has left it
DYNAMIC = "DynamicVRAM support detected and enabled"
MODES = ((), ("--highvram",), ("--lowvram",), ("--disable-dynamic-vram",), ("--novram",))
FAILURES = (AssertionError, LookupError, OSError, RuntimeError, ValueError)
FAILURES += (asyncio.TimeoutError, aiohttp.ClientError, http.client.HTTPException)
COLUMNS = {
    "part": "part",
    "prompt_s": "prompt s|.2f",
    "sample_s": "sampling s|.2f",
    "peak_gib": "peak GiB|.2f",
    "blocks": "blocks",
    "same": "same",
    "verdict": "",
    "note": "",
}


@dataclass(frozen=True)
class Row:
    """One line of the table. Peaks are torch's while sampling, unless the note says otherwise."""

    part: str
    ok: bool
    prompt_s: float | None = None
    sample_s: float | None = None
    peak_gib: float | None = None
    blocks: str = ""
    same: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        return "ok" if self.ok else "MISSED"


@dataclass(frozen=True)
class Drawn:
    """What one prompt did, in seconds; `before` and `after` are the probe's numbers around the sampler."""

    end: str
    steps: int
    prompt_s: float = 0.0
    sample_s: float = 0.0
    encode_s: float | None = None
    before: dict | None = None
    after: dict | None = None
    latents: torch.Tensor | None = None
    placed: tuple[tuple[int, int], ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def peak_gib(self) -> float | None:
        return self.after["peak"] / GIB if self.after and "peak" in self.after else None

    @property
    def blocks(self) -> str:
        """The blocks on the device of all, as the log says, when sampling began; "" where nothing was moved."""
        return "{} of {}".format(*self.placed[-1]) if self.placed else ""

    @property
    def resident(self) -> bool:
        """Whether all blocks were there."""
        return all(here == of for here, of in self.placed[-1:])


class Run:
    """The server, the files, and what was found so far."""

    def __init__(self, args: argparse.Namespace, device: torch.device, base: Path):
        self.args, self.device, self.base = args, device, base
        self.size = args.size or (64 if args.tiny else 1024)
        self.steps = 4 if args.tiny else 8
        self.models = model_files(args.folder, args.tiny, device)
        self.models |= more_files(args.folder, args.tiny, device, args.parts)
        self.rows: list[Row] = []
        self.server: Server | None = None
        self.options: tuple[str, ...] = ()  # of the server, beside those that it always has
        self.first: torch.Tensor | None = None
        self.small: torch.Tensor | None = None
        self.deadline = self.takes = self.starts = 0

    # ---- the server

    def start(self, options: tuple[str, ...]) -> None:
        """A new server, the old one stopped."""
        self.stop()
        self.options = options
        front = self.base / "frontend"
        front.mkdir(exist_ok=True)
        (front / "index.html").write_text("none")
        nodes = self.base / "custom_nodes"
        nodes.mkdir(exist_ok=True)
        probe = Path(__file__).with_name("comfyui_probe.py")
        if not (nodes / probe.name).is_symlink():
            (nodes / probe.name).symlink_to(probe)
        options = (*options, "--front-end-root", str(front), *(["--cpu"] if self.device.type == "cpu" else []))
        log = self.args.out / f"comfyui_{self.starts}.log"
        self.starts += 1
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        self.server = Server(self.args.comfyui, self.base, *options, python=python, models=self.models, log=log)

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None

    def probe(self, **asked: bool) -> dict:
        """The numbers of the server's process, after switching what it watches."""
        return self.server.post("/zimage_probe", asked)[1] if asked else self.server.get("/zimage_probe")

    def unload(self) -> dict:
        """Have ComfyUI take all models off the device; the numbers after that."""
        self.server.post("/free", {"unload_models": True})
        end = min(self.deadline, time.monotonic() + 20)
        while (found := self.probe())["models"] and time.monotonic() < end:
            time.sleep(0.1)
        assert not found["models"], f"still on the device after /free: {found['models']}"
        return found

    # ---- drawing

    def draw(self, example: str = "zimage_text_to_image", interrupt_after: int | None = None, **changes) -> Drawn:
        """Queue an example workflow with the probes around its sampler; AssertionError where it fails."""
        self.takes += 1
        steps = changes.get("steps", self.steps)
        graph = workflow(example, self.takes, **{"size": self.size, "steps": steps} | changes)
        logged = len(self.server.text())
        seen = self.server.watch(graph, interrupt_after, timeout=max(1.0, self.deadline - time.monotonic()))
        entry = self.server.wait(seen["prompt_id"], 20)
        messages = dict(entry["status"]["messages"])
        if seen["end"] == "execution_error":
            raise AssertionError(messages["execution_error"]["exception_message"].strip())
        if seen["end"] == "execution_interrupted":
            return Drawn(seen["end"], len(seen["progress"]), texts=tuple(seen["texts"]))
        check_picture(self.server.images(entry)[0])
        (found,) = entry["outputs"]["21"]["probe"]
        latents = load_file(found["latents"])["samples"]
        assert latents.isfinite().all() and latents.std() > 0, "the latents are not finite, or all alike"
        text = self.server.text()[logged:]
        text = text.partition(f"probe: begin {self.takes}")[2].partition(f"probe: end {self.takes}")[0]
        placed = re.findall(r"Z-Image: (\d+) of (\d+) blocks on", text)
        milliseconds = messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]
        return Drawn(
            seen["end"],
            len(seen["progress"]),
            milliseconds / 1e3,
            found["sample_s"],
            seen["began"]["20"] - seen["began"]["4"] if "4" in seen["began"] else None,
            found["before"],
            found["after"],
            latents,
            tuple((int(here), int(of)) for here, of in placed),
            tuple(seen["texts"]),
        )

    def same(self, drawn: Drawn) -> bool:
        """Whether a picture is the first one, which this draws where there is none yet."""
        if self.first is None:
            self.first = self.draw().latents
        return torch.equal(drawn.latents, self.first)

    def row(self, part: str, ok: bool, drawn: Drawn | None = None, same: bool | None = None, note: str = "") -> None:
        """Keep a row, and show it at once, as a GPU may be taken away."""
        found = {} if drawn is None else {"prompt_s": drawn.prompt_s, "sample_s": drawn.sample_s}
        found |= {} if drawn is None else {"peak_gib": drawn.peak_gib, "blocks": drawn.blocks}
        word = {None: "", True: "yes", False: "NO"}[same]
        row = Row(part, ok and same is not False, same=word, note=" ".join(note.split()), **found)
        self.rows.append(row)
        figures = [f"{row.prompt_s:.2f} s, sampling {row.sample_s:.2f} s" if drawn else "", row.blocks, row.note]
        print(f"{row.verdict:>6}  {part}: {'; '.join(filter(None, figures))}{word and f'; same: {word}'}", flush=True)

    def attempt(self, part: Callable[[Run], None], limit_s: float, options: tuple[str, ...] = ()) -> None:
        """Run one part with a server that was started with these options; where it fails, the next gets a new one."""
        try:
            if self.server is None or self.options != options:
                self.start(options)
            self.deadline = time.monotonic() + limit_s
            part(self)
        except FAILURES as error:
            tail = "" if self.server is None else f"; the log ends: {self.server.tail(3)}"
            self.row(part.__name__, False, note=f"{type(error).__name__}: {error}{tail}"[:600])
            self.stop()


def model_files(folder: Path, tiny: bool, device: torch.device) -> dict[str, Path]:
    """{path below ComfyUI's models: file} of the random files, the FP8 encoder also as a folder, and a LoRA."""
    files = random_files(folder, tiny, device)
    free(device)
    home = files["model"].parent
    encoder = TINY_ENCODER if tiny else TextEncoderConfig()
    config, lora = home / "config.json", home / "lora.safetensors"
    sizes = asdict(encoder) | {"model_type": "qwen3", "num_hidden_layers": encoder.num_layers + 1}
    config.write_text(json.dumps(sizes))
    if not lora.exists():
        save_file(random_lora(model_info(files["model"]).config), lora)
    models = {
        "diffusion_models/model.safetensors": files["model"],
        "text_encoders/encoder.safetensors": files["text-encoder"],
        "text_encoders/folder/model.safetensors": files["text-encoder"],
        "text_encoders/folder/config.json": config,
        "vae/vae.safetensors": files["vae"],
        "loras/lora.safetensors": lora,
    }
    return models | ({"text_encoders/tokenizer": files["tokenizer"]} if tiny else {})


def more_files(folder: Path, tiny: bool, device: torch.device, asked: list[str]) -> dict[str, Path]:
    """What some parts need beside `model_files`, in the same form."""
    files = random_files(folder, tiny, device)
    home, info = files["model"].parent, model_info(files["model"])
    found = {}
    if controlnet.__name__ in asked:
        places = range(0, info.config.n_layers, 2)
        net = nets.write_quantized(home, info.config, tuple(places), min(info.rank, nets.RANK), device)
        found["model_patches/controlnet.safetensors"] = net
    forms = STOCK if own_formats.__name__ in asked else {"BF16": None} if int4.__name__ in asked else {}
    for name, form in forms.items():
        path = home / f"stock-{name}.safetensors"
        if not path.exists():
            write_comfyui(path, info.config, form, device)
        found[f"diffusion_models/{path.name}"] = path
    free(device)
    return found


def random_lora(config: ZImageConfig) -> dict[str, torch.Tensor]:
    """A LoRA on every linear of the blocks, as diffusers' trainers write it for ComfyUI."""
    generator = torch.Generator().manual_seed(0)
    parts = {f"attention.{name}": (config.dim, config.dim) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    parts |= {f"feed_forward.{name}": (config.ffn_dim, config.dim) for name in ("w1", "w3")}
    parts["feed_forward.w2"] = (config.dim, config.ffn_dim)
    tensors = {}
    for block in block_names(config):
        for part, (n, k) in parts.items():
            name = f"diffusion_model.{block}.{part}"
            down, up = (torch.randn(shape, generator=generator) for shape in ((LORA_RANK, k), (n, LORA_RANK)))
            tensors[f"{name}.lora_A.weight"] = (down / k**0.5).bfloat16()
            tensors[f"{name}.lora_B.weight"] = (up * 0.02).bfloat16()
    return tensors


def workflow(
    example: str,
    take: int,
    size: int,
    steps: int,
    text: str = PROMPT,
    seed: int = SEED,
    budget: float = 0.0,
    encoder: str = "encoder.safetensors",
    alone: bool = False,
    model: str = "model.safetensors",
    precision: str = "auto",
    stock: bool = False,
    control: bool = False,
) -> dict:
    """An example workflow in its API form with the random files, a size and a prompt, the probes around its sampler.

    stock: the model by ComfyUI's own loader; control: with a ControlNet that sees a grey picture.
    """
    graph = json.loads((ROOT / "example_workflows" / "api" / f"{example}.json").read_text(encoding="utf-8"))
    inputs = {name: node["inputs"] for name, node in graph.items()}
    inputs["1"] |= {"model_name": model, "vram_budget": budget, "precision": precision}
    if stock:
        graph["1"] = {"class_type": "UNETLoader", "inputs": {"unet_name": model, "weight_dtype": "default"}}
    inputs["2"]["encoder_name"] = encoder
    inputs["3"]["vae_name"] = "vae.safetensors"
    inputs["4"]["prompt" if "prompt" in inputs["4"] else "text"] = text
    inputs["5"] |= {"seed": seed, "steps": steps}
    inputs["10" if "10" in inputs else "5"] |= {"width": size, "height": size}
    if "lora_name" in inputs.get("8", ()):
        inputs["8"]["lora_name"] = "lora.safetensors"
    if control:
        loader = {"control_name": "controlnet.safetensors", "backend": "auto", "precision": "auto"}
        picture = {"width": size, "height": size, "batch_size": 1, "color": 0x808080}
        applied = {"model": ["1", 0], "control": ["30", 0], "vae": ["3", 0], "image": ["31", 0]}
        graph["30"] = {"class_type": "ZImageControlNetLoader", "inputs": loader}
        graph["31"] = {"class_type": "EmptyImage", "inputs": picture}
        applied |= {"strength": 0.8, "start": 0.0, "end": 1.0}
        graph["32"] = {"class_type": "ZImageControlNetApply", "inputs": applied}
        inputs["5"]["model"] = ["32", 0]
    begin = {"model": inputs["5"]["model"], "positive": inputs["5"]["positive"], "take": take, "alone": alone}
    graph["20"] = {"class_type": "ZImageProbeBegin", "inputs": begin}
    graph["21"] = {"class_type": "ZImageProbeEnd", "inputs": {"latent": ["5", 0], "take": take}}
    inputs["5"] |= {"model": ["20", 0], "positive": ["20", 1]}
    inputs["6"]["latent" if "latent" in inputs["6"] else "samples"] = ["21", 0]
    return graph


def check_picture(data: bytes) -> None:
    """AssertionError where a PNG shows one colour."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        assert any(low != high for low, high in picture.convert("RGB").getextrema()), "a picture of one colour"


# ---- the parts ------------------------------------------------------------------------------------------------


def first_pictures(run: Run) -> None:
    """Our sampler and KSampler, each twice; the first begins with files that nobody has read."""
    cold = run.draw()
    run.first = cold.latents
    dynamic = DYNAMIC in run.server.text()
    on = "dynamic VRAM on" if dynamic else "dynamic VRAM off"
    run.row("our sampler, first", dynamic or run.device.type == "cpu", cold, note=f"{on}; {cold.texts[-1]}")
    again = run.draw()
    run.row("our sampler, second", True, again, run.same(again))
    run.draw("zimage_ksampler")
    stock = run.draw("zimage_ksampler")
    error = float((stock.latents - run.first).norm() / run.first.norm())
    run.row("KSampler, second", error <= ROUNDING, stock, note=f"relative difference to our sampler {error:.1e}")


def nearly_full(run: Run) -> None:
    """With all but FREE_GIB of the device taken by another process: the same picture, and one of a new prompt."""
    if run.device.type != "cuda":
        return
    run.draw()  # so that its prompt need not be encoded again
    run.unload()
    there = torch.cuda.mem_get_info(run.device)[0]
    ballast = torch.empty(max(0, there - round(FREE_GIB * GIB)), dtype=torch.uint8, device=run.device)
    left = torch.cuda.mem_get_info(run.device)[0] / GIB
    part, other = f"{left:.1f} GiB free", f"{PROMPT}, another"
    try:
        drawn = run.draw()
        run.row(part, run.args.tiny or not drawn.resident, drawn, run.same(drawn))
        drawn = run.draw()
        run.row(f"{part}, second", run.args.tiny or not drawn.resident, drawn, run.same(drawn))
        new = run.draw(text=other)
        run.row(f"{part}, new prompt", True, new)
    finally:
        del ballast
        torch.cuda.empty_cache()
    drawn = run.draw(alone=True)
    run.row("all of it free again", drawn.resident, drawn, run.same(drawn))
    again = run.draw(text=other)
    same = torch.equal(again.latents, new.latents)
    run.row("the new prompt, resident", True, again, note=f"{'as' if same else 'NOT as'} with {part}")


def budgets(run: Run) -> None:
    """The loader's vram_budget: torch's peak while sampling, and the same picture."""
    for budget in TINY_BUDGETS if run.args.tiny else BUDGETS:
        drawn = run.draw(budget=budget, alone=True)
        held = drawn.peak_gib is None or drawn.peak_gib <= budget
        run.row(f"vram_budget {budget}", held, drawn, run.same(drawn), note=drawn.texts[-1])
        drawn = run.draw(budget=budget)
        run.row(f"vram_budget {budget}, second", True, drawn, run.same(drawn))


def interrupt(run: Run) -> None:
    """Stopped in the middle of sampling; the next prompt works and draws what it did before."""
    steps = 5 * run.steps
    stopped = run.draw(steps=steps, interrupt_after=3)
    ok = stopped.end == "execution_interrupted" and stopped.steps < steps
    run.row("interrupt", ok, note=f"{stopped.end} after {stopped.steps} of {steps} steps")
    drawn = run.draw()
    run.row("after the interrupt", True, drawn, run.same(drawn))


def lora(run: Run) -> None:
    """A LoRA on every linear changes the picture; without it, it is what it was."""
    said = run.draw("zimage_lora").texts
    drawn = run.draw("zimage_lora")
    note = next((text for text in said if "lora" in text), "nothing on the node")
    run.row(f"LoRA of rank {LORA_RANK}", not run.same(drawn), drawn, note=note)
    drawn = run.draw()
    run.row("without it again", True, drawn, run.same(drawn))


def encoders(run: Run) -> None:
    """The FP8 encoder through ComfyUI's own CLIP and through the pack's: what it takes, and that it leaves."""
    found = {}
    for name, what in (("encoder.safetensors", "file"), ("folder", "folder")):
        run.draw(text=f"{PROMPT}, {what}", encoder=name)  # loads
        before = run.unload()
        if run.device.type == "cuda":
            run.probe(memory=True)
        drawn = found[what] = run.draw(text=PROMPT + ".", encoder=name)
        note, left = "", 0.0
        if run.device.type == "cuda":
            peak = (before["total"] - run.probe(memory=False)["lowest"]) / GIB
            left = (drawn.before["used"] - before["used"]) / GIB
            note = f"before sampling {left:+.2f} GiB on the device; at most {peak:.2f} GiB of it in all"
        loaded = [name for name, size in drawn.before["models"] if size]
        note += f"; encoding {drawn.encode_s:.2f} s; models still there: {', '.join(loaded) or 'none'}"
        run.row(f"FP8 encoder, {what}", left <= LEFT_GIB, drawn, note=note.removeprefix("; "))
    one, other = (found[what].latents for what in ("file", "folder"))
    error = float((one - other).norm() / one.norm())
    run.row("their pictures", True, note=f"relative difference of the latents {error:.1e}")


def in_a_row(run: Run) -> None:
    """Prompts with a text each: memory after the third and the last."""
    held = []
    for i in range(IN_A_ROW):  # of the whole device's memory ComfyUI's allocator keeps what it likes: not judged
        drawn = run.draw(text=f"{PROMPT}, take {i}", seed=i)
        now = run.probe()
        held.append({key: now[key] for key in ("allocated", "used") if key in now} | {"host": run.server.rss()})
    drift = {key: max(now[key] for now in held[2:]) / held[2][key] - 1 for key in held[0]}
    sizes = [f"{key} {held[2][key] / GIB:.2f} to {held[-1][key] / GIB:.2f} GiB" for key in drift]
    steady = all(change <= DRIFT for key, change in drift.items() if key != "used")
    run.row(f"{IN_A_ROW} prompts in a row", steady, drawn, note=", ".join(sizes))


def host_waits(run: Run) -> None:
    """Where a step makes the host wait for the GPU, by torch's own warnings: nowhere in the pack."""
    if run.device.type != "cuda":
        return
    for budget in (0.0, BUDGETS[-1]):
        run.draw(budget=budget)
        run.probe(sync=True)
        drawn = run.draw(budget=budget)
        counts = run.probe(sync=False)["syncs"]
        ours = [site for kind, site, _ in counts if kind == "in a step"]
        note = ", ".join(f"{kind}: {site} x {count}" for kind, site, count in sorted(counts)) or "none at all"
        part = f"host waits, {'resident' if not budget else f'vram_budget {budget}'}"
        run.row(part, not ours, drawn, run.same(drawn), note=note)


def small_picture(run: Run) -> None:
    """One small picture, which is the same whatever the server's memory options."""
    drawn = run.draw(size=min(run.size, 512))
    same = None if run.small is None else torch.equal(drawn.latents, run.small)
    run.small = drawn.latents if run.small is None else run.small
    on = "dynamic VRAM on" if DYNAMIC in run.server.text() else "dynamic VRAM off"
    run.row(" ".join(run.options) or "defaults", True, drawn, same, note=on)


def controlnet(run: Run) -> None:
    """A full ControlNet in 4 bits beside the model: what sampling takes more, and the budget that both share."""
    run.draw()
    plain = run.draw()
    run.draw(control=True)
    drawn = run.draw(control=True)
    added = drawn.sample_s / plain.sample_s - 1
    ok = run.args.tiny or added <= MOST_ADDED
    run.row("ControlNet, second", ok, drawn, note=f"{added:.2f} more than the {plain.sample_s:.3f} s without")
    for budget in TINY_BUDGETS if run.args.tiny else BUDGETS[:1]:
        run.draw(budget=budget, alone=True, control=True)
        small = run.draw(budget=budget, control=True)
        held = small.peak_gib is None or small.peak_gib <= budget
        same = torch.equal(small.latents, drawn.latents)
        run.row(f"ControlNet, vram_budget {budget}, second", held, small, same, note=small.texts[-1])


def own_formats(run: Run) -> None:
    """KSampler on one file by ComfyUI's loader, which knows Z-Image by its width, and by ours; INT4 beside them."""
    first = 0.0

    def row(name: str, **options: object) -> None:
        nonlocal first
        run.draw("zimage_ksampler", alone=True, **options)
        drawn = run.draw("zimage_ksampler", **options)
        first = first or drawn.sample_s
        run.row(name, True, drawn, note=f"{drawn.sample_s / first:.3f} of ComfyUI in BF16")

    for name in STOCK:
        file = f"stock-{name}.safetensors"
        if not run.args.tiny:
            row(f"{name}, ComfyUI", model=file, stock=True)
        row(f"{name}, ours", model=file)
        if name != "BF16" and run.device.type == "cuda":
            row(f"{name}, ours in w8a8", model=file, precision="w8a8")
        if name == "BF16":
            row("INT4, ours")


def int4(run: Run) -> None:
    """KSampler on an INT4 file by our loader beside ComfyUI's own in BF16, the least of TAKES, at two sizes."""
    ways: dict[str, dict] = {"INT4, ours": {}}
    if not run.args.tiny:
        ways = {f"INT4, ours, {precision}": {"precision": precision} for precision in ("w4a8", "w4a16")}
        ways = {"BF16, ComfyUI": {"model": "stock-BF16.safetensors", "stock": True}} | ways
    for size in (run.size // 2, run.size):
        first = 0.0
        for name, way in ways.items():
            run.draw("zimage_ksampler", alone=True, size=size, **way)
            takes = [run.draw("zimage_ksampler", size=size, **way) for _ in range(TAKES)]
            drawn = min(takes, key=lambda drawn: drawn.sample_s)
            first = first or drawn.sample_s
            run.row(f"{size}: {name}", True, drawn, note=f"{drawn.sample_s / first:.3f} of the first")


PARTS = {
    first_pictures: 120,
    nearly_full: 60,
    budgets: 60,
    interrupt: 40,
    lora: 40,
    encoders: 60,
    in_a_row: 60,
    host_waits: 60,
    controlnet: 90,
    own_formats: 150,
    int4: 120,
    small_picture: 40,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="ComfyUI's checkout")
    parser.add_argument("--folder", type=Path, required=True, help="where the random files are kept (9 GB)")
    parser.add_argument("--out", type=Path, default=Path("."), help="for the server's logs (default: here)")
    parser.add_argument("--size", type=int, help="pixels of an edge (default 1024, 64 with --tiny)")
    parser.add_argument("--device", help="default: a GPU if torch sees one")
    parser.add_argument("--tiny", action="store_true", help="small files and small pictures")
    parser.add_argument("--modes", action="store_true", help="also servers with other memory options")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], help="only these")
    args = parser.parse_args()
    if args.comfyui is None:
        parser.error("--comfyui or COMFYUI_PATH must name a ComfyUI checkout")
    args.comfyui, args.folder, args.out = (path.resolve() for path in (Path(args.comfyui), args.folder, args.out))
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    args.parts = args.parts or [part.__name__ for part in PARTS if part is not small_picture or args.modes]
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    with tempfile.TemporaryDirectory() as base:
        run = Run(args, device, Path(base))
        print(f"files: {time.monotonic() - begun:.0f} s", flush=True)
        try:
            for part, limit_s in PARTS.items():
                several = MODES if part is small_picture and device.type == "cuda" else ((),)
                for options in several if part.__name__ in args.parts else ():
                    run.attempt(part, limit_s, options)
        finally:
            run.stop()
    machine = report.machine(choose_device(args.device), choose_dtype(None, device))
    print(f"\n{machine['device']}, torch {machine['torch']}, {machine['date']}")
    print(f"{run.size} x {run.size}, {run.steps} steps")
    print(f"\n{report.table([asdict(row) | {'verdict': row.verdict} for row in run.rows], COLUMNS)}")
    ok = all(row.ok for row in run.rows)
    report.print_json("comfyui", machine, size=run.size, steps=run.steps, ok=ok, rows=[asdict(row) for row in run.rows])
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
