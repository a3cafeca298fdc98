"""BF16 ControlNet to an SVDQuant INT4 file of the transformers' conventions, plain or calibrated.

Every linear of a block goes into 4 bits, before_proj and after_proj too; embedder, norms and modulation stay in bf16.
Calibrated, a base that is loaded whole generates pictures beside the dense ControlNet, whose blocks are read one at a
time and quantized for their actual inputs, as `calibrate` does it with a transformer's.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import __version__
from ..formats.controlnet import REFINERS, ControlNetInfo, build_controlnet, control_info, match_controlnet
from ..formats.load import Sources, load_transformer
from ..formats.names import CONTROL, diffusers_svdq_module
from ..formats.safetensors import TensorFiles, open_tensors
from ..linear.svdq import SVDQWeights
from ..models.config import ControlNetConfig, ZImageConfig
from ..models.controlnet import ControlBlock, ControlNet
from ..models.transformer import Block, Conditioning, Hooks, ZImageTransformer
from ..sampler import predict_flow
from ..whole import check_target
from . import calibrate
from .run import Job, noted_samples
from .solver import svdq_from_dense
from .source import check_numbers, digest, files_digest
from .writer import StreamedFile, check_apart, check_packable, four_bits, header_of

Progress = Callable[[int, int, str], None]


def quantize_controlnet(
    src: str | Path,
    dst: str | Path,
    *,
    rank: int,
    base: str | Path | None = None,
    cap_feats: Sequence[Tensor] = (),
    contexts: Sequence[Tensor] = (),
    size: int = 512,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> None:
    """Write `dst`, a SVDQ INT4 file, from `src`, a dense ControlNet.

    rank: a multiple of 16. base: a transformer of any format to calibrate with; without one, from the weights alone.
    cap_feats: features (L, C) of the prompts, and contexts: a control context (C, size / 8, size / 8) for each, see
    `models.controlnet.control_context`. progress(done, total, what) after each linear. `dst` is replaced at the end,
    and an interrupted calibrated run is resumed by the same call, as `quantize_checkpoint`.
    ValueError if the source is no dense ControlNet or holds NaN, or does not fit the base.
    """
    dst, device = Path(dst), torch.device(device)
    check_target(dst)
    if base is not None and not len(cap_feats) == len(contexts) > 0:
        raise ValueError(f"calibration: expected a control context a prompt, found {len(contexts)}, {len(cap_feats)}")
    with open_tensors(src) as files:
        info = control_info(files)
        if info.format != "dense":
            raise ValueError(f"{src}: expected a BF16 ControlNet, found {info.format}; quantize its BF16 original")
        check_apart(dst, files)
        check_packable(info.config.base, rank)
        sources = match_controlnet(files, info, build_controlnet(info))
        header = header_of(build_controlnet(replace(info, rank=rank, quantized_refiners=True)), _stored)
        made: dict[str, object] = {"tool": "zimage-int4", "version": __version__, "method": "svd"}
        notes = None
        made["source"] = digest(sources.stored, lambda stored: files.get(stored.key))
        if base is not None:
            seen = hashlib.sha256(b"".join(x.float().cpu().numpy().tobytes() for x in (*cap_feats, *contexts)))
            made |= {"method": "smooth, svd, gptq; block by block", "prompts": len(cap_feats), "size": size}
            made["captions"] = seen.hexdigest()[:16]
            with open_tensors(base) as whole:
                made["base"] = files_digest(whole)
            notes = calibrate.planned_samples(info.config.base, len(cap_feats), size)
        metadata = _metadata(info.config, rank) | {"quantized_by": json.dumps(made)}
        with StreamedFile(dst, header, metadata, notes) as out, torch.inference_mode():
            job = _Job(files, sources, info, out, rank, device, progress)
            job.run(base, cap_feats, contexts, size)


def controlnet_config(config: ControlNetConfig) -> dict[str, object]:
    """The configuration as diffusers writes it, with the sizes of the base that no tensor shows."""
    base = config.base
    return {
        "_class_name": "ZImageControlNetModel",
        "dim": base.dim,
        "n_heads": base.n_heads,
        "n_kv_heads": base.n_heads,
        "n_layers": base.n_layers,
        "n_refiner_layers": base.n_refiner_layers,
        "axes_dims": list(base.axes_dims),
        "norm_eps": base.norm_eps,
        "qk_norm": True,
        "control_in_dim": config.channels,
        "control_layers_places": list(config.places),
        "control_refiner_layers_places": list(range(base.n_refiner_layers)),
        "add_control_noise_refiner": next(name for name, kind in REFINERS.items() if kind == config.refiner),
    }


def _metadata(config: ControlNetConfig, rank: int) -> dict[str, str]:
    return {
        "model_class": "ZImageControlNetModel",
        "quantization_config": four_bits(rank),
        "config": json.dumps(controlnet_config(config), indent=2),
    }


def _stored(module: str) -> str:
    """The name that a module of the ControlNet has in a file."""
    return CONTROL + diffusers_svdq_module(module)


def _linears(block: nn.Module) -> list[str]:
    """A block's linears, in the order of its forward pass."""
    control = isinstance(block, ControlBlock)
    first = ["before_proj"] if control and block.before_proj is not None else []
    return [*first, *ZImageConfig().linears, *["after_proj"] * control]


