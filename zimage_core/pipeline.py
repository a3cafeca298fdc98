"""From a prompt to pictures: what a call is given is checked, then the stages run in order.

prompt -> token ids -> cap_feats -> (encoder leaves) -> Conditioning -> latents -> (B, H, W, 3) -> pictures.
Which model is on the device when is left to `residents`.

Source of the interface: huggingface/diffusers `pipelines/z_image@v0.42.1`.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sampler
from .captions import Captions, read_captions, read_negative
from .control import Control, Given, check_controls, control_contexts, make_edit
from .demo import advice
from .device import choose_device, choose_dtype
from .failures import check_finite, number, one_of, within
from .files import find_files
from .job import (
    MAX_GUIDANCE,
    OUTPUTS,
    Job,
    LoraChoice,
    OnStep,
    Pictures,
    check_call,
    check_count,
    check_limit,
    check_tile,
    choose_noise,
    choose_sigmas,
    enlarged,
    enlarged_size,
    load_loras,
    own_size,
    picture_size,
    read_variety,
)
from .linear.backends import Backend, guard
from .lora.read import Loras
from .memory import plan as planning
from .models.guidance import Nag
from .models.tokenizer import MAX_TOKENS
from .models.transformer import ZImageTransformer
from .models.vae import decode_image
from .pictures import FEATHER, checked_picture, checked_pictures, composite, fit, to_tensor
from .recorder import OnStage, Recorder, StageRecord
from .residents import Residents
from .sampler import SAMPLERS
from .sizes import DEMO_SIZE, MULTIPLE, REAL_SIZE
from .sources import Sources
from .tune import select_attention
from .variety import Variety

if TYPE_CHECKING:
    import numpy
    from PIL import Image

STRENGTH, STEPS = 0.3, 5  # of enlarged pictures
TIMESTEPS = 1000  # of diffusers' schedule, sigma 1

logger = logging.getLogger(__name__)

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
    attention = select_attention(attention, device, dtype)
    return Pipeline(Sources(files, device, dtype, backend, precision, attention), budget, once)


class Pipeline:
    """Generates pictures from prompts.

    Threads may share a pipeline: its calls run one after the other, each with the LoRAs that it was given or that were
    set when it began, and each returns its own pictures, seeds and stages.
    """

    def __init__(self, sources: Sources, vram_budget: int | str | None = "auto", once: bool = False):
        self.sources = sources
        self.files, self.device, self.dtype = sources.files, sources.device, sources.dtype
        self.last: Pictures | None = None  # of the call that ended last
        self._loras: Loras = ()
        self._lock = threading.RLock()  # a callback may call the pipeline
        self._advised: set[str] = set()  # what was said already: thousands of rows may be of one size
        self._captions = Captions(self.files.tokenizer)
        self._residents = Residents(sources, vram_budget, once)

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
        return self._residents.transformer.model if self._residents.transformer else None

    @property
    def vram_budget(self) -> int | str | None:
        """Bytes of the device, "auto" or None; may be set between calls."""
        return self._residents.budget

    @vram_budget.setter
    def vram_budget(self, budget: int | str | None) -> None:
        self._residents.budget = budget

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
        upscale: float | None = None,
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
        picture is sampled in. max_sequence_length: tokens of a prompt. upscale: enlarge the pictures and redraw them,
        as the method of that name does; where the budget cannot hold that, nothing runs.
        output_type: pil, np (B, H, W, 3), pt (B, 3, H, W), both fp32 in 0..1, or latent, which is not decoded.
        on_stage(name, steps) before each stage; on_step(done, total, predicted latents), which stops the run early by
        returning False; callback_on_step_end(pipeline, i, timestep, {"latents": ...}) as diffusers calls it. Raises
        ValueError for sizes, counts and ranges that cannot be generated.
        """
        positive = read_captions("prompt", prompt, prompt_embeds)
        guidance = within("guidance", guidance_scale, 0, MAX_GUIDANCE, "0 is what the model was made for")
        nag = Nag(nag_scale, nag_tau, nag_alpha) if number("nag scale", nag_scale) else None
        guided = guidance > 0 or nag is not None
        negative = read_negative(len(positive), guided, negative_prompt, negative_prompt_embeds)
        images, mask = checked_pictures("image", image), checked_picture("mask", mask)
        own = own_size(images, latents, DEMO_SIZE if self.files.demo_like else REAL_SIZE)
        height, width = picture_size(height, width, own)
        count = check_count(len(positive), num_images_per_prompt, height, width, images)
        noise, seeds = choose_noise(generator, latents, count, height, width)
        callback = check_call("callback_on_step_end", callback_on_step_end)
        edit = None if mask is None else make_edit(images, mask, width, height, feather)
        shift = self.files.shift if shift is None else shift
        job = Job(
            positive,
            num_images_per_prompt,
            height,
            width,
            loras=self._loras if loras is None else load_loras(loras),
            record=Recorder(self.device, check_call("on_stage", on_stage)),
            noise=noise,
            seeds=seeds,
            images=images,
            negative=negative,
            guidance=guidance,
            nag=nag,
            variety=read_variety(variety),
            sampler=one_of("sampler", sampler, SAMPLERS),
            sigmas=choose_sigmas(
                num_inference_steps, sigmas, strength, bool(images), edit is not None, shift, schedule
            ),
            shift=shift,
            tile=check_tile(tile),
            limit=check_limit(max_sequence_length),
            controls=check_controls(control, masked=edit is not None),
            edit=edit,
            output=one_of("output_type", output_type, OUTPUTS),
            on_step=check_call("on_step", on_step),
            on_step_end=callback and functools.partial(self._step_end, callback),
        )
        larger = None
        if upscale is not None:
            larger = enlarged(job, upscale, choose_sigmas(STEPS, None, STRENGTH, True, False, shift, schedule))
        for one in filter(None, (job, larger)) if self.files.demo_like else ():
            for sentence in advice([text for text in positive if isinstance(text, str)], one.height, one.width):
                if sentence not in self._advised:
                    logger.warning(sentence)
                self._advised.add(sentence)
        if larger is None:
            return self._generate(job)
        with self._alone():
            self._prepare(larger)  # a ValueError where the budget cannot hold it
            return self._generate(replace(larger, images=self._generate(replace(job, output="pil"))))

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
        with self._alone():
            self._captions.wanted = len(texts)
            record = Recorder(self.device, on_stage)
            self._encode(Job(texts, 1, MULTIPLE, MULTIPLE, self._loras, record))

    def upscale(
        self, pictures: Sequence[Image.Image], prompt: str | Sequence[str], factor: float = 2.0, **options: Any
    ) -> Pictures:
        """Pictures enlarged by Lanczos and redrawn: a call with them as `image`, at strength 0.3 in 5 steps.

        options: of the call, seeds as those of pictures unless given. Sides above 2048 pixels are sampled in tiles of
        1024. ValueError for a factor outside 1 to 8, and as the call.
        """
        images = checked_pictures("upscale", list(pictures))
        if not images:
            raise ValueError("upscale: expected pictures, found none")
        height, width, tile = enlarged_size(*images[0].size, factor)
        count = len(images) // (1 if isinstance(prompt, str) else max(len(prompt), 1))
        defaults = {"strength": STRENGTH, "num_inference_steps": STEPS, "num_images_per_prompt": count, "tile": tile}
        defaults["generator"] = getattr(pictures, "seeds", None)
        return self(prompt, height, width, image=images, **{**defaults, **options})

    def plan(self, prompts: Sequence[str], height: int, width: int) -> planning.Plan:
        """What a call with these prompts, a picture each, would take of the device now.

        Nothing is loaded or generated. ValueError where the budget cannot hold it.
        """
        with self._alone():
            job = Job(list(prompts), 1, height, width, self._loras, Recorder(self.device, None))
            self._prepare(job)
            return job.plan

    def hold_budget(self) -> None:
        """Have torch refuse this process more of the GPU than the budget, so that no mistake here can break it."""
        if isinstance(self.vram_budget, int) and self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.vram_budget / total), self.device)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time, with the pipeline's GPU as the current one: not only kernels of ours expect that."""
        with self._lock, guard(self.device):
            yield

    def _generate(self, job: Job) -> Pictures:
        """The stages in their order."""
        with self._alone():
            self._encode(job)
            given = self._encode_pictures(job)
            found, backend = self._residents.attempt(job, "transformer", job.pixels, self._sample, given)
            self._residents.drop_transformer()
            pictures = found.cpu() if job.output == "latent" else self._decode(job, found)
            self.last = Pictures(pictures, job.seeds, job.record.stages, job.plan, backend)
            return self.last

    def _prepare(self, job: Job) -> None:
        """Plan a job, whose texts are tokenized unless their features are known."""
        self._captions.find(job)
        self._residents.plan(job)

    def _encode(self, job: Job) -> None:
        """Plan a job, and have the features of its texts."""
        self._prepare(job)
        if job.tokens:
            where = self._captions.tokenizer.where
            self._residents.attempt(job, "text encoder", 0, self._residents.encode, where)
        self._captions.keep(job)

    def _encode_pictures(self, job: Job) -> Given:
        """The latents that sampling begins with, from the pictures that a call was given."""
        if not job.images and not job.controls:
            return Given(job.noise)
        vae = self._residents.bring_vae(job)

        def encode(picture: Tensor) -> Tensor:
            latents = vae.encode(picture.to(self.device), job.plan.tiling).float().cpu()
            check_finite(latents, f"VAE ({self.files.vae}), encoding", "its file is damaged, download it again")
            return latents

        with job.record("encode image"):
            clean = [encode(to_tensor(fit(image, job.width, job.height))) for image in job.images]
            contexts = control_contexts(job.controls, job.edit, job.width, job.height, encode)
        return Given(job.noise, torch.cat(clean) if clean else None, contexts)

    def _sample(self, job: Job, given: Given) -> tuple[Tensor, Backend | None]:
        """Latents (B, 16, H/8, W/8) on the device after all steps, and the backend that ran them."""
        model = self._residents.bring_transformer(job)
        with job.record("sample", len(job.sigmas) - 1):
            # graphs keep memory, and are lost with the model
            steps, followed = model.followed(job, given, graphs=self.vram_budget is None)
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

    def _decode(self, job: Job, latents: Tensor) -> list[Image.Image] | numpy.ndarray | Tensor:
        """Pictures of scaled latents (B, 16, H/8, W/8), with what a mask keeps as it was, in the job's output type."""
        from PIL import Image

        vae = self._residents.bring_vae(job)
        with job.record("decode"):
            pixels = decode_image(vae, latents, job.plan.tiling)
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
