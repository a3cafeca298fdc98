"""From a prompt to pictures: which files are read, when each model is on the device, and the order of the stages.

prompt -> token ids -> cap_feats -> (encoder leaves) -> Conditioning -> latents -> (B, H, W, 3) -> pictures.
The models come up one after the other; every stage's seconds and peak memory are kept in `Pipeline.stages`.

Source of the interface: huggingface/diffusers `pipelines/z_image@v0.42.1`.
"""

from __future__ import annotations

import contextlib
import operator
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checkpoint, lora, sampler
from .text_encoder import encode_prompts, find_tokenizer, load_text_encoder, load_tokenizer
from .vae import decode_image, load_vae

if TYPE_CHECKING:
    from PIL import Image

GIB = 2**30
PIXELS_MULTIPLE = 16
REAL_SIZE, DEMO_SIZE = 1024, 128  # pixels, where no size is asked for
CACHED_PROMPTS = 32
SEEDS = 2**64
DECODE_VALUES_PER_PIXEL = 768  # held at once by the VAE's decoder; see AUTO_PIXELS there

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
    """What one stage took: seconds, and peak bytes on the device and in the process so far (None where unknown)."""

    name: str
    seconds: float
    device_peak: int | None
    host_peak: int | None


def find_files(model=None, text_encoder=None, vae=None, tokenizer=None) -> ModelFiles:
    """The four files of a pipeline, all there; no model at all means the bundled demo.

    `model` may be a whole diffusers folder, whose parts are then the defaults. The tokenizer is looked for beside
    the encoder unless named. Raises ValueError for a part that is not named or not there.
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
    """The named device, else the first CUDA (or ROCm) device, else the CPU. Raises ValueError if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is no torch device; use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "`zimage doctor` tells more, --device cpu works anywhere"
        )
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


