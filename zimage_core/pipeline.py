"""From a prompt to pictures: which files are read, when each model is on the device, and the order of the stages.

prompt -> token ids -> cap_feats -> (encoder leaves) -> Conditioning -> latents -> (B, H, W, 3) -> pictures.
The models are on the device one after the other, within a budget that the plan shares out before work starts; only
with no limit at all do they wait there for the next picture.

Source of the interface: huggingface/diffusers `pipelines/z_image@v0.42.1`.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import sampler
from .control import Control, Given, check_controls, control_contexts, make_edit
from .demo import advice
from .device import choose_device, choose_dtype, host_memory
from .failures import check_finite, out_of_memory
from .files import ModelFiles, find_files
from .formats.encoder import check_width
from .formats.safetensors import stamp
from .job import (
    PIXELS_MULTIPLE,
    Job,
    LoraChoice,
    OnStep,
    Pictures,
    check_count,
    check_limit,
    check_output,
    check_sampler,
    check_tile,
    choose_noise,
    choose_sigmas,
    encoder_loras,
    load_loras,
    number,
    own_size,
    picture_size,
    read_captions,
    read_negative,
    read_variety,
)
from .linear.backends import Backend
from .lora.apply import apply
from .memory import plan as planning
from .memory.stages import MetaModels, libraries
from .models.guidance import Nag
from .models.tokenizer import MAX_TOKENS, Tokenizer, load_tokenizer
from .models.transformer import PIXELS_PER_CELL, Conditioning, ZImageTransformer
from .models.vae import decode_image
from .pictures import FEATHER, checked_picture, checked_pictures, composite, fit, to_tensor
from .recorder import OnStage, Recorder, StageRecord
from .residents import Loras, ResidentEncoder, ResidentTransformer, ResidentVAE
from .sizes import DEMO_SIZE, REAL_SIZE
from .tune import select_attention
from .variety import Variety

if TYPE_CHECKING:
    import numpy
    from PIL import Image

CACHED_PROMPTS = 32
MAX_GUIDANCE = 100
MAX_UPSCALE, LARGEST_WHOLE, TILE = 8, 2048, 1024
"""Of `upscale`: the factor; pixels of an edge up to which a picture is sampled whole, and of its tiles beyond."""
TIMESTEPS = 1000  # of diffusers' schedule, sigma 1

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnStepEnd = Callable[["Pipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""diffusers' callback: pipeline, number of the step, timestep, tensors -> those that it changes."""


def load_pipeline(
    model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    precision: str = "auto",
    attention: str = "sdpa",
    vram_budget: str | float | None = "auto",
    once: bool = False,
) -> Pipeline:
    """A pipeline over checked files; the models themselves are read when the first picture needs them.

    Without a model it is the bundled demo. vram_budget ("4GiB", or a number of GiB) limits what is on the device at
    once: what does not fit is streamed from the host, with the same results, and two models are never there together.
    "auto" is what is free there. None, for many pictures on a large GPU, is no limit: all models stay there for the
    next one. attention: "int8" for comfy-kitchen's in 8 bits, "auto" for it where it is faster here. once is for a
    pipeline that is called a single time: a model is dropped before the next one comes. Raises ValueError for missing
    files, a transformer that cannot be read, and a device, dtype, attention or budget that cannot be used.
    """
    files = find_files(model, text_encoder, vae, tokenizer)
    budget = planning.parse_budget(vram_budget)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    return Pipeline(files, device, dtype, backend, precision, budget, once, select_attention(attention, device, dtype))


