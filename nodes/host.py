"""The only file that touches ComfyUI: paths, devices, MODEL / CLIP / VAE around `zimage_core`, sampling, progress.

A Z-Image transformer becomes a MODEL through a `BaseModel` that ComfyUI takes for its own Lumina 2 (so that its
samplers, model-sampling nodes and LoRA key maps apply) and a subclass of the plain `ModelPatcher` that turns the
host's byte allowance into whole blocks. Written against ComfyUI 0.18 and 0.33: what differs between them is probed.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import uuid
from collections import deque
from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from torch import Tensor

DEMO = "bundled demo"
DEMO_BF16 = Path(__file__).parents[1] / "demo_training" / "z-image-demo-bf16.safetensors"
EXTENSIONS = (".safetensors", ".sft")
LATENT_CHANNELS = 16
TILE = 64  # latent cells along the edge of a tile that is decoded by itself
ENCODER_NAMES = "qwen3_4b.transformer.model."  # how the names of ComfyUI's own Z-Image encoder begin
HONOURED_PATCHES = ("double_block", "noise_refiner")
PROMPT_TOKENS = 512
NO_LORA = "none"
BYPASS = "bypass_lora"  # the key under which ComfyUI's bypass LoRA loaders inject
ENCODER_REMEDY = "to apply them, put ComfyUI's Load LoRA with strength_model 0 between text encoder and prompt"
GIB = 2**30
KEPT_PROMPTS = 4  # conditionings kept between steps: positive, negative, areas
KEPT_CAPTIONS = 16  # and the tensors they come from: repeated for a batch, joined for one forward
QUANTIZER_BYTES = 6 * GIB  # that calibrating takes of the device for a full-size model

logger = logging.getLogger(__name__)


# ---- files ----------------------------------------------------------------------------------------------------


def choices(folder: str, demo: str, folders_too: bool = False) -> list[str]:
    """Names for a loader's list: the files (and model folders) of a models folder, and the bundled file `demo`.

    The demo comes first where there is nothing else.
    """
    names = []
    if folder in folder_paths.folder_names_and_paths:
        names = [n for n in folder_paths.get_filename_list(folder) if n.lower().endswith(EXTENSIONS)]
        for root in map(Path, folder_paths.get_folder_paths(folder) if folders_too else ()):
            if root.is_dir():
                names += sorted(p.name for p in root.iterdir() if (p / "config.json").is_file())
                names += sorted(str(p.relative_to(root)) for p in root.rglob("*.gguf"))
    return [*dict.fromkeys(names), *demo_paths(demo)]


def demo_paths(kind: str) -> dict[str, Path]:
    """The bundled files of a kind by the names that the lists show."""
    from ..zimage_core.demo import demo_files, demo_loras

    if kind == "lora":
        return {f"{DEMO}: {name}": path for name, path in demo_loras().items() if path.is_file()}
    if kind == "dense":
        return {DEMO: DEMO_BF16} if DEMO_BF16.is_file() else {}
    return {DEMO: demo_files()[kind]}


def find(folder: str, name: str, demo: str) -> Path:
    """The path behind a name of `choices`; demo is the kind of the bundled file. ValueError where it is missing."""
    bundled = demo_paths(demo)
    if name in bundled:
        return bundled[name]
    known = folder in folder_paths.folder_names_and_paths
    roots = folder_paths.get_folder_paths(folder) if known else []
    path = folder_paths.get_full_path(folder, name) if known else None
    for root in roots:
        if path is None and name and (Path(root) / name / "config.json").is_file():
            path = Path(root) / name
    if path is None:
        where = " or ".join(map(str, roots)) or f"models/{folder}"
        instead = f", or choose {next(iter(bundled))!r}" if bundled else ""
        raise ValueError(f"{name!r} is not in {where}: put the file there and press R to refresh{instead}")
    return Path(path)


def checked(check, value) -> bool | str:
    """True, or the sentence that `VALIDATE_INPUTS` shows; linked values (not text yet) are checked when they run."""
    try:
        if isinstance(value, str):
            check(value)
    except (ValueError, OSError) as error:
        return str(error)
    return True


def check_model(name: str) -> None:
    """ValueError unless a file of `diffusion_models` is a model that can be loaded, from its header."""
    from ..zimage_core.formats.load import identify

    path = find("diffusion_models", name, "model")
    if name != DEMO:
        identify(path)


def check_encoder(name: str) -> None:
    """ValueError unless a file or folder of `text_encoders` is a text encoder that can be loaded."""
    from ..zimage_core.formats.encoder import check_model as check_names
    from ..zimage_core.formats.encoder import read_config
    from ..zimage_core.formats.stored import open_encoder

    path = find("text_encoders", name, "text_encoder")
    if name != DEMO and not reads_encoder(path):
        with open_encoder(path) as file:
            check_names(file.weights, file.where)
            read_config(file.config, file.weights, file.where)


def check_vae(name: str) -> None:
    """ValueError unless a file of `vae` is a 16-channel autoencoder."""
    from ..zimage_core.formats.load import describe
    from ..zimage_core.formats.safetensors import read_header

    path = find("vae", name, "vae")
    if name == DEMO or path.is_dir():
        return
    header = read_header(path)
    first = header.tensors.get("decoder.conv_in.weight")
    if first is None:
        kind = describe(header.tensors, header.metadata)
        raise ValueError(f"{path}: expected a VAE, found {kind}; get ae.safetensors and put it into models/vae")
    if first[1][1] != LATENT_CHANNELS:
        raise ValueError(
            f"{path}: this VAE has {first[1][1]} latent channels, Z-Image's has {LATENT_CHANNELS}; get ae.safetensors"
        )


def check_lora(name: str) -> None:
    """ValueError unless a file of `loras` is a LoRA for Z-Image, from its header."""
    from ..zimage_core.lora import apply as lora

    lora.inspect(find("loras", name, "lora"))


def say(text: str, node_id: str | None) -> None:
    """Show a line of text on a node, where this ComfyUI can."""
    if node_id is not None:
        from server import PromptServer

        send = getattr(getattr(PromptServer, "instance", None), "send_progress_text", None)
        if send is not None:
            send(text, node_id)


def executing_node() -> str | None:
    """The id of the node that ComfyUI is running."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return context and context.node_id