def host_peak() -> int | None:
    """Peak resident bytes of this process, None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    return None


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
) -> Pipeline:
    """A pipeline over checked files; the models themselves are read when the first picture needs them.

    Without a model it draws with the bundled demo. Raises ValueError for missing files, a transformer that cannot be
    read and a device or dtype that cannot be used.
    """
    files = find_files(model, text_encoder, vae, tokenizer)
    checkpoint.identify(files.model)
    device = choose_device(device)
    return Pipeline(files, device, choose_dtype(dtype, device), backend, precision)


class Pipeline:
    """Draws pictures from prompts; `stages` and `seeds` tell about the last call."""

    def __init__(self, files: ModelFiles, device: torch.device, dtype: torch.dtype, backend: str, precision: str):
        self.files = files
        self.device = device
        self.dtype = dtype
        self.backend = backend
        self.precision = precision
        self.transformer: torch.nn.Module | None = None
        self.vae: torch.nn.Module | None = None
        self.stages: list[Stage] = []
        self.seeds: list[int] | None = None
        self.loras: list[tuple[lora.Lora, float]] = []
        self._tokenizer = None
        self._prompts: OrderedDict[str, Tensor] = OrderedDict()  # prompt -> cap_feats (L, C) on the host
        self._on_stage: OnStage | None = None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 0.0,
        negative_prompt: str | None = None,
        generator: torch.Generator | int | None = None,
        num_images_per_prompt: int = 1,
        image: Image.Image | None = None,
        strength: float = 1.0,
        on_stage: OnStage | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Pictures (PIL) of one prompt or several, `num_images_per_prompt` in a row for each.

        height, width: pixels, divisible by 16; left out, the image's own, else 1024 (128 for the bundled demo).
        generator: an int seed, with which picture i starts from the noise of seed + i, or a CPU torch.Generator;
        left out, a random seed. `seeds` holds what was used. guidance_scale g > 0 draws pos + g (pos - neg).
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

        self._on_stage = on_stage
        self.stages = []
        guided = guidance_scale > 0
        feats = self._encode(prompts + [negative_prompt or ""] * guided)
        if image is not None:
            clean = self._encode_image(image, height, width)
            latents = (1 - sigmas[0]) * clean + sigmas[0] * latents

        model = self._load_transformer()
        with self._stage("sample", len(sigmas) - 1):
            captions = feats[: len(prompts)]
            if len(prompts) > 1:
                captions = [caption for caption in captions for _ in range(num_images_per_prompt)]
            cond = model.prepare(captions, height, width)
            negative = model.prepare(feats[-1:], height, width) if guided else None
            latents = latents.to(self.device)
            latents = sampler.denoise(
                model, latents, sigmas, cond, negative=negative, guidance=guidance_scale, on_step=on_step
            )
        return self._decode(latents)

    def set_loras(self, loras: Iterable[tuple[str | Path | lora.Lora, float]]) -> None:
        """Draw with exactly these LoRAs from now on, (file or Lora, strength) each; the models are not read again.

        Raises ValueError for files that cannot be read; a LoRA that does not fit the models is told when drawing.
        """
        chosen = [(x if isinstance(x, lora.Lora) else lora.load_lora(x), float(s)) for x, s in loras]
        if any(found.text_encoder for found, _ in (*self.loras, *chosen)):
            self._prompts.clear()  # they were encoded under other weights
        self.loras = chosen

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

    def _noise(self, generator: torch.Generator | int | None, batch: int, height: int, width: int) -> Tensor:
        """Starting noise (B, 16, H/8, W/8) fp32 on the host; sets `seeds`."""
        if isinstance(generator, torch.Generator):
            if generator.device.type != "cpu":
                raise ValueError(f"generator: expected one on the cpu, found {generator.device}; give a seed instead")
            self.seeds = None
            return sampler.draw_noise(generator, batch, height, width)
        first = secrets.randbelow(2**32) if generator is None else operator.index(generator)
        if not 0 <= first < SEEDS:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, found {first}")
        self.seeds = [(first + i) % SEEDS for i in range(batch)]
        return torch.cat([sampler.draw_noise(seed, 1, height, width) for seed in self.seeds])

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        """cap_feats (L, C) of each prompt; reads the encoder only for prompts that are not remembered."""
        known = {text: self._prompts[text] for text in prompts if text in self._prompts}
        new = [text for text in dict.fromkeys(prompts) if text not in known]
        if new:
            with self._stage("load text encoder"):
                self._make_room(_file_bytes(self.files.text_encoder) + GIB)
                if self._tokenizer is None:
                    self._tokenizer = load_tokenizer(self.files.tokenizer)
                encoder = load_text_encoder(self.files.text_encoder, device=self.device, dtype=self.dtype)
                lora.apply(encoder, self.loras)
            with self._stage("encode prompt"):
                feats = encode_prompts(encoder, self._tokenizer, new)
                known.update(zip(new, (f.cpu() for f in feats)))
                del encoder, feats  # it leaves the device before sampling
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        for text, caption in known.items():
            self._prompts[text] = caption
            self._prompts.move_to_end(text)
        while len(self._prompts) > CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return [known[text] for text in prompts]

    def _load_transformer(self) -> torch.nn.Module:
        """The transformer, on the device."""
        if self.transformer is None:
            with self._stage("load transformer"):
                self.transformer = checkpoint.load_transformer(
                    self.files.model,
                    device=self.device,
                    dtype=self.dtype,
                    backend=self.backend,
                    precision=self.precision,
                )
        self.transformer.to(self.device)
        lora.apply(self.transformer, self.loras)
        return self.transformer

    def _load_vae(self) -> torch.nn.Module:
        """The VAE, on the device: fp32 on the CPU and wherever the rest is not bf16, never fp16."""
        if self.vae is None:
            half = self.device.type != "cpu" and self.dtype is torch.bfloat16
            with self._stage("load VAE"):
                dtype = torch.bfloat16 if half else torch.float32
                self.vae = load_vae(self.files.vae, device=self.device, dtype=dtype)
        return self.vae

    def _encode_image(self, image: Image.Image, height: int, width: int) -> Tensor:
        """Scaled latents (1, 16, H/8, W/8) fp32 on the host of a picture, resized and cropped to the size."""
        import numpy
        from PIL import Image, ImageOps

        image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        model = self._load_vae()
        with self._stage("encode image"):
            return model.encode(pixels.to(self.device) / 127.5 - 1).float().cpu()

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (B, 16, H/8, W/8)."""
        from PIL import Image

        model = self._load_vae()
        with self._stage("decode"):
            height, width = (8 * side for side in latents.shape[-2:])
            self._make_room(height * width * DECODE_VALUES_PER_PIXEL * next(model.parameters()).element_size())
            pixels = decode_image(model, latents).mul(255).round().to("cpu", torch.uint8)
        return [Image.fromarray(picture) for picture in pixels.numpy()]

    def _make_room(self, needed: int) -> None:
        """Send the transformer to host memory if the device has less than `needed` bytes free."""
        if self.device.type != "cuda" or self.transformer is None:
            return
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if torch.cuda.mem_get_info(self.device)[0] + unused < needed:
            self.transformer.to("cpu")
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _stage(self, name: str, steps: int = 1) -> Iterator[None]:
        """Announce a stage, and record what it took when it is done."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        if self._on_stage:
            self._on_stage(name, steps)
        start = time.perf_counter()
        yield
        if on_cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        device_peak = torch.cuda.max_memory_allocated(self.device) if on_cuda else None
        self.stages.append(Stage(name, seconds, device_peak, host_peak()))


def _file_bytes(path: Path) -> int:
    """Bytes of a safetensors file, or of all those of a folder."""
    return sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))