class _Beside:
    """A base with a dense ControlNet beside it whose blocks stay in the file; `calibrate` takes it for a `Streamed`."""

    def __init__(
        self,
        base: ZImageTransformer,
        net: ControlNet,
        fetch: Callable[[str], Tensor],
        contexts: Tensor,
        on_step: Callable[[], None],
    ):
        self.model, self.device, self.visit = base, base.device, None
        self._net, self._fetch, self._contexts, self._on_step = net, fetch, contexts, on_step
        self._seen: list[str] = []
        self._load(net.x_embedder, "x_embedder.")
        self.hooks = Hooks(run_block=self.run_block)

    def run_block(self, stage: str, index: int, block: nn.Module, x: Tensor, *args: object) -> Any:
        """Run one block over x (S, L, D) in chunks; one of the ControlNet's after the visitor, if there is one."""
        chunks = calibrate.chunked(x, args)
        if not stage.startswith(CONTROL):
            return torch.cat([block(*chunk) for chunk in chunks])
        name, block = f"{stage.removeprefix(CONTROL)}.{index}", copy.deepcopy(block)
        self._load(block, name + ".")
        self._seen.append(name)
        if self.visit and self._seen.count(name) == self._passes(stage):
            self.visit(name, block, chunks)
        results = [block(*chunk) for chunk in chunks]
        if isinstance(results[0], tuple):
            return tuple(map(torch.cat, zip(*results)))
        return torch.cat(results)

    def _passes(self, stage: str) -> int:
        """How often a block runs in a step: its last run has all the tokens."""
        return 2 if self._net.config.refiner == "layers" and stage.endswith("layers") else 1

    def prepare(self, cap_feats: Sequence[Tensor], height: int, width: int) -> Conditioning:
        """`ZImageTransformer.prepare`, with the control contexts."""
        cond = self.model.prepare(cap_feats, height, width, self.hooks)
        return replace(cond, controls=(self._net.prepare(self._contexts, self.model, cond),))

    def predict_flow(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """`sampler.predict_flow`, in which every block passes `run_block`."""
        self._seen.clear()
        if not self.visit:
            self._on_step()
        return predict_flow(partial(self.model, hooks=self.hooks), latents, sigma, cond)

    def _load(self, module: nn.Module, prefix: str) -> None:
        dtype = self.model.dtype
        state = {
            name: self._fetch(prefix + name).to(self.device, dtype).reshape(meta.shape)
            for name, meta in module.named_parameters()
        }
        module.load_state_dict(state, assign=True)


class _Job(Job):
    """Quantizes one ControlNet into one file."""

    LINEAR_COST = 1

    def __init__(
        self,
        files: TensorFiles,
        sources: Sources,
        info: ControlNetInfo,
        out: StreamedFile,
        rank: int,
        device: torch.device,
        progress: Progress | None,
    ):
        super().__init__(out, rank, device, progress, _stored, str)
        self.files, self.sources = files, sources
        with torch.device("meta"):
            self.net = ControlNet(info.config, linear=calibrate.TappedLinear)
        stacks = (("noise_refiner", self.net.noise_refiner), ("layers", self.net.layers))
        self.linears = [
            f"{stack}.{i}.{linear}" for stack, blocks in stacks for i, b in enumerate(blocks) for linear in _linears(b)
        ]
        self.total = len(self.linears)

    def get(self, name: str) -> Tensor:
        """A tensor on the device. ValueError if it holds NaN or too large numbers."""
        tensor = self.sources.get(name, self.device)
        check_numbers(tensor, f"{self.files.path}: {name}", "get an undamaged file")
        return tensor

    def run(self, base: str | Path | None, cap_feats: Sequence[Tensor], contexts: Sequence[Tensor], size: int) -> None:
        """Write every tensor of the file."""
        quantized = set(self.linears)
        for name in self.sources.stored:
            module, _, leaf = name.rpartition(".")
            if module not in quantized:
                stored = f"{_stored(module)}.{leaf}"
                self.out.write(stored, self.get(name).to(torch.bfloat16).reshape(self.out.header[stored][1]))
        if base is None:
            for linear in self.linears:
                self.write(linear, svdq_from_dense(self.get(f"{linear}.weight"), self.rank))
            return
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model = load_transformer(base, device=self.device, dtype=dtype, precision="w4a16")
        self.net.check(model)
        self.total += calibrate.STEPS
        if self.out.finished:
            self.done += calibrate.STEPS
        beside = _Beside(model, self.net, self.get, torch.stack(list(contexts)), partial(self.advance, 1, "a step"))
        streamed = cast(calibrate.Streamed, beside)
        samples = noted_samples(self.out, streamed, cap_feats, size)
        calibrate.visit_blocks(streamed, cap_feats, samples, self._visit)

    def _visit(self, name: str, block: Block, chunks: list[calibrate.Chunk]) -> None:
        self.visit(name, block, chunks, _linears(block))

    def write(self, linear: str, weights: SVDQWeights) -> None:
        if f"{linear}.bias" in self.sources.stored:
            weights = replace(weights, bias=self.get(f"{linear}.bias").to(weights.wscales))
        super().write(linear, weights)