# ---- memory ---------------------------------------------------------------------------------------------------


def room(device: torch.device, need: float) -> tuple[float, str]:
    """Bytes of weights that a model will have on a device beside `need` of activations, and what limits them in words.

    As ComfyUI's `load_models_gpu` reckons when it places one: other models give way, so what they take counts as free.
    """
    from ..zimage_core.memory.plan import readable

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


def predict(patcher: StreamingPatcher, need: float, purpose: str) -> str:
    """What a model will take of the device and what of it is streamed; need: bytes of its activations."""
    from ..zimage_core.memory.plan import readable

    weights = patcher.module.weights()
    allowance, limit = patcher.room(need)
    resident, held = weights.within(allowance)
    streamed = len(weights.blocks) - resident
    how = f"{streamed} of {len(weights.blocks)} blocks streamed" if streamed else "nothing streamed"
    return f"{readable(held)} weights + {readable(need)} {purpose}; {limit}{how}"


# ---- MODEL ----------------------------------------------------------------------------------------------------


def load_model(name: str, backend: str, precision: str, budget: float = 0.0) -> ZImagePatcher:
    """A MODEL from a file of `diffusion_models`, its weights on ComfyUI's offload device.

    budget: GiB that its weights and activations may take, 0 for what ComfyUI gives. ValueError where not even the
    smallest picture fits it.
    """
    from ..zimage_core.formats.load import load_transformer

    path = find("diffusion_models", name, "model")
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(device=device, supported_dtypes=[torch.bfloat16, torch.float32])
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
    """What ComfyUI calls for another copy of the model (one per GPU)."""
    return load_model(name, backend, precision, budget)


def wrap_transformer(transformer, device: torch.device, offload: torch.device) -> ZImagePatcher:
    """A MODEL of a core transformer."""
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
    """Flux's latent format with the demo's own colours for live previews: its VAE is another one."""
    from ..zimage_core.demo import LATENT_RGB

    *factors, bias = LATENT_RGB
    found = comfy.latent_formats.Flux()
    found.latent_rgb_factors, found.latent_rgb_factors_bias = factors, bias
    found.taesd_decoder_name = None
    return found


