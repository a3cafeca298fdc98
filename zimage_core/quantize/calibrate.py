"""Calibrated quantization of a whole transformer on latents of its own, block by block.

The dense model first generates pictures of the calibration prompts, with one block in memory at a time, and keeps
some of the noisy latents. These then pass through the model once more, all together: each block is read, its four
linears are quantized one after the other for their actual inputs, which earlier linears, already quantized, produce,
and the quantized block's output goes to the next block. So later blocks can compensate for the errors of earlier ones,
and neither the model nor its activations are in memory as a whole.

Legend: S samples, a sample being one picture's latents at one sigma; P prompts.
Source: SVDQuant (arXiv 2411.05007) for calibration along the denoising steps; block-wise streaming as in GPTQ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.config import ZImageConfig
from ..models.transformer import PIXELS_PER_CELL, Block, Conditioning, Hooks, ZImageTransformer
from ..sampler import draw_noise, get_sigmas, predict_flow
from .solver import InputStats

STEPS = 8
CHUNK_TOKENS = 8192  # that a block runs at a time
BLOCK_LISTS = ("context_refiner", "noise_refiner", "layers")  # in the order of the forward pass

PROMPTS = (
    "A close-up portrait of an old fisherman with a grey beard and a yellow raincoat, rain on his face, harbour "
    "lights blurred behind him, 85mm film",
    "A wooden table by a window with a bowl of ripe peaches, a linen cloth, a glass of water and long morning shadows, "
    "painted in oil in the manner of a Dutch still life",
    'A neon sign that reads "OPEN LATE" above a small ramen shop in a wet alley at night, steam from the door, two '
    "people under one umbrella",
    "A wide aerial view of terraced rice fields at sunrise, mist in the valley, a narrow road with one red bus",
    "一位穿着红色汉服的年轻女子站在雪中的古庙前，手里提着灯笼，背景是远山和飘落的雪花，电影感光线",
    "A cutaway diagram of a lighthouse with labelled rooms, spiral stairs and a lamp, clean ink lines on cream paper",
    "A fluffy ginger cat asleep on a stack of old books beside a green desk lamp, dust in the light, very detailed fur",
    "An astronaut repairing a small greenhouse on Mars, orange dust storm on the horizon, photorealistic, wide lens",
    "A crowded street market in Marrakesh with spices in baskets, hanging lamps and a boy with a blue bicycle",
    'A minimalist poster with the words "Slow Down" in large black letters over a single orange circle on white',
    "A pencil sketch of a horse galloping along a beach, loose lines, waves only hinted at, rough paper texture",
    "黄昏时分的上海外滩，江面倒映着霓虹灯光，前景是一辆老式自行车，长曝光摄影，画面上方写着“夜上海”",
    "A glass bottle ship model on a mantelpiece, macro photograph, tiny ropes and sails, warm fire in the glass",
    "A low-poly 3D render of a tiny island with a pine forest, a waterfall, a wooden bridge and one white tent",
    "Two chess players in a smoky 1930s cafe, black and white photograph, hard side light, hands and faces in focus",
    "A watercolour of a heron standing in reeds at dawn, pale pink sky, ripples around its legs, lots of white paper",
)
"""Faces, hands, lettering in two languages, textures, wide views and drawings."""

Chunk = tuple  # a block's arguments, (x, cos, sin, mask, t_emb, attention), for some of the samples
Visit = Callable[[str, Block, list[Chunk]], None]  # takes a block's name, the block and its inputs


@dataclass(frozen=True)
class Samples:
    """Noisy latents of several steps, each with its sigma and the index of its prompt."""

    latents: Tensor  # (S, 16, H/8, W/8)
    sigmas: Tensor  # (S,)
    prompts: Tensor  # (S,) int64


class Tapped(Exception):
    """Ends a block's run at a tapped linear, whose inputs it holds."""

    def __init__(self, inputs: Tensor):
        super().__init__()
        self.inputs = inputs


class TappedLinear(nn.Linear):
    """A linear that raises `Tapped` with its inputs while it is tapped."""

    tapped = False

    def forward(self, x: Tensor) -> Tensor:
        if self.tapped:
            raise Tapped(x)
        return F.linear(x, self.weight, self.bias)


