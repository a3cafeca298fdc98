"""From a prompt to pictures: which files are read, when each model is on the device, and the order of the stages.

prompt -> token ids -> cap_feats -> (encoder leaves) -> Conditioning -> latents -> (B, H, W, 3) -> pictures.
The models are on the device one after the other, within a budget as `plan` shares it out before work starts
(`Pipeline.plan`); only where nothing is limited do transformer and VAE wait there for the next picture.
Every stage's seconds and peak memory are kept in `Pipeline.stages`.

Source of the interface: huggingface/diffusers `pipelines/z_image@v0.42.1`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import secrets
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from . import sampler
from .formats import load as checkpoint
from .formats.encoder import load_text_encoder
from .formats.identify import model_info
from .formats.vae import load_vae
from .linear import backends
from .lora import apply as lora
from .lora.read import Lora, load_lora
from .memory import plan as planning
from .memory.graphs import Graphs
from .memory.offload import BlockStreamer
from .memory.placement import module_bytes
from .memory.stages import MetaModels, libraries
from .models.text_encoder import encode_prompts
from .models.tokenizer import find_tokenizer, load_tokenizer
from .models.transformer import Conditioning, Hooks
from .models.vae import decode_image, out_of_memory

if TYPE_CHECKING:
    from PIL import Image

PIXELS_MULTIPLE = 16
REAL_SIZE, DEMO_SIZE = 1024, 128  # pixels, where no size is asked for
CACHED_PROMPTS = 32
SEEDS = 2**64

logger = logging.getLogger(__name__)

T = TypeVar("T")
Seeds = torch.Generator | int | Sequence[int] | None
OnStage = Callable[[str, int], None]
OnStep = Callable[[int, int, Tensor], "bool | None"]


@dataclass(frozen=True)
class ModelFiles:
    """The files of one pipeline; `demo` where the transformer is the bundled model."""

    model: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path
    demo: bool = False


@dataclass(frozen=True)
class Stage:
    """What one stage took: seconds, and peak bytes on the device and resident in the host's memory while it ran.

    device_peak counts tensors, device_reserved all that torch's allocator held for them; both are None on a CPU.
    host_peak is None where the system does not count a stage's own (it does on Linux).
    """

    name: str
    seconds: float
    device_peak: int | None
    device_reserved: int | None
    host_peak: int | None


def find_files(model=None, text_encoder=None, vae=None, tokenizer=None) -> ModelFiles:
    """The four files of a pipeline, all there; no model at all means the bundled demo.

    `model` may be a whole diffusers folder, whose parts are then the defaults. The tokenizer is looked for beside
    the encoder unless named. Raises ValueError for a transformer that cannot be read, or a part that is not named or
    not there.
    """
    demo = model is None
    if demo:
        from .demo import demo_files

        parts = demo_files()
    else:
        root = Path(model)
        whole = (root / "transformer").is_dir()
        parts = {name: root / name for name in ("text_encoder", "tokenizer", "vae")} if whole else {}
        parts["model"] = root / "transformer" if whole else root
    model_info(parts["model"])
    if text_encoder is not None:
        parts["text_encoder"] = Path(text_encoder)
        parts.pop("tokenizer", None)
    if vae is not None:
        parts["vae"] = Path(vae)
    if tokenizer is not None:
        parts["tokenizer"] = Path(tokenizer)
    for name, what in (("text_encoder", "Qwen3-4B text encoder"), ("vae", "16-channel VAE")):
        if name not in parts:
            option = name.replace("_", "-")
            raise ValueError(f"{model}: a {what} is needed beside the transformer; name it with --{option} ({name}=)")
    for name, path in parts.items():
        if not path.exists():
            raise ValueError(f"{path}: the {name.replace('_', ' ')} is not there; check the path")
    if "tokenizer" not in parts:
        parts["tokenizer"] = get_tokenizer(parts["text_encoder"])
    return ModelFiles(**parts, demo=demo)


def get_tokenizer(text_encoder, comfyui=None) -> Path:
    """The folder of the tokenizer for an encoder, from this machine or else from the hub; ValueError for neither."""
    try:
        return find_tokenizer(text_encoder, comfyui)
    except ValueError as missing:
        from .hub import download_tokenizer

        try:
            return download_tokenizer()
        except ValueError as error:
            raise ValueError(f"{missing}. Downloading it failed too: {error}") from None


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, else the current CUDA (or ROCm) device, else the CPU; a GPU always with its index, which some
    functions of torch.cuda ask for. Raises ValueError if it is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is no torch device; use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "`zimage doctor` tells more, --device cpu works anywhere"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named dtype, else bf16, or fp16 on GPUs older than bf16. Raises ValueError for any other type."""
    if dtype is None:
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        return torch.float16 if old and torch.version.hip is None else torch.bfloat16
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype {dtype!r}: use bfloat16, float16 or float32")
    return chosen


