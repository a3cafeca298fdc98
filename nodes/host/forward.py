"""The module that ComfyUI calls at each step: stock nodes' options and patches around the core's transformer."""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ...zimage_core.memory.graphs import Graphs
from ...zimage_core.models.attention import sdpa
from ...zimage_core.models.ops import finite
from ...zimage_core.models.transformer import Conditioning, Hooks, ZImageTransformer
from ...zimage_core.sampler import predict_flow
from .controlnet import with_controls
from .dense import DenseWeights, stock_places
from .guidance import ATTENTION_PATCH, NAG, join, parted, patched
from .patcher import Adapted

HONOURED_PATCHES = ("double_block", "noise_refiner", ATTENTION_PATCH)
OVERRIDE = "optimized_attention_override"  # the option of nodes that replace attention
KEPT_PROMPTS = 4  # conditionings kept between steps: positive, negative, areas
KEPT_CAPTIONS = 16  # captions kept between steps: repeated for a batch, joined for one forward


class Kept:
    """A cache of results by the identity of the tensors that they were computed from.

    Comparing values instead would make the host wait for the GPU at every step. A tensor that was written into since
    counts as new; so does every inference tensor, as PyTorch does not count writes into those.
    """

    def __init__(self, size: int):
        self.entries: deque[tuple] = deque(maxlen=size)

    def get(self, tensors: tuple[Tensor, ...], key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of make() for these tensors and this key, from the cache unless one of them was written into."""
        if any(tensor.is_inference() for tensor in tensors):
            return make()
        for asked, sources, versions, result in tuple(self.entries):
            same = asked == key and len(sources) == len(tensors) and all(map(operator.is_, sources, tensors))
            if same and versions == self._versions(sources, result):
                return result
        result = make()
        self.entries.append((key, tensors, self._versions(tensors, result), result))
        return result

    def _versions(self, tensors: tuple[Tensor, ...], result) -> list[int]:
        return [t._version for t in (*tensors, result) if isinstance(t, Tensor)]


class Caption(comfy.conds.CONDRegular):
    """A prompt's features (1 or B, L, C), which reach the model as the same tensor at every step of a run.

    ComfyUI repeats and joins conditionings anew at each step; here the results are cached.
    """

    def __init__(self, cond: Tensor, kept: Kept, joins: bool = False):
        super().__init__(cond)
        self.kept, self.joins = kept, joins  # whether captions of other lengths go into one forward with it

    @classmethod
    def of(cls, features: Tensor, device: torch.device | None, dtype: torch.dtype, joins: bool = False) -> Caption:
        """A Caption with its own copy of the features, made outside inference mode so that writes are counted."""
        with torch.inference_mode(False):
            return cls(finite(features, dtype).to(device, dtype, copy=True), Kept(KEPT_CAPTIONS), joins)

    def _copy_with(self, cond: Tensor) -> Caption:
        return Caption(cond, self.kept, self.joins)

    def can_concat(self, other) -> bool:
        return self.joins or super().can_concat(other)

    def process_cond(self, batch_size: int, **kwargs) -> Caption:
        repeat = functools.partial(comfy.utils.repeat_to_batch_size, self.cond, batch_size)
        return self._copy_with(self._keep((self.cond,), batch_size, repeat))

    def concat(self, others) -> Tensor:
        tensors = (self.cond, *(other.cond for other in others))
        return self._keep(tensors, "joined", functools.partial(join if self.joins else torch.cat, tensors))

    def _keep(self, tensors: tuple[Tensor, ...], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode(False):
            return self.kept.get(tensors, key, make)


class DiffusionModel(Adapted):
    """The module that ComfyUI calls: honours transformer_options, refuses by name what it cannot honour."""

    core: ZImageTransformer

    def __init__(self, transformer: ZImageTransformer):
        places = stock_places(transformer)
        plain = all(isinstance(getattr(place.module, place.leaf, None), Tensor) for place in places.values())
        stock = {name: torch.empty(p.shape, device="meta", dtype=transformer.dtype) for name, p in places.items()}
        super().__init__(transformer, transformer.blocks, stock, DenseWeights(transformer, places) if plain else None)
        self.places = places
        self.in_channels = self.out_channels = transformer.config.in_channels  # stock nodes read these
        self.patch_size, self.dim = transformer.config.patch_size, transformer.config.dim
        self.graphs = Graphs(transformer, self.streamer)
        self.budgeted = False  # whether the clone that is loaded has a budget, which does not count graphs' memory
        self.prepared = Kept(KEPT_PROMPTS)

    @property
    def transformer(self) -> ZImageTransformer:
        return self.core

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def leave(self) -> None:
        self.graphs.clear()
        super().leave()

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **conds) -> Tensor:
        """x (B, 16, H/8, W/8), timesteps (B,) sigma in 0..1, context (B, L, C) -> d x / d sigma."""
        options = {} if transformer_options is None else transformer_options
        refuse(options, control)
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options),
        ).execute(x, timesteps, context, transformer_options=options, **conds)

    def _forward(self, x, timesteps, context, transformer_options=None, **conds) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        height, width = x.shape[-2:]
        patch = self.transformer.config.patch_size
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
        hooks = Hooks(run_block=self.run_block, attention=functools.partial(attend, options), rope=rope(options))
        cond = self.prepare(context, x.shape[-2] * 8, x.shape[-1] * 8, hooks, options)
        run, cond = with_controls(PatchedRunner(self, options, x, cond), cond, self.transformer, options, x, timesteps)
        hooks = replace(hooks, run_block=run)
        model: Callable[..., Tensor] = functools.partial(self.transformer, hooks=hooks)
        if self.replays(options):
            comfy.model_management.throw_exception_if_processing_interrupted()  # a replay does not call `run_block`
            model = functools.partial(self.graphs.run, model)
        return predict_flow(model, x, timesteps, cond)[:, :, :height, :width]

    def run_block(self, stage: str, index: int, block, x: Tensor, *args) -> Tensor:
        """Run one block, from the device or streamed; raises where the user has interrupted, but within a capture."""
        if x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            comfy.model_management.throw_exception_if_processing_interrupted()
        return self.streamer.run_block(stage, index, block, x, *args)

    def replays(self, options: dict) -> bool:
        """Whether steps may be replayed as CUDA graphs: no node changes what runs in them, and there is no budget."""
        attention = comfy.ldm.modules.attention
        plain = attention.optimized_attention_masked is attention.attention_pytorch and not custom(options)
        return plain and not self.budgeted and self.graphs.possible

    def prepare(self, context: Tensor, height: int, width: int, hooks: Hooks, options: dict) -> Conditioning:
        """The core's `Conditioning`, cached for all steps of a prompt unless a node changes what is computed."""
        nag, *negative = options.get(NAG, (None,))

        def make() -> Conditioning:
            captions = parted(context) if patches(options, ATTENTION_PATCH) else list(context)
            cond = self.transformer.prepare(captions, height, width, hooks)
            if not negative:
                return cond
            against = self.transformer.prepare(list(finite(negative[0], self.dtype)), height, width, hooks)
            return self.transformer.guided(cond, against, nag)

        if custom(options):
            return make()
        key = (height, width, hooks.rope, self.transformer.adapter_version, nag)
        return self.prepared.get((context, *negative), key, make)


def patches(options: dict, name: str) -> list[Callable]:
    """The patches of one kind that nodes have set."""
    return options.get("patches", {}).get(name, [])


def custom(options: dict) -> bool:
    """Whether a node changes what is computed inside a step."""
    return OVERRIDE in options or any(options.get("patches", {}).values())


class PatchedRunner:
    """Runs the blocks of one forward, with the patches that stock nodes attach to blocks; a `Hooks.run_block`."""

    first: Tensor  # the input of the stage's first block

    def __init__(self, module: DiffusionModel, options: dict, x: Tensor, cond: Conditioning):
        self.module, self.options, self.x, self.cond = module, options, x, cond
        self.patches = options.get("patches", {})

    def __call__(self, stage: str, index: int, block, x: Tensor, *args) -> Tensor:
        if index == 0 and any(self.patches.values()):  # no CUDA graph is captured then, which nothing may outlive
            self.first = x
        if stage == "layers":
            total = len(self.module.transformer.layers)
            self.options.update(total_blocks=total, block_type="double", block_index=index)
            if found := patches(self.options, ATTENTION_PATCH):
                args = (*args[:-1], patched(args[-1], found, self.options, self.cond.image_tokens, index))
        out = self.module.run_block(stage, index, block, x, *args)
        if stage == "noise_refiner":
            for patch in self.patches.get("noise_refiner", ()):
                given = self._given(index, out, self.first, self.cond.context, *args)
                out = patch({**given, "block_type": "noise_refiner"}).get("img", out)
        elif stage == "layers":
            n = self.cond.image_tokens
            for patch in self.patches.get("double_block", ()):
                image, text = out[:, :n], out[:, n:]
                cos, sin, _, t_emb, _ = args
                given = self._given(index, image, self.first[:, :n], text, cos[:, :n], sin[:, :n], None, t_emb)
                result = patch(given)  # may also write into img and txt, which are views of out
                if "img" in result:
                    out[:, :n] = result["img"]
                if "txt" in result:
                    out[:, n:] = result["txt"]
        return out

    def _given(self, index, img, img_input, txt, cos, sin, _mask, t_emb, *_attention) -> dict:
        """The arguments that ComfyUI's Lumina 2 passes to a patch."""
        pe = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
        return {
            "img": img,
            "img_input": img_input,
            "txt": txt,
            "pe": pe,
            "vec": t_emb,
            "x": self.x,
            "block_index": index,
            "transformer_options": self.options,
        }


def attend(options: dict, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as ComfyUI is set to compute it, or as a node overrides it; a `Hooks.attention`.

    Where that is torch's, torch chooses among its own: ComfyUI prefers FlashAttention 2 to cuDNN's, with which a step
    at 1024 x 1024 takes an H100 82 ms instead of 72 (benchmarks/README.md)."""
    function = comfy.ldm.modules.attention.optimized_attention_masked
    if function is comfy.ldm.modules.attention.attention_pytorch and OVERRIDE not in options:
        return sdpa(q, k, v, mask)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    if mask is not None:  # some of ComfyUI's functions only add masks
        mask = torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return function(q, k, v, q.shape[1], mask, skip_reshape=True, transformer_options=options)


def rope(options: dict) -> tuple[float, float, float, float] | None:
    """ComfyUI's rope options (the RoPE scaling node) as `Hooks.rope`."""
    asked = options.get("rope_options")
    if asked is None:
        return None
    scale_y, shift_y = asked.get("scale_y", 1.0), asked.get("shift_y", 0.0)
    scale_x, shift_x = asked.get("scale_x", 1.0), asked.get("shift_x", 0.0)
    return float(scale_y), float(shift_y), float(scale_x), float(shift_x)


def refuse(options: dict, control) -> None:
    """ValueError that names what a node asks for and Z-Image cannot do; ignoring it would give a wrong picture."""
    patches = options.get("patches", {})
    asked = [f"the patch {name!r}" for name, found in patches.items() if found and name not in HONOURED_PATCHES]
    asked += [f"the replaced block {name!r}" for name, found in options.get("patches_replace", {}).items() if found]
    if control is not None:
        asked.append("a ControlNet of Stable Diffusion's kind")
    if asked:
        raise ValueError(
            f"Z-Image cannot honour {', '.join(asked)}: remove the node between loader and sampler that adds it "
            f"(wrappers, attention overrides, RoPE options and the patches {', '.join(HONOURED_PATCHES)} do work)"
        )