def chunked(x: Tensor, args: Sequence[object]) -> list[Chunk]:
    """A block's arguments, x (S, L, D) and others of which some have S rows, a part of the samples at a time."""
    size = max(CHUNK_TOKENS // x.shape[1], 1)
    return [
        tuple(t[i : i + size] if isinstance(t, Tensor) and len(t) == len(x) else t for t in (x, *args))
        for i in range(0, len(x), size)
    ]


class Streamed:
    """The dense model with its blocks left in the checkpoint: each is read before it runs and freed afterwards."""

    def __init__(
        self,
        config: ZImageConfig,
        fetch: Callable[[str], Tensor],
        device: torch.device,
        dtype: torch.dtype,
        on_block: Callable[[], None],
    ):
        """`fetch` returns a tensor by the model's name for it; on_block is called after each block without visitor."""
        self.fetch, self.device, self.dtype, self.on_block = fetch, device, dtype, on_block
        self.visit: Visit | None = None
        with torch.device("meta"):
            self.model = ZImageTransformer(config, linear=TappedLinear)
        for name, module in self.model.named_children():
            if name not in BLOCK_LISTS:
                self._load(module, name + ".")
        for name, token in list(self.model.named_parameters(recurse=False)):
            setattr(self.model, name, nn.Parameter(self._fetch(name, token), requires_grad=False))
        self.hooks = Hooks(run_block=self.run_block)

    def run_block(self, stage: str, index: int, block: Block, x: Tensor, *args: object) -> Tensor:
        """Run one block over x (S, L, D) in chunks, after the visitor if there is one."""
        name, block = f"{stage}.{index}", copy.deepcopy(block)
        self._load(block, name + ".")
        chunks = chunked(x, args)
        if self.visit:
            self.visit(name, block, chunks)
        x = torch.cat([block(*chunk) for chunk in chunks])
        if not self.visit:
            self.on_block()
        return x

    def prepare(self, cap_feats: Sequence[Tensor], height: int, width: int) -> Conditioning:
        """`ZImageTransformer.prepare`, streamed."""
        return self.model.prepare(cap_feats, height, width, self.hooks)

    def predict_flow(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """`sampler.predict_flow`, streamed."""
        return predict_flow(partial(self.model, hooks=self.hooks), latents, sigma, cond)

    def _load(self, module: nn.Module, prefix: str) -> None:
        state = {name: self._fetch(prefix + name, meta) for name, meta in module.named_parameters()}
        module.load_state_dict(state, assign=True)

    def _fetch(self, name: str, meta: Tensor) -> Tensor:
        return self.fetch(name).to(self.device, self.dtype).reshape(meta.shape)


def blocks_run(config: ZImageConfig) -> int:
    """The number of blocks that `generate_samples` runs; the context refiner's run once."""
    return STEPS * (config.n_refiner_layers + config.n_layers) + config.n_refiner_layers


def planned_samples(config: ZImageConfig, prompts: int, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The fields that `generate_samples` returns for so many prompts: name -> (safetensors dtype, shape)."""
    count, cells = STEPS // 2 * prompts, size // PIXELS_PER_CELL
    shape = (count, config.in_channels, cells, cells)
    return {"latents": ("F32", shape), "sigmas": ("F32", (count,)), "prompts": ("I64", (count,))}


def generate_samples(streamed: Streamed, cap_feats: Sequence[Tensor], size: int) -> Samples:
    """Generate a picture of size x size pixels for each caption (L, C); returns its latents at every second step.

    Even steps of even prompts, odd ones of odd prompts, so that all sigmas occur.
    """
    prompts = torch.arange(len(cap_feats))
    latents = draw_noise(0, len(prompts), size, size, streamed.model.config.in_channels).to(streamed.device)
    sigmas = get_sigmas(STEPS).to(streamed.device)
    cond = streamed.prepare(cap_feats, size, size)
    kept = []
    for step in range(STEPS):
        chosen = prompts[prompts % 2 == step % 2]
        kept.append(Samples(latents[chosen], sigmas[step].expand(len(chosen)), chosen))
        flow = streamed.predict_flow(latents, sigmas[step], cond)
        latents = latents + (sigmas[step + 1] - sigmas[step]) * flow
    return Samples(*(torch.cat([getattr(part, field.name) for part in kept]) for field in fields(Samples)))


def visit_blocks(streamed: Streamed, cap_feats: Sequence[Tensor], samples: Samples, visit: Visit) -> None:
    """Run the samples through the model; visit(name, block, chunks) may change each block before it runs."""
    streamed.visit = visit
    height, width = (PIXELS_PER_CELL * cells for cells in samples.latents.shape[2:])
    cond = streamed.prepare(cap_feats, height, width)
    chosen = samples.prompts.to(streamed.device)
    parts = {name: getattr(cond, name) for name in ("context", "cos", "sin", "mask")}
    controls = tuple(replace(control, tokens=control.tokens[chosen]) for control in cond.controls)
    parts = {name: t if t is None or len(t) == 1 else t[chosen] for name, t in parts.items()}
    cond = replace(cond, controls=controls, **parts)
    streamed.predict_flow(samples.latents.to(streamed.device), samples.sigmas.to(streamed.device), cond)


def input_stats(block: Block, linear: str, chunks: list[Chunk]) -> InputStats:
    """Statistics of the inputs that one of a block's linears gets from the chunks' unmasked tokens."""
    tap = cast(TappedLinear, block.get_submodule(linear))
    stats = InputStats(tap.in_features, tap.weight.device)
    tap.tapped = True
    for chunk in chunks:
        try:
            block(*chunk)
        except Tapped as reached:
            mask = chunk[3]
            rows = reached.inputs.flatten(0, 1) if mask is None else reached.inputs[mask[:, 0, 0]]
            stats.add(rows)
    tap.tapped = False
    return stats