def reset_host_peak() -> bool:
    """Let the system count this process's peak of resident memory from now on; False where it cannot (proc(5))."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        return False
    return True


def host_peak() -> int:
    """Peak resident bytes of this process since `reset_host_peak`, files that it has mapped included."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def load_pipeline(
    model=None,
    text_encoder=None,
    vae=None,
    *,
    tokenizer=None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    precision: str = "auto",
    vram_budget: str | float | None = "auto",
    once: bool = False,
) -> Pipeline:
    """A pipeline over checked files; the models themselves are read when the first picture needs them.

    Without a model it draws with the bundled demo. vram_budget ("4GiB", or a number of GiB) limits what is on the
    device at once: what does not fit is streamed from the host, with the same results, and two models are never there
    together. "auto" is what is free there. None, for many pictures on a large GPU, is no limit: transformer and VAE
    stay there for the next one. once is for a pipeline that is called a single time: the transformer is dropped when it
    has drawn, before the VAE comes. Raises ValueError for missing files, a transformer that cannot be read and a
    device, dtype or budget that cannot be used.
    """
    files = find_files(model, text_encoder, vae, tokenizer)
    budget = planning.parse_budget(vram_budget)
    device = choose_device(device)
    return Pipeline(files, device, choose_dtype(dtype, device), backend, precision, budget, once)


