"""What each node uses of ComfyUI: a newer ComfyUI may lack some of it.

A node that lacks something stays in its workflows and says so when it runs; the others work.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)


def of(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names.split())


MEMORY = "comfy.model_management"
LISTS = of("folder_paths", "folder_names_and_paths get_filename_list get_folder_paths get_full_path")
PATCHER = (
    *of("comfy.model_patcher", "ModelPatcher ModelPatcher.clone ModelPatcher.get_all_callbacks"),
    *of(
        "comfy.model_patcher.ModelPatcher",
        "use_ejected patch_model unpatch_model apply_hooks get_combined_hook_patches is_clone",
    ),
    *of("comfy.model_patcher.ModelPatcher", "add_patches set_injections get_model_object model_state_dict"),
    *of(f"{MEMORY}.VRAMState", "LOW_VRAM NORMAL_VRAM NO_VRAM"),
    *of(MEMORY, "MIN_WEIGHT_MEMORY_RATIO current_loaded_models extra_reserved_memory get_free_memory is_device_cpu"),
    *of(MEMORY, "lowvram_available minimum_inference_memory vram_state"),
    *of(MEMORY, "cast_to_device lora_compute_dtype"),
    *of("comfy", "patcher_extension.CallbacksMP.ON_LOAD lora.calculate_weight weight_adapter.WeightAdapterBase"),
)
CONTROL = (
    *of(MEMORY, "get_torch_device unet_dtype unet_offload_device throw_exception_if_processing_interrupted"),
    *of("comfy.utils", "common_upscale repeat_to_batch_size"),
    "comfy.ldm.common_dit.pad_to_patch_size",
    "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE",
)
MODEL = (
    *PATCHER,
    *of("comfy.model_base", "BaseModel.extra_conds BaseModel.get_dtype_inference Lumina2 ModelType.FLOW"),
    *of("comfy.latent_formats", "Flux LatentFormat"),
    *of(MEMORY, "get_torch_device unet_dtype unet_offload_device soft_empty_cache xformers_enabled"),
    *of(MEMORY, "pytorch_attention_flash_attention throw_exception_if_processing_interrupted"),
    *of("comfy.patcher_extension", "WrapperExecutor.new_class_executor WrappersMP.DIFFUSION_MODEL get_all_wrappers"),
    *of("comfy.ldm.modules.attention", "attention_pytorch optimized_attention_masked"),
    *of("comfy", "conds.CONDRegular ldm.common_dit.pad_to_patch_size supported_models.ZImage"),
    *of("comfy.utils", "common_upscale repeat_to_batch_size"),
)
ENCODER = (
    *PATCHER,
    *of(MEMORY, "intermediate_device should_use_bf16 should_use_fp16 text_encoder_device text_encoder_offload_device"),
    *of("comfy.sd", "CLIP CLIPType.LUMINA2 load_clip"),
)
RELEASE = of(MEMORY, "current_loaded_models free_memory")
LORAS = (*LISTS, *MODEL, *of("comfy", "sd.load_lora_for_models utils.load_torch_file"))
NODES: dict[str, tuple[str, ...]] = {
    "ZImageINT4ModelLoader": (*LISTS, *MODEL),
    "ZImageTextEncoderLoader": (*LISTS, *ENCODER),
    "ZImageVAELoader": (
        *LISTS,
        *of("comfy", "latent_formats.Flux ldm.models.autoencoder.AutoencoderKL model_patcher.ModelPatcher sd.VAE"),
        *of("comfy.sd.VAE", "decode decode_tiled encode"),
        *of(MEMORY, "get_total_memory vae_offload_device"),
        "comfy.utils.load_torch_file",
    ),
    "ZImagePromptEncode": (*ENCODER, *RELEASE, "comfy.sd.CLIP.encode_from_tokens_scheduled"),
    "ZImageSampler": (
        *MODEL,
        *of("comfy.sample", "fix_empty_latent_channels prepare_noise"),
        *of("comfy.samplers", "CFGGuider KSampler.SAMPLERS KSampler.SCHEDULERS calculate_sigmas sampler_object"),
        *of("comfy", "model_management.intermediate_device utils.PROGRESS_BAR_ENABLED"),
        "latent_preview.prepare_callback",
    ),
    "ZImageVAEDecode": of("comfy", "sd.VAE model_patcher.ModelPatcher model_management.get_total_memory"),
    "ZImageLoraLoader": LORAS,
    "ZImageLoraStack": LORAS,
    "ZImageLoraSwitches": LORAS,
    "ZImageControlNetLoader": (*LISTS, *PATCHER, *CONTROL),
    "ZImageControlNetApply": (*PATCHER, *CONTROL),
    "ZImageQuantize": (*LISTS, *ENCODER, *RELEASE, *of("comfy", "utils.ProgressBar sd.CLIP")),
    "ZImageCompare": (),
    "ZImageSize": (),
    "ZImageNAG": (*PATCHER, "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE"),
    "ZImageVariety": ("comfy.model_patcher.ModelPatcher", "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE"),
}

OPTIONAL: dict[str, tuple[str, ...]] = {
    "lines on nodes": ("server.PromptServer.send_progress_text", "comfy_execution.utils.get_executing_context"),
    "nodes of nunchaku's packs that become ours": (
        "comfy_api.latest.io.NodeReplace",
        "server.PromptServer.add_on_prompt_handler",
    ),
}


def lacking(names: Iterable[str]) -> list[str]:
    """The names that this ComfyUI lacks; of nested ones only the outermost."""
    gone = [name for name in dict.fromkeys(names) if not there(name)]
    return [name for name in gone if not any(name.startswith(f"{other}.") for other in gone)]


def there(name: str) -> bool:
    """Whether a name exists: a module's attribute, or an attribute of that."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def provided(nodes: Mapping[str, type], titles: Mapping[str, str]) -> dict[str, type]:
    """The nodes; one that needs what this ComfyUI lacks is replaced by one that refuses to run, which is logged."""
    found = dict(nodes)
    for node_id, names in NODES.items():
        gone = lacking(names)
        if gone:
            text = f"{titles[node_id]} needs {', '.join(gone)}, which this ComfyUI lacks: update both"
            logger.warning(text)
            found[node_id] = refusing(nodes[node_id], text)
    for what, names in OPTIONAL.items():
        gone = lacking(names)
        if gone:
            logger.info("Z-Image INT4: no %s, as this ComfyUI lacks %s", what, ", ".join(gone))
    return found


def refusing(node, why: str) -> type:
    """A node with the inputs and outputs of another, which raises a ValueError when it runs."""

    def refuse(self, **inputs):
        raise ValueError(why)

    def input_types(cls):
        try:
            return node.INPUT_TYPES()
        except (ImportError, AttributeError):  # what is missing is what lists the files
            return {"required": {}}

    members = {"DESCRIPTION": f"{why}. {node.DESCRIPTION}", "FUNCTION": "refuse", "refuse": refuse}
    members |= {"INPUT_TYPES": classmethod(input_types), "VALIDATE_INPUTS": classmethod(lambda cls: True)}
    return type(node.__name__, (node,), members)
