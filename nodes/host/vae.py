"""VAE: ComfyUI's own for the files that it reads, else the core's autoencoder with the same interface."""

from __future__ import annotations

from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ...zimage_core.failures import check_finite
from ...zimage_core.formats.safetensors import read_header
from ...zimage_core.formats.vae import load_vae as load_autoencoder
from ...zimage_core.memory.stages import decoding_bytes
from ...zimage_core.models.vae import VAE
from ...zimage_core.sizes import readable
from .files import DEMO, LATENT_CHANNELS, find

TILE = 64  # edge of a decoded tile, in latent cells


def load_vae(name: str, dtype: str) -> comfy.sd.VAE:
    """Load a file of `vae` as VAE: ComfyUI's own for Flux's sizes in either key style, else `core_vae`."""
    path = find("vae", name, "vae")
    precision = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    header = read_header(path) if path.is_file() else None
    if header and name != DEMO and header.tensors.get("decoder.conv_in.weight", ("", ()))[1] == (512, 16, 3, 3):
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)), dtype=precision, metadata=header.metadata)
    return core_vae(path, precision)


def core_vae(path: Path, dtype: torch.dtype | None = None) -> comfy.sd.VAE:
    """A VAE of the core's autoencoder."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    sizes = {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "z_channels": LATENT_CHANNELS}
    sizes |= {"double_z": True, "resolution": 8, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    params = {"ddconfig": sizes, "embed_dim": LATENT_CHANNELS}
    vae = HostVAE(sd=AutoencoderKL(**params).state_dict(), dtype=dtype, config={"params": params})
    offload = comfy.model_management.vae_offload_device()
    vae.first_stage_model = CoreVAE(load_autoencoder(path, device=offload, dtype=vae.vae_dtype))
    vae.patcher = WholePatcher(vae.first_stage_model, load_device=vae.device, offload_device=offload)
    vae.latent_channels = LATENT_CHANNELS
    vae.size = None
    return vae


class HostVAE(comfy.sd.VAE):
    """ComfyUI's VAE around a `CoreVAE`."""

    def get_sd(self) -> dict[str, Tensor]:
        """The core's tensors, for saving; ValueError where the file would lose the constants of the VAE."""
        vae, flux = self.first_stage_model.vae, self.first_stage_model.latent_format
        if (vae.config.scaling_factor, vae.config.shift_factor) != (flux.scale_factor, flux.shift_factor):
            raise ValueError(
                "this VAE cannot be saved here, as its scale and shift would be lost: keep the file it was loaded from"
            )
        return vae.state_dict()


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """A patcher for modules that are on the device whole or not at all."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        return super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0


class CoreVAE(nn.Module):
    """The core's autoencoder with the interface of ComfyUI's: images in -1..1, latents neither scaled nor shifted.

    ComfyUI scales and shifts latents by Flux's constants outside. The core's VAE applies its own, which may be others
    (the demo's are), so Flux's are applied here before them.
    """

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae
        self.latent_format = comfy.latent_formats.Flux()

    def decode(self, latents: Tensor, **options) -> Tensor:
        return self.vae.decode(self.latent_format.process_in(latents), tiling="off")

    def encode(self, images: Tensor) -> Tensor:
        return self.latent_format.process_out(self.vae.encode(images, tiling="off"))


def describe_vae(vae: comfy.sd.VAE, width: int, height: int) -> str:
    """One line: the device memory for decoding a picture of a size, in pixels."""
    if isinstance(vae.first_stage_model, CoreVAE):
        model = vae.first_stage_model.vae
    else:  # ComfyUI runs only those of Flux's sizes
        with torch.device("meta"):
            model = VAE().to(torch.bfloat16 if vae.vae_dtype.itemsize == 2 else torch.float32)
    if tiles(vae, (1, LATENT_CHANNELS, height // 8, width // 8)):
        blended = 16 * height * width  # three channels and their weights in fp32
        need, how = decoding_bytes(model, min(height, 8 * TILE), min(width, 8 * TILE)) + blended, ", in tiles"
    else:
        need, how = decoding_bytes(model, height, width), ""
    weights = readable(vae.patcher.model_size())
    return f"VAE: {weights} weights + up to {readable(need)} to decode {width} x {height}{how}"


def tiles(vae: comfy.sd.VAE, shape: tuple[int, ...]) -> bool:
    """Whether latents of a shape are too large for the device to decode whole."""
    need = vae.memory_used_decode(shape, vae.vae_dtype)
    return need > comfy.model_management.get_total_memory(vae.device)


def decode(vae: comfy.sd.VAE, latent: dict, tiling: str) -> Tensor:
    """LATENT -> IMAGE; tiling "auto" means tiles only where the whole picture is too large for the device."""
    samples = latent["samples"]
    if samples.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"the latent has {samples.shape[1]} channels, Z-Image's have {LATENT_CHANNELS}: "
            "decode it with the VAE of the model that made it"
        )
    check_finite(samples, "the latent", "look at the model, the LoRAs and the sampler that made it")
    if tiling == "on" or (tiling == "auto" and tiles(vae, samples.shape)):
        images = vae.decode_tiled(samples, tile_x=TILE, tile_y=TILE, overlap=TILE // 4)
    else:
        images = vae.decode(samples)
    check_finite(images, "VAE, decoding", "its file or the latent is damaged; fp16 overflows in it, use bf16 or fp32")
    return images.reshape(-1, *images.shape[-3:])