class Pipeline:
    """Draws pictures from prompts; `plan`, `stages` and `seeds` tell about the last call."""

    def __init__(
        self,
        files: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        precision: str,
        vram_budget: int | str | None = "auto",
        once: bool = False,
    ):
        self.files = files
        self.device = device
        self.dtype = dtype
        self.backend = backend
        self.precision = precision
        self.vram_budget = vram_budget  # bytes, "auto" or None
        self.once = once
        self.used_backend: backends.Backend | None = None  # of the transformer, None for a dense one
        self.transformer: torch.nn.Module | None = None
        self.vae: torch.nn.Module | None = None
        self.plan: planning.Plan | None = None
        self.stages: list[Stage] = []
        self.seeds: list[int] | None = None
        self.loras: list[tuple[Lora, float]] = []
        paths = (files.model, files.text_encoder, files.vae)
        self._on_meta = MetaModels(paths, device, dtype, self._vae_dtype(), backend, precision)
        self._tokenizer = None
        self._prompts: OrderedDict[str, Tensor] = OrderedDict()  # prompt -> cap_feats (L, C) on the host
        self._remembered = 0
        self._on_stage: OnStage | None = None
        self._streamer: BlockStreamer | None = None
        self._graphs: Graphs | None = None
        self._too_much: dict[str, int] = {}  # model -> pixels from which memory ran out with blocks of it resident

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 0.0,
        negative_prompt: str | None = None,
        generator: Seeds = None,
        num_images_per_prompt: int = 1,
        image: Image.Image | None = None,
        strength: float = 1.0,
        on_stage: OnStage | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Pictures (PIL) of one prompt or several, `num_images_per_prompt` in a row for each.

        height, width: pixels, divisible by 16; left out, the image's own, else 1024 (128 for the bundled demo).
        generator: an int seed, with which picture i starts from the noise of seed + i, a seed for each picture, or a
        CPU torch.Generator; left out, a random seed. `seeds` holds what was used.
        guidance_scale g > 0 draws pos + g (pos - neg).
        image, strength: start from that picture, at 1 from noise alone; it is cropped to the size.
        on_stage(name, steps) before each stage; on_step(done, total, predicted latents), which stops the run early
        by returning False. Raises ValueError for sizes, counts and ranges that cannot be drawn.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_images_per_prompt < 1 or not prompts:
            raise ValueError(f"pictures: expected at least 1, found {num_images_per_prompt} of {len(prompts)} prompts")
        if guidance_scale < 0:
            raise ValueError(f"guidance: expected 0 or more, found {guidance_scale}; 0 is what the model was made for")
        height, width = self._size(height, width, image)
        sigmas = sampler.get_sigmas(num_inference_steps, start=strength if image is not None else 1.0)
        batch = len(prompts) * num_images_per_prompt
        latents = self._noise(generator, batch, height, width)

        guided = guidance_scale > 0
        texts = prompts + [negative_prompt or ""] * guided
        plan = functools.partial(self._make_plan, texts, len(prompts), guided, height, width, batch)
        self.plan = plan()
        logger.info(self.plan.table())
        self._on_stage = on_stage
        self.stages = []
        feats = self._with_less("text encoder", 0, plan, functools.partial(self._encode, texts))
        if image is not None:
            clean = self._encode_image(image, height, width)
            latents = (1 - sigmas[0]) * clean + sigmas[0] * latents

        captions = feats[: len(prompts)]
        if len(prompts) > 1:
            captions = [caption for caption in captions for _ in range(num_images_per_prompt)]

        def sample() -> Tensor:
            model = self._load_transformer()
            with self._stage("sample", len(sigmas) - 1):
                hooks = Hooks(run_block=self._streamer.run_block)
                cond = model.prepare(captions, height, width, hooks)
                negative = model.prepare(feats[-1:], height, width, hooks) if guided else None
                return self._denoise(latents, sigmas, cond, negative, guidance_scale, on_step, hooks)

        denoised = self._with_less("transformer", batch * height * width, plan, sample)
        if self.once:
            self.transformer = self._streamer = self._graphs = None
            self._empty_cache()
        return self._decode(denoised)

    def _denoise(
        self,
        latents: Tensor,
        sigmas: Tensor,
        cond: Conditioning,
        negative: Conditioning | None,
        guidance: float,
        on_step: OnStep | None,
        hooks: Hooks,
    ) -> Tensor:
        """Latents (B, 16, H/8, W/8) on the device after all steps."""
        model = functools.partial(self.transformer, hooks=hooks)
        if self.vram_budget is None and self._graphs.possible:  # graphs keep memory, and are lost with the model
            model = functools.partial(self._graphs.run, model)
        return sampler.denoise(
            model, latents.to(self.device), sigmas, cond, negative=negative, guidance=guidance, on_step=on_step
        )

    def _with_less(self, name: str, pixels: int, plan: Callable[[], planning.Plan], work: Callable[[], T]) -> T:
        """work(), and where memory runs out once more with every block of a model streamed, as the plan then says.

        So it stays for pictures of as many pixels.
        """
        try:
            return work()
        except RuntimeError as error:
            if not out_of_memory(error) or not self.plan.stage(name).resident:
                raise
        # Outside the handler: only now are the failed attempt's tensors free.
        logger.warning("out of memory in the %s; trying again with every block of it streamed", name)
        self._too_much[name] = pixels
        self._leave()
        self.plan = plan()
        logger.info(self.plan.table())
        return work()

    def hold_budget(self) -> None:
        """Have torch refuse this process more of the GPU than the budget, so that no mistake here can break it."""
        if isinstance(self.vram_budget, int) and self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.vram_budget / total), self.device)

    def set_loras(self, loras: Iterable[tuple[str | Path | Lora, float]]) -> None:
        """Draw with exactly these LoRAs from now on, (file or Lora, strength) each; the models are not read again.

        Raises ValueError for files that cannot be read; a LoRA that does not fit the models is told when drawing.
        """
        chosen = [(x if isinstance(x, Lora) else load_lora(x), float(s)) for x, s in loras]
        if any(found.text_encoder for found, _ in (*self.loras, *chosen)):
            self._prompts.clear()  # they were encoded under other weights
        self.loras = chosen

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, prompts: Iterable[str]) -> None:
        """Encode many prompts with one reading of the text encoder; calls with them do not need it again.

        They are remembered, a megabyte each, until the next `encode` or a change of LoRAs for the text encoder.
        """
        texts = list(dict.fromkeys(prompts))
        self._remembered = len(texts)
        plan = functools.partial(self._make_plan, texts, 1, False, PIXELS_MULTIPLE, PIXELS_MULTIPLE, 1)
        self.plan, self.stages, self._on_stage = plan(), [], None
        self._with_less("text encoder", 0, plan, functools.partial(self._encode, texts))

    def _size(self, height: int | None, width: int | None, image: Image.Image | None) -> tuple[int, int]:
        """The size to draw, in pixels."""
        if image is not None:
            own = tuple(side // PIXELS_MULTIPLE * PIXELS_MULTIPLE for side in (image.height, image.width))
        else:
            own = (DEMO_SIZE, DEMO_SIZE) if self.files.demo else (REAL_SIZE, REAL_SIZE)
        height = own[0] if height is None else height
        width = own[1] if width is None else width
        for name, side in (("height", height), ("width", width)):
            if side < PIXELS_MULTIPLE or side % PIXELS_MULTIPLE:
                below = max(side // PIXELS_MULTIPLE, 1) * PIXELS_MULTIPLE
                raise ValueError(
                    f"{name}: expected a multiple of {PIXELS_MULTIPLE} pixels, found {side}; the nearest are {below} "
                    f"and {below + PIXELS_MULTIPLE}"
                )
        return height, width

    def _noise(self, generator: Seeds, batch: int, height: int, width: int) -> Tensor:
        """Starting noise (B, 16, H/8, W/8) fp32 on the host; sets `seeds`."""
        if isinstance(generator, torch.Generator):
            if generator.device.type != "cpu":
                raise ValueError(f"generator: expected one on the cpu, found {generator.device}; give a seed instead")
            self.seeds = None
            return sampler.draw_noise(generator, batch, height, width)
        if isinstance(generator, Sequence):
            if len(generator) != batch:
                raise ValueError(f"seeds: expected {batch}, one for each picture, found {len(generator)}")
            seeds = [operator.index(seed) for seed in generator]
        else:
            first = secrets.randbelow(2**32) if generator is None else operator.index(generator)
            seeds = [first, *((first + i) % SEEDS for i in range(1, batch))]
        for seed in seeds:
            if not 0 <= seed < SEEDS:
                raise ValueError(f"seed: expected 0 to 2^64 - 1, found {seed}")
        self.seeds = seeds
        return torch.cat([sampler.draw_noise(seed, 1, height, width) for seed in seeds])

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        """cap_feats (L, C) of each prompt; reads the encoder only for prompts that are not remembered."""
        known = {text: self._prompts[text] for text in prompts if text in self._prompts}
        new = [text for text in dict.fromkeys(prompts) if text not in known]
        if new:
            with self._stage("load text encoder"):
                stage = self._make_room("text encoder")
                device = self.device if stage.resident == stage.blocks else "cpu"
                encoder = load_text_encoder(self.files.text_encoder, device=device, dtype=self.dtype)
                lora.apply(encoder, self.loras)
                streamer = BlockStreamer(encoder.layers)
                streamer.place(self.device, stage.allowance)
            with self._stage("encode prompt"):
                options = {"run_block": streamer.run_block, "device": self.device}
                feats = encode_prompts(encoder, self._tokenizer, new, **options)
                known.update(zip(new, (f.cpu() for f in feats)))
                del encoder, feats, streamer, options  # it leaves the device before sampling
                self._empty_cache()
        for text, caption in known.items():
            self._prompts[text] = caption
            self._prompts.move_to_end(text)
        while len(self._prompts) > max(CACHED_PROMPTS, self._remembered):
            self._prompts.popitem(last=False)
        return [known[text] for text in prompts]

    def _load_transformer(self) -> torch.nn.Module:
        """The transformer with its LoRAs, on the device as far as the plan allows."""
        stage = self._make_room("transformer")
        if self.transformer is None:
            with self._stage("load transformer"):
                self.transformer = model = checkpoint.load_transformer(
                    self.files.model,
                    device=self.device if stage.resident == stage.blocks else "cpu",
                    dtype=self.dtype,
                    backend=self.backend,
                    precision=self.precision,
                    compute_device=self.device,
                )
                self._streamer = BlockStreamer(model.blocks, model)
                self._graphs = Graphs(model, self._streamer)
                self.used_backend = model.backend
        lora.apply(self.transformer, self.loras)
        self._streamer.place(self.device, stage.allowance)
        return self.transformer

    def _load_vae(self) -> torch.nn.Module:
        """The VAE, on the device."""
        self._make_room("VAE")
        if self.vae is None:
            with self._stage("load VAE"):
                self.vae = load_vae(self.files.vae, device=self.device, dtype=self._vae_dtype())
        return self.vae.to(self.device)

    def _vae_dtype(self) -> torch.dtype:
        """fp32 on the CPU and wherever the rest is not bf16, never fp16."""
        half = self.device.type != "cpu" and self.dtype is torch.bfloat16
        return torch.bfloat16 if half else torch.float32

    def _encode_image(self, image: Image.Image, height: int, width: int) -> Tensor:
        """Scaled latents (1, 16, H/8, W/8) fp32 on the host of a picture, resized and cropped to the size."""
        import numpy
        from PIL import Image, ImageOps

        image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        model = self._load_vae()
        with self._stage("encode image"):
            return model.encode(pixels.to(self.device) / 127.5 - 1, self.plan.tiling).float().cpu()

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (B, 16, H/8, W/8)."""
        from PIL import Image

        model = self._load_vae()
        with self._stage("decode"):
            pixels = decode_image(model, latents, self.plan.tiling).mul(255).round().to("cpu", torch.uint8)
        return [Image.fromarray(picture) for picture in pixels.numpy()]

    def _make_plan(
        self, texts: list[str], positive: int, guided: bool, height: int, width: int, pictures: int
    ) -> planning.Plan:
        """What this call will take; ValueError where the budget cannot hold it. Reads headers, no weights."""
        tokens = self._count_tokens(texts)
        unknown = [count for text, count in zip(texts, tokens) if text not in self._prompts]
        request = planning.Request(
            height=height,
            width=width,
            pictures=pictures,
            captions=tokens[:positive] * (pictures // positive if positive > 1 else 1),
            negative=tokens[-1] if guided else None,
            encoded=max(unknown, default=0),
        )
        lora.apply(self._on_meta.transformer, self.loras)
        if unknown:
            lora.apply(self._on_meta.text_encoder, self.loras)
        budget = self._budget()
        limits = planning.Limits(
            budget=budget,
            libraries=libraries(self.device),
            streamed=[name for name, least in self._too_much.items() if pictures * height * width >= least],
            together=budget is None and not self.once,
            resident=self._held(),
        )
        models = self._on_meta
        encoder = models.text_encoder if unknown else None
        return planning.plan_pictures(request, limits, transformer=models.transformer, encoder=encoder, vae=models.vae)

    def _count_tokens(self, texts: list[str]) -> list[int]:
        """Caption tokens of each prompt."""
        if self._tokenizer is None and any(text not in self._prompts for text in texts):
            self._tokenizer = load_tokenizer(self.files.tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of long prompts, which encoding tells
            return [len(self._prompts[text] if text in self._prompts else self._tokenizer(text)) for text in texts]

    def _held(self) -> dict[str, int]:
        """Bytes of the models that are on the device now."""
        held = {}
        if self._streamer is not None and (used := self._streamer.used):
            held["transformer"] = used
        if self.vae is not None and next(self.vae.parameters()).device.type == self.device.type:
            held["VAE"] = module_bytes(self.vae)
        return held

    def _budget(self) -> int | None:
        """Bytes of the device that may be used; None for all of a CPU's."""
        if self.vram_budget != "auto":
            return self.vram_budget
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        ours = torch.cuda.memory_reserved(self.device)
        others = torch.cuda.memory_allocated(self.device) - sum(self._held().values())
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # torch 2.6 and later
            total *= torch.cuda.get_per_process_memory_fraction(self.device)
        return int(min(free + ours, total) - max(others, 0))

    def _make_room(self, name: str) -> planning.Stage:
        """Send to the host what may not be on the device during a stage; returns its plan."""
        stage = self.plan.stage(name)
        if self.plan.usable is not None:
            self._leave(name)
        return stage

    def _leave(self, name: str | None = None) -> None:
        """Send every model to the host but the named one."""
        if self._streamer is not None and name != "transformer":
            self._graphs.clear()
            self._streamer.leave()
        if self.vae is not None and name != "VAE":
            self.vae.to("cpu")
        self._empty_cache()

    def _empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _stage(self, name: str, steps: int = 1) -> Iterator[None]:
        """Announce a stage, and record what it took when it is done."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        counted = reset_host_peak()
        if self._on_stage:
            self._on_stage(name, steps)
        start = time.perf_counter()
        yield
        if on_cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) if on_cuda else None
        reserved = torch.cuda.max_memory_reserved(self.device) if on_cuda else None
        self.stages.append(Stage(name, seconds, peak, reserved, host_peak() if counted else None))