class Pipeline:
    """Generates pictures from prompts.

    Threads may share a pipeline: its calls run one after the other, each with the LoRAs that it was given or that were
    set when it began, and each returns its own pictures, seeds and stages.
    """

    def __init__(
        self,
        files: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        precision: str,
        vram_budget: int | str | None = "auto",
        once: bool = False,
        attention: str = "sdpa",
    ):
        self.files = files
        self.device = device
        self.dtype = dtype
        self.backend = backend
        self.precision = precision
        self.attention = attention  # "sdpa" or "int8"
        self.vram_budget = vram_budget  # bytes, "auto" or None
        self.once = once
        self.last: Pictures | None = None  # of the call that ended last
        self._loras: Loras = ()
        self._lock = threading.RLock()  # a callback may call the pipeline
        paths = (files.model, files.text_encoder, files.vae)
        self._on_meta = MetaModels(paths, device, dtype, self._vae_dtype, backend, precision, attention)
        self._encoder: ResidentEncoder | None = None
        self._transformer: ResidentTransformer | None = None
        self._vae: ResidentVAE | None = None
        self._captions: OrderedDict[str, Tensor] = OrderedDict()  # prompt -> cap_feats (L, C) on the host
        self._captions_made_by: tuple[Loras, int] = ((), MAX_TOKENS)  # the text encoder's LoRAs, the limit of tokens
        self._remembered = 0  # prompts of the last `encode`
        self._stamps: dict[Path, tuple[object, ...]] = {}  # of the files that were planned with
        self._too_much: dict[str, int] = {}  # model -> pixels from which memory ran out with blocks of it resident

    @property
    def stages(self) -> list[StageRecord]:
        """What each stage of the last call took."""
        return self.last.stages if self.last else []

    @property
    def seeds(self) -> list[int] | None:
        """The seeds of the last call."""
        return self.last.seeds if self.last else None

    @property
    def transformer(self) -> ZImageTransformer | None:
        """The transformer, once it has been read."""
        return self._transformer.model if self._transformer else None

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.files.tokenizer)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        generator: sampler.Seeds = None,
        num_images_per_prompt: int = 1,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float = 1.0,
        mask: Image.Image | None = None,
        feather: int = FEATHER,
        control: Control | Sequence[Control] | None = None,
        loras: LoraChoice | None = None,
        on_stage: OnStage | None = None,
        on_step: OnStep | None = None,
        *,
        sigmas: Iterable[float] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        output_type: str = "pil",
        callback_on_step_end: OnStepEnd | None = None,
        max_sequence_length: int = MAX_TOKENS,
        sampler: str = "euler",
        schedule: str = "even",
        shift: float | None = None,
        nag_scale: float = 0.0,
        nag_tau: float = Nag.tau,
        nag_alpha: float = Nag.alpha,
        variety: float | Variety = 0.0,
        tile: int | None = None,
    ) -> Pictures:
        """Pictures (PIL) of one prompt or several, `num_images_per_prompt` in a row for each.

        height, width: pixels, divisible by 16; left out, the image's or the latents', else 1024 (256 for the demo).
        generator: an int seed, with which picture i starts from the noise of seed + i, a CPU torch.Generator, or a list
        of either, one for each picture; left out, a random seed. latents (B, 16, H/8, W/8): the noise, instead.
        guidance_scale g > 0: pos + g (pos - neg), neg being one negative prompt or one for each; diffusers' form,
        ComfyUI's cfg is g + 1; 0 is for Turbo, 4 for Z-Image. prompt_embeds, negative_prompt_embeds: features (L, C)
        instead of texts. sigmas: instead of num_inference_steps, before the shift and without the last 0. image,
        strength: start from that picture, or from one for each, at 1 from noise alone; it is cropped to the size. mask:
        repaint only what is white in it, with an edge of `feather` pixels outside of it; all else stays as it is in
        `image`. control: one ControlNet or several. loras: those of this call, else those of `set_loras`. sampler,
        schedule: of `sampler.SAMPLERS`, of "even" and `sampler.SCHEDULES`; shift: of the sigmas, else the model's own.
        nag_scale s > 0: attention follows pos + s (pos - neg), with its norm limited to nag_tau times that of pos,
        mixed with pos by nag_alpha. variety: how much more seeds differ. tile: edge in pixels of tiles that a larger
        picture is sampled in. max_sequence_length: tokens of a prompt.
        output_type: pil, np (B, H, W, 3), pt (B, 3, H, W), both fp32 in 0..1, or latent, which is not decoded.
        on_stage(name, steps) before each stage; on_step(done, total, predicted latents), which stops the run early by
        returning False; callback_on_step_end(pipeline, i, timestep, {"latents": ...}) as diffusers calls it. Raises
        ValueError for sizes, counts and ranges that cannot be generated.
        """
        positive = read_captions("prompt", prompt, prompt_embeds)
        if not 0 <= number("guidance", guidance_scale) <= MAX_GUIDANCE:
            raise ValueError(
                f"guidance: expected 0 to {MAX_GUIDANCE}, found {guidance_scale}; 0 is what the model was made for"
            )
        nag = Nag(nag_scale, nag_tau, nag_alpha) if nag_scale else None
        guided = guidance_scale > 0 or nag is not None
        negative = read_negative(len(positive), guided, negative_prompt, negative_prompt_embeds)
        images, mask = checked_pictures("image", image), checked_picture("mask", mask)
        height, width = picture_size(
            height, width, own_size(images, latents, DEMO_SIZE if self.files.demo_like else REAL_SIZE)
        )
        count = check_count(len(positive), num_images_per_prompt, height, width, images)
        noise, seeds = choose_noise(generator, latents, count, height, width)
        edit = None if mask is None else make_edit(images, mask, width, height, feather)
        shift = self.files.shift if shift is None else shift
        controls = (control,) if isinstance(control, Control) else tuple(control or ())
        chosen = None if loras is None else load_loras(loras)
        asked: dict[str, Any] = {
            "guidance": guidance_scale,
            "nag": nag,
            "variety": read_variety(variety),
            "sampler": check_sampler(sampler),
            "sigmas": choose_sigmas(
                num_inference_steps, sigmas, strength, bool(images), edit is not None, shift, schedule
            ),
            "shift": shift,
            "tile": check_tile(tile),
            "limit": check_limit(max_sequence_length),
            "controls": check_controls(controls, masked=edit is not None),
            "output": check_output(output_type),
            "on_step": on_step,
            "on_step_end": callback_on_step_end and functools.partial(self._step_end, callback_on_step_end),
        }
        if self.files.demo_like:
            for sentence in advice([one for one in positive if isinstance(one, str)], height, width):
                logger.warning(sentence)

        with self._lock:
            used = self._loras if chosen is None else chosen
            record = Recorder(self.device, on_stage)
            job = Job(positive, num_images_per_prompt, height, width, used, record, negative, edit=edit, **asked)
            self._begin(job)
            given = self._encode_pictures(job, images, noise)
            found, backend = self._attempt(job, "transformer", job.pictures * height * width, self._sample, given)
            if self.once:
                self._transformer = None
                self._empty_cache()
            pictures = found.cpu() if output_type == "latent" else self._decode(job, found)
            self.last = Pictures(pictures, seeds, job.record.stages, job.plan, backend)
            return self.last

    def _step_end(self, callback: OnStepEnd, i: int, sigma: Tensor, latents: Tensor) -> Tensor:
        """The latents after step i, as diffusers' callback leaves them."""
        return (callback(self, i, TIMESTEPS * sigma, {"latents": latents}) or {}).get("latents", latents)

    def set_loras(self, loras: LoraChoice) -> None:
        """Generate with exactly these LoRAs from now on, (file or Lora, strength) each; the models are not read again.

        A call that is running keeps its own. Raises ValueError for files that cannot be read; a LoRA that does not fit
        the models is refused by the call.
        """
        self._loras = load_loras(loras)

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, prompts: Iterable[str], on_stage: OnStage | None = None) -> None:
        """Encode many prompts with one reading of the text encoder; calls with them do not need it again.

        They are remembered, a megabyte each, until the next `encode` or a call with other LoRAs for the text encoder.
        """
        texts = list(dict.fromkeys(prompts))
        with self._lock:
            self._remembered = len(texts)
            record = Recorder(self.device, on_stage)
            self._begin(Job(texts, 1, PIXELS_MULTIPLE, PIXELS_MULTIPLE, self._loras, record))

    def upscale(
        self, pictures: Sequence[Image.Image], prompt: str | Sequence[str], factor: float = 2.0, **options: Any
    ) -> Pictures:
        """Pictures enlarged by Lanczos and redrawn: a call with them as `image`, at strength 0.3 in 5 steps.

        options: of the call, seeds as those of pictures unless given. Sides above 2048 pixels are sampled in tiles of
        1024. ValueError for a factor outside 1 to 8, and as the call.
        """
        if not 1 <= number("upscale", factor) <= MAX_UPSCALE or not pictures:
            raise ValueError(f"upscale: expected pictures and 1 to {MAX_UPSCALE}, found {len(pictures)} and {factor}")
        width, height = (round(side * factor / PIXELS_MULTIPLE) * PIXELS_MULTIPLE for side in pictures[0].size)
        defaults = {"strength": 0.3, "num_inference_steps": 5, "generator": getattr(pictures, "seeds", None)}
        defaults["num_images_per_prompt"] = len(pictures) // (1 if isinstance(prompt, str) else len(prompt))
        defaults["tile"] = TILE if max(width, height) > LARGEST_WHOLE else None
        return self(prompt, height, width, image=list(pictures), **{**defaults, **options})

    def plan(self, prompts: Sequence[str], height: int, width: int) -> planning.Plan:
        """What a call with these prompts, a picture each, would take of the device now.

        Nothing is loaded or generated. ValueError where the budget cannot hold it.
        """
        with self._lock:
            job = Job(list(prompts), 1, height, width, self._loras, Recorder(self.device, None))
            self._prepare(job)
            return job.plan

    def hold_budget(self) -> None:
        """Have torch refuse this process more of the GPU than the budget, so that no mistake here can break it."""
        if isinstance(self.vram_budget, int) and self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.vram_budget / total), self.device)

    @property
    def _keeps_encoder(self) -> bool:
        return self.vram_budget is None and not self.once

    @property
    def _vae_dtype(self) -> torch.dtype:
        """fp32 on the CPU and wherever the rest is not bf16, never fp16."""
        half = self.device.type != "cpu" and self.dtype is torch.bfloat16
        return torch.bfloat16 if half else torch.float32

    def _begin(self, job: Job) -> None:
        """Plan a job, and encode those of its texts that are not remembered."""
        self._prepare(job)
        self._attempt(job, "text encoder", 0, self._encode)

    def _prepare(self, job: Job) -> None:
        """Plan a job, after finding its texts among those that are remembered or their tokens."""
        if (made_by := (encoder_loras(job.loras), job.limit)) != self._captions_made_by:
            self._captions.clear()
            self._captions_made_by = made_by
        for text in job.texts:
            if text in self._captions:
                job.feats[text] = self._captions[text]
            elif text not in job.tokens:
                job.tokens[text] = self._tokenizer(text, job.limit)
        self._plan(job)

    def _plan(self, job: Job) -> None:
        """Plan what a job takes of the device; ValueError where the budget cannot hold it, or a LoRA does not fit."""
        transformer, encoder = self._on_meta.transformer, self._on_meta.text_encoder if job.tokens else None
        for model in filter(None, (transformer, encoder)):
            apply(model, job.loras)
        if encoder is not None:
            files = self.files
            check_width(encoder.config.hidden_size, transformer.config.cap_feat_dim, files.text_encoder, files.model)
        job.check_embeds(transformer.config.cap_feat_dim)
        budget, pixels = self._budget(), job.pictures * job.height * job.width
        stays = ("transformer", "VAE") if budget is None and not self.once else ()
        limits = planning.Limits(
            budget=budget,
            host=host_memory(),
            on_host=self.device.type == "cpu",
            libraries=libraries(self.device),
            streamed=[name for name, least in self._too_much.items() if pixels >= least],
            stays=(*stays, "text encoder") if self._keeps_encoder else stays,
            resident=self._held(),
        )
        job.plan = planning.plan_pictures(
            job.request(),
            limits,
            transformer=transformer,
            encoder=encoder,
            vae=self._on_meta.vae,
            controls=[self._on_meta.controlnet(control.model) for control in job.controls],
        )
        for path in (self.files.model, self.files.text_encoder, self.files.vae, *(Path(c.model) for c in job.controls)):
            self._stamps.setdefault(path, stamp(path))
        logger.info(job.plan.table())

    def _check_unchanged(self, *paths: str | Path) -> None:
        """ValueError where a file that is to be read is another one than was planned with."""
        for path in map(Path, paths):
            if stamp(path) != self._stamps[path]:
                raise ValueError(f"{path}: changed since its header was read; wait until it is whole, and load it anew")

    def _attempt(self, job: Job, name: str, pixels: int, work: Callable[..., T], *options: object) -> T:
        """Run work(job, *options); after an out-of-memory error retry once with every block of a model streamed.

        From then on that model is streamed for as many pixels.
        """
        try:
            return work(job, *options)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or not job.plan.stage(name).resident:
                raise
        # Outside the handler: only now are the failed attempt's tensors free.
        logger.warning("out of memory in the %s; trying again with every block of it streamed", name)
        self._too_much[name] = pixels
        self._leave()
        self._plan(job)
        return work(job, *options)

    def _encode(self, job: Job) -> None:
        """Fill in the features of the texts that are not remembered."""
        if job.tokens:
            self._check_unchanged(self.files.text_encoder)  # on a CPU it stays mapped
            stage = self._make_room(job, "text encoder")
            if self._encoder is None:
                with job.record("load text encoder"):
                    self._encoder = ResidentEncoder(self.files.text_encoder, stage, self.device, self.dtype)
            with job.record("encode prompt"):
                self._encoder.place(stage, job.loras)
                job.feats.update(zip(job.tokens, self._encoder.encode(job.tokens.values(), self._tokenizer.where)))
                if not self._keeps_encoder:  # it leaves the device before sampling
                    self._encoder = None
                    self._empty_cache()
        for text in job.texts:
            self._captions[text] = job.feats[text]
            self._captions.move_to_end(text)
        while len(self._captions) > max(CACHED_PROMPTS, self._remembered):
            self._captions.popitem(last=False)

    def _encode_pictures(self, job: Job, images: Sequence[Image.Image], noise: Tensor) -> Given:
        """The latents that sampling begins with, from the pictures that a call was given."""
        if not images and not job.controls:
            return Given(noise)
        vae = self._load_vae(job)

        def encode(picture: Tensor) -> Tensor:
            latents = vae.model.encode(picture.to(self.device), job.plan.tiling).float().cpu()
            check_finite(latents, f"VAE ({self.files.vae}), encoding", "its file is damaged, download it again")
            return latents

        with job.record("encode image"):
            clean = [encode(to_tensor(fit(image, job.width, job.height))) for image in images]
            contexts = control_contexts(job.controls, job.edit, job.width, job.height, encode)
        return Given(noise, torch.cat(clean) if clean else None, contexts)

    def _sample(self, job: Job, given: Given) -> tuple[Tensor, Backend | None]:
        """Latents (B, 16, H/8, W/8) on the device after all steps, and the backend that ran them."""
        stage = self._make_room(job, "transformer")
        self._check_unchanged(*(control.model for control in job.controls))
        if self._transformer is None:
            self._check_unchanged(self.files.model)
            with job.record("load transformer"):
                self._transformer = ResidentTransformer(
                    self.files.model, stage, self.device, self.dtype, self.backend, self.precision, self.attention
                )
        model = self._transformer
        model.place(stage, job.loras, [Path(control.model) for control in job.controls])
        with job.record("sample", len(job.sigmas) - 1):
            steps = model.steps(graphs=self.vram_budget is None)  # graphs keep memory, and are lost with the model
            steps, followed = self._followed(job, given, model, steps)
            latents = sampler.denoise(
                steps,
                given.start(job.sigmas[0]).to(self.device),
                job.sigmas,
                **followed,
                guidance=job.guidance,
                sampler=job.sampler,
                shift=job.shift,
                on_step=job.on_step,
                on_step_end=job.on_step_end,
                hold=given.hold(job.edit, self.device),
            )
        remedy = "a damaged model file, a LoRA or its strength, or --dtype float16 can cause this"
        check_finite(latents, f"transformer ({self.files.model}), denoising", remedy)
        return latents, model.model.backend

    def _followed(
        self, job: Job, given: Given, model: ResidentTransformer, steps: sampler.Model
    ) -> tuple[sampler.Model, dict[str, Any]]:
        """The conditionings that `sampler.denoise` follows, by its arguments' names, and the model that it calls."""
        tiles, controls = job.tiles, list(zip(job.controls, given.contexts))
        size = PIXELS_PER_CELL * tiles.height, PIXELS_PER_CELL * tiles.width
        cond = model.prepare(job.features(job.positive), *size)
        negative = model.prepare(job.features(job.negative), *size) if job.negative else None
        early = model.prepare(job.varied(job.variety, given.noise), *size) if job.variety else None

        if job.nag and negative:
            cond = model.model.guided(cond, negative, job.nag)
            early = early and model.model.guided(early, negative, job.nag)
        cond = model.controlled(cond, [(control, tiles.part(context, 0, 0)) for control, context in controls])
        numbers = {id(control): i for i, control in enumerate(cond.controls)}

        def place(found: Conditioning, top: int, left: int) -> Conditioning:
            working = [controls[numbers[id(one)]] for one in found.controls]
            own = [(control, tiles.part(context, top, left)) for control, context in working]
            return model.controlled(found, own) if own else found

        followed: dict[str, Any] = {"cond": cond}
        if negative and job.guidance:
            followed["negative"] = replace(negative, controls=cond.controls)
        if early and job.variety:
            followed["early"] = replace(early, controls=cond.controls), job.variety.until
        return (tiles.model(steps, place) if job.tile else steps), followed

    def _decode(self, job: Job, latents: Tensor) -> list[Image.Image] | numpy.ndarray | Tensor:
        """Pictures of scaled latents (B, 16, H/8, W/8), with what a mask keeps as it was, in the job's output type."""
        from PIL import Image

        vae = self._load_vae(job)
        with job.record("decode"):
            pixels = decode_image(vae.model, latents, job.plan.tiling)
            if job.output == "pil" or job.edit:
                pixels = pixels.mul_(255).round_().to("cpu", torch.uint8)
            pixels = pixels.cpu()
        if pixels.dtype == torch.uint8:
            pictures = [Image.fromarray(picture) for picture in pixels.numpy()]
            if job.edit:
                pictures = [composite(picture, job.edit.source, job.edit.soft) for picture in pictures]
            if job.output == "pil":
                return pictures
            pixels = torch.cat([to_tensor(picture) for picture in pictures]).add_(1).div_(2).permute(0, 2, 3, 1)
        return pixels.numpy() if job.output == "np" else pixels.permute(0, 3, 1, 2)

    def _load_vae(self, job: Job) -> ResidentVAE:
        """The VAE, on the device."""
        self._make_room(job, "VAE")
        if self._vae is None:
            self._check_unchanged(self.files.vae)
            with job.record("load VAE"):
                self._vae = ResidentVAE(self.files.vae, self.device, self._vae_dtype)
        self._vae.place()
        return self._vae

    def _make_room(self, job: Job, name: str) -> planning.Stage:
        """Send to the host what may not be on the device during a stage; returns its plan."""
        if job.plan.usable is not None:
            self._leave(name)
        return job.plan.stage(name)

    def _leave(self, name: str | None = None) -> None:
        """Send every model to the host but the named one."""
        if name != "text encoder":
            self._encoder = None
        if self._transformer is not None and name != "transformer":
            self._transformer.leave()
        if self._vae is not None and name != "VAE":
            self._vae.leave()
        self._empty_cache()

    def _empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _held(self) -> dict[str, int]:
        """Bytes of the models that are on the device now."""
        models = {"text encoder": self._encoder, "transformer": self._transformer, "VAE": self._vae}
        return {name: model.on_device for name, model in models.items() if model is not None and model.on_device}

    def _budget(self) -> int | None:
        """Bytes of the device that may be used; None for all of a CPU's."""
        if not isinstance(self.vram_budget, str):
            return self.vram_budget
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        ours = torch.cuda.memory_reserved(self.device)
        others = torch.cuda.memory_allocated(self.device) - sum(self._held().values())
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # torch 2.6 and later
            total = int(total * torch.cuda.get_per_process_memory_fraction(self.device))
        return min(free + ours, total) - max(others, 0)