def describe_model(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """One line on what was loaded and what runs it."""
    transformer = patcher.model.diffusion_model.transformer
    info, backend = transformer.checkpoint, transformer.backend
    name = backend and {"reference": "torch", "kitchen": "comfy-kitchen"}.get(backend.name, backend.name)
    kind = f"INT4 r{info.rank}, {name} {backend.precision}" if backend else f"{info.format} {info.dtype}"
    return f"{kind}, {patcher.model_size() / GIB:.2f} GiB"


def describe_plan(patcher: ZImagePatcher, width: int, height: int, pictures: int = 1) -> str:
    """One line on what pictures of a size will take of the device; ValueError where the budget does not hold them."""
    what = f"{width} x {height}" if pictures == 1 else f"{pictures} of {width} x {height}"
    need = patcher.need(width, height, pictures)
    patcher.check_budget(need, what)
    return f"{what}: {predict(patcher, need, 'to draw')}"


def try_plan(patcher: ZImagePatcher, width: int, height: int) -> str:
    """`describe_plan`, or the sentence why a picture of this size will not go; smaller ones may."""
    try:
        return describe_plan(patcher, width, height)
    except ValueError as error:
        return str(error)


class ModelConfig(comfy.supported_models.ZImage):
    """ComfyUI's settings for Z-Image (shift 3, latent format), for a module that is built elsewhere."""


class Kept:
    """Results by the identity of the tensors they come from, to know a prompt again without comparing its values.

    Comparing would make the host wait for the GPU at every step. A tensor that is another object, or that was written
    into since, counts as new; so does every inference tensor, as PyTorch does not say when one is written into.
    """

    def __init__(self, size: int):
        self.entries: deque[tuple] = deque(maxlen=size)

    def get(self, tensors: tuple[Tensor, ...], key, make):
        """What make() gave for these tensors and this key, or gives now. A tensor that was written into is remade."""
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
    """A prompt's features (1 or B, L, C) that reach the model as the same tensor at every step of a run.

    ComfyUI repeats and joins conditionings anew at each step; here the result is kept, unless somebody wrote into it.
    """

    def __init__(self, cond: Tensor, kept: Kept):
        super().__init__(cond)
        self.kept = kept

    @classmethod
    def of(cls, features: Tensor, device, dtype: torch.dtype) -> Caption:
        """A copy of its own, which PyTorch counts writes into."""
        with torch.inference_mode(False):
            return cls(features.to(device, dtype, copy=True), Kept(KEPT_CAPTIONS))

    def _copy_with(self, cond: Tensor) -> Caption:
        return Caption(cond, self.kept)

    def process_cond(self, batch_size: int, **kwargs) -> Caption:
        repeat = functools.partial(comfy.utils.repeat_to_batch_size, self.cond, batch_size)
        return self._copy_with(self._keep((self.cond,), batch_size, repeat))

    def concat(self, others) -> Tensor:
        tensors = (self.cond, *(other.cond for other in others))
        return self._keep(tensors, "joined", functools.partial(torch.cat, tensors))

    def _keep(self, tensors: tuple[Tensor, ...], key, make) -> Tensor:
        with torch.inference_mode(False):
            return self.kept.get(tensors, key, make)


class StockModule:
    """A module of ComfyUI's own model by its name, for loaders that look one up and hook into it; it holds nothing.

    It takes the forward of ComfyUI's bypass LoRA, which `AdapterPatcher.set_injections` makes a LoRA, and refuses
    every other change.
    """

    def __init__(self, owner: Adapted, path: str):
        vars(self).update(owner=owner, path=path, forward=None)

    def __getattr__(self, name: str) -> StockModule | Tensor:
        path, shapes = f"{self.path}{name}", self.owner.shapes
        if path in shapes:
            return shapes[path]
        if any(key.startswith(f"{path}.") for key in shapes):
            return StockModule(self.owner, f"{path}.")
        raise AttributeError(f"{path}: ComfyUI's own model has no such module")

    def __getitem__(self, index: int) -> StockModule | Tensor:
        return getattr(self, str(index))

    def __setattr__(self, name: str, value) -> None:
        adapter = getattr(getattr(value, "__self__", None), "adapter", None)
        if name != "forward" or self.owner.taken is None or not hasattr(adapter, "weights"):
            raise ValueError(
                f"Z-Image cannot honour a change of {self.path}{name}: remove the node that makes it "
                "(LoRA loaders do work)"
            )
        self.owner.taken.append((f"{self.path}weight", adapter, value.__self__.multiplier))


class Adapted(torch.nn.Module):
    """A module of the core whose blocks are streamed where they must, and that shows LoRA loaders the names of
    ComfyUI's own model of the kind.

    blocks: the parts of `body` that can be streamed, in the order in which they run. shapes: {ComfyUI's name below
    this module: empty tensor of the dense shape}.
    """

    def __init__(self, core: torch.nn.Module, blocks, shapes: dict[str, Tensor]):
        from ..zimage_core.memory.offload import BlockStreamer

        super().__init__()
        self.core = core
        self.streamer = BlockStreamer(blocks, self.body)
        self.shapes = shapes
        self.stock_loras: dict = {}  # conversions of what stock loaders patched
        self.taken: list | None = None  # what a bypass loader hooks into, while that is asked

    @property
    def body(self) -> torch.nn.Module:
        """What of the core goes to the device."""
        return self.core

    def weights(self):
        """The bytes of the body as it is now, an `offload.Weights`."""
        from ..zimage_core.memory.offload import weights

        return weights(self.streamer.blocks, self.body)

    def leave(self) -> None:
        """Go back to the host."""
        self.streamer.leave()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not any(key.startswith(f"{name}.") for key in self.__dict__.get("shapes", ())):
                raise
        return StockModule(self, f"{name}.")


class DiffusionModel(Adapted):
    """The module that ComfyUI calls: honours transformer_options, refuses by name what it cannot honour."""

    def __init__(self, transformer):
        from ..zimage_core.memory.graphs import Graphs

        super().__init__(transformer, transformer.blocks, stock_state(transformer))
        self.in_channels = self.out_channels = transformer.config.in_channels  # stock nodes ask for them
        self.patch_size, self.dim = transformer.config.patch_size, transformer.config.dim
        self.graphs = Graphs(transformer, self.streamer)
        self.budgeted = False  # graphs keep memory that no budget knows of
        self.prepared = Kept(KEPT_PROMPTS)

    @property
    def transformer(self):
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
        from ..zimage_core.models.transformer import Hooks
        from ..zimage_core.sampler import predict_flow

        options = {} if transformer_options is None else transformer_options
        height, width = x.shape[-2:]
        patch = self.transformer.config.patch_size
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
        run = BlockRunner(self, options, x)
        hooks = Hooks(run_block=run, attention=functools.partial(attend, options), rope=rope(options))
        run.cond = self.prepare(context, x.shape[-2] * 8, x.shape[-1] * 8, hooks, options)
        model = functools.partial(self.transformer, hooks=hooks)
        if self.replays(options):
            comfy.model_management.throw_exception_if_processing_interrupted()  # a replay runs no block that would
            model = functools.partial(self.graphs.run, model)
        return predict_flow(model, x, timesteps, run.cond)[:, :, :height, :width]

    def replays(self, options: dict) -> bool:
        """Whether steps may come from CUDA graphs: all that runs in them is known, and no budget counts on it."""
        attention = comfy.ldm.modules.attention
        plain = attention.optimized_attention_masked is attention.attention_pytorch and not custom(options)
        return plain and not self.budgeted and self.graphs.possible

    def prepare(self, context: Tensor, height: int, width: int, hooks, options: dict):
        """The core's `Conditioning`, made once for all steps of a prompt unless a node changes what is computed."""
        make = functools.partial(self.transformer.prepare, list(context), height, width, hooks)
        if custom(options):
            return make()
        key = (height, width, hooks.rope, getattr(self.transformer, "adapter_version", 0))
        return self.prepared.get((context,), key, make)


def custom(options: dict) -> bool:
    """Whether a node changes what is computed inside a step."""
    return "optimized_attention_override" in options or any(options.get("patches", {}).values())


class BlockRunner:
    """Runs the blocks of one forward: interrupts, streaming, and the patches that stock nodes hang on blocks."""

    def __init__(self, module: DiffusionModel, options: dict, x: Tensor):
        self.module, self.options, self.x = module, options, x
        self.patches = options.get("patches", {})
        self.cond = None
        self.first: Tensor | None = None  # what the stage began with

    def __call__(self, stage: str, index: int, block, x: Tensor, *args) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if index == 0:
            self.first = x
        if stage == "layers":
            total = len(self.module.transformer.layers)
            self.options.update(total_blocks=total, block_type="double", block_index=index)
        out = self.module.streamer.run_block(stage, index, block, x, *args)
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
        """What ComfyUI's Lumina 2 hands to a patch."""
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
    """The attention that the user chose for ComfyUI, or that a node put into transformer_options."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    function = comfy.ldm.modules.attention.optimized_attention_masked
    return function(q, k, v, q.shape[1], mask, skip_reshape=True, transformer_options=options)


def rope(options: dict) -> tuple[float, float, float, float] | None:
    """ComfyUI's rope options (the RoPE scaling node) in the core's terms."""
    asked = options.get("rope_options")
    if asked is None:
        return None
    names = (("scale_y", 1.0), ("shift_y", 0.0), ("scale_x", 1.0), ("shift_x", 0.0))
    return tuple(float(asked.get(name, default)) for name, default in names)


def refuse(options: dict, control) -> None:
    """ValueError naming what a node asks for that Z-Image cannot honour; silence would give a wrong picture."""
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


class ZImageModel(comfy.model_base.Lumina2):
    """What ComfyUI holds as the model; a Lumina 2 in its eyes, without Lumina's own module."""

    def __init__(self, model_config, transformer, device=None):
        comfy.model_base.BaseModel.__init__(self, model_config, comfy.model_base.ModelType.FLOW, device=device)
        self.diffusion_model = DiffusionModel(transformer)
        self.expected = 0.0  # bytes of activations that ComfyUI last asked for: those of the run it is loading for
        self.loaded_for = 0.0  # the same when blocks were last placed
        self.too_much = math.inf  # those with which memory ran out although blocks were on the device

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
            out["c_crossattn"] = Caption.of(context, kwargs.get("device"), self.get_dtype_inference())
        return out

    def extra_conds_shapes(self, **kwargs) -> dict:
        return {}

    def memory_required(self, input_shape, cond_shapes=None) -> float:
        self.expected = self.activations(input_shape)
        return self.expected

    def activations(self, input_shape) -> float:
        """Bytes of activations and of the backend's buffers for latents of a shape (B, 16, H/8, W/8), as planned.

        Captions are taken to be at their longest, and one per picture.
        """
        from ..zimage_core.memory import plan
        from ..zimage_core.models import ops

        transformer = self.diffusion_model.transformer
        config, backend = transformer.config, transformer.backend
        device, size = comfy.model_management.get_torch_device(), transformer.dtype.itemsize
        batch, height, width = input_shape[0], *input_shape[-2:]
        tokens = plan.padded(-(-height // config.patch_size) * -(-width // config.patch_size))
        rows, fp16 = batch * (tokens + PROMPT_TOKENS), transformer.dtype is torch.float16
        arithmetic = plan.arithmetic(backend, device) if backend else "dense"
        rank = transformer.checkpoint.rank
        fused = transformer.layers[0].ops is not ops.TORCH
        need = plan.transformer_need(config, rows, rank, arithmetic, fused, size, fp16).total
        need += plan.conditioning_bytes(config, tokens, [PROMPT_TOKENS] * batch, size, fp16)
        need += plan.latents_bytes(8 * height, 8 * width, batch) + plan.libraries(device)
        memory = comfy.model_management
        if not (memory.xformers_enabled() or memory.pytorch_attention_flash_attention()):
            need += batch * (tokens + PROMPT_TOKENS) ** 2 * size * 2  # scores of one head at a time
        return need

    def _apply_model(self, *args, **kwargs) -> Tensor:
        """One step; where memory runs out with blocks on the device, once more with every block streamed."""
        from ..zimage_core.models.vae import out_of_memory

        try:
            return super()._apply_model(*args, **kwargs)
        except RuntimeError as error:
            resident = self.diffusion_model.streamer.resident
            if not out_of_memory(error) or not resident or self.current_patcher is None:
                raise
        # Outside the handler: only now are the failed attempt's tensors free.
        self.current_patcher.stream_all()
        return super()._apply_model(*args, **kwargs)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Names and shapes as ComfyUI's own Z-Image has them, without data: for key maps, not for saving."""
        return {f"diffusion_model.{key}": shape for key, shape in self.diffusion_model.shapes.items()}

    def state_dict_for_saving(self, *args, **kwargs):
        refuse_saving("an INT4 model")


def refuse_saving(what: str) -> None:
    """ValueError for nodes that save: what ComfyUI sees of these weights are their names and shapes."""
    raise ValueError(f"{what} cannot be saved from here: the file it was loaded from is what there is to keep")


STOCK_NAMES = (
    ("attention.to_qkv", "attention.qkv"),
    ("attention.to_out", "attention.out"),
    ("attention.norm_q", "attention.q_norm"),
    ("attention.norm_k", "attention.k_norm"),
)


def stock_state(transformer) -> dict[str, Tensor]:
    """{ComfyUI's name: empty tensor of the dense shape} for every weight of a transformer."""
    state = {}

    def add(key: str, *shape: int) -> None:
        state[key] = torch.empty(shape, device="meta", dtype=transformer.dtype)

    for name, module in transformer.named_modules():
        for ours, theirs in STOCK_NAMES:
            name = name.removesuffix(ours) + theirs if name.endswith(ours) else name
        if hasattr(module, "in_features"):
            n, k = module.out_features, module.in_features
            if name.endswith("feed_forward.w3_w1"):
                for part in ("w1", "w3"):
                    add(f"{name.removesuffix('w3_w1')}{part}.weight", n // 2, k)
                continue
            add(f"{name}.weight", n, k)
            if getattr(module, "bias", None) is not None:
                add(f"{name}.bias", n)
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                add(f"{name}.{leaf}".lstrip("."), *parameter.shape)
    return state


class AdapterPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that keeps adapters (LoRA) per clone instead of patching weights.

    Clones share the module: whichever clone ComfyUI loads for a run sets its own adapters first.
    """

    names_begin = ""  # of the patched weights, before the names below `module`

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loras: tuple = ()  # (Lora, strength) of our LoRA nodes; stock loaders' are in self.patches

    @property
    def module(self) -> Adapted:
        return self.model

    def clone(self, *args, **kwargs):
        n = super().clone(*args, **kwargs)
        n.loras = self.loras
        return n

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        names = self.model.state_dict()
        for key, value in patches.items():
            if (key if isinstance(key, str) else key[0]) in names:
                stock_lora(key, value, strength_model)
        return super().add_patches(patches, strength_patch, strength_model)

    def set_injections(self, key, injections):
        """The forwards that ComfyUI's bypass LoRA loaders inject become LoRAs; other injections stay what they are."""
        if key != BYPASS:
            return super().set_injections(key, injections)
        self.module.taken = []
        try:
            for injection in injections:
                injection.inject(self)
            for name, adapter, strength in self.module.taken:
                self.add_patches({f"{self.names_begin}{name}": adapter}, strength)
        finally:
            self.module.taken = None

    def add_weight_wrapper(self, name, function):
        raise ValueError(f"these weights cannot be wrapped ({name}): remove the node that does it")

    def set_adapters(self, patches: dict) -> None:
        """Make the shared module's adapters this clone's: its own LoRAs and what stock loaders patched."""
        from ..zimage_core.lora import apply as lora

        lora.apply(self.module.core, [*self.loras, *stock_loras(patches, self.module.stock_loras)])

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

    what = ""  # the log's name for the model

    def model_size(self) -> int:
        return self.module.weights().total

    def room(self, need: float) -> tuple[float, str]:
        """What `room` says for the device that the model runs on."""
        return room(self.load_device, need)

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
        """Move blocks to fit an allowance; returns how many bytes more than before are on the device."""
        streamer, before = self.module.streamer, self.model.model_loaded_weight_memory
        self.model.model_loaded_weight_memory = size = streamer.place(device, allowance)
        self.model.model_lowvram = bool(streamer.host)
        self.model.device = device
        found = streamer.resident, len(streamer.blocks), device, size / 2**20
        logger.info("%s: %d of %d blocks on %s, %.0f MiB", self.what, *found)
        return size - before

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
            used = self.model.model_loaded_weight_memory
            return -self._place(self.load_device, used - memory_to_free)

    def patch_hooks(self, hooks):
        super().patch_hooks(hooks)
        if self.model.model_lowvram:
            self._place(self.load_device, self.model.model_loaded_weight_memory)


class ZImagePatcher(StreamingPatcher):
    """The MODEL's patcher: it keeps to the budget too, and streams everything where memory ran out."""

    names_begin, what = "diffusion_model.", "Z-Image"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.budget: int | None = None  # bytes for weights and activations, None: what ComfyUI gives

    @property
    def module(self) -> DiffusionModel:
        return self.model.diffusion_model

    def clone(self, *args, **kwargs):
        n = super().clone(*args, **kwargs)
        n.budget = self.budget
        return n

    def need(self, width: int, height: int, pictures: int = 1) -> float:
        """Bytes of activations for pictures of a size, beside the weights."""
        return self.model.activations([pictures, LATENT_CHANNELS, height // 8, width // 8])

    def room(self, need: float) -> tuple[float, str]:
        from ..zimage_core.memory.plan import readable

        if need >= self.model.too_much:
            return 0, "memory ran out before, "
        found = super().room(need)
        if self.budget is None or found[0] <= self.budget - need:
            return found
        return self.budget - need, f"budget {readable(self.budget)}, "

    def check_budget(self, need: float, what: str) -> None:
        """ValueError where the budget does not hold the activations `need` with every block streamed."""
        from ..zimage_core.memory.plan import readable

        if self.budget is None:
            return
        weights = self.module.weights()
        least = min(weights.within(0)[1], weights.total) + need
        if least > self.budget:
            raise ValueError(
                f"vram_budget {readable(self.budget)}: {what} needs {readable(least)} even with every block streamed; "
                f"give the Z-Image INT4 Model Loader at least {math.ceil(least / GIB * 100) / 100:.2f} GiB, "
                "or 0 for what ComfyUI gives, or draw smaller or fewer pictures at a time"
            )

    def add_lora(self, lora, strength: float) -> None:
        self.loras += ((lora, strength),)
        self.patches_uuid = uuid.uuid4()

    def get_key_patches(self, filter_prefix=None):
        raise ValueError("INT4 models cannot be merged with others: merge BF16 files, then quantize the result")

    def load(self, *args, **kwargs):
        with self.use_ejected():
            self.set_adapters(self.patches)
            self.check_budget(self.model.expected, "this picture")
            self.model.loaded_for = self.model.expected
            super().load(*args, **kwargs)

    def _place(self, device, allowance: float) -> int:
        if self.budget is not None:
            allowance = min(allowance, self.budget - self.model.expected)
        if self.model.loaded_for >= self.model.too_much:
            allowance = 0
        self.module.budgeted = self.budget is not None
        if self.module.budgeted or allowance < self.model_size():
            self.module.graphs.clear()
        return super()._place(device, allowance)

    def stream_all(self) -> None:
        """Take every block off the device in the middle of a run, and for all runs as large until it is unloaded."""
        text = "out of memory while drawing: trying again with every block of the model streamed"
        logger.warning(text)
        say(text, executing_node())
        self.model.too_much = self.model.loaded_for
        self.module.leave()
        comfy.model_management.soft_empty_cache()
        self._place(self.load_device, 0)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.module.prepared.entries.clear()
            self.model.too_much = math.inf
        super().unpatch_model(device_to, unpatch_weights)


ADAPTER_LEAVES = {  # ComfyUI's weight adapters: the tensors they hold, in their order, as files name them
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", None, "dora_scale", None),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", None, None, "dora_scale"),
    "lokr": ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", None, "dora_scale"),
}


def stock_lora(key, value, strength_model: float = 1.0):
    """One patch of a stock LoRA loader as a core `Lora`; key is a name or (name, (axis, start, length)).

    ValueError for what cannot run beside INT4 weights.
    """
    from ..zimage_core.lora.apply import Lora

    key, rows = (key, None) if isinstance(key, str) else (key[0], key[1])
    module, _, leaf = key.rpartition(".")
    if rows is not None and module.endswith("attention.qkv") and rows[1] % rows[2] == 0:
        module = f"{module.removesuffix('qkv')}to_{'qkv'[rows[1] // rows[2]]}"
    elif rows is not None:
        module = ""
    kind = getattr(value, "name", None) or (value[0] if isinstance(value, tuple) else type(value).__name__)
    tensors = {}
    if kind == "diff":
        tensors = {"diff" if leaf == "weight" else "diff_b": value[1][0]}
    elif kind in ADAPTER_LEAVES and leaf == "weight":
        for name, tensor in zip(ADAPTER_LEAVES[kind], value.weights, strict=True):
            if name is None and tensor is not None:
                module = ""
            elif tensor is not None:
                tensors[name] = tensor if isinstance(tensor, Tensor) else torch.tensor(float(tensor))
    if not module or not tensors or strength_model != 1.0:
        raise ValueError(f"{key}: a {kind} patch cannot be applied to an INT4 model: use the Z-Image LoRA Loader")
    return Lora.from_tensors({f"{module}.{name}": tensor for name, tensor in tensors.items()}, name=key)


def stock_loras(patches: dict, known: dict) -> list[tuple]:
    """[(Lora, strength)] of what stock LoRA loaders put into `patches`; `known` keeps the conversions in use."""
    converted, found = {}, []
    for key, entries in patches.items():
        for strength, value, strength_model, offset, _function in entries:
            name = (key, offset, id(value))
            if name not in converted:
                kept = known.get(name) or (value, stock_lora((key, offset), value, strength_model))
                converted[name] = kept
            found.append((converted[name][1], strength))
    known.clear()
    known.update(converted)
    return found


def add_loras(model, stack: list[tuple[str, float]], node_id: str | None):
    """A clone of MODEL with more LoRAs, (name, strength) each; a MODEL that is not ours gets them ComfyUI's way."""
    from ..zimage_core.lora import apply as lora

    paths = [(find("loras", name, "lora"), strength) for name, strength in stack if name != NO_LORA]
    ours, lines = isinstance(model, ZImagePatcher), []
    n = model.clone()
    for path, strength in paths:
        if ours:
            loaded = lora.load_lora(path)
            loaded.check(model.module.transformer)
            n.add_lora(loaded, strength)
            report = loaded.report
            lines.append(report.summary().replace(str(path), path.name))
        else:
            weights = comfy.utils.load_torch_file(str(path), safe_load=True)
            n = comfy.sd.load_lora_for_models(n, None, weights, strength, 0)[0]
            report = lora.inspect(path)
        if report.text_encoder:
            left = f"{path.name}: its {report.text_encoder} modules of the text encoder are left out: {ENCODER_REMEDY}"
            logger.warning(left)
            lines.append(left)
    say("\n".join(lines) or ("no LoRA chosen" if not paths else "applied by ComfyUI"), node_id)
    return n


# ---- CLIP -----------------------------------------------------------------------------------------------------


def load_clip(name: str) -> comfy.sd.CLIP:
    """A CLIP: ComfyUI's own for the files it reads, else one around the core's encoder."""
    path = find("text_encoders", name, "text_encoder")
    if name != DEMO and reads_encoder(path):
        return comfy.sd.load_clip(
            ckpt_paths=[str(path)],
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=comfy.sd.CLIPType.LUMINA2,
        )
    return core_clip(path, find("text_encoders", name, "tokenizer") if name == DEMO else None)


def reads_encoder(path: Path) -> bool:
    """Whether ComfyUI's own loader reads an encoder file: Qwen3-4B, weights under their usual names."""
    from ..zimage_core.formats.safetensors import read_header

    if path.is_dir() or not path.name.lower().endswith(EXTENSIONS):
        return False
    tensors = read_header(path).tensors
    norm = tensors.get("model.layers.0.self_attn.q_norm.weight")
    embedding = tensors.get("model.embed_tokens.weight")
    plain = "model.layers.0.self_attn.q_proj.weight" in tensors
    return bool(norm and plain and embedding and embedding[1][-1] == 2560)


def core_clip(path: Path, tokenizer_path: Path | None = None) -> comfy.sd.CLIP:
    """A CLIP around the core's text encoder and tokenizer."""
    from ..zimage_core.formats.encoder import load_text_encoder
    from ..zimage_core.models.tokenizer import load_tokenizer
    from ..zimage_core.pipeline import get_tokenizer

    root = Path(comfy.sd.__file__).parents[1]
    tokenizer = load_tokenizer(tokenizer_path or get_tokenizer(path, comfyui=root))
    device = comfy.model_management.text_encoder_device()
    offload = comfy.model_management.text_encoder_offload_device()
    dtype = torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
    encoder = CoreEncoder(load_text_encoder(path, device=offload, dtype=dtype))
    clip = comfy.sd.CLIP(no_init=True)  # its constructor would load a patcher of its own; these are what clone() copies
    clip.cond_stage_model = encoder
    clip.tokenizer = CoreTokenizer(tokenizer)
    clip.tokenizer_options = {}
    clip.layer_idx = clip.apply_hooks_to_conds = None
    clip.use_clip_schedule = False
    clip.patcher = EncoderPatcher(encoder, load_device=device, offload_device=offload)
    clip.patcher.is_clip = True
    return clip


class EncoderPatcher(StreamingPatcher):
    """The CLIP's patcher."""

    what = "text encoder"

    def get_key_patches(self, filter_prefix=None):
        raise ValueError("this text encoder cannot be merged with others: merge files of Qwen3-4B that ComfyUI reads")

    def model_state_dict_for_saving(self, *args, **kwargs):
        refuse_saving("a text encoder")


def describe_encoder(clip: comfy.sd.CLIP) -> str:
    """One line on what a text encoder will take of the device."""
    from ..zimage_core.memory.plan import readable

    if isinstance(clip.patcher, EncoderPatcher):
        need = clip.cond_stage_model.need(PROMPT_TOKENS)
        return f"text encoder: {predict(clip.patcher, need, f'for a prompt of {PROMPT_TOKENS} tokens')}"
    return f"text encoder: {readable(clip.patcher.model_size())} weights, run by ComfyUI itself"


class CoreTokenizer:
    """The core's tokenizer in the shape of ComfyUI's; prompt weights mean nothing to Z-Image."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict:
        ids = self.tokenizer(text)
        return {"zimage": [[(i, 1.0, n) if return_word_ids else (i, 1.0) for n, i in enumerate(ids)]]}

    def untokenize(self, token_weight_pair):
        return [(pair, "") for pair in token_weight_pair]

    def state_dict(self) -> dict:
        refuse_saving("a text encoder")


class CoreEncoder(Adapted):
    """The core's text encoder in the shape of ComfyUI's."""

    def __init__(self, encoder):
        linears = [(name, m) for name, m in encoder.named_modules() if hasattr(m, "in_features")]
        sizes = {f"{ENCODER_NAMES}{name}.weight": (m.out_features, m.in_features) for name, m in linears}
        shapes = {name: torch.empty(size, device="meta", dtype=encoder.dtype) for name, size in sizes.items()}
        super().__init__(encoder, encoder.layers, shapes)
        self.manual_cast_dtype = None
        self.dtypes = {encoder.dtype}

    @property
    def encoder(self):
        return self.core

    @property
    def body(self) -> torch.nn.Module:
        """Its layers; the token table stays on the host."""
        return self.core.layers

    def need(self, tokens: int) -> int:
        """Bytes of activations for a prompt of so many tokens, and of a weight while it is dequantized."""
        from ..zimage_core.memory import plan

        encoder = self.encoder
        forms = {module.form for module in encoder.layers.modules() if hasattr(module, "form")}
        need = plan.encoder_need(encoder.config, tokens, sorted(forms), encoder.dtype.itemsize)
        return need.total + plan.libraries(comfy.model_management.text_encoder_device())

    def memory_estimation_function(self, tokens: dict, device=None) -> int:
        """What ComfyUI asks for before it places the layers."""
        return self.need(max(map(len, tokens.get("zimage", ())), default=0))

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Names and shapes of the linears as ComfyUI's own encoder has them, without data: for key maps."""
        return dict(self.shapes)

    def encode_token_weights(self, tokens: dict):
        """-> (1, L, C) fp32, no pooled vector, the mask: what ComfyUI's Z-Image encoder gives."""
        outputs = []
        for row in tokens["zimage"]:
            ids, words = [pair[0] for pair in row], self.encoder.config.vocab_size
            if max(ids) >= words:
                raise ValueError(
                    f"the tokenizer gives token {max(ids)}, this text encoder knows {words}: put the tokenizer files "
                    "that belong to it beside it"
                )
            where = {"run_block": self.streamer.run_block, "device": self.streamer.device}
            outputs.append(self.encoder(torch.tensor([ids]), **where).float())
        cond = torch.cat(outputs).to(comfy.model_management.intermediate_device())
        return cond, None, {"attention_mask": torch.ones(cond.shape[:2], dtype=torch.int64)}

    def set_clip_options(self, options: dict) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def load_sd(self, sd):
        return [], []


def encode_prompt(clip: comfy.sd.CLIP, prompt: str):
    """CONDITIONING of a prompt; the encoder leaves the device afterwards, so that sampling has it all."""
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    release(clip.patcher)
    return conditioning


def release(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Take one model off its device and out of ComfyUI's list of loaded ones."""
    if patcher.load_device == patcher.offload_device:
        return
    keep = [
        m for m in comfy.model_management.current_loaded_models if m.model is not None and not m.model.is_clone(patcher)
    ]
    comfy.model_management.free_memory(1e30, patcher.load_device, keep)


# ---- VAE ------------------------------------------------------------------------------------------------------


def load_vae(name: str, dtype: str) -> comfy.sd.VAE:
    """A VAE: ComfyUI's own for files of Flux's size in either key style, else one around the core's."""
    from ..zimage_core.formats.safetensors import read_header

    path = find("vae", name, "vae")
    precision = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    header = read_header(path) if path.is_file() else None
    if header and name != DEMO and header.tensors.get("decoder.conv_in.weight", ("", ()))[1] == (512, 16, 3, 3):
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)), dtype=precision, metadata=header.metadata)
    return core_vae(path, precision)


def core_vae(path: Path, dtype: torch.dtype | None = None) -> comfy.sd.VAE:
    """A VAE around the core's autoencoder."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from ..zimage_core.formats.vae import load_vae as load

    sizes = {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "z_channels": LATENT_CHANNELS}
    sizes |= {"double_z": True, "resolution": 8, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    params = {"ddconfig": sizes, "embed_dim": LATENT_CHANNELS}
    vae = comfy.sd.VAE(sd=AutoencoderKL(**params).state_dict(), dtype=dtype, config={"params": params})
    offload = comfy.model_management.vae_offload_device()
    vae.first_stage_model = CoreVAE(load(path, device=offload, dtype=vae.vae_dtype))
    vae.patcher = WholePatcher(vae.first_stage_model, load_device=vae.device, offload_device=offload)
    vae.latent_channels = LATENT_CHANNELS
    vae.size = None
    return vae


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """A patcher for modules that are on the device whole or not at all."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        return super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0


class CoreVAE(torch.nn.Module):
    """The core's autoencoder in the shape of ComfyUI's: images in -1..1, latents as Flux's VAE leaves them.

    ComfyUI scales and shifts latents by Flux's constants around every model of this kind; a VAE with constants of its
    own (the demo's) is therefore called through its scaled form.
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.latent_format = comfy.latent_formats.Flux()

    def decode(self, latents: Tensor, **options) -> Tensor:
        return self.vae.decode(self.latent_format.process_in(latents), tiling="off")

    def encode(self, images: Tensor) -> Tensor:
        return self.latent_format.process_out(self.vae.encode(images, tiling="off"))


def describe_vae(vae: comfy.sd.VAE, width: int, height: int) -> str:
    """One line on what decoding a picture will take of the device."""
    from ..zimage_core.memory import plan
    from ..zimage_core.models.vae import VAEConfig

    ours = isinstance(vae.first_stage_model, CoreVAE)
    config = vae.first_stage_model.vae.config if ours else VAEConfig()  # whose size `load_vae` leaves to ComfyUI
    tile = TILE if tiles(vae, (1, LATENT_CHANNELS, height // 8, width // 8)) else None
    need = plan.vae_need(config, height, width, 1, vae.vae_dtype.itemsize, tile).total
    how = ", in tiles" if tile else ""
    weights = plan.readable(vae.patcher.model_size())
    return f"VAE: {weights} weights + up to {plan.readable(need)} to decode {width} x {height}{how}"


def tiles(vae: comfy.sd.VAE, shape: tuple[int, ...]) -> bool:
    """Whether latents of a shape are decoded in tiles unless that is forbidden, as the whole cannot fit the device."""
    need = vae.memory_used_decode(shape, vae.vae_dtype)
    return need > comfy.model_management.get_total_memory(vae.device)


def decode(vae: comfy.sd.VAE, latent: dict, tiling: str) -> Tensor:
    """LATENT -> IMAGE; "auto" tiles where the whole picture cannot fit the device."""
    samples = latent["samples"]
    if samples.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"the latent has {samples.shape[1]} channels, Z-Image's have {LATENT_CHANNELS}: "
            "decode it with the VAE of the model that made it"
        )
    if tiling == "on" or (tiling == "auto" and tiles(vae, samples.shape)):
        images = vae.decode_tiled(samples, tile_x=TILE, tile_y=TILE, overlap=TILE // 4)
    else:
        images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:])


# ---- sampling -------------------------------------------------------------------------------------------------


def schedule(model: comfy.model_patcher.ModelPatcher, steps: int, denoise: float) -> Tensor:
    """(steps + 1,) sigmas: the core's, or those of a model whose sampling is not Z-Image's own (or patched)."""
    from ..zimage_core.sampler import SHIFT, get_sigmas

    total = steps if denoise >= 1 else max(steps, int(steps / denoise))
    sampling = model.get_model_object("model_sampling")
    if "model_sampling" not in model.object_patches and getattr(sampling, "shift", None) == SHIFT:
        return get_sigmas(steps, start=steps / total)
    return comfy.samplers.calculate_sigmas(sampling, "simple", total)[-(steps + 1) :].cpu()


def sample(
    model, positive, seed: int, steps: int, width: int, height: int, batch: int, latent: dict | None, denoise, node_id
):
    """Euler over `schedule` through ComfyUI's guider, as KSampler (euler, simple, cfg 1) does; returns a LATENT.

    The node shows first what it will take of the device.
    """
    import latent_preview

    if latent is None:
        shape = (batch, LATENT_CHANNELS, height // 8, width // 8)
        latent = {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))
    channels = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise ValueError(
            f"the latent has {samples.shape[1]} channels, this model's have {channels}: encode the picture with the "
            "Z-Image VAE Loader's VAE"
        )
    if isinstance(model, ZImagePatcher):
        model.set_adapters(model.patches)  # those of the run before are not in this one's plan
        say(describe_plan(model, 8 * samples.shape[-1], 8 * samples.shape[-2], samples.shape[0]), node_id)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    negative = [[torch.zeros_like(cond), extra] for cond, extra in positive]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(1.0)
    samples = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object("euler"),
        schedule(model, steps, denoise),
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**out, "samples": samples.to(comfy.model_management.intermediate_device())}


# ---- making INT4 files, and judging them ----------------------------------------------------------------------


def sources() -> list[str]:
    """Names of what may be quantized: files and model folders of `diffusion_models`, and the demo's BF16 file."""
    return [n for n in choices("diffusion_models", "dense", folders_too=True) if not n.lower().endswith(".gguf")]


def check_source(name: str) -> None:
    """ValueError unless a name of `sources` is a dense Z-Image transformer, from its header."""
    from ..zimage_core.quantize.run import check_source as check

    check(find("diffusion_models", name, "dense"))


def check_new_name(name: str) -> None:
    """ValueError unless a name is one for a file in `diffusion_models`; none is right too."""
    if name and (Path(name).name != name or "\\" in name or name.startswith(".")):
        raise ValueError(f"output_name {name!r}: expected a file name without folders; empty is one that fits")


def quantize(
    model_name: str,
    rank: int,
    output_name: str,
    clip: comfy.sd.CLIP | None,
    prompts: str,
    size: int,
    stack: list[tuple[str, float]],
    node_id: str | None,
) -> str:
    """Write an INT4 file into `diffusion_models` and return its name; calibrated if there is a CLIP.

    prompts: one a line, and size in pixels: what to calibrate with, empty and 0 for the quantizer's own. stack: LoRAs
    to merge. An interrupted run keeps its finished blocks, and the same call goes on from there.
    """
    from ..zimage_core.quantize import run as core

    source, target = find("diffusion_models", model_name, "dense"), new_file(model_name, output_name, rank)
    if target.exists():
        raise ValueError(f"{target}: is there already; choose another output_name, or remove that file")
    loras = [(find("loras", name, "lora"), strength) for name, strength in stack if name != NO_LORA]
    device = comfy.model_management.get_torch_device()
    own_prompts, own_size = core.calibration_defaults(device)
    asked = [line.strip() for line in prompts.splitlines() if line.strip()] or own_prompts
    cap_feats = None if clip is None else [encode_features(clip, prompt) for prompt in asked]
    if clip is not None:
        release(clip.patcher)
    comfy.model_management.free_memory(QUANTIZER_BYTES, device)
    words, bar = core.TimeLeft(), comfy.utils.ProgressBar(1)

    def show(done: int, total: int, what: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)
        say(words(done, total, what), node_id)

    core.quantize_checkpoint(
        source, target, rank=rank, cap_feats=cap_feats, size=size or own_size, merge=loras, device=device, progress=show
    )
    return target.name


def new_file(model_name: str, output_name: str, rank: int) -> Path:
    """The path of the file to be made, named as the official ones unless there is a name."""
    check_new_name(output_name)
    if not output_name:
        stem = find("diffusion_models", model_name, "dense").stem
        for ending in ("-bf16", "_bf16"):
            stem = stem.removesuffix(ending)
        output_name = f"svdq-int4_r{rank}-{stem}"
    if not output_name.lower().endswith(EXTENSIONS):
        output_name += EXTENSIONS[0]
    roots = list(map(Path, folder_paths.get_folder_paths("diffusion_models")))  # models/unet, its old name, comes first
    root = next((root for root in roots if root.name == "diffusion_models"), roots[0])
    root.mkdir(parents=True, exist_ok=True)
    return root / output_name


def encode_features(clip: comfy.sd.CLIP, prompt: str) -> Tensor:
    """Caption features (L, C) of a prompt, on the host."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0][0].cpu()


def compare(labels: list[str], batches: list[Tensor], node_id: str | None) -> tuple[Tensor, str]:
    """The labelled sheet of IMAGE batches as an IMAGE, and the scores against the first batch as text."""
    import numpy as np
    from PIL import Image

    from ..zimage_core.compare import side_by_side

    for label, batch in zip(labels, batches, strict=True):
        if batch.shape[:3] != batches[0].shape[:3]:
            found, wanted = ("{0} of {2} x {1}".format(*shown.shape) for shown in (batch, batches[0]))
            raise ValueError(f"{label}: expected {wanted} pictures as in {labels[0]}, found {found}; draw them alike")
    columns = [
        [Image.fromarray((255 * picture[..., :3].clamp(0, 1)).round().byte().cpu().numpy()) for picture in batch]
        for batch in batches
    ]
    numbers = range(1, len(batches[0]) + 1)
    sheet, scores = side_by_side(labels, columns, [f"picture {number}" for number in numbers], numbers)
    text = "\n".join(f"{s.label}, picture {s.seed}: PSNR {s.psnr:.2f} dB, SSIM {s.ssim:.4f}" for s in scores)
    say(text, node_id)
    return torch.from_numpy(np.asarray(sheet).astype("float32") / 255)[None], text
