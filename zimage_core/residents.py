"""What is on the device when: the three models of a pipeline, read when needed, placed for their stage, sent away.

They are there one after the other, within a budget that the plan shares out before work starts; only with no limit at
all do they wait there for the next picture. `planning.Stage` says how much of a model may be there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .control import Control, Given
from .device import host_memory
from .failures import check_finite, out_of_memory
from .formats.encoder import check_width
from .job import Job
from .lora.apply import apply
from .lora.read import Loras
from .memory import plan as planning
from .memory.graphs import Graphs
from .memory.offload import BlockStreamer
from .memory.placement import module_bytes
from .memory.stages import libraries
from .models.controlnet import ControlNet, run_order
from .models.text_encoder import encode_tokens
from .models.transformer import PIXELS_PER_CELL, Conditioning, Hooks
from .models.vae import VAE
from .sampler import Model
from .sources import MetaModels, Sources

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _read_to(stage: planning.Stage, device: torch.device) -> torch.device:
    """Where a model's weights go when it is read: to the device only if all of them may be there."""
    return device if stage.resident == stage.blocks else torch.device("cpu")


class ResidentEncoder:
    """The text encoder; it is dropped rather than sent to the host."""

    def __init__(self, sources: Sources, stage: planning.Stage):
        self._path, self._device = sources.files.text_encoder, sources.device
        self._model = sources.text_encoder(_read_to(stage, self._device))
        self._streamer = BlockStreamer(list(self._model.layers))

    @property
    def on_device(self) -> int:
        """Bytes of it on the device."""
        return self._streamer.used

    def place(self, stage: planning.Stage, loras: Loras) -> None:
        """Have it with exactly these LoRAs, with as many layers on the device as the plan allows."""
        apply(self._model, loras)
        self._streamer.place(self._device, stage.allowance)

    def encode(self, tokens: Collection[list[int]], where: str) -> list[Tensor]:
        """Caption features (L, C) on the host of each prompt's token ids; where names the tokenizer in errors."""
        found = encode_tokens(self._model, tokens, where, run_block=self._streamer.run_block, device=self._device)
        for feats in found:
            remedy = "its file is damaged, or a LoRA changes it too much"
            check_finite(feats, f"text encoder ({self._path})", remedy)
        return [feats.cpu() for feats in found]


class ResidentTransformer:
    """The transformer, with the ControlNets beside it and CUDA graphs of its steps."""

    def __init__(self, sources: Sources, stage: planning.Stage):
        self._sources = sources
        self.model = sources.transformer(_read_to(stage, sources.device))
        self._nets: dict[Path, ControlNet] = {}
        self._assemble()

    def _assemble(self) -> None:
        nets = list(self._nets.values())
        self._streamer = BlockStreamer(run_order(self.model, nets), nn.ModuleList([self.model, *nets]))
        self._graphs = Graphs(self.model, self._streamer)
        self._hooks = Hooks(run_block=self._streamer.run_block)

    @property
    def on_device(self) -> int:
        """Bytes of it on the device."""
        return self._streamer.used

    def place(self, stage: planning.Stage, loras: Loras, controlnets: Collection[Path] = ()) -> None:
        """Have it with exactly these LoRAs and ControlNets, with as many blocks on the device as the plan allows."""
        apply(self.model, loras)
        if set(self._nets) != set(controlnets):
            self._graphs.clear()
            if self._streamer.host:  # what is streamed rests in this streamer's buffers
                self._streamer.leave()
            where = _read_to(stage, self._sources.device)
            self._nets = {
                path: self._nets.get(path) or self._sources.controlnet(path, where)
                for path in dict.fromkeys(controlnets)
            }
            self._assemble()
        self._streamer.place(self._sources.device, stage.allowance)

    def leave(self) -> None:
        """Send it to the host."""
        self._graphs.clear()
        self._streamer.leave()

    def followed(self, job: Job, given: Given, graphs: bool) -> tuple[Model, dict[str, Any]]:
        """The model that `sampler.denoise` calls, and the conditionings that it follows, by its arguments' names.

        graphs: replay CUDA graphs of steps where possible. Beside a ControlNet they are not: a graph does not know its
        control picture.
        """
        steps: Model = functools.partial(self.model, hooks=self._hooks)
        if graphs and not self._nets and self._graphs.possible:
            steps = functools.partial(self._graphs.run, steps)
        tiles, controls = job.tiles, list(zip(job.controls, given.contexts))
        size = PIXELS_PER_CELL * tiles.height, PIXELS_PER_CELL * tiles.width
        cond = self.model.prepare(job.features(job.positive), *size, self._hooks)
        negative = self.model.prepare(job.features(job.negative), *size, self._hooks) if job.negative else None
        early = self.model.prepare(job.varied(job.variety), *size, self._hooks) if job.variety else None

        if job.nag and negative:
            cond = self.model.guided(cond, negative, job.nag)
            early = early and self.model.guided(early, negative, job.nag)
        cond = self._controlled(cond, [(control, tiles.part(context, 0, 0)) for control, context in controls])
        numbers = {id(control): i for i, control in enumerate(cond.controls)}

        def place(found: Conditioning, top: int, left: int) -> Conditioning:
            working = [controls[numbers[id(one)]] for one in found.controls]
            own = [(control, tiles.part(context, top, left)) for control, context in working]
            return self._controlled(found, own) if own else found

        followed: dict[str, Any] = {"cond": cond}
        if negative and job.guidance:
            followed["negative"] = replace(negative, controls=cond.controls)
        if early and job.variety:
            followed["early"] = replace(early, controls=cond.controls), job.variety.until
        return (tiles.model(steps, place) if job.tile else steps), followed

    def _controlled(self, cond: Conditioning, controls: Iterable[tuple[Control, Tensor]]) -> Conditioning:
        """A conditioning with ControlNets, each with its control context."""
        prepared = (
            self._nets[Path(control.model)].prepare(
                context, self.model, cond, control.strength, control.start, control.end
            )
            for control, context in controls
        )
        return replace(cond, controls=tuple(prepared))


