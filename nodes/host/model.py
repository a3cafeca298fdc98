"""MODEL: a Z-Image transformer that ComfyUI takes for its own Lumina 2, so that samplers and model nodes apply."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from ...zimage_core import tune
from ...zimage_core.demo import LATENT_RGB
from ...zimage_core.failures import out_of_memory
from ...zimage_core.formats.load import load_transformer
from ...zimage_core.lora.apply import check
from ...zimage_core.lora.read import Lora, inspect, load_lora
from ...zimage_core.memory.stages import Request, libraries, sampling_bytes
from ...zimage_core.models.controlnet import ControlNet
from ...zimage_core.models.guidance import Nag
from ...zimage_core.models.tokenizer import MAX_TOKENS
from ...zimage_core.models.transformer import ZImageTransformer
from ...zimage_core.sizes import GIB, readable, round_up
from . import messages
from .dense import changes
from .files import DEMO, LATENT_CHANNELS, NO_LORA, find
from .forward import Caption, DiffusionModel, patches
from .guidance import ATTENTION_PATCH, nag_of
from .patcher import DTYPES, StreamingPatcher, describe_need

NO_WEIGHTS = (
    "a quantized model cannot be {} here: do that with its BF16 file, and quantize the result with Z-Image Quantize to "
    "INT4"
)
NO_TRAINING = (
    "a model from the Z-Image INT4 Model Loader cannot be trained: load its BF16 file with Load Diffusion Model"
)
logger = logging.getLogger(__name__)


def load_model(name: str, backend: str, precision: str, budget: float = 0.0) -> ZImagePatcher:
    """Load a file of `diffusion_models` as MODEL, its weights on ComfyUI's offload device.

    budget: GiB that its weights and activations may take, 0 for no limit but ComfyUI's. ValueError where not even the
    smallest picture fits it.
    """
    path = find("diffusion_models", name, "model")
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(device=device, supported_dtypes=DTYPES)
    if device.type == "cuda" and "auto" in (backend, precision):
        comfy.model_management.free_memory(tune.MEMORY, device)  # the first choice on a GPU times all ways
    transformer = load_transformer(
        path, device=offload, dtype=dtype, backend=backend, precision=precision, compute_device=device
    )
    patcher = wrap_transformer(transformer, device, offload)
    if name == DEMO:
        patcher.model.latent_format = demo_latents()
    patcher.cached_patcher_init = (_reload_model, (name, backend, precision, budget))
    if budget:
        patcher.budget = round(budget * GIB)
        patcher.check_budget(patcher.need(16, 16), "the smallest picture")
    return patcher


def _reload_model(name: str, backend: str, precision: str, budget: float, disable_dynamic: bool = False):
    """`load_model` as ComfyUI calls it for another copy of the model (one per GPU)."""
    return load_model(name, backend, precision, budget)


def wrap_transformer(transformer: ZImageTransformer, device: torch.device, offload: torch.device) -> ZImagePatcher:
    """A core transformer as MODEL."""
    config = transformer.config
    model_config = ModelConfig(
        {
            "image_model": "lumina2",
            "dim": config.dim,
            "n_layers": config.n_layers,
            "n_refiner_layers": config.n_refiner_layers,
            "n_heads": config.n_heads,
            "cap_feat_dim": config.cap_feat_dim,
            "in_channels": config.in_channels,
            "patch_size": config.patch_size,
            "disable_unet_model_creation": True,
        }
    )
    model_config.set_inference_dtype(transformer.dtype, None)
    return ZImagePatcher(ZImageModel(model_config, transformer, offload), device, offload)


def demo_latents() -> comfy.latent_formats.LatentFormat:
    """Flux's latent format with the colours of the demo's own VAE, for live previews."""
    *factors, bias = LATENT_RGB
    found = comfy.latent_formats.Flux()
    found.latent_rgb_factors, found.latent_rgb_factors_bias = factors, bias
    found.taesd_decoder_name = None
    return found


def describe_model(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """One line: the file's format, the backend, the size of the weights."""
    transformer = patcher.model.diffusion_model.transformer
    info, backend = transformer.checkpoint, transformer.backend
    name = backend and {"reference": "torch", "kitchen": "comfy-kitchen"}.get(backend.name, backend.name)
    kind = f"INT4 r{info.rank}" if info.rank else f"{info.format} {info.dtype}"
    kind += f", {name} {backend.precision}" if backend else ""
    return f"{kind}, {patcher.model_size() / GIB:.2f} GiB"


def describe_plan(patcher: ZImagePatcher, width: int, height: int, pictures: int = 1) -> str:
    """One line: the device memory for pictures of a size, in pixels; ValueError where the budget is too small."""
    what = f"{width} x {height}" if pictures == 1 else f"{pictures} of {width} x {height}"
    need = patcher.need(width, height, pictures)
    patcher.check_budget(need, what)
    return f"{what}: {describe_need(patcher, need, 'to generate')}"


def try_plan(patcher: ZImagePatcher, width: int, height: int) -> str:
    """`describe_plan`, or its error's sentence: smaller pictures may fit."""
    try:
        return describe_plan(patcher, width, height)
    except ValueError as error:
        return str(error)


