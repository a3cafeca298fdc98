"""Which model is on the device when: each is read when its stage first needs it, placed for it, and sent away after it.

Text encoder, transformer and VAE take turns on the device, within a budget that a plan divides before work starts. Only
without any limit do they stay there for the next picture. `planning.Stage` says how much of a model may be there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from .control import Control, Given
from .device import host_memory
from .failures import check_finite, out_of_memory
from .formats.encoder import check_width
from .job import Job
from .lora.apply import apply
from .memory import plan as planning
from .memory.graphs import Graphs
from .memory.meta import META
from .memory.offload import BlockStreamer
from .memory.stages import libraries
from .models.controlnet import ControlNet, run_order
from .models.text_encoder import TextEncoder, encode_tokens
from .models.transformer import PIXELS_PER_CELL, Conditioning, Hooks, ZImageTransformer
from .models.vae import VAE
from .sampler import Model
from .sources import Sources

logger = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
R = TypeVar("R", bound="Resident")


class Resident(Generic[M]):
    """A model, and the streamer that brings as much of it to the device as a plan allows, or sends it to the host."""

    def __init__(self, model: M, streamer: BlockStreamer):
        self.model, self.streamer = model, streamer

    def leave(self) -> None:
        """Send it to the host."""
        self.streamer.leave()


class ResidentTransformer(Resident[ZImageTransformer]):
    """The transformer, with the ControlNets beside it and CUDA graphs of its steps."""

    def __init__(self, model: ZImageTransformer):
        super().__init__(model, self._assemble(model, {}))

    def _assemble(self, model: ZImageTransformer, nets: dict[Path, ControlNet]) -> BlockStreamer:
        found = list(nets.values())
        streamer = BlockStreamer(run_order(model, found), nn.ModuleList([model, *found]))
        self._nets, self._graphs, self._hooks = nets, Graphs(model, streamer), Hooks(run_block=streamer.run_block)
        return streamer

    def set_controlnets(self, files: Collection[Path], read: Callable[[Path], ControlNet]) -> None:
        """Use exactly the ControlNets of these files; those that are not loaded yet are read."""
        if set(self._nets) == set(files):
            return
        self._graphs.clear()
        if self.streamer.host:  # what is streamed rests in this streamer's buffers
            self.streamer.leave()
        nets = {path: self._nets.get(path) or read(path) for path in dict.fromkeys(files)}
        self.streamer = self._assemble(self.model, nets)

    def leave(self) -> None:
        self._graphs.clear()
        super().leave()

    def followed(self, job: Job, given: Given, graphs: bool) -> tuple[Model, dict[str, Any]]:
        """The model and the conditionings for `sampler.denoise`, the latter as its keyword arguments.

        graphs: replay steps as CUDA graphs where possible. It is not possible beside a ControlNet, as a graph would
        replay the control picture that it was captured with.
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