class ResidentVAE:
    """The VAE, whole on the device or on the host."""

    def __init__(self, sources: Sources):
        self._device = sources.device
        self.model = sources.vae(self._device)

    @property
    def on_device(self) -> int:
        """Bytes of it on the device."""
        there = next(self.model.parameters()).device.type == self._device.type
        return module_bytes(self.model) if there else 0

    def place(self) -> None:
        self.model.to(self._device)

    def leave(self) -> None:
        """Send it to the host."""
        self.model.to("cpu")


class Residents:
    """The models of a pipeline: planned within a budget, read and brought for their stage, and what leaves for it.

    once: a model is dropped before the next one comes. Every function takes the job that is under way.
    """

    def __init__(self, sources: Sources, budget: int | str | None, once: bool):
        self.budget = budget  # bytes, "auto" or None
        self._sources, self._once = sources, once
        self._on_meta = MetaModels(sources)
        self._encoder: ResidentEncoder | None = None
        self._transformer: ResidentTransformer | None = None
        self._vae: ResidentVAE | None = None
        self._too_much: dict[str, int] = {}  # model -> pixels from which it was out of memory with resident blocks

    @property
    def transformer(self) -> ResidentTransformer | None:
        """The transformer, once it has been read."""
        return self._transformer

    @property
    def _all_stay(self) -> bool:
        return self.budget is None and not self._once

    def plan(self, job: Job) -> None:
        """Plan what a job takes of the device; ValueError where the budget cannot hold it, or a LoRA does not fit."""
        transformer, encoder = self._on_meta.transformer, self._on_meta.text_encoder if job.tokens else None
        files, device = self._sources.files, self._sources.device
        for model in filter(None, (transformer, encoder)):
            apply(model, job.loras)
        if encoder is not None:
            check_width(encoder.config.hidden_size, transformer.config.cap_feat_dim, files.text_encoder, files.model)
        job.check_embeds(transformer.config.cap_feat_dim)
        budget = usable(self.budget, device, sum(self._held().values()))
        stays = ("transformer", "VAE") if budget is None and not self._once else ()
        limits = planning.Limits(
            budget=budget,
            host=host_memory(),
            on_host=device.type == "cpu",
            libraries=libraries(device),
            streamed=[name for name, least in self._too_much.items() if job.pixels >= least],
            stays=(*stays, "text encoder") if self._all_stay else stays,
            resident=self._held(),
        )
        job.plan = planning.plan_pictures(
            job.request(),
            limits,
            transformer=transformer,
            encoder=encoder,
            vae=self._on_meta.vae,
            controls=[self._on_meta.controlnet(path) for path in job.controlnets],
        )
        self._sources.remember(files.model, files.text_encoder, files.vae, *job.controlnets)
        logger.info(job.plan.table())

    def attempt(self, job: Job, name: str, pixels: int, work: Callable[..., T], *options: object) -> T:
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
        self.plan(job)
        return work(job, *options)

    def encode(self, job: Job, where: str) -> None:
        """Caption features of the job's tokens; the encoder leaves the device. where names the tokenizer in errors."""
        self._sources.check_unchanged(self._sources.files.text_encoder)  # on a CPU it stays mapped
        stage = self._clear_for(job, "text encoder")
        if self._encoder is None:
            with job.record("load text encoder"):
                self._encoder = ResidentEncoder(self._sources, stage)
        with job.record("encode prompt"):
            self._encoder.place(stage, job.loras)
            job.feats.update(zip(job.tokens, self._encoder.encode(job.tokens.values(), where)))
            if not self._all_stay:
                self._encoder = None
                self._empty_cache()

    def bring_transformer(self, job: Job) -> ResidentTransformer:
        """The transformer with the job's LoRAs and ControlNets, as far on the device as the plan says."""
        stage = self._clear_for(job, "transformer")
        self._sources.check_unchanged(*job.controlnets)
        if self._transformer is None:
            self._sources.check_unchanged(self._sources.files.model)
            with job.record("load transformer"):
                self._transformer = ResidentTransformer(self._sources, stage)
        self._transformer.place(stage, job.loras, job.controlnets)
        return self._transformer

    def drop_transformer(self) -> None:
        """Let the transformer go when it has done its part, if it is needed once."""
        if self._once:
            self._transformer = None
            self._empty_cache()

    def bring_vae(self, job: Job) -> VAE:
        """The VAE, on the device."""
        self._clear_for(job, "VAE")
        if self._vae is None:
            self._sources.check_unchanged(self._sources.files.vae)
            with job.record("load VAE"):
                self._vae = ResidentVAE(self._sources)
        self._vae.place()
        return self._vae.model

    def _clear_for(self, job: Job, name: str) -> planning.Stage:
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
        if self._sources.device.type == "cuda":
            torch.cuda.empty_cache()

    def _held(self) -> dict[str, int]:
        """Bytes of the models that are on the device now."""
        models = {"text encoder": self._encoder, "transformer": self._transformer, "VAE": self._vae}
        return {name: model.on_device for name, model in models.items() if model is not None and model.on_device}


def usable(budget: int | str | None, device: torch.device, held: int) -> int | None:
    """Bytes of a device that a budget lets be used, held ones among them; None for no limit.

    "auto" is what others leave free there, and all of a CPU's.
    """
    if not isinstance(budget, str):
        return budget
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    others = torch.cuda.memory_allocated(device) - held
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # torch 2.6 and later
        total = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + ours, total) - max(others, 0)