class ModelConfig(comfy.supported_models.ZImage):
    """ComfyUI's settings for Z-Image: shift 3, latent format."""


class ZImageModel(comfy.model_base.Lumina2):
    """A Lumina 2 to ComfyUI, with our module in the place of Lumina's own."""

    def __init__(self, model_config: ModelConfig, transformer: ZImageTransformer, device: torch.device | None = None):
        comfy.model_base.BaseModel.__init__(self, model_config, comfy.model_base.ModelType.FLOW, device=device)
        self.diffusion_model = DiffusionModel(transformer)
        # Bytes of activations:
        self.expected = 0.0  # as ComfyUI last asked for them, for the run that it is loading for
        self.loaded_for = 0.0  # of the run that blocks were last placed for
        self.beside: tuple[ControlNet, ...] = ()  # ControlNets of the run, and the bytes of the budget that are theirs
        self.shared = 0.0
        self.nag: tuple[Nag, int] | None = None  # of the run
        self.too_much = math.inf  # from here on every block is streamed: a run as large was out of memory

    def extra_conds(self, **kwargs) -> dict:
        for key, what in (
            ("reference_latents", "reference latents"),
            ("reference_latents_text_embeds", "reference texts"),
            ("unclip_conditioning", "CLIP vision images"),
        ):
            if kwargs.get(key):
                raise ValueError(f"Z-Image Turbo takes no {what}: remove the node that adds them to the conditioning")
        out = comfy.model_base.BaseModel.extra_conds(self, **kwargs)
        context, wanted = kwargs.get("cross_attn"), self.diffusion_model.transformer.config.cap_feat_dim
        if context is not None:
            if context.shape[-1] != wanted:
                raise ValueError(
                    f"the conditioning is {context.shape[-1]} wide, this model wants {wanted}: encode the prompt with "
                    f"{'Qwen3-4B' if wanted == 2560 else f'the text encoder {DEMO!r}'}"
                )
            options = getattr(self.current_patcher, "model_options", {}).get("transformer_options", {})
            joins = bool(patches(options, ATTENTION_PATCH))
            out["c_crossattn"] = Caption.of(context, kwargs.get("device"), self.get_dtype_inference(), joins)
        return out

    def extra_conds_shapes(self, **kwargs) -> dict:
        context = kwargs.get("cross_attn")
        return {} if context is None else {"c_crossattn": context.shape}

    def memory_required(self, input_shape: Sequence[int], cond_shapes: Mapping | None = None) -> float:
        captions = [shape[1] for shape in (cond_shapes or {}).get("c_crossattn", ())]
        self.expected = self.activations(input_shape, max(captions, default=MAX_TOKENS))
        return self.expected

    def activations(
        self, input_shape: Sequence[int], caption: int = MAX_TOKENS, nag: tuple[Nag, int] | None = None
    ) -> float:
        """Bytes of activations for latents of a shape (B, 16, H/8, W/8), as planned.

        Each picture is assumed to have a caption of its own, of `caption` tokens, or MAX_TOKENS where that is more.
        nag: as `guidance.nag_of` has it; left out, that of the run.
        """
        caption = max(caption, MAX_TOKENS)
        transformer = self.diffusion_model.transformer
        batch, patch = input_shape[0], transformer.config.patch_size
        height, width = round_up(input_shape[-2], patch), round_up(input_shape[-1], patch)
        against, tokens = nag or self.nag or (None, 0)
        negative = [tokens] if against else []
        request = Request(8 * height, 8 * width, batch, [caption] * batch, negative, guided=False, nag=against)
        need = sampling_bytes(transformer, request, self.beside)
        need += libraries(comfy.model_management.get_torch_device())
        memory = comfy.model_management
        if not (memory.xformers_enabled() or memory.pytorch_attention_flash_attention()):
            tokens = height * width // patch**2 + caption
            need += batch * tokens**2 * transformer.dtype.itemsize * 2  # scores of one head at a time
        return need

    def _apply_model(self, *args, **kwargs) -> Tensor:
        """Run one step; after an out-of-memory error with blocks on the device, retry with every block streamed."""
        try:
            return super()._apply_model(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            resident = self.diffusion_model.streamer.resident
            if not out_of_memory(error) or not resident or self.current_patcher is None:
                raise
        # Outside the handler, since the error holds the failed attempt's tensors.
        self.current_patcher.stream_all()
        return super()._apply_model(*args, **kwargs)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Names and shapes of ComfyUI's own Z-Image, without data: for key maps, not for saving."""
        return {f"diffusion_model.{key}": shape for key, shape in self.diffusion_model.stock.items()}

    def requires_grad_(self, requires_grad: bool = True) -> NoReturn:
        """ValueError: TrainLoraNode begins with it, before its optimizer finds no weights."""
        raise ValueError(NO_TRAINING)

    def train(self, mode: bool = True):
        if mode:
            raise ValueError(NO_TRAINING)
        return super().train(mode)


class ZImagePatcher(StreamingPatcher):
    """The MODEL's patcher: it also keeps to the budget, and streams every block after an out-of-memory error."""

    prefix, what, no_weights = "diffusion_model.", "Z-Image", NO_WEIGHTS

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.budget: int | None = None  # bytes for weights and activations, None for no limit but ComfyUI's

    @property
    def module(self) -> DiffusionModel:
        return self.model.diffusion_model

    def clone(self, *args, **kwargs):
        if kwargs.get("force_deepcopy"):
            raise ValueError(NO_TRAINING)
        n = super().clone(*args, **kwargs)
        n.budget = self.budget
        return n

    def need(self, width: int, height: int, pictures: int = 1) -> float:
        """Bytes of activations for pictures of a size, in pixels."""
        return self.model.activations([pictures, LATENT_CHANNELS, height // 8, width // 8], nag=nag_of(self))

    def allowance(self, need: float) -> tuple[float, str]:
        if need >= self.model.too_much:
            return 0, "out of memory before, "
        found = super().allowance(need)
        if self.budget is None or found[0] <= self.budget - need:
            return found
        return self.budget - need, f"budget {readable(self.budget)}, "

    def check_budget(self, need: float, what: str) -> None:
        """ValueError where the budget is too small for `need` bytes of activations even with every block streamed."""
        if self.budget is None:
            return
        weights = self.module.weights()
        least = min(weights.within(0)[1], weights.total) + need
        if least > self.budget:
            raise ValueError(
                f"vram_budget {readable(self.budget)}: {what} needs {readable(least)} even with every block streamed; "
                f"give the Z-Image INT4 Model Loader at least {math.ceil(least / GIB * 100) / 100:.2f} GiB, "
                "or 0 for what ComfyUI gives, or generate smaller or fewer pictures at a time"
            )

    def add_lora(self, added: Lora, strength: float) -> None:
        found = changes(added, self.module.places)
        self.add_patches({f"{self.prefix}{name}": change for name, change in found.items()}, strength)

    def set_model_compute_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, self.module.dtype):
            raise ValueError(
                f"this model computes in {self.module.dtype}, which ComfyUI chose for this device, and not in {dtype}: "
                "remove Model Compute Dtype, or set it to default"
            )

    def load(self, *args, **kwargs):
        with self.use_ejected():
            self.set_adapters(self.patches)
            self.check_budget(self.model.expected, "this picture")
            self.model.loaded_for = self.model.expected
            super().load(*args, **kwargs)

    def _place(self, device, allowance: float) -> int:
        if self.budget is not None:
            allowance = min(allowance, self.budget - self.model.expected - self.model.shared)
        if self.model.loaded_for >= self.model.too_much:
            allowance = 0
        allowance = min(allowance, max(self.model_size(), self._free(device)))
        self.module.budgeted = self.budget is not None
        if self.module.budgeted or allowance < self.model_size():
            self.module.graphs.clear()
        return super()._place(device, allowance)

    def _free(self, device: torch.device) -> float:
        """Bytes that the model can have on a device now, beside a run's activations and what ComfyUI reserves."""
        memory = comfy.model_management
        need = max(memory.minimum_inference_memory(), self.model.expected + memory.extra_reserved_memory())
        return memory.get_free_memory(device) + self.module.streamer.used - need

    def stream_all(self) -> None:
        """Move every block off the device during a run, and for all runs as large until the model is unloaded."""
        text = "out of memory: trying again with every block of the model streamed"
        logger.warning(text)
        messages.say(text, messages.executing_node())
        self.model.too_much = self.model.loaded_for
        self.module.leave()
        comfy.model_management.soft_empty_cache()
        self._place(self.load_device, 0)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.module.prepared.entries.clear()
            self.model.too_much = math.inf
        super().unpatch_model(device_to, unpatch_weights)


def add_loras(
    model: comfy.model_patcher.ModelPatcher, stack: Sequence[tuple[str, float]], node_id: str | None
) -> comfy.model_patcher.ModelPatcher:
    """A clone of MODEL with more LoRAs, (name, strength) each; to a MODEL that is not ours ComfyUI applies them."""
    paths = [(find("loras", name, "lora"), strength) for name, strength in stack if name != NO_LORA]
    lines = []
    n = model.clone()
    for path, strength in paths:
        if isinstance(n, ZImagePatcher):
            loaded = load_lora(path)
            check(loaded, n.module.transformer)
            n.add_lora(loaded, strength)
            report = loaded.report
            lines.append(report.summary().replace(str(path), path.name))
        else:
            weights = comfy.utils.load_torch_file(str(path), safe_load=True)
            n = comfy.sd.load_lora_for_models(n, None, weights, strength, 0)[0]
            report = inspect(path)
        if report.text_encoder:
            lines.append(
                f"{path.name}: its {report.text_encoder} modules of the text encoder are left out: to apply them, put "
                "ComfyUI's Load LoRA with strength_model 0 between text encoder and prompt"
            )
            logger.warning(lines[-1])
    messages.say("\n".join(lines) or ("no LoRA chosen" if not paths else "applied by ComfyUI"), node_id)
    return n
