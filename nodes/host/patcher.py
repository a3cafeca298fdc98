"""A module of the core behind ComfyUI's `ModelPatcher`: LoRAs kept beside the weights, whole blocks streamed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NoReturn

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ...zimage_core.linear import adapters
from ...zimage_core.lora.apply import apply as apply_loras
from ...zimage_core.memory.offload import BlockStreamer
from ...zimage_core.memory.placement import Weights, weights
from ...zimage_core.sizes import readable
from .dense import Change, DenseWeights, is_merge
from .lora import StockModule, stock_lora, stock_loras

BYPASS = "bypass_lora"  # the key under which ComfyUI's bypass LoRA loaders inject
DTYPES = [torch.bfloat16, torch.float16, torch.float32]  # that models run in, by preference; Turing has no bf16
logger = logging.getLogger(__name__)


def weight_allowance(device: torch.device, need: float) -> tuple[float, str]:
    """Bytes of weights that a model may have on a device beside `need` bytes of activations, and the limit in words.

    The arithmetic is that of ComfyUI's `load_models_gpu`: other models are unloaded for this one, so their bytes count
    as free.
    """
    memory, state = comfy.model_management, comfy.model_management.VRAMState
    if memory.vram_state is state.NO_VRAM and not memory.is_device_cpu(device):
        return 0, "--novram, "
    parted = memory.lowvram_available and memory.vram_state in (state.LOW_VRAM, state.NORMAL_VRAM)
    if not parted or memory.is_device_cpu(device):
        return math.inf, ""
    loaded = [m for m in memory.current_loaded_models if m.model is not None and m.device == device]
    free = memory.get_free_memory(device) + sum(m.model_loaded_memory() for m in loaded)
    least = memory.minimum_inference_memory()
    beside = free - max(least, need + memory.extra_reserved_memory())
    return max(0, beside, min(free * memory.MIN_WEIGHT_MEMORY_RATIO, free - least)), f"{readable(free)} free, "


def describe_need(patcher: StreamingPatcher, need: float, purpose: str) -> str:
    """A model's bytes on the device and how many blocks will be streamed, in words; need: bytes of activations."""
    weights = patcher.module.weights()
    allowance, limit = patcher.allowance(need)
    resident, held = weights.within(allowance)
    streamed = len(weights.blocks) - resident
    how = f"{streamed} of {len(weights.blocks)} blocks streamed" if streamed else "nothing streamed"
    if weights.kept_codes(allowance):
        how += ", 8-bit codes kept"
    return f"{readable(held)} weights + {readable(need)} {purpose}; {limit}{how}"


class Adapted(nn.Module):
    """A module of the core whose blocks can be streamed, and that shows LoRA loaders the names of ComfyUI's own model.

    blocks: the parts of `body` that can be streamed, in the order in which they run. stock: {ComfyUI's name below
    this module: empty tensor of the dense shape}. dense: the weights by these names, where they are plain numbers.
    """

    def __init__(
        self,
        core: adapters.Adapted,
        blocks: Sequence[nn.Module],
        stock: dict[str, Tensor],
        dense: DenseWeights | None = None,
    ):
        super().__init__()
        self.core = core
        self.streamer = BlockStreamer(blocks, self.body)
        self.stock, self.dense = stock, dense
        self.stock_loras: dict = {}  # conversions of what stock loaders patched
        self.hooked: list[tuple] | None = None  # (weight, adapter, strength) while a bypass LoRA loader injects
        self._counted: tuple[int, Weights] | None = None  # with which adapters, and what

    @property
    def body(self) -> nn.Module:
        """The part of the core that goes to the device."""
        return self.core

    def weights(self) -> Weights:
        """The bytes of the body as it is now, LoRAs included; ComfyUI asks five times a prompt."""
        version = self.core.adapter_version
        if self._counted is None or self._counted[0] != version:
            self._counted = version, weights(self.streamer.blocks, self.body)
        return self._counted[1]

    def leave(self) -> None:
        """Move everything back to the host."""
        self.streamer.leave()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not any(key.startswith(f"{name}.") for key in self.__dict__.get("stock", ())):
                raise
        return StockModule(self, f"{name}.")


class AdapterPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that keeps LoRAs per clone instead of patching weights.

    Clones share the module: the clone that ComfyUI loads for a run applies its own LoRAs first.
    """

    prefix = ""  # of ComfyUI's weight names, before the names below `module`
    what = ""  # the log's name for the model
    no_weights = ""  # the error for nodes that need the weights themselves; {} is what they would do

    @property
    def module(self) -> Adapted:
        return self.model

    def clone(self, *args, **kwargs):
        if kwargs.get("force_deepcopy"):
            self.refuse("trained")
        return super().clone(*args, **kwargs)

    def refuse(self, what: str) -> NoReturn:
        """ValueError for nodes that need weights of which ComfyUI sees only names and shapes here."""
        raise ValueError(self.no_weights.format(what))

    def dense_weights(self, what: str) -> DenseWeights:
        """The dense weights; ValueError, naming what cannot be done, where there are none."""
        return self.module.dense or self.refuse(what)

    def by_name(self, patches: dict) -> dict[str, list[tuple]]:
        """Patches by the names of `DenseWeights`."""
        return {key.removeprefix(self.prefix): found for key, found in patches.items()}

    def get_key_patches(self, filter_prefix=None) -> dict[str, list[tuple]]:
        weights, patches = self.dense_weights("merged with another"), self.by_name(self.patches)
        return {
            f"{self.prefix}{name}": [(weights.own(name), lambda weight, **_: weight), *patches.get(name, ())]
            for name in weights.places
        }

    def patched_weights(self, what: str) -> dict[str, Tensor]:
        """{ComfyUI's name: weight} with this clone's patches, for files."""
        weights, patches = self.dense_weights(what), self.by_name(self.patches)
        return {name: weights.patched(name, patches.get(name, ()), self.load_device).cpu() for name in weights.places}

    def model_state_dict(self, filter_prefix=None):
        if filter_prefix is None:
            return super().model_state_dict()
        return {f"{self.prefix}{name}": found for name, found in self.patched_weights("turned into a LoRA").items()}

    def model_state_dict_for_saving(self, *args, **kwargs) -> NoReturn:
        self.refuse("saved")

    def state_dict_for_saving(self, *args, **kwargs) -> dict[str, Tensor]:
        return self.model.state_dict_for_saving(self.patched_weights("saved"), *args, **kwargs)

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        names, wanted = self.model.state_dict(), {}
        for key, value in patches.items():
            name = key if isinstance(key, str) else key[0]
            if name not in names:
                continue
            if isinstance(value, list):
                places = self.dense_weights("merged with another").places
                found, shape = tuple(value[0][0].shape), tuple(names[name].shape)
                if found != shape:
                    raise ValueError(f"{name}: is {shape} here and {found} there: merge models of the same sizes")
                if places[name.removeprefix(self.prefix)].is_token:
                    continue  # ComfyUI leaves them as they are in its own model
            elif not (isinstance(value, Change) or self.module.dense and is_merge(value, strength_model)):
                stock_lora(key, value, strength_model)
            wanted[key] = value
        return super().add_patches(wanted, strength_patch, strength_model)

    def set_injections(self, key, injections):
        """Apply what ComfyUI's bypass LoRA loaders inject as LoRAs; other injections stay what they are."""
        if key != BYPASS:
            return super().set_injections(key, injections)
        hooked: list[tuple] = []
        self.module.hooked = hooked
        try:
            for injection in injections:
                injection.inject(self)
        finally:
            self.module.hooked = None
        for name, adapter, strength in hooked:
            self.add_patches({f"{self.prefix}{name}": adapter}, strength)

    def add_weight_wrapper(self, name, function):
        raise ValueError(f"these weights cannot be wrapped ({name}): remove the node that does it")

    def set_adapters(self, patches: dict) -> None:
        """Apply patches to the shared module: LoRAs beside its weights, or all of them in it where some are merges."""
        merges = any(is_merge(value, scale) for found in patches.values() for _, value, scale, *_ in found)
        dense = self.module.dense
        if dense and not merges:
            dense.merge({}, self.load_device)
        apply_loras(self.module.core, [] if merges else stock_loras(patches, self.module.stock_loras))
        if dense and merges:
            dense.merge(self.by_name(patches), self.load_device)

    def patch_hooks(self, hooks):
        patches = {key: list(found) for key, found in self.patches.items()}
        for key, found in self.get_combined_hook_patches(hooks).items():
            patches.setdefault(key, []).extend(found)
        self.set_adapters(patches)
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set=None):
        if self.current_hooks is not None:
            self.patch_hooks(None)


class StreamingPatcher(AdapterPatcher):
    """A patcher that turns ComfyUI's byte allowance into whole blocks on the device; the others are streamed."""

    def model_size(self) -> int:
        return self.module.weights().total

    def allowance(self, need: float) -> tuple[float, str]:
        """`weight_allowance` of the device that the model runs on."""
        return weight_allowance(self.load_device, need)

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        with self.use_ejected():
            self.set_adapters(self.patches)
            self.current_hooks = None
            self._place(device_to, math.inf if full_load else lowvram_model_memory)
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def _place(self, device, allowance: float) -> int:
        """Move blocks to fit an allowance (bytes) and return how many bytes more than before are on the device."""
        streamer, before = self.module.streamer, self.module.streamer.used
        size = streamer.place(device, allowance) - streamer.codes  # ComfyUI knows the weights alone
        self.model.model_loaded_weight_memory = size
        self.model.model_lowvram = bool(streamer.host)
        self.model.device = device
        found = streamer.resident, len(streamer.blocks), device, size / 2**20
        kept = ", 8-bit codes kept" if streamer.codes else ""
        logger.info("%s: %d of %d blocks on %s, %.0f MiB%s", self.what, *found, kept)
        return streamer.used - before

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(None, unpatch_weights=False)  # object patches and injections
        if unpatch_weights:
            self.set_adapters({})
            self.current_hooks = None
            self.model.current_weight_patches_uuid = None
            if device_to is not None and device_to != self.load_device:
                self.module.leave()
                self.model.device = device_to
            self.model.model_lowvram = False
            self.model.model_loaded_weight_memory = 0

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            used = self.model.model_loaded_weight_memory
            self.unpatch_model(unpatch_weights=False)
            self.patch_model(load_weights=False)
            self.load(device_to, lowvram_model_memory=used + extra_memory)
            return self.model.model_loaded_weight_memory - used

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        with self.use_ejected():
            return -self._place(self.load_device, self.module.streamer.used - memory_to_free)

    def patch_hooks(self, hooks):
        super().patch_hooks(hooks)
        if self.model.model_lowvram:
            self._place(self.load_device, self.model.model_loaded_weight_memory)