class Residents:
    """The models of a pipeline: plans their memory, brings each to the device for its stage, and sends the others away.

    once: drop each model before the next one is loaded. Every function takes the job that is running.
    """

    def __init__(self, sources: Sources, budget: int | str | None, once: bool):
        self.budget = budget  # bytes, "auto" or None
        self._sources, self._once = sources, once
        self._known: dict[tuple[object, ...], nn.Module] = {}  # the models as their headers have them
        self._there: dict[str, Resident] = {}  # by the name of their stage
        self._too_much: dict[str, int] = {}  # model -> pixels at which it ran out of memory with blocks resident

    @property
    def transformer(self) -> ResidentTransformer | None:
        """The transformer, once it has been read."""
        return cast("ResidentTransformer | None", self._there.get("transformer"))

    @property
    def _all_stay(self) -> bool:
        return self.budget is None and not self._once

    def plan(self, job: Job) -> None:
        """Plan a job's use of the device. ValueError if the budget cannot hold it, or a LoRA does not fit a model."""
        sources, device, files = self._sources, self._sources.device, self._sources.files
        transformer = self._on_meta(sources.transformer)
        encoder = self._on_meta(sources.text_encoder) if job.tokens else None
        for model in filter(None, (transformer, encoder)):
            apply(model, job.loras)
        if encoder is not None:
            check_width(encoder.config.hidden_size, transformer.config.cap_feat_dim, files.text_encoder, files.model)
        job.check_embeds(transformer.config.cap_feat_dim)
        controls = [self._on_meta(sources.controlnet, path) for path in job.controlnets]
        for control in controls:
            control.check(transformer)
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
            vae=self._on_meta(sources.vae),
            controls=controls,
        )
        sources.remember(files.model, files.text_encoder, files.vae, *job.controlnets)
        logger.info(job.plan.table())

    def _on_meta(self, read: Callable[..., M], *paths: Path) -> M:
        """A model on the meta device, read once from its file's header. Errors are the loader's."""
        if (key := (read.__name__, *paths)) not in self._known:
            self._known[key] = read(*paths, META)
        return cast(M, self._known[key])

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
        """Encode the job's tokens into its features, and free the encoder. where: the tokenizer's name in errors."""
        source, device = self._sources.files.text_encoder, self._sources.device
        self._sources.check_unchanged(source)  # on a CPU it stays mapped

        def read(place: torch.device) -> Resident[TextEncoder]:
            model = self._sources.text_encoder(place)
            return Resident(model, BlockStreamer(list(model.layers)))

        encoder = self._bring(job, "text encoder", source, read)
        with job.record("encode prompt"):
            apply(encoder.model, job.loras)
            run_block = self._place(job, "text encoder", encoder).run_block
            found = encode_tokens(encoder.model, job.tokens.values(), where, run_block=run_block, device=device)
            for feats in found:
                check_finite(feats, f"text encoder ({source})", "its file is damaged, or a LoRA changes it too much")
            job.feats.update(zip(job.tokens, (feats.cpu() for feats in found)))
            if not self._all_stay:
                self._drop("text encoder")

    def bring_transformer(self, job: Job) -> ResidentTransformer:
        """The transformer with the job's LoRAs and ControlNets, as far on the device as the plan says."""
        sources = self._sources
        sources.check_unchanged(*job.controlnets)

        def read(place: torch.device) -> ResidentTransformer:
            return ResidentTransformer(sources.transformer(place))

        found = self._bring(job, "transformer", sources.files.model, read)
        apply(found.model, job.loras)
        found.set_controlnets(job.controlnets, lambda path: sources.controlnet(path, self._where(job, "transformer")))
        self._place(job, "transformer", found)
        return found

    def drop_transformer(self) -> None:
        """Free the transformer after its stage, if each model is needed only once."""
        if self._once:
            self._drop("transformer")

    def bring_vae(self, job: Job) -> VAE:
        """The VAE, on the device."""

        def read(place: torch.device) -> Resident[VAE]:
            model = self._sources.vae(place)
            return Resident(model, BlockStreamer((), model))

        found = self._bring(job, "VAE", self._sources.files.vae, read)
        self._place(job, "VAE", found)
        return found.model

    def _bring(self, job: Job, name: str, source: Path, read: Callable[[torch.device], R]) -> R:
        """The model of a stage, read if it is not loaded. Models that may not be beside it are sent to the host."""
        if job.plan.usable is not None:
            self._leave(name)
        if name not in self._there:
            self._sources.check_unchanged(source)
            with job.record(f"load {name}"):
                self._there[name] = read(self._where(job, name))
        return cast(R, self._there[name])

    def _where(self, job: Job, name: str) -> torch.device:
        """Where a model is read to: the device if all of it may be there, else the host."""
        stage = job.plan.stage(name)
        return self._sources.device if stage.resident == stage.blocks else torch.device("cpu")

    def _place(self, job: Job, name: str, resident: Resident) -> BlockStreamer:
        """Put as many of its blocks on the device as the plan allows; returns what streams the others."""
        resident.streamer.place(self._sources.device, job.plan.stage(name).allowance)
        return resident.streamer

    def _leave(self, name: str | None = None) -> None:
        """Send every model to the host but the named one; the text encoder is dropped instead."""
        if name != "text encoder":
            self._there.pop("text encoder", None)
        for other, resident in self._there.items():
            if other != name:
                resident.leave()
        self._empty_cache()

    def _drop(self, name: str) -> None:
        self._there.pop(name, None)
        self._empty_cache()

    def _empty_cache(self) -> None:
        if self._sources.device.type == "cuda":
            torch.cuda.empty_cache()

    def _held(self) -> dict[str, int]:
        """Bytes of the models that are on the device now."""
        held = {name: resident.streamer.used for name, resident in self._there.items()}
        return {name: count for name, count in held.items() if count}


def usable(budget: int | str | None, device: torch.device, held: int) -> int | None:
    """Bytes of the device that a budget allows, including those held by our models now; None for no limit.

    "auto" allows all that other programs leave free on a GPU, and sets no limit on a CPU.
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
